"""What the compiled executor knows of a run, as arrays: tasks, edges, queues, what runs now."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from moesim.simulate.kernels.borrow import borrow

# columns of `node`; a link is the next task of a queue, of the stack of barriers, or the next sibling in a heap
CODE, UNMET, LINK, EDGE = range(4)
# columns of `tree`
CHILD, BEFORE = range(2)
# entries of `counters`
NOW, NUM_TASKS, NUM_EDGES, NUM_RUNNING, NUM_WOKEN, NUM_TOUCHED, BARRIER, CLASS_BITS, NUM_CLASSES, IN_HEAPS = range(10)
NUM_COUNTERS = 10
CANCELLED_UNMET = 1 << 30  # `unmet` of a cancelled task: never counts down to 0
MAX_CLASSES = 64


class State(NamedTuple):
    """Arrays of one run; those per task and per edge have room for more than there are.

    Attributes:
        node: int32[task, 4]: ``resource << class bits | priority class`` (-1 for a barrier), dependencies unmet, a
            link, the first edge to a task that waits for this one.
        duration, priority, ready, start: int64[task]; -1 for a time that has not come.
        edge: int32[edge, 2]: the next edge of the same dependency, and the task that waits.
        woken: int32[task]: what became ready at this instant and is not queued yet.
        tree: int32[task, 2]: first child, and previous sibling or parent, in the heap of a resource.
        free: int32[resource], lanes; touched: uint8[resource]; touch: int32[resource], whom to dispatch.
        waiting: uint64[resource], a bit for each priority class with a queue; roots: int32[resource], of heaps.
        ends: int32[resource << class bits | class, 2]: first and last of a queue.
        classes: int64[MAX_CLASSES]: the priority of each class, ascending.
        running: int64[lane, 2]: a binary heap of (end, task).
        counters: int64[NUM_COUNTERS].
    """

    node: np.ndarray
    duration: np.ndarray
    priority: np.ndarray
    ready: np.ndarray
    start: np.ndarray
    edge: np.ndarray
    woken: np.ndarray
    tree: np.ndarray
    free: np.ndarray
    touched: np.ndarray
    touch: np.ndarray
    waiting: np.ndarray
    roots: np.ndarray
    ends: np.ndarray
    classes: np.ndarray
    running: np.ndarray
    counters: np.ndarray


@numba.njit(cache=True, nogil=True, inline="always")
def lend(owned: State) -> State:
    """Return the same arrays without reference counts, for the length of one compiled call."""
    return State(
        borrow(owned.node), borrow(owned.duration), borrow(owned.priority), borrow(owned.ready), borrow(owned.start),
        borrow(owned.edge), borrow(owned.woken), borrow(owned.tree), borrow(owned.free), borrow(owned.touched),
        borrow(owned.touch), borrow(owned.waiting), borrow(owned.roots), borrow(owned.ends), borrow(owned.classes),
        borrow(owned.running), borrow(owned.counters))


@numba.njit(cache=True, nogil=True, inline="always")
def is_done(s: State, task: int) -> bool:
    """Whether a task has completed by now."""
    return s.start[task] >= 0 and s.start[task] + s.duration[task] <= s.counters[NOW]


@numba.njit(cache=True, nogil=True, inline="always")
def resource_of(s: State, task: int) -> int:
    """Return the resource of a task that is no barrier."""
    return s.node[task, CODE] >> s.counters[CLASS_BITS]
