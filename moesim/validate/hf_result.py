"""An offloaded run of a real model as the tables that simulated runs have, and what to say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moesim.lowering.graph import TaskGraph
from moesim.lowering.machine import OffloadMachine
from moesim.simulate.result import DONE, SimulationResult, task_table
from moesim.traces.steps import Step
from moesim.units import s_from_ns
from moesim.validate.hf_generate import Generated
from moesim.validate.hf_loader import Load
from moesim.validate.hf_runtime import Span

EXPERT_KINDS, LOAD_KINDS, REST_KINDS = ("expert", "cpu_expert"), ("load", "prefetch", "admit"), ("attention", "router", "head")


@dataclass(frozen=True)
class HfRun:
    """One offloaded run.

    Attributes:
        generated: what came out. spans, loads: what the computing thread did, and the experts that were copied.
        counts: by name, int64[layer]. most_resident: most experts in slots at once.
    """

    generated: Generated
    spans: tuple[Span, ...]
    loads: tuple[Load, ...]
    counts: dict[str, np.ndarray]
    most_resident: int

    @property
    def executor_s(self) -> float:
        """Seconds in which a copied expert was waited for and had arrived, or had been asked for and nothing was copied."""
        woken = sum(load.resumed_ns - load.end_ns for load in self.loads if load.resumed_ns)
        ends = [0, *(load.end_ns for load in self.loads)]
        started = sum(load.start_ns - max(load.asked_ns, end) for load, end in zip(self.loads, ends, strict=False))
        return s_from_ns(woken + started)


def measured_tasks(run: HfRun, machine: OffloadMachine, expert_bytes: int) -> pd.DataFrame:
    """Return the ``tasks`` table of a run, times from its start."""
    graph = TaskGraph(machine.resources())
    both: list[Span | Load] = [*run.spans, *run.loads]
    rows = [(one.start_ns, one.end_ns, one) for one in both]
    rows.sort(key=lambda row: row[:2])
    ready = []
    for start, end, one in rows:
        labels: dict[str, Any] = {"step": one.step, "layer": one.layer, "expert": one.expert, "slot": one.slot}
        if isinstance(one, Load):
            graph.add(one.kind, machine.route_indexes[-1], end - start, source="measured", num_bytes=expert_bytes, chunk=0,
                      **labels)
            ready.append(one.asked_ns)
        else:
            graph.add(one.kind, machine.compute_index, end - start, source="measured", tokens=one.tokens, **labels)
            ready.append(start)
    origin = run.generated.start_ns
    start_ns, end_ns = (np.array([row[place] for row in rows], np.int64) - origin for place in (0, 1))
    zeros = np.zeros(len(rows), np.int64)
    return task_table(graph, np.array(ready, np.int64) - origin, start_ns, end_ns, zeros, zeros + DONE)


def measured_result(run: HfRun, tasks: pd.DataFrame, name: str, provenance: dict[str, Any]) -> SimulationResult:
    """Return a run with the tables that a real run has."""
    steps = _step_table(tasks, run.generated.steps)
    cache = pd.DataFrame({"layer": np.arange(len(run.counts["hits"])), **run.counts})
    return SimulationResult(name, summary(run, tasks), {"tasks": tasks, "steps": steps, "cache": cache}, provenance)


def _step_table(tasks: pd.DataFrame, steps: Sequence[Step]) -> pd.DataFrame:
    own = tasks[tasks["kind"].isin((*REST_KINDS, *EXPERT_KINDS))].groupby("step")
    start, end = own["start_ns"].min(), own["end_ns"].max()
    return pd.DataFrame({
        "step": [step.index for step in steps], "phase": [step.phase for step in steps],
        "tokens": [len(step.rows) for step in steps], "requests": 1, "start_ns": start.to_numpy(),
        "end_ns": end.to_numpy(), "duration_ns": (end - start).to_numpy()})


def summary(run: HfRun, tasks: pd.DataFrame) -> dict[str, Any]:
    """Return a run's plain numbers: seconds by kind, tokens per second, hits, loads, bytes.

    ``wait_s`` is the time in which the computing thread did nothing: it waited for loads, or was between two passes.
    """
    by_kind = {kind: s_from_ns(int(value)) for kind, value in tasks.groupby("kind")["duration_ns"].sum().items()}
    seconds = s_from_ns(int(tasks["end_ns"].max() - tasks["start_ns"].min()))
    expert, load, rest = (sum(by_kind.get(kind, 0.0) for kind in kinds) for kinds in (EXPERT_KINDS, LOAD_KINDS, REST_KINDS))
    totals = {name: int(values.sum()) for name, values in run.counts.items()}
    copied = tasks.loc[tasks["kind"].isin(LOAD_KINDS), "num_bytes"]
    return {
        "makespan_s": seconds, "tokens_per_s": run.generated.num_tokens / seconds, "cache": totals,
        "hit_rate": totals["hits"] / max(1, totals["accesses"]), "htod_bytes": int(copied.sum()), "num_copies": len(copied),
        "expert_s": expert, "load_s": load, "rest_s": rest, "wait_s": seconds - expert - rest,
        "most_resident": run.most_resident}


