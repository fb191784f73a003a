"""Phase marks of ranks as a timeline: when each phase began and ended, and the ``tasks`` table of the lowered program.

Steps are laid end to end: what passes between them (a barrier so that all ranks start together) is left out. A collective
lasts from when the last rank enters it to when the last leaves it; a rank that leaves sooner waits for that moment, as in the
lowering, so phases follow one another without gap or overlap and the end is the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moesim.errors import CheckError
from moesim.lowering.graph import TaskGraph
from moesim.simulate.result import DONE, task_table
from moesim.traces.steps import Step
from moesim.validate.ranks_run import LAYER_PHASES

COLLECTIVE = ("dispatch", "combine")
HEAD = "head"


@dataclass(frozen=True)
class Timeline:
    """When each phase ran, int64 ns.

    Attributes:
        spans: kind -> int64[rank, step, layer, 2], start and end (`head`: one layer; a collective: equal on all ranks).
        step_end: int64[step].
    """

    spans: dict[str, np.ndarray]
    step_end: np.ndarray

    def duration_ns(self, kind: str) -> np.ndarray:
        """int64[rank, step, layer], the ns that a phase took."""
        return self.spans[kind][..., 1] - self.spans[kind][..., 0]


def lay_out(marks: np.ndarray) -> Timeline:
    """Return the timeline of marks int64[rank, step, mark] (`ranks_run.JobRun`)."""
    ranks, steps, count = marks.shape
    layers = (count - 2) // len(LAYER_PHASES)
    if count != 2 + layers * len(LAYER_PHASES):
        raise CheckError(f"{count} marks are not whole layers of {len(LAYER_PHASES)} phases")
    spans = {kind: np.zeros((ranks, steps, layers, 2), np.int64) for kind in LAYER_PHASES}
    spans[HEAD] = np.zeros((ranks, steps, 1, 2), np.int64)
    step_end, offset = np.zeros(steps, np.int64), 0
    for step in range(steps):
        own = marks[:, step] - marks[:, step, 0].max() + offset
        now = np.full(ranks, offset, np.int64)
        for layer in range(layers):
            for place, kind in enumerate(LAYER_PHASES):
                ended = own[:, 1 + layer * len(LAYER_PHASES) + place]
                now = _span(spans[kind][:, step, layer], now, ended, together=kind in COLLECTIVE)
        offset = step_end[step] = _span(spans[HEAD][:, step, 0], now, own[:, -1], together=False).max()
    return Timeline(spans, step_end)


def _span(out: np.ndarray, now: np.ndarray, ended: np.ndarray, *, together: bool) -> np.ndarray:
    """Write [rank, (start, end)] and return the ends; `now` is when each rank is free, a phase takes at least 1 ns."""
    if together:
        now, ended = np.full_like(now, now.max()), np.full_like(ended, ended.max())
    out[:, 0], out[:, 1] = now, np.maximum(ended, now + 1)
    return out[:, 1].copy()


def measured_tasks(graph: TaskGraph, steps: Sequence[Step], timeline: Timeline) -> pd.DataFrame:
    """Return the ``tasks`` table (`SimulationResult`) of a lowered `ExpertParallelProgram` with the times of a real run.

    A phase that the lowering leaves out (no rows on a rank, no tokens to move) has no task; its time is a gap.
    """
    place_of = {step.index: place for place, step in enumerate(steps)}
    times = np.zeros((3, len(graph)), np.int64)
    ready, start, end = times
    for task, kind in enumerate(graph.kind):
        ready[task] = max((int(end[dep]) for dep in graph.deps[task]), default=0)
        if graph.resource[task] < 0:
            start[task] = end[task] = ready[task]
            continue
        rank, layer = max(0, graph.labels["rank"][task]), max(0, graph.labels["layer"][task])
        start[task], end[task] = timeline.spans[kind][rank, place_of[graph.labels["step"][task]], layer]
        if start[task] < ready[task]:
            raise CheckError(f"task {task} ({kind}) began {ready[task] - start[task]} ns before what it waits for had ended")
    state = np.full(len(graph), DONE, np.int8)
    return task_table(graph, ready, start, end, np.asarray(graph.priority, np.int64), state)
