"""The offline optimum of misses: stays from use to use, of which as many are kept as there are slots."""

from __future__ import annotations

import numba
import numpy as np

from moesim.cache.compiled_layout import ABSENT, FREE, RANK, SOON
from moesim.cache.kernels.ranks import give_rank, lowest_resident


@numba.njit(cache=True, nogil=True)
def fewest_misses(layers: np.ndarray, offsets: np.ndarray, experts: np.ndarray, upcoming: np.ndarray, shared: bool,
                  row_width: int, pool_blocks: int, state: np.ndarray, misses: np.ndarray) -> None:
    """Add to misses, int64[access]. `upcoming` is int32[use], -1: no next use; a rank is worth SOON minus the next use.

    After each access, every expert that is used again is kept; while they are too many, the farthest is dropped.
    """
    for access in range(len(layers)):
        layer = int(layers[access])
        base, pool = layer * row_width, 0 if shared else layer
        for use in range(offsets[access], offsets[access + 1]):
            i = base + experts[use]
            kept = state[RANK, i] < ABSENT
            misses[access] += not kept
            state[FREE, pool] += kept
            state[RANK, i] = ABSENT
        for use in range(offsets[access], offsets[access + 1]):
            if upcoming[use] >= 0:
                give_rank(state, base + experts[use], SOON - int(upcoming[use]))
                state[FREE, pool] -= 1
        while state[FREE, pool] < 0:
            state[RANK, lowest_resident(state, pool * pool_blocks, pool_blocks)] = ABSENT
            state[FREE, pool] += 1
