"""TaskArrays: a window of tasks as columns; what compiled lowerings hand to compiled executors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import CheckError
from moesim.hardware.work import SOURCES
from moesim.lowering.graph import KINDS, LABELS, Resource, TaskGraph

SOURCE_NAMES = ("", *SOURCES)


@dataclass(frozen=True)
class TaskArrays:
    """The tasks ``first ... first + n - 1`` of a program, column by column; the same facts as `TaskGraph`.

    Attributes:
        resources: as in `TaskGraph`.
        kinds, sources: the names behind the codes in `kind` and `source`.
        kind: int16[task]; source: int16[task].
        resource: int32[task], -1 for a barrier (whose duration is 0).
        duration_ns, priority: int64[task].
        dep_offsets: int64[task + 1]; task i waits for ``deps[dep_offsets[i]:dep_offsets[i + 1]]``.
        deps: int64[...], ids of earlier tasks, of this window or of one before it.
        flops: float64[task]. labels: int64[task] for each name in `LABELS`.
        first: id of the first task.

    Raises:
        CheckError: columns of different lengths, a task that waits for itself or a later one, a task on a
            resource that takes no time.
    """

    resources: tuple[Resource, ...]
    kind: np.ndarray
    resource: np.ndarray
    duration_ns: np.ndarray
    priority: np.ndarray
    source: np.ndarray
    dep_offsets: np.ndarray
    deps: np.ndarray
    flops: np.ndarray
    labels: dict[str, np.ndarray]
    kinds: tuple[str, ...] = KINDS
    sources: tuple[str, ...] = SOURCE_NAMES
    first: int = 0

    def __post_init__(self) -> None:
        size = len(self.kind)
        columns = (self.resource, self.duration_ns, self.priority, self.source, self.flops, *self.labels.values())
        if any(len(column) != size for column in columns) or len(self.dep_offsets) != size + 1:
            raise CheckError(f"task columns disagree: {size} kinds, but {[len(column) for column in columns]} others")
        if tuple(self.labels) != LABELS:
            raise CheckError(f"task labels must be {', '.join(LABELS)}, got {', '.join(self.labels)}")
        own = np.repeat(np.arange(self.first, self.first + size), np.diff(self.dep_offsets))
        if len(own) != len(self.deps) or np.any(self.deps >= own) or np.any(self.deps < 0):
            raise CheckError("a task may only wait for earlier ones")
        if np.any((self.duration_ns < 1) & (self.resource >= 0)):
            raise CheckError("a task on a resource takes at least 1 ns")

    def __len__(self) -> int:
        return len(self.kind)


def arrays_of(graph: TaskGraph, first: int = 0) -> TaskArrays:
    """Return the tasks of a graph from `first` on as columns."""
    kinds, kind = _coded(graph.kind[first:], KINDS)
    sources, source = _coded(graph.source[first:], SOURCE_NAMES)
    deps = graph.deps[first:]
    counts = np.fromiter(map(len, deps), np.int64, len(deps))
    return TaskArrays(
        graph.resources, kind, np.asarray(graph.resource[first:], np.int32),
        np.asarray(graph.duration_ns[first:], np.int64), np.asarray(graph.priority[first:], np.int64), source,
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.fromiter((dep for row in deps for dep in row), np.int64, int(counts.sum())),
        np.asarray(graph.flops[first:], np.float64),
        {name: np.asarray(graph.labels[name][first:], np.int64) for name in LABELS}, kinds, sources, first)


def _coded(names: Sequence[str], known: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names and int16 codes; names that are not `known` get the next free codes."""
    code = {name: place for place, name in enumerate(known)}
    codes = np.fromiter((code.setdefault(name, len(code)) for name in names), np.int16, len(names))
    return tuple(code), codes
