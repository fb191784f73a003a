"""From a model, a machine and a trace to what a placement solver needs: the costs of a layer, and the steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import HardwareSpec
from moesim.lowering.batch import context_sums, home_ranks
from moesim.lowering.work import attention_work, dense_work, experts_work, router_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.placement.step_cost import KernelRates, PortLevel, StepCost, TimedSteps
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.units import NS_PER_S, ns_from_s

_PROBES = ((1, 1, 1), (4, 1, 4), (64, 1, 64), (4, 4, 1), (64, 4, 16), (64, 8, 8), (256, 4, 64), (1024, 8, 128),
           (4096, 8, 512))


def step_cost(model: ModelSpec, cost: CostModel, *, dispatch_bytes: float | None = None) -> StepCost:
    """Return the costs of one MoE layer, the same that `ExpertParallelProgram` (closed form) hands out.

    Args:
        dispatch_bytes: bytes per hidden value sent out (1 for fp8 dispatch); default the activations'.

    Raises:
        InputError: ranks of several kinds (one plan then has no single kernel cost).
    """
    own = CostModel(cost.hardware, cost.profile, route_efficiency=cost.route_efficiency)  # its counts are nobody's
    hardware = cost.hardware
    kinds = {(hardware.device(rank).kind, hardware.memory_of(rank).bytes_per_s) for rank in hardware.ranks}
    if len(kinds) != 1:
        raise InputError(f"step cost: hardware {hardware.name!r} has ranks of {len(kinds)} kinds; one is needed")
    width = model.activation_bytes if dispatch_bytes is None else dispatch_bytes
    overhead = {kind: own.task_overhead(kind).seconds for kind in ("experts", "dispatch", "combine")}
    rank = hardware.ranks[0]

    def kernel_ns(rows: int, groups: int, largest_group: int) -> int:
        work = experts_work(model, rows, groups, largest_group)
        return ns_from_s(own.grouped_ffn(rank, work).seconds + overhead["experts"])

    def exchange_ns(traffic: np.ndarray, kind: str) -> int:
        return ns_from_s(own.all_to_all(traffic).seconds + overhead[kind])

    sources = {own.grouped_ffn(rank, experts_work(model, *probe)).source for probe in _PROBES}
    nameplate = sources == {"nameplate"}
    kernel = _kernel_rates(model, hardware, overhead["experts"])
    whole = all(float(model.hidden_size * part).is_integer() for part in (width, model.activation_bytes))
    return StepCost(
        kernel_ns, exchange_ns, model.hidden_size * width, model.hidden_size * model.activation_bytes,
        kernel if nameplate else _fitted(kernel, kernel_ns), (_level(hardware, "node"), _level(hardware, "cluster")),
        overhead["dispatch"], overhead["combine"], cost.route_efficiency,
        exact=nameplate and whole and cost.route_efficiency == 1.0, source=", ".join(sorted(sources)))


def step_sample(trace: RoutingTrace, steps: Sequence[Step], num_ranks: int, *, model: ModelSpec | None = None,
                cost: CostModel | None = None) -> TimedSteps:
    """Return the steps of a trace token by token, homes as the simulator deals them.

    Args:
        trace: the whole trace that the steps index (homes go by its requests).
        model, cost: with both, and shared experts in the model, the sample knows how long those hold each rank.

    Raises:
        InputError: no step, or a model that is not the trace's.
    """
    if not steps:
        raise InputError("step sample: at least one step is needed")
    home = home_ranks(trace, num_ranks)
    rows = np.concatenate([step.rows for step in steps])
    until = None
    if model is not None and cost is not None and model.shared_intermediate_size:
        trace.check_model(model)
        own = CostModel(cost.hardware, cost.profile, route_efficiency=cost.route_efficiency)
        until = np.stack([_until_ns(model, own, home[step.rows], trace.position[step.rows]) for step in steps])
    return TimedSteps(trace.expert_ids[rows], np.repeat(np.arange(len(steps)), [len(step.rows) for step in steps]),
                      home[rows], until)


def _kernel_rates(model: ModelSpec, hardware: HardwareSpec, task_overhead_s: float) -> KernelRates:
    device, memory = hardware.device(hardware.ranks[0]), hardware.memory_of(hardware.ranks[0])
    work = experts_work(model, 1, 1, 1)
    return KernelRates(device.kernel_overhead_s, task_overhead_s, work.flops_per_token,
                       device.flops_per_s.get(work.dtype, float("inf")), work.bytes_per_group, work.bytes_per_token,
                       memory.bytes_per_s, device.tile_tokens)


def _fitted(kernel: KernelRates, kernel_ns: object) -> KernelRates:
    """Return a linear kernel near a measured one: it guides a search, whose plans are then scored by the table."""
    from scipy.optimize import nnls

    assert callable(kernel_ns)
    times = np.array([kernel_ns(*probe) for probe in _PROBES]) / NS_PER_S
    sizes = np.array([(1.0, groups, rows) for rows, groups, _ in _PROBES])
    (overhead, group, row), _ = nnls(sizes / times[:, None], np.ones(len(times)))
    return KernelRates(overhead, 0.0, 0.0, 1.0, group, row, 1.0, kernel.tile_rows)


def _level(hardware: HardwareSpec, scope: str) -> PortLevel | None:
    fabric = hardware.fabric(scope)
    if fabric is None:
        return None
    node, local = np.divmod(np.arange(hardware.num_ranks), hardware.ranks_per_node)
    per_node = -(-hardware.ranks_per_node // fabric.ranks_per_port)
    port = node * per_node + local // fabric.ranks_per_port
    return PortLevel(fabric.latency_s, fabric.bytes_per_s, port.astype(np.int32), fabric.contention)


def _until_ns(model: ModelSpec, cost: CostModel, home: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Return int64[layer, rank], from the slowest router of a step to the end of each rank's shared experts."""
    ranks = cost.hardware.ranks
    tokens = np.bincount(home, minlength=len(ranks))
    context = context_sums(position, home, len(ranks))
    busy = {kind: np.zeros(len(ranks), np.int64) for kind in ("attention", "router", "dense", "shared_expert")}
    for rank in np.flatnonzero(tokens).tolist():
        count = int(tokens[rank])
        works = {"attention": attention_work(model, count, int(context[rank])), "router": router_work(model, count),
                 "dense": dense_work(model, count), "shared_expert": shared_work(model, count)}
        for kind, work in works.items():
            if kind != "dense" or model.num_dense_layers:
                seconds = cost.dense(ranks[rank], work).seconds + cost.task_overhead(kind).seconds
                busy[kind][rank] = ns_from_s(seconds)
    found, since = [], np.zeros(len(ranks), np.int64)
    for layer in range(model.num_layers):
        since = since + busy["attention"]
        if layer in model.moe_layers:
            ready = since + busy["router"]
            found.append(np.where(tokens > 0, np.maximum(ready + busy["shared_expert"] - ready.max(), 0), 0))
            since = np.zeros_like(since)
        else:
            since = since + busy["dense"]
    return np.stack(found)
