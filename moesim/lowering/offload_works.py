"""The distinct pieces of work of a lowered offload run, and their durations on any machine of the same parts.

A sweep changes the machine, not the work: attention over so many cached tokens, an expert of so many rows, a chunk of a
copy. Each distinct one is costed once per machine, by the same functions that the lowering calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import CheckError
from moesim.hardware.cost import CostModel
from moesim.hardware.cost_arrays import dense_costs, ns_from_seconds
from moesim.hardware.work import Cost, DenseWork
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.task_arrays import TaskArrays
from moesim.lowering.work import attention_work, dense_work, experts_work, head_work, router_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.units import ns_from_s

COPIES = ("load", "prefetch", "admit")
DENSE: dict[str, Callable[[ModelSpec, int], DenseWork]] = {
    "router": router_work, "shared_expert": shared_work, "dense": dense_work, "head": head_work}


@dataclass(frozen=True)
class Works:
    """Distinct (kind, resource, tokens, context, bytes) of tasks: int64[work] each, and which one each task is.

    `of_task` is int64[task], -1 for a barrier. `kinds` names the codes in `kind`.
    """

    kinds: tuple[str, ...]
    kind: np.ndarray
    resource: np.ndarray
    tokens: np.ndarray
    context: np.ndarray
    num_bytes: np.ndarray
    of_task: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)


def distinct_works(arrays: TaskArrays) -> Works:
    """Return the distinct works of a run's tasks, in order of first appearance."""
    columns = [np.asarray(column, np.int64) for column in (
        arrays.kind, arrays.resource, arrays.labels["tokens"], arrays.labels["context"], arrays.labels["num_bytes"])]
    real = np.flatnonzero(columns[1] >= 0)
    code = np.zeros(len(real), np.int64)
    for column in columns:  # compress one column at a time, so that the codes stay small
        _, code = np.unique(code * (int(column[real].max(initial=0)) + 1) + column[real], return_inverse=True)
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    order = np.argsort(first)
    of_task = np.full(len(arrays), -1, np.int64)
    of_task[real] = np.argsort(order)[inverse]
    kind, resource, tokens, context, num_bytes = (column[real[first[order]]] for column in columns)
    return Works(arrays.kinds, kind, resource, tokens, context, num_bytes, of_task)


def work_ns(works: Works, model: ModelSpec, machine: OffloadMachine, cost: CostModel) -> np.ndarray:
    """Return int64[work]: what each work takes on a machine, as `OffloadProgram` lowers it."""
    overhead = {kind: cost.task_overhead("load" if kind in COPIES else kind).seconds
                for kind in {works.kinds[code] for code in works.kind.tolist()}}
    result = np.zeros(len(works), np.int64)
    attention = works.kind == works.kinds.index("attention")
    result[attention] = _attention_ns(works, np.flatnonzero(attention), model, machine, cost, overhead.get("attention", 0.0))
    for place in np.flatnonzero(~attention).tolist():
        kind = works.kinds[works.kind[place]]
        seconds = _cost(kind, works, place, model, machine, cost).seconds + overhead[kind]
        result[place] = ns_from_s(seconds)
    return np.where(works.resource >= 0, np.maximum(result, 1), 0)


def cpu_choice(program: OffloadProgram, tokens: Sequence[int]) -> tuple[bool, ...]:
    """Return, for experts of so many rows, whether the program's CPU computes one that is missing."""
    return tuple(program.on_cpu(count) for count in tokens)


def _cost(kind: str, works: Works, place: int, model: ModelSpec, machine: OffloadMachine, cost: CostModel) -> Cost:
    tokens, num_bytes = int(works.tokens[place]), int(works.num_bytes[place])
    if kind in DENSE:
        return cost.dense(machine.device, DENSE[kind](model, tokens))
    if kind in ("expert", "cpu_expert"):
        device = machine.device if kind == "expert" else machine.cpu
        return cost.grouped_ffn(device, experts_work(model, tokens, 1, tokens))
    if kind in ("send", "receive"):
        return machine.activation_copy(cost, num_bytes)
    if kind in COPIES:
        link = machine.route[machine.route_indexes.index(int(works.resource[place]))]
        return cost.copy(link.name, num_bytes)
    raise CheckError(f"no cost for tasks of kind {kind!r}")


def _attention_ns(
    works: Works, places: np.ndarray, model: ModelSpec, machine: OffloadMachine, cost: CostModel, overhead_s: float
) -> np.ndarray:
    """Every step has a context of its own, so these are costed together."""
    work = attention_work(model, works.tokens[places], works.context[places])  # type: ignore[arg-type]
    return ns_from_seconds(dense_costs(cost, machine.device, work).seconds + overhead_s)
