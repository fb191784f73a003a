"""The critical path: which resource bounded how much of the makespan."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pandas as pd

from moesim.lowering.graph import TaskGraph
from moesim.simulate.result import DONE

WAIT = "wait"


def critical_path(graph: TaskGraph, tasks: pd.DataFrame) -> pd.DataFrame:
    """Walk back from the last task to the first and say what each instant was spent on.

    Before a task came the later of its dependencies and the task that its resource ran before it. In a
    simulated run the two ends meet exactly; in a real run the gap between them is ``wait`` (start-up of
    threads and kernels).

    Returns:
        frame of resource, kind, time_ns, num_tasks; `time_ns` sums to the makespan.
    """
    start, end = tasks["start_ns"].to_numpy(), tasks["end_ns"].to_numpy()
    labels = list(zip(tasks["resource"].tolist(), tasks["kind"].tolist(), strict=True))
    done = tasks["state"].to_numpy() == DONE
    before = _previous_on_resource(np.asarray(graph.resource), start, end, done)
    spent: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    task = int(np.argmax(np.where(done, end, -1)))
    origin = int(start[done].min())
    cursor = int(end[task])
    while cursor > origin:
        if cursor > start[task]:
            spent[labels[task]][0] += cursor - int(start[task])
            spent[labels[task]][1] += 1
        cursor = min(cursor, int(start[task]))
        candidates = [dep for dep in (*graph.deps[task], before[task]) if dep >= 0]
        if not candidates:
            if cursor == origin:
                break
            spent[(WAIT, WAIT)][0] += cursor - origin
            break
        task = max(candidates, key=lambda dep: (end[dep], dep))
        if (gap := cursor - int(end[task])) > 0:
            spent[(WAIT, WAIT)][0] += gap
            spent[(WAIT, WAIT)][1] += 1
            cursor = int(end[task])
    rows = [(resource, kind, time_ns, count) for (resource, kind), (time_ns, count) in spent.items()]
    frame = pd.DataFrame(rows, columns=["resource", "kind", "time_ns", "num_tasks"])
    return frame.sort_values(["time_ns", "resource", "kind"], ascending=[False, True, True], ignore_index=True)


def bounded_by(path: pd.DataFrame) -> str:
    """Return the kind of task that takes most of a critical path, with its share: ``load 93%``."""
    by_kind = path.groupby("kind")["time_ns"].sum()
    return f"{by_kind.idxmax()} {100 * by_kind.max() / by_kind.sum():.0f}%"


def _previous_on_resource(resource: np.ndarray, start: np.ndarray, end: np.ndarray, done: np.ndarray) -> np.ndarray:
    """int64[task]: the task on the same resource with the latest end not after this one's start, or -1."""
    before = np.full(len(resource), -1, np.int64)
    for index in np.unique(resource[done & (resource >= 0)]):
        members = np.flatnonzero(done & (resource == index))
        by_end = members[np.argsort(end[members], kind="stable")]
        place = np.searchsorted(end[by_end], start[members], side="right") - 1
        found = np.where(place >= 0, by_end[np.maximum(place, 0)], -1)
        before[members] = np.where(found == members, -1, found)
    return before
