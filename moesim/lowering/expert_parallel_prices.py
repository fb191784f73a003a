"""StepPrices: the time of every task of expert-parallel steps on one machine, from their loads.

The same integers, sources and counts of sources that `ExpertParallelProgram` hands out task by task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.cost_arrays import Costs, Wires, dense_costs, grouped_costs, task_durations, wire_costs, wires_of
from moesim.hardware.work import SOURCES, DenseWork, GroupedWork
from moesim.lowering.expert_parallel_loads import StepLoads, sums_exactly
from moesim.lowering.work import attention_work, dense_work, experts_work, head_work, router_work, shared_work
from moesim.model.spec import ModelSpec

DENSE_KINDS = ("attention", "router", "shared_expert", "dense", "head")
EXCHANGES = ("dispatch", "combine")
Alike = list[tuple[str, list[int]]]
_CHUNK_CELLS = 1 << 20  # entries of traffic matrices that are priced together


class Priced(NamedTuple):
    """Tasks: ns int64[...] (0: there is none), and source int8[...], codes into `hardware.work.SOURCES`."""

    ns: np.ndarray
    source: np.ndarray


class Traffic(NamedTuple):
    """Bytes of all-to-alls: all of it float64[kind, step, layer], and what leaves its rank and its node [..., 2]."""

    num_bytes: np.ndarray
    remote: np.ndarray


@dataclass(frozen=True)
class StepPrices:
    """What the tasks of every step take on one machine.

    Attributes:
        dense: [kind in `DENSE_KINDS`, step, rank], the task of one layer (0 ns for kinds that the model lacks);
            dense_flops, dense_bytes: float64 of the same shape.
        experts: [step, layer, rank]; expert_flops: of one row; expert_bytes: of one slot.
        exchange: [kind in `EXCHANGES`, step, layer]; traffic: the bytes behind it.
        shared: whether there are shared experts.
        is_moe: bool[model layer].
    """

    dense: Priced
    dense_flops: np.ndarray
    dense_bytes: np.ndarray
    experts: Priced
    expert_flops: int
    expert_bytes: int
    exchange: Priced
    traffic: Traffic
    shared: bool
    is_moe: np.ndarray


def price_steps(loads: StepLoads, model: ModelSpec, cost: CostModel, *,
                dispatch_bytes: float | None = None) -> StepPrices:
    """Return the time of every task of the steps, and count the sources of the costs in `cost`.

    Args:
        loads: what the steps ask for (`step_loads`).
        model: its MoE layers must be those of the loads; sizes and precisions may differ from the loads' program.
        cost: the machine; nodes and ports must be those of the loads.
        dispatch_bytes: bytes per hidden value sent out; default the activations'.

    Raises:
        InputError: loads of another machine or model; costs that need `StepLoads.sent` where it was not kept.
    """
    loads.check_hardware(cost.hardware)
    if model.num_moe_layers != loads.num_layers:
        raise InputError(f"step loads: counted for {loads.num_layers} MoE layers, model {model.name!r} has "
                         f"{model.num_moe_layers}")
    widths = (model.activation_bytes if dispatch_bytes is None else dispatch_bytes, model.activation_bytes)
    alike = _alike(cost)
    dense, flops, num_bytes = _dense(loads, model, cost, alike)
    exchange, traffic = _exchanges(loads, cost, [model.hidden_size * width for width in widths])
    return StepPrices(dense, flops, num_bytes, _experts(loads, model, cost, alike), model.expert_flops_per_token,
                      model.expert_bytes, exchange, traffic, bool(model.shared_intermediate_size),
                      np.isin(np.arange(model.num_layers), model.moe_layers))


def _dense(loads: StepLoads, model: ModelSpec, cost: CostModel,
           alike: Alike) -> tuple[Priced, np.ndarray, np.ndarray]:
    """Price the five kinds, with their flops and bytes; a rank does the same in every layer of a step."""
    moe = model.num_moe_layers
    sizes = cast("Any", (loads.tokens, loads.context))  # the formulas of one work take arrays too
    works: tuple[tuple[int, Callable[[], DenseWork]], ...] = (
        (model.num_layers, lambda: attention_work(model, *sizes)), (moe, lambda: router_work(model, sizes[0])),
        (moe if model.shared_intermediate_size else 0, lambda: shared_work(model, sizes[0])),
        (model.num_dense_layers, lambda: dense_work(model, sizes[0])),
        (1, lambda: head_work(model, cast("Any", loads.heads))))
    shape = (len(DENSE_KINDS), *loads.tokens.shape)
    found = Priced(np.zeros(shape, np.int64), np.zeros(shape, np.int8))
    flops, num_bytes = np.zeros(shape), np.zeros(shape)
    for place, (layers, work_of) in enumerate(works):
        if layers:
            work = work_of()
            flops[place], num_bytes[place] = work.flops, work.num_bytes
            costs = _dense_on_ranks(cost, work, alike)
            is_task = np.asarray(work.tokens) > 0
            found.ns[place], found.source[place] = _timed(cost, DENSE_KINDS[place], costs, is_task, layers)
    return found, flops, num_bytes


def _dense_on_ranks(cost: CostModel, work: DenseWork, alike: Alike) -> Costs:
    def price(name: str, ranks: Any) -> Costs:
        return dense_costs(cost, name, DenseWork(work.op, work.shape, _at(work.tokens, ranks), _at(work.flops, ranks),
                                                 _at(work.num_bytes, ranks), work.dtype, _at(work.context, ranks)))

    return _on_ranks(alike, np.shape(work.tokens), price)


def _experts(loads: StepLoads, model: ModelSpec, cost: CostModel, alike: Alike) -> Priced:
    sizes = (loads.expert_tokens, loads.expert_groups, loads.expert_largest)

    def works(ranks: Any) -> GroupedWork:
        return experts_work(model, *(_at(size, ranks) for size in sizes))

    costs = _on_ranks(alike, sizes[0].shape, lambda name, ranks: grouped_costs(cost, name, works(ranks)))
    return _timed(cost, "experts", costs, sizes[0] > 0)


def _on_ranks(alike: Alike, shape: tuple[int, ...], price: Callable[[str, Any], Costs]) -> Costs:
    """Price each kind of rank at once; ranks are the last axis of `shape`."""
    if len(alike) == 1:
        return price(alike[0][0], slice(None))
    costs = Costs(np.zeros(shape), np.zeros(shape, np.int8))
    for name, ranks in alike:
        costs.seconds[..., ranks], costs.source[..., ranks] = price(name, ranks)
    return costs


def _alike(cost: CostModel) -> Alike:
    """Return, for each kind of rank, the name of one and the ranks that cost the same."""
    hardware = cost.hardware
    groups: dict[Any, list[int]] = {}
    for rank, name in enumerate(hardware.ranks):
        device = hardware.device(name)
        rates = tuple(sorted(device.flops_per_s.items()))
        key = (device.kind, rates, device.kernel_overhead_s, device.tile_tokens, hardware.memory_of(name).bytes_per_s)
        groups.setdefault(key, []).append(rank)
    return [(hardware.ranks[ranks[0]], ranks) for ranks in groups.values()]


def _at(numbers: Any, ranks: Any) -> Any:
    """Return the columns of some ranks; a number is the same for all."""
    return numbers[..., ranks] if isinstance(numbers, np.ndarray) else numbers


def _timed(cost: CostModel, kind: str, costs: Costs, is_task: np.ndarray, layers: int = 1) -> Priced:
    """Return tasks with the executor's overhead; count each `layers` times, as the lowering asks in every layer."""
    tasks = int(np.count_nonzero(is_task)) * layers
    if not tasks:
        return Priced(np.zeros(is_task.shape, np.int64), costs.source)
    overhead = cost.task_overhead(kind)
    if overhead.source == "measured":
        cost.count(np.array([SOURCES.index("measured")]), tasks - 1)
    if (costs.source == costs.source.flat[0]).all():
        cost.count(np.array([costs.source.flat[0]]), tasks)
    else:
        cost.count(costs.source[is_task], layers)
    return Priced(task_durations(costs, overhead.seconds, is_task), costs.source)


def _exchanges(loads: StepLoads, cost: CostModel, token_bytes: list[float]) -> tuple[Priced, Traffic]:
    used, shape = np.asarray(loads.moved.any(axis=2)), (len(EXCHANGES), *loads.stayed.shape)
    found = Priced(np.zeros(shape, np.int64), np.zeros(shape, np.int8))
    traffic = Traffic(np.zeros(shape), np.zeros((*shape, 2)))
    most = int(loads.moved.sum(axis=2).max(initial=0))
    for place, (kind, size) in enumerate(zip(EXCHANGES, token_bytes, strict=True)):
        exact = cost.route_efficiency == 1 and sums_exactly(size, most)
        wires, own = _whole(loads, size, place) if exact else _summed(loads, cost, size, place)
        traffic.num_bytes[place], traffic.remote[place] = own
        found.ns[place], found.source[place] = _timed(cost, kind, wire_costs(cost, wires), used)
    return found, traffic


def _whole(loads: StepLoads, size: float, back: int) -> tuple[Wires, Traffic]:
    """Return wires and bytes where every sum of tokens times `size` is exact."""
    moved = loads.moved * float(size)
    egress, ingress, pair = np.moveaxis(loads.wires * float(size), -1, 0)
    wires = Wires(ingress, egress, pair, moved) if back else Wires(egress, ingress, pair, moved)
    total = moved.sum(axis=-1)
    return wires, Traffic(total, np.stack([total, moved[..., 1]], axis=-1))


def _summed(loads: StepLoads, cost: CostModel, size: float, back: int) -> tuple[Wires, Traffic]:
    """Return the same by adding up the bytes of every pair, in the order of the scalar model."""
    if loads.sent is None:
        raise InputError("step loads: a route efficiency other than 1, or bytes per token that do not add up exactly, "
                         "need step_loads(..., keep_sent=True)")
    ranks, node = loads.num_ranks, np.arange(loads.num_ranks) // loads.ranks_per_node
    other, away = ~np.eye(ranks, dtype=bool), node[:, None] != node[None, :]
    sent = loads.sent.reshape(-1, ranks, ranks).swapaxes(1, 2) if back else loads.sent.reshape(-1, ranks, ranks)
    parts, chunk = [], max(1, _CHUNK_CELLS // ranks**2)
    for first in range(0, len(sent), chunk):
        traffic = np.ascontiguousarray(sent[first:first + chunk]) * other * float(size)
        wires = wires_of(cost.hardware, traffic / cost.route_efficiency)
        pairs = (traffic.reshape(len(traffic), -1), traffic[:, other], traffic[:, away])
        # the order of a sum, and so its last bit, goes by memory layout
        parts.append([*wires, *(np.ascontiguousarray(own).sum(axis=1) for own in pairs)])
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    shape = loads.stayed.shape
    wires = Wires(*(column.reshape(*shape, -1) for column in joined[:4]))
    return wires, Traffic(joined[4].reshape(shape), np.stack(joined[5:], axis=-1).reshape(*shape, 2))
