"""The critical path: which resource bounded how much of the makespan."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moesim.simulate.execution import Execution, plain

if TYPE_CHECKING:
    from moesim.simulate.kernels.critical_path import Run

WAIT = "wait"


def critical_path(execution: Execution) -> pd.DataFrame:
    """Walk back from the last task to the first and say what each instant was spent on.

    Before a task came the later of its dependencies and the task that its resource ran before it. In a
    simulated run the two ends meet exactly; in a real run the gap between them is ``wait`` (start-up of
    threads and kernels).

    Args:
        execution: a whole run, of which at least one task is done.

    Returns:
        frame of resource, kind, time_ns, num_tasks; `time_ns` sums to the makespan.
    """
    from moesim.simulate.kernels.critical_path import walk

    arrays, run = execution.arrays, _run_of(execution)
    spent = np.zeros((len(arrays.resources) + 1, len(arrays.kinds), 2), np.int64)
    waited = np.zeros(2, np.int64)
    last = int(np.argmax(np.where(run.done, run.end, -1)))
    walk(run, last, int(run.start[run.done].min()), spent, waited)
    names = [*(resource.name for resource in arrays.resources), ""]
    by_label: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(2, np.int64))
    for resource, kind in np.argwhere(spent[:, :, 0]).tolist():
        by_label[names[resource], arrays.kinds[kind]] += spent[resource, kind]
    if waited[0]:
        by_label[WAIT, WAIT] += waited
    rows = [(*label, *counts.tolist()) for label, counts in by_label.items()]
    frame = pd.DataFrame(rows, columns=["resource", "kind", "time_ns", "num_tasks"])
    return frame.sort_values(["time_ns", "resource", "kind"], ascending=[False, True, True], ignore_index=True)


def bounded_by(path: pd.DataFrame) -> str:
    """Return the kind of task that takes most of a critical path, with its share: ``load 93%``."""
    by_kind = path.groupby("kind")["time_ns"].sum()
    return f"{by_kind.idxmax()} {100 * by_kind.max() / by_kind.sum():.0f}%"


def _run_of(execution: Execution) -> Run:
    """Return the columns in the types that the kernels were compiled for, and each resource's tasks by their ends."""
    from moesim.simulate.kernels.critical_path import Run, by_resource

    arrays = execution.arrays
    resource, kind = plain(arrays.resource, np.int32), plain(arrays.kind, np.int16)
    end, done = plain(execution.end_ns, np.int64), plain(execution.done, np.bool_)
    by_end = np.empty(int(execution.on_resource.sum()), np.int64)
    first, in_order = np.empty(len(arrays.resources) + 1, np.int64), np.empty(len(arrays.resources), np.bool_)
    by_resource(resource, end, done, by_end, first, in_order)
    for index in np.flatnonzero(~in_order).tolist():
        members = by_end[first[index]:first[index + 1]]
        members[:] = members[np.argsort(end[members], kind="stable")]
    return Run(resource, kind, plain(execution.start_ns, np.int64), end, done, plain(arrays.dep_offsets, np.int64),
               plain(arrays.deps, np.int64), by_end, first)
