"""What each ranked policy has for itself: the worth of an expert, and what its eviction changes.

The integers equal those of `RankedPolicy.worth` up to an order-preserving map. A new ranked policy is a branch here.
"""

from __future__ import annotations

import numba
import numpy as np

from moesim.cache.compiled_layout import ACCESS_BITS, COUNT, LFU, LFU_RESIDENT, SOON


@numba.njit(cache=True, nogil=True, inline="always")
def worth(policy: int, count: int, later: int, now: int) -> int:
    """Return the worth of an expert after access `now`: it has `count` uses, the next at position `later` (-1: none)."""
    value = now
    if policy in (LFU, LFU_RESIDENT):
        value = (count << ACCESS_BITS) | now
    elif later >= 0:
        value = SOON - later
    return value


@numba.njit(cache=True, nogil=True, inline="always")
def note_eviction(policy: int, state: np.ndarray, victim: int) -> None:
    """Note that the expert at index `victim` left."""
    if policy == LFU_RESIDENT:
        state[COUNT, victim] = 0
