"""Timelines in the Chrome Trace Event format, which Perfetto and chrome://tracing open.

Times are microseconds there, floats made from our integer nanoseconds. Every resource is a thread of the
process that its group names; a resource that runs several tasks at once becomes as many threads, because
slices on one thread must not overlap in part (Perfetto moves such slices elsewhere and misleads).
"""

from __future__ import annotations

import gzip
import heapq
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from moesim.artifacts import atomic_path, write_text
from moesim.errors import InputError, did_you_mean
from moesim.export.pairing import pair_sums, partner_arguments, task_pairs
from moesim.simulate.result import DONE, SimulationResult
from moesim.units import us_from_ns

Event = dict[str, Any]

PREDICTED, MEASURED = "predicted: ", "measured: "
LOAD_KINDS, EXPERT_KIND = ("load", "prefetch"), "expert"
FIRST_TID = 1001
_COLUMNS = ("task", "kind", "resource", "lane", "group", "state", "ready_ns", "start_ns", "end_ns",
            "step", "layer", "expert", "chunk", "tokens", "num_bytes", "source")
_SUFFIXES = (".json", ".json.gz")


def timeline(result: SimulationResult, *, overlay: SimulationResult | None = None) -> dict[str, Any]:
    """Return the Trace Event object of a run, with `overlay` (a real run, say) beside it.

    One slice (``ph: X``) per task that was done, held a resource and took time; one counter per group,
    of tasks that wait for their resource; arrows from the load of an expert to its computation. Barriers
    and cancelled tasks are left out. With `overlay` the processes are named ``predicted: ...`` and ``measured: ...``, the
    second run's clock is moved so that both start at the same instant, and a slice that both runs have (`pairing.py`)
    tells the other's time and the error.

    Raises:
        InputError: the task table lacks a column, or no task was done.
    """
    ids = _Ids(count(1), count(FIRST_TID), count(1))
    events, other = (_events(result, "", 0, ids), None) if overlay is None else _overlaid(result, overlay, ids)
    facts = {"result": result.name, "makespan_ns": result.makespan_ns, **(other or {})}
    return {"displayTimeUnit": "ms", "otherData": facts, "traceEvents": events}


def _overlaid(result: SimulationResult, overlay: SimulationResult, ids: _Ids) -> tuple[list[Event], dict[str, Any]]:
    """Return the events of both runs, and what is said of them together."""
    shift_ns = _origin_ns(result) - _origin_ns(overlay)
    slices = lane_slices(result), lane_slices(overlay)
    pairs = task_pairs(*slices)
    of_result, of_overlay = partner_arguments(pairs)
    events = _events(result, PREDICTED, 0, ids, of_result) + _events(overlay, MEASURED, shift_ns, ids, of_overlay)
    return events, {"overlay": overlay.name, "overlay_makespan_ns": overlay.makespan_ns,
                    **pair_sums(pairs, *map(len, slices))}


def write_timeline(result: SimulationResult, path: str | os.PathLike[str],
                   overlay: SimulationResult | None = None) -> Path:
    """Write `timeline` to ``*.json`` or, compressed, ``*.json.gz`` (the same run gives the same bytes).

    Raises:
        InputError: another suffix, or a result that `timeline` refuses.
    """
    target = Path(path)
    if not target.name.endswith(_SUFFIXES):
        raise InputError(f"{path}: a timeline is written to a file that ends in {' or '.join(_SUFFIXES)}")
    text = json.dumps(timeline(result, overlay=overlay), separators=(",", ":"), allow_nan=False)
    if target.name.endswith(".json"):
        return write_text(target, text)
    with atomic_path(target) as temporary:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
    return target


def lane_slices(result: SimulationResult) -> pd.DataFrame:
    """Return the tasks that a timeline shows, by start, each with the `row` of its resource that it fills.

    `row` counts from 0; it is above 0 only where a resource ran several tasks at once. Tasks of one
    (resource, row) never overlap. `label` is what to call that (resource, row) inside its group.

    Raises:
        InputError: the task table lacks a column, or nothing in it took time on a resource.
    """
    tasks = result.tasks
    for column in _COLUMNS:
        if column not in tasks.columns:
            hint = did_you_mean(column, tasks.columns)
            raise InputError(f"result {result.name!r}: the table tasks lacks the column {column!r}.{hint}")
    shown = (tasks["state"] == DONE) & (tasks["resource"] != "") & (tasks["end_ns"] > tasks["start_ns"])
    slices = tasks[shown].sort_values(["start_ns", "end_ns", "task"], ignore_index=True)
    if slices.empty:
        raise InputError(f"result {result.name!r}: nothing to draw: no task took time on a resource")
    slices["row"] = _rows(slices)
    slices["label"] = _labels(slices)
    return slices


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key by which ``gpu2`` comes before ``gpu10``."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


@dataclass(frozen=True)
class _Ids:
    """Numbers for processes, threads and arrows, unique in the file (no thread has a process's number)."""

    pids: Iterator[int]
    tids: Iterator[int]
    arrows: Iterator[int]


def _origin_ns(result: SimulationResult) -> int:
    return int(lane_slices(result)["start_ns"].iloc[0])


def _rows(slices: pd.DataFrame) -> list[int]:
    """Give each slice the lowest row of its resource that is free when it starts."""
    busy: dict[str, list[tuple[int, int]]] = {}
    free: dict[str, list[int]] = {}
    rows = []
    for resource, start, end in zip(slices["resource"], slices["start_ns"], slices["end_ns"], strict=True):
        running, idle = busy.setdefault(resource, []), free.setdefault(resource, [])
        while running and running[0][0] <= start:
            heapq.heappush(idle, heapq.heappop(running)[1])
        row = heapq.heappop(idle) if idle else len(running)
        heapq.heappush(running, (end, row))
        rows.append(row)
    return rows


def _labels(slices: pd.DataFrame) -> list[str]:
    """Name each thread by its lane; by its resource where a lane of the group has several resources."""
    lanes = slices[["group", "lane", "resource"]].drop_duplicates()
    shared = lanes.groupby(["group", "lane"])["resource"].transform("size") > 1
    plain = lanes["lane"].where(~shared & (lanes["lane"] != ""), lanes["resource"])
    names = dict(zip(lanes["resource"], plain, strict=True))
    several = set(slices.loc[slices["row"] > 0, "resource"])
    return [f"{names[resource]} #{row + 1}" if resource in several else names[resource]
            for resource, row in zip(slices["resource"], slices["row"], strict=True)]


def _events(result: SimulationResult, prefix: str, shift_ns: int, ids: _Ids,
            partners: dict[int, dict[str, Any]] | None = None) -> list[Event]:
    """All events of one run: metadata, steps, slices (with what is said of each one's partner), counters, arrows."""
    slices = lane_slices(result)
    for column in ("ready_ns", "start_ns", "end_ns"):
        slices[column] = (slices[column] + shift_ns).clip(lower=0)
    events = _step_events(result, prefix, shift_ns, ids)
    threads: dict[tuple[str, str], tuple[int, int]] = {}
    for group in sorted(set(slices["group"]), key=natural_key):
        pid = next(ids.pids)
        events += _process(pid, f"{prefix}{group}")
        mine = slices[slices["group"] == group]
        for label in sorted(set(mine["label"]), key=natural_key):
            threads[group, label] = (pid, next(ids.tids))
            events += _thread(*threads[group, label], label)
        events += _queue_counter(mine, pid)
    places = [threads[key] for key in zip(slices["group"], slices["label"], strict=True)]
    slices["pid"], slices["tid"] = zip(*places, strict=True)
    more = partners or {}
    return events + [_slice(task, more.get(task["task"], {})) for task in _records(slices)] + _flows(slices, ids)


def _records(slices: pd.DataFrame) -> Iterable[dict[str, Any]]:
    """Rows as plain Python values."""
    names = slices.columns.tolist()
    columns = [slices[name].tolist() for name in names]
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _process(pid: int, name: str) -> list[Event]:
    return [{"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}},
            {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}]


def _thread(pid: int, tid: int, name: str) -> list[Event]:
    return [{"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}},
            {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}]


def _slice(task: dict[str, Any], more: dict[str, Any]) -> Event:
    return {"ph": "X", "name": slice_name(task), "cat": task["kind"], "pid": task["pid"], "tid": task["tid"],
            "ts": us_from_ns(task["start_ns"]), "dur": us_from_ns(task["end_ns"] - task["start_ns"]),
            "args": _arguments(task) | more}


def slice_name(task: dict[str, Any]) -> str:
    """Return e.g. ``load L3 E17`` (layer 3, expert 17; the chunk too, where there is one)."""
    marks = (("L", task["layer"]), ("E", task["expert"]), ("#", task["chunk"]))
    return " ".join([task["kind"], *(f"{mark}{value}" for mark, value in marks if value >= 0)])


def _arguments(task: dict[str, Any]) -> dict[str, Any]:
    """What a click on the slice shows; labels that do not apply are left out."""
    ids = {name: task[name] for name in ("task", "step", "layer", "expert", "chunk") if task[name] >= 0}
    sizes = {"tokens": task["tokens"], "bytes": task["num_bytes"], "source": task["source"]}
    return ids | {name: value for name, value in sizes.items() if value}


def _queue_counter(slices: pd.DataFrame, pid: int) -> list[Event]:
    """How many tasks of a group are ready and wait for their resource; one event per change."""
    waited = slices[(slices["ready_ns"] >= 0) & (slices["ready_ns"] < slices["start_ns"])]
    changes: dict[int, int] = {}
    for instants, step in ((waited["ready_ns"], 1), (waited["start_ns"], -1)):
        for instant in instants.tolist():
            changes[instant] = changes.get(instant, 0) + step
    queued, events = 0, []
    for instant in sorted(changes):
        queued += changes[instant]
        if changes[instant]:
            events.append({"ph": "C", "name": "queued tasks", "pid": pid, "tid": 0,
                           "ts": us_from_ns(instant), "args": {"tasks": queued}})
    return events


def _flows(slices: pd.DataFrame, ids: _Ids) -> list[Event]:
    """Arrows from the last load of (step, layer, expert) that ended in time to that expert's first task."""
    experts: dict[tuple[int, int, int], dict[str, Any]] = {}
    loads: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for task in _records(slices[slices["kind"].isin([*LOAD_KINDS, EXPERT_KIND]) & (slices["expert"] >= 0)]):
        key = (task["step"], task["layer"], task["expert"])
        if task["kind"] == EXPERT_KIND:
            experts.setdefault(key, task)
        else:
            loads.setdefault(key, []).append(task)
    events = []
    for key, expert in experts.items():
        landed = [load for load in loads.get(key, []) if load["end_ns"] <= expert["start_ns"]]
        if landed:
            load = max(landed, key=lambda task: (task["end_ns"], task["task"]))
            events += _arrow(load, expert, next(ids.arrows))
    return events


def _arrow(load: dict[str, Any], expert: dict[str, Any], arrow_id: int) -> list[Event]:
    common = {"name": "load to expert", "cat": "flow", "id": arrow_id}
    ends: tuple[tuple[str, Event, Event], ...] = (("s", load, {}), ("f", expert, {"bp": "e"}))
    return [{"ph": ph, **common, **extra, "pid": task["pid"], "tid": task["tid"],
             "ts": us_from_ns(task["start_ns"])} for ph, task, extra in ends]


def _step_events(result: SimulationResult, prefix: str, shift_ns: int, ids: _Ids) -> list[Event]:
    """One process with a slice per forward pass; none without a table of steps, or where they overlap."""
    steps = result.tables.get("steps")
    if steps is None or steps.empty:
        return []
    ordered = steps.sort_values("start_ns", ignore_index=True)
    if (ordered["start_ns"].iloc[1:].to_numpy() < ordered["end_ns"].iloc[:-1].to_numpy()).any():
        return []
    pid, tid = next(ids.pids), next(ids.tids)
    events = [*_process(pid, f"{prefix}steps"), *_thread(pid, tid, "forward passes")]
    for row in _records(ordered[ordered["end_ns"] > ordered["start_ns"]]):
        start_ns, end_ns = (max(0, row[name] + shift_ns) for name in ("start_ns", "end_ns"))
        arguments = {name: row[name] for name in ("phase", "tokens") if name in row}
        events.append({"ph": "X", "name": f"step {row['step']}", "cat": "step", "pid": pid, "tid": tid,
                       "ts": us_from_ns(start_ns), "dur": us_from_ns(end_ns - start_ns), "args": arguments})
    return events
