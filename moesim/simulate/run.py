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
from moesim.simulate.execution import Execution, execution_of
from moesim.simulate.executors import execute
from moesim.simulate.result import SimulationResult
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
    executor: Callable[[Program], Execution | pd.DataFrame] = execute,
    provenance: dict[str, Any] | None = None,
) -> SimulationResult:
    """Run a program and return its result.

    Args:
        warmup_steps: steps left out of the summary's rates (they stay in the tables).
        executor: runs a program: compiled by default (`executors.execute`), torch for a real run. What it returns is either a whole
            `Execution`, from which alone every table is derived (the program's graph may have stayed empty), or the
            ``tasks`` table of the program's graph.

    Raises:
        InputError: a warm-up that leaves no step.
    """
    if warmup_steps >= len(program.steps):
        raise InputError(f"warmup_steps {warmup_steps} leaves none of the {len(program.steps)} steps")
    outcome = executor(program)
    execution = outcome if isinstance(outcome, Execution) else execution_of(program.graph, outcome)
    steps = step_table(program, execution)
    tables = {
        "tasks": execution.table() if isinstance(outcome, Execution) else outcome,
        "deps": dep_table(execution),
        "steps": steps,
        "requests": request_table(program, steps),
        "transfers": transfer_table(execution),
        "critical_path": critical_path(execution),
    }
    counts = getattr(program, "cache_counts", None)
    if counts is not None:
        tables["cache"] = pd.DataFrame({"layer": np.arange(len(counts["hits"])), **counts})
    return SimulationResult(name, summarise(execution, tables, warmup_steps), tables, provenance or {})


def dep_table(execution: Execution) -> pd.DataFrame:
    """Return task, dep: one row for each task that a task waits for."""
    arrays = execution.arrays
    ids = np.arange(arrays.first, arrays.first + len(arrays)) if execution.ids is None else execution.ids
    return pd.DataFrame({"task": np.repeat(ids, np.diff(arrays.dep_offsets)), "dep": arrays.deps})


def step_table(program: SteppedProgram, execution: Execution) -> pd.DataFrame:
    """Return one row per step: step, phase, tokens, requests, start_ns, end_ns, duration_ns."""
    ends = execution.end_ns[[record.last_task for record in program.steps]].tolist()
    rows = [(record.step.index, record.step.phase, record.tokens, len(np.unique(record.step.requests)), start, end,
             end - start) for record, start, end in zip(program.steps, [0, *ends], ends, strict=False)]
    columns = ["step", "phase", "tokens", "requests", "start_ns", "end_ns", "duration_ns"]
    return pd.DataFrame(rows, columns=columns)


def request_table(program: SteppedProgram, steps: pd.DataFrame) -> pd.DataFrame:
    """Return request_id, output_tokens, ttft_ns, tpot_ns, e2e_ns, in order of admission.

    A request is admitted when the step before its first one ends (a closed loop: it waits for nobody). Its prompt's last
    prefill step yields the first token, each decode step one more. ``tpot = (e2e - ttft) / (output_tokens - 1)``.
    """
    by_step = [np.unique(record.step.requests) for record in program.steps]
    ids, first_row, place = np.unique(np.concatenate(by_step), return_index=True, return_inverse=True)
    step = np.repeat(np.arange(len(by_step)), [len(requests) for requests in by_step])
    prefill = np.array([record.step.phase == PHASES[PREFILL] for record in program.steps])[step]
    started = step[first_row]
    last, prompt, output = np.zeros(len(ids), np.int64), np.full(len(ids), -1), np.zeros(len(ids), np.int64)
    np.maximum.at(last, place, step)
    np.maximum.at(prompt, place[prefill], step[prefill])
    np.add.at(output, place, ~prefill & (step > prompt[place]))
    output += prompt >= 0
    start, end = steps["start_ns"].to_numpy(), steps["end_ns"].to_numpy()
    first_token = end[np.where(prompt >= 0, prompt, started)]
    further = np.where(output > 1, output - 1, np.nan)
    frame = pd.DataFrame({
        "request_id": ids.astype(np.int64), "output_tokens": output, "ttft_ns": first_token - start[started],
        "tpot_ns": (end[last] - first_token) / further, "e2e_ns": end[last] - start[started]})
    return frame.iloc[np.argsort(first_row)].reset_index(drop=True)


def transfer_table(execution: Execution) -> pd.DataFrame:
    """Return resource, kind, num_transfers, num_bytes, busy_ns of everything that was copied."""
    arrays, num_kinds = execution.arrays, len(execution.arrays.kinds)
    copied = np.isin(arrays.kind, [code for code, kind in enumerate(arrays.kinds) if kind in COPY_KINDS])
    tasks = np.flatnonzero(copied & execution.on_resource)
    pair = arrays.resource[tasks].astype(np.int64) * num_kinds + arrays.kind[tasks]
    sums = np.zeros((3, len(arrays.resources) * num_kinds), np.int64)
    busy = execution.end_ns[tasks] - execution.start_ns[tasks]
    for total, values in zip(sums, (1, arrays.labels["num_bytes"][tasks], busy), strict=True):
        np.add.at(total, pair, values)
    pairs = np.flatnonzero(sums[0])
    frame = pd.DataFrame({
        "resource": [arrays.resources[place].name for place in pairs // num_kinds],
        "kind": [arrays.kinds[place] for place in pairs % num_kinds],
        **dict(zip(("num_transfers", "num_bytes", "busy_ns"), sums[:, pairs], strict=True))})
    return frame.groupby(["resource", "kind"], sort=True).sum().reset_index()


def summarise(execution: Execution, tables: dict[str, pd.DataFrame], warmup_steps: int) -> dict[str, Any]:
    """Return the plain numbers of a result; rates are over the steps after the warm-up."""
    steps, done = tables["steps"].iloc[warmup_steps:], execution.done
    elapsed_s = s_from_ns(int(steps["duration_ns"].sum()))
    decode = steps[steps["phase"] != PHASES[PREFILL]]
    path = tables["critical_path"].groupby("resource")["time_ns"].sum()
    summary: dict[str, Any] = {
        "num_steps": len(steps),
        "num_tasks": int(execution.on_resource.sum()),
        "makespan_s": s_from_ns(int(execution.end_ns[done].max() - execution.start_ns[done].min())),
        "step_time_s": elapsed_s / len(steps),
        "decode_step_time_s": s_from_ns(int(decode["duration_ns"].sum())) / len(decode) if len(decode) else None,
        "tokens_per_s": float(steps["tokens"].sum()) / elapsed_s,
        "bound_by": {str(name): float(value) for name, value in (path / path.sum()).items()},
        "cost_sources": count_sources(execution),
        "num_cancelled": int((~done).sum()),
    }
    if "cache" in tables:
        totals = tables["cache"].drop(columns="layer").sum()
        summary["cache"] = {key: int(value) for key, value in totals.items()}
        summary["hit_rate"] = float(totals["hits"] / max(1, totals["accesses"]))
        summary["htod_bytes"] = _htod_bytes(tables["transfers"])
    return summary


def count_sources(execution: Execution) -> dict[str, int]:
    """Return how many tasks ran with a cost of each source, by its name."""
    arrays = execution.arrays
    counts = np.bincount(arrays.source[execution.on_resource], minlength=len(arrays.sources)).tolist()
    return {name: count for name, count in sorted(zip(arrays.sources, counts, strict=True)) if name and count}


def _htod_bytes(transfers: pd.DataFrame) -> int:
    """Bytes of experts that reached the device: over several links the same bytes appear once per link."""
    loads = transfers[transfers["kind"].isin(("load", "prefetch", "admit"))]
    return int(loads.groupby("resource")["num_bytes"].sum().min()) if len(loads) else 0
