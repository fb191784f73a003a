"""SimulationResult: one schema for simulated and for real runs; written as a `*.result/` folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moesim.artifacts import atomic_folder, write_json
from moesim.errors import InputError
from moesim.lowering.graph import TaskGraph
from moesim.lowering.task_arrays import TaskArrays, arrays_of

SCHEMA = "moesim.result/1"
DONE, CANCELLED = 0, 1
TABLES = ("tasks", "deps", "steps", "layers", "requests", "transfers", "cache", "critical_path")


@dataclass(frozen=True)
class SimulationResult:
    """What happened when.

    `tables` holds pandas frames; times are int64 nanoseconds:

    - ``tasks``: task, kind, resource, lane, group, state (0 done, 1 cancelled), priority, ready_ns,
      start_ns, end_ns, duration_ns, rank, step, layer, expert, slot, chunk, tokens, num_bytes, flops, source
      (a task that was cancelled has start_ns = end_ns = -1);
    - ``deps``: task, dep: one row for each task that a task waits for;
    - ``steps``: step, phase, tokens, start_ns, end_ns; ``layers``: step, layer and what bounded it;
    - ``requests``: request_id, ttft_ns, tpot_ns, e2e_ns, output_tokens;
    - ``transfers``: resource, kind, num_transfers, num_bytes, busy_ns;
    - ``cache``: layer, accesses, hits, late_hits, misses, cpu_misses, loads, prefetches ...;
    - ``critical_path``: resource, kind, time_ns (sums to the makespan).

    A table that does not apply is absent. `summary` holds plain numbers and strings.
    """

    name: str
    summary: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> pd.DataFrame:
        """The task table."""
        return self.tables["tasks"]

    @property
    def makespan_ns(self) -> int:
        """End of the last task minus start of the first."""
        done = self.tasks[self.tasks["state"] == DONE]
        return int(done["end_ns"].max() - done["start_ns"].min()) if len(done) else 0

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write ``*.result/``: summary.json and one Parquet file per table, whole or not at all."""
        with atomic_folder(path) as folder:
            write_json(
                folder / "summary.json",
                SCHEMA,
                {"name": self.name, "summary": self.summary, "provenance": self.provenance},
            )
            for name, table in self.tables.items():
                table.to_parquet(folder / f"{name}.parquet", index=False)
        return Path(path)


def read_result(path: str | os.PathLike[str]) -> SimulationResult:
    """Read a `*.result/` folder; raises InputError for one that is not whole."""
    from moesim.artifacts import read_json

    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{path}: no such result folder")
    head = read_json(folder / "summary.json", SCHEMA)
    tables = {
        name: _read_table(folder / f"{name}.parquet") for name in TABLES if (folder / f"{name}.parquet").is_file()
    }
    if "tasks" not in tables:
        raise InputError(f"{path}: the table tasks.parquet is missing")
    try:
        return SimulationResult(head["name"], head["summary"], tables, head["provenance"])
    except KeyError as error:
        raise InputError(f"{path}: summary.json has no {error}") from None


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise InputError(f"{path}: not a Parquet table: {error}") from None


def task_table(
    tasks: TaskGraph | TaskArrays,
    ready_ns: np.ndarray,
    start_ns: np.ndarray,
    end_ns: np.ndarray,
    priority: np.ndarray,
    state: np.ndarray,
    ids: np.ndarray | None = None,
) -> pd.DataFrame:
    """Build the ``tasks`` table from tasks and int64[task] times; `ids` where the tasks are not consecutive."""
    arrays = tasks if isinstance(tasks, TaskArrays) else arrays_of(tasks)
    parts = [(r.name, r.lane, r.group) for r in arrays.resources] + [("", "", "")]
    names, lanes, groups = (_spread(column, arrays.resource) for column in zip(*parts, strict=True))
    columns: dict[str, Any] = {
        "task": np.arange(arrays.first, arrays.first + len(arrays), dtype=np.int64) if ids is None else ids,
        "kind": _spread(arrays.kinds, arrays.kind),
        "resource": names,
        "lane": lanes,
        "group": groups,
        "state": np.asarray(state, np.int8),
        "priority": np.asarray(priority, np.int64),
        "ready_ns": np.asarray(ready_ns, np.int64),
        "start_ns": np.asarray(start_ns, np.int64),
        "end_ns": np.asarray(end_ns, np.int64),
        "duration_ns": np.asarray(end_ns - start_ns, np.int64),
    }
    columns |= arrays.labels
    columns |= {"flops": arrays.flops, "source": _spread(arrays.sources, arrays.source)}
    return pd.DataFrame(columns)


def _spread(names: Sequence[str], codes: np.ndarray) -> Any:
    """Return the name behind each code (-1: the last), as the text array that pandas would make of them."""
    return pd.Series(names).array.take(np.where(codes < 0, len(names) - 1, codes).astype(np.int64))


def summary_json(result: SimulationResult) -> str:
    """Return the summary as JSON text (for ``--json``)."""
    return json.dumps(result.summary, indent=1, allow_nan=False)
