"""Statistics, against counting by hand, brute force and known tables."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.traces import (
    DECODE,
    RoutingTrace,
    co_activation,
    load_counts,
    select_phase,
    shuffle_tokens,
    synthetic_trace,
    trace_stats,
    transition_counts,
)
from moesim.traces.stats import lru_hit_rate, mutual_information_bits, token_overlap


def trace_from(ids, num_experts, request_id=None):
    """Return a decode trace of these ids [token, layer, k]; one request unless told."""
    ids = np.asarray(ids)
    request_id = np.zeros(len(ids), dtype=int) if request_id is None else np.asarray(request_id)
    position = [int(np.count_nonzero(request_id[:row] == request_id[row])) for row in range(len(ids))]
    return RoutingTrace(expert_ids=ids, request_id=request_id, position=np.array(position),
                        phase=np.full(len(ids), DECODE), step=np.arange(len(ids)), num_experts=num_experts,
                        layer_ids=np.arange(ids.shape[1]))


@st.composite
def traces(draw):
    """Draw a small trace with padding and several requests."""
    tokens, layers, experts = draw(st.integers(1, 25)), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    top_k = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.array([[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(tokens)])
    if top_k > 1:
        ids[..., -1] = np.where(rng.random((tokens, layers)) < 0.3, -1, ids[..., -1])
    return trace_from(ids, experts, rng.integers(0, 3, tokens))


def sets(trace, layer):
    """Return the set of experts of each token in one layer."""
    return [{int(e) for e in row if e >= 0} for row in trace.expert_ids[:, layer]]


@given(traces())
@settings(max_examples=40, deadline=None)
def test_counts_are_those_of_counting(trace):
    """Load, transitions and co-activation equal counts by plain loops over sets."""
    experts, layers = range(trace.num_experts), range(trace.num_layers)
    member = [sets(trace, layer) for layer in layers]
    load, transition, together = load_counts(trace), transition_counts(trace), co_activation(trace)
    assert load.tolist() == [[sum(e in s for s in member[layer]) for e in experts] for layer in layers]
    assert transition.tolist() == [
        [[sum(i in a and j in b for a, b in zip(member[layer], member[layer + 1], strict=True)) for j in experts]
         for i in experts] for layer in layers[:-1]]
    assert together.tolist() == [
        [[sum(i in s and j in s for s in member[layer]) for j in experts] for i in experts] for layer in layers]
    assert {array.dtype for array in (load, transition, together)} == {np.dtype(np.int64)}


def test_counting_in_chunks_changes_nothing(monkeypatch):
    """The chunk size is only a memory limit."""
    trace = synthetic_trace(200, 3, 16, 4, 5, seed=2)
    whole = transition_counts(trace)
    monkeypatch.setattr("moesim.traces.reductions_numpy._CHUNK_PAIRS", 64)
    np.testing.assert_array_equal(transition_counts(trace), whole)
    assert whole.sum() == 200 * 2 * 4 * 4


@pytest.mark.parametrize(("joint", "bits"), [
    ([[5, 0], [0, 5]], 1.0),  # one decides the other
    ([[3, 3], [3, 3]], 0.0),  # independent
    ([[1, 2], [2, 4]], 0.0),  # independent, uneven
    ([[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]], 2.0),
    ([[2, 1], [1, 2]], math.log2(4 / 3) * 2 / 3 + math.log2(2 / 3) / 3),
    ([[7, 0], [0, 0]], 0.0),
])
def test_information_of_known_tables(joint, bits):
    """Mutual information of hand-made joint tables is what the formula gives on paper."""
    assert mutual_information_bits(np.array(joint)) == pytest.approx(bits, abs=1e-12)


def test_information_of_a_permuted_layer():
    """A layer that only renames the experts of the one before has log2 E bits; shuffled it has almost none."""
    rng = np.random.default_rng(0)
    first = rng.permutation(np.repeat(np.arange(8), 500))
    second = rng.permutation(8)[first]
    stats = trace_stats(trace_from(np.stack([first, second], axis=1)[:, :, None], 8), seed=0)
    assert stats.mutual_information_bits == pytest.approx([3.0])
    # bias of the plug-in estimate under independence: (E - 1)^2 / (2 N ln 2) (Miller 1955)
    assert stats.mutual_information_shuffled_bits[0] == pytest.approx(49 / (2 * 4000 * math.log(2)), rel=0.6)
    assert stats.mutual_information_excess_bits[0] == pytest.approx(3.0, abs=0.02)


def test_recall_of_a_deterministic_layer():
    """Where layer 1 follows from layer 0 the tables find all of it; popularity only its share."""
    rng = np.random.default_rng(1)
    first = rng.integers(0, 8, 4000)
    request_id = np.repeat(np.arange(40), 100)
    trace = trace_from(np.stack([first, (first + 3) % 8], axis=1)[:, :, None], 8, request_id)
    stats = trace_stats(trace, seed=0)
    assert stats.recall_at_k.tolist() == [1.0]
    assert stats.popularity_recall_at_k[0] == pytest.approx(1 / 8, abs=0.03)


def test_recall_against_plain_loops():
    """Recall equals a loop over the second half with tables counted on the first."""
    trace = synthetic_trace(300, 3, 6, 2, 9, seed=4)
    first = trace.take(np.isin(trace.request_id, trace.requests()[:4]))
    second = trace.take(np.isin(trace.request_id, trace.requests()[4:]))
    counts, load = transition_counts(first), load_counts(first)
    expected = np.zeros((2, 2))
    for layer in range(2):
        chance = counts[layer] / np.maximum(1, counts[layer].sum(axis=1, keepdims=True))
        popular = sorted(range(6), key=lambda e: (-load[layer + 1, e], e))[:2]
        for now, then in zip(sets(second, layer), sets(second, layer + 1), strict=True):
            score = sum(chance[e] for e in now)
            guess = sorted(range(6), key=lambda e: (-score[e], e))[:2]
            expected[:, layer] += len(then & set(guess)), len(then & set(popular))
    expected /= 2 * second.num_tokens
    stats = trace_stats(trace, seed=0)
    np.testing.assert_allclose([stats.recall_at_k, stats.popularity_recall_at_k], expected, atol=0.005)


@given(traces())
@settings(max_examples=30, deadline=None)
def test_overlap_is_that_of_sets(trace):
    """Overlap equals set intersections of each request's neighbours, whatever the order in the file."""
    for layer, found in enumerate(token_overlap(trace)):
        member, again, picks = sets(trace, layer), 0, 0
        for request in trace.requests():
            rows = np.flatnonzero(trace.request_id == request)
            again += sum(len(member[a] & member[b]) for a, b in itertools.pairwise(rows))
            picks += sum(len(member[a]) for a in rows[:-1])
        assert found == pytest.approx(again / picks) if picks else math.isnan(found)


def brute_force_lru(trace, size):
    """Return the LRU hit rate with set semantics: test all of a token, then touch each, then evict."""
    hits = accesses = 0
    for layer in range(trace.num_layers):
        cache: list[int] = []  # oldest first
        for row in trace.expert_ids[:, layer].tolist():
            row = [expert for expert in row if expert >= 0]
            accesses += len(row)
            hits += len(set(row) & set(cache))
            for expert in row:
                if expert in cache:
                    cache.remove(expert)
                cache.append(expert)
            cache = cache[-size:]
    return hits / accesses


@given(traces())
@settings(max_examples=40, deadline=None)
def test_lru_curve_is_that_of_a_cache(trace):
    """One stack pass gives, at every size from k to E, what a cache of that size hits."""
    curve = lru_hit_rate(trace)
    expected = [brute_force_lru(trace, size) for size in range(trace.top_k, trace.num_experts + 1)]
    np.testing.assert_allclose(curve, expected, atol=1e-12)


def test_lru_of_a_cycle():
    """Experts in a cycle of 4 never hit in a cache of 3, and always but the first time in one of 4."""
    trace = trace_from((np.arange(40) % 4)[:, None, None], 4)
    assert lru_hit_rate(trace).tolist() == [0, 0, 0, 0.9]


def test_shuffling_takes_locality_and_keeps_the_rest():
    """A repeating trace has overlap 1; shuffled its overlap and LRU fall, while load and pairs stay."""
    trace = synthetic_trace(3000, 2, 32, 4, 10, locality=0.9, zipf=0.5, seed=0)
    stats = trace_stats(trace, seed=0)
    assert stats.token_overlap_ratio > 2
    assert (stats.lru_hit_rate[:-1] >= stats.lru_hit_rate_shuffled[:-1] - 0.01).all()
    mixed = shuffle_tokens(trace, seed=3)
    np.testing.assert_array_equal(load_counts(mixed), load_counts(trace))
    np.testing.assert_array_equal(transition_counts(mixed), transition_counts(trace))
    assert trace_stats(mixed, seed=0).token_overlap_ratio == pytest.approx(1, abs=0.1)


def test_a_sample_is_close_to_the_whole():
    """Sampled tokens give nearly the same locality; load and information do not change at all."""
    trace = synthetic_trace(3000, 2, 16, 2, 60, seed=0)
    whole, part = trace_stats(trace, seed=0), trace_stats(trace, seed=0, max_tokens=1500)
    assert (whole.num_sampled_tokens, part.num_sampled_tokens) == (3000, 1500)
    np.testing.assert_array_equal(part.expert_load, whole.expert_load)
    np.testing.assert_array_equal(part.mutual_information_bits, whole.mutual_information_bits)
    np.testing.assert_allclose(part.token_overlap, whole.token_overlap, atol=0.05)
    np.testing.assert_allclose(part.lru_hit_rate, whole.lru_hit_rate, atol=0.05)


def test_stats_are_plain_json_and_repeatable():
    """The same seed gives the same JSON; every array has one entry per layer, pair or size."""
    trace = synthetic_trace(400, 3, 8, 2, 4, seed=0)
    texts = [json.dumps(trace_stats(trace, seed=5).as_dict(), allow_nan=False) for _ in range(2)]
    assert texts[0] == texts[1]
    plain = json.loads(texts[0])
    assert (len(plain["expert_load"]), len(plain["recall_at_k"]), len(plain["lru_hit_rate"])) == (3, 2, 7)
    assert plain["load_max_over_mean"][0] == max(plain["expert_load"][0]) / (400 * 2 / 8)
    assert plain["summary"]["lru_size"] == 4


def test_what_is_not_defined_is_none():
    """One layer has no pairs and one token no neighbour: None, not a number."""
    plain = trace_stats(trace_from([[[0, 1]]], 4), seed=0).as_dict()
    assert plain["recall_at_k"] == [] and plain["token_overlap"] == [None]  # noqa: PT018
    assert plain["summary"]["mutual_information_bits"] is None
    assert plain["summary"]["token_overlap_ratio"] is None
    assert plain["summary"]["lru_hit_rate"] == 0


def test_stats_of_one_phase():
    """A phase's statistics are those of its rows alone."""
    trace = synthetic_trace(400, 2, 8, 2, 4, prompt_fraction=0.4, seed=0)
    decode = trace_stats(trace, seed=0, phase="decode")
    np.testing.assert_array_equal(decode.expert_load, load_counts(select_phase(trace, "decode")))
    assert decode.num_tokens == np.count_nonzero(trace.phase == DECODE) < 400


@pytest.mark.parametrize(("options", "words"), [
    ({"phase": "decoding"}, r"unknown phase 'decoding'\. Did you mean 'decode'"),
    ({"phase": "denoise"}, r"no denoise rows \(only prefill, decode\)"),
    ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
])
def test_bad_options_are_refused(options, words):
    """Unknown or absent phases and empty samples are errors."""
    with pytest.raises(InputError, match=words):
        trace_stats(synthetic_trace(20, 2, 4, 1, 2, seed=0), seed=0, **options)
