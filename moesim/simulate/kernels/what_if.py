"""The time of small task graphs for many machines at once: the structure stays, the durations change."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np


class PatternArrays(NamedTuple):
    """Task graphs one after the other; tasks of pattern q are ``offsets[q] ... offsets[q + 1] - 1``.

    ``work`` int32[task], the index of its duration; ``resource`` int32[task], -1 for a barrier; ``unmet`` int32[task];
    children of task i, counted inside its pattern: ``children[child_offsets[i]:child_offsets[i + 1]]``, int32.
    """

    offsets: np.ndarray
    work: np.ndarray
    resource: np.ndarray
    unmet: np.ndarray
    child_offsets: np.ndarray
    children: np.ndarray


class Scratch(NamedTuple):
    """Room for one pattern: unmet, ready, end and a stack per task; queue [resource, task]; per resource the rest."""

    unmet: np.ndarray
    ready: np.ndarray
    end: np.ndarray
    stack: np.ndarray
    queue: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    running: np.ndarray


@numba.njit(cache=True, nogil=True, inline="always")
def _push(task: int, resource: int, now: np.int64, room: Scratch) -> None:
    """Queue a task; all have priority 0, so the order is (ready time, id), and time only rises."""
    queue, place = room.queue[resource], room.tail[resource]
    while place > room.head[resource] and queue[place - 1] > task and room.ready[queue[place - 1]] == now:
        queue[place] = queue[place - 1]
        place -= 1
    queue[place] = task
    room.tail[resource] += 1


@numba.njit(cache=True, nogil=True, inline="always")
def _settle(top: int, first: int, now: np.int64, arrays: PatternArrays, room: Scratch) -> None:
    """Queue the `top` tasks on the stack; a barrier among them ends at once and may free others."""
    while top:
        top -= 1
        task = room.stack[top]
        room.ready[task] = now
        resource = arrays.resource[first + task]
        if resource >= 0:
            _push(task, resource, now, room)
            continue
        room.end[task] = now
        for place in range(arrays.child_offsets[first + task], arrays.child_offsets[first + task + 1]):
            child = arrays.children[place]
            room.unmet[child] -= 1
            if room.unmet[child] == 0:
                room.stack[top] = child
                top += 1


@numba.njit(cache=True, nogil=True)
def _finish_next(first: int, arrays: PatternArrays, room: Scratch) -> np.int64:
    """Complete every task that ends at the next instant; returns that instant."""
    now = np.int64(9223372036854775807)
    for task in room.running:
        if task >= 0 and room.end[task] < now:
            now = room.end[task]
    for resource in range(len(room.running)):
        done = room.running[resource]
        if done < 0 or room.end[done] != now:
            continue
        room.running[resource] = -1
        top = 0
        for place in range(arrays.child_offsets[first + done], arrays.child_offsets[first + done + 1]):
            child = arrays.children[place]
            room.unmet[child] -= 1
            if room.unmet[child] == 0:
                room.stack[top] = child
                top += 1
        _settle(top, first, now, arrays, room)
    return now


@numba.njit(cache=True, nogil=True)
def _pattern_ns(pattern: int, arrays: PatternArrays, durations: np.ndarray, room: Scratch) -> np.int64:
    """Run one pattern from time 0; returns when its last task, a barrier to which all lead, ends."""
    first, last = arrays.offsets[pattern], arrays.offsets[pattern + 1]
    size = last - first
    room.head[:], room.tail[:], room.running[:] = 0, 0, -1
    top = 0
    for task in range(size):
        room.unmet[task] = arrays.unmet[first + task]
        room.end[task] = -1
        if room.unmet[task] == 0:
            room.stack[top] = task
            top += 1
    now = np.int64(0)
    _settle(top, first, now, arrays, room)
    while room.end[size - 1] < 0:
        for resource in range(len(room.running)):
            if room.running[resource] < 0 and room.head[resource] < room.tail[resource]:
                task = room.queue[resource, room.head[resource]]
                room.head[resource] += 1
                room.running[resource] = task
                room.end[task] = now + durations[arrays.work[first + task]]
        now = _finish_next(first, arrays, room)
    return now


@numba.njit(cache=True, nogil=True)
def pattern_times(arrays: PatternArrays, durations: np.ndarray, num_resources: int, times: np.ndarray) -> None:
    """Fill int64[point, pattern] `times` from int64[point, work] `durations`."""
    longest = 0
    for pattern in range(len(arrays.offsets) - 1):
        longest = max(longest, arrays.offsets[pattern + 1] - arrays.offsets[pattern])
    room = Scratch(
        np.zeros(longest, np.int32), np.zeros(longest, np.int64), np.zeros(longest, np.int64),
        np.zeros(longest, np.int32), np.zeros((num_resources, longest + 1), np.int32),
        np.zeros(num_resources, np.int64), np.zeros(num_resources, np.int64), np.zeros(num_resources, np.int32))
    for point in range(len(durations)):
        for pattern in range(len(arrays.offsets) - 1):
            times[point, pattern] = _pattern_ns(pattern, arrays, durations[point], room)


@numba.njit(cache=True, nogil=True)
def step_times(
    times: np.ndarray, durations: np.ndarray, step_offsets: np.ndarray, step_pattern: np.ndarray,
    serial_offsets: np.ndarray, serial_work: np.ndarray, serial_count: np.ndarray, result: np.ndarray,
) -> None:
    """Fill int64[point, step] `result`: the patterns of a step's layers, and what follows one another in it."""
    for point in range(len(result)):
        for step in range(result.shape[1]):
            total = np.int64(0)
            for place in range(step_offsets[step], step_offsets[step + 1]):
                total += times[point, step_pattern[place]]
            for place in range(serial_offsets[step], serial_offsets[step + 1]):
                total += serial_count[place] * durations[point, serial_work[place]]
            result[point, step] = total
