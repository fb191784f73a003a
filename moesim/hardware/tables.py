"""Seconds out of a measured table: exact at what was measured, never falling as a size grows.

Every table is first made monotone by the L-infinity isotonic regression: the mean of the largest time among
the sizes below and the smallest among those above (Stout, "Isotonic regression via partitioning",
Algorithmica 66, 2013, "Basic"); a table that never falls is unchanged by it. Then:

- one axis: linear between neighbours; below the first size its time; above the last the slope of the last
  segment;
- several axes (points need not form a grid): a sum of one rising piecewise linear function per axis, fitted
  with non-negative least squares on the relative error, and held between the largest time measured at sizes
  not larger and the smallest at sizes not smaller. Both limits and the fit rise with every axis, so the
  result does; at a measured size both limits are its time, so it is exact there. Beyond the measured box: the
  nearest point of the box, plus the slopes of a non-negative linear fit on the absolute error (large sizes
  decide); an axis with a single measured size has no slope.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.hardware.profile import MeasuredTable
from moesim.hardware.work import Cost

Floats = npt.NDArray[np.float64]


class TableFit:
    """A table made ready for look-ups; build it once, it does not change."""

    def __init__(self, table: MeasuredTable) -> None:
        self.table = table
        self.sizes: Floats = np.asarray(table.sizes, dtype=np.float64)
        # below[i, j]: size j is not larger than size i on any axis
        below = np.all(self.sizes[None, :, :] <= self.sizes[:, None, :], axis=2)
        self.seconds = _isotonic(np.asarray(table.seconds, dtype=np.float64), np.asarray(below))
        self._single = len(table.axes) == 1
        self._exact = dict(zip(map(tuple, self.sizes.tolist()), self.seconds.tolist(), strict=True))
        if self._single:
            self._knots, self._values = self.sizes[:, 0].tolist(), self.seconds.tolist()
        else:
            self._knots_by_axis = [np.unique(column) for column in self.sizes.T]
            self._weights = _relative_fit(self._ramps(self.sizes), self.seconds)
            self._slopes = _absolute_slopes(self.sizes, self.seconds)

    def lookup(self, point: Sequence[float]) -> Cost:
        """Return the seconds at `point` (one number per axis): measured, interpolated or extrapolated.

        Raises:
            InputError: the wrong number of sizes, or one that is negative or not finite.
        """
        key = tuple(float(value) for value in point)
        if len(key) != len(self.table.axes) or not all(0 <= value < float("inf") for value in key):
            axes = ", ".join(self.table.axes)
            raise InputError(f"table {self.table.op!r} needs {axes}, finite and not negative; got {key}")
        if key in self._exact:
            return Cost(self._exact[key], "measured")
        return self._line(key[0]) if self._single else self._surface(np.array(key))

    def _line(self, size: float) -> Cost:
        knots, values = self._knots, self._values
        if size < knots[0]:
            return Cost(values[0], "extrapolated")
        if size > knots[-1]:
            slope = (values[-1] - values[-2]) / (knots[-1] - knots[-2]) if len(knots) > 1 else 0.0
            return Cost(values[-1] + slope * (size - knots[-1]), "extrapolated")
        above = bisect_left(knots, size)
        part = (size - knots[above - 1]) / (knots[above] - knots[above - 1])
        return Cost(values[above - 1] + part * (values[above] - values[above - 1]), "interpolated")

    def _surface(self, point: Floats) -> Cost:
        inside = np.clip(point, self.sizes.min(axis=0), self.sizes.max(axis=0))
        fit = float((self._ramps(inside[None, :]) @ self._weights)[0])
        low = self.seconds[(self.sizes <= inside).all(axis=1)].max(initial=self.seconds.min())
        high = self.seconds[(self.sizes >= inside).all(axis=1)].min(initial=np.inf)
        beyond = float(self._slopes @ np.maximum(point - inside, 0.0))
        source = "interpolated" if (point == inside).all() else "extrapolated"
        return Cost(min(max(fit, float(low)), float(high)) + beyond, source)

    def _ramps(self, points: Floats) -> Floats:
        """Return float64[point, 1 + segments]: 1, then how far each axis has come through each segment."""
        columns = [np.ones((len(points), 1))]
        for axis, knots in enumerate(self._knots_by_axis):
            steps = np.diff(knots)
            columns.append(np.clip(points[:, axis, None] - knots[:-1], 0.0, steps) / steps)
        return np.concatenate(columns, axis=1)


def lookup(table: MeasuredTable, point: Sequence[float]) -> Cost:
    """Return one look-up; for many build a `TableFit` once. Raises InputError as `TableFit.lookup`."""
    return TableFit(table).lookup(point)


def _isotonic(seconds: Floats, below: npt.NDArray[np.bool_]) -> Floats:
    highest = np.where(below, seconds[None, :], -np.inf).max(axis=1)
    lowest = np.where(below.T, seconds[None, :], np.inf).min(axis=1)
    return np.where(highest == lowest, seconds, (highest + lowest) / 2)


def _relative_fit(ramps: Floats, seconds: Floats) -> Floats:
    from scipy.optimize import nnls

    return np.asarray(nnls(ramps / seconds[:, None], np.ones(len(seconds)))[0])


def _absolute_slopes(sizes: Floats, seconds: Floats) -> Floats:
    """Return one non-negative slope per axis; columns are scaled to 1 so that the fit is well conditioned."""
    from scipy.optimize import nnls

    scale = np.maximum(sizes.max(axis=0), 1.0)
    varies = np.ptp(sizes, axis=0) > 0
    columns = np.concatenate([np.ones((len(sizes), 1)), np.where(varies, sizes / scale, 0.0)], axis=1)
    return np.asarray(nnls(columns, seconds / seconds.max())[0][1:]) * seconds.max() / scale
