"""Made-up denoising: its similarity over steps is the published one, blocks end early, and passes are told apart."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.traces.coresets import expected_union
from moesim.traces.denoise import (
    MASK_TOKEN,
    DenoiseSettings,
    denoise_scored,
    denoise_trace,
    masked_steps,
)
from moesim.traces.denoise_passes import (
    DenoisePasses,
    denoise_passes,
    distinct_experts,
    lag_similarity,
    masked_fraction,
)
from moesim.traces.steps import closed_loop_steps
from moesim.traces.store import read_trace, write_trace
from moesim.traces.trace import DENOISE, PREFILL, RoutingTrace

SMALL = DenoiseSettings(2, 3, num_experts=12, top_k=2, blocks_per_request=2, block_size=4, prompt_tokens=6)
FITTED = DenoiseSettings(5, 5, blocks_per_request=3, prompt_tokens=0)


@cache
def fitted(**changes: object) -> tuple[DenoisePasses, ...]:
    """The passes of traces with the fitted defaults, of two seeds."""
    own = dataclasses.replace(FITTED, **changes)  # type: ignore[arg-type]
    return tuple(denoise_passes(denoise_trace(own, seed=seed)) for seed in range(2))


def mean_similarity(passes: tuple[DenoisePasses, ...], lags: list[int]) -> np.ndarray:
    """The mean curve of several traces."""
    return np.mean([lag_similarity(one, lags) for one in passes], axis=0)


def test_similarity_is_the_published_one() -> None:
    """The defaults meet LLaDA2.0-mini's curve: 0.985 at lag 1 and about 0.95 at lag 5."""
    first, fifth = mean_similarity(fitted(), [1, 5])
    assert first == pytest.approx(0.985, abs=0.0015)
    assert fifth == pytest.approx(0.95, abs=0.004)


def test_similarity_falls_with_lag_and_with_drift() -> None:
    """Passes further apart are less alike, faster drift makes them less alike, no drift keeps them equal."""
    lags = [1, 2, 3, 5, 8]
    assert (np.diff(mean_similarity(fitted(), lags)) < 0).all()
    assert (mean_similarity(fitted(drift=0.05), lags) < mean_similarity(fitted(), lags) - 0.01).all()
    assert mean_similarity(fitted(drift=0.0), lags) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("block_size", "published"), [
    (16, 49),  # dMoE, arXiv 2605.30876: distinct experts per layer of LLaDA2.0-mini against the block size
    (24, 61),
    (32, 70),
])
def test_distinct_experts_are_like_the_published(block_size: int, published: int) -> None:
    """One share, fitted at 32 tokens, gives the union sizes of shorter blocks within a tenth, far below no locality."""
    found = np.mean([distinct_experts(one).mean() for one in fitted(block_size=block_size)])
    assert found == pytest.approx(published, rel=0.1)
    assert found < 0.6 * expected_union(256, 8, block_size)


def test_similarity_agrees_with_pairs_one_by_one() -> None:
    """The curve is the mean cosine over layers and all pairs within a block."""
    passes = denoise_passes(denoise_trace(dataclasses.replace(SMALL, accept=0.0), seed=4))
    block = passes.block_index()
    for lag in (1, 2, 3):
        found = []
        for step in range(passes.num_steps - lag):
            if block[step] == block[step + lag]:
                for one, other in zip(passes.counts[step], passes.counts[step + lag], strict=True):
                    found.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
        assert lag_similarity(passes, [lag])[0] == pytest.approx(np.mean(found))


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_a_block_ends_when_all_is_decided(block_size: int, accept: float, seed: int) -> None:
    """All tokens start masked, each step decides one or more, and none is masked again."""
    masked = masked_steps(block_size, accept, np.random.default_rng(seed))
    assert masked[0].all()
    assert len(masked) <= block_size
    left = masked.sum(axis=1)
    assert (np.diff(left) < 0).all()
    assert not (masked[1:] & ~masked[:-1]).any()


def test_threshold_ends_blocks_early() -> None:
    """One token per step without a threshold, one step if all pass it; the first step decides the accepted share."""
    rng = np.random.default_rng(0)
    assert len(masked_steps(32, 0.0, rng)) == 32
    assert len(masked_steps(32, 1.0, rng)) == 1
    decided = [32 - steps[1].sum() for steps in (masked_steps(32, 0.25, rng) for _ in range(400))]
    assert np.mean(decided) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize("routed", ["block", "masked", "prefix"])
def test_what_is_routed(routed: str) -> None:
    """A pass holds the block, its masked tokens, or all from the start of the prompt; the cache is filled by a prefill."""
    trace = denoise_trace(dataclasses.replace(SMALL, routed=routed, accept=0.3), seed=1)
    passes = denoise_passes(trace)
    assert np.array_equal(np.unique(trace.phase), [DENOISE] if routed == "prefix" else [PREFILL, DENOISE])
    for step, rows in enumerate(passes.rows):
        position, first = trace.position[rows], 6 + 4 * passes.block[step]
        if routed == "prefix":
            assert np.array_equal(position, np.arange(first + 4))
        elif routed == "block":
            assert np.array_equal(position, np.arange(first, first + 4))
        else:
            assert set(position) <= set(range(first, first + 4))
            assert (trace.token_id[rows] == MASK_TOKEN).all()
        assert passes.active[step] == (position >= first).sum()
        assert passes.block_end[step] == first + 4
    assert passes.steps_per_block().sum() == passes.num_steps
    assert passes.num_blocks == 4


def test_finished_blocks_keep_their_routing() -> None:
    """Without a cache earlier blocks are routed again in every pass, just as in their last pass."""
    trace = denoise_trace(dataclasses.replace(SMALL, routed="prefix"), seed=2)
    passes = denoise_passes(trace)
    for step in range(1, passes.num_steps):
        if passes.request[step] != passes.request[step - 1]:
            continue
        size = 6 + 4 * passes.block[step] if passes.block[step] != passes.block[step - 1] else 6
        before, now = passes.rows[step - 1][:size], passes.rows[step][:size]
        assert np.array_equal(trace.expert_ids[before], trace.expert_ids[now])


def test_masked_share_is_that_of_the_token_ids() -> None:
    """It starts at 1 in every block and falls, whichever tokens are routed."""
    for routed in ("block", "masked", "prefix"):
        trace = denoise_trace(dataclasses.replace(SMALL, routed=routed), seed=3)
        passes = denoise_passes(trace)
        share = masked_fraction(trace, passes)
        assert (share[passes.block_starts] == 1).all()
        assert (np.diff(share)[~passes.block_starts[1:]] < 0).all()


def test_choices_are_the_best_scores() -> None:
    """Every token names its top-k scores, best first, with their normalised values as weights."""
    trace, scores = denoise_scored(SMALL, seed=5)
    order = np.argsort(-scores, axis=2, kind="stable")[..., :2]
    assert np.array_equal(trace.expert_ids, order)
    best = np.take_along_axis(scores, order, 2)
    assert trace.gate_weights == pytest.approx(best / best.sum(axis=2, keepdims=True), abs=1e-3)


def test_same_seed_same_trace(tmp_path: Path) -> None:
    """A seed fixes the trace, another one changes it, and the file gives it back, with what passes need."""
    trace = denoise_trace(SMALL, seed=7)
    assert trace.digest() == denoise_trace(SMALL, seed=7).digest()
    assert trace.digest() != denoise_trace(SMALL, seed=8).digest()
    write_trace(trace, tmp_path / "d.trace.parquet")
    again = read_trace(tmp_path / "d.trace.parquet")
    assert again.digest() == trace.digest()
    assert np.array_equal(denoise_passes(again).counts, denoise_passes(trace).counts)


def test_the_server_runs_the_same_passes() -> None:
    """One request at a time, the closed loop's denoise passes are those found here."""
    trace = denoise_trace(SMALL, seed=9)
    own = {tuple(rows.tolist()) for rows in denoise_passes(trace).rows}
    steps = closed_loop_steps(trace, batch_size=1)
    assert {tuple(step.rows.tolist()) for step in steps if step.phase == "denoise"} == own


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 9), st.integers(0, 50))
def test_counts_are_conserved(requests: int, blocks: int, size: int, prompt: int, seed: int) -> None:
    """Each pass sends every one of its tokens to top-k experts in every layer; rows are in one pass each."""
    made = DenoiseSettings(requests, 2, num_experts=7, top_k=3, blocks_per_request=blocks, block_size=size,
                           prompt_tokens=prompt)
    trace = denoise_trace(made, seed=seed)
    passes = denoise_passes(trace)
    tokens = np.array([len(rows) for rows in passes.rows])
    assert np.array_equal(passes.counts.sum(axis=2), np.repeat(3 * tokens[:, None], 2, axis=1))
    assert np.array_equal(np.sort(np.concatenate(passes.rows)), np.flatnonzero(trace.phase == DENOISE))
    assert passes.num_blocks == requests * blocks


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_requests": 0}, "num_requests must be at least 1"),
    ({"top_k": 13}, "top_k must be at most"),
    ({"num_experts": 40_000}, "must fit int16"),
    ({"prompt_tokens": -1}, "prompt_tokens must not be negative"),
    ({"routed": "blok"}, "Did you mean 'block'"),
    ({"accept": 1.5}, "accept must lie"),
    ({"block_share": 0.9}, "must stay below 1"),  # nothing would be left for the token
    ({"popularity_share": -0.1}, "must not be negative"),
    ({"drift": float("nan")}, "drift must be finite"),
    ({"drift_power": 2.0}, "drift_power in"),  # a smoother process cannot be factorised
])
def test_settings_out_of_range(changes: dict[str, object], message: str) -> None:
    """Each setting is checked when it is given."""
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]


def edited(trace: RoutingTrace, **columns: np.ndarray) -> RoutingTrace:
    """The trace with some columns replaced."""
    return dataclasses.replace(trace, **columns)  # type: ignore[arg-type]


def test_passes_that_cannot_be_told_apart() -> None:
    """Passes of two requests, blocks out of order, missing sizes and short blocks are refused with the reason."""
    trace = denoise_trace(dataclasses.replace(SMALL, prompt_tokens=0, num_requests=1), seed=1)
    passes = denoise_passes(trace)
    half = np.arange(trace.num_tokens) % 2
    with pytest.raises(InputError, match="holds requests 0 and 1"):
        denoise_passes(edited(trace, request_id=half))
    with pytest.raises(InputError, match="goes back to an earlier block"):
        denoise_passes(edited(trace, step=trace.step.max() - trace.step))
    with pytest.raises(InputError, match="is interrupted"):
        denoise_passes(edited(trace, request_id=trace.step % 2))
    with pytest.raises(InputError, match="inside a prompt of 100"):
        denoise_passes(trace, prompt_tokens=100)
    with pytest.raises(InputError, match="block_size must be a whole number of at least 1, got None"):
        denoise_passes(dataclasses.replace(trace, metadata={}))
    with pytest.raises(InputError, match="no denoise rows"):
        denoise_passes(edited(trace, phase=np.zeros(trace.num_tokens, np.int8), position=np.arange(trace.num_tokens)))
    with pytest.raises(InputError, match="no block has 100 steps"):
        lag_similarity(passes, [99])
    with pytest.raises(InputError, match="lags must be at least 1"):
        lag_similarity(passes, [0])
    with pytest.raises(InputError, match="no token ids"):
        masked_fraction(dataclasses.replace(trace, token_id=None), passes)
