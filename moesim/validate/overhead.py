"""The executor's own time: what a task costs beside its kernel, from a short real run on other routing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd

from moesim.hardware.profile import MeasuredTable
from moesim.lowering.graph import TaskGraph
from moesim.units import s_from_ns

LEAST_S = s_from_ns(1)
DECISION = "decision"


def typical(values: Sequence[float]) -> float:
    """Return the mean of the middle nine tenths.

    A run's time is a sum, so its expectation is a sum of means: a median would leave out the slow tail that the run
    does meet. The extremes are cut, since a pause of the whole machine is not the kernel's.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    cut = len(ordered) // 20
    return float(ordered[cut : len(ordered) - cut].mean())


def overhead_tables(runs: Sequence[tuple[TaskGraph, pd.DataFrame]]) -> tuple[MeasuredTable, ...]:
    """Return the fixed time of a task by kind beside its kernel, from real runs.

    A task's overhead is the time from when it could have started (what it waits for and its resource were free) to its
    start: bookkeeping, and waking its thread. The program's decision falls between a router's end and the first task that it
    releases: it is charged to the router, and to none of those tasks.
    """
    gaps: dict[str, list[int]] = defaultdict(list)
    for graph, tasks in runs:
        for kind, values in _gaps(graph, tasks).items():
            gaps[kind] += values
    decision = typical(gaps.pop(DECISION))
    return tuple(_table(kind, values, decision if kind == "router" else 0.0) for kind, values in sorted(gaps.items()))


def executor_seconds(graph: TaskGraph, tasks: pd.DataFrame) -> float:
    """Return the summed time in which tasks of a real run could have started and had not."""
    return s_from_ns(sum(sum(values) for values in _gaps(graph, tasks).values()))


def _gaps(graph: TaskGraph, tasks: pd.DataFrame) -> dict[str, list[int]]:
    """Return kind -> ns from when each task could have started to its start; decisions apart."""
    start, end = tasks["start_ns"].to_numpy(), tasks["end_ns"].to_numpy()
    kinds = tasks["kind"].tolist()
    decided = _decision_ends(graph, kinds, start)
    gaps: dict[str, list[int]] = defaultdict(list)
    gaps[DECISION] = [when - int(end[router]) for router, when in decided.items()] or [0]
    busy_until: dict[int, int] = {}
    ran = [task for task in np.argsort(start, kind="stable").tolist() if start[task] >= 0 and graph.resource[task] >= 0]
    for task in ran:
        resource = graph.resource[task]
        free = max([busy_until.get(resource, 0), *(decided.get(dep, int(end[dep])) for dep in graph.deps[task])])
        gaps[kinds[task]].append(max(0, int(start[task]) - free))
        busy_until[resource] = int(end[task])
    return gaps


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
    seconds = max(LEAST_S, s_from_ns(round(typical(gaps_ns) + more_ns)))
    return MeasuredTable("task_overhead", "", kind, "", ("tasks",), ((1.0,),), (seconds,), (0.0,), (len(gaps_ns),))
