"""Batches, splits and made-up traces."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.traces import (
    DECODE,
    DENOISE,
    PREFILL,
    RoutingTrace,
    closed_loop_steps,
    first_requests,
    load_counts,
    select_phase,
    shuffle_tokens,
    split_requests,
    synthetic_trace,
    trace_stats,
)


def trace_of_requests(lengths, interleave=False, seed=0):
    """Return a trace of requests (prompt, decode) long; request ids 10, 11, ..."""
    request_id = np.concatenate([np.full(p + d, 10 + r) for r, (p, d) in enumerate(lengths)])
    position = np.concatenate([np.arange(p + d) for p, d in lengths])
    phase = np.concatenate([[PREFILL] * p + [DECODE] * d for p, d in lengths])
    if interleave:
        order = np.lexsort((np.random.default_rng(seed).random(len(position)), position))
        request_id, position, phase = request_id[order], position[order], phase[order]
    ids = np.arange(len(position))[:, None, None] % 4
    return RoutingTrace(expert_ids=ids, request_id=request_id, position=position, phase=phase.astype(int),
                        step=np.arange(len(position)), num_experts=4, layer_ids=np.array([0]))


LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)).filter(sum), min_size=1, max_size=8)


@given(LENGTHS, st.booleans(), st.integers(1, 5), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_every_row_comes_once_in_order(lengths, interleave, batch_size, max_prefill_tokens, seed):
    """Steps partition the rows; a decode step has one row per request; positions rise; limits hold."""
    trace = trace_of_requests(lengths, interleave)
    steps = closed_loop_steps(trace, batch_size=batch_size, max_prefill_tokens=max_prefill_tokens, seed=seed)
    rows = np.concatenate([step.rows for step in steps])
    assert sorted(rows.tolist()) == list(range(trace.num_tokens))
    assert [step.index for step in steps] == list(range(len(steps)))
    for request in trace.requests():
        positions = trace.position[rows[trace.request_id[rows] == request]]
        assert positions.tolist() == sorted(positions.tolist())
    for step in steps:
        assert step.requests.tolist() == trace.request_id[step.rows].tolist()
        assert set(trace.phase[step.rows].tolist()) == {PREFILL if step.phase == "prefill" else DECODE}
        if step.phase == "decode":
            assert len(set(step.requests.tolist())) == step.num_tokens <= batch_size
        else:
            assert step.num_tokens <= max_prefill_tokens


def test_the_batch_stays_full():
    """Until the last request has entered every decode step has `batch_size` rows; then the batch drains."""
    trace = trace_of_requests([(1, n) for n in (5, 3, 8, 4, 6, 2, 7)])
    steps = closed_loop_steps(trace, batch_size=3, seed=1)
    sizes = [step.num_tokens for step in steps if step.phase == "decode"]
    last_entry = max(step.index for step in steps if step.phase == "prefill")
    assert {step.num_tokens for step in steps[:last_entry] if step.phase == "decode"} == {3}
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == 35


def test_a_small_schedule_by_hand():
    """Two places, three requests of one prompt: prefill of two, decode, the third enters, decode."""
    trace = trace_of_requests([(2, 1), (3, 2), (1, 1)])
    steps = closed_loop_steps(trace, batch_size=2, seed=next(
        seed for seed in range(99) if np.random.default_rng(seed).permutation(3).tolist() == [0, 1, 2]))
    assert [(step.phase, step.rows.tolist()) for step in steps] == [
        ("prefill", [0, 1, 3, 4, 5]), ("decode", [2, 6]), ("prefill", [8]), ("decode", [7, 9])]


@pytest.mark.parametrize(("limit", "sizes"), [(100, [12]), (10, [8, 4]), (8, [8, 4]), (6, [4, 6, 2]), (4, [4, 4, 4])])
def test_prompts_share_a_prefill_up_to_the_limit(limit, sizes):
    """Prompts of 4, 4, 4 (of 4, 8 where the limit is 6) go together while they fit; a longer one is cut."""
    lengths = [(4, 1), (8, 1)] if limit == 6 else [(4, 1)] * 3
    trace = trace_of_requests(lengths)
    seed = next(seed for seed in range(99)
                if np.random.default_rng(seed).permutation(len(lengths)).tolist() == list(range(len(lengths))))
    steps = closed_loop_steps(trace, batch_size=3, max_prefill_tokens=limit, seed=seed)
    assert [step.num_tokens for step in steps if step.phase == "prefill"] == sizes


def test_without_prefill_only_decode_rows_come():
    """include_prefill=False leaves prompts out and keeps every decode row."""
    trace = trace_of_requests([(4, 2), (3, 0), (0, 5)])
    steps = closed_loop_steps(trace, batch_size=2, include_prefill=False)
    assert {step.phase for step in steps} == {"decode"}
    rows = sorted(np.concatenate([step.rows for step in steps]).tolist())
    assert rows == np.flatnonzero(trace.phase == DECODE).tolist()


def test_a_second_prompt_in_a_request_is_prefilled():
    """A request whose user speaks again is prefilled again, in position order."""
    trace = trace_of_requests([(2, 2)])
    trace = dataclasses.replace(trace, phase=np.array([PREFILL, DECODE, PREFILL, DECODE]))
    steps = closed_loop_steps(trace, batch_size=1)
    assert [(step.phase, step.rows.tolist()) for step in steps] == [
        ("prefill", [0]), ("decode", [1]), ("prefill", [2]), ("decode", [3])]


def test_a_denoising_step_is_one_pass():
    """Rows of one denoising step of a request go together; two requests side by side."""
    trace = RoutingTrace(
        expert_ids=np.zeros((8, 1, 1), int), request_id=np.repeat([0, 1], 4), position=np.tile([0, 1], 4),
        phase=np.full(8, DENOISE), step=np.array([0, 0, 1, 1, 0, 0, 1, 1]), num_experts=1, layer_ids=np.array([0]))
    steps = closed_loop_steps(trace, batch_size=2)
    assert [step.phase for step in steps] == ["denoise", "denoise"]
    assert [sorted(step.rows.tolist()) for step in steps] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_repeat_goes_on_with_new_requests():
    """With `repeat` the batch stays full to the last step, and copies have ids of their own."""
    trace = trace_of_requests([(1, 2), (1, 3)])
    steps = closed_loop_steps(trace, batch_size=3, max_steps=40, repeat=True, seed=0)
    assert len(steps) == 40
    decode = [step for step in steps if step.phase == "decode"]
    assert {step.num_tokens for step in decode} == {3}
    for step in decode:
        assert len(set(step.requests.tolist())) == 3
        # the largest id is 11, so copies are 12 apart
        assert (step.requests % 12 == trace.request_id[step.rows]).all()
    assert closed_loop_steps(trace, batch_size=3, max_steps=2)[-1].index == 1


def test_the_seed_orders_the_requests():
    """The same seed gives the same steps, another seed another order."""
    trace = trace_of_requests([(1, 2)] * 8)

    def order(seed):
        return [step.rows.tolist() for step in closed_loop_steps(trace, batch_size=2, seed=seed)]
    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize(("options", "words"), [
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"batch_size": 1, "max_steps": 0}, "max_steps must be at least 1, got 0"),
    ({"batch_size": 1, "max_prefill_tokens": 0}, "max_prefill_tokens must be at least 1"),
    ({"batch_size": 1, "repeat": True}, "repeat needs max_steps"),
    ({"batch_size": 1, "include_prefill": False}, "only prefill rows"),
])
def test_bad_batches_are_refused(options, words):
    """Sizes below 1, an endless loop and an empty schedule are errors."""
    with pytest.raises(InputError, match=words):
        closed_loop_steps(trace_of_requests([(3, 0)]), **options)


def test_copies_beyond_int32_are_refused():
    """A copy whose id does not fit is an error, not a wrong id."""
    trace = trace_of_requests([(1, 1)])
    trace = dataclasses.replace(trace, request_id=np.full(2, 2**31 - 1))
    with pytest.raises(InputError, match="does not fit int32"):
        closed_loop_steps(trace, batch_size=2, max_steps=9, repeat=True)


@given(st.integers(2, 9), st.floats(0.01, 0.99), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_split_keeps_requests_whole(num_requests, fraction, seed):
    """Each request is in exactly one part, both parts have some, and together they are the trace."""
    trace = trace_of_requests([(1, 2)] * num_requests, interleave=True)
    train, test = split_requests(trace, fraction, seed)
    parts = [set(part.request_id.tolist()) for part in (train, test)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(trace.request_id.tolist())
    assert len(parts[0]) == min(max(round(fraction * num_requests), 1), num_requests - 1)
    assert train.num_tokens + test.num_tokens == trace.num_tokens
    np.testing.assert_array_equal(load_counts(train) + load_counts(test), load_counts(trace))


@pytest.mark.parametrize(("act", "words"), [
    (lambda t: split_requests(t, 0.0, 0), "fraction must lie between 0 and 1, got 0.0"),
    (lambda t: split_requests(first_requests(t, 1), 0.5, 0), "one request cannot be split"),
    (lambda t: first_requests(t, 0), "num_requests must be at least 1"),
    (lambda t: select_phase(t, "prefil"), "Did you mean 'prefill'"),
    (lambda t: select_phase(select_phase(t, "decode"), "prefill"), r"no prefill rows \(only decode\)"),
])
def test_bad_parts_are_refused(act, words):
    """Empty or unknown parts are errors."""
    with pytest.raises(InputError, match=words):
        act(trace_of_requests([(1, 2), (2, 2)]))


def test_shuffling_moves_routing_within_a_phase():
    """Prefill rows stay among prefill rows; requests, positions and steps do not move."""
    trace = synthetic_trace(300, 2, 16, 2, 6, seed=0)
    mixed = shuffle_tokens(trace, seed=1)
    for name in ("request_id", "position", "phase", "step"):
        np.testing.assert_array_equal(getattr(mixed, name), getattr(trace, name))
    for phase in (PREFILL, DECODE):
        both = [np.sort(part.expert_ids[part.phase == phase].reshape(-1, 4), axis=0) for part in (trace, mixed)]
        np.testing.assert_array_equal(*both)
    # weights travel with their ids
    rows = [np.concatenate([part.expert_ids, part.gate_weights], axis=2).reshape(300, 8) for part in (trace, mixed)]
    assert sorted(rows[0].tolist()) == sorted(rows[1].tolist())
    assert (mixed.expert_ids != trace.expert_ids).any()


def test_first_requests_are_the_first_to_appear():
    """Requests are taken in order of appearance, not of their ids."""
    trace = trace_of_requests([(1, 1), (1, 1), (1, 1)])
    trace = dataclasses.replace(trace, request_id=np.repeat([9, 2, 5], 2))
    assert first_requests(trace, 2).requests().tolist() == [9, 2]
    assert first_requests(trace, 7).num_tokens == 6


def test_a_made_up_trace_has_the_sizes_asked_for():
    """Tokens, requests, layers, experts and prompt share are those asked for; it says it is synthetic."""
    trace = synthetic_trace(500, 3, 12, 4, 7, prompt_fraction=0.3, seed=0)
    assert trace.expert_ids.shape == (500, 3, 4)
    assert trace.requests().tolist() == list(range(7))
    assert trace.source.startswith("synthetic")
    assert np.mean(trace.phase == PREFILL) == pytest.approx(0.3, abs=0.02)
    assert (np.diff(trace.gate_weights, axis=2) <= 0).all()
    np.testing.assert_allclose(trace.gate_weights.sum(axis=2), 1, atol=2e-3)
    # one pass per prompt, then one per token
    assert trace.step[-1] + 1 == 7 + np.count_nonzero(trace.phase == DECODE)


def test_a_made_up_trace_is_repeatable():
    """The same seed gives the same bytes; golden ids and loads catch an unnoticed change."""
    one, two = (synthetic_trace(50, 2, 8, 2, 3, seed=5) for _ in range(2))
    assert one.digest() == two.digest() != synthetic_trace(50, 2, 8, 2, 3, seed=6).digest()
    assert one.expert_ids[:3].tolist() == [[[1, 3], [0, 6]], [[1, 3], [0, 6]], [[1, 3], [6, 0]]]
    assert load_counts(one).tolist() == [[9, 28, 15, 13, 11, 7, 5, 12], [32, 14, 7, 18, 7, 7, 11, 4]]


@pytest.mark.parametrize("knob", ["zipf", "affinity", "locality"])
def test_each_knob_does_what_it_says(knob):
    """zipf raises the load's spread, affinity the information between layers, locality the overlap."""
    measure = {"zipf": "load_max_over_mean", "affinity": "mutual_information_excess_bits",
               "locality": "token_overlap_ratio"}[knob]
    flat = {"zipf": 0.0, "affinity": 0.0, "locality": 0.0, "num_topics": 1}
    made = [synthetic_trace(3000, 2, 16, 2, 10, **(flat | {knob: value}), seed=0) for value in (0.0, 0.4, 0.9)]
    values = [trace_stats(trace, seed=0).summary()[measure] for trace in made]
    assert values[0] < values[1] < values[2]
    neutral = {"zipf": 1.0, "affinity": 0.0, "locality": 1.0}[knob]
    assert values[0] == pytest.approx(neutral, abs=0.25)


def test_the_extremes_of_the_chain():
    """Full affinity: layer 1 repeats the ranks of layer 0. Full locality: a request never changes experts."""
    affine = synthetic_trace(400, 2, 8, 2, 5, zipf=0, affinity=1.0, locality=0.0, seed=0)
    assert trace_stats(affine, seed=0).recall_at_k.tolist() == [1.0]
    local = synthetic_trace(400, 2, 8, 2, 5, locality=1.0, seed=0)
    for request in local.requests():
        assert len(np.unique(np.sort(local.expert_ids[local.request_id == request], axis=2), axis=0)) == 1


@pytest.mark.parametrize(("changes", "words"), [
    ({"top_k": 9}, r"top_k must be at most num_experts \(8\), got 9"),
    ({"num_requests": 51}, r"num_requests must be at most num_tokens \(50\), got 51"),
    ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    ({"num_topics": 0}, "num_topics must be at least 1"),
    ({"affinity": 1.5}, "affinity must lie between 0 and 1, got 1.5"),
    ({"prompt_fraction": -0.1}, "prompt_fraction must lie between 0 and 1"),
    ({"zipf": float("nan")}, "zipf must be finite"),
])
def test_bad_sizes_are_refused(changes, words):
    """Sizes that do not fit together are named."""
    sizes = {"num_tokens": 50, "num_layers": 2, "num_experts": 8, "top_k": 2, "num_requests": 3}
    with pytest.raises(InputError, match=words):
        synthetic_trace(**(sizes | changes))
