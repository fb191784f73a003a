"""Replay of the ranked policies: all options, slots or bytes, a pool per layer or one for all."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from moesim.cache.compiled_layout import (
    ABSENT,
    ADMITTED,
    BELADY_BYPASS,
    BLOCK_BITS,
    BYPASSES,
    CHOSEN,
    CHOSEN_RANK,
    COLD,
    COLD_IN_FREE,
    COUNT,
    EVICTIONS,
    FREE,
    IN_USE,
    MISSED,
    MISSES,
    RANK,
    SEEN,
    SIZE,
)
from moesim.cache.kernels.ranks import give_rank, lowest_resident
from moesim.cache.kernels.worth import note_eviction, worth


class Rules(NamedTuple):
    """The options of a run.

    Attributes:
        policy: its code.
        protect: whether the experts of the access in progress stay until its end (they rank IN_USE meanwhile).
        one_by_one: whether each expert is tested and brought in before the next one is tested.
        looks_ahead: whether `upcoming` (int32[use]) says when each expert is used next; else it is empty.
        shared: whether one pool serves all layers.
        row_width, pool_blocks: indices of a layer, and blocks of 64 indices of a pool.
    """

    policy: int
    protect: bool
    one_by_one: bool
    looks_ahead: bool
    shared: bool
    row_width: int
    pool_blocks: int


@numba.njit(cache=True, nogil=True)
def _enter(state: np.ndarray, policy: int, pool: int, blocks: int, i: int, own: int) -> int:
    """Make room for the missed expert at index `i`, worth `own`; return how many left, -1 if it stays outside.

    Nobody leaves unless enough may: what was chosen in vain gets its rank back.
    """
    short, num_chosen, fits = state[SIZE, i] - state[FREE, pool], 0, state[ADMITTED, i] != 0
    while fits and short > 0:
        victim = lowest_resident(state, pool * blocks, blocks)
        if victim >= 0 and (policy != BELADY_BYPASS or own > state[RANK, victim] >> BLOCK_BITS):
            state[CHOSEN, num_chosen] = victim
            state[CHOSEN_RANK, num_chosen] = state[RANK, victim]
            state[RANK, victim] = ABSENT
            short -= state[SIZE, victim]
            num_chosen += 1
        else:
            fits = False
    if not fits:
        for j in range(num_chosen):
            give_rank(state, state[CHOSEN, j], state[CHOSEN_RANK, j] >> BLOCK_BITS)
        return -1
    state[FREE, pool] = -short
    for j in range(num_chosen):
        note_eviction(policy, state, state[CHOSEN, j])
    return num_chosen


@numba.njit(cache=True, nogil=True, inline="always")
def _count_load(state: np.ndarray, tally: np.ndarray, layer: int, i: int, evicted: int) -> None:
    """Count what became of a missed expert: `evicted` others left for it, or it got no room (-1)."""
    new = state[SEEN, i] == 0
    tally[COLD, layer] += new
    if evicted < 0:
        tally[BYPASSES, layer] += 1
    else:
        tally[EVICTIONS, layer] += evicted
        tally[COLD_IN_FREE, layer] += new and evicted == 0


@numba.njit(cache=True, nogil=True)
def _touch(experts: np.ndarray, upcoming: np.ndarray, rules: Rules, state: np.ndarray, base: int, start: int, stop: int,
           now: int) -> int:
    """Note the uses ``start ... stop - 1``, list the missed ones in MISSED and return their number."""
    num_missed = 0
    for use in range(start, stop):
        i = base + experts[use]
        before = state[RANK, i]
        state[MISSED, num_missed] = use
        num_missed += before >= ABSENT
        state[COUNT, i] += 1
        if rules.protect:
            state[RANK, i] = max(before, IN_USE)
        elif before < ABSENT:
            later = int(upcoming[use]) if rules.looks_ahead else -1
            give_rank(state, i, worth(rules.policy, state[COUNT, i], later, now))
    return num_missed


@numba.njit(cache=True, nogil=True)
def _load(experts: np.ndarray, upcoming: np.ndarray, rules: Rules, state: np.ndarray, tally: np.ndarray, layer: int,
          num_missed: int, now: int) -> None:
    """Bring in the experts listed in MISSED, as far as there is room for them."""
    base, pool = layer * rules.row_width, 0 if rules.shared else layer
    for j in range(num_missed):
        use = state[MISSED, j]
        i = base + experts[use]
        later = int(upcoming[use]) if rules.looks_ahead else -1
        own = worth(rules.policy, state[COUNT, i], later, now)
        evicted = _enter(state, rules.policy, pool, rules.pool_blocks, i, own)
        if evicted >= 0:
            give_rank(state, i, own)
            state[RANK, i] = IN_USE if rules.protect else state[RANK, i]
        _count_load(state, tally, layer, i, evicted)


@numba.njit(cache=True, nogil=True)
def _settle(experts: np.ndarray, upcoming: np.ndarray, rules: Rules, state: np.ndarray, base: int, start: int, stop: int,
            now: int) -> None:
    """End an access: its experts were seen, and those that were protected get their ranks."""
    for use in range(start, stop):
        i = base + experts[use]
        state[SEEN, i] = 1
        if state[RANK, i] == IN_USE:
            later = int(upcoming[use]) if rules.looks_ahead else -1
            give_rank(state, i, worth(rules.policy, state[COUNT, i], later, now))


@numba.njit(cache=True, nogil=True)
def replay(layers: np.ndarray, offsets: np.ndarray, experts: np.ndarray, upcoming: np.ndarray, rules: Rules,
           state: np.ndarray, tally: np.ndarray) -> None:
    """Run the stream; add to `tally`, int64[row, layer]."""
    for now in range(len(layers)):
        layer = int(layers[now])
        base, start, end = layer * rules.row_width, offsets[now], offsets[now + 1]
        while start < end:
            stop = start + 1 if rules.one_by_one else end
            num_missed = _touch(experts, upcoming, rules, state, base, start, stop, now)
            tally[MISSES, layer] += num_missed
            if num_missed > 0:
                _load(experts, upcoming, rules, state, tally, layer, num_missed, now)
            _settle(experts, upcoming, rules, state, base, start, stop, now)
            start = stop
