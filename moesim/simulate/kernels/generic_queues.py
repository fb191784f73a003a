"""Ready queues: who is next on a resource, by (priority, ready time, task id).

Up to `MAX_CLASSES` priorities: a linked list each. Time only grows, so a list is in order of (ready, id) as long as the
tasks of one instant arrive in order of id. More priorities, or a queued task that is given another one: a pairing
heap per resource (Fredman, Sedgewick, Sleator, Tarjan, Algorithmica 1986), from which any task can be removed.
"""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.kernels.borrow import lowest_bit
from moesim.simulate.kernels.generic_state import (
    BEFORE,
    CHILD,
    CLASS_BITS,
    CODE,
    IN_HEAPS,
    LINK,
    NUM_TOUCHED,
    UNMET,
    State,
    lend,
    resource_of,
)

ONE = np.uint64(1)


@numba.njit(cache=True, nogil=True, inline="always")
def touch(s: State, resource: int) -> None:
    """Have a resource looked at when this instant dispatches."""
    if s.touched[resource] == 0:
        s.touched[resource] = 1
        s.touch[s.counters[NUM_TOUCHED]] = resource
        s.counters[NUM_TOUCHED] += 1


@numba.njit(cache=True, nogil=True, inline="always")
def push(s: State, task: int) -> None:
    """Queue a ready task that was not cancelled meanwhile; those of one instant must come in order of id."""
    if s.node[task, UNMET] != 0:
        return
    resource = resource_of(s, task)
    if s.counters[IN_HEAPS] == 1:
        push_heap(s, resource, task)
    else:
        code = s.node[task, CODE]
        last = s.ends[code, 1]
        s.node[task, LINK] = -1
        if last < 0:
            s.ends[code, 0] = task
            s.waiting[resource] |= ONE << np.uint64(code - (resource << s.counters[CLASS_BITS]))
        else:
            s.node[last, LINK] = task
        s.ends[code, 1] = task
    if s.free[resource] > 0:
        touch(s, resource)


@numba.njit(cache=True, nogil=True, inline="always")
def pop(s: State, resource: int) -> int:
    """Take the next task of a resource; -1 if none is ready. Lists still hold what was cancelled, heaps do not."""
    if s.counters[IN_HEAPS] == 1:
        return pop_heap(s, resource)
    task = pop_list(s, resource)
    while task >= 0 and s.node[task, UNMET] != 0:
        task = pop_list(s, resource)
    return task


@numba.njit(cache=True, nogil=True, inline="always")
def pop_list(s: State, resource: int) -> int:
    """Take the first task of the most urgent list of a resource, or return -1."""
    waiting = s.waiting[resource]
    if waiting == 0:
        return -1
    code = (resource << s.counters[CLASS_BITS]) | lowest_bit(waiting)
    task = s.ends[code, 0]
    following = s.node[task, LINK]
    s.ends[code, 0] = following
    if following < 0:
        s.ends[code, 1] = -1
        s.waiting[resource] = waiting & (waiting - ONE)
    return task


# ---------------------------------------------------------------- heaps


@numba.njit(cache=True, nogil=True, inline="always")
def meld(s: State, one: int, other: int) -> int:
    """Join two heaps and return the root; a root's link and `BEFORE` mean nothing."""
    if one < 0 or other < 0:
        return max(one, other)
    key = (s.priority[one], s.ready[one], one)
    if (s.priority[other], s.ready[other], other) < key:
        one, other = other, one
    child = s.tree[one, CHILD]
    s.node[other, LINK] = child
    s.tree[other, BEFORE] = one
    if child >= 0:
        s.tree[child, BEFORE] = other
    s.tree[one, CHILD] = other
    return one


@numba.njit(cache=True, nogil=True)
def meld_siblings(owned: State, first: int) -> int:
    """Join a chain of siblings: neighbours in pairs, then the pairs from the last to the first."""
    s = lend(owned)
    pairs = -1
    while first >= 0:
        second = s.node[first, LINK]
        rest = s.node[second, LINK] if second >= 0 else -1
        pair = meld(s, first, second)
        s.node[pair, LINK] = pairs
        pairs, first = pair, rest
    root = -1
    while pairs >= 0:
        rest = s.node[pairs, LINK]
        root = meld(s, root, pairs)
        pairs = rest
    return root


@numba.njit(cache=True, nogil=True, inline="always")
def push_heap(s: State, resource: int, task: int) -> None:
    """Put a task into the heap of its resource."""
    s.tree[task, CHILD] = -1
    s.roots[resource] = meld(s, s.roots[resource], task)


@numba.njit(cache=True, nogil=True, inline="always")
def pop_heap(s: State, resource: int) -> int:
    """Take the least task of a resource's heap, or return -1."""
    task = s.roots[resource]
    if task >= 0:
        s.roots[resource] = meld_siblings(s, s.tree[task, CHILD])
    return task


@numba.njit(cache=True, nogil=True)
def remove(owned: State, resource: int, task: int) -> None:
    """Take any task out of a resource's heap."""
    s = lend(owned)
    if s.roots[resource] == task:
        pop_heap(s, resource)
        return
    before, following = s.tree[task, BEFORE], s.node[task, LINK]
    if s.tree[before, CHILD] == task:
        s.tree[before, CHILD] = following
    else:
        s.node[before, LINK] = following
    if following >= 0:
        s.tree[following, BEFORE] = before
    s.roots[resource] = meld(s, s.roots[resource], meld_siblings(s, s.tree[task, CHILD]))


@numba.njit(cache=True, nogil=True)
def lists_to_heaps(owned: State) -> None:
    """Go over to heaps, for good; `tree` has room for every task."""
    s = lend(owned)
    for code in range(len(s.ends)):
        task = s.ends[code, 0]
        while task >= 0:
            following = s.node[task, LINK]
            if s.node[task, UNMET] == 0:
                push_heap(s, code >> s.counters[CLASS_BITS], task)
            task = following
    s.ends[:] = -1
    s.waiting[:] = 0
    s.counters[IN_HEAPS] = 1


@numba.njit(cache=True, nogil=True)
def withdraw(owned: State, task: int) -> None:
    """Take a task that is queued in a heap out of it."""
    s = lend(owned)
    remove(s, resource_of(s, task), task)


@numba.njit(cache=True, nogil=True)
def change_priority(owned: State, task: int, priority: int) -> None:
    """Move a task that is queued in a heap to the place of another priority."""
    s = lend(owned)
    resource = resource_of(s, task)
    remove(s, resource, task)
    s.priority[task] = priority
    push_heap(s, resource, task)


# ---------------------------------------------------------------- priority classes


@numba.njit(cache=True, nogil=True)
def new_priorities(classes: np.ndarray, num_classes: int, priority: np.ndarray, found: np.ndarray) -> int:
    """Put the priorities that have no class into `found`, each once, until it is full; returns their number."""
    count = 0
    for row in range(len(priority)):
        value, known = priority[row], False
        for place in range(num_classes):
            known |= classes[place] == value
        for place in range(count):
            known |= found[place] == value
        if not known:
            found[count] = value
            count += 1
            if count == len(found):
                break
    return count
