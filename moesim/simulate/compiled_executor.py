"""The compiled executor: what SimPy gives, row for row, from loops over arrays.

A static graph is one compiled call. A program that decides as it goes runs compiled from one decision to the next; its
decisions are made in Python, and the tasks of each are taken over as columns. `moesim.simulate.windows` runs what
is too long to hold.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import pandas as pd

from moesim.errors import CheckError
from moesim.lowering.graph import Program, TaskGraph
from moesim.lowering.task_arrays import TaskArrays, arrays_of
from moesim.simulate.compiled_engine import Engine, Rows, rows_of
from moesim.simulate.execution import Execution
from moesim.simulate.result import CANCELLED, DONE
from moesim.simulate.scheduler import check_all_ran


def run_compiled(program: Program) -> pd.DataFrame:
    """Run any program and return its ``tasks`` table; raises as `execute_program`."""
    return execute_program(program).table()


def execute_program(program: Program) -> Execution:
    """Run any program (integer nanoseconds).

    Raises:
        CheckError: tasks that can never run, a cancellation or a priority that comes too late.
    """
    return CompiledExecutor(program).run()


def execute_arrays(arrays: TaskArrays) -> Execution:
    """Run a graph that is known from the start.

    Raises:
        CheckError: tasks that do not begin at 0, or on a resource that does not exist.
    """
    if arrays.first:
        raise CheckError(f"a graph that is run by itself begins with task 0, not with {arrays.first}")
    engine = Engine(arrays.resources)
    engine.register(rows_of(arrays))
    engine.advance(0, -1)
    ready, start, end, priority, _ = engine.columns()
    check_all_ran(np.flatnonzero(start < 0).tolist(), None)
    return Execution(arrays, ready, start, end, priority, np.full(len(arrays), DONE, np.int8))


class CompiledExecutor:
    """Runs one program once; the program's `ExecutorView`."""

    def __init__(self, program: Program) -> None:
        self.graph = program.graph
        self._engine = Engine(program.graph.resources)
        self._program = program.decisions(self)
        self._awaited: int | None = None
        self._look()

    def run(self) -> Execution:
        """Run to the end."""
        resume = True
        while resume:
            first = len(self._start)
            self._awaited = next(self._program, None)
            self._register_new()
            resume = self._engine.advance(first, self._awaited_row())
            self._look()
        return self._execution()

    def _awaited_row(self) -> int:
        """Return the awaited task; -1 if there is none (or none of that id, and it is awaited for ever)."""
        known = self._awaited is not None and 0 <= self._awaited < len(self._start)
        return int(self._awaited) if known and self._awaited is not None else -1

    def _execution(self) -> Execution:
        ready, start, end, priority, cancelled = self._engine.columns()
        check_all_ran(np.flatnonzero((start < 0) & ~cancelled).tolist(), self._awaited)
        state = np.where(cancelled, CANCELLED, DONE).astype(np.int8)
        return Execution(arrays_of(self.graph), ready, start, end, priority, state)

    # ------------------------------------------------------------ what a program may ask

    @property
    def now_ns(self) -> int:
        """The current time."""
        return self._now

    def is_done(self, task: int) -> bool:
        """Whether a task has completed by now."""
        return task < len(self._start) and 0 <= self._start[task] <= self._now - self._duration[task]

    def is_started(self, task: int) -> bool:
        """Whether a task has been dispatched."""
        return task < len(self._start) and self._start[task] >= 0

    def cancel(self, task: int) -> None:
        """Withdraw a task that has not started and that no live task waits for."""
        self._register_new()
        if self.is_started(task):
            raise CheckError(f"task {task} cannot be cancelled: it has started")
        if self._engine.is_cancelled(self._existing(task)):
            raise CheckError(f"task {task} cannot be cancelled: it has been already")
        live = [child for child in self._engine.children(task) if not self._engine.is_cancelled(child)]
        if live:
            raise CheckError(f"task {task} cannot be cancelled: tasks {live} wait for it")
        self._engine.cancel(task)

    def set_priority(self, task: int, priority: int) -> None:
        """Change the priority of a task that has not started."""
        self._register_new()
        if self.is_started(task):
            raise CheckError(f"task {task} has started; its priority is fixed")
        self._engine.set_priority(self._existing(task), int(priority))

    def _existing(self, task: int) -> int:
        if not 0 <= task < len(self._start):
            raise IndexError(f"there is no task {task}")
        return int(task)

    # ------------------------------------------------------------ new tasks

    def _register_new(self) -> None:
        """Take over what the program has added (in its turn, too: it may cancel what it has just added)."""
        first = len(self._start)
        if len(self.graph) > first:
            self._engine.register(_rows_from(self.graph, first))
            self._look()

    def _look(self) -> None:
        """Look at the engine's columns anew: it has gone on, or has moved them to have room."""
        size = len(self._engine)
        self._now = self._engine.now_ns
        self._start = self._engine.state.start.data[:size]
        self._duration = self._engine.state.duration.data[:size]


def _rows_from(graph: TaskGraph, first: int) -> Rows:
    """Return the tasks of a graph from `first` on."""
    deps = graph.deps[first:]
    offsets = np.zeros(len(deps) + 1, np.int64)
    np.cumsum([len(row) for row in deps], out=offsets[1:])
    return Rows(
        np.array(graph.resource[first:], np.int32), np.array(graph.duration_ns[first:], np.int64),
        np.array(graph.priority[first:], np.int64), offsets, np.array([*chain.from_iterable(deps)], np.int64))
