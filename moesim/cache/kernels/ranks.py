"""Ranks of residents, and the search for the lowest; see `moesim.cache.compiled_layout` for the state."""

from __future__ import annotations

import numba
import numpy as np

from moesim.cache.compiled_layout import ABSENT, BLOCK, BLOCK_BITS, IN_USE, LOW, RANK


@numba.njit(cache=True, nogil=True)
def _block_minimum(state: np.ndarray, start: int) -> int:
    """Return the lowest of the 64 ranks from `start` on: some vector instructions."""
    lowest = ABSENT
    for i in range(BLOCK):
        lowest = min(lowest, state[RANK, start + i])
    return lowest


@numba.njit(cache=True, nogil=True)
def lowest_resident(state: np.ndarray, first: int, blocks: int) -> int:
    """Return the index of the lowest rank in blocks ``first ... first + blocks - 1``, -1 if nobody there may leave.

    LOW is corrected for the blocks that come up, so that a use which raises a rank need not correct it. Blocks
    compare by worth, the first one winning, because a rank holds its key only within the block.
    """
    block, found = first, ABSENT
    if blocks == 1:
        found = _block_minimum(state, first << BLOCK_BITS)
    while blocks > 1:
        block = first
        for other in range(first + 1, first + blocks):
            if state[LOW, other] >> BLOCK_BITS < state[LOW, block] >> BLOCK_BITS:
                block = other
        found = _block_minimum(state, block << BLOCK_BITS)
        if found == state[LOW, block]:
            break
        state[LOW, block] = found
    return (block << BLOCK_BITS) | (found & (BLOCK - 1)) if found < IN_USE else -1


@numba.njit(cache=True, nogil=True)
def give_rank(state: np.ndarray, i: int, worth: int) -> None:
    """Rank the resident at index `i` anew."""
    rank = (worth << BLOCK_BITS) | (i & (BLOCK - 1))
    state[RANK, i] = rank
    state[LOW, i >> BLOCK_BITS] = min(state[LOW, i >> BLOCK_BITS], rank)
