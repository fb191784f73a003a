"""Tables out of runs: medians, spread, and what the fit is worth on sizes that it was not given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moesim.hardware.profile import MeasuredTable, TableKey
from moesim.hardware.tables import TableFit

MIN_FOR_RESIDUAL = 4


def table_of_runs(key: TableKey, runs: Mapping[tuple[float, ...], Sequence[float]]) -> MeasuredTable:
    """Return the medians of runs (seconds by size), their interquartile range over the median, and how many they are."""
    sizes = sorted(runs)
    quartiles = [np.percentile(runs[size], [25, 50, 75]) for size in sizes]
    seconds = tuple(float(middle) for _, middle, _ in quartiles)
    spread = tuple(float((high - low) / middle) for low, middle, high in quartiles)
    samples = tuple(len(runs[size]) for size in sizes)
    # one run has no spread, which is not a spread of zero
    return MeasuredTable(key.op, key.device, key.shape, key.dtype, key.axes, tuple(sizes), seconds,
                         spread if max(samples) > 1 else (), samples)


def with_residuals(table: MeasuredTable) -> MeasuredTable:
    """Fit on every second size, look up the others, and note the median and largest relative error.

    The first and last sizes are kept in the fit, so that nothing is extrapolated. Tables of fewer than four sizes
    stay without a residual.
    """
    count = len(table.sizes)
    held = [place for place in range(1, count - 1) if place % 2]
    if count < MIN_FOR_RESIDUAL:
        return table
    kept = [place for place in range(count) if place not in held]
    fit = TableFit(
        dataclasses.replace(
            table,
            sizes=tuple(table.sizes[p] for p in kept),
            seconds=tuple(table.seconds[p] for p in kept),
            spread=(),
            samples=(),
        )
    )
    errors = [abs(fit.lookup(table.sizes[p]).seconds - table.seconds[p]) / table.seconds[p] for p in held]
    return dataclasses.replace(table, residual=float(np.median(errors)), residual_max=float(np.max(errors)))
