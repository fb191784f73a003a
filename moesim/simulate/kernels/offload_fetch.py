"""How the compiled offload engine makes copies and experts on the CPU: `Transfers.fetch`, `_compute_on_cpu`."""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.compiled_offload_layout import (
    CHAIN_CELLS,
    CHAINS,
    COUNTS,
    CPU_DONE,
    CPU_MISSED,
    EMIT,
    F_CLASS,
    F_DEAD,
    F_EXPERT,
    F_FIRST,
    F_HOPS,
    F_KEY,
    F_KIND,
    F_LINKED,
    F_NEXT,
    F_RUNNING,
    F_SLOT,
    F_TOKENS,
    F_UNMET,
    FREE_FETCH,
    H_SEND,
    H_TASK,
    H_TOKENS,
    INSTANT,
    K_FETCH,
    N_HOP,
    N_OWNER,
    NEXT_TASK,
    NUM_CHAINS,
    NUM_CHUNKS,
    NUM_COUNTS,
    NUM_HOPS,
    NUM_USERS,
    NUM_WIRES,
    SEND_WIRE,
    SLOT_FETCH,
    USERS,
    W_RUN,
    W_WAITER,
    WAITING,
    WIRE_CELLS,
    WIRES,
)
from moesim.simulate.kernels.offload_options import COMPILED, INLINED
from moesim.simulate.kernels.offload_rows import put_arrival, put_chain, put_expert, put_fetch
from moesim.simulate.kernels.offload_wires import push, queue_fetch


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8)", **COMPILED)
def compute_on_cpu(m: np.ndarray, table: np.ndarray, layer: int, expert: int, tokens: int) -> None:
    """Send an expert's rows to the CPU; the rest follows when they are there."""
    chain, task = m[CHAINS] + m[NUM_CHAINS] * CHAIN_CELLS, m[NEXT_TASK]
    m[NUM_CHAINS] += 1
    m[NEXT_TASK] = task + 3
    m[WAITING] += 1
    m[chain + H_TOKENS], m[chain + H_TASK] = tokens, task
    push(m, m[SEND_WIRE], 0, chain + H_SEND, m[INSTANT], task)
    m[m[COUNTS] + layer * NUM_COUNTS + CPU_MISSED] += 1
    m[m[CPU_DONE] + tokens] += 1
    if m[EMIT]:
        put_chain(m, table, task, expert, tokens)


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8)", **COMPILED)
def compute_on_arrival(m: np.ndarray, table: np.ndarray, f: int, expert: int, tokens: int) -> None:
    """Let an expert wait for its copy (for a barrier over its chunks, if there are several)."""
    task, arrival = m[NEXT_TASK], m[f + F_FIRST] + m[NUM_HOPS] - 1
    if m[NUM_CHUNKS] > 1:
        arrival = task
        task += 1
        if m[EMIT]:
            put_arrival(m, table, f, arrival)
    m[NEXT_TASK] = task + 1
    m[WAITING] += 1
    m[f + F_TOKENS], m[f + F_EXPERT] = tokens, task
    if m[EMIT]:
        put_expert(m, table, task, expert, m[f + F_SLOT], tokens, arrival)


@numba.njit("i8(i8[::1], i8, i8)", **COMPILED)
def await_running(m: np.ndarray, f: int, before: int) -> int:
    """Let copy `f` wait for what still runs of the last copy into its slot; returns for how many tasks."""
    users = 0
    for w in range(m[WIRES], m[WIRES] + m[NUM_WIRES] * WIRE_CELLS, WIRE_CELLS):
        n = m[w + W_RUN]
        if n < 0 or m[n + N_OWNER] != before:
            continue
        m[w + W_WAITER] = f
        hop = m[n + N_HOP]
        task = m[before + F_FIRST] + (m[before + F_HOPS + 2 * hop] - 1) * m[NUM_HOPS] + hop
        place = m[USERS] + users
        while place > m[USERS] and m[place - 1] > task:
            m[place] = m[place - 1]
            place -= 1
        m[place] = task
        users += 1
    return users


@numba.njit("i8(i8[::1], i8, i8)", **COMPILED)
def await_staged(m: np.ndarray, f: int, before: int) -> int:
    """Let copy `f` wait for the expert that was copied into its staging slot before; returns for how many tasks."""
    m[before + F_NEXT] = f
    for chunk in range(m[NUM_CHUNKS]):
        m[m[USERS] + chunk] = m[before + F_FIRST] + (chunk + 1) * m[NUM_HOPS] - 1
    m[m[USERS] + m[NUM_CHUNKS]] = m[before + F_EXPERT]
    return m[NUM_CHUNKS] + 1


@numba.njit(**INLINED)
def new_fetch(m: np.ndarray, kind: int, k: int, slot: int, linked: int) -> int:
    """Take a record and the tasks of a copy."""
    f, first = m[FREE_FETCH], m[NEXT_TASK]
    m[FREE_FETCH] = m[f + F_NEXT]
    m[NEXT_TASK] = first + m[NUM_CHUNKS] * m[NUM_HOPS]
    m[f + F_KEY], m[f + F_SLOT], m[f + F_FIRST] = k, slot, first
    m[f + F_KIND], m[f + F_CLASS], m[f + F_LINKED] = kind, kind, linked
    m[f + F_DEAD], m[f + F_UNMET], m[f + F_RUNNING] = 0, 0, 0
    m[f + F_EXPERT], m[f + F_NEXT] = -1, -1
    for cell in range(f + F_HOPS, f + F_HOPS + 2 * m[NUM_HOPS]):
        m[cell] = 0
    return f


@numba.njit("i8(i8[::1], i8[::1], i8, i8, i8, i8, i8)", **COMPILED)
def start_fetch(m: np.ndarray, table: np.ndarray, kind: int, k: int, slot: int, linked: int, staged: int) -> int:
    """Make the copy of one expert into a slot; it waits for the users of the slot.

    `linked`: whether the expert stays known; `staged`: the copy whose expert is computed in the slot before, or -1.
    """
    before = m[m[SLOT_FETCH] + slot]
    running = before >= 0 and m[before + F_SLOT] == slot and m[before + F_RUNNING] > 0
    f = new_fetch(m, kind, k, slot, linked)
    m[m[SLOT_FETCH] + slot] = f
    m[NUM_USERS] = 0
    if staged >= 0:
        m[NUM_USERS] = await_staged(m, f, staged)
        m[f + F_UNMET] = 1
    elif running:
        m[NUM_USERS] = await_running(m, f, before)
        m[f + F_UNMET] = m[NUM_USERS]
    if linked:
        m[k + K_FETCH] = f
    if m[EMIT]:
        put_fetch(m, table, f)
    if m[f + F_UNMET] == 0:
        queue_fetch(m, table, f, m[INSTANT])
    return f
