"""Step time: the objective is the simulator's own, to the nanosecond; bounds hold for every plan there is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import step_worlds as worlds
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.shapes import expert_shape
from moesim.errors import CheckError, InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.spec import Memory
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.step_cost import step_cost, step_sample
from moesim.model.spec import ModelSpec
from moesim.placement.bounds.step_time import prove_step_time
from moesim.placement.layer_search import StepTimeSearch
from moesim.placement.objectives.step_time import STEP_TIME, layer_times_ns
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.verify.step_time import check_colocation
from moesim.simulate.run import simulate
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.trace import RoutingTrace

random_plan, world = worlds.random_plan, worlds.world


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
    assert problem.step_cost is not None
    assert not problem.step_cost.exact
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
    assert cost is not None
    assert cost.exact
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
    problem, trace, model, cost, _steps = world(2)
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


def least_ns(problem: PlacementProblem) -> float:
    """The least step time of a one-layer problem over all divisions of the experts.

    By the compiled costs, which test_placement_joint.py holds against the exact function.
    """
    assert problem.steps is not None
    search = StepTimeSearch(problem, 0, 0, 0.0)
    return min(search.start(row) for row in worlds.all_rows(problem)) / problem.steps.num_steps


@pytest.mark.parametrize("options", [
    {}, {"contention": "egress"}, {"contention": "pair"}, {"num_ranks": 4, "per_node": 4}, {"batch": 2},
    {"ranks_per_port": 2}, {"shared_intermediate_size": 512}, {"num_ranks": 2, "per_node": 1}, {"batch": 40},
])
def test_no_plan_is_below_the_bound(options: dict) -> None:
    """The bound is below the best of all placements of small worlds, and its checker finds the same value."""
    for seed in range(2):
        problem = world(seed, layers=1, **options)[0]
        best = least_ns(problem)
        for limit in (0.0, 5.0):
            certificate = prove_step_time(problem, seed=0, time_limit_s=limit)
            assert 0 < certificate.bound <= best
            checked = check_colocation(problem, certificate)
            assert checked <= best
            assert checked == pytest.approx(certificate.bound, rel=2.0**-20)
        assert certificate.bound > (0.6 if len(problem.steps.expert_ids) > 6 else 0.2) * best  # it says something


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2), st.sampled_from(["port", "egress", "pair"]), st.integers(1, 30))
def test_no_random_plan_is_below_the_bound(seed: int, redundant: int, contention: str, batch: int) -> None:
    """Random plans, replicas and uneven shares included, stay above the bound."""
    problem = world(seed % 11, redundant=4 * redundant, contention=contention, batch=batch, num_steps=2)[0]
    certificate = prove_step_time(problem, seed=0, time_limit_s=0.5)
    checked = check_colocation(problem, certificate)
    assert checked == pytest.approx(certificate.bound, rel=2.0**-20)
    rng = np.random.default_rng(seed)
    for turn in range(12):
        plan = random_plan(rng, problem, shares=bool(turn % 2))
        assert STEP_TIME.value(problem, plan) >= max(checked, certificate.bound)


def test_any_choice_of_forms_is_a_bound() -> None:
    """Whatever forms, experts and multipliers a certificate names, what the checker vouches for holds."""
    problem = world(5, layers=1, num_ranks=4, per_node=2)[0]
    best, good = least_ns(problem), prove_step_time(problem, seed=0, time_limit_s=2.0)
    rng = np.random.default_rng(0)
    for _ in range(120):
        arrays = {name: rng.integers(4 if name.endswith("form") else 8, size=array.shape)
                  if name.endswith(("form", "expert")) else array + rng.normal(size=array.shape) * rng.choice([0, 100])
                  for name, array in good.arrays.items()}
        assert check_colocation(problem, dataclasses.replace(good, arrays=arrays)) <= best


def test_a_bent_certificate_is_refused() -> None:
    """Missing, misshapen or infinite arrays, and forms that do not exist, are a CheckError."""
    problem = world(1)[0]
    good = prove_step_time(problem, seed=0, time_limit_s=1.0)
    for name, array in good.arrays.items():
        rest = {key: value for key, value in good.arrays.items() if key != name}
        with pytest.raises(CheckError, match=f"'{name}' is missing"):
            check_colocation(problem, dataclasses.replace(good, arrays=rest))
        with pytest.raises(CheckError, match="must be"):
            check_colocation(problem, dataclasses.replace(good, arrays={**rest, name: array[:1, :1]}))
        wrong = np.full(array.shape, np.nan) if array.dtype.kind == "f" else array + 99
        with pytest.raises(CheckError, match="must be"):
            check_colocation(problem, dataclasses.replace(good, arrays={**rest, name: wrong}))


def test_bounds_need_steps_and_costs() -> None:
    """Counts alone bound nothing here."""
    with pytest.raises(InputError, match="needs the steps of a trace"):
        prove_step_time(dataclasses.replace(world(0)[0], step_cost=None), seed=0, time_limit_s=1.0)
