"""Between two windows: forget the tasks that are done and number the others anew."""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.kernels.generic_state import (
    EDGE,
    IN_HEAPS,
    LINK,
    NUM_EDGES,
    NUM_RUNNING,
    NUM_TASKS,
    NUM_WOKEN,
    State,
    is_done,
    lend,
)


@numba.njit(cache=True, nogil=True)
def compact(owned: State) -> int:
    """Keep the tasks that are not done, in their order, and what refers to them; returns their number."""
    s = lend(owned)
    size = s.counters[NUM_TASKS]
    place = np.empty(size, np.int32)
    live = 0
    for task in range(size):
        place[task] = -1
        if not is_done(s, task):
            place[task] = live
            live += 1
    move_edges(s, place)
    move_rows(s, place)
    for code in range(len(s.ends)):
        s.ends[code, 0], s.ends[code, 1] = renamed(place, s.ends[code, 0]), renamed(place, s.ends[code, 1])
    for resource in range(len(s.roots)):
        s.roots[resource] = renamed(place, s.roots[resource])
    for entry in range(s.counters[NUM_RUNNING]):
        s.running[entry, 1] = place[s.running[entry, 1]]
    for entry in range(s.counters[NUM_WOKEN]):
        s.woken[entry] = place[s.woken[entry]]
    s.counters[NUM_TASKS] = live
    return live


@numba.njit(cache=True, nogil=True, inline="always")
def renamed(place: np.ndarray, task: int) -> int:
    """Return the new number of a task; -1 if it is gone or there is none."""
    return -1 if task < 0 else place[task]


@numba.njit(cache=True, nogil=True)
def move_edges(s: State, place: np.ndarray) -> None:
    """Keep the edges of tasks that are not done, each list in its order."""
    moved = np.empty((s.counters[NUM_EDGES], 2), np.int32)
    count = 0
    for task in range(len(place)):
        if place[task] < 0:
            continue
        edge, first = s.node[task, EDGE], count
        while edge >= 0:
            moved[count, 0], moved[count, 1] = count + 1, place[s.edge[edge, 1]]
            count += 1
            edge = s.edge[edge, 0]
        s.node[task, EDGE] = -1
        if count > first:
            s.node[task, EDGE] = first
            moved[count - 1, 0] = -1
    for edge in range(count):
        s.edge[edge, 0], s.edge[edge, 1] = moved[edge, 0], moved[edge, 1]
    s.counters[NUM_EDGES] = count


@numba.njit(cache=True, nogil=True)
def move_rows(s: State, place: np.ndarray) -> None:
    """Move the rows of tasks forward; none moves behind one that is still to be moved."""
    for task in range(len(place)):
        row = place[task]
        if row < 0:
            continue
        for column in range(4):
            s.node[row, column] = s.node[task, column]
        s.node[row, LINK] = renamed(place, s.node[task, LINK])
        s.duration[row], s.priority[row] = s.duration[task], s.priority[task]
        s.ready[row], s.start[row] = s.ready[task], s.start[task]
        if s.counters[IN_HEAPS] == 1:
            for column in range(2):
                s.tree[row, column] = renamed(place, s.tree[task, column])
