"""Expert-aware batches: what shares a pass, against arrival order and against every balanced split."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.traces.batching import (
    BATCHERS,
    arrival_order,
    batched_steps,
    experts_per_pass,
    longest_queues,
    similar_paths,
)
from moesim.traces.trace import DECODE, PREFILL, RoutingTrace


def trace_of(experts: list[list[list[int]]], requests: list[int] | None = None, prompts: int = 0) -> RoutingTrace:
    """Tokens [token][layer][k]; one request each unless said otherwise; the first `prompts` of each are its prompt."""
    ids = np.array(experts)
    request = np.array(requests if requests is not None else range(len(ids)))
    position = np.array([np.sum(request[:row] == request[row]) for row in range(len(ids))])
    phase = np.where(position < prompts, PREFILL, DECODE)
    return RoutingTrace(expert_ids=ids, request_id=request, position=position, phase=phase, step=position, num_experts=8,
                        layer_ids=np.arange(ids.shape[1]))


@given(st.sampled_from(sorted(BATCHERS)), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_every_row_runs_once_in_order(batcher: str, batch: int, waiting: int, prompts: int, seed: int) -> None:
    """Passes partition the rows, keep each request's order and hold at most `batch` decode tokens."""
    rng = np.random.default_rng(seed)
    requests = np.sort(rng.integers(0, 7, 30)).tolist()
    ids = np.stack([[rng.permutation(8)[:2] for _ in range(3)] for _ in requests]).tolist()
    trace = trace_of(ids, requests, prompts)
    steps = batched_steps(trace, batcher, batch_size=batch, waiting=waiting, seed=seed)
    rows = np.concatenate([step.rows for step in steps])
    assert sorted(rows.tolist()) == list(range(len(requests)))
    for request in set(requests):
        assert np.all(np.diff(trace.position[rows[trace.request_id[rows] == request]]) > 0)
    assert all(len(step.rows) <= batch and len(set(step.requests.tolist())) == len(step.rows)
               for step in steps if step.phase == "decode")


def test_read_me_takes_the_longest_queues_whole_and_fills_up_with_a_head() -> None:
    """Queues of 3, 2 and 2 tokens and a budget of 4: the first whole, then the head of the next, and stop."""
    trace = trace_of([[[e]] for e in (1, 0, 2, 1, 0, 2, 1)])
    assert longest_queues(trace, np.arange(7), 4) == [[0, 3, 6, 1]]
    assert longest_queues(trace, np.arange(7), 5) == [[0, 3, 6, 1, 4]]
    assert longest_queues(trace, np.arange(7), 2) == [[0, 3]]
    assert longest_queues(trace, np.arange(7), 9) == [[0, 3, 6, 1, 4, 2, 5]]


def test_read_me_queues_by_the_heaviest_expert() -> None:
    """With gate weights a token waits for the expert that weighs most in its first layer."""
    trace = trace_of([[[0, 1]], [[0, 1]], [[2, 1]]])
    weights = np.array([[[0.4, 0.6]], [[0.9, 0.1]], [[0.3, 0.7]]], np.float32)
    weighted = RoutingTrace(expert_ids=trace.expert_ids, request_id=trace.request_id, position=trace.position,
                            phase=trace.phase, step=trace.step, num_experts=8, layer_ids=trace.layer_ids,
                            gate_weights=weights)
    assert longest_queues(weighted, np.arange(3), 2) == [[0, 2]]
    assert longest_queues(trace, np.arange(3), 2) == [[0, 1]]


def read_by(trace: RoutingTrace, groups: list[list[int]]) -> int:
    """The (layer, expert) pairs that the groups read, counted with sets."""
    return sum(len({(layer, int(e)) for row in group for layer in range(trace.num_layers)
                    for e in trace.expert_ids[row, layer]}) for group in groups)


def test_expertflow_splits_evenly_and_never_reads_more_than_arrival_order() -> None:
    """Over random tokens both batches are of equal size; the sum lies between the best split's and arrival order's."""
    gained = optimum = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        trace = trace_of([[rng.permutation(8)[:2].tolist() for _ in range(2)] for _ in range(8)])
        groups = similar_paths(trace, np.arange(8), 4)
        assert [len(g) for g in groups] == [4, 4]
        assert sorted([*groups[0], *groups[1]]) == list(range(8))
        everything = set(range(8))
        best = min(read_by(trace, [list(left), sorted(everything - set(left))])
                   for left in itertools.combinations(range(8), 4))
        arrival = read_by(trace, [list(range(4)), list(range(4, 8))])
        assert best <= read_by(trace, groups) <= arrival
        gained, optimum = gained + arrival - read_by(trace, groups), optimum + arrival - best
    assert gained >= optimum / 6  # tokens without any structure: a heuristic, but no idle one


def test_two_clear_groups_are_found() -> None:
    """Tokens of two kinds that arrive in turn are put with their own."""
    trace = trace_of([[[0, 1]], [[6, 7]], [[0, 2]], [[5, 7]], [[1, 2]], [[5, 6]]])
    assert sorted(similar_paths(trace, np.arange(6), 3)) == [[0, 2, 4], [1, 3, 5]]
    assert arrival_order(trace, np.arange(6), 3) == [[0, 1, 2]]
    assert similar_paths(trace, np.arange(3), 3) == [[0, 1, 2]]


def test_read_me_reads_fewer_experts_where_a_token_has_one_expert_everywhere() -> None:
    """On Read-ME's own kind of model batches read fewer distinct experts than in arrival order."""
    rng = np.random.default_rng(3)
    experts = rng.integers(0, 8, 240)
    trace = trace_of([[[int(e)]] * 4 for e in experts], np.repeat(np.arange(24), 10).tolist())
    read = {name: experts_per_pass(trace, batched_steps(trace, name, batch_size=6, waiting=18)) for name in BATCHERS}
    assert read["read-me"] < read["expertflow"] < read["fifo"]


@pytest.mark.parametrize(("options", "message"), [
    ({"batcher": "readme"}, "read-me"),
    ({"waiting": 0}, "waiting must be at least 1"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"repeat": True}, "repeat needs max_steps"),
])
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    """A misspelt batcher or a size of nothing is an error that says what to write."""
    values: dict = {"batcher": "fifo", "batch_size": 2, "waiting": 2} | options
    with pytest.raises(InputError, match=message):
        batched_steps(trace_of([[[0]], [[1]]]), values.pop("batcher"), **values)
