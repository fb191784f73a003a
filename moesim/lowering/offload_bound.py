"""A lower bound on the time of offloaded inference: no cache policy with these slots can be faster."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cache.bounds import fewest_misses
from moesim.cache.policy import AccessStream
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import Link
from moesim.lowering.batch import expert_counts, head_rows
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.work import attention_work, dense_work, experts_work, head_work, router_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace


@dataclass(frozen=True)
class OffloadBound:
    """A proven lower bound on the time to the end of the last step, in seconds, and two of its sides."""

    total_s: float
    compute_s: float
    link_s: float
    misses: int


def offload_bound(
    model: ModelSpec,
    trace: RoutingTrace,
    steps: list[Step],
    machine: OffloadMachine,
    cost: CostModel,
    stream: AccessStream,
    *,
    slots_per_layer: int,
    preload: list[int],
    shared: bool,
    cpu_helps: bool,
    chunks: int = 1,
) -> OffloadBound:
    """Return a time that no eviction, admission or prefetch policy with these slots can undercut.

    At least `fewest_misses` experts are absent when needed. Say the CPU computes c of all experts (0 unless `cpu_helps`).
    Then the device runs attention, routers, heads and all but c experts; the others of the absent ones cross the
    slowest link of the route; the CPU runs c. The bound is the largest of the three, for the most favourable c.
    """
    misses = int(fewest_misses(stream, model.num_experts, slots_per_layer, preload=preload, shared=shared).sum())
    fixed = sum(_fixed_s(model, trace, step, machine, cost) for step in steps)
    experts = np.sort(_expert_seconds(model, trace, steps, machine.device, cost))
    load_s = max(_load_s(cost, link, model.expert_bytes, chunks) for link in machine.route)
    on_cpu = np.arange(len(experts) + 1 if cpu_helps else 1)
    device_s = fixed + np.concatenate([[0.0], np.cumsum(experts)])[len(experts) - on_cpu]
    link_s = np.maximum(misses - on_cpu, 0) * load_s
    cpu_s = np.zeros(1)
    if cpu_helps:
        on_host = np.sort(_expert_seconds(model, trace, steps, machine.cpu, cost))
        cpu_s = np.concatenate([[0.0], np.cumsum(on_host)])
    best = int(np.argmin(np.maximum(np.maximum(device_s, link_s), cpu_s)))
    total = float(np.maximum(np.maximum(device_s, link_s), cpu_s)[best])
    return OffloadBound(total, float(device_s[best]), float(link_s[best]), misses)


def _load_s(cost: CostModel, link: Link, num_bytes: int, chunks: int) -> float:
    """The least time that one expert takes on a link, whole or in chunks; a latency may overlap with other copies."""
    whole = cost.copy(link.name, num_bytes).seconds
    pieces = chunks * cost.copy(link.name, num_bytes // chunks).seconds
    return max(0.0, min(whole, pieces) - chunks * link.latency_s)


def _fixed_s(model: ModelSpec, trace: RoutingTrace, step: Step, machine: OffloadMachine, cost: CostModel) -> float:
    """Seconds of everything in a step but the routed experts."""
    tokens, context = len(step.rows), int(np.sum(trace.position[step.rows] + 1))
    parts = [("attention", attention_work(model, tokens, context))] * model.num_layers
    parts += [("router", router_work(model, tokens))] * model.num_moe_layers
    parts += [("dense", dense_work(model, tokens))] * model.num_dense_layers
    parts += [("shared_expert", shared_work(model, tokens))] * (
        model.num_moe_layers if model.shared_intermediate_size else 0
    )
    parts += [("head", head_work(model, head_rows(step)))]
    return sum(cost.dense(machine.device, work).seconds + cost.task_overhead(kind).seconds for kind, work in parts)


def _expert_seconds(
    model: ModelSpec, trace: RoutingTrace, steps: list[Step], device: str, cost: CostModel
) -> np.ndarray:
    """float64[access]: seconds of every expert that a step runs, on `device`."""
    counts = [
        expert_counts(trace.expert_ids[step.rows, layer], model.num_experts)
        for step in steps
        for layer in range(model.num_moe_layers)
    ]
    tokens = np.concatenate([row[row > 0] for row in counts])
    sizes, index = np.unique(tokens, return_inverse=True)
    seconds = [cost.grouped_ffn(device, experts_work(model, int(n), 1, int(n))).seconds for n in sizes]
    return np.asarray(seconds)[index]
