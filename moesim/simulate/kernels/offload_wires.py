"""The wires of the compiled offload engine: queues by (class, ready time, task), copies, and the instants of a layer.

A copy's first hop stands in its queue once for all its chunks: they are ready at one instant and their tasks adjoin,
so nothing comes between them. At one instant everything that ends is handled before anything is dispatched.
"""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.compiled_offload_layout import (
    C_END,
    C_PRIORITY,
    C_READY,
    C_START,
    C_STATE,
    CANCELLED,
    CAPACITY,
    CHAIN_END,
    COMPUTE_FREE,
    COPIES,
    CPU_FIRST,
    CPU_FREE,
    CPU_LAST,
    CPU_QUEUE,
    CPU_WORK,
    EMIT,
    EXPERT_WORK,
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
    F_TOKENS,
    F_UNMET,
    FREE_FETCH,
    H_RECEIVE,
    H_TASK,
    H_TOKENS,
    HOP_NS,
    INSTANT,
    K_FETCH,
    N_HOP,
    N_NEXT,
    N_OWNER,
    N_PREV,
    N_READY,
    N_TASK,
    NEVER_NS,
    NODE_CELLS,
    NUM_CHUNKS,
    NUM_HOPS,
    NUM_SIZES,
    NUM_WIRES,
    RECEIVE_WIRE,
    RECEIVE_WORK,
    RECEIVING,
    ROUTE,
    SEND_WORK,
    SENDING,
    STAGE_FIRST,
    STAGE_LAST,
    STAGE_QUEUE,
    W_END,
    W_HEAD,
    W_RUN,
    W_TAIL,
    W_WAITER,
    WAITING,
    WIRE_CELLS,
    WIRES,
    WORK_CELLS,
    WORK_NS,
    WORKS,
)
from moesim.simulate.kernels.offload_options import COMPILED, INLINED


@numba.njit(**INLINED)
def work_at(m: np.ndarray, what: int, tokens: int) -> int:
    """Return the address of a piece of work."""
    return m[WORKS] + WORK_CELLS * (what * m[NUM_SIZES] + tokens)


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8, i8)", **COMPILED)
def ran(m: np.ndarray, table: np.ndarray, task: int, ready: int, start: int, end: int) -> None:
    """Set the times of a row."""
    rows = m[CAPACITY]
    table[C_READY * rows + task] = ready
    table[C_START * rows + task] = start
    table[C_END * rows + task] = end


@numba.njit("void(i8[::1], i8[::1], i8, i8, i8)", **COMPILED)
def note_unstarted(m: np.ndarray, table: np.ndarray, f: int, column: int, value: int) -> None:
    """Set a column of those tasks of a copy that have not started (their new priority, or that they were cancelled)."""
    rows, first = m[CAPACITY], m[f + F_FIRST]
    for task in range(first, first + m[NUM_CHUNKS] * m[NUM_HOPS]):
        if table[C_START * rows + task] < 0:
            table[column * rows + task] = value


@numba.njit("void(i8[::1], i8, i8, i8, i8, i8)", **COMPILED)
def push(m: np.ndarray, w: int, rank: int, n: int, ready: int, task: int) -> None:
    """Put `n` into the queue of class `rank` by (ready time, task); nearly always at its end."""
    m[n + N_READY] = ready
    m[n + N_TASK] = task
    after = m[w + W_TAIL + rank]
    while after >= 0 and (m[after + N_READY] > ready or (m[after + N_READY] == ready and m[after + N_TASK] > task)):
        after = m[after + N_PREV]
    before = m[w + W_HEAD + rank] if after < 0 else m[after + N_NEXT]
    m[n + N_PREV] = after
    m[n + N_NEXT] = before
    m[w + W_HEAD + rank if after < 0 else after + N_NEXT] = n
    m[w + W_TAIL + rank if before < 0 else before + N_PREV] = n


@numba.njit("void(i8[::1], i8, i8, i8)", **COMPILED)
def unlink(m: np.ndarray, w: int, rank: int, n: int) -> None:
    """Take `n` out of its queue."""
    after, before = m[n + N_PREV], m[n + N_NEXT]
    m[w + W_HEAD + rank if after < 0 else after + N_NEXT] = before
    m[w + W_TAIL + rank if before < 0 else before + N_PREV] = after


@numba.njit(**INLINED)
def first_place(m: np.ndarray, f: int) -> int:
    """Return a copy's place in the queue of its first hop."""
    return f + F_HOPS + 2 * m[NUM_HOPS]


@numba.njit(**INLINED)
def later_place(m: np.ndarray, f: int, chunk: int, hop: int) -> int:
    """Return the place of one chunk in the queue of a later hop."""
    return first_place(m, f) + NODE_CELLS * (1 + chunk * (m[NUM_HOPS] - 1) + hop - 1)


@numba.njit(**INLINED)
def free_fetch(m: np.ndarray, f: int) -> None:
    """Give a copy's record back."""
    m[f + F_NEXT] = m[FREE_FETCH]
    m[FREE_FETCH] = f


@numba.njit(**INLINED)
def queue_fetch(m: np.ndarray, table: np.ndarray, f: int, t: int) -> None:
    """A copy may start: its first hop is ready at `t`."""
    push(m, m[m[ROUTE]], m[f + F_CLASS], first_place(m, f), t, m[f + F_FIRST])
    if m[EMIT]:
        for chunk in range(m[NUM_CHUNKS]):
            table[C_READY * m[CAPACITY] + m[f + F_FIRST] + chunk * m[NUM_HOPS]] = t


@numba.njit("void(i8[::1], i8, i8, i8, i8)", **COMPILED)
def move(m: np.ndarray, w: int, n: int, old: int, new: int) -> None:
    """Take `n` out of the queue of class `old`, and put it into that of class `new` unless that is -1."""
    unlink(m, w, old, n)
    if new >= 0:
        push(m, w, new, n, m[n + N_READY], m[n + N_TASK])


@numba.njit("void(i8[::1], i8, i8)", **COMPILED)
def move_queued(m: np.ndarray, f: int, new: int) -> None:
    """Move all of a copy that is queued."""
    old = m[f + F_CLASS]
    if m[f + F_UNMET] == 0 and m[f + F_HOPS] < m[NUM_CHUNKS]:
        move(m, m[m[ROUTE]], first_place(m, f), old, new)
    for hop in range(1, m[NUM_HOPS]):
        for chunk in range(m[f + F_HOPS + 2 * hop], m[f + F_HOPS + 2 * hop - 1]):
            move(m, m[m[ROUTE] + hop], later_place(m, f, chunk, hop), old, new)


@numba.njit("void(i8[::1], i8[::1], i8)", **COMPILED)
def promote(m: np.ndarray, table: np.ndarray, f: int) -> None:
    """What is left of a copy goes first from now on."""
    move_queued(m, f, 0)
    m[f + F_CLASS] = 0
    if m[EMIT]:
        note_unstarted(m, table, f, C_PRIORITY, 0)


@numba.njit("b1(i8[::1], i8[::1], i8)", **COMPILED)
def cancel_rest(m: np.ndarray, table: np.ndarray, f: int) -> bool:
    """Cancel the chunks that have not started; returns whether there were any."""
    left = m[NUM_CHUNKS] * m[NUM_HOPS]
    for hop in range(m[NUM_HOPS]):
        left -= m[f + F_HOPS + 2 * hop]
    if left == 0:
        return False
    move_queued(m, f, -1)
    m[CANCELLED] += left
    m[f + F_DEAD] = 1
    m[m[f + F_KEY] + K_FETCH] = -1
    if m[EMIT]:
        note_unstarted(m, table, f, C_STATE, 1)
    if m[f + F_UNMET] > 0:
        for w in range(m[WIRES], m[WIRES] + m[NUM_WIRES] * WIRE_CELLS, WIRE_CELLS):
            if m[w + W_WAITER] == f:
                m[w + W_WAITER] = -1
    if m[f + F_RUNNING] == 0:
        free_fetch(m, f)
    return True


@numba.njit("void(i8[::1], i8[::1], i8)", **COMPILED)
def forget(m: np.ndarray, table: np.ndarray, k: int) -> None:
    """A key loses its slot: stop its copy (nothing can wait for it: such a key is protected)."""
    f = m[k + K_FETCH]
    if not cancel_rest(m, table, f):
        m[f + F_LINKED] = 0
        m[k + K_FETCH] = -1


@numba.njit(**INLINED)
def run_expert(m: np.ndarray, table: np.ndarray, f: int, t: int) -> None:
    """The expert that waited for a copy joins the device's queue at `t`; its staging slot's next user waits for it."""
    task, start = m[f + F_EXPERT], max(m[COMPUTE_FREE], t)
    end = start + m[work_at(m, EXPERT_WORK, m[f + F_TOKENS]) + WORK_NS]
    m[COMPUTE_FREE] = end
    m[WAITING] -= 1
    if m[f + F_NEXT] >= 0:
        m[m[STAGE_QUEUE] + 2 * m[STAGE_LAST]] = m[f + F_NEXT]
        m[m[STAGE_QUEUE] + 2 * m[STAGE_LAST] + 1] = end
        m[STAGE_LAST] += 1
    if m[EMIT]:
        ran(m, table, task, t, start, end)
        if m[NUM_CHUNKS] > 1:
            ran(m, table, task - 1, t, t, t)


@numba.njit(**INLINED)
def arrive(m: np.ndarray, table: np.ndarray, f: int, t: int) -> None:
    """All of a copy is there at `t`."""
    if m[f + F_LINKED]:
        m[m[f + F_KEY] + K_FETCH] = -1
    if m[f + F_EXPERT] >= 0:
        run_expert(m, table, f, t)
    free_fetch(m, f)


@numba.njit(**INLINED)
def run_chunk(m: np.ndarray, table: np.ndarray, f: int, hop: int, t: int) -> int:
    """The next chunk of a copy starts over a hop; returns when it ends."""
    chunk = m[f + F_HOPS + 2 * hop]
    place = chunk * m[NUM_HOPS] + hop
    end = t + m[m[HOP_NS] + place]
    m[f + F_HOPS + 2 * hop] = chunk + 1
    m[m[COPIES] + m[f + F_KIND] * m[NUM_CHUNKS] * m[NUM_HOPS] + place] += 1
    if m[EMIT]:
        task = m[f + F_FIRST] + place
        ran(m, table, task, table[C_READY * m[CAPACITY] + task], t, end)
    return end


@numba.njit("void(i8[::1], i8[::1], i8, i8)", **COMPILED)
def wake_waiter(m: np.ndarray, table: np.ndarray, w: int, t: int) -> None:
    """What a wire ran is over: the copy that waited for it may be ready."""
    f = m[w + W_WAITER]
    m[w + W_WAITER] = -1
    m[f + F_UNMET] -= 1
    if m[f + F_UNMET] == 0:
        queue_fetch(m, table, f, t)


@numba.njit("void(i8[::1], i8[::1], i8, i8)", **COMPILED)
def end_chunk(m: np.ndarray, table: np.ndarray, w: int, t: int) -> None:
    """The chunk that runs on a wire ends at `t`."""
    f, hop = m[m[w + W_RUN] + N_OWNER], m[m[w + W_RUN] + N_HOP]
    m[w + W_RUN] = -1
    m[f + F_RUNNING] -= 1
    m[f + F_HOPS + 2 * hop + 1] += 1
    ended = m[f + F_HOPS + 2 * hop + 1]
    if m[w + W_WAITER] >= 0:
        wake_waiter(m, table, w, t)
    if m[f + F_DEAD]:
        if m[f + F_RUNNING] == 0:
            free_fetch(m, f)
    elif hop < m[NUM_HOPS] - 1:
        task = m[f + F_FIRST] + (ended - 1) * m[NUM_HOPS] + hop + 1
        push(m, m[m[ROUTE] + hop + 1], m[f + F_CLASS], later_place(m, f, ended - 1, hop + 1), t, task)
        if m[EMIT]:
            table[C_READY * m[CAPACITY] + task] = t
    elif ended == m[NUM_CHUNKS]:
        arrive(m, table, f, t)


@numba.njit(**INLINED)
def front(m: np.ndarray, w: int) -> int:
    """Return the class of what a wire would run next, 3 if nothing is queued."""
    rank = 0
    while rank < 3 and m[w + W_HEAD + rank] < 0:
        rank += 1
    return rank


@numba.njit("void(i8[::1], i8[::1], i8, i8)", **COMPILED)
def begin(m: np.ndarray, table: np.ndarray, w: int, t: int) -> None:
    """Dispatch the front of a free wire's queues at `t`, if there is any."""
    rank = front(m, w)
    if rank == 3:
        return
    n = m[w + W_HEAD + rank]
    m[w + W_RUN] = n
    owner, hop = m[n + N_OWNER], m[n + N_HOP]
    if hop < 0:
        unlink(m, w, rank, n)
        end = t + m[work_at(m, SEND_WORK if hop == SENDING else RECEIVE_WORK, m[owner + H_TOKENS]) + WORK_NS]
        if m[EMIT]:
            ran(m, table, m[n + N_TASK], m[n + N_READY], t, end)
    else:
        end = run_chunk(m, table, owner, hop, t)
        m[owner + F_RUNNING] += 1
        if hop or m[owner + F_HOPS] == m[NUM_CHUNKS]:
            unlink(m, w, rank, n)
    m[w + W_END] = end


@numba.njit("void(i8[::1], i8[::1], i8, i8)", **COMPILED)
def end_activations(m: np.ndarray, table: np.ndarray, w: int, t: int) -> None:
    """Rows have reached the CPU, which computes them in turn; or results the device."""
    chain, hop = m[m[w + W_RUN] + N_OWNER], m[m[w + W_RUN] + N_HOP]
    m[w + W_RUN] = -1
    if hop == RECEIVING:
        m[CHAIN_END] = max(m[CHAIN_END], t)
        m[WAITING] -= 1
        return
    start = max(m[CPU_FREE], t)
    end = start + m[work_at(m, CPU_WORK, m[chain + H_TOKENS]) + WORK_NS]
    m[CPU_FREE] = end
    m[m[CPU_QUEUE] + 2 * m[CPU_LAST]] = chain
    m[m[CPU_QUEUE] + 2 * m[CPU_LAST] + 1] = end
    m[CPU_LAST] += 1
    if m[EMIT]:
        ran(m, table, m[chain + H_TASK] + 1, t, start, end)


@numba.njit("i8(i8[::1])", **COMPILED)
def next_instant(m: np.ndarray) -> int:
    """Return when something ends next, `NEVER_NS` if nothing runs."""
    t = NEVER_NS
    for w in range(m[WIRES], m[WIRES] + m[NUM_WIRES] * WIRE_CELLS, WIRE_CELLS):
        if m[w + W_RUN] >= 0:
            t = min(t, m[w + W_END])
    if m[CPU_FIRST] < m[CPU_LAST]:
        t = min(t, m[m[CPU_QUEUE] + 2 * m[CPU_FIRST] + 1])
    if m[STAGE_FIRST] < m[STAGE_LAST]:
        t = min(t, m[m[STAGE_QUEUE] + 2 * m[STAGE_FIRST] + 1])
    return t


@numba.njit("void(i8[::1], i8[::1], i8)", **COMPILED)
def end_all(m: np.ndarray, table: np.ndarray, t: int) -> None:
    """Handle everything that ends at `t`."""
    for w in range(m[WIRES], m[WIRES] + m[NUM_WIRES] * WIRE_CELLS, WIRE_CELLS):
        if m[w + W_RUN] >= 0 and m[w + W_END] == t:
            if m[m[w + W_RUN] + N_HOP] < 0:
                end_activations(m, table, w, t)
            else:
                end_chunk(m, table, w, t)
    cpu, stage = m[CPU_QUEUE] + 2 * m[CPU_FIRST], m[STAGE_QUEUE] + 2 * m[STAGE_FIRST]
    if m[CPU_FIRST] < m[CPU_LAST] and m[cpu + 1] == t:
        m[CPU_FIRST] += 1
        push(m, m[RECEIVE_WIRE], 0, m[cpu] + H_RECEIVE, t, m[m[cpu] + H_TASK] + 2)
    if m[STAGE_FIRST] < m[STAGE_LAST] and m[stage + 1] == t:
        m[STAGE_FIRST] += 1
        m[m[stage] + F_UNMET] = 0
        queue_fetch(m, table, m[stage], t)


@numba.njit("void(i8[::1], i8[::1], i8, b1)", **COMPILED)
def run_instants(m: np.ndarray, table: np.ndarray, limit: int, until_known: bool) -> None:
    """Go from the present instant on, its dispatch first; up to what ends at `limit`, but no dispatch at `limit`.

    With `until_known`, stop at the instant at which the end of the last task that the layer waits for is known.
    """
    while True:
        for w in range(m[WIRES], m[WIRES] + m[NUM_WIRES] * WIRE_CELLS, WIRE_CELLS):
            if m[w + W_RUN] < 0:
                begin(m, table, w, m[INSTANT])
        t = next_instant(m)
        if t > limit or t == NEVER_NS:
            return
        m[INSTANT] = t
        end_all(m, table, t)
        if t == limit or (until_known and m[WAITING] == 0):
            return
