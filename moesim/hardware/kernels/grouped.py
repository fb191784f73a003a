"""Many costs in one pass: the roofline of grouped kernels, and whole nanoseconds; bit for bit as for one cost.

Compiled because a step of a large model has thousands of them: some twenty passes of numpy otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from moesim.units import NS_PER_S

MAX_NS = 2.0**63


class GroupedRates(NamedTuple):
    """A device and a shape of work: seconds to start, flops per row and per second, bytes per group, per row and
    per second, rows per tile."""

    overhead_s: float
    flops_per_row: float
    flops_per_s: float
    bytes_per_group: float
    bytes_per_row: float
    bytes_per_s: float
    tile_rows: int


@numba.njit(cache=True, nogil=True)
def impossible(tokens: np.ndarray, groups: np.ndarray, largest: np.ndarray) -> int:
    """Return the place of the first work int64[n] whose tokens cannot be in that many groups, else -1."""
    for place in range(len(tokens)):
        rows, count, most = tokens[place], groups[place], largest[place]
        if rows and not (1 <= count <= rows and rows <= count * most and most <= rows - count + 1):
            return place
    return -1


@numba.njit(cache=True, nogil=True)
def grouped_seconds(tokens: np.ndarray, groups: np.ndarray, largest: np.ndarray, rates: GroupedRates,
                    seconds: np.ndarray) -> None:
    """Fill ``seconds`` float64[n] from int64[n] sizes (0 where there are no tokens).

    Both forms of `hardware.cost.padded_rows` are computed and one is kept: without branches, the loop is a vector's.
    """
    tile, padding = float(rates.tile_rows), (rates.tile_rows - 1) / 2
    for place in range(len(tokens)):
        rows, others, most = tokens[place], groups[place] - 1, largest[place]
        alone = np.ceil(rows / tile) * tile
        big, rest = most + padding, rows - most + others * padding
        whole = others * tile
        several = (big if big > tile else tile) + (rest if rest > whole else whole)
        flops = (alone if others == 0 else several) * rates.flops_per_row / rates.flops_per_s
        num_bytes = (groups[place] * rates.bytes_per_group + rows * rates.bytes_per_row) / rates.bytes_per_s
        busy = rates.overhead_s + (flops if flops > num_bytes else num_bytes)
        seconds[place] = busy if rows else 0.0


@numba.njit(cache=True, nogil=True)
def task_ns(seconds: np.ndarray, overhead_s: float, is_task: np.ndarray, ns: np.ndarray) -> int:
    """Fill ``ns`` int64[n]: rounded half to even, at least 1, 0 where ``is_task`` bool[n] is False.

    Returns the place of the first duration that is negative, not finite, or beyond 64 bits, else -1.
    """
    for place in range(len(seconds)):
        ns[place] = 0
        if is_task[place]:
            rounded = np.rint((seconds[place] + overhead_s) * NS_PER_S)
            if not (0.0 <= rounded < MAX_NS):
                return place
            ns[place] = max(np.int64(rounded), 1)
    return -1
