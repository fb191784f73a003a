"""Replay of the scanned policies: slots, a pool per layer or one for all; a victim is found by a scan of its pool."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from moesim.cache.compiled_layout import BYPASSES, COLD, COLD_IN_FREE, EVICTIONS, MISSES
from moesim.cache.scanned_layout import (
    COUNT,
    EDGEMOE,
    EDGEMOE_PRINTED,
    ENTRY,
    FIFO,
    FLD,
    HOBBIT,
    LAST,
    LFU_FIFO,
    LFUDA,
    LHU,
    MOE_INFINITY,
    MRS,
    PRIORITY,
    RESIDENT,
    SCH,
    SEEN,
    USED_BY,
    WINDOW,
)


class Rules(NamedTuple):
    """The options of a run; `epsilon` and `averaging` are those of MoE-Infinity and MRS."""

    policy: int
    protect: bool
    one_by_one: bool
    shared: bool
    num_layers: int
    num_experts: int
    window: int
    epsilon: float
    averaging: float


class State(NamedTuple):
    """The state of a run.

    Attributes:
        rows: int64[row, key], see `moesim.cache.scanned_layout`; recent: float64[key], the average of MRS.
        tokens, uses: int64[layer], accesses and uses so far.
        pools: int64[pool, slot], the residents in any order; sizes, ages: int64[pool], how many, and LFUDA's age.
        missed: int64[expert], scratch; entries: int64[1], entries so far.
    """

    rows: np.ndarray
    recent: np.ndarray
    tokens: np.ndarray
    uses: np.ndarray
    pools: np.ndarray
    sizes: np.ndarray
    ages: np.ndarray
    missed: np.ndarray
    entries: np.ndarray


class Accesses(NamedTuple):
    """The stream, int32[access], int64[access + 1], int16[use], and for each access, int64, the one that enters its window (-1)."""

    layers: np.ndarray
    offsets: np.ndarray
    experts: np.ndarray
    entering: np.ndarray


@numba.njit(cache=True, nogil=True, inline="always")
def _layer_score(rules: Rules, state: State, key: int, layer: int) -> float:
    """Return the scores in which the layer in progress has a part; the operations are those of the readable policies."""
    count, ahead = state.rows[COUNT, key], (key // rules.num_experts - layer) % rules.num_layers
    if rules.policy == FLD:
        return -float(ahead)
    if rules.policy == HOBBIT:
        records = 0.25 * state.rows[USED_BY, key] + 0.25 * count + 0.25 * count
        return records * rules.num_layers + max(state.tokens[layer], 1) * (0.25 * (rules.num_layers - ahead))
    distance = ahead if rules.policy == EDGEMOE else (rules.num_layers - ahead) % rules.num_layers
    return count / (distance if distance else rules.num_layers)


@numba.njit(cache=True, nogil=True, inline="always")
def _score(rules: Rules, state: State, key: int, layer: int) -> float:
    """Return what the resident `key` is worth keeping."""
    policy, rows = rules.policy, state.rows
    if policy in (FLD, HOBBIT, EDGEMOE, EDGEMOE_PRINTED):
        return _layer_score(rules, state, key, layer)
    if policy == MRS:
        return state.recent[key]
    if policy == MOE_INFINITY:
        own = key // rules.num_experts
        return (rows[COUNT, key] / max(state.uses[own], 1) + rules.epsilon) * (1 - own / rules.num_layers)
    row = COUNT if policy in (LFU_FIFO, LHU) else (ENTRY if policy == FIFO else (PRIORITY if policy == LFUDA else WINDOW))
    return float(rows[row, key])


@numba.njit(cache=True, nogil=True)
def _victim_place(rules: Rules, state: State, pool: int, layer: int, now: int) -> int:
    """Return the place in its pool of the lowest (score, tie, key) that is not protected; -1: there is none.

    Where the rules protect, whom access `now` has used or brought in stays: all those are experts of that access.
    """
    found, best, best_tie, best_key, rows = -1, 0.0, 0, 0, state.rows
    tie_row = ENTRY if rules.policy == LFU_FIFO else LAST
    for place in range(state.sizes[pool]):
        key = state.pools[pool, place]
        if rules.protect and rows[LAST, key] == now:
            continue
        score, tie = _score(rules, state, key, layer), rows[tie_row, key]
        if found < 0 or score < best or (score == best and (tie < best_tie or (tie == best_tie and key < best_key))):
            found, best, best_tie, best_key = place, score, tie, key
    return found


@numba.njit(cache=True, nogil=True, inline="always")
def _begin(rules: Rules, state: State, layer: int) -> None:
    """Begin an access that has experts: count the token, let averages decay."""
    state.tokens[layer] += 1
    if rules.policy == MRS:
        first = layer * rules.num_experts
        state.recent[first: first + rules.num_experts] *= 1 - rules.averaging


@numba.njit(cache=True, nogil=True)
def _move_window(state: State, accesses: Accesses, now: int, base: int) -> None:
    """Take access `now` out of its layer's window, and the one that follows the window in."""
    for use in range(accesses.offsets[now], accesses.offsets[now + 1]):
        state.rows[WINDOW, base + accesses.experts[use]] -= 1
    other = accesses.entering[now]
    if other >= 0:
        for use in range(accesses.offsets[other], accesses.offsets[other + 1]):
            state.rows[WINDOW, base + accesses.experts[use]] += 1


@numba.njit(cache=True, nogil=True, inline="always")
def _touch(rules: Rules, state: State, key: int, pool: int, layer: int, now: int) -> None:
    """Note a use."""
    rows = state.rows
    rows[COUNT, key] += 1
    rows[LAST, key] = now
    rows[USED_BY, key] = state.tokens[layer]
    rows[PRIORITY, key] = rows[COUNT, key] + state.ages[pool]
    state.recent[key] += rules.averaging
    state.uses[layer] += 1


@numba.njit(cache=True, nogil=True)
def _enter(rules: Rules, state: State, key: int, pool: int, place: int, now: int) -> None:
    """Put `key` at a place of its pool, in place of whoever was there."""
    rows = state.rows
    if place < state.sizes[pool]:
        victim = state.pools[pool, place]
        rows[RESIDENT, victim] = 0
        if rules.policy == LFUDA:
            state.ages[pool] = rows[PRIORITY, victim]
        if rules.policy in (LFUDA, LFU_FIFO):
            rows[COUNT, victim] = 0
    state.sizes[pool] = max(state.sizes[pool], place + 1)
    state.pools[pool, place] = key
    state.entries[0] += 1
    rows[RESIDENT, key] = 1
    rows[ENTRY, key] = state.entries[0]
    rows[LAST, key] = now
    rows[USED_BY, key] = state.tokens[key // rules.num_experts]
    rows[PRIORITY, key] = rows[COUNT, key] + state.ages[pool]


@numba.njit(cache=True, nogil=True)
def _load(rules: Rules, state: State, tally: np.ndarray, key: int, pool: int, layer: int, now: int) -> None:
    """Bring in a missed expert, if there is room, and count what became of it."""
    new, free = state.rows[SEEN, key] == 0, state.sizes[pool] < state.pools.shape[1]
    place = state.sizes[pool] if free else _victim_place(rules, state, pool, layer, now)
    tally[COLD, layer] += new
    tally[COLD_IN_FREE, layer] += new and free
    tally[EVICTIONS, layer] += not free and place >= 0
    tally[BYPASSES, layer] += place < 0
    state.rows[SEEN, key] = 1
    if place >= 0:
        _enter(rules, state, key, pool, place, now)


@numba.njit(cache=True, nogil=True)
def replay_scanned(accesses: Accesses, rules: Rules, state: State, preloaded: np.ndarray, tally: np.ndarray) -> None:
    """Run the stream; add to `tally`, int64[row, layer]. `preloaded`, int64[...], are keys that have room."""
    for key in preloaded:
        pool = 0 if rules.shared else key // rules.num_experts
        _enter(rules, state, key, pool, state.sizes[pool], -1)
    for now in range(len(accesses.layers)):
        layer, start, end = int(accesses.layers[now]), accesses.offsets[now], accesses.offsets[now + 1]
        base, pool = layer * rules.num_experts, 0 if rules.shared else layer
        if start < end:
            _begin(rules, state, layer)
        if rules.policy == SCH:
            _move_window(state, accesses, now, base)
        while start < end:
            stop = start + 1 if rules.one_by_one else end
            num_missed = 0
            for use in range(start, stop):
                key = base + accesses.experts[use]
                _touch(rules, state, key, pool, layer, now)
                state.missed[num_missed] = key
                num_missed += state.rows[RESIDENT, key] == 0
                state.rows[SEEN, key] |= state.rows[RESIDENT, key]
            tally[MISSES, layer] += num_missed
            for j in range(num_missed):
                _load(rules, state, tally, state.missed[j], pool, layer, now)
            start = stop
