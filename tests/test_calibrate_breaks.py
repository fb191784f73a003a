"""Regime breaks: found where they are and as large as they are, and never in a curve of one regime."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.breaks import Break, _regime, cuts, find_breaks, lines, segment
from moesim.calibrate.experts import TOKENS, forced_sizes
from moesim.calibrate.refine import middle, refined_sizes
from moesim.hardware.cost import GROUPED_AXES
from moesim.hardware.profile import MeasuredTable
from moesim.units import KIB

X = np.array(TOKENS, dtype=np.float64)
FEW = X[:9]
NOISE = np.full(len(X), 0.05)
RATES = st.floats(-6, -2).map(lambda power: 10.0**power)


def line(seconds: np.ndarray, axis: str = "tokens", values: np.ndarray = X) -> MeasuredTable:
    """Return a table over one axis."""
    return MeasuredTable("router", "cpu", "s", "fp32", (axis,), tuple((float(x),) for x in values), tuple(map(float, seconds)))


def roofline(overhead: float, memory: float, compute: float) -> np.ndarray:
    """Return seconds over `X`."""
    return overhead + np.maximum(memory, compute * X)


# ---------------------------------------------------------------- no false alarm


@given(RATES, RATES, RATES, st.lists(st.floats(-0.05, 0.05), min_size=len(X), max_size=len(X)))
@settings(max_examples=60, deadline=None)
def test_noise_of_five_percent_is_no_break(overhead: float, memory: float, compute: float, noise: list[float]) -> None:
    """Any roofline with an overhead, any noise within 5 %, also one that is chosen to look like a step."""
    assert cuts(X, roofline(overhead, memory, compute) * (1 + np.array(noise)), NOISE) == []


@given(st.lists(st.tuples(RATES, st.floats(0.0, 1.0)), min_size=1, max_size=4), st.integers(0, len(X) - 1))
@settings(max_examples=40, deadline=None)
def test_sums_of_powers_are_one_regime(terms: list[tuple[float, float]], step: int) -> None:
    """Exponents between 0 and 1; with the noise that is hardest: all of it a step up at one place."""
    seconds = sum(rate * X**power for rate, power in terms)
    assert cuts(X, seconds * np.where(np.arange(len(X)) < step, 0.951, 1.049), NOISE) == []


@given(RATES, RATES, RATES, st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_gaussian_noise_of_three_percent_is_no_break(overhead: float, memory: float, compute: float, seed: int) -> None:
    """Drawn per size."""
    noise = np.random.default_rng(seed).normal(0.0, 0.03, len(X))
    assert cuts(X, roofline(overhead, memory, compute) * np.exp(noise), NOISE) == []


def test_measured_noise_counts_where_it_is_larger() -> None:
    """A jump by 1.7 is one with a spread of 5 %, and none where the runs of each size spread by 300 %."""
    seconds = 1e-3 * np.where(X > 16, 1.7, 1.0)
    table = line(seconds)
    assert len(find_breaks(table)) == 1
    for spread, count in ((0.05, 1), (3.0, 0)):
        noisy = dataclasses.replace(table, spread=(spread,) * len(X), samples=(3,) * len(X))
        assert len(find_breaks(noisy)) == count


# ---------------------------------------------------------------- breaks that are there


@given(RATES, RATES, RATES, st.integers(3, len(X) - 4), st.sampled_from([0.5, 2.0, 2.5]))
@settings(max_examples=60, deadline=None)
def test_a_jump_is_found_where_it_is(overhead: float, memory: float, compute: float, place: int, factor: float) -> None:
    """Without noise: by a factor of 2, up or down, anywhere but near the ends; one break, of about that factor."""
    found = cuts(X, roofline(overhead, memory, compute) * np.where(np.arange(len(X)) >= place, factor, 1.0), NOISE)
    assert [cut for cut, _ in found] == [place]
    # a bend in the very gap of the jump adds to it or hides some of it
    assert abs(math.log(found[0][1] / factor)) < math.log(1.35)


def test_the_jump_of_fp32_between_three_and_four_tokens() -> None:
    """1.7 times, in a table that first reads weights and then computes; with a spread of 2 % it stays."""
    seconds = roofline(1e-5, 2.5e-3, 1.2e-4) * np.where(X >= 4, 1.7, 1.0)
    noise = np.random.default_rng(0).normal(0.0, 0.02, len(X))
    (found,) = find_breaks(line(seconds * np.exp(noise)))
    assert (found.line, found.low, found.high) == ("tokens", (3.0,), (4.0,))
    assert found.factor == pytest.approx(1.7, rel=0.1)


def test_a_kernel_of_its_own_for_one_row_is_found() -> None:
    """The first size may be a regime alone; the last may not, whatever it takes."""
    flat = np.full(len(X), 1e-3)
    assert [cut for cut, _ in cuts(X, np.where(X >= 2, 1.7, 1.0) * flat, NOISE)] == [1]
    assert cuts(X, np.where(X[-1] <= X, 1.7, 1.0) * flat, NOISE) == []


def test_two_jumps_are_two_breaks() -> None:
    """Up by 2 at 6 and down by 0.5 at 64."""
    seconds = roofline(1e-5, 1e-3, 1e-5) * np.where((X >= 6) & (X < 64), 2.0, 1.0)
    found = cuts(X, seconds, NOISE)
    assert [X[cut] for cut, _ in found] == [6, 64]
    assert [factor for _, factor in found] == pytest.approx([2.0, 0.5], rel=0.05)


# ---------------------------------------------------------------- the two parts of the method, against others


@given(st.lists(st.floats(-1.0, 1.0), min_size=len(FEW), max_size=len(FEW)), st.floats(0.5, 20.0))
@settings(max_examples=30, deadline=None)
def test_the_cut_is_the_best_of_all_cuts(jumps: list[float], price: float) -> None:
    """Against every subset of places to cut, tried one by one."""
    x, y, noise = np.log(FEW), np.array(jumps), np.full(len(FEW), 0.3)

    def total(starts: tuple[int, ...]) -> float:
        ends = (*starts[1:], len(x))
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        if min(sizes[1:], default=2) < 2:
            return math.inf
        misfit = sum(_regime(x[a:b], y[a:b], noise[a:b]).misfit for a, b in zip(starts, ends, strict=True))
        return misfit + price * (len(starts) + 0.25 * (sizes[0] == 2))

    places = range(1, len(x))
    every = [(0, *chosen) for count in range(len(x)) for chosen in itertools.combinations(places, count)]
    assert total(tuple(segment(x, y, noise, price))) == pytest.approx(min(map(total, every)))


@given(st.lists(st.floats(-1.0, 1.0), min_size=len(FEW), max_size=len(FEW)))
@settings(max_examples=25, deadline=None)
def test_a_regime_is_the_nearest_curve_of_its_family(values: list[float]) -> None:
    """Convex, with slopes between 0 and 1; against a general solver of quadratic programs on the values themselves."""
    from scipy.optimize import minimize

    x, y = np.log(FEW), np.array(values)
    found = _regime(x, y, np.ones(len(x)))
    slopes = np.diff(found.fitted) / np.diff(x)
    assert slopes.min() >= -1e-6
    assert slopes.max() <= 1 + 1e-4
    assert np.diff(slopes).min() >= -1e-6
    rises = np.diff(np.eye(len(x)), axis=0) / np.diff(x)[:, None]
    rules = np.vstack([rises[0], -rises[-1], np.diff(rises, axis=0)])
    other = minimize(lambda fit: np.sum((fit - y) ** 2), np.full(len(x), y.mean()), jac=lambda fit: 2 * (fit - y), method="SLSQP",
                     constraints={"type": "ineq", "fun": lambda fit: rules @ fit + np.eye(len(rules))[1],
                                  "jac": lambda fit: rules}, options={"maxiter": 500, "ftol": 1e-12})
    assert found.misfit == pytest.approx(other.fun, rel=1e-3, abs=1e-5)


# ---------------------------------------------------------------- lines of tables, and what to measure next


def grouped(jump_at: int) -> MeasuredTable:
    """Return an expert table whose time jumps where the largest group reaches `jump_at` rows."""
    sizes = sorted(forced_sizes(TOKENS, (1, 4), 64))
    seconds = [(0.01 * groups + 1e-5 * tokens) * (1.7 if largest >= jump_at else 1.0) for tokens, groups, largest in sizes]
    return MeasuredTable("grouped_ffn", "cpu", "s", "fp32", GROUPED_AXES, tuple(sizes), tuple(seconds))


def test_experts_have_a_line_per_groups_and_spread() -> None:
    """Sizes at the values of a line are the line's own; each break names its line and two sizes of it."""
    table = grouped(7)
    names = {one.name: one for one in lines(table)}
    assert set(names) == {"tokens, 1 group", "tokens, 4 groups, even", "tokens, 4 groups, skewed"}
    for one in names.values():
        assert [one.at(int(value)) for value in one.values] == [table.sizes[place] for place in one.places]
    assert [(found.line, found.low, found.high) for found in find_breaks(table)] == [
        ("tokens, 1 group", (6, 1, 6), (8, 1, 8)),
        ("tokens, 4 groups, even", (24, 4, 6), (32, 4, 8)),
        ("tokens, 4 groups, skewed", (8, 4, 5), (12, 4, 9))]
    assert sorted(size for size, _ in refined_sizes(table)) == [(7, 1, 7), (10, 4, 7), (28, 4, 7)]


def test_attention_has_lines_over_tokens_and_over_context() -> None:
    """A jump at 1,024 cached tokens each is one over the context, at every number of tokens."""
    pairs = [(tokens, tokens * each) for tokens in (1, 2, 4, 8, 16) for each in (64, 128, 256, 512, 1024, 2048, 4096)]
    seconds = [1e-3 * (2.0 if context >= 1024 * tokens else 1.0) for tokens, context in pairs]
    table = MeasuredTable("attention", "cpu", "s", "fp32", ("tokens", "context"), tuple((float(a), float(b)) for a, b in pairs),
                          tuple(seconds))
    for one in lines(table):
        assert [one.at(int(value)) for value in one.values] == [table.sizes[place] for place in one.places]
    found = find_breaks(table)
    assert [(one.line, one.factor) for one in found] == [(f"context, {tokens} tokens", pytest.approx(2.0)) for tokens in (1, 2, 4, 8, 16)]
    assert found[0] == Break("context, 1 tokens", (1, 512), (1, 1024), found[0].factor)
    assert (1, 724) in [size for size, _ in refined_sizes(table)]


def test_other_axes_and_short_lines_have_no_breaks() -> None:
    """Four sizes are too few; axes that are not known have no lines."""
    short = line(np.array([1.0, 1.0, 9.0, 9.0]), values=X[:4])
    assert find_breaks(short) == ()
    strange = MeasuredTable("x", "cpu", "", "", ("rows", "columns"), ((1.0, 1.0), (2.0, 1.0)), (1.0, 9.0))
    assert list(lines(strange)) == []


@given(st.integers(1, 5000), st.integers(1, 5000))
@settings(deadline=None)
def test_the_middle_lies_inside_or_there_is_none(low: int, gap: int) -> None:
    """Whole numbers until both are neighbours; for bytes whole pages, until both are within a tenth."""
    value = middle("tokens", low, low + gap)
    assert (value is None) == (gap == 1)
    assert value is None or low < value < low + gap
    page, pages = 4 * KIB * low, 4 * KIB * (low + gap)
    value = middle("bytes", page, pages)
    assert value is None or (page < value < pages and value % (4 * KIB) == 0)
    assert value is not None or pages / page < 1.1 or gap == 1 or (low, gap) == (1, 2)
