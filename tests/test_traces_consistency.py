"""Segment routing (SRP): against a count of every window by hand, and what must hold of any trace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.traces.consistency import GROUPS, segment_routing, segment_routings
from moesim.traces.trace import RoutingTrace

NUM_EXPERTS = 5


def trace_of(requests: list[list[list[list[int]]]], num_experts: int = NUM_EXPERTS) -> RoutingTrace:
    """Return the trace of requests -> tokens -> layers -> experts (each list of the same length; -1 pads)."""
    rows = [(request, position, token) for request, tokens in enumerate(requests) for position, token in enumerate(tokens)]
    count = len(rows)
    return RoutingTrace(
        expert_ids=np.array([token for _, _, token in rows], np.int16), request_id=np.array([row[0] for row in rows]),
        position=np.array([row[1] for row in rows]), phase=np.ones(count, np.int8), step=np.arange(count),
        num_experts=num_experts, layer_ids=np.arange(len(rows[0][2])))


@st.composite
def traces(draw: st.DrawFn, min_tokens: int = 1) -> RoutingTrace:
    """Draw one to three requests of up to nine tokens, two layers, top-2 with padding."""
    pair = st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=2, unique=True).map(lambda ids: ([*ids, -1])[:2])
    token = st.lists(pair, min_size=2, max_size=2)
    return trace_of(draw(st.lists(st.lists(token, min_size=min_tokens, max_size=9), min_size=1, max_size=3)))


def windows_of(trace: RoutingTrace, window: int) -> list[np.ndarray]:
    """Return the rows of every window of every request."""
    rows = [np.flatnonzero(trace.request_id == request) for request in trace.requests()]
    return [own[start: start + window] for own in rows for start in range(len(own) - window + 1)]


def f1_by_confusion(trace: RoutingTrace, window: int, members: list[tuple[int, int]], alpha: int) -> tuple[float, float]:
    """Return F1 and relative size from true and false positives, token by token: no formula of the paper."""
    hit = false_alarm = missed = 0
    for rows in windows_of(trace, window):
        for layer, expert in members:
            used = [expert in trace.expert_ids[row, layer] for row in rows]
            on = sum(used) >= alpha
            hit += on * sum(used)
            false_alarm += on * (len(used) - sum(used))
            missed += (not on) * sum(used)
    total = hit + missed
    return (2 * hit / (2 * hit + false_alarm + missed) if total else np.nan), (hit + false_alarm) / total if total else np.nan


@settings(max_examples=60, deadline=None)
@given(trace=traces(), window=st.integers(1, 6))
def test_srp_is_the_best_f1_of_all_thresholds(trace: RoutingTrace, window: int) -> None:
    """For every group: the F1 is that of the confusion counts at the threshold given, and no threshold does better."""
    if not windows_of(trace, window):
        with pytest.raises(InputError, match="fewer than the window"):
            segment_routing(trace, window)
        return
    every = [(layer, expert) for layer in range(2) for expert in range(NUM_EXPERTS)]
    groups = {"model": {(): every}, "layer": {(layer,): [m for m in every if m[0] == layer] for layer in range(2)},
              "expert": {member: [member] for member in every}}
    for kind, members_of in groups.items():
        found = segment_routing(trace, window, kind)
        assert found.num_windows == len(windows_of(trace, window))
        for at, members in members_of.items():
            tried = [f1_by_confusion(trace, window, members, alpha) for alpha in range(window + 1)]
            scores = [score for score, _ in tried]
            assert found.srp[at] == pytest.approx(max(scores), nan_ok=True)
            if not np.isnan(scores[0]):
                assert found.threshold[at] == int(np.argmax(scores))
                assert found.relative_size[at] == pytest.approx(tried[int(found.threshold[at])][1])


@settings(max_examples=30, deadline=None)
@given(trace=traces(min_tokens=2))
def test_windows_of_one_token_are_routed_exactly(trace: RoutingTrace) -> None:
    """With m = 1 the segment router is the token router: F1 and relative size are 1."""
    for found in segment_routings(trace, 1).values():
        used = ~np.isnan(found.srp)
        assert np.all(found.srp[used] == 1)
        assert np.all(found.relative_size[used] == 1)


def test_a_constant_router_is_perfectly_consistent() -> None:
    """Experts that never change are found at every window; those never used have no score."""
    found = segment_routings(trace_of([[[[0, 3]]] * 8]), 4)
    assert found["model"].srp == 1
    assert found["layer"].srp.tolist() == [1]
    np.testing.assert_array_equal(found["expert"].srp, [[1, np.nan, np.nan, 1, np.nan]])
    assert found["model"].active_share == 2 / 5


def test_values_by_hand() -> None:
    """Tokens 0 0 1, m = 2: windows use expert 0 2, 1 times and expert 1 0, 1 times."""
    found = segment_routings(trace_of([[[[0]], [[0]], [[1]]]], num_experts=2), 2)
    assert found["expert"].srp.tolist() == [[2 * 3 / (4 + 3), 2 * 1 / (2 + 1)]]
    assert found["expert"].threshold.tolist() == [[0, 1]]  # on always, as every window uses it
    assert found["model"].srp == 2 * 4 / (6 + 4)
    assert found["model"].relative_size == 6 / 4


def test_interleaved_requests_are_told_apart() -> None:
    """A trace in which two requests take turns gives what the two give one after the other."""
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((40, 3, 8)), axis=2)[:, :, :2].tolist()
    apart = trace_of([ids[:20], ids[20:]], num_experts=8)
    mixed = apart.take(np.arange(40).reshape(2, 20).T.ravel())
    for group in GROUPS:
        one, other = (segment_routing(each, 4, group) for each in (apart, mixed))
        np.testing.assert_array_equal(one.srp, other.srp)
        np.testing.assert_array_equal(one.threshold, other.threshold)


def test_a_longer_window_is_harder_for_a_random_router() -> None:
    """Without consistency, SRP falls with m towards that of switching on always, 2 / (1 + E / k)."""
    rng = np.random.default_rng(5)
    ids = np.argsort(rng.random((600, 1, 8)), axis=2)[:, :, :2].tolist()
    trace = trace_of([ids], num_experts=8)
    srp = [float(segment_routing(trace, window).srp) for window in (1, 2, 4, 16, 64)]
    assert srp == sorted(srp, reverse=True)
    assert 2 / (1 + 8 / 2) <= srp[-1] < 0.5


@pytest.mark.parametrize(("arguments", "message"), [
    ((0,), "the window must be at least 1 token, got 0"),
    ((10,), "the longest request has 3 tokens, fewer than the window of 10"),
    ((1, "layers"), "unknown group of experts 'layers'. Did you mean 'layer'"),
])
def test_bad_input_is_refused(arguments: tuple[int, str], message: str) -> None:
    """No window, none that fits, an unknown group."""
    with pytest.raises(InputError, match=message):
        segment_routing(trace_of([[[[0]], [[0]], [[1]]]]), *arguments)
