"""Stall times: how long a resource was idle, by what it waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from moesim.errors import InputError, unknown
from moesim.simulate.execution import Execution, plain
from moesim.simulate.result import DONE, SimulationResult
from moesim.units import s_from_ns

if TYPE_CHECKING:
    from moesim.simulate.kernels.critical_path import Run

LOAD, PREFETCH, ADMIT, CPU, FAR_LINK, OTHER = "load", "prefetch", "admit", "cpu expert", "far link", "other"
COPIES = (LOAD, PREFETCH, ADMIT)
# A task of another kind is a cause by the name of its kind.
CAUSES = {"send": CPU, "cpu_expert": CPU, "receive": CPU}


class _Columns(NamedTuple):
    """What is read of a run: names, then one entry per task, then the dependencies."""

    resources: list[str]
    kinds: list[str]
    resource: np.ndarray
    kind: np.ndarray
    start: np.ndarray
    end: np.ndarray
    done: np.ndarray
    offsets: np.ndarray
    deps: np.ndarray
    labels: dict[str, np.ndarray]


def stall_times(run: Execution | SimulationResult, resource: str) -> dict[str, float]:
    """Return seconds by cause, the longest first: `stall_times_ns` in SI units."""
    return {cause: s_from_ns(time) for cause, time in stall_times_ns(run, resource).items()}


def stall_times_ns(run: Execution | SimulationResult, resource: str) -> dict[str, int]:
    """Return the idle time of a resource in ns by what it waited for, the longest first.

    Before each task of the resource that begins later than the one before it ended, the interval is walked back: to the
    task that it came after (of its dependencies, and of what its own resource ran before it, the last to end), from there
    to what that came after, to the beginning of the interval. Each instant belongs to the task that ran then on this
    chain, and so to a cause:

    - ``load``: a copy of an expert on its last link, asked for by the layer that needs it;
    - ``prefetch``, ``admit``: a copy asked for ahead, or in the background, that came late or held up the wire;
    - ``far link``: a copy before its last link (flash to host), or into a memory on the way;
    - ``cpu expert``: the CPU's part, with the rows there and back;
    - the name of its kind for any other task (``dispatch``, ``combine``, ``attention`` of another device ...);
    - ``other``: no task of the chain ran (start-up of threads and kernels in a real run).

    The parts sum to the time from the start of the run to the end of the resource's last task, less the time that it was busy.

    Args:
        run: a whole run. resource: its name, as in the column ``resource`` of ``tasks``.

    Raises:
        InputError: a resource that ran nothing; a result without the table ``deps``.
    """
    from moesim.simulate.kernels.stalls import split_idle

    columns = _of_execution(run) if isinstance(run, Execution) else _of_result(run)
    if resource not in columns.resources:
        raise unknown("resource", resource, columns.resources)
    own = np.flatnonzero((columns.resource == columns.resources.index(resource)) & columns.done)
    if not len(own):
        raise InputError(f"resource {resource!r} ran no task")
    order = own[np.argsort(columns.start[own], kind="stable")].astype(np.int64)
    names, cause = _causes(columns)
    spent = np.zeros(len(names), np.int64)
    split_idle(_run(columns), order, cause, int(columns.start[columns.done].min()), spent)
    by_cause: dict[str, int] = {}
    for name, time in zip(names, spent.tolist(), strict=True):
        by_cause[name] = by_cause.get(name, 0) + time
    return dict(sorted(((n, t) for n, t in by_cause.items() if t), key=lambda item: (-item[1], item[0])))


def _causes(columns: _Columns) -> tuple[list[str], np.ndarray]:
    """Return the names of causes, the last ``other``, and int16[task] codes."""
    names = [*(CAUSES.get(kind, kind) for kind in columns.kinds), FAR_LINK, OTHER]
    code = columns.kind.astype(np.int16)
    code[_before_last_link(columns)] = len(columns.kinds)
    return names, code


def _before_last_link(columns: _Columns) -> np.ndarray:
    """int64[...]: copies that another copy of the same chunk waits for, and those that end in no slot of the device."""
    copies = np.isin(columns.kind, [code for code, kind in enumerate(columns.kinds) if kind in COPIES])
    task = np.repeat(np.arange(len(copies)), np.diff(columns.offsets))
    both = copies[task] & copies[columns.deps]
    task, dep = task[both], columns.deps[both]
    same = columns.kind[task] == columns.kind[dep]
    for name in ("step", "layer", "expert", "chunk"):
        same &= columns.labels[name][task] == columns.labels[name][dep]
    return np.concatenate([dep[same], np.flatnonzero(copies & (columns.labels["slot"] < 0))])


def _of_execution(execution: Execution) -> _Columns:
    arrays = execution.arrays
    return _Columns([part.name for part in arrays.resources], list(arrays.kinds), arrays.resource, arrays.kind,
                    execution.start_ns, execution.end_ns, execution.done, arrays.dep_offsets, arrays.deps, arrays.labels)


def _of_result(result: SimulationResult) -> _Columns:
    if "deps" not in result.tables:
        raise InputError(f"result {result.name!r}: stall times need the table deps")
    tasks, deps = result.tasks, result.tables["deps"]
    ids = tasks["task"].to_numpy()
    resources, resource = _coded(tasks["resource"])
    kinds, kind = _coded(tasks["kind"])
    counts = np.bincount(np.searchsorted(ids, deps["task"].to_numpy()), minlength=len(ids))
    labels = {name: tasks[name].to_numpy() for name in ("step", "layer", "expert", "chunk", "slot")}
    return _Columns(resources, kinds, resource, kind, tasks["start_ns"].to_numpy(), tasks["end_ns"].to_numpy(),
                    (tasks["state"] == DONE).to_numpy(), np.concatenate([[0], np.cumsum(counts)]),
                    np.searchsorted(ids, deps["dep"].to_numpy()), labels)


def _coded(names: Sequence[str] | pd.Series) -> tuple[list[str], np.ndarray]:
    """Return the distinct names and int64 codes, -1 for an empty name (a barrier's resource)."""
    codes, found = pd.factorize(pd.Series(names))
    texts = [str(name) for name in found]
    kept = [text for text in texts if text]
    return kept, np.array([kept.index(text) if text else -1 for text in texts], np.int64)[codes]


def _run(columns: _Columns) -> Run:
    """Return the columns in the types that the kernels were compiled for, and each resource's tasks by their ends."""
    from moesim.simulate.kernels.critical_path import Run

    resource, kind = plain(columns.resource, np.int32), plain(columns.kind, np.int16)
    end, done = plain(columns.end, np.int64), plain(columns.done, np.bool_)
    ran = np.flatnonzero(done & (resource >= 0))
    by_end = ran[np.lexsort((ran, end[ran], resource[ran]))]
    first = np.searchsorted(resource[by_end], np.arange(len(columns.resources) + 1)).astype(np.int64)
    return Run(resource, kind, plain(columns.start, np.int64), end, done, plain(columns.offsets, np.int64),
               plain(columns.deps, np.int64), by_end, first)
