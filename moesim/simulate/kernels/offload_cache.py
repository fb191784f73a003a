"""The slots of the compiled offload engine: ranks, free slots and victims, as `ExpertCache` with the built-in policies.

A rank is ``worth << key_bits | address of the key``: ranks differ, equal worths go by the keys, and the lowest rank
names its key. RANKS holds the rank of the expert in each slot; slots that are free or hold an expert that may not leave
now are `PROTECTED`, and the victim is the least of a pool's ranks.
"""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.compiled_offload_layout import (
    BELADY_BYPASS,
    BOUNDS,
    FREE_SLOTS,
    HORIZON,
    K_RANK,
    K_SLOT,
    K_USES,
    KEY_BITS,
    KEY_CELLS,
    KEYS,
    LFU,
    LFU_RESIDENT,
    LRU,
    NEVER,
    NUM_FREE,
    POLICY,
    POOL_SLOTS,
    PROTECTED,
    RANKS,
    SHARED,
    STATIC,
    USE_END,
)
from moesim.simulate.kernels.offload_options import COMPILED, INLINED


@numba.njit("void(i8[::1], i8, i8)", **COMPILED)
def push_free(m: np.ndarray, pool: int, slot: int) -> None:
    """Add a slot to a pool's heap of free slots."""
    first, place = m[FREE_SLOTS] + pool * m[POOL_SLOTS], m[m[NUM_FREE] + pool]
    m[m[NUM_FREE] + pool] = place + 1
    while place > 0:
        parent = (place - 1) >> 1
        if m[first + parent] <= slot:
            break
        m[first + place] = m[first + parent]
        place = parent
    m[first + place] = slot


@numba.njit("i8(i8[::1], i8)", **COMPILED)
def pop_free(m: np.ndarray, pool: int) -> int:
    """Take the lowest slot of a pool's heap."""
    first, size = m[FREE_SLOTS] + pool * m[POOL_SLOTS], m[m[NUM_FREE] + pool] - 1
    slot, last, place = m[first], m[first + size], 0
    m[m[NUM_FREE] + pool] = size
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and m[first + child + 1] < m[first + child]:
            child += 1
        if last <= m[first + child]:
            break
        m[first + place] = m[first + child]
        place = child
    m[first + place] = last
    return slot


@numba.njit("i8(i8[::1], i8, i8)", **COMPILED)
def lowest(m: np.ndarray, first: int, last: int) -> int:
    """Return the lowest rank of a pool."""
    pool, best = m[first:last], PROTECTED
    for place in range(len(pool)):  # of a slice, since such a loop is vectorised
        best = min(best, pool[place])
    return best


@numba.njit("i8(i8[::1], i8, i8)", **COMPILED)
def next_use_worth(m: np.ndarray, k: int, now: int) -> int:
    """Return Belady's worth: less the later a key's next use after access `now`; never: least, then by `now`."""
    place, end, bound = m[k + K_USES], m[m[USE_END] + (k - m[KEYS]) // KEY_CELLS], m[m[BOUNDS] + now + 1]
    while place < end and m[place] < bound:
        place += 1
    m[k + K_USES] = place
    return -1 - m[place] if place < end else now + 1 - m[NEVER]


@numba.njit(**INLINED)
def worth(m: np.ndarray, k: int, now: int) -> int:
    """Return what a key used or inserted by access `now` is worth, in the order of the policy's own `worth`."""
    if m[POLICY] == LRU or m[POLICY] == STATIC:
        return now + 1
    if m[POLICY] == LFU or m[POLICY] == LFU_RESIDENT:
        return m[k + K_USES] * m[HORIZON] + now + 1
    return next_use_worth(m, k, now)


@numba.njit(**INLINED)
def touch(m: np.ndarray, k: int, now: int) -> None:
    """Note a use of a key, resident or not."""
    if m[POLICY] == LFU or m[POLICY] == LFU_RESIDENT:
        m[k + K_USES] += 1
    m[k + K_RANK] = (worth(m, k, now) << m[KEY_BITS]) + k


@numba.njit(**INLINED)
def protect(m: np.ndarray, k: int) -> None:
    """Keep a resident key out of the choice of victims."""
    if m[k + K_SLOT] >= 0:
        m[m[RANKS] + m[k + K_SLOT]] = PROTECTED


@numba.njit(**INLINED)
def expose(m: np.ndarray, k: int) -> None:
    """Let a resident key compete by its rank."""
    if m[k + K_SLOT] >= 0:
        m[m[RANKS] + m[k + K_SLOT]] = m[k + K_RANK]


@numba.njit(**INLINED)
def leave(m: np.ndarray, k: int) -> int:
    """Take a key out of its slot, and return the slot."""
    slot = m[k + K_SLOT]
    m[k + K_SLOT] = -1
    if m[POLICY] == LFU_RESIDENT:
        m[k + K_USES] = 0
    return slot


@numba.njit(**INLINED)
def pool_of(m: np.ndarray, layer: int) -> int:
    """Return the pool that an expert of a layer enters."""
    return 0 if m[SHARED] else layer


@numba.njit("void(i8[::1], i8, i8)", **COMPILED)
def release(m: np.ndarray, layer: int, k: int) -> None:
    """Drop a resident key and free its slot."""
    slot = leave(m, k)
    m[m[RANKS] + slot] = PROTECTED
    push_free(m, pool_of(m, layer), slot)


@numba.njit(**INLINED)
def choose(m: np.ndarray, layer: int, k: int, now: int) -> int:
    """Return whom key `k` would replace: -1 for nobody (a slot is free), -2 if it gets no slot."""
    if m[POLICY] == STATIC and m[k + K_USES] == 0:
        return -2
    pool = pool_of(m, layer)
    if m[m[NUM_FREE] + pool] > 0:
        return -1
    first = m[RANKS] + pool * m[POOL_SLOTS]
    least = lowest(m, first, first + m[POOL_SLOTS])
    if least == PROTECTED:
        return -2
    if m[POLICY] == BELADY_BYPASS and worth(m, k, now) <= (least >> m[KEY_BITS]):
        return -2
    return least & ((1 << m[KEY_BITS]) - 1)


@numba.njit(**INLINED)
def enter(m: np.ndarray, layer: int, k: int, victim: int, now: int) -> int:
    """Give key `k` the slot of `victim`, or the lowest free one; it stays protected until it is exposed."""
    slot = leave(m, victim) if victim >= 0 else pop_free(m, pool_of(m, layer))
    m[k + K_SLOT] = slot
    m[k + K_RANK] = (worth(m, k, now) << m[KEY_BITS]) + k
    m[m[RANKS] + slot] = PROTECTED
    return slot
