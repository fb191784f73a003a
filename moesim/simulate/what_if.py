"""Two passes for policies that do not look at the clock: decide once, then time thousands of machines.

Without prefetching and background copies, nothing of an offloaded layer outlives it: its tasks depend on its router or
on each other, and all lead to the barrier at its end. Then a step takes the sum of its attention, routers, dense parts
and head, which follow one another, plus the time of each layer's own small graph, whatever the machine. Many layers have the
same graph (at one token per step it is told by the number of misses), so each distinct one is run once per machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import CheckError
from moesim.lowering.batch import StepRecord
from moesim.lowering.offload_works import Works, distinct_works
from moesim.lowering.task_arrays import TaskArrays


@dataclass(frozen=True)
class Patterns:
    """Distinct layer graphs, one after the other (see `kernels.what_if.PatternArrays` for the arrays)."""

    offsets: np.ndarray
    work: np.ndarray
    resource: np.ndarray
    unmet: np.ndarray
    child_offsets: np.ndarray
    children: np.ndarray


@dataclass(frozen=True)
class WhatIf:
    """One run's decisions, ready to be timed on any machine of the same parts.

    Attributes:
        works: distinct works; patterns: distinct layer graphs over them.
        step_offsets: int64[step + 1] into `step_pattern`, the patterns of each step's layers.
        serial_offsets: int64[step + 1] into `serial_work` and `serial_count`, what follows one another in a step.
        num_works_of_resource: int64[resource, work], how often each work runs.
    """

    works: Works
    patterns: Patterns
    step_offsets: np.ndarray
    step_pattern: np.ndarray
    serial_offsets: np.ndarray
    serial_work: np.ndarray
    serial_count: np.ndarray
    work_count: np.ndarray

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return len(self.step_offsets) - 1

    def step_ns(self, durations_ns: np.ndarray) -> np.ndarray:
        """Return int64[machine, step], how long each step takes, from int64[machine, work] durations."""
        from moesim.simulate.kernels.what_if import PatternArrays, pattern_times, step_times

        durations = np.ascontiguousarray(durations_ns, np.int64)
        parts = self.patterns
        arrays = PatternArrays(
            *(part.copy() for part in (parts.offsets, parts.work, parts.resource, parts.unmet, parts.child_offsets,
                                       parts.children)))
        times = np.zeros((len(durations), len(parts.offsets) - 1), np.int64)
        pattern_times(arrays, durations, int(self.works.resource.max()) + 1, times)
        result = np.zeros((len(durations), self.num_steps), np.int64)
        step_times(times, durations, self.step_offsets, self.step_pattern, self.serial_offsets, self.serial_work,
                   self.serial_count, result)
        return result

    def busy_ns(self, durations_ns: np.ndarray) -> np.ndarray:
        """Return int64[machine, resource], how long each resource works in all."""
        num_resources = int(self.works.resource.max()) + 1
        runs = np.asarray(durations_ns, np.int64) * self.work_count
        busy = np.zeros((len(runs), num_resources), np.int64)
        for resource in range(num_resources):
            busy[:, resource] = runs[:, self.works.resource == resource].sum(axis=1)
        return busy


def what_if(arrays: TaskArrays, steps: Sequence[StepRecord]) -> WhatIf:
    """Return the decisions of a lowered run.

    Raises:
        CheckError: a task that outlives its layer (a policy that prefetches or copies in the background).
    """
    works = distinct_works(arrays)
    start, end = _blocks(arrays)
    patterns, of_block = _patterns(arrays, works, start, end)
    ends = np.array([record.last_task for record in steps]) + 1
    serial = _serial_tasks(len(arrays), start, end)
    step_of = np.searchsorted(ends, serial, side="right")
    pairs, counts = np.unique(np.stack([step_of, works.of_task[serial]]), axis=1, return_counts=True)
    return WhatIf(
        works, patterns, np.searchsorted(end, np.concatenate([[0], ends])), of_block,
        np.searchsorted(pairs[0], np.arange(len(steps) + 1)), np.ascontiguousarray(pairs[1]), counts.astype(np.int64),
        np.bincount(works.of_task[works.of_task >= 0], minlength=len(works)))


def _blocks(arrays: TaskArrays) -> tuple[np.ndarray, np.ndarray]:
    """First task after each router, and the barrier that ends its layer."""
    routers = np.flatnonzero(arrays.kind == arrays.kinds.index("router"))
    ends = np.flatnonzero((arrays.resource < 0) & (arrays.labels["layer"] >= 0))
    if len(routers) != len(ends) or np.any(routers >= ends) or np.any(routers[1:] <= ends[:-1]):
        raise CheckError("what-if: routers and layer barriers do not alternate")
    return routers + 1, ends


def _serial_tasks(num_tasks: int, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Tasks outside the blocks."""
    inside = np.zeros(num_tasks + 1, np.int64)
    inside[start] += 1
    inside[end + 1] -= 1
    return np.flatnonzero(np.cumsum(inside[:-1]) == 0)


def _patterns(arrays: TaskArrays, works: Works, start: np.ndarray, end: np.ndarray) -> tuple[Patterns, np.ndarray]:
    """Return the distinct blocks, and which one each block is."""
    offsets, counts = arrays.dep_offsets, np.diff(arrays.dep_offsets)
    known: dict[tuple[bytes, bytes, bytes], int] = {}
    of_block = np.zeros(len(start), np.int64)
    members: list[int] = []
    for block, (first, last) in enumerate(zip(start.tolist(), (end + 1).tolist(), strict=True)):
        deps = arrays.deps[offsets[first]:offsets[last]] - first
        key = (works.of_task[first:last].tobytes(), counts[first:last].tobytes(), deps.tobytes())
        of_block[block] = known.setdefault(key, len(known))
        if len(known) > len(members):
            members.append(block)
    return _joined([_pattern(arrays, works, int(start[block]), int(end[block]) + 1) for block in members]), of_block


def _pattern(arrays: TaskArrays, works: Works, first: int, last: int) -> tuple[np.ndarray, ...]:
    """One block as work, resource, unmet, number of children, children; checks that it stands alone."""
    counts = np.diff(arrays.dep_offsets[first:last + 1])
    own = np.repeat(np.arange(last - first), counts)
    deps = arrays.deps[arrays.dep_offsets[first]:arrays.dep_offsets[last]] - first
    if np.any(deps < -1):
        raise CheckError("what-if: a task waits for one of an earlier layer; this run looks at the clock")
    pairs = np.unique(np.stack([deps[deps >= 0], own[deps >= 0]]), axis=1)  # a dependency named twice counts once
    children = np.bincount(pairs[0], minlength=last - first)
    if np.any(children[:-1] == 0) or arrays.resource[last - 1] >= 0:
        raise CheckError("what-if: a task outlives its layer; this run looks at the clock")
    unmet = np.bincount(pairs[1], minlength=last - first)
    return works.of_task[first:last], arrays.resource[first:last], unmet, children, pairs[1]


def _joined(parts: list[tuple[np.ndarray, ...]]) -> Patterns:
    work, resource, unmet, num_children, children = (
        np.concatenate([part[place] for part in parts]).astype(np.int32) for place in range(5))
    offsets = np.concatenate([[0], np.cumsum([len(part[0]) for part in parts])]).astype(np.int64)
    child_offsets = np.concatenate([[0], np.cumsum(num_children)]).astype(np.int64)
    return Patterns(offsets, work, resource, unmet, child_offsets, children)
