"""Coresets: each rewrite against a plain re-implementation, the published sizes, and expert choice."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.traces.coresets import (
    PUBLISHED,
    des_seq,
    des_vote,
    dmoe,
    expected_union,
    expert_capacity,
    expert_choice,
    published_debit,
)
from moesim.traces.denoise import DenoiseSettings, denoise_scored
from moesim.traces.denoise_passes import denoise_passes, distinct_experts, masked_fraction
from moesim.traces.trace import DENOISE, PAD, PREFILL, RoutingTrace

SMALL = DenoiseSettings(1, 2, num_experts=9, top_k=3, blocks_per_request=2, block_size=5, prompt_tokens=3)


def voted(trace: RoutingTrace, scores: np.ndarray, rows: np.ndarray, layer: int) -> list[float]:
    """Votes of a pass, token by token: the score of each recorded expert."""
    votes = [0.0] * trace.num_experts
    for row in rows:
        for expert in trace.expert_ids[row, layer]:
            votes[expert] += float(scores[row, layer, expert])
    return votes


def best_inside(scores: np.ndarray, row: int, layer: int, coreset: set[int], top_k: int) -> list[int]:
    """A token's best experts of a coreset."""
    return sorted(coreset, key=lambda expert: (-scores[row, layer, expert], expert))[:top_k]


@settings(max_examples=25)
@given(st.integers(0, 200), st.sampled_from(["seq", "vote", "dmoe"]), st.integers(1, 3), st.floats(0.34, 1))
def test_rewrites_agree_with_the_definitions(seed: int, method: str, keep: int, share: float) -> None:
    """Coreset by the written rule, then each token's best experts inside it; the prompt stays as it was."""
    trace, scores = denoise_scored(SMALL, seed=seed)
    passes = denoise_passes(trace)
    found = {"seq": lambda: des_seq(trace, passes, keep, scores=scores),
             "vote": lambda: des_vote(trace, passes, share, scores=scores),
             "dmoe": lambda: dmoe(trace, passes, share, scores=scores)}[method]()
    for rows, layer in itertools.product(passes.rows, range(2)):
        votes = voted(trace, scores, rows, layer)
        ranked = sorted(range(9), key=lambda expert: (-votes[expert], expert))
        if method == "seq":
            coreset = {int(expert) for row in rows for expert in trace.expert_ids[row, layer, :keep]}
        elif method == "vote":
            coreset = set(ranked[:int(share * 9)])
        else:
            size = next(n for n in range(1, 10) if sum(votes[e] for e in ranked[:n]) >= share * sum(votes) - 1e-12)
            coreset = set(ranked[:max(size, 3)])
        for row in rows:
            expected = best_inside(scores, row, layer, coreset, 3)
            assert found.expert_ids[row, layer].tolist() == expected + [PAD] * (3 - len(expected))
            values = scores[row, layer, expected].astype(np.float64)
            assert found.gate_weights[row, layer, :len(expected)] == pytest.approx(values / values.sum(), abs=1e-6)
    prompt = trace.phase == PREFILL
    assert np.array_equal(found.expert_ids[prompt], trace.expert_ids[prompt])
    assert found.metadata["coreset"]["refilled"]


@settings(max_examples=25)
@given(st.integers(0, 200), st.integers(1, 3))
def test_without_scores_the_recorded_experts_are_filtered(seed: int, keep: int) -> None:
    """The same experts are in use as with scores, places of the others stay empty and are counted, weights sum to 1."""
    trace, scores = denoise_scored(SMALL, seed=seed)
    passes = denoise_passes(trace)
    filled, bare = des_seq(trace, passes, keep, scores=scores), des_seq(trace, passes, keep)
    assert np.array_equal(denoise_passes(filled).counts > 0, denoise_passes(bare).counts > 0)
    empty = bare.expert_ids == PAD
    assert bare.metadata["coreset"] == {"refilled": False, "empty_share": pytest.approx(empty.mean())}
    assert (np.diff(empty.astype(int), axis=2) >= 0).all()  # pads at the end
    assert (~empty).sum(axis=2).min() >= keep
    assert bare.gate_weights.sum(axis=2) == pytest.approx(1, abs=1e-3)
    assert (bare.gate_weights[empty] == 0).all()
    weightless = des_seq(dataclasses.replace(trace, gate_weights=None), passes, keep)
    assert np.array_equal(weightless.expert_ids, bare.expert_ids)


def test_a_token_may_lose_all_its_experts_without_scores() -> None:
    """Votes from gate weights alone leave the outvoted token with none, and say so; with scores it takes others."""
    shares = dataclasses.replace(SMALL, block_size=12, num_experts=24, popularity_share=0, request_share=0, block_share=0)
    trace, scores = denoise_scored(shares, seed=1)
    passes = denoise_passes(trace)
    bare = des_vote(trace, passes, 0.13)
    own = trace.phase == DENOISE
    lost = (bare.expert_ids[own] == PAD).all(axis=2)
    assert lost.any()
    assert (bare.gate_weights[own][lost] == 0).all()
    assert bare.metadata["coreset"]["empty_share"] > 0.3
    assert (des_vote(trace, passes, 0.13, scores=scores).expert_ids != PAD).all()


def test_recorded_weights_vote_when_there_are_no_scores() -> None:
    """One vote per token, split by its gate weights: the pass keeps the experts with the largest sums."""
    ids = np.array([[[0, 1]], [[0, 2]], [[3, 2]]])
    weights = np.array([[[0.6, 0.4]], [[0.5, 0.5]], [[0.9, 0.1]]])
    trace = RoutingTrace(ids, np.zeros(3, int), np.arange(3), np.full(3, DENOISE), np.zeros(3, int), 4, np.arange(1), weights)
    passes = denoise_passes(trace, block_size=3, prompt_tokens=0)  # votes: 1.1, 0.4, 0.6, 0.9
    found = des_vote(trace, passes, 0.5)
    assert found.expert_ids[:, 0].tolist() == [[0, PAD], [0, PAD], [3, PAD]]
    assert dmoe(trace, passes, 0.7).expert_ids[:, 0].tolist() == [[0, PAD], [0, 2], [3, 2]]
    assert dmoe(trace, passes, 0.6).expert_ids[:, 0].tolist() == [[0, PAD], [0, PAD], [3, PAD]]


def test_voting_keeps_the_most_weight_of_any_coreset() -> None:
    """No other set of that size holds more votes (all sets are tried)."""
    trace, scores = denoise_scored(SMALL, seed=3)
    passes = denoise_passes(trace)
    found = des_vote(trace, passes, 0.5, scores=scores)
    for rows, layer in itertools.product(passes.rows, range(2)):
        votes = voted(trace, scores, rows, layer)
        used = {int(expert) for expert in found.expert_ids[rows, layer].ravel()}
        best = max(sum(votes[e] for e in chosen) for chosen in itertools.combinations(range(9), 4))
        assert sum(votes[e] for e in used) == pytest.approx(best)


@pytest.mark.parametrize(("num_experts", "top_k", "num_tokens"), [(4, 2, 2), (5, 1, 4), (4, 3, 3)])
def test_expected_union_by_enumeration(num_experts: int, top_k: int, num_tokens: int) -> None:
    """The mean over all ways in which tokens can choose."""
    ways = list(itertools.combinations(range(num_experts), top_k))
    sizes = [len(set().union(*chosen)) for chosen in itertools.product(ways, repeat=num_tokens)]
    assert expected_union(num_experts, top_k, num_tokens) == pytest.approx(np.mean(sizes))


def test_the_no_locality_bound() -> None:
    """Tokens with nothing in common meet it (163 experts for LLaDA2.0-mini's block), any common part stays below."""
    bound = expected_union(256, 8, 32)
    assert bound == pytest.approx(163, abs=0.5)
    sizes = []
    for share in (0.0, 0.1, 0.22, 0.4):
        own = DenoiseSettings(3, 3, blocks_per_request=2, prompt_tokens=0, popularity_share=share, request_share=0,
                              block_share=0, accept=0.5)
        sizes.append(distinct_experts(denoise_passes(denoise_scored(own, seed=2)[0])).mean())
    assert sizes[0] == pytest.approx(bound, rel=0.01)
    assert (np.diff(sizes) < -5).all()


def test_sizes_on_the_fitted_trace_are_like_the_published() -> None:
    """Nothing was fitted to coresets: DES-Vote meets its size, DES-Seq and dMoE come within a fifth."""
    trace, scores = denoise_scored(DenoiseSettings(2, 4, blocks_per_request=3, prompt_tokens=0), seed=2)
    passes = denoise_passes(trace)
    rewritten = {("des-vote", 0.15): des_vote(trace, passes, 0.15, scores=scores),
                 ("des-vote", 0.10): des_vote(trace, passes, 0.10, scores=scores),
                 ("des-seq", 3): des_seq(trace, passes, 3), ("des-seq", 2): des_seq(trace, passes, 2),
                 ("dmoe", 0.6): dmoe(trace, passes, 0.6, scores=scores)}
    for (method, setting), own in rewritten.items():
        published = published_debit(method, setting, "llada2.0-mini")
        assert published is not None
        unique = distinct_experts(denoise_passes(own)).mean()
        assert unique == pytest.approx(published.unique_experts, rel=1e-9 if method == "des-vote" else 0.21)


def test_published_rows_are_looked_up_and_not_guessed() -> None:
    """Exactly the printed settings have a debit; the sizes of DES-Vote are floor(beta * experts)."""
    assert published_debit("des-vote", 0.15, "llada2.0-mini").relative_accuracy == 0.995  # type: ignore[union-attr]
    for setting, model in ((0.14, "llada2.0-mini"), (0.15, "llada2.0-flash")):
        assert published_debit("des-vote", setting, model) is None
    experts = {"llada2.0-mini": 256, "llada-moe-7b-a1b": 64}
    votes = [row for row in PUBLISHED if row.method == "des-vote"]
    assert len(votes) == 4
    assert all(int(row.setting * experts[row.model]) == row.unique_experts for row in votes)
    assert all(row.source and 0 < row.relative_accuracy <= (1.05 if row.method.startswith("expert-choice") else 1)
               for row in PUBLISHED)


def test_capacity_follows_the_masked_share() -> None:
    """Linear-reverse gives 14 experts per token when all is decided and 2 when all is masked; static gives 8."""
    ratio = np.array([0.0, 0.25, 1.0])
    assert expert_capacity(ratio).tolist() == [14.0, 11.0, 2.0]
    assert expert_capacity(ratio, "linear").tolist() == [2.0, 5.0, 14.0]
    assert expert_capacity(ratio, "static").tolist() == [8.0, 8.0, 8.0]


def test_expert_choice_is_even_and_leaves_tokens_out() -> None:
    """Every expert takes c tokens; tokens that are nobody's best are counted, token by token."""
    trace, scores = denoise_scored(SMALL, seed=6)
    passes = denoise_passes(trace)
    capacity = expert_capacity(masked_fraction(trace, passes), least=1.0, most=6.0)
    found = expert_choice(passes, capacity, num_experts=9, scores=scores)
    for step, rows in enumerate(passes.rows):
        load = max(1, round(capacity[step] * len(rows) / 9))
        assert found.load[step] == load
        left = 0
        for layer in range(2):
            taken = set()
            for expert in range(9):
                taken |= set(sorted(rows, key=lambda row, e=expert, at=layer: -scores[row, at, e])[:load])
            left += len(rows) - len(taken)
        assert found.uncovered[step] == pytest.approx(left / (2 * len(rows)))
    assert np.isnan(expert_choice(passes, capacity, num_experts=9).uncovered).all()


def test_what_cannot_be_rewritten() -> None:
    """Settings out of range, missing weights, wrong scores and capacities are refused with the reason."""
    trace, scores = denoise_scored(SMALL, seed=1)
    passes = denoise_passes(trace)
    bare = dataclasses.replace(trace, gate_weights=None)
    for call, message in (
            (lambda: des_seq(trace, passes, 4), "keep must be in 1 ... 3"),
            (lambda: des_vote(trace, passes, 0.2, scores=scores), "at least top-k 3"),  # one expert of nine
            (lambda: des_vote(trace, passes, 1.2), "at least top-k 3"),
            (lambda: dmoe(trace, passes, 0.0), "mass must lie"),
            (lambda: dmoe(bare, passes, 0.5), "this trace has neither"),
            (lambda: des_seq(trace, passes, 2, scores=scores[:, :1]), "scores must be"),
            (lambda: des_seq(trace, passes, 2, scores=scores - 1), "not negative"),
            (lambda: expected_union(4, 5, 1), "top_k must be in 1 ... 4"),
            (lambda: expert_capacity(np.array([1.2])), "masked share must lie"),
            (lambda: expert_capacity(np.array([0.2]), "linear-revers"), "Did you mean 'linear-reverse'"),
            (lambda: expert_capacity(np.array([0.2]), least=3, most=2), "must rise from 0"),
            (lambda: expert_choice(passes, [1.0], num_experts=9), "one positive capacity per pass")):
        with pytest.raises(InputError, match=message):
            call()
