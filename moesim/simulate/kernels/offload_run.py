"""The compiled offload engine's loop over steps and layers."""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.compiled_offload_layout import (
    ACCESS,
    CHAIN_END,
    CLOCK,
    COMPUTE,
    COMPUTE_FREE,
    CPU_FIRST,
    CPU_FREE,
    CPU_LAST,
    DENSE_WORK,
    EMIT,
    F_HOPS,
    F_RUNNING,
    HEAD_WORK,
    INSTANT,
    KINDS,
    LABEL,
    LAST_TASK,
    LAYER,
    LAYERS,
    N_OWNER,
    NEVER_NS,
    NEXT_TASK,
    NUM_AWAITED,
    NUM_CHAINS,
    NUM_CHUNKS,
    NUM_HOPS,
    NUM_STAGED,
    OUT_END,
    OUT_FIRST,
    OUT_LAST,
    ROUTE,
    ROUTER,
    ROUTER_WORK,
    STAGE_FIRST,
    STAGE_LAST,
    STEP_BYTES,
    STEP_CONTEXT,
    STEP_HEAD,
    STEP_LABEL,
    STEP_NS,
    STEP_SOURCE,
    STEP_TOKENS,
    W_END,
    W_HEAD,
    W_RUN,
    WAITING,
    WORK_NS,
)
from moesim.simulate.kernels.offload_layer import STAGING_SLOTS, decide
from moesim.simulate.kernels.offload_options import COMPILED, INLINED
from moesim.simulate.kernels.offload_rows import (
    K_ATTENTION,
    K_DENSE,
    K_HEAD,
    K_ROUTER,
    put,
    put_following,
    put_layer_end,
    put_work,
)
from moesim.simulate.kernels.offload_wires import (
    arrive,
    end_chunk,
    front,
    ran,
    run_chunk,
    run_instants,
    unlink,
    work_at,
)


@numba.njit("i8(i8[::1], i8[::1], i8, i8, i8, i8)", **COMPILED)
def run_copy(m: np.ndarray, table: np.ndarray, w: int, rank: int, t: int, limit: int) -> int:
    """From `t` on, run the copy at the front of a queue chunk by chunk, for as long as chunks start before `limit`.

    Only for routes of one hop. A chunk that ends after `limit` is left running. Returns when the wire is free next.
    """
    n = m[w + W_HEAD + rank]
    f = m[n + N_OWNER]
    while t < limit:
        t = run_chunk(m, table, f, 0, t)
        if m[f + F_HOPS] == m[NUM_CHUNKS]:
            unlink(m, w, rank, n)
        if t > limit:
            m[f + F_RUNNING] = 1
            m[w + W_RUN] = n
            break
        m[f + F_HOPS + 1] += 1
        if m[f + F_HOPS + 1] == m[NUM_CHUNKS]:
            arrive(m, table, f, t)
            break
    m[w + W_END] = t
    return t


@numba.njit(**INLINED)
def settle(m: np.ndarray, table: np.ndarray) -> None:
    """Go on until the end of every task that the layer waits for is known."""
    if m[WAITING] == 0:
        return
    if m[NUM_HOPS] > 1 or m[NUM_CHAINS] > 0 or m[NUM_STAGED] > STAGING_SLOTS:
        run_instants(m, table, NEVER_NS, True)
        return
    w = m[m[ROUTE]]
    t = max(m[w + W_END], m[INSTANT])
    if m[w + W_RUN] >= 0:
        end_chunk(m, table, w, t)
    while m[WAITING] > 0:
        t = run_copy(m, table, w, 0, t, NEVER_NS)


@numba.njit("void(i8[::1], i8[::1], i8)", **COMPILED)
def advance(m: np.ndarray, table: np.ndarray, limit: int) -> None:
    """Let the copies in the background go on up to `limit`; what could start then waits for the decision."""
    if m[NUM_HOPS] > 1:
        run_instants(m, table, limit, False)
        return
    w = m[m[ROUTE]]
    t = max(m[w + W_END], m[INSTANT])
    if m[w + W_RUN] >= 0:
        if t > limit:
            return
        end_chunk(m, table, w, t)
    rank = front(m, w)
    while rank < 3 and t < limit:
        t = run_copy(m, table, w, rank, t, limit)
        rank = front(m, w)


@numba.njit(**INLINED)
def follow(m: np.ndarray, ns: int) -> int:
    """A task runs after everything before it; returns it."""
    task = m[NEXT_TASK]
    m[NEXT_TASK] = task + 1
    m[CLOCK] += ns
    return task


@numba.njit(**INLINED)
def attend(m: np.ndarray, table: np.ndarray, steps: np.ndarray, step: int, layer: int) -> None:
    """Run the attention of one layer."""
    task = follow(m, steps[step, STEP_NS])
    if m[EMIT]:
        put(m, table, task, K_ATTENTION, COMPUTE, steps[step, STEP_NS], steps[step, STEP_SOURCE], steps[step, STEP_BYTES])
        put_following(m, table, task, layer, steps[step, STEP_TOKENS], steps[step, STEP_CONTEXT])
    m[LAST_TASK] = task


@numba.njit(**INLINED)
def serve(m: np.ndarray, table: np.ndarray, kind: int, what: int, tokens: int, layer: int) -> None:
    """Run a router, a dense part or the head."""
    task = follow(m, m[work_at(m, what, tokens) + WORK_NS])
    if m[EMIT]:
        put_work(m, table, task, kind, COMPUTE, what, tokens)
        put_following(m, table, task, layer, tokens, 0)
    m[LAST_TASK] = task


@numba.njit(**INLINED)
def begin_layer(m: np.ndarray, layer: int) -> None:
    """The router has ended: the device and the CPU are idle, nothing is awaited yet."""
    t = m[CLOCK]
    m[INSTANT], m[COMPUTE_FREE], m[CPU_FREE], m[CHAIN_END] = t, t, t, t
    m[ROUTER], m[LAYER], m[NUM_AWAITED], m[WAITING] = m[LAST_TASK], layer, 0, 0
    m[CPU_FIRST], m[CPU_LAST], m[STAGE_FIRST], m[STAGE_LAST] = 0, 0, 0, 0


@numba.njit(**INLINED)
def end_layer(m: np.ndarray, table: np.ndarray) -> None:
    """Go on to the layer's barrier."""
    barrier = m[NEXT_TASK]
    m[NEXT_TASK] = barrier + 1
    settle(m, table)
    end = max(m[COMPUTE_FREE], m[CHAIN_END])
    if m[EMIT]:
        put_layer_end(m, table, barrier)
        ran(m, table, barrier, end, end, end)
    m[CLOCK], m[LAST_TASK] = end, barrier
    m[ACCESS] += 1


@numba.njit("void(i8[::1], i8[::1], i8[:, ::1], i8[::1], i2[::1], i4[::1], i2[:, ::1], i8[:, ::1])", **COMPILED)
def run_steps(m: np.ndarray, table: np.ndarray, steps: np.ndarray, offsets: np.ndarray, experts: np.ndarray,
              tokens: np.ndarray, named: np.ndarray, out: np.ndarray) -> None:
    """Run steps after what ran before; `out` int64[step, 3] gets their first and last task and their end.

    Args:
        m, table: see `offload_state`. steps: int64[step, column], see there.
        offsets: int64[access + 1] into experts int16[...] and tokens int32[...].
        named: int16[access, width], what the prefetcher names, -1 padded.
    """
    access = 0
    for step in range(len(steps)):
        out[step, OUT_FIRST] = m[NEXT_TASK]
        m[LABEL] = steps[step, STEP_LABEL]
        rows = steps[step, STEP_TOKENS]
        for place in range(m[LAYERS], m[KINDS]):
            layer = m[place]
            attend(m, table, steps, step, layer)
            if layer < 0:
                serve(m, table, K_DENSE, DENSE_WORK, rows, layer)
                continue
            serve(m, table, K_ROUTER, ROUTER_WORK, rows, layer)
            advance(m, table, m[CLOCK])
            begin_layer(m, layer)
            decide(m, table, experts, tokens, named[access], layer, offsets[access], offsets[access + 1], rows)
            end_layer(m, table)
            access += 1
        serve(m, table, K_HEAD, HEAD_WORK, steps[step, STEP_HEAD], -1)
        out[step, OUT_LAST], out[step, OUT_END] = m[LAST_TASK], m[CLOCK]


@numba.njit("void(i8[::1], i8[::1])", **COMPILED)
def run_out(m: np.ndarray, table: np.ndarray) -> None:
    """Let what is still under way in the background come to its end."""
    advance(m, table, NEVER_NS)
