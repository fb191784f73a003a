"""Runs too long to hold: tasks come in windows, finished rows go out, memory is that of a window and what is under way."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.artifacts import atomic_path
from moesim.errors import CheckError
from moesim.lowering.task_arrays import TaskArrays
from moesim.simulate.compiled_engine import Engine, rows_of
from moesim.simulate.execution import Execution
from moesim.simulate.result import DONE
from moesim.simulate.scheduler import check_all_ran

Sink = Callable[[Execution], None]
COLUMNS = ("kind", "resource", "duration_ns", "priority", "source", "flops")


def run_windows(windows: Iterable[TaskArrays], sink: Sink) -> int:
    """Run windows of tasks one after the other and return the number of tasks.

    A window is handed over at the instant at which the last task of the window before it is done, after the
    completions of that instant and before its dispatch: as by a program that yields the last task of every window.
    So it is the run of all windows in one piece if no task could start before the window ahead of it ends, as where
    each window ends with a barrier that all later tasks wait for. Tasks of earlier windows may be under way then.

    Args:
        windows: consecutive tasks of the same resources, kinds and sources; each waits for tasks of its own window
            or of earlier ones.
        sink: is given every task once, as soon as its window or a later one ends with it done, in ascending order of
            id within a call. Only tasks that came and went with their own window still have their `deps`.

    Raises:
        CheckError: windows that do not follow on each other, or tasks that never run.
    """
    run = _WindowedRun(sink)
    for window in windows:
        if len(window):
            run.add(window)
    run.finish()
    return run.num_tasks


def write_windows(windows: Iterable[TaskArrays], path: str | os.PathLike[str]) -> Path:
    """Run windows and write their ``tasks`` table to a Parquet file, whole or not at all, a row group for each call.

    Rows of tasks that outlast their window come later than in order of id.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        writer: list[Any] = []

        def sink(execution: Execution) -> None:
            table = pa.Table.from_pandas(execution.table(), preserve_index=False)
            if not writer:
                writer.append(pq.ParquetWriter(temporary, table.schema))
            writer[0].write_table(table)

        try:
            if not run_windows(windows, sink):
                raise CheckError(f"{path}: there are no tasks to write")
        finally:
            for opened in writer:
                opened.close()
    return Path(path)


@dataclass(frozen=True)
class _Held:
    """Tasks whose rows have not gone out: their ids, ascending, and columns without `deps`."""

    ids: np.ndarray
    arrays: TaskArrays


class _WindowedRun:
    """The engine's rows are those of the tasks that are held, then those of the window."""

    def __init__(self, sink: Sink) -> None:
        self.num_tasks = 0
        self._sink = sink
        self._engine: Engine | None = None
        self._held: _Held | None = None

    def add(self, window: TaskArrays) -> None:
        """Run to the end of a window's last task, and hand out what is done."""
        if self._engine is None or self._held is None:
            self._engine = Engine(window.resources)
            self._held = _Held(np.empty(0, np.int64), _without_deps(window, np.zeros(len(window), bool)))
        self._check(window, self._held.arrays)
        engine, held = self._engine, self._held
        old = len(held.ids)
        engine.register(rows_of(window, _local(window, held.ids)))
        self.num_tasks += len(window)
        if not engine.advance(old, len(engine) - 1):
            self._stuck(np.concatenate([held.ids, _ids(window)]), self.num_tasks - 1)
        self._hand_out(window)

    def finish(self) -> None:
        """Run what is still under way to its end, and hand it out."""
        if self._engine is None or self._held is None:
            return
        self._engine.advance(len(self._engine), -1)
        columns = self._engine.columns()
        if np.any(columns[1] < 0):
            self._stuck(self._held.ids, None)
        if len(self._held.ids):
            self._send(self._held.arrays, columns, slice(None), self._held.ids)

    def _check(self, window: TaskArrays, before: TaskArrays) -> None:
        if window.first != self.num_tasks:
            raise CheckError(f"a window begins with task {window.first}; the one before it ends before {self.num_tasks}")
        for name in ("resources", "kinds", "sources"):
            if getattr(window, name) != getattr(before, name):
                raise CheckError(f"the window of task {window.first} has other {name} than the one before it")

    def _stuck(self, ids: np.ndarray, awaited: int | None) -> None:
        assert self._engine is not None
        check_all_ran(ids[self._engine.columns()[1] < 0].tolist(), awaited)

    def _hand_out(self, window: TaskArrays) -> None:
        """Send what is done and keep the rest."""
        assert self._engine is not None
        assert self._held is not None
        columns, held, old = self._engine.columns(), self._held, len(self._held.ids)
        done = (columns[1] >= 0) & (columns[2] <= self._engine.now_ns)
        came, own = done[:old], done[old:]
        if came.any():
            self._send(_without_deps(held.arrays, came), columns, np.flatnonzero(came), held.ids[came])
        if own.all():
            self._send(window, columns, slice(old, None), None)
        elif own.any():
            self._send(_without_deps(window, own), columns, old + np.flatnonzero(own), _ids(window)[own])
        if came.any() or not own.all():
            self._held = _Held(np.concatenate([held.ids[~came], _ids(window)[~own]]),
                               _joined(_without_deps(held.arrays, ~came), _without_deps(window, ~own)))
        self._engine.compact()

    def _send(self, arrays: TaskArrays, columns: tuple[np.ndarray, ...], rows: Any, ids: np.ndarray | None) -> None:
        ready, start, end, priority = (np.array(column[rows]) for column in columns[:4])  # the engine's own will change
        self._sink(Execution(arrays, ready, start, end, priority, np.full(len(arrays), DONE, np.int8), ids))


def _ids(window: TaskArrays) -> np.ndarray:
    return np.arange(window.first, window.first + len(window), dtype=np.int64)


def _local(window: TaskArrays, held: np.ndarray) -> np.ndarray:
    """Return the window's deps as rows of the engine; -1 for a task that is neither held nor of the window."""
    deps = np.asarray(window.deps, np.int64) - window.first + len(held)
    earlier = np.flatnonzero(window.deps < window.first)
    if len(earlier):
        wanted = window.deps[earlier]
        row = np.searchsorted(held, wanted)
        found = np.append(held, -1)[row] == wanted
        deps[earlier] = np.where(found, row, -1)
    return deps


def _without_deps(arrays: TaskArrays, wanted: np.ndarray) -> TaskArrays:
    """Return some tasks (a bool for each) that wait for nothing any more."""
    columns: dict[str, Any] = {name: getattr(arrays, name)[wanted] for name in COLUMNS}
    labels = {name: column[wanted] for name, column in arrays.labels.items()}
    size = len(columns["kind"])
    return replace(arrays, **columns, labels=labels, dep_offsets=np.zeros(size + 1, np.int64),
                   deps=np.empty(0, np.int64), first=0)


def _joined(one: TaskArrays, other: TaskArrays) -> TaskArrays:
    """Return the tasks of both; neither waits for any."""
    columns: dict[str, Any] = {name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in COLUMNS}
    labels = {name: np.concatenate([column, other.labels[name]]) for name, column in one.labels.items()}
    return replace(one, **columns, labels=labels, dep_offsets=np.zeros(len(columns["kind"]) + 1, np.int64))
