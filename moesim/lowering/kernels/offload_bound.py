"""Tables of the offload bounds: the least time of a layer by its absent experts, and convex floors of tables."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def convex_floor(table: np.ndarray, sizes: np.ndarray) -> None:
    """Lower each row of int64[access, width + 1], up to its size, to a convex one with whole steps.

    The steps of the greatest convex minorant are rounded down: they still rise, and no value is above the table's.
    """
    corners = np.empty(table.shape[1], np.int64)
    for access in range(len(table)):
        row, count = table[access], 0
        for place in range(sizes[access] + 1):
            while count > 1:
                one, two = corners[count - 2], corners[count - 1]
                if (row[two] - row[one]) * (place - two) < (row[place] - row[two]) * (two - one):
                    break
                count -= 1
            corners[count] = place
            count += 1
        value = row[0]
        for corner in range(count - 1):
            left, right = corners[corner], corners[corner + 1]
            step = (row[right] - row[left]) // (right - left)
            for place in range(left + 1, right + 1):
                value += step
                row[place] = value


@numba.njit(cache=True, nogil=True)
def by_absent(both: np.ndarray, device: np.ndarray, sizes: np.ndarray, alone: np.ndarray, load: int, rows: np.ndarray,
              found: np.ndarray) -> None:
    """Fill int64[access, m] with the least time of a layer with m absent experts, whatever the CPU computes of them.

    With q fetched and c on the CPU it is at least each of: the longer side, the wire's load, and the last arrival with
    the experts that can only then be computed (the latest q - k + 1 after the k-th; of all k the first or the last tells).
    """
    for access in range(len(both)):
        size = sizes[access]
        for absent in range(size + 1):
            least = both[access, 0]
            for on_cpu in range(size + 1):
                fetched = max(0, absent - on_cpu)
                time = max(both[access, on_cpu], fetched * load + on_cpu * rows[access])
                if fetched:
                    one = device[access, 1] - device[access, 0]
                    time = max(time, alone[fetched] + one, alone[1] + device[access, fetched] - device[access, 0])
                if on_cpu == 0 or time < least:
                    least = time
            found[access, absent] = least


@numba.njit(cache=True, nogil=True)
def by_fetched_and_left(both: np.ndarray, device: np.ndarray, sizes: np.ndarray, alone: np.ndarray, load: int,
                        rows: np.ndarray, far: int, found: np.ndarray) -> None:
    """Fill int64[access, q, u] with the least time of a layer that fetches q experts and leaves u to the CPU (`far`: more
    than it has); the floors of `by_absent`, the CPU computing u or more and none of the fetched.
    """
    for access in range(len(both)):
        size = sizes[access]
        for fetched in range(found.shape[1]):
            copied = 0
            if 0 < fetched <= size:
                one = device[access, 1] - device[access, 0]
                copied = max(alone[fetched] + one, alone[1] + device[access, fetched] - device[access, 0])
            least = far
            for on_cpu in range(found.shape[2] - 1, -1, -1):
                if fetched + on_cpu <= size:
                    time = max(both[access, on_cpu], fetched * load + on_cpu * rows[access])
                    least = min(least, max(time, copied))
                found[access, fetched, on_cpu] = least


@numba.njit(cache=True, nogil=True)
def under_planes(table: np.ndarray, far: int, fetch: np.ndarray, left: np.ndarray, where: np.ndarray) -> int:
    """Return the sum over accesses of the least of ``table[q, u] - fetch * q - left * u``; where int64[access, 2]: its (q, u)."""
    total = 0
    for access in range(len(table)):
        least = far
        for fetched in range(table.shape[1]):
            for on_cpu in range(table.shape[2]):
                if table[access, fetched, on_cpu] < far:
                    value = table[access, fetched, on_cpu] - fetch[access] * fetched - left[access] * on_cpu
                    if value < least:
                        least = value
                        where[access, 0], where[access, 1] = fetched, on_cpu
        total += least
    return total
