"""TaskGraph: what must happen, on which resource, after what. The one program of all executors.

A program is a generator. It adds tasks to the graph, then yields the id of a task: the executor runs on
and resumes the generator at the instant that task completes. So decisions that depend on simulated
time (did this prefetch land before the router finished?) fall when the time is known. They read state
by value through `ExecutorView` ("finished by now"), never by which event happened to fire first.

The tie rule is part of the model: at one instant all completions come first, then the program's
decisions, then each resource dispatches by (priority, ready time, task id). A task that has started is
never preempted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from moesim.errors import CheckError

NONE = -1

PRIORITY_COMPUTE = 0
PRIORITY_DEMAND = 0
PRIORITY_ADMIT = 1
PRIORITY_PREFETCH = 2

# Kinds. `barrier` has no resource and takes no time.
KINDS = (
    "barrier",
    "attention",
    "router",
    "dense",
    "shared_expert",
    "counts",
    "balance",
    "dispatch",
    "weights",
    "experts",
    "combine",
    "all_gather",
    "expert",
    "cpu_expert",
    "load",
    "prefetch",
    "admit",
    "send",
    "receive",
    "head",
    "latency",
    "write_back",
    "dequantize",
)

LABELS = ("rank", "step", "layer", "expert", "slot", "chunk", "tokens", "context", "num_bytes")


@dataclass(frozen=True)
class Resource:
    """Something that runs one task at a time (`capacity` lanes run as many).

    `group` names the process row of a timeline (``gpu0``, ``node0``), `lane` the row inside it.
    """

    name: str
    group: str
    lane: str
    capacity: int = 1


@dataclass
class TaskGraph:
    """Columns of tasks; a task's id is its row. Rows are only ever added.

    Attributes:
        resources: the resources that tasks name by index.
        kind, resource, duration_ns, priority, source: one entry per task. `resource` is -1 for a barrier.
        deps: ids of tasks that must complete first; always smaller than the task's own id (acyclic).
        labels: int columns named in `LABELS`, -1 where they do not apply (`tokens`, `context`, `num_bytes`: 0).
        flops: float per task.
    """

    resources: tuple[Resource, ...]
    kind: list[str] = field(default_factory=list)
    resource: list[int] = field(default_factory=list)
    duration_ns: list[int] = field(default_factory=list)
    priority: list[int] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    deps: list[tuple[int, ...]] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    labels: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in LABELS})

    def __len__(self) -> int:
        return len(self.kind)

    def add(
        self,
        kind: str,
        resource: int,
        duration_ns: int,
        deps: Sequence[int] = (),
        *,
        priority: int = 0,
        source: str = "",
        flops: float = 0.0,
        rank: int = NONE,
        step: int = NONE,
        layer: int = NONE,
        expert: int = NONE,
        slot: int = NONE,
        chunk: int = NONE,
        tokens: int = 0,
        context: int = 0,
        num_bytes: int = 0,
    ) -> int:
        """Add one task and return its id. A task on a resource takes at least 1 ns."""
        task = len(self.kind)
        if any(not 0 <= dep < task for dep in deps):
            raise CheckError(f"task {task} ({kind}) waits for {list(deps)}; a task may only wait for earlier ones")
        self.kind.append(kind)
        self.resource.append(resource)
        self.duration_ns.append(0 if resource < 0 else max(1, int(duration_ns)))
        self.priority.append(priority)
        self.source.append(source)
        self.deps.append(tuple(deps))
        self.flops.append(flops)
        row = (rank, step, layer, expert, slot, chunk, tokens, context, num_bytes)
        for name, value in zip(LABELS, row, strict=True):
            self.labels[name].append(int(value))
        return task

    def barrier(self, deps: Sequence[int], *, step: int = NONE, layer: int = NONE) -> int:
        """Add a task that completes at the instant when all of `deps` have."""
        return self.add("barrier", NONE, 0, deps, step=step, layer=layer)

    def column(self, name: str) -> np.ndarray:
        """Return int64[task] of a label."""
        return np.asarray(self.labels[name], dtype=np.int64)


class ExecutorView(Protocol):
    """What a program may ask an executor for when it is resumed."""

    @property
    def now_ns(self) -> int:
        """The current time."""

    def is_done(self, task: int) -> bool:
        """Whether a task has completed by now."""

    def is_started(self, task: int) -> bool:
        """Whether a task has been dispatched to its resource (and so can no longer be cancelled)."""

    def cancel(self, task: int) -> None:
        """Withdraw a task that has not started; nothing may wait for it."""

    def set_priority(self, task: int, priority: int) -> None:
        """Change the priority of a task that has not started."""


class Program(Protocol):
    """A lowered scenario: a graph that grows while it is executed."""

    graph: TaskGraph

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Add tasks, yield the task to wait for, go on; return when no more tasks will come."""
