"""Execution: what became of every task, as columns; what executors return and every table is derived from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from moesim.errors import CheckError
from moesim.lowering.graph import TaskGraph
from moesim.lowering.task_arrays import TaskArrays, arrays_of
from moesim.simulate.result import DONE, task_table


@dataclass(frozen=True)
class Execution:
    """A run of all tasks of a program, or of some of them.

    Attributes:
        arrays: the tasks.
        ready_ns, start_ns, end_ns: int64[task]; -1 for a time that never came.
        priority: int64[task], the last one it had.
        state: int8[task], 0 done, 1 cancelled.
        ids: int64[task], ascending; None: ``arrays.first`` and the ids after it.

    Raises:
        CheckError: a column of another length than the tasks.
    """

    arrays: TaskArrays
    ready_ns: np.ndarray
    start_ns: np.ndarray
    end_ns: np.ndarray
    priority: np.ndarray
    state: np.ndarray
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("ready_ns", "start_ns", "end_ns", "priority", "state", "ids"):
            column = getattr(self, name)
            if column is None:
                continue
            if column.shape != (len(self.arrays),):
                raise CheckError(f"{name} has shape {column.shape} for {len(self.arrays)} tasks")
            view = column.view()
            view.setflags(write=False)
            object.__setattr__(self, name, view)

    def __len__(self) -> int:
        return len(self.arrays)

    @property
    def done(self) -> np.ndarray:
        """bool[task]: the tasks that ran."""
        return self.state == DONE

    @property
    def on_resource(self) -> np.ndarray:
        """bool[task]: the tasks that ran and were no barriers."""
        return self.done & (self.arrays.resource >= 0)

    def table(self) -> pd.DataFrame:
        """Return the ``tasks`` table (columns: `SimulationResult`)."""
        return task_table(self.arrays, self.ready_ns, self.start_ns, self.end_ns, self.priority, self.state, self.ids)


def execution_of(graph: TaskGraph, tasks: pd.DataFrame) -> Execution:
    """Return a run whose executor made the ``tasks`` table itself."""
    ready, start, end, priority = (
        tasks[name].to_numpy(np.int64) for name in ("ready_ns", "start_ns", "end_ns", "priority"))
    return Execution(arrays_of(graph), ready, start, end, priority, tasks["state"].to_numpy(np.int8))


def plain(array: np.ndarray, dtype: type) -> np.ndarray:
    """Return a contiguous, writable array of a type, as compiled loops take it; a copy only where it must be one."""
    return np.require(array, dtype, ["C", "W"])
