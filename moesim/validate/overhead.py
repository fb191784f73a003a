"""The executor's own time: what a task costs beside its kernel, from a run whose kernels do nothing."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pandas as pd

from moesim.hardware.profile import MeasuredTable
from moesim.lowering.graph import TaskGraph
from moesim.units import s_from_ns

LEAST_S = s_from_ns(1)


class NullWorld:
    """Executes nothing: a run in it takes the executor's own time only."""

    def run(self, graph: TaskGraph, task: int) -> None:
        """Do nothing."""


def overhead_tables(graph: TaskGraph, tasks: pd.DataFrame) -> tuple[MeasuredTable, ...]:
    """Return the fixed time of a task by kind, from a run in `NullWorld`.

    A task's overhead is the time from when it could have started (what it waits for and its resource were free) to its end.
    The program's decision falls between a router's end and the first task that it releases: it is charged to the
    router, and to none of those tasks.
    """
    start, end = tasks["start_ns"].to_numpy(), tasks["end_ns"].to_numpy()
    kinds = tasks["kind"].tolist()
    decided = _decision_ends(graph, kinds, start)
    gaps: dict[str, list[int]] = defaultdict(list)
    busy_until: dict[int, int] = {}
    ran = [task for task in np.argsort(start, kind="stable").tolist() if start[task] >= 0 and graph.resource[task] >= 0]
    for task in ran:
        resource = graph.resource[task]
        free = max([busy_until.get(resource, 0), *(decided.get(dep, int(end[dep])) for dep in graph.deps[task])])
        gaps[kinds[task]].append(max(0, int(end[task]) - free))
        busy_until[resource] = int(end[task])
    decision = float(np.median([when - int(end[router]) for router, when in decided.items()] or [0]))
    return tuple(_table(kind, values, decision if kind == "router" else 0.0) for kind, values in sorted(gaps.items()))


def _decision_ends(graph: TaskGraph, kinds: list[str], start: np.ndarray) -> dict[int, int]:
    """Return router -> the start of the first task that it released."""
    first: dict[int, int] = {}
    for task, deps in enumerate(graph.deps):
        if start[task] < 0 or graph.resource[task] < 0:
            continue
        for dep in deps:
            if kinds[dep] == "router":
                first[dep] = min(first.get(dep, int(start[task])), int(start[task]))
    return first


def _table(kind: str, gaps_ns: list[int], more_ns: float) -> MeasuredTable:
    seconds = max(LEAST_S, s_from_ns(round(float(np.median(gaps_ns)) + more_ns)))
    return MeasuredTable("task_overhead", "", kind, "", ("tasks",), ((1.0,),), (seconds,), (0.0,), (len(gaps_ns),))
