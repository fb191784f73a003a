"""Regime breaks: sizes between which a measured time jumps by more than one law allows.

One regime is any curve whose logarithm is convex over the logarithm of the size, with a slope between 0 and 1: every
roofline ``overhead + max(bytes / rate, flops / peak)`` and every sum of such terms is one, however it bends. A line of
a table is cut into the fewest regimes that explain it: exact dynamic programming over all places to cut (Bellman, "On
the approximation of curves by line segments using dynamic programming", CACM 4(6), 1961) with a fixed price per cut;
a regime's misfit is its least-squares distance to that family, in units of the noise. Noise within `NOISE` of the time
can never pay for a cut, whatever it looks like.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moesim.hardware.cost import GROUPED_AXES
from moesim.hardware.profile import MeasuredTable

Floats = npt.NDArray[np.float64]
Size = tuple[float, ...]
NOISE = 0.05
CUT_PER_POINT = 1.2  # above (log(1 - NOISE) / NOISE)**2: no noise within NOISE pays for a cut
PAIR_PRICE = 0.25
MIN_POINTS = 5
MIN_FACTOR = 1.2
HEAVY = 1e3
QUARTILES_PER_SIGMA = 1.349
MEDIAN_PER_MEAN = 1.253
FEW = 2.0


@dataclass(frozen=True)
class Break:
    """Between sizes `low` and `high` of a line the time jumps by `factor` beyond what both sides foretell."""

    line: str
    low: Size
    high: Size
    factor: float


@dataclass(frozen=True)
class Line:
    """Sizes of a table along which one number rises: `places` in the table, `values` of the number, and a size by its number."""

    name: str
    places: tuple[int, ...]
    values: tuple[float, ...]
    at: Callable[[int], Size]


def find_breaks(table: MeasuredTable) -> tuple[Break, ...]:
    """Return the regime breaks of a table, line by line; none where a line has fewer than `MIN_POINTS` sizes."""
    return tuple(found for _, found in breaks_by_line(table))


def breaks_by_line(table: MeasuredTable) -> Iterator[tuple[Line, Break]]:
    """Yield every break with its line."""
    noise = _noise(table)
    for line in lines(table):
        if len(line.places) < MIN_POINTS:
            continue
        places = list(line.places)
        seconds = np.asarray(table.seconds)[places]
        for cut, factor in cuts(np.asarray(line.values), seconds, noise[places]):
            yield line, Break(line.name, table.sizes[places[cut - 1]], table.sizes[places[cut]], factor)


def lines(table: MeasuredTable) -> Iterator[Line]:
    """Yield the lines of a table: one axis is one; expert and attention tables have several; others none."""
    if len(table.axes) == 1:
        values = tuple(size[0] for size in table.sizes)
        yield Line(table.axes[0], tuple(range(len(values))), values, lambda value: (float(value),))
    elif table.axes == GROUPED_AXES:
        yield from _grouped_lines(table)
    elif table.axes == ("tokens", "context"):
        yield from _attention_lines(table)


def _grouped_lines(table: MeasuredTable) -> Iterator[Line]:
    found: dict[tuple[int, str], list[int]] = defaultdict(list)
    for place, (tokens, groups, largest) in enumerate(table.sizes):
        if largest == math.ceil(tokens / groups):
            found[int(groups), "even"].append(place)
        if groups > 1 and largest == tokens - groups + 1:
            found[int(groups), "skewed"].append(place)
    for (groups, how), places in sorted(found.items()):
        name = f"tokens, {groups} group{'s' * (groups > 1)}" + (f", {how}" if groups > 1 else "")
        yield Line(name, tuple(places), tuple(table.sizes[place][0] for place in places), _grouped_size(groups, how))


def _grouped_size(groups: int, how: str) -> Callable[[int], Size]:
    def at(tokens: int) -> Size:
        largest = -(-tokens // groups) if how == "even" else tokens - groups + 1
        return float(tokens), float(groups), float(largest)

    return at


def _attention_lines(table: MeasuredTable) -> Iterator[Line]:
    by_tokens, by_context = defaultdict(list), defaultdict(list)
    for place, (tokens, context) in enumerate(table.sizes):
        by_context[context / max(1.0, tokens)].append(place)
        by_tokens[tokens].append(place)
    for each, places in sorted(by_context.items()):
        values = tuple(table.sizes[place][0] for place in places)
        yield Line(f"tokens, {each:g} cached each", tuple(places), values, lambda value, each=each: (float(value), value * each))  # type: ignore[misc]
    for tokens, places in sorted(by_tokens.items()):
        values = tuple(table.sizes[place][1] for place in places)
        yield Line(f"context, {tokens:g} tokens", tuple(places), values, lambda value, tokens=tokens: (tokens, float(value)))  # type: ignore[misc]


def _noise(table: MeasuredTable) -> Floats:
    """Return the relative standard error of each median, at least `NOISE` and the table's typical one.

    A few runs can agree by chance, so the error of few is taken as larger, and one size's not as less than the others'.
    """
    if not table.spread or not table.samples:
        return np.full(len(table.sizes), NOISE)
    spread, samples = np.asarray(table.spread), np.maximum(1, np.asarray(table.samples))
    errors = MEDIAN_PER_MEAN * spread / QUARTILES_PER_SIGMA / np.sqrt(samples) * (1 + FEW / samples)
    return np.maximum(NOISE, np.maximum(errors, np.median(errors)))


def cuts(values: Floats, seconds: Floats, noise: Floats) -> list[tuple[int, float]]:
    """Return (place, factor): a regime ends before `place`, and the time there is `factor` times what is foretold.

    Args:
        values: float64[n], rising and positive. seconds: float64[n]. noise: float64[n], relative.
    """
    x, y = np.log(values), np.log(seconds)
    starts = segment(x, y, noise, CUT_PER_POINT * len(x))
    ends = [*starts[1:], len(x)]
    fits = [_regime(x[a:b], y[a:b], noise[a:b]) for a, b in zip(starts, ends, strict=True)]
    found = []
    for left, right, place in zip(fits, fits[1:], starts[1:], strict=False):
        slopes = [slope for slope in (left.last_slope, right.first_slope) if slope is not None]
        foretold = left.fitted[-1] + (float(np.mean(slopes)) if slopes else 0.0) * (x[place] - x[place - 1])
        factor = math.exp(right.fitted[0] - foretold)
        if max(factor, 1 / factor) >= MIN_FACTOR:
            found.append((place, factor))
    return found


def segment(x: Floats, y: Floats, noise: Floats, price: float) -> list[int]:
    """Return where the regimes start: the cut of least misfit plus `price` per regime, over all cuts.

    Only the first regime may be a single point: a kernel for one row is common, one for the largest size is not. Two
    points that rise are no evidence of a regime, so a first regime of two costs a little more.
    """
    count = len(x)
    if _regime(x, y, noise).misfit <= price:  # a second regime costs as much, even if both then fit exactly
        return [0]
    best = [0.0] + [math.inf] * count
    came = [0] * (count + 1)
    for end in range(1, count + 1):
        for start in reversed(range(end)):
            if best[start] == math.inf or (end - start < 2 and start > 0):
                continue
            own = price + _regime(x[start:end], y[start:end], noise[start:end]).misfit
            if own > best[end]:  # a regime that starts earlier has no less misfit
                break
            total = best[start] + own + PAIR_PRICE * price * (start == 0 and end == 2)
            if total <= best[end]:  # of equal cuts the earliest
                best[end], came[end] = total, start
    starts, end = [], count
    while end > 0:
        starts.append(came[end])
        end = came[end]
    return starts[::-1]


@dataclass(frozen=True)
class Regime:
    """The nearest curve of one regime: its misfit in squared noises, its values, its slopes at both ends (None: one point)."""

    misfit: float
    fitted: Floats
    first_slope: float | None
    last_slope: float | None


def _regime(x: Floats, y: Floats, noise: Floats) -> Regime:
    """Fit the nearest convex curve with slopes in [0, 1]: a constant and hinges whose weights are not negative.

    The weights and a slack sum to 1, by one heavy row of a non-negative least-squares problem.
    """
    if len(x) == 1:
        return Regime(0.0, y.copy(), None, None)
    from scipy.optimize import nnls

    floor = y.min() - 1.0  # the constant, not negative above it
    hinges = np.maximum(x[:, None] - x[None, :-1], 0.0)
    rows = np.column_stack([np.ones(len(x)), hinges, np.zeros(len(x))]) / noise[:, None]
    heavy = HEAVY * np.array([0.0, *([1.0] * (len(x) - 1)), 1.0])
    weights, _ = nnls(np.vstack([rows, heavy]), np.append((y - floor) / noise, HEAVY))
    fitted = floor + weights[0] + hinges @ weights[1:-1]
    misfit = float(np.sum(((y - fitted) / noise) ** 2))
    return Regime(misfit, fitted, float(weights[1]), float(np.sum(weights[1:-1])))
