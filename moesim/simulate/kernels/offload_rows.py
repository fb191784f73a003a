"""The task table of the compiled offload engine: rows are put when tasks are made, times when they are known."""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.compiled_offload_layout import (
    AWAITED,
    C_BYTES,
    C_CHUNK,
    C_CONTEXT,
    C_DEPS,
    C_END,
    C_EXPERT,
    C_KIND,
    C_LAYER,
    C_NS,
    C_PRIORITY,
    C_READY,
    C_RESOURCE,
    C_SLOT,
    C_SOURCE,
    C_START,
    C_STATE,
    C_STEP,
    C_TOKENS,
    CAPACITY,
    CHUNK_BYTES,
    CLOCK,
    COMPUTE,
    CPU,
    CPU_WORK,
    EXPERT_WORK,
    F_CLASS,
    F_FIRST,
    F_KEY,
    F_KIND,
    F_SLOT,
    FIRST_WIRE,
    HOP_NS,
    HOP_SOURCE,
    KEY_CELLS,
    KEYS,
    KINDS,
    LABEL,
    LAST_TASK,
    LAYER,
    NUM_AWAITED,
    NUM_CHUNKS,
    NUM_EXPERTS,
    NUM_HOPS,
    NUM_USERS,
    RECEIVE_WIRE,
    RECEIVE_WORK,
    ROUTE,
    ROUTER,
    SEND_WIRE,
    SEND_WORK,
    SHARED_WORK,
    TABLE_COLUMNS,
    USERS,
    WIRE_CELLS,
    WIRES,
    WORK_BYTES,
    WORK_NS,
    WORK_SOURCE,
)
from moesim.simulate.kernels.offload_options import COMPILED
from moesim.simulate.kernels.offload_wires import work_at

# Places in the region KINDS.
(K_BARRIER, K_ATTENTION, K_ROUTER, K_DENSE, K_HEAD, K_SHARED, K_EXPERT, K_CPU, K_SEND, K_RECEIVE, K_LOAD, K_ADMIT,
 K_PREFETCH) = range(13)


@numba.njit("i8(i8[::1], i8)", **COMPILED)
def resource_of(m: np.ndarray, wire: int) -> int:
    """Return the resource of a wire."""
    return FIRST_WIRE + (wire - m[WIRES]) // WIRE_CELLS


@numba.njit("void(i8[::1], i8)", **COMPILED)
def note_awaited(m: np.ndarray, task: int) -> None:
    """Let the layer's barrier wait for a task."""
    m[m[AWAITED] + m[NUM_AWAITED]] = task
    m[NUM_AWAITED] += 1


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8, i8, i8, i8)", **COMPILED)
def put(m: np.ndarray, table: np.ndarray, task: int, kind: int, resource: int, ns: int, source: int,
        num_bytes: int) -> None:
    """Begin a row; what is not given has the value that most tasks have."""
    rows = m[CAPACITY]
    for column in (C_PRIORITY, C_STATE, C_TOKENS, C_CONTEXT):
        table[column * rows + task] = 0
    for column in (C_READY, C_START, C_END, C_EXPERT, C_SLOT, C_CHUNK):
        table[column * rows + task] = -1
    table[C_KIND * rows + task] = m[m[KINDS] + kind]
    table[C_RESOURCE * rows + task] = resource
    table[C_NS * rows + task] = ns
    table[C_SOURCE * rows + task] = source
    table[C_BYTES * rows + task] = num_bytes
    table[C_STEP * rows + task] = m[LABEL]
    table[C_LAYER * rows + task] = m[LAYER]
    table[C_DEPS * rows + task] = table[C_DEPS * rows + task - 1] if task > 0 else 0


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8)", **COMPILED)
def label(m: np.ndarray, table: np.ndarray, task: int, column: int, value: int) -> None:
    """Set one cell."""
    table[column * m[CAPACITY] + task] = value


@numba.njit("void(i8[::1], i8[::1], i8, i8)", **COMPILED)
def wait_for(m: np.ndarray, table: np.ndarray, task: int, dep: int) -> None:
    """Add a dependency to the newest row."""
    end = C_DEPS * m[CAPACITY] + task
    table[TABLE_COLUMNS * m[CAPACITY] + table[end]] = dep
    table[end] += 1


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8, i8, i8)", **COMPILED)
def put_work(m: np.ndarray, table: np.ndarray, task: int, kind: int, resource: int, what: int, tokens: int) -> None:
    """Begin the row of a task whose cost depends on its tokens only."""
    work = work_at(m, what, tokens)
    put(m, table, task, kind, resource, m[work + WORK_NS], m[work + WORK_SOURCE], m[work + WORK_BYTES])


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8, i8)", **COMPILED)
def put_following(m: np.ndarray, table: np.ndarray, task: int, layer: int, tokens: int, context: int) -> None:
    """Finish the row of a task that runs after everything before it, until CLOCK."""
    rows = m[CAPACITY]
    table[C_LAYER * rows + task] = layer
    table[C_TOKENS * rows + task] = tokens
    table[C_CONTEXT * rows + task] = context
    start = m[CLOCK] - table[C_NS * rows + task]
    table[C_READY * rows + task] = start
    table[C_START * rows + task] = start
    table[C_END * rows + task] = m[CLOCK]
    if m[LAST_TASK] >= 0:
        wait_for(m, table, task, m[LAST_TASK])


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8, i8, i8)", **COMPILED)
def put_expert(m: np.ndarray, table: np.ndarray, task: int, expert: int, slot: int, tokens: int, arrival: int) -> None:
    """Put an expert on the device; `arrival` is what it waits for besides the router, or -1."""
    put_work(m, table, task, K_EXPERT, COMPUTE, EXPERT_WORK, tokens)
    label(m, table, task, C_EXPERT, expert)
    label(m, table, task, C_SLOT, slot)
    label(m, table, task, C_TOKENS, tokens)
    wait_for(m, table, task, m[ROUTER])
    if arrival >= 0:
        wait_for(m, table, task, arrival)
    note_awaited(m, task)


@numba.njit("void(i8[::1], i8[::1], i8, i8)", **COMPILED)
def put_shared(m: np.ndarray, table: np.ndarray, task: int, tokens: int) -> None:
    """Put the shared experts of a layer."""
    put_work(m, table, task, K_SHARED, COMPUTE, SHARED_WORK, tokens)
    label(m, table, task, C_TOKENS, tokens)
    wait_for(m, table, task, m[ROUTER])
    note_awaited(m, task)


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8)", **COMPILED)
def put_chain(m: np.ndarray, table: np.ndarray, first: int, expert: int, tokens: int) -> None:
    """Put the three tasks of an expert on the CPU: its rows down, the work, the results back."""
    put_work(m, table, first, K_SEND, resource_of(m, m[SEND_WIRE]), SEND_WORK, tokens)
    wait_for(m, table, first, m[ROUTER])
    put_work(m, table, first + 1, K_CPU, CPU, CPU_WORK, tokens)
    wait_for(m, table, first + 1, first)
    label(m, table, first + 1, C_TOKENS, tokens)
    put_work(m, table, first + 2, K_RECEIVE, resource_of(m, m[RECEIVE_WIRE]), RECEIVE_WORK, tokens)
    wait_for(m, table, first + 2, first + 1)
    for task in range(first, first + 3):
        label(m, table, task, C_EXPERT, expert)
    note_awaited(m, first + 2)


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8)", **COMPILED)
def put_hop(m: np.ndarray, table: np.ndarray, f: int, chunk: int, hop: int) -> None:
    """Put one chunk of a copy over one hop."""
    key, place = (m[f + F_KEY] - m[KEYS]) // KEY_CELLS, chunk * m[NUM_HOPS] + hop
    task = m[f + F_FIRST] + place
    put(m, table, task, K_LOAD + m[f + F_KIND], resource_of(m, m[m[ROUTE] + hop]), m[m[HOP_NS] + place],
        m[m[HOP_SOURCE] + place], m[m[CHUNK_BYTES] + chunk])
    label(m, table, task, C_PRIORITY, m[f + F_CLASS])
    label(m, table, task, C_LAYER, key // m[NUM_EXPERTS])
    label(m, table, task, C_EXPERT, key % m[NUM_EXPERTS])
    label(m, table, task, C_SLOT, m[f + F_SLOT])
    label(m, table, task, C_CHUNK, chunk)
    if hop:
        wait_for(m, table, task, task - 1)
        return
    wait_for(m, table, task, m[ROUTER])
    for user in range(m[NUM_USERS]):
        wait_for(m, table, task, m[m[USERS] + user])


@numba.njit("void(i8[::1], i8[::1], i8)", **COMPILED)
def put_fetch(m: np.ndarray, table: np.ndarray, f: int) -> None:
    """Put the copy of one expert: every chunk over every hop; USERS holds the users of its slot."""
    for chunk in range(m[NUM_CHUNKS]):
        for hop in range(m[NUM_HOPS]):
            put_hop(m, table, f, chunk, hop)


@numba.njit("void(i8[::1], i8[::1], i8, i8)", **COMPILED)
def put_arrival(m: np.ndarray, table: np.ndarray, f: int, task: int) -> None:
    """Put the barrier that ends a copy of several chunks."""
    put(m, table, task, K_BARRIER, -1, 0, 0, 0)
    label(m, table, task, C_STEP, -1)
    label(m, table, task, C_LAYER, -1)
    for chunk in range(m[NUM_CHUNKS]):
        wait_for(m, table, task, m[f + F_FIRST] + (chunk + 1) * m[NUM_HOPS] - 1)


@numba.njit("void(i8[::1], i8[::1], i8)", **COMPILED)
def put_layer_end(m: np.ndarray, table: np.ndarray, task: int) -> None:
    """Put the barrier that ends a layer."""
    put(m, table, task, K_BARRIER, -1, 0, 0, 0)
    for place in range(m[NUM_AWAITED]):
        wait_for(m, table, task, m[m[AWAITED] + place])
