"""When each expert is used next: one pass from the end of the stream."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def next_uses(layers: np.ndarray, offsets: np.ndarray, experts: np.ndarray, row: int, first: np.ndarray,
              upcoming: np.ndarray) -> None:
    """Fill upcoming int32[use] (position of the next use of the same expert, -1: none) and first int32[index] likewise."""
    first[:] = -1
    for access in range(len(layers) - 1, -1, -1):
        base = np.int64(layers[access]) * row
        for use in range(offsets[access], offsets[access + 1]):
            i = base + experts[use]
            upcoming[use] = first[i]
            first[i] = use
