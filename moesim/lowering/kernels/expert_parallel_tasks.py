"""The tasks of expert-parallel steps as columns, in the order and with the ids of `ExpertParallelProgram`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np

# numpy integers: plain ones would be typed as literals, and every function compiled once per value
_CODES: Any = np.arange(9, dtype=np.int64)
ATTENTION, ROUTER, SHARED, DENSE, HEAD, DISPATCH, COMBINE, EXPERTS, BARRIER = _CODES
NONE: Any = np.int64(-1)
NOTHING: Any = np.int64(0)
NO_SOURCE: Any = np.int8(0)


class Columns(NamedTuple):
    """Tasks, filled from the front; other columns are constant. ``at`` int64[2]: rows and dependencies in use."""

    at: np.ndarray
    kind: np.ndarray
    resource: np.ndarray
    duration: np.ndarray
    source: np.ndarray
    offsets: np.ndarray
    deps: np.ndarray
    flops: np.ndarray
    rank: np.ndarray
    step: np.ndarray
    layer: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray


class Works(NamedTuple):
    """What the steps hold: ``number``, the label of each; ``rows``, ``heads`` by step, rank; ``dense*`` by kind, step,
    rank; ``expert*`` by step, layer, rank; ``exchange*`` by kind, step, layer. Sources count from 1 (0: a barrier, which has none)."""

    number: np.ndarray
    rows: np.ndarray
    heads: np.ndarray
    dense: np.ndarray
    dense_source: np.ndarray
    dense_flops: np.ndarray
    dense_bytes: np.ndarray
    experts: np.ndarray
    experts_source: np.ndarray
    expert_tokens: np.ndarray
    expert_flops: np.ndarray
    expert_bytes: np.ndarray
    exchange: np.ndarray
    exchange_source: np.ndarray
    exchange_bytes: np.ndarray
    exchange_tokens: np.ndarray


@numba.njit(cache=True, nogil=True)
def _add(columns: Columns, kind: int, resource: int, duration: int, source: int, flops: float, step: int, layer: int,
         tokens: int, num_bytes: float) -> int:
    """Append a task, whose dependencies have been appended; return its row."""
    task = columns.at[0]
    columns.kind[task], columns.resource[task], columns.duration[task] = kind, resource, duration
    columns.source[task], columns.flops[task] = source, flops
    columns.step[task], columns.layer[task], columns.tokens[task] = step, layer, tokens
    columns.num_bytes[task] = np.int64(np.rint(num_bytes))
    columns.at[0] = task + 1
    columns.offsets[task + 1] = columns.at[1]
    return task


@numba.njit(cache=True, nogil=True)
def _barrier(columns: Columns, codes: np.ndarray, step: int, layer: int, tokens: int) -> int:
    """Append a barrier; return its row."""
    return _add(columns, codes[BARRIER], NONE, NOTHING, NO_SOURCE, 0.0, step, layer, tokens, 0.0)


@numba.njit(cache=True, nogil=True, inline="always")
def _wait(columns: Columns, first: int, last: int) -> None:
    """Let the next task wait for tasks ``first ... last - 1``."""
    for task in range(first, last):
        columns.deps[columns.at[1]] = task
        columns.at[1] += 1


@numba.njit(cache=True, nogil=True)
def _on_ranks(columns: Columns, works: Works, codes: np.ndarray, kind: int, step: int, layer: int, done: np.ndarray,
              first: int) -> None:
    """Add one dense task per rank with rows, after its entry in ``done`` int64[rank] (-1: none); keep it there."""
    rows = works.heads if kind == HEAD else works.rows
    for rank in range(len(done)):
        tokens = rows[step, rank]
        if tokens:
            if done[rank] >= 0:
                _wait(columns, done[rank], done[rank] + 1)
            task = _add(columns, codes[kind], rank, works.dense[kind, step, rank], works.dense_source[kind, step, rank],
                        works.dense_flops[kind, step, rank], works.number[step], layer, tokens,
                        works.dense_bytes[kind, step, rank])
            columns.rank[task] = rank
            done[rank] = first + task


@numba.njit(cache=True, nogil=True)
def _exchange(columns: Columns, works: Works, codes: np.ndarray, kind: int, step: int, layer: int, network: int) -> int:
    """Add an all-to-all, or a barrier where nothing leaves its rank."""
    place = kind - DISPATCH
    duration, tokens = works.exchange[place, step, layer], works.exchange_tokens[step, layer]
    if not duration:
        return _barrier(columns, codes, works.number[step], layer, tokens)
    return _add(columns, codes[kind], network, duration, works.exchange_source[place, step, layer], 0.0,
                works.number[step], layer, tokens, works.exchange_bytes[place, step, layer])


@numba.njit(cache=True, nogil=True)
def _experts(columns: Columns, works: Works, codes: np.ndarray, step: int, layer: int, after: int) -> int:
    """Add the experts of every rank with rows; return how many."""
    added = 0
    for rank in range(works.experts.shape[2]):
        if works.experts[step, layer, rank]:
            _wait(columns, after, after + 1)
            task = _add(columns, codes[EXPERTS], rank, works.experts[step, layer, rank],
                        works.experts_source[step, layer, rank], works.expert_flops[step, layer, rank],
                        works.number[step], layer, works.expert_tokens[step, layer, rank],
                        works.expert_bytes[step, layer, rank])
            columns.rank[task] = rank
            added += 1
    return added


@numba.njit(cache=True, nogil=True)
def _moe(columns: Columns, works: Works, codes: np.ndarray, shared: bool, step: int, layer: int, done: np.ndarray,
         first: int) -> None:
    """Add router to barrier of one MoE layer; ``done`` becomes the barrier for every rank."""
    routers = first + columns.at[0]
    _on_ranks(columns, works, codes, ROUTER, step, layer, done, first)
    beside = first + columns.at[0]
    if shared:
        _on_ranks(columns, works, codes, SHARED, step, layer, done, first)
    sent = first + columns.at[0]
    _wait(columns, routers, beside)
    _exchange(columns, works, codes, DISPATCH, step, layer, len(done))
    added = _experts(columns, works, codes, step, layer, sent)
    back = first + columns.at[0]
    _wait(columns, back - added if added else sent, back)
    _exchange(columns, works, codes, COMBINE, step, layer, len(done))
    _wait(columns, back, back + 1)
    _wait(columns, beside, sent)
    done[:] = first + _barrier(columns, codes, works.number[step], layer, NOTHING)


@numba.njit(cache=True, nogil=True)
def add_steps(columns: Columns, works: Works, codes: np.ndarray, is_moe: np.ndarray, shared: bool, first: int,
              before: int, ends: np.ndarray) -> None:
    """Append all steps; fill ``ends`` int64[step, 2] with the first and last task of each.

    Args:
        codes: int64[9], the code of each kind named above.
        first: id of the first task; before: the task that the first step waits for (-1: none).
    """
    done = np.empty(works.rows.shape[1], np.int64)
    for step in range(len(works.rows)):
        ends[step, 0] = first + columns.at[0]
        done[:] = before
        layer, held = NOTHING, before
        for moe in is_moe:
            _on_ranks(columns, works, codes, ATTENTION, step, layer if moe else NONE, done, first)
            if moe:
                _moe(columns, works, codes, shared, step, layer, done, first)
                held, layer = done[0], layer + 1
            else:
                _on_ranks(columns, works, codes, DENSE, step, NONE, done, first)
                held = NONE
        heads = first + columns.at[0]
        _on_ranks(columns, works, codes, HEAD, step, NONE, done, first)
        end = first + columns.at[0]
        if end > heads:
            _wait(columns, heads, end)
        elif held >= 0:
            _wait(columns, held, held + 1)
        before = first + _barrier(columns, codes, works.number[step], NONE, NOTHING)
        ends[step, 1] = before
