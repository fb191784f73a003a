"""What every executor shares: the state of each task, the queues, and the program's turn.

An executor brings a clock and a way to spend a task's time. It calls `advance` when the program may
decide, `pop` when a resource has a free lane, `complete` when a task has ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from moesim.errors import CheckError
from moesim.lowering.graph import Program
from moesim.lowering.task_arrays import arrays_of
from moesim.simulate.execution import Execution
from moesim.simulate.result import CANCELLED, DONE

_WAITING, _READY, _RUNNING, _DONE, _CANCELLED = range(5)


class Scheduler:
    """Bookkeeping of one run of one program; the program's `ExecutorView`.

    A queue holds (priority, ready time, task id). An entry whose task was cancelled or given another
    priority is stale and is skipped when it comes to the front.
    """

    def __init__(self, program: Program, clock: Callable[[], int]) -> None:
        self.graph = program.graph
        self._clock = clock
        self._queues: list[list[tuple[int, int, int]]] = [[] for _ in self.graph.resources]
        self._phase: list[int] = []
        self._unmet: list[int] = []
        self._children: list[list[int]] = []
        self._priority: list[int] = []
        self._ready: list[int] = []
        self._start: list[int] = []
        self._end: list[int] = []
        self._program = program.decisions(self)
        self._awaited: int | None = None
        self._resume = True

    @property
    def now_ns(self) -> int:
        """The current time."""
        return self._clock()

    def _live(self) -> list[int]:
        return [task for task, phase in enumerate(self._phase) if phase not in (_DONE, _CANCELLED)]

    def is_done(self, task: int) -> bool:
        """Whether a task has completed by now."""
        return task < len(self._phase) and self._phase[task] == _DONE

    def is_started(self, task: int) -> bool:
        """Whether a task has been dispatched."""
        return task < len(self._phase) and self._phase[task] in (_RUNNING, _DONE)

    def cancel(self, task: int) -> None:
        """Withdraw a task that has not started and that no live task waits for."""
        self._register_new()
        if self.is_started(task):
            raise CheckError(f"task {task} cannot be cancelled: it has started")
        if self._phase[task] == _CANCELLED:
            raise CheckError(f"task {task} cannot be cancelled: it has been already")
        live = [child for child in self._children[task] if self._phase[child] != _CANCELLED]
        if live:
            raise CheckError(f"task {task} cannot be cancelled: tasks {live} wait for it")
        self._phase[task] = _CANCELLED

    def set_priority(self, task: int, priority: int) -> None:
        """Change the priority of a task that has not started."""
        self._register_new()
        if self.is_started(task):
            raise CheckError(f"task {task} has started; its priority is fixed")
        self._priority[task] = priority
        if self._phase[task] == _READY:
            heapq.heappush(self._queues[self.graph.resource[task]], (priority, self._ready[task], task))

    def advance(self) -> None:
        """Let the program decide for as long as the task it awaits is done; take over what it adds."""
        while self._resume:
            self._resume = False
            first = len(self._phase)
            self._awaited = next(self._program, None)
            self._register_new()
            for task in range(first, len(self.graph)):
                if self._unmet[task] == 0 and self._phase[task] == _WAITING:
                    self._settle([task])
            self._resume = self._awaited is not None and self.is_done(self._awaited)

    def _register_new(self) -> None:
        """Take over what the program has added (in its turn, too: it may cancel what it has just added)."""
        for task in range(len(self._phase), len(self.graph)):
            self._register(task)

    def _register(self, task: int) -> None:
        unmet = [dep for dep in set(self.graph.deps[task]) if self._phase[dep] != _DONE]
        for dep in unmet:
            self._children[dep].append(task)
        self._phase.append(_WAITING)
        self._unmet.append(len(unmet))
        self._children.append([])
        self._priority.append(self.graph.priority[task])
        for column in (self._ready, self._start, self._end):
            column.append(-1)

    def pop(self, resource: int) -> int | None:
        """Dispatch the front of a resource's queue: its start is now. None if nothing is ready."""
        if not self.has_ready(resource):
            return None
        _, _, task = heapq.heappop(self._queues[resource])
        self._phase[task] = _RUNNING
        self._start[task] = self.now_ns
        return task

    def has_ready(self, resource: int) -> bool:
        """Whether a task could be dispatched; drops stale entries from the front of the queue."""
        queue = self._queues[resource]
        while queue:
            priority, _, task = queue[0]
            if self._phase[task] == _READY and self._priority[task] == priority:
                return True
            heapq.heappop(queue)
        return False

    def complete(self, task: int) -> None:
        """A running task ends now; whatever waited only for it becomes ready (barriers complete at once)."""
        self._phase[task] = _DONE
        self._end[task] = self.now_ns
        self._resume = self._resume or task == self._awaited
        woken = []
        for child in self._children[task]:
            self._unmet[child] -= 1
            if self._unmet[child] == 0 and self._phase[child] == _WAITING:
                woken.append(child)
        self._settle(woken)

    def _settle(self, tasks: list[int]) -> None:
        """Queue tasks whose last dependency is met."""
        for task in tasks:
            self._ready[task] = self.now_ns
            resource = self.graph.resource[task]
            if resource < 0:
                self._start[task] = self._ready[task]
                self.complete(task)
            else:
                self._phase[task] = _READY
                heapq.heappush(self._queues[resource], (self._priority[task], self._ready[task], task))

    def execution(self) -> Execution:
        """Return what became of every task.

        Raises:
            CheckError: tasks that never ran (they wait for one that was cancelled).
        """
        check_all_ran(self._live(), self._awaited)
        state = np.where(np.asarray(self._phase, dtype=np.int64) == _DONE, DONE, CANCELLED).astype(np.int8)
        ready, start, end, priority = (
            np.asarray(column, dtype=np.int64) for column in (self._ready, self._start, self._end, self._priority))
        return Execution(arrays_of(self.graph), ready, start, end, priority, state)

    def table(self) -> pd.DataFrame:
        """Return the ``tasks`` table; raises as `execution`."""
        return self.execution().table()


def check_all_ran(stuck: Sequence[int], awaited: int | None) -> None:
    """Raise CheckError if tasks were left when nothing could run any more, or the program still waits for one."""
    if len(stuck) or awaited is not None:
        raise CheckError(
            f"{len(stuck)} tasks never ran, the first are {list(stuck[:3])}; the program waits for {awaited}"
        )
