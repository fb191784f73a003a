"""One decision of the compiled offload engine: `OffloadProgram._moe_layer`, in its order, so that tasks get its ids.

At a decision the device and the CPU are idle, since every task of theirs is behind a layer's barrier; only copies in
the background are under way. Both serve their queues in order of ready time, so the end of a task is known as
soon as it is ready, and only the wires are followed from instant to instant.
"""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.compiled_offload_layout import (
    ACCESS,
    ACCESSES,
    ADMIT,
    ADMITS,
    ADMITTING,
    AHEAD,
    AHEAD_LIST,
    ASKED,
    CANCELLED_PREFETCHES,
    COMPUTE_FREE,
    COUNTS,
    CPU_MISSES,
    EMIT,
    EXPERT_WORK,
    FASTER_MISSES,
    HAS_PREFETCH,
    HAS_SHARED_EXPERT,
    HITS,
    INSTANT,
    K_FETCH,
    K_RANK,
    K_SLOT,
    KEY_BITS,
    KEY_CELLS,
    KEYS,
    LATE,
    LATE_HITS,
    LATE_PREFETCHES,
    LOAD,
    LOADS,
    LRU,
    MISS,
    MISSED,
    MISSES,
    NEXT_TASK,
    NUM_AHEAD,
    NUM_CHAINS,
    NUM_COUNTS,
    NUM_EXPERTS,
    NUM_LATE,
    NUM_LAYERS,
    NUM_MISSES,
    NUM_SLOTS,
    NUM_STAGED,
    ON_CPU,
    POLICY,
    PREFETCH,
    PREFETCHES,
    RANKS,
    SHARED,
    SHARED_WORK,
    STAGED,
    TURN,
    USEFUL,
    USELESS,
    WANTED,
    WORK_CELLS,
    WORK_NS,
)
from moesim.simulate.kernels.offload_cache import choose, enter, expose, protect, release, touch
from moesim.simulate.kernels.offload_fetch import compute_on_arrival, compute_on_cpu, start_fetch
from moesim.simulate.kernels.offload_options import COMPILED, INLINED
from moesim.simulate.kernels.offload_rows import put_expert, put_shared
from moesim.simulate.kernels.offload_wires import cancel_rest, forget, promote, ran, work_at

STAGING_SLOTS = 2


@numba.njit(**INLINED)
def first_key(m: np.ndarray, layer: int) -> int:
    """Return the key of a layer's first expert."""
    return m[KEYS] + layer * m[NUM_EXPERTS] * KEY_CELLS


@numba.njit(**INLINED)
def counts_of(m: np.ndarray, layer: int) -> int:
    """Return where the counts of a layer are."""
    return m[COUNTS] + layer * NUM_COUNTS


@numba.njit(**INLINED)
def drop_useless(m: np.ndarray, table: np.ndarray, layer: int) -> None:
    """Cancel what has not begun of this layer's prefetches that the router did not choose."""
    counts = counts_of(m, layer)
    for place in range(m[AHEAD_LIST], m[AHEAD_LIST] + m[NUM_AHEAD]):
        if m[m[WANTED] + m[place]] == m[ACCESS]:
            continue
        m[counts + USELESS] += 1
        k = first_key(m, layer) + m[place] * KEY_CELLS
        if m[k + K_FETCH] >= 0 and cancel_rest(m, table, m[k + K_FETCH]):
            m[counts + CANCELLED_PREFETCHES] += 1
            release(m, layer, k)
    m[NUM_AHEAD] = 0


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8, i8, i8, i8)", **COMPILED)
def put_hit(m: np.ndarray, table: np.ndarray, task: int, expert: int, slot: int, tokens: int, start: int,
            end: int) -> None:
    """Put an expert that is there, with its times."""
    put_expert(m, table, task, expert, slot, tokens, -1)
    ran(m, table, task, m[INSTANT], start, end)


@numba.njit(**INLINED)
def run_shared(m: np.ndarray, table: np.ndarray, tokens: int) -> None:
    """Compute the shared experts."""
    task, start = m[NEXT_TASK], m[COMPUTE_FREE]
    m[NEXT_TASK] = task + 1
    m[COMPUTE_FREE] = start + m[work_at(m, SHARED_WORK, tokens) + WORK_NS]
    if m[EMIT]:
        put_shared(m, table, task, tokens)
        ran(m, table, task, m[INSTANT], start, m[COMPUTE_FREE])


@numba.njit(**INLINED)
def count_uses(m: np.ndarray, layer: int, uses: int, useful: int, late_ahead: int) -> None:
    """Count the uses of a layer's experts; `useful` and `late_ahead` of them were prefetched."""
    counts = counts_of(m, layer)
    m[counts + ACCESSES] += uses
    m[counts + HITS] += uses - m[NUM_LATE] - m[NUM_MISSES]
    m[counts + LATE_HITS] += m[NUM_LATE]
    m[counts + MISSED] += m[NUM_MISSES]
    m[counts + USEFUL] += useful
    m[counts + LATE_PREFETCHES] += late_ahead


@numba.njit(**INLINED)
def use_wanted(m: np.ndarray, table: np.ndarray, experts: np.ndarray, tokens: np.ndarray, layer: int, first: int,
               last: int) -> None:
    """Touch a layer's experts, run those that are there, and list those that are late or missing."""
    now, late, misses, useful, late_ahead = m[ACCESS], 0, 0, 0, 0
    base, lru, stamp = first_key(m, layer), m[POLICY] == LRU, (m[ACCESS] + 1) << m[KEY_BITS]
    task, free, work = m[NEXT_TASK], m[COMPUTE_FREE], work_at(m, EXPERT_WORK, 0) + WORK_NS
    for place in range(first, last):
        expert = int(experts[place])
        k = base + expert * KEY_CELLS
        if lru:
            m[k + K_RANK] = stamp + k
        else:
            touch(m, k, now)
        if m[k + K_SLOT] < 0:
            m[m[MISSES] + misses] = place
            misses += 1
            continue
        m[m[RANKS] + m[k + K_SLOT]] = m[k + K_RANK]
        ahead = int(m[m[AHEAD] + expert] == now)
        if m[k + K_FETCH] >= 0:
            m[m[LATE] + late] = place
            late += 1
            late_ahead += ahead
            continue
        useful += ahead
        start, free = free, free + m[work + WORK_CELLS * tokens[place]]
        if m[EMIT]:
            put_hit(m, table, task, expert, m[k + K_SLOT], int(tokens[place]), start, free)
        task += 1
    m[NEXT_TASK], m[COMPUTE_FREE], m[NUM_LATE], m[NUM_MISSES] = task, free, late, misses
    count_uses(m, layer, last - first, useful, late_ahead)


@numba.njit(**INLINED)
def run_late(m: np.ndarray, table: np.ndarray, experts: np.ndarray, tokens: np.ndarray, layer: int) -> None:
    """Experts on their way go first from now on; or the CPU computes them once more, where that is its part."""
    for number in range(m[NUM_LATE]):
        place = m[m[LATE] + number]
        expert, size = int(experts[place]), int(tokens[place])
        if m[MISS] == CPU_MISSES:
            compute_on_cpu(m, table, layer, expert, size)
            continue
        f = m[first_key(m, layer) + expert * KEY_CELLS + K_FETCH]
        promote(m, table, f)
        compute_on_arrival(m, table, f, expert, size)


@numba.njit(**INLINED)
def sort_misses(m: np.ndarray, tokens: np.ndarray) -> None:
    """Order the missing experts by falling tokens; equal ones keep their order."""
    first = m[MISSES]
    for end in range(first + 1, first + m[NUM_MISSES]):
        place, before = m[end], end
        while before > first and tokens[m[before - 1]] < tokens[place]:
            m[before] = m[before - 1]
            before -= 1
        m[before] = place


@numba.njit(**INLINED)
def goes_to_cpu(m: np.ndarray, tokens: int) -> bool:
    """Return whether the CPU computes a missing expert of so many tokens."""
    if m[MISS] == FASTER_MISSES:
        m[m[ASKED] + tokens] += 1
        return m[m[ON_CPU] + tokens] == 1
    return m[MISS] == CPU_MISSES


@numba.njit("i8(i8[::1], i8[::1], i8, i8)", **COMPILED)
def reserve(m: np.ndarray, table: np.ndarray, layer: int, k: int) -> int:
    """Return a slot for a key, -1 if it gets none; whoever leaves the slot is forgotten."""
    victim = choose(m, layer, k, m[ACCESS])
    if victim == -2:
        return -1
    if victim >= 0 and m[victim + K_FETCH] >= 0:
        forget(m, table, victim)
    return enter(m, layer, k, victim, m[ACCESS])


@numba.njit("i8(i8[::1], i8[::1], i8)", **COMPILED)
def pass_through(m: np.ndarray, table: np.ndarray, k: int) -> int:
    """Copy an expert into the next staging slot, behind the expert that this layer computes there."""
    slot, before = m[NUM_SLOTS] + m[TURN], -1
    m[TURN] = (m[TURN] + 1) % STAGING_SLOTS
    if m[NUM_STAGED] >= STAGING_SLOTS:
        before = m[m[STAGED] + m[NUM_STAGED] - STAGING_SLOTS]
    f = start_fetch(m, table, LOAD, k, slot, 0, before)
    m[m[STAGED] + m[NUM_STAGED]] = f
    m[NUM_STAGED] += 1
    return f


@numba.njit(**INLINED)
def run_misses(m: np.ndarray, table: np.ndarray, experts: np.ndarray, tokens: np.ndarray, layer: int) -> None:
    """Compute missing experts on the CPU, or fetch them into slots or through the staging slots."""
    counts = counts_of(m, layer)
    sort_misses(m, tokens)
    for number in range(m[NUM_MISSES]):
        place = m[m[MISSES] + number]
        expert, size = int(experts[place]), int(tokens[place])
        k = first_key(m, layer) + expert * KEY_CELLS
        if goes_to_cpu(m, size):
            compute_on_cpu(m, table, layer, expert, size)
            slot = reserve(m, table, layer, k) if m[ADMITTING] else -1
            if slot >= 0:
                start_fetch(m, table, ADMIT, k, slot, 1, -1)
                m[counts + ADMITS] += 1
            continue
        slot = reserve(m, table, layer, k)
        f = start_fetch(m, table, LOAD, k, slot, 1, -1) if slot >= 0 else pass_through(m, table, k)
        m[counts + LOADS] += 1
        compute_on_arrival(m, table, f, expert, size)


@numba.njit(**INLINED)
def count_absent(m: np.ndarray, named: np.ndarray, base: int) -> int:
    """Return how many predicted experts are not resident."""
    absent = 0
    for expert in named:
        if expert < 0:
            break
        absent += m[base + int(expert) * KEY_CELLS + K_SLOT] < 0
    return absent


@numba.njit(**INLINED)
def prefetch_next(m: np.ndarray, table: np.ndarray, named: np.ndarray, layer: int) -> None:
    """Fetch predicted experts of the next layer into slots that no other prediction holds."""
    base = first_key(m, layer + 1)
    if count_absent(m, named, base) == 0:
        return
    for expert in named:
        if expert < 0:
            break
        protect(m, base + int(expert) * KEY_CELLS)
    for expert in named:
        if expert < 0:
            break
        k = base + int(expert) * KEY_CELLS
        slot = reserve(m, table, layer + 1, k) if m[k + K_SLOT] < 0 else -1
        if slot < 0:
            continue
        start_fetch(m, table, PREFETCH, k, slot, 1, -1)
        m[m[AHEAD_LIST] + m[NUM_AHEAD]] = int(expert)
        m[m[AHEAD] + int(expert)] = m[ACCESS] + 1
        m[NUM_AHEAD] += 1
        m[counts_of(m, layer + 1) + PREFETCHES] += 1
    for expert in named:
        if expert < 0:
            break
        expose(m, base + int(expert) * KEY_CELLS)


@numba.njit(**INLINED)
def decide(m: np.ndarray, table: np.ndarray, experts: np.ndarray, tokens: np.ndarray, named: np.ndarray, layer: int,
           first: int, last: int, rows: int) -> None:
    """Take all decisions of a layer at its router's end.

    ``experts[first:last]`` are the layer's, `named` what the prefetcher says of the next; `rows`: tokens of the step.
    """
    base = first_key(m, layer)
    for place in range(first, last):
        m[m[WANTED] + int(experts[place])] = m[ACCESS]
    drop_useless(m, table, layer)
    m[NUM_STAGED], m[NUM_CHAINS] = 0, 0
    if m[HAS_SHARED_EXPERT]:
        run_shared(m, table, rows)
    use_wanted(m, table, experts, tokens, layer, first, last)
    prefetching = m[HAS_PREFETCH] and layer + 1 < m[NUM_LAYERS]
    evicting = m[NUM_MISSES] > 0 or (prefetching and m[SHARED])
    if evicting:
        for place in range(first, last):
            protect(m, base + int(experts[place]) * KEY_CELLS)
    run_late(m, table, experts, tokens, layer)
    run_misses(m, table, experts, tokens, layer)
    if prefetching:
        prefetch_next(m, table, named, layer)
    if evicting:
        for place in range(first, last):
            expose(m, base + int(experts[place]) * KEY_CELLS)
