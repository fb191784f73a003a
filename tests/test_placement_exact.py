"""Solvers and bounds against every plan there is, on instances small enough to list them."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moesim.errors import InputError
from moesim.placement import metrics
from moesim.placement.bounds import affinity_bound, balance_bound, copies_by_load
from moesim.placement.place import place
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveStatus


@cache
def all_rows(num_experts: int, num_slots: int, slots_per_rank: int) -> list[tuple[int, ...]]:
    """Return every way to fill the slots with every expert at least once, slots of a rank in rising order."""
    return [row for row in itertools.product(range(num_experts), repeat=num_slots)
            if len(set(row)) == num_experts
            and all(row[i] <= row[i + 1] for i in range(num_slots - 1) if (i + 1) % slots_per_rank)]


def best_largest_load(load: np.ndarray, num_ranks: int, slots_per_rank: int) -> float:
    """Return the smallest largest rank load over all rows, by listing them."""
    rows = np.array(all_rows(len(load), num_ranks * slots_per_rank, slots_per_rank))
    copies = np.stack([(rows == expert).sum(axis=1) for expert in range(len(load))], axis=1)
    share = load[rows] / np.take_along_axis(copies, rows, axis=1)
    return float(share.reshape(len(rows), num_ranks, slots_per_rank).sum(axis=2).max(axis=1).min())


def problem_of(load: list[list[float]], num_ranks: int, slots_per_rank: int) -> PlacementProblem:
    """Return a problem without transitions."""
    return PlacementProblem(np.array(load, dtype=float), num_ranks, slots_per_rank, 1)


def integer_loads(num_layers: int, num_experts: int, seed: int) -> list[list[float]]:
    """Return whole loads on which greedy packing is often wrong."""
    return np.random.default_rng(seed).integers(20, 60, (num_layers, num_experts)).astype(float).tolist()


def test_cpsat_is_cbc_is_the_best_of_all_plans() -> None:
    """Both backends prove the optimum that listing every plan finds, where LPT misses some of them."""
    loads = integer_loads(4, 6, seed=7)
    problem = problem_of(loads, 2, 3)
    best = sum(best_largest_load(np.array(load), 2, 3) for load in loads)
    for backend in ("cpsat", "pulp"):
        result = place(problem, "ilp", backend=backend, time_limit_s=30)
        assert (result.status, result.objective, result.objective_bound) == (SolveStatus.OPTIMAL, best, best)
    assert place(problem, "lpt").objective > best


def test_fractional_loads_keep_a_valid_bound() -> None:
    """Loads that are not whole are rounded so that the bound stays below the true optimum, and close to it."""
    loads = (np.random.default_rng(3).random((4, 6)) + 0.5).tolist()
    best = sum(best_largest_load(np.array(load), 3, 2) for load in loads)
    result = place(problem_of(loads, 3, 2), "ilp", time_limit_s=30)
    assert result.status is SolveStatus.OPTIMAL
    assert result.objective == pytest.approx(best, rel=1e-12)
    assert best * (1 - 1e-9) <= result.objective_bound <= best


@pytest.mark.parametrize("backend", ["cpsat", "pulp"])
def test_free_replicas_are_the_best_of_all_plans(backend: str) -> None:
    """Deciding copies and places together finds the optimum over all ways to fill the slots."""
    loads = [[30.0, 20.0, 11.0, 5.0], [17.0, 16.0, 15.0, 1.0]]
    best = [best_largest_load(np.array(load), 2, 3) for load in loads]
    result = place(problem_of(loads, 2, 3), "ilp", backend=backend, replicas="free", time_limit_s=30)
    assert result.objective == pytest.approx(sum(best), rel=1e-12)
    assert result.status is SolveStatus.OPTIMAL
    assert place(problem_of(loads, 2, 3), "lpt").objective > sum(best) + 1e-9


def test_fixed_replicas_claim_no_more_than_the_trivial_bound() -> None:
    """With the copies given, a proof of the packing proves nothing about other copies."""
    loads = [[30.0, 20.0, 11.0, 5.0], [17.0, 16.0, 15.0, 1.0]]
    problem = problem_of(loads, 2, 3)
    result = place(problem, "ilp", time_limit_s=10)
    assert result.objective_bound == balance_bound(problem).sum()
    assert result.objective_bound <= sum(best_largest_load(np.array(load), 2, 3) for load in loads)


def test_parallel_search_finds_the_same_optimum() -> None:
    """Two workers prove what one proves."""
    problem = problem_of(integer_loads(2, 8, seed=1), 4, 2)
    one, two = (place(problem, "ilp", num_workers=count, time_limit_s=30) for count in (1, 2))
    assert one.status is two.status is SolveStatus.OPTIMAL
    assert one.objective == two.objective


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=4, max_size=4), st.sampled_from([(2, 2), (2, 3), (4, 1), (3, 2)]))
def test_no_plan_is_below_the_balance_bound(load: list[int], shape: tuple[int, int]) -> None:
    """The bound is at most the best of all plans."""
    bound = balance_bound(problem_of([load], *shape))[0]
    assert bound <= best_largest_load(np.array(load, dtype=float), *shape) * (1 + 1e-12)


@pytest.mark.parametrize(("load", "num_ranks", "slots_per_rank", "bound"), [
    ([5, 5, 5, 0], 2, 2, 10),  # two of three equal experts share a rank; the mean is 7.5
    ([9, 1, 1, 1], 2, 2, 10),  # the heaviest expert brings the lightest with it
    ([3, 3, 3, 2], 2, 2, 6),  # whole loads: the mean 5.5 becomes 6
    ([100, 1, 1], 2, 2, 51),  # one redundant slot halves the heaviest; the mean is 51
    ([100, 90, 2, 2], 5, 1, 90),  # one copy more, but the second expert stays whole
])
def test_balance_bound_by_hand(load: list[int], num_ranks: int, slots_per_rank: int, bound: float) -> None:
    """Each term of the bound bites on an example where it equals the optimum."""
    assert balance_bound(problem_of([load], num_ranks, slots_per_rank)).tolist() == [bound]
    assert best_largest_load(np.array(load, dtype=float), num_ranks, slots_per_rank) == bound


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=4), st.integers(0, 4))
def test_copies_by_load_minimise_the_largest_share(load: list[int], extra: int) -> None:
    """No other choice of copies with as many slots has a smaller largest load per copy."""
    num_slots = len(load) + extra
    copies, given_to = copies_by_load(load, num_slots)
    best = min(max(value / count for value, count in zip(load, counts, strict=True))
               for counts in itertools.product(range(1, extra + 2), repeat=len(load)) if sum(counts) == num_slots)
    assert max(np.array(load) / copies) == best
    assert (1 + np.bincount(np.array(given_to, int), minlength=len(load))).tolist() == copies.tolist()


def layer_pair(num_experts: int, seed: int) -> np.ndarray:
    """Return float64[1, expert, expert], transitions of one layer pair."""
    return np.floor(np.random.default_rng(seed).lognormal(1, 1.2, (1, num_experts, num_experts)))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("scope", ["rank", "node"])
def test_no_plan_keeps_more_than_the_affinity_bound(seed: int, scope: str) -> None:
    """Over all plans of two layers, replicas included, the kept fraction stays below the bound."""
    transitions = layer_pair(3, seed)
    problem = PlacementProblem(np.ones((2, 3)), 4, 1, 2, transitions=transitions)
    rows = all_rows(3, 4, 1)
    kept = max(metrics.kept_transitions(PlacementPlan(np.array(pair), 4, 3), transitions, 2)[scope]
               for pair in itertools.product(rows, rows))
    assert kept <= affinity_bound(problem, scope) + 1e-12


@pytest.mark.parametrize(("scope", "slots_per_rank", "capacity"), [
    ("rank", 2, 2), ("node", 2, 4), ("rank", 3, 3), ("node", 3, 6)])
def test_affinity_bound_is_the_linear_program(scope: str, slots_per_rank: int, capacity: int) -> None:
    """The minimum-cost flow gives the value of scipy's LP over co-location matrices.

    Their rows and columns sum to the capacity; with redundant slots to at most it.
    """
    transitions = layer_pair(8, 5) + 0.25  # not whole: also covers the rounding
    problem = PlacementProblem(np.ones((2, 8)), 4, slots_per_rank, 2, transitions=transitions)
    rows = np.kron(np.eye(8), np.ones(8))
    columns = np.kron(np.ones(8), np.eye(8))
    limits = (np.vstack([rows, columns]), np.full(16, capacity))
    exact = {"A_eq": limits[0], "b_eq": limits[1]} if slots_per_rank == 2 else {"A_ub": limits[0], "b_ub": limits[1]}
    solved = linprog(-transitions.ravel(), bounds=(0, 1), **exact)
    assert affinity_bound(problem, scope) == pytest.approx(-solved.fun / transitions.sum(), rel=1e-9)


def test_affinity_bound_of_one_node_is_everything() -> None:
    """Where all ranks are one node no transition leaves it."""
    problem = PlacementProblem(np.ones((2, 4)), 2, 2, 2, transitions=layer_pair(4, 0))
    assert affinity_bound(problem, "node") == 1.0
    assert affinity_bound(problem, "rank") < 1.0


def test_affinity_bound_names_its_scopes() -> None:
    """Another scope is refused with a suggestion."""
    problem = PlacementProblem(np.ones((2, 4)), 2, 2, 2, transitions=layer_pair(4, 0))
    with pytest.raises(InputError, match=r"unknown scope 'nodes'. Did you mean 'node'\?"):
        affinity_bound(problem, "nodes")


@pytest.mark.parametrize("node_weight", [0.0, 0.75])
def test_no_single_layer_improves_a_swept_plan(node_weight: float) -> None:
    """After the sweeps, no other placement of any one layer keeps more, as listing them all shows."""
    rng = np.random.default_rng(11)
    transitions = np.floor(rng.lognormal(1, 1.2, (3, 4, 4)))
    problem = PlacementProblem(np.ones((4, 4)), 4, 1, 2, transitions=transitions)
    plan = place(problem, "affinity", node_weight=node_weight).plan

    def kept(slots: np.ndarray) -> float:
        parts = metrics.kept_transitions(PlacementPlan(slots, 4, 4), transitions, 2)
        return node_weight * parts["node"] + (1 - node_weight) * parts["rank"]

    for layer, row in itertools.product(range(4), itertools.permutations(range(4))):
        slots = plan.physical_to_logical.copy()
        slots[layer] = row
        assert kept(slots) <= kept(plan.physical_to_logical) + 1e-12


def test_affinity_is_near_the_best_of_all_plans() -> None:
    """On two layers of four experts, where all plans can be listed, the search finds the best."""
    for seed in range(4):
        transitions = layer_pair(4, seed)
        problem = PlacementProblem(np.ones((2, 4)), 2, 2, 1, transitions=transitions)
        rows = all_rows(4, 4, 2)
        best = max(metrics.kept_transitions(PlacementPlan(np.array(pair), 2, 4), transitions, 1)["rank"]
                   for pair in itertools.product(rows, rows))
        result = place(problem, "affinity")
        assert result.objective == pytest.approx(best, abs=1e-12)
