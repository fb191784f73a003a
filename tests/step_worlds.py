"""Worlds of the step-time tests: a small machine, a trace, its steps, and the problem that joins them.

Not a test module: test files import it by its name (`pythonpath` in pyproject.toml).
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from moesim.hardware.cost import CostModel
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Memory
from moesim.lowering.step_cost import step_cost, step_sample
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.placement.place import problem_from_trace
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.traces.blocks import block_trace
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.trace import RoutingTrace


def cluster(num_ranks: int, ranks_per_node: int, contention: str = "port", ranks_per_port: int = 1,
            rate: float = 2e9, tile: int = 4) -> HardwareSpec:
    """Equal GPUs; a fabric in the node and, where there are several nodes, a slower one between them."""
    devices = {f"gpu{r}": Device(f"gpu{r}", "gpu", f"hbm{r}", {"bf16": 1e12}, 1e-6, tile, node=r // ranks_per_node)
               for r in range(num_ranks)}
    memories = {f"hbm{r}": Memory(f"hbm{r}", "hbm", 100e9, 50e9) for r in range(num_ranks)}
    fabrics = [Fabric("nvlink", "nvlink", "node", rate, 2e-6, ranks_per_port, contention)]
    if num_ranks > ranks_per_node:
        fabrics.append(Fabric("rdma", "rdma", "cluster", rate / 4, 4e-6, ranks_per_port, contention))
    return HardwareSpec("cluster", devices, memories, fabrics=tuple(fabrics), ranks=tuple(devices),
                        ranks_per_node=ranks_per_node)


def tiny_model(trace: RoutingTrace, **changes: object) -> ModelSpec:
    """A small model of the trace's shape with one dense layer in front."""
    layers = tuple(range(1, trace.num_layers + 1))
    model = ModelSpec("tiny", trace.num_layers + 1, layers, trace.num_experts, trace.top_k, 64, 96,
                      AttentionSpec(4, 2, 16), 128, dense_intermediate_size=512)
    return model.replace(**changes)


def random_plan(rng: np.random.Generator, problem: PlacementProblem, shares: bool = False) -> PlacementPlan:
    """Every expert somewhere, random replicas, in random order; random shares where wanted."""
    extra = problem.num_slots - problem.num_experts
    rows = np.stack([rng.permutation(np.concatenate([np.arange(problem.num_experts),
                                                     rng.integers(problem.num_experts, size=extra)]))
                     for _ in range(problem.num_layers)])
    plan = PlacementPlan(rows, problem.num_ranks, problem.num_experts)
    if not shares:
        return plan
    weight = rng.random(rows.shape) + 0.1
    total = np.zeros((len(rows), problem.num_experts))
    np.add.at(total, (np.arange(len(rows))[:, None], rows), weight)
    return dataclasses.replace(plan, slot_share=weight / np.take_along_axis(total, rows, axis=1))


def world(seed: int, *, num_ranks: int = 4, per_node: int = 2, redundant: int = 0, layers: int = 2, experts: int = 8,
          batch: int = 12, num_steps: int = 3, contention: str = "port", ranks_per_port: int = 1,
          **changes: object) -> tuple[PlacementProblem, RoutingTrace, ModelSpec, CostModel, list[Step]]:
    """A trace, its steps, a machine, and the problem that joins them."""
    trace = block_trace(240, layers, experts, 2, request_tokens=6, seed=seed)
    model = tiny_model(trace, **changes)
    cost = CostModel(cluster(num_ranks, per_node, contention, ranks_per_port))
    steps = closed_loop_steps(trace, batch_size=batch, max_steps=num_steps, seed=seed)
    problem = problem_from_trace(trace, num_ranks=num_ranks, ranks_per_node=per_node, redundant_experts=redundant)
    sample = step_sample(trace, steps, num_ranks, model=model, cost=cost)
    return (dataclasses.replace(problem, steps=sample, step_cost=step_cost(model, cost)), trace, model, cost, steps)


def all_rows(problem: PlacementProblem) -> list[np.ndarray]:
    """Every division of the experts into ranks, one slot each (labelled ranks)."""
    def deal(left: tuple[int, ...], ranks: int) -> list[list[int]]:
        if ranks == 0:
            return [[]]
        return [[*chosen, *rest] for chosen in itertools.combinations(left, problem.slots_per_rank)
                for rest in deal(tuple(e for e in left if e not in chosen), ranks - 1)]
    return [np.array(row) for row in deal(tuple(range(problem.num_experts)), problem.num_ranks)]
