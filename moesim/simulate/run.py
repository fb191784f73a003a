"""From a program to a SimulationResult: run an executor, then derive every table from its task table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pandas as pd

from moesim.errors import InputError
from moesim.lowering.batch import StepRecord
from moesim.lowering.graph import Program
from moesim.simulate.critical_path import critical_path
from moesim.simulate.result import DONE, SimulationResult
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.trace import PHASES, PREFILL, RoutingTrace
from moesim.units import s_from_ns

COPY_KINDS = ("load", "prefetch", "admit", "send", "receive", "dispatch", "combine", "all_gather",
              "counts", "weights")


class SteppedProgram(Program, Protocol):
    """A program whose steps can be told apart in its task table."""

    trace: RoutingTrace
    steps: list[StepRecord]


def simulate(
    program: SteppedProgram,
    *,
    name: str = "",
    warmup_steps: int = 0,
    executor: Callable[[Program], pd.DataFrame] = run_simpy,
    provenance: dict[str, Any] | None = None,
) -> SimulationResult:
    """Run a program and return its result.

    Args:
        warmup_steps: steps left out of the summary's rates (they stay in the tables).
        executor: maps a program to its ``tasks`` table; SimPy by default, torch for a real run.

    Raises:
        InputError: a warm-up that leaves no step.
    """
    if warmup_steps >= len(program.steps):
        raise InputError(f"warmup_steps {warmup_steps} leaves none of the {len(program.steps)} steps")
    tasks = executor(program)
    steps = step_table(program, tasks)
    tables = {
        "tasks": tasks,
        "steps": steps,
        "requests": request_table(program, steps),
        "transfers": transfer_table(tasks),
        "critical_path": critical_path(program.graph, tasks),
    }
    counts = getattr(program, "cache_counts", None)
    if counts is not None:
        tables["cache"] = pd.DataFrame({"layer": np.arange(len(counts["hits"])), **counts})
    return SimulationResult(name, summarise(tables, warmup_steps), tables, provenance or {})


def step_table(program: SteppedProgram, tasks: pd.DataFrame) -> pd.DataFrame:
    """Return one row per step: step, phase, tokens, requests, start_ns, end_ns, duration_ns."""
    end = tasks["end_ns"].to_numpy()
    rows, previous = [], 0
    for record in program.steps:
        finish = int(end[record.last_task])
        requests = len(np.unique(record.step.requests))
        rows.append(
            (
                record.step.index,
                record.step.phase,
                record.tokens,
                requests,
                previous,
                finish,
                finish - previous,
            )
        )
        previous = finish
    columns = ["step", "phase", "tokens", "requests", "start_ns", "end_ns", "duration_ns"]
    return pd.DataFrame(rows, columns=columns)


def request_table(program: SteppedProgram, steps: pd.DataFrame) -> pd.DataFrame:
    """Return request_id, output_tokens, ttft_ns, tpot_ns, e2e_ns, in order of admission.

    A request is admitted when the step before its first one ends (a closed loop: it waits for nobody). Its prompt's last
    prefill step yields the first token, each decode step one more. ``tpot = (e2e - ttft) / (output_tokens - 1)``.
    """
    seen: dict[int, list[int]] = {}
    prefill = PHASES[PREFILL]
    for record, start, end in zip(program.steps, steps["start_ns"], steps["end_ns"], strict=True):
        for request in np.unique(record.step.requests).tolist():
            entry = seen.setdefault(request, [int(start), int(end), int(end), 0])
            if record.step.phase == prefill:
                entry[1], entry[3] = int(end), 1
            else:
                entry[3] += 1
            entry[2] = int(end)
    rows = []
    for request, (start, first, last, output) in seen.items():
        tpot = (last - first) / (output - 1) if output > 1 else np.nan
        rows.append((request, output, first - start, tpot, last - start))
    return pd.DataFrame(rows, columns=["request_id", "output_tokens", "ttft_ns", "tpot_ns", "e2e_ns"])


def transfer_table(tasks: pd.DataFrame) -> pd.DataFrame:
    """Return resource, kind, num_transfers, num_bytes, busy_ns of everything that was copied."""
    copies = tasks[(tasks["state"] == DONE) & tasks["kind"].isin(COPY_KINDS) & (tasks["resource"] != "")]
    grouped = copies.groupby(["resource", "kind"], sort=True)
    frame = grouped.agg(num_transfers=("task", "size"), num_bytes=("num_bytes", "sum"), busy_ns=("duration_ns", "sum"))
    return frame.reset_index()


def summarise(tables: dict[str, pd.DataFrame], warmup_steps: int) -> dict[str, Any]:
    """Return the plain numbers of a result; rates are over the steps after the warm-up."""
    steps, tasks = tables["steps"].iloc[warmup_steps:], tables["tasks"]
    elapsed_s = s_from_ns(int(steps["duration_ns"].sum()))
    decode = steps[steps["phase"] != PHASES[PREFILL]]
    done = tasks[tasks["state"] == DONE]
    on_resource = done[done["resource"] != ""]
    path = tables["critical_path"].groupby("resource")["time_ns"].sum()
    summary: dict[str, Any] = {
        "num_steps": len(steps),
        "num_tasks": len(on_resource),
        "makespan_s": s_from_ns(int(done["end_ns"].max() - done["start_ns"].min())),
        "step_time_s": elapsed_s / len(steps),
        "decode_step_time_s": s_from_ns(int(decode["duration_ns"].sum())) / len(decode) if len(decode) else None,
        "tokens_per_s": float(steps["tokens"].sum()) / elapsed_s,
        "bound_by": {str(name): float(value) for name, value in (path / path.sum()).items()},
        "cost_sources": on_resource.loc[on_resource["source"] != "", "source"].value_counts().sort_index().to_dict(),
        "num_cancelled": int((tasks["state"] != DONE).sum()),
    }
    if "cache" in tables:
        totals = tables["cache"].drop(columns="layer").sum()
        summary["cache"] = {key: int(value) for key, value in totals.items()}
        summary["hit_rate"] = float(totals["hits"] / max(1, totals["accesses"]))
        summary["htod_bytes"] = _htod_bytes(tables["transfers"])
    return summary


def _htod_bytes(transfers: pd.DataFrame) -> int:
    """Bytes of experts that reached the device: over several links the same bytes appear once per link."""
    loads = transfers[transfers["kind"].isin(("load", "prefetch", "admit"))]
    return int(loads.groupby("resource")["num_bytes"].sum().min()) if len(loads) else 0
