"""Versions of experts: bytes of each width, HOBBIT's needs, D2MoE's levels, and the accuracy debit."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.precision import (
    CHANNEL_WISE,
    ExpertVersions,
    Quantization,
    exclusive_versions,
    nested_versions,
)
from moesim.cache.precision_debit import AccuracyDebit, DebitCounter, token_shares
from moesim.cache.precision_hobbit import HIGH, LOW, NOT_CHOSEN, SKIP, HobbitPrecision, miss_penalty
from moesim.cache.precision_levels import bit_levels, level_counts
from moesim.cache.scores import router_scores
from moesim.errors import CheckError, InputError
from moesim.model.catalog import catalog_model
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import RoutingTrace


def tiny_model(**changes: object) -> ModelSpec:
    """A model whose experts have 18432 weights: two matrices of 96 rows of 64, and one of 64 rows of 96."""
    model = ModelSpec(name="tiny", num_layers=2, moe_layers=(0, 1), num_experts=6, top_k=2, hidden_size=64,
                      expert_intermediate_size=96, attention=AttentionSpec(4, 2, 16), vocab_size=128)
    return model.replace(**changes)


# ---------------------------------------------------------------- bytes


def test_bytes_of_a_width_are_weights_and_group_scales() -> None:
    """By hand: groups of 32, so 96 * 2 rows of two groups and 64 rows of three, each with 16 + 16 bits."""
    model, how = tiny_model(), Quantization(32)
    assert how.num_groups(model) == 192 * 2 + 64 * 3 == 576
    assert how.num_bytes(model, 4) == 18432 // 2 + 576 * 4
    assert how.num_bytes(model, 1, plane=True) == 18432 // 8 + 576 * 2
    assert how.num_bytes(model, 16) == model.expert_bytes == 36864
    assert CHANNEL_WISE.num_groups(model) == 192 + 64
    assert Quantization(64).num_groups(model) == 192 + 64 * 2  # the last group of a row is short


def test_the_models_own_width_takes_what_the_model_says() -> None:
    """Experts stored in mxfp4 keep their bytes; a width of 8 bits of a bf16 model carries scales."""
    narrow = tiny_model(weight_bytes=0.5)
    assert exclusive_versions(narrow, (2, 4)).part_bytes[1] == narrow.expert_bytes
    assert exclusive_versions(tiny_model(), (8, 16)).part_bytes[0] > 18432


def test_mixtral_versions_are_those_of_the_papers() -> None:
    """FP16 experts of 352 MB; INT4 near a quarter of them, with 6 % of scales and zeros."""
    versions = HobbitPrecision().versions(catalog_model("mixtral-8x7b").spec())
    assert versions.weight_bytes(HIGH) == 352_321_536
    assert versions.weight_bytes(LOW) == 352_321_536 // 4 * (4 * 128 + 32) // (4 * 128)
    assert versions.slow_bytes == versions.weight_bytes(HIGH) + versions.weight_bytes(LOW)


def test_a_higher_nested_level_costs_the_missing_planes_only() -> None:
    """INT3 after INT2 is one plane; INT4 from nothing is all three."""
    model = tiny_model()
    versions = nested_versions(model, (2, 3, 4))
    base, third, fourth = versions.part_bytes
    assert (third, fourth) == (Quantization().num_bytes(model, 1, plane=True),) * 2
    assert versions.copy_bytes(0, 1) == third
    assert versions.copy_bytes(-1, 2) == versions.weight_bytes(2) == base + third + fourth == versions.slow_bytes
    assert versions.copy_bytes(2, 2) == 0
    assert nested_versions(model, (2, 4)).part_bytes == (base, third + fourth)


@given(st.lists(st.integers(1, 16), min_size=1, max_size=5, unique=True).map(sorted), st.booleans(), st.data())
def test_copies_add_up(bits: list[int], nested: bool, data: st.DataObject) -> None:
    """Nested copies in any steps cost the same; exclusive ones cost every version that is fetched."""
    versions = (nested_versions if nested else exclusive_versions)(tiny_model(), bits)
    steps = [-1, *sorted(data.draw(st.sets(st.integers(0, len(bits) - 1), min_size=1)))]
    paid = [versions.copy_bytes(have, want) for have, want in pairwise(steps)]
    assert all(size > 0 for size in paid)
    total = versions.weight_bytes(steps[-1]) if nested else sum(versions.weight_bytes(step) for step in steps[1:])
    assert sum(paid) == total
    assert versions.level_of(bits[-1]) == len(bits) - 1


@pytest.mark.parametrize(("make", "message"), [
    (lambda: ExpertVersions((4, 2), (1, 2)), r"bits must rise from at least 1, got \[4, 2\]"),
    (lambda: ExpertVersions((2, 4), (1,)), r"2 widths need as many sizes of at least 1 byte, got \[1\]"),
    (lambda: ExpertVersions((2, 4), (5, 5)), "a wider copy must take more bytes"),
    (lambda: ExpertVersions((2, 4), (3, 5), on_slow_tier=(2,)), r"some of levels 0 ... 1, got \[2\]"),
    (lambda: ExpertVersions((2, 4), (3, 5), nested=True, on_slow_tier=(1,)), r"from 0 on, got \[1\]"),
    (lambda: nested_versions(tiny_model(), ()), "bits must rise"),
    (lambda: Quantization(0), "group_size must be at least 1, got 0"),
    (lambda: Quantization(scale_bits=-1), "must not be negative"),
    (lambda: ExpertVersions((2, 4), (3, 5)).level_of(3), "experts exist in 2, 4 bits, not in 3"),
    (lambda: HobbitPrecision(0.9, 0.6), "needs 0 <= t1 <= t2, got t1 0.9 and t2 0.6"),
    (lambda: HobbitPrecision(low_bits=16), "low_bits must be below high_bits, got 16 and 16")])
def test_versions_that_are_none_are_refused(make: object, message: str) -> None:
    """Widths that do not rise, sizes that do not fit them, thresholds in the wrong order."""
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]


# ---------------------------------------------------------------- HOBBIT's needs


def needs_by_hand(ids: np.ndarray, weights: np.ndarray, rule: HobbitPrecision, num_experts: int) -> list[int]:
    """The rule as its text says it: sort, add up, compare; the strictest of the tokens."""
    found = [NOT_CHOSEN] * num_experts
    for row, values in zip(ids.tolist(), weights.astype(float).tolist(), strict=True):
        chosen = sorted((-value, expert) for expert, value in zip(row, values, strict=True) if expert >= 0)
        total, before = -sum(value for value, _ in chosen) or 1.0, 0.0
        for value, expert in chosen:
            need = HIGH if before / total <= rule.t1 else LOW if before / total <= rule.t2 else SKIP
            found[expert] = max(found[expert], need)
            before -= value
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 6), st.floats(0, 1), st.floats(0, 1))
def test_needs_are_the_rule_as_written(seed: int, tokens: int, top_k: int, one: float, other: float) -> None:
    """For any tokens, with padding and equal weights, and any thresholds."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, 8)))[:, :top_k].astype(np.int16)
    weights = rng.integers(0, 8, ids.shape).astype(np.float32) / 8
    ids[:, 1:][rng.random((tokens, top_k - 1)) < 0.2] = -1
    rule = HobbitPrecision(min(one, other), max(one, other))
    assert rule.needs(ids, weights, 8).tolist() == needs_by_hand(ids, weights, rule, 8)


def test_high_needs_are_what_the_hobbit_policy_calls_important() -> None:
    """For one token the experts that need the high width are those that `RouterScores.important` names."""
    trace = synthetic_trace(40, 3, 8, 4, 4, seed=2)
    rule = HobbitPrecision()
    scores = router_scores(trace, [np.array([row]) for row in range(40)])
    for row in range(40):
        for layer in range(3):
            assert trace.gate_weights is not None
            needs = rule.needs(trace.expert_ids[[row], layer], trace.gate_weights[[row], layer], 8)
            assert set(np.flatnonzero(needs == HIGH).tolist()) == scores.important(row * 3 + layer, 0.6)


@given(st.integers(0, 99))
def test_more_tokens_never_need_less(seed: int) -> None:
    """Adding a token to a step lowers no expert's need, and the first choice of every token needs the high width."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((4, 8)))[:, :3]
    weights = rng.random(ids.shape)
    rule = HobbitPrecision()
    few, all_of_them = rule.needs(ids[:3], weights[:3], 8), rule.needs(ids, weights, 8)
    assert np.all(all_of_them >= few)
    assert np.all(all_of_them[ids[np.arange(4), weights.argmax(axis=1)]] == HIGH)


def test_shares_of_even_weights_follow_from_the_thresholds() -> None:
    """Top-2 with an even first weight w in (0.5, 1): half the choices are first, 0.1 / 0.5 of the others have w <= 0.6.

    So 60 % high, 30 % low, 10 % skipped, within sampling; the paper's Mixtral has 67, 30 and 3 %.
    """
    shares = HobbitPrecision().need_shares(synthetic_trace(4000, 4, 8, 2, 40, seed=5))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares == pytest.approx({"high": 0.6, "low": 0.3, "skipped": 0.1}, abs=0.012)


def test_needs_want_gate_weights() -> None:
    """A trace without weights cannot say what is important."""
    trace = dataclasses.replace(synthetic_trace(8, 1, 4, 2, 1), gate_weights=None)
    with pytest.raises(InputError, match="no gate weights"):
        HobbitPrecision().need_shares(trace)


def test_a_low_load_counts_its_share_of_bytes() -> None:
    """Three high loads and four low ones of a quarter are four."""
    assert miss_penalty(3, 4, ExpertVersions((4, 16), (25, 100))) == 4.0


# ---------------------------------------------------------------- D2MoE's levels


@pytest.mark.parametrize("by", ["rank", "draw"])
def test_levels_have_the_stated_shares(by: str) -> None:
    """By rank the shares hold in each layer but for rounding, drawn ones within sampling."""
    trace = synthetic_trace(500, 2, 8, 2, 5, seed=1)
    levels = bit_levels(trace, (0.3, 0.4, 0.3), by=by, seed=4)
    for layer in range(2):
        shares = np.bincount(levels[:, layer].ravel(), minlength=3) / 1000
        assert shares == pytest.approx([0.3, 0.4, 0.3], abs=0.0011 if by == "rank" else 0.05)
    assert np.array_equal(levels, bit_levels(trace, (0.3, 0.4, 0.3), by=by, seed=4))


def test_levels_by_rank_rise_with_the_gate_weight() -> None:
    """In a layer no choice of a larger weight gets a lower level; padding has none."""
    trace = padded_trace()
    levels = bit_levels(trace, (0.5, 0.25, 0.25))
    assert np.array_equal(levels < 0, trace.expert_ids < 0)
    for layer in range(trace.num_layers):
        chosen = trace.expert_ids[:, layer] >= 0
        assert trace.gate_weights is not None
        order = np.argsort(trace.gate_weights[:, layer][chosen], kind="stable")
        assert np.all(np.diff(levels[:, layer][chosen][order]) >= 0)


def padded_trace() -> RoutingTrace:
    """Synthetic routing in which some tokens have one expert less."""
    trace = synthetic_trace(60, 2, 8, 3, 3, seed=1)
    ids, weights = trace.expert_ids.copy(), np.array(trace.gate_weights)
    ids[::4, :, 2], weights[::4, :, 2] = -1, 0
    return dataclasses.replace(trace, expert_ids=ids, gate_weights=weights)


def test_counts_of_levels_are_those_of_the_choices() -> None:
    """Against a count choice by choice."""
    trace = padded_trace()
    levels = bit_levels(trace, (0.2, 0.5, 0.3), by="draw", seed=3)
    counts = level_counts(trace.expert_ids[:20, 1], levels[:20, 1], 8, 3)
    by_hand = np.zeros((8, 3), int)
    for expert, level in zip(trace.expert_ids[:20, 1].ravel(), levels[:20, 1].ravel(), strict=True):
        by_hand[expert, level] += expert >= 0
    assert np.array_equal(counts, by_hand)


@pytest.mark.parametrize(("options", "message"), [
    ({"capacity": (0.5, 0.4)}, r"shares that sum to 1, got \[0.5, 0.4\]"),
    ({"capacity": (1.5, -0.5)}, "shares that sum to 1"),
    ({"by": "score"}, "by must be one of rank, draw, got 'score'"),
    ({"weights": None}, "no gate weights to rank by; use by='draw'")])
def test_levels_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    """Shares that are none, an unknown rule, ranks without weights."""
    trace = padded_trace()
    if "weights" in options:
        trace, options = dataclasses.replace(trace, gate_weights=None), {}
    with pytest.raises(InputError, match=message):
        bit_levels(trace, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the debit


def test_shares_of_a_token_sum_to_one() -> None:
    """Normalised weights; equal ones without weights or where all are 0; padding has none."""
    ids = np.array([[0, 1], [2, -1], [3, 4]])
    assert token_shares(ids, np.array([[3.0, 1.0], [0.5, 0.0], [0.0, 0.0]])).tolist() == [
        [0.75, 0.25], [1.0, 0.0], [0.5, 0.5]]
    assert token_shares(ids, None).tolist() == [[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]


def test_the_debit_is_the_weight_at_each_width() -> None:
    """Two tokens by hand: 0.75 at 16 bits, 0.25 at 4; then 0.9 at 16 and 0.1 skipped."""
    counter = DebitCounter(2)
    counter.add(np.array([[0, 1]]), np.array([[0.3, 0.1]]), np.array([[1, 0]]))
    counter.add(np.array([[0, 1]]), np.array([[0.9, 0.1]]), np.array([[1, -1]]))
    debit = counter.debit("hobbit", (4, 16), "gate weights", {"t1": 0.6, "t2": 0.9, "paper_widths": True})
    assert debit.shares == pytest.approx((0.125, 0.825))
    assert debit.skipped == pytest.approx(0.05)
    columns = debit.columns()
    assert columns["debit_by_bits"] == "16 bit 82.5 %, 4 bit 12.5 %"
    assert columns["debit_mean_bits"] == pytest.approx(16 * 0.825 + 4 * 0.125)
    assert columns["debit_published"] == "published for Mixtral-8x7B: GSM8K 0.52 to 0.51 (arXiv 2411.01433)"


@pytest.mark.parametrize(("method", "settings", "found"), [
    ("hobbit", {"t1": 0.6, "t2": 0.8, "paper_widths": True}, 0),  # other thresholds than the paper's
    ("hobbit", {"t1": 0.6, "t2": 0.9, "paper_widths": False}, 0),
    ("d2moe", {"paper_widths": False}, 0),
    ("edgemoe", {"tolerable_loss": 0.02, "proxy": False}, 2),
    ("edgemoe", {"tolerable_loss": 0.02, "proxy": True}, 0),  # a share of a proxy is no loss
    ("d2moe", {"paper_widths": True}, 2)])
def test_published_figures_stand_only_beside_their_setting(method: str, settings: dict[str, object], found: int) -> None:
    """A figure is shown for the setting in which the paper measured it, with the model."""
    counter = DebitCounter(1)
    counter.add(np.array([[0]]), None, np.array([[0]]))
    debit = counter.debit(method, (4,), "stated", settings)
    assert len(debit.published) == found
    assert all(text.startswith("published for ") for text in debit.published)
    assert debit.columns()["debit_by_bits"] == "4 bit 100.0 % (of choices: no gate weights)"


def test_a_debit_that_does_not_add_up_is_refused() -> None:
    """Nor is there one before the run."""
    with pytest.raises(CheckError, match="do not sum to 1"):
        AccuracyDebit("hobbit", (4, 16), (0.5, 0.4), 0.0, True, "stated")
    with pytest.raises(CheckError, match="has not run yet"):
        DebitCounter(2).debit("hobbit", (4, 16), "stated", {})


# ---------------------------------------------------------------- the page


def test_the_page_prints_what_it_shows() -> None:
    """docs/precision.md: the Python blocks run one after another and print the text blocks."""
    page = (Path(__file__).parent.parent / "docs/precision.md").read_text()
    printed: list[str] = []
    names: dict[str, object] = {"print": lambda *values: printed.append(" ".join(map(str, values)))}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/precision.md", "exec", dont_inherit=True), names)
    shown = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert "".join(f"{line}\n" for line in printed) == "".join(shown)
    for method in ("HobbitProgram", "EdgeMoeProgram", "D2MoeProgram"):
        assert method in page
