"""The compiled executor's loop: completions of an instant, then dispatch; it stops where the program decides.

One instant after the other, by the tie rule of `moesim.lowering.graph`. The order within the completions of an
instant does not matter, since what they make ready is put in order of task id before it is queued.
"""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.kernels.generic_queues import pop, push, touch
from moesim.simulate.kernels.generic_state import (
    BARRIER,
    BEFORE,
    CHILD,
    CLASS_BITS,
    CODE,
    EDGE,
    IN_HEAPS,
    LINK,
    NOW,
    NUM_CLASSES,
    NUM_EDGES,
    NUM_RUNNING,
    NUM_TASKS,
    NUM_TOUCHED,
    NUM_WOKEN,
    UNMET,
    State,
    is_done,
    lend,
    resource_of,
)


@numba.njit(cache=True, nogil=True)
def advance(owned: State, first: int, awaited: int) -> bool:
    """Go on at the present instant with the new tasks from `first` on, until the program decides or nothing runs.

    Returns:
        whether `awaited` (-1: none) is done; if not, nothing is left that could run.
    """
    s = lend(owned)
    for task in range(first, s.counters[NUM_TASKS]):
        if s.node[task, UNMET] == 0 and s.ready[task] < 0:
            wake(s, task)
    complete_barriers(s)
    while not (awaited >= 0 and is_done(s, awaited)):
        queue_woken(s)
        dispatch(s)
        if s.counters[NUM_RUNNING] == 0:
            return False
        complete_next(s)
        complete_barriers(s)
    return True


# ---------------------------------------------------------------- completions


@numba.njit(cache=True, nogil=True, inline="always")
def complete_next(s: State) -> None:
    """Go to the next instant at which something ends, and end it."""
    now = s.running[0, 0]
    s.counters[NOW] = now
    while s.counters[NUM_RUNNING] > 0 and s.running[0, 0] == now:
        task = pop_running(s)
        resource = resource_of(s, task)
        s.free[resource] += 1
        touch(s, resource)
        release(s, task)


@numba.njit(cache=True, nogil=True, inline="always")
def complete_barriers(s: State) -> None:
    """End the barriers that became ready, and those that become ready by that."""
    while s.counters[BARRIER] >= 0:
        barrier = s.counters[BARRIER]
        s.counters[BARRIER] = s.node[barrier, LINK]
        release(s, barrier)


@numba.njit(cache=True, nogil=True, inline="always")
def release(s: State, task: int) -> None:
    """Count a completed task off those that wait for it."""
    edge = s.node[task, EDGE]
    while edge >= 0:
        child = s.edge[edge, 1]
        unmet = s.node[child, UNMET] - 1
        s.node[child, UNMET] = unmet
        if unmet == 0:
            wake(s, child)
        edge = s.edge[edge, 0]


@numba.njit(cache=True, nogil=True, inline="always")
def wake(s: State, task: int) -> None:
    """A task is ready now: a barrier completes (its children are released later), another will be queued."""
    now = s.counters[NOW]
    s.ready[task] = now
    if s.node[task, CODE] < 0:
        s.start[task] = now
        s.node[task, LINK] = s.counters[BARRIER]
        s.counters[BARRIER] = task
    else:
        s.woken[s.counters[NUM_WOKEN]] = task
        s.counters[NUM_WOKEN] += 1


# ---------------------------------------------------------------- dispatch


@numba.njit(cache=True, nogil=True, inline="always")
def queue_woken(s: State) -> None:
    """Queue what became ready at this instant, in order of id."""
    count = s.counters[NUM_WOKEN]
    for place in range(1, count):
        if s.woken[place] < s.woken[place - 1]:
            sort(s.woken[:count])
            break
    for place in range(count):
        push(s, s.woken[place])
    s.counters[NUM_WOKEN] = 0


@numba.njit(cache=True, nogil=True)
def sort(tasks: np.ndarray) -> None:
    """Sort task ids in place: Shell's method, which for a few is insertion (`ndarray.sort` takes seconds to compile)."""
    gap = 1
    while 3 * gap + 1 < len(tasks):
        gap = 3 * gap + 1
    while gap > 0:
        for place in range(gap, len(tasks)):
            task, hole = tasks[place], place
            while hole >= gap and tasks[hole - gap] > task:
                tasks[hole] = tasks[hole - gap]
                hole -= gap
            tasks[hole] = task
        gap //= 3


@numba.njit(cache=True, nogil=True, inline="always")
def dispatch(s: State) -> None:
    """Start tasks on every resource that has a free lane and was touched."""
    now = s.counters[NOW]
    for place in range(s.counters[NUM_TOUCHED]):
        resource = s.touch[place]
        s.touched[resource] = 0
        while s.free[resource] > 0:
            task = pop(s, resource)
            if task < 0:
                break
            s.free[resource] -= 1
            s.start[task] = now
            push_running(s, now + s.duration[task], task)
    s.counters[NUM_TOUCHED] = 0


@numba.njit(cache=True, nogil=True, inline="always")
def push_running(s: State, end: int, task: int) -> None:
    """Add a running task to the heap of ends."""
    count = s.counters[NUM_RUNNING]
    s.counters[NUM_RUNNING] = count + 1
    rise(s, count, end, task)


@numba.njit(cache=True, nogil=True, inline="always")
def pop_running(s: State) -> int:
    """Take the task that ends first from the heap of ends: its place sinks to a leaf, which the last entry takes.

    An entry that was last belongs near the leaves, so this compares less than to let it sink from the root.
    """
    first = s.running[0, 1]
    count = s.counters[NUM_RUNNING] - 1
    s.counters[NUM_RUNNING] = count
    place, below = 0, 1
    while below < count:
        below += s.running[below + 1, 0] < s.running[below, 0]  # below + 1 exists: the last entry is still there
        s.running[place, 0], s.running[place, 1] = s.running[below, 0], s.running[below, 1]
        place, below = below, 2 * below + 1
    rise(s, place, s.running[count, 0], s.running[count, 1])
    return first


@numba.njit(cache=True, nogil=True, inline="always")
def rise(s: State, place: int, end: int, task: int) -> None:
    """Put an entry at a leaf's place and let it rise to where it belongs."""
    while place > 0:
        above = (place - 1) >> 1
        if s.running[above, 0] <= end:
            break
        s.running[place, 0], s.running[place, 1] = s.running[above, 0], s.running[above, 1]
        place = above
    s.running[place, 0], s.running[place, 1] = end, task


# ---------------------------------------------------------------- new tasks


@numba.njit(cache=True, nogil=True)
def register(owned: State, resource: np.ndarray, duration: np.ndarray, priority: np.ndarray, offsets: np.ndarray,
             deps: np.ndarray) -> None:
    """Take over new tasks, whose priorities have a class and for which there is room; none becomes ready yet.

    The columns are those of `TaskArrays`, but `deps` names rows of the state; -1 is a task that is done and gone.
    """
    s = lend(owned)
    old = s.counters[NUM_TASKS]
    for row in range(len(resource)):
        task = old + row
        s.node[task, CODE] = -1
        if resource[row] >= 0:
            s.node[task, CODE] = (resource[row] << s.counters[CLASS_BITS]) | class_of(s, priority[row])
        s.node[task, LINK] = s.node[task, EDGE] = -1
        s.duration[task], s.priority[task] = duration[row], priority[row]
        s.ready[task] = s.start[task] = -1
        if s.counters[IN_HEAPS] == 1:
            s.tree[task, CHILD] = s.tree[task, BEFORE] = -1
    for row in range(len(resource) - 1, -1, -1):  # backwards, so that the edges of a task come in order of id
        unmet = 0
        for place in range(offsets[row], offsets[row + 1]):
            dep = deps[place]
            if dep >= 0 and not is_done(s, dep):
                add_edge(s, dep, old + row)
                unmet += 1
        s.node[old + row, UNMET] = unmet
    s.counters[NUM_TASKS] = old + len(resource)


@numba.njit(cache=True, nogil=True, inline="always")
def add_edge(s: State, dep: int, task: int) -> None:
    """Have a task wait for another."""
    edge = s.counters[NUM_EDGES]
    s.edge[edge, 0], s.edge[edge, 1] = s.node[dep, EDGE], task
    s.node[dep, EDGE] = edge
    s.counters[NUM_EDGES] = edge + 1


@numba.njit(cache=True, nogil=True, inline="always")
def class_of(s: State, priority: int) -> int:
    """Return the class of a known priority; with heaps there are no classes."""
    smaller = 0
    if s.counters[IN_HEAPS] == 0:
        for place in range(s.counters[NUM_CLASSES]):
            smaller += s.classes[place] < priority
    return smaller
