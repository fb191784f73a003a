"""The walk along a critical path, and what ran before what on one resource."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from moesim.simulate.kernels.borrow import borrow


class Run(NamedTuple):
    """Columns of a run: resource int32[task], kind int16[task], start, end int64[task], done bool[task],
    offsets int64[task + 1] and deps int64[...] as in `TaskArrays`; by_end int64[...], the tasks done on resource r,
    in order of their ends, at ``first[r]:first[r + 1]``.
    """

    resource: np.ndarray
    kind: np.ndarray
    start: np.ndarray
    end: np.ndarray
    done: np.ndarray
    offsets: np.ndarray
    deps: np.ndarray
    by_end: np.ndarray
    first: np.ndarray


@numba.njit(cache=True, nogil=True)
def by_resource(resource: np.ndarray, end: np.ndarray, done: np.ndarray, by_end: np.ndarray, first: np.ndarray,
                in_order: np.ndarray) -> None:
    """Fill `by_end` and `first` with tasks in order of id; in_order bool[resource]: that is the order of their ends."""
    first[:] = 0
    for task in range(len(resource)):
        if done[task] and resource[task] >= 0:
            first[resource[task] + 1] += 1
    for place in range(1, len(first)):
        first[place] += first[place - 1]
    filled = first[:-1].copy()
    in_order[:] = True
    for task in range(len(resource)):
        if done[task] and resource[task] >= 0:
            place = filled[resource[task]]
            if place > first[resource[task]] and end[by_end[place - 1]] > end[task]:
                in_order[resource[task]] = False
            by_end[place] = task
            filled[resource[task]] = place + 1


@numba.njit(cache=True, nogil=True, inline="always")
def before_on_resource(run: Run, task: int) -> int:
    """Return the task on the same resource with the latest end not after this one's start, or -1."""
    resource = run.resource[task]
    if resource < 0 or not run.done[task]:
        return -1
    low, high = run.first[resource], run.first[resource + 1]
    bottom = low
    while low < high:
        middle = (low + high) >> 1
        if run.end[run.by_end[middle]] <= run.start[task]:
            low = middle + 1
        else:
            high = middle
    found = run.by_end[low - 1] if low > bottom else -1
    return -1 if found == task else found


@numba.njit(cache=True, nogil=True, inline="always")
def latest_before(run: Run, task: int) -> int:
    """Return what a task came after: of its dependencies and the one before it on its resource the last to end, or -1."""
    latest = before_on_resource(run, task)
    for place in range(run.offsets[task], run.offsets[task + 1]):
        dep = run.deps[place]
        if latest < 0 or (run.end[dep], dep) > (run.end[latest], latest):
            latest = dep
    return latest


@numba.njit(cache=True, nogil=True)
def walk(owned: Run, task: int, origin: int, spent: np.ndarray, waited: np.ndarray) -> None:
    """Walk back from a task to the instant `origin`.

    Args:
        spent: int64[resource (barriers last), kind, 2], time and number of tasks. waited: int64[2], the same for gaps.
    """
    run = Run(borrow(owned.resource), borrow(owned.kind), borrow(owned.start), borrow(owned.end), borrow(owned.done),
              borrow(owned.offsets), borrow(owned.deps), borrow(owned.by_end), borrow(owned.first))
    cursor = run.end[task]
    while cursor > origin:
        if cursor > run.start[task]:
            resource = run.resource[task] if run.resource[task] >= 0 else len(spent) - 1
            spent[resource, run.kind[task], 0] += cursor - run.start[task]
            spent[resource, run.kind[task], 1] += 1
            cursor = run.start[task]
        task = latest_before(run, task)
        if task < 0:
            waited[0] += cursor - origin
            return
        if cursor > run.end[task]:
            waited[0] += cursor - run.end[task]
            waited[1] += 1
            cursor = run.end[task]
