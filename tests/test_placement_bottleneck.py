"""The bottleneck solver and its bound: compiled sums against the objective, brute force, and tampered proofs."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from moesim.errors import CheckError, InputError, SolverError
from moesim.placement.bounds.bottleneck import matching_duals, matching_value, prove_bottleneck, quick_bottleneck
from moesim.placement.bounds.node_chain import chain_multipliers, zero_sum_basis
from moesim.placement.certificate import Certificate
from moesim.placement.constraints import Apart, Capacity, Constraints, Pin
from moesim.placement.kernels import bottleneck as kernels
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.solvers.bottleneck import _Search, balance_then_assign, bottleneck
from moesim.placement.solvers.lpt import lpt_row
from moesim.placement.step_sample import ExchangeRates
from moesim.placement.verify.bottleneck import CHECKS

GOAL = OBJECTIVES["bottleneck"]
check = CHECKS["ports"]


def make_problem(seed: int, experts: int, ranks: int, per_node: int, layers: int, spare: int = 0,
                 **more: object) -> PlacementProblem:
    """A random problem with a hot expert per layer; `spare` further slots per rank; the far link may be the cheaper."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 40, (layers - 1, experts, experts)).astype(float) ** rng.choice([1.0, 2.0])
    load = rng.integers(1, 60, (layers, experts)).astype(float)
    load[np.arange(layers), rng.integers(0, experts, layers)] *= 4
    near, far = rng.uniform(0.1, 1.0, 2) if seed % 4 == 0 else (0.1, 0.43)
    return PlacementProblem(load, ranks, -(-experts // ranks) + spare, per_node, counts,
                            rates=ExchangeRates(0.22, float(near), float(far), 0.5), **more)  # type: ignore[arg-type]


def random_plan(problem: PlacementProblem, rng: np.random.Generator, *, shares: bool = False) -> PlacementPlan:
    """A random valid plan, replicas included, with stated shares on request."""
    rows = np.stack([rng.permutation(np.concatenate([
        np.arange(problem.num_experts), rng.integers(0, problem.num_experts, problem.num_slots - problem.num_experts)]))
        for _ in range(problem.num_layers)])
    plan = PlacementPlan(rows, problem.num_ranks, problem.num_experts)
    if not shares:
        return plan
    raw = rng.uniform(0.1, 1.0, rows.shape)
    for row, values in zip(rows, raw, strict=True):
        values /= np.bincount(row, values, problem.num_experts)[row]
    return dataclasses.replace(plan, slot_share=raw)


def every_plan(problem: PlacementProblem) -> list[PlacementPlan]:
    """All plans of a tiny problem, up to the order of slots within a rank."""
    multisets = set()
    spare = problem.num_slots - problem.num_experts
    for more in itertools.combinations_with_replacement(range(problem.num_experts), spare):
        for row in set(itertools.permutations([*range(problem.num_experts), *more])):
            parts = np.array(row).reshape(problem.num_ranks, -1)
            multisets.add(tuple(np.sort(parts, axis=1).ravel().tolist()))
    rows = sorted(multisets)
    return [PlacementPlan(np.array(plan), problem.num_ranks, problem.num_experts)
            for plan in itertools.product(rows, repeat=problem.num_layers)]


@pytest.mark.parametrize(("experts", "ranks", "per_node", "layers", "spare", "shares"), [
    (12, 4, 2, 5, 0, False), (12, 4, 4, 4, 0, False), (6, 6, 2, 3, 0, False), (8, 4, 2, 4, 1, False),
    (8, 4, 2, 4, 1, True), (6, 2, 1, 1, 0, False), (9, 3, 3, 2, 2, True)])
def test_sums_follow_the_objective_through_swaps(experts: int, ranks: int, per_node: int, layers: int, spare: int,
                                                 shares: bool) -> None:
    """After many swaps the predicted changes, the updated sums and the objective computed afresh are one number."""
    rng = np.random.default_rng(5)
    for seed in range(4):
        problem = make_problem(seed, experts, ranks, per_node, layers, spare)
        search = _Search(problem, random_plan(problem, rng, shares=shares), 0, None)
        value = GOAL.value(problem, search.plan(search.at))
        assert search.value() == pytest.approx(value, rel=1e-12)
        for _ in range(40):
            layer = int(rng.integers(layers))
            slot, other = (int(one) for one in rng.integers(0, problem.num_slots, 2))
            width = problem.slots_per_rank
            r, s = slot // width, other // width
            if r == s:
                continue
            a, b = search.at[layer, slot], search.at[layer, other]
            tables = search.rows, search.link, *search.sums
            change = kernels.swap_change(layer, a, b, r, s, *tables, 0.0)
            ports = search.send.sum() / ranks
            toward_mean = kernels.swap_change(layer, a, b, r, s, *tables, 1.0)
            busy = search.busy.max(axis=1).sum()
            kernels.apply_swap(layer, a, b, r, s, search.home, search.rows, search.flow, search.back, search.link,
                               *search.sums)
            search.at[layer, slot], search.at[layer, other] = b, a
            new = GOAL.value(problem, search.plan(search.at))
            assert value + change == pytest.approx(new, rel=1e-9)
            assert search.value() == pytest.approx(new, rel=1e-9)
            mean_change = search.send.sum() / ranks - ports + search.busy.max(axis=1).sum() - busy
            assert toward_mean == pytest.approx(mean_change, abs=1e-9 * new)
            value = new


def test_annealing_keeps_sums_and_slots_in_step() -> None:
    """After annealing and a descent the tables equal those built from the homes, and no swap of two items wins."""
    problem = make_problem(3, 12, 4, 2, 5)
    search = _Search(problem, balance_then_assign(problem), 0, None)
    kernels.anneal(5000, 1.0, 0.3, 0, 5, search.streams[0], *search.tables)
    while any(kernels.descend(layer, 1e-9, *search.tables) for layer in range(5)):
        pass
    updated = [table.copy() for table in search.sums]
    assert np.array_equal(np.take_along_axis(search.home, search.at, axis=1), np.tile(np.arange(12) // 3, (5, 1)))
    search.build()
    for old, new in zip(updated, search.sums, strict=True):
        np.testing.assert_allclose(old, new, atol=1e-7)
    value = GOAL.value(problem, search.plan(search.at))
    for layer, slot, other in itertools.product(range(5), range(12), range(12)):
        at = search.at.copy()
        at[layer, [slot, other]] = at[layer, [other, slot]]
        assert GOAL.value(problem, search.plan(at)) > value - 1e-7


@pytest.mark.parametrize(("experts", "ranks", "per_node", "layers", "spare", "seeds"), [
    (4, 2, 2, 3, 0, 40), (4, 2, 1, 3, 0, 40), (4, 4, 2, 2, 0, 24), (3, 3, 3, 2, 0, 40), (2, 2, 1, 2, 1, 40),
    (3, 2, 1, 2, 0, 12)])
def test_bounds_hold_on_every_plan(experts: int, ranks: int, per_node: int, layers: int, spare: int,
                                   seeds: int) -> None:
    """No plan of all is below the bound, the checker proves as much, and the solver lies between."""
    plans = None
    for seed in range(seeds):
        problem = make_problem(seed, experts, ranks, per_node, layers, spare)
        plans = plans or every_plan(problem)
        chosen = plans if len(plans) <= 300 else [plans[i] for i in np.random.default_rng(seed).integers(0, len(plans), 150)]
        least = min(GOAL.value(problem, plan) for plan in chosen)
        proof = prove_bottleneck(problem, seed=0, time_limit_s=3.0 if seed % 8 == 0 else 0.02)
        assert quick_bottleneck(problem).bound <= proof.bound
        assert proof.bound <= least * (1 + 1e-9)
        assert check(problem, proof) == pytest.approx(proof.bound, rel=1e-6)
        if seed % 8 == 0:
            result = bottleneck(problem, seed=seed, time_limit_s=2.0, moves=40_000)
            assert result.objective is not None
            assert proof.bound <= result.objective * (1 + 1e-9)
            if len(plans) <= 300:
                assert result.objective >= least * (1 - 1e-9)
            if spare == 0 and problem.num_slots == experts:
                assert result.objective <= least * (1 + 1e-9)  # small single-home problems are solved exactly


def test_search_reaches_the_exact_optimum() -> None:
    """Without the exact solver's help the search finds the optimum of eight experts on four ranks, or nearly."""
    from moesim.placement.solvers.exact import exact

    problem = make_problem(9, 8, 4, 2, 6)
    best = exact(problem, seed=0, time_limit_s=20.0, objective="bottleneck").objective
    assert best is not None
    plans = [_Search(problem, balance_then_assign(problem), seed, None).run(400_000, 1e30) for seed in range(4)]
    values = [GOAL.value(problem, plan) for plan in plans]
    assert best <= min(values) * (1 + 1e-12)
    assert min(values) <= 1.01 * best


def test_never_worse_than_a_start_and_same_seed_same_plan() -> None:
    """Every start is matched or beaten, and the same seed gives the same plan."""
    problem = make_problem(1, 24, 4, 2, 4)
    best = bottleneck(problem, seed=3, time_limit_s=20.0, moves=400_000)
    again = bottleneck(problem, seed=3, time_limit_s=20.0, moves=400_000)
    assert best.plan is not None
    assert again.plan is not None
    assert np.array_equal(best.plan.physical_to_logical, again.plan.physical_to_logical)
    kept = bottleneck(problem, seed=4, time_limit_s=20.0, moves=0, starts=(best.plan,))
    assert kept.objective is not None
    assert best.objective is not None
    assert kept.objective <= best.objective
    assert best.objective < GOAL.value(problem, balance_then_assign(problem))


@pytest.mark.parametrize("shares", [False, True])
def test_replicas_are_searched_and_scored(shares: bool) -> None:
    """With redundant slots copies move with their shares: the result is valid, exact, and no worse than the start."""
    problem = make_problem(2, 16, 4, 2, 4, spare=1)
    start = random_plan(problem, np.random.default_rng(0), shares=shares)
    search = _Search(problem, start, 0, None)
    plan = search.run(200_000, 1e30)
    assert np.array_equal(np.sort(plan.physical_to_logical), np.sort(start.physical_to_logical))
    assert search.best == pytest.approx(GOAL.value(problem, plan), rel=1e-9)
    result = bottleneck(problem, seed=0, time_limit_s=5.0, moves=100_000, starts=(plan,))
    assert result.plan is not None
    assert result.objective == GOAL.value(problem, result.plan)
    assert result.objective <= GOAL.value(problem, plan) < GOAL.value(problem, start)


def test_constraints_hold_through_the_search() -> None:
    """What a constraint names stays where the start has it; without a start that keeps them there is no plan."""
    limits = Constraints(pins=(Pin(0, 1, 2),), apart=(Apart(3, 4),), capacities=(Capacity("rank", 2, 6),))
    problem = make_problem(6, 24, 4, 2, 3, constraints=limits)
    row = np.arange(24)
    rows = np.stack([row, row, row])
    rows[:, [4, 20]] = rows[:, [20, 4]]
    rows[2, [0, 7]] = rows[2, [7, 0]]
    start = PlacementPlan(rows, 4, 24)
    problem.check(start)
    result = bottleneck(problem, seed=0, time_limit_s=5.0, moves=200_000, starts=(start,))
    assert result.plan is not None
    problem.check(result.plan)
    assert result.objective is not None
    assert result.objective < GOAL.value(problem, start)
    impossible = dataclasses.replace(problem, constraints=Constraints(pins=tuple(Pin(e, 0) for e in range(7))))
    with pytest.raises(SolverError, match="no start keeps the constraints"):
        bottleneck(impossible, seed=0, time_limit_s=1.0)


def test_progress_holds_the_best_plan() -> None:
    """What the progress recorded last is the result, so that an interrupted search loses nothing."""
    problem, progress = make_problem(1, 24, 4, 2, 4), Progress()
    result = bottleneck(problem, seed=0, time_limit_s=20.0, moves=200_000, progress=progress)
    assert progress.slots is not None
    recorded = GOAL.value(problem, PlacementPlan(progress.slots, 4, 24))
    assert recorded == pytest.approx(progress.objective, rel=1e-9)
    assert recorded == pytest.approx(result.objective, rel=1e-9)


def test_balance_then_assign_keeps_the_groups() -> None:
    """The two-stage plan has LPT's groups in every layer, and no two of its groups are better exchanged."""
    problem = make_problem(8, 12, 4, 2, 4)
    plan = balance_then_assign(problem)
    assert problem.transitions is not None
    assert problem.rates is not None
    link = problem.rates.link_s(4, 2)
    for layer, load in enumerate(problem.expert_load):
        groups = plan.physical_to_logical[layer].reshape(4, 3)
        assert {frozenset(one) for one in groups} == {frozenset(one) for one in lpt_row(load, 12, 4).reshape(4, 3)}
        if layer:
            before = plan.physical_to_logical[layer - 1].reshape(4, 3)
            flow = np.array([[problem.transitions[layer - 1][np.ix_(a, b)].sum() for b in groups] for a in before])
            every = [(flow[:, list(order)] * link).sum() for order in itertools.permutations(range(4))]
            assert (flow * link).sum() == pytest.approx(min(every))


def test_matching_duals_bound_the_flow_value() -> None:
    """The duals are never below the exact b-matching, and within three per cent of it on random counts."""
    from scipy.optimize import linear_sum_assignment

    counts = np.random.default_rng(0).exponential(1.0, (5, 12, 12)) ** 2
    row, column = matching_duals(counts, 1, np.inf)
    exact_values = np.array([one[linear_sum_assignment(one, maximize=True)].sum() for one in counts])
    values = matching_value(counts, 1, row, column)
    assert np.all(values >= exact_values * (1 - 1e-12))
    assert values.sum() <= 1.03 * exact_values.sum()


def test_chain_multipliers_are_feasible_and_tight_for_two_layers() -> None:
    """The multipliers make the matrix positive semidefinite by plain eigenvalues, and bound the best of all splits."""
    rng = np.random.default_rng(4)
    for layers in (2, 3):
        counts = rng.integers(0, 30, (layers - 1, 6, 6)).astype(float)
        diagonal = chain_multipliers(counts, 2, np.inf)
        whole = np.diag(diagonal.ravel())
        for pair, block in enumerate(counts):
            here, there = slice(6 * pair, 6 * pair + 6), slice(6 * pair + 6, 6 * pair + 12)
            whole[here, there], whole[there, here] = -block / 2, -block.T / 2
        basis = np.kron(np.eye(layers), zero_sum_basis(6))
        assert np.linalg.eigvalsh(basis.T @ whole @ basis).min() > 0
        splits = [np.isin(np.arange(6), one) for one in itertools.combinations(range(6), 3)]
        best = max(sum(block[np.equal.outer(a, b)].sum() for block, a, b in zip(counts, plan, plan[1:], strict=False))
                   for plan in itertools.product(splits, repeat=layers))
        bound = counts.sum() / 2 + diagonal.sum() / 2
        assert best <= bound <= 1.1 * best


@pytest.mark.parametrize("name", ["node_row", "rank_column", "diagonal"])
def test_false_multipliers_prove_less(name: str) -> None:
    """Whatever the multipliers, what the checker vouches for stays below a plan's value."""
    rng = np.random.default_rng(0)
    problem = make_problem(5, 16, 4, 2, 4)
    proof = prove_bottleneck(problem, seed=0, time_limit_s=1.0)
    assert "diagonal" in proof.arrays or name != "diagonal"
    least = bottleneck(problem, seed=0, time_limit_s=5.0, moves=200_000).objective
    assert least is not None
    for scale in (0.1, 1.0, 10.0):
        values = proof.arrays[name]
        false = values * rng.uniform(0, 1, values.shape) + rng.normal(0, scale * np.abs(values).mean(), values.shape)
        arrays = {**proof.arrays, name: false}
        try:
            proven = check(problem, dataclasses.replace(proof, arrays=arrays))
        except CheckError:
            continue
        assert proven <= least * (1 + 1e-9)
        assert proven <= proof.bound * (1 + 1e-3)


@pytest.mark.parametrize(("name", "change", "text"), [
    ("node_row", None, "'node_row' is missing"),
    ("rank_row", lambda a: a[:, 1:], "rank_row must be"),
    ("node_column", lambda a: a * np.nan, "not finite"),
    ("diagonal", lambda a: a[1:], "diagonal must be"),
    ("chosen", None, "'chosen' is missing"),
])
def test_tampered_certificates_are_refused(name: str, change: object, text: str) -> None:
    """Arrays that are missing, misshapen or not finite are refused with the array's name."""
    problem = make_problem(5, 16, 4, 2, 4)
    arrays = {**prove_bottleneck(problem, seed=0, time_limit_s=0.1).arrays}
    arrays.setdefault("chosen", np.ones(3, bool))
    arrays.setdefault("diagonal", np.ones((4, 16)))
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])  # type: ignore[operator]
    with pytest.raises(CheckError, match=text):
        check(problem, Certificate("bottleneck", "ports", 0.0, {}, arrays))


def test_embedded_proof_of_kept_transitions() -> None:
    """The chain SDP's part is re-checked for the same pairs and node weight; another weight or method is refused."""
    problem = make_problem(5, 16, 4, 2, 4)
    proof = prove_bottleneck(problem, seed=0, time_limit_s=4.0)
    assert "kept_method" in proof.parameters
    assert check(problem, proof) == pytest.approx(proof.bound, rel=1e-6)
    weight = {**proof.parameters["kept"], "node_weight": 0.1}
    with pytest.raises(CheckError, match=r"must hold the node weight 0\.767442"):
        check(problem, dataclasses.replace(proof, parameters={**proof.parameters, "kept": weight}))
    with pytest.raises(CheckError, match="no proof method 'magic'"):
        check(problem, dataclasses.replace(proof, parameters={**proof.parameters, "kept_method": "magic"}))
    none = {**proof.arrays, "chosen": np.zeros(3, bool)}
    assert check(problem, dataclasses.replace(proof, arrays=none)) <= proof.bound


@pytest.mark.parametrize(("change", "options", "text"), [
    ({"transitions": None}, {}, "needs transitions"),
    ({"rates": None}, {}, "needs rates"),
    ({}, {"moves": -1}, "moves must not be negative, got -1"),
])
def test_refuses(change: dict, options: dict, text: str) -> None:
    """A problem without what the objective needs, and options out of range, are refused in words."""
    problem = dataclasses.replace(make_problem(0, 24, 4, 2, 3), **change)
    with pytest.raises(InputError, match=text):
        bottleneck(problem, seed=0, time_limit_s=1.0, **options)
