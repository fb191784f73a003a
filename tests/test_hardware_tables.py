"""Look-ups in measured tables: exact where measured, monotone everywhere, honest about their source."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.hardware.profile import MeasuredTable
from moesim.hardware.tables import TableFit, lookup

AXES = ("tokens", "groups", "largest_group")


def line(sizes, seconds) -> MeasuredTable:
    """Return a table over tokens."""
    return MeasuredTable("dense", "gpu", "s", "bf16", ("tokens",), tuple((size,) for size in sizes), tuple(seconds))


def surface(sizes, seconds) -> MeasuredTable:
    """Return a table over tokens, groups and the largest group."""
    return MeasuredTable("grouped_ffn", "cpu", "s", "bf16", AXES, tuple(map(tuple, sizes)), tuple(seconds))


def feasible(tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256), groups=(1, 2, 4, 8)):
    """Return sizes that routing can give: balanced and skewed loads per (tokens, groups), ascending."""
    found = set()
    for count, parts in itertools.product(tokens, groups):
        if parts <= count:
            found |= {(count, parts, math.ceil(count / parts)), (count, parts, count - parts + 1)}
    return sorted(found)


@st.composite
def noisy_surfaces(draw):
    """Draw a table with arbitrary times, so also ones that fall where they should rise."""
    sizes = draw(st.lists(st.tuples(*[st.sampled_from([1, 4, 16, 64])] * 3), min_size=1, max_size=16, unique=True))
    seconds = draw(st.lists(st.floats(1e-6, 1.0), min_size=len(sizes), max_size=len(sizes)))
    return surface(sorted(sizes), seconds)


@given(st.lists(st.floats(0.1, 1000.0), min_size=2, max_size=8, unique=True), st.data())
@settings(max_examples=50, deadline=None)
def test_one_axis_equals_numpy(sizes, data):
    """On rising times a look-up inside is numpy's piecewise linear interpolation."""
    sizes = sorted(sizes)
    seconds = sorted(data.draw(st.lists(st.floats(1e-6, 1.0), min_size=len(sizes), max_size=len(sizes))))
    point = data.draw(st.floats(sizes[0], sizes[-1]))
    cost = lookup(line(sizes, seconds), (point,))
    assert cost.seconds == pytest.approx(float(np.interp(point, sizes, seconds)), rel=1e-6)
    assert cost.source == ("measured" if point in sizes else "interpolated")


@pytest.mark.parametrize(
    ("size", "seconds", "source"),
    [
        (4, 1.0, "extrapolated"),
        (8, 1.0, "measured"),
        (12, 1.5, "interpolated"),
        (16, 2.0, "measured"),
        (32, 6.0, "measured"),
        (40, 8.0, "extrapolated"),
        (0, 1.0, "extrapolated"),
    ],
)
def test_one_axis_golden(size, seconds, source):
    """Below the first size its time holds, above the last the slope of the last segment."""
    assert lookup(line([8, 16, 32], [1.0, 2.0, 6.0]), (size,)) == (seconds, source)


def test_a_single_size_is_constant():
    """One measured size answers everywhere with its time, and says where it is a guess."""
    table = line([8], [2.0])
    assert [lookup(table, (size,)) for size in (1, 8, 99)] == [
        (2.0, "extrapolated"),
        (2.0, "measured"),
        (2.0, "extrapolated"),
    ]


def test_noise_is_levelled():
    """Two times that fall are both set to their middle, the smallest change that makes them rise."""
    fit = TableFit(line([1, 2, 3, 4], [1.0, 3.0, 2.0, 4.0]))
    assert fit.seconds.tolist() == [1.0, 2.5, 2.5, 4.0]


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_levelling_moves_half_the_largest_fall(seconds):
    """The isotonic times rise and differ from the measured ones by half the worst fall, the least."""
    fitted = TableFit(line(range(1, len(seconds) + 1), seconds)).seconds
    worst = max((a - b for a, b in itertools.combinations(seconds, 2)), default=0.0)
    assert (np.diff(fitted) >= 0).all()
    assert np.abs(fitted - seconds).max() == pytest.approx(max(worst, 0.0) / 2, abs=1e-12)


@given(noisy_surfaces(), st.tuples(*[st.integers(0, 90)] * 3), st.tuples(*[st.integers(0, 40)] * 3))
@settings(max_examples=50, deadline=None)
def test_three_axes_never_fall(table, point, step):
    """Growing any axis, or several, never lowers the time, inside or outside of the table."""
    fit = TableFit(table)
    larger = tuple(a + b for a, b in zip(point, step, strict=True))
    assert fit.lookup(point).seconds <= fit.lookup(larger).seconds * (1 + 1e-12)


@given(noisy_surfaces(), st.tuples(*[st.integers(1, 64)] * 3))
@settings(max_examples=50, deadline=None)
def test_three_axes_stay_between_what_was_measured(table, point):
    """A look-up is no less than any time at smaller sizes and no more than any at larger ones."""
    fit = TableFit(table)
    inside = np.clip(point, np.min(table.sizes, axis=0), np.max(table.sizes, axis=0))
    found = fit.lookup(tuple(inside)).seconds
    for size, seconds in zip(table.sizes, fit.seconds, strict=True):
        if all(a <= b for a, b in zip(size, inside, strict=True)):
            assert found >= seconds * (1 - 1e-12)
        if all(a >= b for a, b in zip(size, inside, strict=True)):
            assert found <= seconds * (1 + 1e-12)


@given(st.tuples(*[st.floats(0.0, 1.0)] * 3), st.floats(0.1, 1.0))
@settings(max_examples=30, deadline=None)
def test_three_axes_are_exact_where_measured(slopes, offset):
    """On times that rise, a measured size gives its measured time bit for bit."""
    sizes = feasible()
    seconds = [offset + sum(a * b for a, b in zip(slopes, size, strict=True)) ** 0.7 for size in sizes]
    fit = TableFit(surface(sizes, seconds))
    assert [fit.lookup(size) for size in sizes] == [(value, "measured") for value in seconds]


def test_three_axes_recover_a_linear_kernel():
    """A kernel that is linear in its sizes is interpolated within 5 % and extrapolated within 1 %."""

    def kernel(size):
        return 20.0 + 0.3 * size[0] + 50.0 * size[1] + 0.1 * size[2]

    sizes = feasible()
    fit = TableFit(surface(sizes, map(kernel, sizes)))
    for size in [(24, 4, 12), (100, 8, 13), (48, 3, 30), (200, 6, 60), (12, 3, 5)]:
        cost = fit.lookup(size)
        assert cost.source == "interpolated"
        assert cost.seconds == pytest.approx(kernel(size), rel=0.05)
    for size in [(512, 8, 256), (4096, 8, 1000), (256, 16, 249)]:
        cost = fit.lookup(size)
        assert cost.source == "extrapolated"
        assert cost.seconds == pytest.approx(kernel(size), rel=0.01)


def test_three_axes_follow_a_roofline():
    """A kernel bound by weights, then by rows, is met within 10 % (median) at every third size, held out."""

    def kernel(size):
        return 5.0 + max(30.0 * size[1], 1.1 * size[0])

    sizes = feasible((1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256), (1, 2, 3, 4, 6, 8))
    kept = [size for index, size in enumerate(sizes) if index % 3]
    fit = TableFit(surface(kept, map(kernel, kept)))
    errors = [abs(fit.lookup(size).seconds / kernel(size) - 1) for size in sizes[::3]]
    assert np.median(errors) < 0.10


def test_two_axes():
    """Attention over (tokens, context) uses the same scheme; an axis with one size has no slope."""
    sizes = [(1, 0), (1, 100), (1, 1000)]
    table = MeasuredTable("attention", "gpu", "h", "bf16", ("tokens", "context"), tuple(sizes), (1.0, 2.0, 11.0))
    assert lookup(table, (1, 550)).seconds == pytest.approx(6.5)
    assert lookup(table, (9, 1000)) == (11.0, "extrapolated")


def test_a_fit_that_overshoots_is_held():
    """Where the sum of two axes overshoots (the slower one decides), the largest measured time holds."""
    sizes = ((1, 0), (1, 64), (64, 0), (64, 64))
    fit = TableFit(MeasuredTable("attention", "gpu", "h", "bf16", ("tokens", "context"), sizes, (1.0, 4.0, 4.0, 4.0)))
    assert fit.lookup((63, 63)) == (4.0, "interpolated")


@pytest.mark.parametrize(
    ("table", "point", "message"),
    [
        (line([1, 2], [1.0, 2.0]), (1, 2), "table 'dense' needs tokens, finite and not negative"),
        (line([1, 2], [1.0, 2.0]), (-1,), "not negative; got"),
        (line([1, 2], [1.0, 2.0]), (float("inf"),), "finite"),
        (surface([(1, 1, 1)], [1.0]), (1,), "needs tokens, groups, largest_group"),
        (surface([(1, 1, 1)], [1.0]), (1, 1, float("nan")), "finite"),
    ],
)
def test_bad_points(table, point, message):
    """A point with other axes than the table, or one that is no size, is refused."""
    with pytest.raises(InputError, match=message):
        lookup(table, point)
