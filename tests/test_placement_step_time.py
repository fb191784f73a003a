"""Step time: the objective is the simulator's own, to the nanosecond; bounds hold for every plan there is."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.shapes import expert_shape
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Memory
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.step_cost import step_cost, step_sample
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.placement.objectives.step_time import STEP_TIME, layer_times_ns
from moesim.placement.place import problem_from_trace
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.simulate.run import simulate
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


def simulated_ns(trace: RoutingTrace, model: ModelSpec, cost: CostModel, steps: list[Step],
                 plan: PlacementPlan) -> np.ndarray:
    """Return int64[step], durations by the simulator."""
    result = simulate(ExpertParallelProgram(model, trace, steps, plan, cost))
    return result.tables["steps"]["duration_ns"].to_numpy()


@pytest.mark.parametrize(("options", "changes"), [
    ({}, {}),
    ({"redundant": 4}, {}),
    ({"redundant": 4, "contention": "egress"}, {}),
    ({"contention": "pair", "redundant": 4}, {}),
    ({"ranks_per_port": 2, "num_ranks": 8, "per_node": 4}, {}),  # a node's ranks share ports
    ({"num_ranks": 4, "per_node": 4}, {}),  # one node only
    ({"redundant": 4}, {"shared_intermediate_size": 4096}),  # shared experts outlast the dispatch
    ({}, {"shared_intermediate_size": 64}),  # ... and are hidden by it
    ({"batch": 1}, {"shared_intermediate_size": 256}),  # most ranks hold no token
])
def test_differences_are_the_simulators(options: dict, changes: dict) -> None:
    """Simulated step times of two plans differ by exactly the objective's difference, step by step."""
    problem, trace, model, cost, steps = world(5, **options, **changes)
    rng = np.random.default_rng(1)
    plans = [random_plan(rng, problem, shares=bool(turn % 2)) for turn in range(4)]
    simulated = [simulated_ns(trace, model, cost, steps, plan) for plan in plans]
    scored = [layer_times_ns(problem, plan).sum(axis=1) for plan in plans]
    fixed = {tuple(whole - part) for whole, part in zip(simulated, scored, strict=True)}
    assert len(fixed) == 1
    assert len({tuple(one) for one in simulated}) > 1  # the plans do differ


def test_measured_kernels_are_scored_by_their_table() -> None:
    """With a measured expert kernel the objective uses the table's integers, not the roofline's."""
    problem, trace, model, cost, steps = world(3)
    sizes = [(1, 1, 1), (4, 2, 3), (16, 2, 9), (64, 2, 40)]
    table = MeasuredTable("grouped_ffn", "gpu", expert_shape(model), "bf16", ("tokens", "groups", "largest_group"),
                          tuple(sizes), (1e-5, 3e-5, 4e-5, 9e-5))
    profile = CalibrationProfile(cost.hardware.name, (table,))
    measured = CostModel(cost.hardware, profile, route_efficiency=0.7)
    problem = dataclasses.replace(problem, step_cost=step_cost(model, measured))
    assert problem.step_cost is not None and not problem.step_cost.exact
    rng = np.random.default_rng(0)
    fixed = {tuple(simulated_ns(trace, model, measured, steps, plan) - layer_times_ns(problem, plan).sum(axis=1))
             for plan in (random_plan(rng, problem) for _ in range(3))}
    assert len(fixed) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_rates_round_as_the_callables_do(seed: int) -> None:
    """The vectorised kernel and exchange give the integers of the simulator's own cost functions."""
    problem = world(1, num_ranks=8, per_node=4, ranks_per_port=2)[0]
    cost, rng = problem.step_cost, np.random.default_rng(seed)
    assert cost is not None and cost.exact
    counts = rng.integers(0, 50, size=(20, 4)) * rng.integers(0, 2, size=(20, 4))
    rows, groups, largest = counts.sum(axis=1), np.count_nonzero(counts, axis=1), counts.max(axis=1)
    expected = [cost.kernel_ns(*one) if one[0] else 0 for one in zip(rows.tolist(), groups.tolist(), largest.tolist(),
                                                                     strict=True)]
    assert cost.kernels_ns(rows, groups, largest).tolist() == expected
    sent = rng.integers(0, 30, size=(5, 8, 8)) * rng.integers(0, 2, size=(5, 8, 8))
    node = np.arange(8) // 4
    for kind, width in (("dispatch", cost.dispatch_token_bytes), ("combine", cost.combine_token_bytes)):
        traffic = sent * (1 - np.eye(8, dtype=int)) * width
        expected = [cost.exchange_ns(one, kind) if one.any() else 0 for one in traffic.astype(float)]
        assert cost.exchanges_ns(sent, kind, node[:, None] == node).tolist() == expected


def test_other_steps_are_scored_by_replacing_the_sample() -> None:
    """A plan is scored on held-out steps by replacing the sample; the mean over steps is the objective."""
    problem, trace, model, cost, _ = world(8)
    plan = random_plan(np.random.default_rng(0), problem)
    others = closed_loop_steps(trace, batch_size=5, max_steps=4, seed=99)
    held_out = dataclasses.replace(problem, steps=step_sample(trace, others, 4, model=model, cost=cost))
    times = layer_times_ns(held_out, plan)
    assert times.shape == (4, 2)
    assert STEP_TIME.value(held_out, plan) == times.sum() / 4


def test_bad_input_is_refused() -> None:
    """Homes outside the ranks, ranks of two kinds, no steps, and waits of a wrong shape are named."""
    problem, trace, model, cost, steps = world(2)
    assert problem.steps is not None
    sample = dataclasses.replace(problem.steps, home_rank=problem.steps.home_rank + 9)
    plan = random_plan(np.random.default_rng(0), problem)
    with pytest.raises(InputError, match=r"home_rank must be in 0 \.\.\. 3"):
        layer_times_ns(dataclasses.replace(problem, steps=sample), plan)
    with pytest.raises(InputError, match="at least one step"):
        step_sample(trace, [], 4)
    with pytest.raises(InputError, match="until_ns must be"):
        dataclasses.replace(problem.steps, until_ns=np.zeros((1, 1, 4), np.int64))
    memories = {**cost.hardware.memories, "hbm0": Memory("hbm0", "hbm", 1e9, 1e9)}
    mixed = dataclasses.replace(cost.hardware, memories=memories)
    with pytest.raises(InputError, match="ranks of 2 kinds"):
        step_cost(model, CostModel(mixed))
    with pytest.raises(InputError, match="needs the costs of a layer"):
        STEP_TIME.value(dataclasses.replace(problem, step_cost=None), plan)
