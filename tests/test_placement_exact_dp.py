"""The exact solver: brute force over all plans, its certificates, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from moesim.errors import CheckError, InputError, SolverError
from moesim.placement.constraints import Constraints, Pin
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveStatus
from moesim.placement.solvers.exact import assign, exact, num_states
from moesim.placement.step_sample import ExchangeRates
from moesim.placement.verify.exact import CHECKS

NAMES = ("affinity", "hops", "bottleneck", "balance")


def small_problem(seed: int, experts: int, ranks: int, per_node: int, layers: int, *, tied: bool = False,
                  ) -> PlacementProblem:
    """A random problem; `tied` makes many counts equal or zero."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 3 if tied else 60, (layers - 1, experts, experts)).astype(float)
    counts[:, 0, 0] += 1
    load = rng.integers(0, 3 if tied else 90, (layers, experts)).astype(float)
    near, far = sorted(rng.uniform(0.1, 2.0, 2))[:: rng.choice([1, -1])]  # the farther link is not always dearer
    return PlacementProblem(load, ranks, experts // ranks, per_node, counts,
                            rates=ExchangeRates(float(rng.uniform(0.1, 1.0)), near, far, 0.5))


def layer_rows(experts: int, ranks: int) -> list[tuple[int, ...]]:
    """Every labelled placement of a layer, one slot order each."""
    size = experts // ranks

    def fill(free: frozenset[int], left: int) -> list[tuple[int, ...]]:
        if not left:
            return [()]
        return [(*chosen, *rest) for chosen in itertools.combinations(sorted(free), size)
                for rest in fill(free - set(chosen), left - 1)]
    return fill(frozenset(range(experts)), ranks)


def best_of_all(problem: PlacementProblem, objective: str) -> float:
    """Brute force: the objective of every plan, the first layer fixed to one per symmetry only by taking all."""
    goal, rows = OBJECTIVES[objective], layer_rows(problem.num_experts, problem.num_ranks)
    values = (goal.value(problem, PlacementPlan(np.array(plan), problem.num_ranks, problem.num_experts))
              for plan in itertools.product(rows, repeat=problem.num_layers))
    return min(values) if goal.sense == "min" else max(values)


@pytest.mark.parametrize(("experts", "ranks", "per_node", "layers", "seeds"), [
    (4, 2, 2, 3, range(12)),  # flat, two experts per rank
    (4, 2, 1, 3, range(12)),  # every rank a node
    (4, 4, 2, 2, range(4)),  # one expert per rank, two nodes
    (3, 3, 3, 3, range(8)),  # one expert per rank, flat: assignments
    (2, 2, 1, 4, range(12)),
])
@pytest.mark.parametrize("objective", NAMES)
def test_equals_brute_force(experts: int, ranks: int, per_node: int, layers: int, seeds: range,
                            objective: str) -> None:
    """No plan of all is better, the plan has the value it is said to have, and the certificate proves it."""
    for seed in seeds:
        problem = small_problem(seed, experts, ranks, per_node, layers, tied=seed % 3 == 0)
        result = exact(problem, seed=0, time_limit_s=30.0, objective=objective)
        assert result.status is SolveStatus.OPTIMAL
        assert result.plan is not None
        assert result.certificate is not None
        problem.check(result.plan)
        assert result.objective == OBJECTIVES[objective].value(problem, result.plan)
        assert result.objective == pytest.approx(best_of_all(problem, objective), rel=1e-12, abs=1e-12)
        proven = CHECKS[result.certificate.method](problem, result.certificate)
        assert proven == pytest.approx(result.objective, rel=1e-9, abs=1e-9)
        better = OBJECTIVES[objective].better(proven, result.objective)
        assert better or proven == pytest.approx(result.objective, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("ranks", "per_node"), [(3, 3), (3, 1), (6, 3), (6, 2)])
@pytest.mark.parametrize("objective", ["hops", "bottleneck"])
def test_two_layers_of_six(ranks: int, per_node: int, objective: str) -> None:
    """With six experts and two layers the optimum equals the best second layer for every first one."""
    rows = layer_rows(6, ranks)
    for seed in range(3):
        problem = small_problem(seed, 6, ranks, per_node, 2)
        result = exact(problem, seed=0, time_limit_s=30.0, objective=objective)
        goal = OBJECTIVES[objective]
        # relabelling both layers alike costs nothing inside a node, so a random part of the first layers is enough
        # to never fall below, and the solver's own first layer to reach it
        assert result.plan is not None
        firsts = [tuple(result.plan.physical_to_logical[0])]
        if ranks == 3:
            firsts += [rows[i] for i in np.random.default_rng(seed).integers(0, len(rows), 8)]
        values = [goal.value(problem, PlacementPlan(np.array([first, second]), ranks, 6))
                  for first in firsts for second in rows]
        assert result.objective == pytest.approx(min(values), rel=1e-12)


@pytest.mark.parametrize(("ranks", "per_node", "states"), [
    (4, 4, 105), (4, 2, 315), (8, 8, 1), (8, 4, 35), (2, 2, 35), (2, 1, 35)])
def test_states_of_eight_experts(ranks: int, per_node: int, states: int) -> None:
    """The number of placements up to symmetry is known: 2520 labelled ones of 8 experts on 4 ranks are 105."""
    assert num_states(8, ranks, per_node) == states


def test_no_random_plan_beats_eight_layers_of_eight() -> None:
    """At the size of a model's layers (8 experts, 4 ranks in 2 nodes) no plan of many beats the proven optimum."""
    rng = np.random.default_rng(1)
    problem = small_problem(5, 8, 4, 2, 8)
    for objective in NAMES:
        result = exact(problem, seed=0, time_limit_s=60.0, objective=objective)
        assert result.objective is not None
        for _ in range(100):
            rows = rng.permuted(np.tile(np.arange(8), (8, 1)), axis=1)
            value = OBJECTIVES[objective].value(problem, PlacementPlan(rows, 4, 8))
            assert not OBJECTIVES[objective].better(value, result.objective)


def test_milp_agrees_on_a_bottleneck_assignment() -> None:
    """Without symmetry or dynamic programming, a mixed-integer program finds the same bottleneck over two layers."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    problem = small_problem(11, 4, 2, 2, 2)
    assert problem.rates is not None
    assert problem.transitions is not None
    flow = problem.transitions[0] * problem.rates.pair_weight * problem.rates.node_s
    # x[l, e]: expert on rank 1; y[i, j]: i and j are apart; t: the pair's exchange; the loads are whole maxima m[l]
    index = {name: k for k, name in enumerate(
        [("x", 0, e) for e in range(4)] + [("x", 1, e) for e in range(4)]
        + [(way, i, j) for way in ("up", "down") for i in range(4) for j in range(4)] + ["t", "m0", "m1"])}
    rows, lower, upper = [], [], []

    def add(terms: dict, low: float, high: float) -> None:
        row = np.zeros(len(index))
        for name, value in terms.items():
            row[index[name]] = value
        rows.append(row)
        lower.append(low)
        upper.append(high)

    for layer in range(2):
        load = problem.expert_load[layer] * problem.rates.row_s
        add({("x", layer, e): 1.0 for e in range(4)}, 2, 2)
        add({**{("x", layer, e): -load[e] for e in range(4)}, f"m{layer}": 1.0}, 0, np.inf)
        add({**{("x", layer, e): load[e] for e in range(4)}, f"m{layer}": 1.0}, load.sum(), np.inf)
    for i, j in itertools.product(range(4), repeat=2):
        add({("up", i, j): 1.0, ("x", 1, j): -1.0, ("x", 0, i): 1.0}, 0, np.inf)
        add({("down", i, j): 1.0, ("x", 0, i): -1.0, ("x", 1, j): 1.0}, 0, np.inf)
    for way in ("up", "down"):  # what one rank sends the other receives
        add({"t": 1.0, **{(way, i, j): -flow[i, j] for i in range(4) for j in range(4)}}, 0, np.inf)
    cost = np.zeros(len(index))
    cost[[index["t"], index["m0"], index["m1"]]] = 1
    whole = np.array([name[0] == "x" for name in index], int)
    top = np.where(whole, 1.0, np.inf)
    answer = milp(cost, constraints=LinearConstraint(np.array(rows), lower, upper), integrality=whole,
                  bounds=Bounds(np.zeros(len(index)), top))
    result = exact(problem, seed=0, time_limit_s=10.0, objective="bottleneck")
    assert result.objective == pytest.approx(answer.fun, rel=1e-7)


@pytest.mark.parametrize("worst", [False, True])
def test_assignments_by_enumeration(worst: bool) -> None:
    """Both kinds of assignment equal the best of all permutations, and their proofs hold on their own."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        size = int(rng.integers(1, 6))
        cost = rng.integers(0, 5, (size, size)).astype(float)
        columns, value, proof = assign(cost, worst)
        chosen = cost[np.arange(size), columns]
        assert sorted(columns) == list(range(size))
        assert value == (chosen.max() if worst else chosen.sum())
        every = [cost[np.arange(size), list(order)] for order in itertools.permutations(range(size))]
        assert value == min(one.max() if worst else one.sum() for one in every)
        if worst:
            threshold, rows = proof
            assert threshold == value
            assert (cost[rows] < threshold).any(axis=0).sum() < rows.sum()
        else:
            assert np.all(proof[0][:, None] + proof[1][None, :] <= cost + 1e-12)
            assert proof[0].sum() + proof[1].sum() == pytest.approx(value)


def test_starts_are_kept_and_ties_go_to_the_search() -> None:
    """A start can be no better than a proven optimum; the result says so."""
    problem = small_problem(3, 4, 2, 2, 3)
    first = exact(problem, seed=0, time_limit_s=10.0)
    again = exact(problem, seed=0, time_limit_s=10.0, starts=(first.plan,))
    assert again.objective == first.objective
    assert again.status is SolveStatus.OPTIMAL


def test_out_of_time_keeps_the_best_start() -> None:
    """When the clock ends the search the best start is the answer, without a bound; without starts there is none."""
    problem = small_problem(3, 8, 4, 4, 4)
    starts = [PlacementPlan(np.tile(np.roll(np.arange(8), k), (4, 1)), 4, 8) for k in (0, 1)]
    result = exact(problem, seed=0, time_limit_s=-1.0, objective="hops", starts=starts)
    assert result.status is SolveStatus.FEASIBLE
    assert result.objective == min(OBJECTIVES["hops"].value(problem, plan) for plan in starts)
    assert result.objective_bound is None
    assert exact(problem, seed=0, time_limit_s=-1.0).status is SolveStatus.UNKNOWN


@pytest.mark.parametrize(("change", "options", "error", "text"), [
    ({}, {"objective": "afinity"}, InputError, "Did you mean 'affinity'"),
    ({"slots_per_rank": 3}, {}, InputError, "needs one slot per expert, got 6 slots for 4"),
    ({"constraints": Constraints(pins=(Pin(0, 1),))}, {}, InputError, "takes no constraints"),
    ({"transitions": None}, {}, InputError, "needs transitions"),
    ({"rates": None}, {"objective": "bottleneck"}, InputError, "needs rates"),
])
def test_refuses(change: dict, options: dict, error: type, text: str) -> None:
    """Problems that the method does not fit are refused with the reason."""
    problem = dataclasses.replace(small_problem(0, 4, 2, 2, 3), **change)
    with pytest.raises(error, match=text):
        exact(problem, seed=0, time_limit_s=1.0, **options)


def test_too_many_states_are_counted() -> None:
    """Sixteen experts on four ranks are 2 627 625 placements: too many, and another solver is named."""
    problem = small_problem(0, 16, 4, 4, 2)
    with pytest.raises(SolverError, match=r"2627625 placements.*use the solver 'bottleneck'"):
        exact(problem, seed=0, time_limit_s=1.0, objective="bottleneck")


@pytest.mark.parametrize("objective", NAMES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_false_multipliers_prove_less(objective: str, ranks: int) -> None:
    """Whatever multipliers a certificate holds, what the checker vouches for never passes the optimum."""
    problem = small_problem(7, 4, ranks, ranks, 3)
    result = exact(problem, seed=0, time_limit_s=10.0, objective=objective)
    assert result.certificate is not None
    assert result.objective is not None
    rng = np.random.default_rng(2)
    for name, values in result.certificate.arrays.items():
        if name in ("states", "rows"):
            continue
        for _ in range(20):
            false = values + rng.normal(0.0, 1.0 + np.abs(values).max(), values.shape) * (rng.random(values.shape) < 0.3)
            forged = dataclasses.replace(result.certificate, arrays={**result.certificate.arrays, name: false})
            proven = CHECKS[forged.method](problem, forged)
            assert not OBJECTIVES[objective].better(result.objective, proven) or proven == pytest.approx(result.objective)


@pytest.mark.parametrize(("name", "change", "text"), [
    ("potential", None, "'potential' is missing"),
    ("potential", lambda a: a[:1], "potential must be"),
    ("potential", lambda a: a * np.nan, "not finite"),
    ("states", lambda a: a[:-1], "states must be"),
    ("states", lambda a: np.concatenate([a[1:], a[1:2]]), "repeat a placement"),
    ("states", lambda a: a * 0, "fill every rank"),
    ("states", lambda a: a + 7, "states must be ranks"),
])
def test_tampered_potentials_are_refused(name: str, change: object, text: str) -> None:
    """A certificate whose arrays are missing, misshapen, or leave a placement out proves nothing."""
    problem = small_problem(7, 4, 2, 2, 3)
    proof = exact(problem, seed=0, time_limit_s=10.0).certificate
    assert proof is not None
    arrays = dict(proof.arrays)
    if change is None:
        del arrays[name]
    else:
        arrays[name] = change(arrays[name])  # type: ignore[operator]
    with pytest.raises(CheckError, match=text):
        CHECKS[proof.method](problem, dataclasses.replace(proof, arrays=arrays))


def test_duals_are_for_one_expert_per_rank() -> None:
    """Assignment duals shown for a problem of several experts per rank are refused, and so are misshapen ones."""
    single = small_problem(1, 4, 4, 4, 3)
    proof = exact(single, seed=0, time_limit_s=10.0, objective="bottleneck").certificate
    assert proof is not None
    assert proof.method == "assignment-duals"
    with pytest.raises(CheckError, match="one expert per rank"):
        CHECKS[proof.method](small_problem(1, 4, 2, 2, 3), proof)
    with pytest.raises(CheckError, match="rows must be"):
        CHECKS[proof.method](single, dataclasses.replace(proof, arrays={**proof.arrays, "rows": np.ones((1, 4))}))
