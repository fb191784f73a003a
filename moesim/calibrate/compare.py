"""Two calibration profiles side by side: the ratio at every size that both know, where they cross, what only one has."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.tables import TableFit

Key = tuple[str, str, str, str, tuple[str, ...]]
Size = tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """Seconds of both profiles at one size; `measured` is False where one of them is interpolated."""

    size: Size
    seconds_a: float
    seconds_b: float
    measured: bool

    @property
    def ratio(self) -> float:
        """Return b over a: above 1, b is slower."""
        return self.seconds_b / self.seconds_a


@dataclass(frozen=True)
class Crossing:
    """The faster profile changes along `axis`, between `low` and `high`, the other axes as in `size`.

    `at` is where the difference is zero if it runs in a straight line between the two.
    """

    axis: str
    size: Size
    low: float
    high: float
    at: float
    faster_below: str


@dataclass(frozen=True)
class TableComparison:
    """One operation that both profiles measured. `pairs` rise by size; `only_a` and `only_b` are sizes beyond the other's."""

    op: str
    device: str
    shape: str
    dtype: str
    axes: tuple[str, ...]
    pairs: tuple[Pair, ...]
    only_a: tuple[Size, ...]
    only_b: tuple[Size, ...]
    crossings: tuple[Crossing, ...]

    @property
    def num_measured(self) -> int:
        """Return at how many sizes both measured."""
        return sum(pair.measured for pair in self.pairs)

    @property
    def ratios(self) -> tuple[float, float, float] | None:
        """Return the lowest, median and highest b over a: where both measured, else where one is interpolated."""
        pairs = [pair for pair in self.pairs if pair.measured] or list(self.pairs)
        values = [pair.ratio for pair in pairs]
        return (min(values), statistics.median(values), max(values)) if values else None


@dataclass(frozen=True)
class ProfileComparison:
    """Two profiles: the tables that both have, and the names (op, device, shape, dtype, axes) that one has."""

    name_a: str
    name_b: str
    tables: tuple[TableComparison, ...]
    only_a: tuple[Key, ...]
    only_b: tuple[Key, ...]


def compare_profiles(a: CalibrationProfile, b: CalibrationProfile) -> ProfileComparison:
    """Compare table by table; tables match by operation, device, shape, dtype and axes, exactly.

    Times are those of the files, unlevelled. At a size that only one measured, the other is looked up (`TableFit`)
    where that is not an extrapolation.
    """
    tables_a, tables_b = ({_key(table): table for table in profile.tables} for profile in (a, b))
    both = [key for key in tables_a if key in tables_b]
    return ProfileComparison(a.name, b.name, tuple(_compare(tables_a[key], tables_b[key]) for key in both),
                             tuple(key for key in tables_a if key not in tables_b),
                             tuple(key for key in tables_b if key not in tables_a))


def _key(table: MeasuredTable) -> Key:
    return table.op, table.device, table.shape, table.dtype, table.axes


def _compare(a: MeasuredTable, b: MeasuredTable) -> TableComparison:
    seconds_a, seconds_b = (dict(zip(table.sizes, table.seconds, strict=True)) for table in (a, b))
    pairs = [Pair(size, seconds, seconds_b[size], True) for size, seconds in seconds_a.items() if size in seconds_b]
    only_a, only_b = [], []
    for size, other in _looked_up(seconds_a, seconds_b, b):
        if other is None:
            only_a.append(size)
        else:
            pairs.append(Pair(size, seconds_a[size], other, False))
    for size, other in _looked_up(seconds_b, seconds_a, a):
        if other is None:
            only_b.append(size)
        else:
            pairs.append(Pair(size, other, seconds_b[size], False))
    pairs.sort(key=lambda pair: pair.size)
    return TableComparison(a.op, a.device, a.shape, a.dtype, a.axes, tuple(pairs), tuple(only_a), tuple(only_b),
                           tuple(_crossings(a.axes, pairs)))


def _looked_up(own: dict[Size, float], others: dict[Size, float], other: MeasuredTable) -> Iterator[tuple[Size, float | None]]:
    """Yield (size, seconds of the other table) of sizes that only one has; None where it would extrapolate."""
    missing = [size for size in own if size not in others]
    fit = TableFit(other) if missing else None
    for size in missing:
        cost = fit.lookup(size) if fit else None
        yield size, cost.seconds if cost and cost.source != "extrapolated" else None


def _crossings(axes: tuple[str, ...], pairs: list[Pair]) -> Iterator[Crossing]:
    """Yield where the sign of the difference changes along an axis; sizes where both are equal belong to neither side."""
    for place, axis in enumerate(axes):
        lines: dict[Size, list[Pair]] = defaultdict(list)
        for pair in pairs:
            if pair.seconds_a != pair.seconds_b:
                lines[pair.size[:place] + pair.size[place + 1:]].append(pair)
        for line in lines.values():
            line.sort(key=lambda pair: pair.size[place])
            for low, high in pairwise(line):
                if (low.ratio > 1) != (high.ratio > 1):
                    yield _crossing(axis, place, low, high)


def _crossing(axis: str, place: int, low: Pair, high: Pair) -> Crossing:
    before, after = (abs(pair.seconds_b - pair.seconds_a) for pair in (low, high))
    x0, x1 = low.size[place], high.size[place]
    return Crossing(axis, low.size, x0, x1, x0 + (x1 - x0) * before / (before + after), "a" if low.ratio > 1 else "b")
