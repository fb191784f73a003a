"""The accesses of steps from the routing of their tokens, compiled."""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.kernels.offload_options import COMPILED, INLINED


@numba.njit(**INLINED)
def order(experts: np.ndarray, first: int, last: int, count: np.ndarray, held: np.ndarray) -> None:
    """Let the distinct experts of an access rise: each goes where the number of lower ones says, or all are looked at."""
    if last - first > len(held) or last - first > len(count) // 4:
        place = first
        for expert in range(len(count)):
            if count[expert] > 0:
                experts[place] = expert
                place += 1
        return
    for place in range(first, last):
        held[place - first] = experts[place]
    for place in range(last - first):
        lower = 0
        for other in range(last - first):
            lower += held[other] < held[place]
        experts[first + lower] = held[place]


@numba.njit(**INLINED)
def collect(ids: np.ndarray, layer: int, first: int, last: int, count: np.ndarray, experts: np.ndarray, size: int) -> int:
    """Append the distinct experts of rows of one layer, and count their tokens; returns the new size."""
    for row in range(first, last):
        for expert in ids[row, layer]:
            if expert < 0:
                continue
            if count[expert] == 0:
                experts[size] = expert
                size += 1
            count[expert] += 1
    return size


@numba.njit(**INLINED)
def copy_row(ids: np.ndarray, layer: int, row: int, experts: np.ndarray, tokens: np.ndarray, size: int) -> int:
    """Append the experts of one row of one layer, rising (a trace names none twice); returns the new size."""
    here, pads = ids[row, layer], 0
    for expert in here:
        pads += expert < 0
    for place in range(len(here)):
        expert, lower = here[place], 0
        for other in range(len(here)):
            lower += here[other] < expert
        if expert >= 0:
            experts[size + lower - pads] = expert
    for place in range(size, size + len(here) - pads):
        tokens[place] = 1
    return size + len(here) - pads


@numba.njit("i8(i2[:, :, ::1], i8[::1], i8[::1], i2[::1], i4[::1], i4[::1], i2[::1])", **COMPILED)
def fill_stream(ids: np.ndarray, rows: np.ndarray, offsets: np.ndarray, experts: np.ndarray, tokens: np.ndarray,
                count: np.ndarray, held: np.ndarray) -> int:
    """Write the accesses of some steps; return how many expert uses they have.

    Args:
        ids: int16[row, layer, k], -1 where padded; step i holds ``ids[rows[i]:rows[i + 1]]``.
        rows: int64[step + 1].
        offsets: int64[step * layer + 1]; experts: int16[...], rising in an access; tokens: int32[...] of each.
        count: int32[expert] of zeros; held: int16[...] to sort in, accesses of more experts are sorted otherwise.
    """
    size, access = 0, 0
    offsets[0] = 0
    for step in range(len(rows) - 1):
        for layer in range(ids.shape[1]):
            first = size
            if rows[step + 1] - rows[step] == 1 and ids.shape[2] <= len(held):
                size = copy_row(ids, layer, rows[step], experts, tokens, size)
            else:
                size = collect(ids, layer, rows[step], rows[step + 1], count, experts, size)
                order(experts, first, size, count, held)
                for place in range(first, size):
                    tokens[place] = count[experts[place]]
                    count[experts[place]] = 0
            access += 1
            offsets[access] = size
    return size
