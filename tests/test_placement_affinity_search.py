"""The affinity search: exact layers, values that agree with the objective, and starts that are never worsened."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moesim.placement.affinity_search import AffinitySearch
from moesim.placement.kernels import affinity as kernels
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.objectives.affinity import kept_fraction
from moesim.placement.place import place
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.solvers import SOLVERS


def problem_of(seed: int, num_experts: int, num_ranks: int, slots_per_rank: int = 0, *,
               num_layers: int = 4) -> PlacementProblem:
    """Return a problem of nodes of two ranks with uneven transitions."""
    rng = np.random.default_rng(seed)
    return PlacementProblem(np.floor(rng.lognormal(3, 1, (num_layers, num_experts))), num_ranks,
                            slots_per_rank or num_experts // num_ranks, 2,
                            transitions=np.floor(rng.lognormal(1, 1.2, (num_layers - 1, num_experts, num_experts))))


def random_homes(search: AffinitySearch, seed: int) -> np.ndarray:
    """Return homes drawn at random, every rank full."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(search.block(), (search.num_layers, 1)), axis=1)


@pytest.mark.parametrize("seed", range(60))
def test_cancelling_cycles_places_a_layer_exactly(seed: int) -> None:
    """From any start the assignment has the gain of scipy's Hungarian method, and full ranks stay full."""
    rng = np.random.default_rng(seed)
    num_ranks, capacity = int(rng.integers(1, 8)), int(rng.integers(1, 5))
    shape = (num_ranks * capacity, num_ranks)
    gain = (rng.integers(0, 9, shape).astype(float), rng.normal(0, 5, shape))[seed % 2]
    home = rng.permutation(np.repeat(np.arange(num_ranks), capacity))
    before = gain[np.arange(len(home)), home].sum()
    won = kernels.assign(gain, home, 2.0**-40)
    wide = np.repeat(gain, capacity, axis=1)
    best = wide[linear_sum_assignment(wide, maximize=True)].sum()
    assert gain[np.arange(len(home)), home].sum() == pytest.approx(best, abs=1e-9)
    assert before + won == pytest.approx(best, abs=1e-9)
    assert np.bincount(home).tolist() == [capacity] * num_ranks


@pytest.mark.parametrize("node_weight", [0.0, 0.75, 1.0])
def test_values_agree_with_the_objective(node_weight: float) -> None:
    """The kernel's value of homes is the exact fraction kept of their plan, times all transitions."""
    problem = problem_of(3, 8, 4)
    search = AffinitySearch(problem, problem.transitions, node_weight)
    for seed in range(20):
        homes = random_homes(search, seed)
        plan = PlacementPlan(search.slots_of(homes), 4, 8)
        kept = kept_fraction(problem, plan, node_weight) * problem.transitions.sum()
        assert search.value(homes) == pytest.approx(kept, rel=1e-12)
        np.testing.assert_array_equal(search.homes_of(plan.physical_to_logical), homes)


@pytest.mark.parametrize("node_weight", [0.0, 0.6])
def test_gains_are_what_a_move_changes(node_weight: float) -> None:
    """The gain of an expert on a rank is the value with it there, less the value with it nowhere."""
    problem = problem_of(1, 6, 6, num_layers=3)
    search = AffinitySearch(problem, problem.transitions, node_weight)
    homes = random_homes(search, 0)
    gain = kernels.layer_gain(search.counts, search.back, homes, 1, True, node_weight, 2, 6)
    for expert, rank, other in itertools.product(range(6), range(6), range(6)):
        values = []
        for place_ in (rank, other):
            homes[1, expert] = place_
            values.append(search.value(homes))
        assert values[0] - values[1] == pytest.approx(gain[expert, rank] - gain[expert, other], abs=1e-9)


@pytest.mark.parametrize("node_weight", [0.0, 0.6, 1.0])
def test_annealing_counts_its_own_gain(node_weight: float) -> None:
    """The gain that the swaps add up to is the difference of values, and the tables stay those of the homes."""
    problem = problem_of(2, 12, 4)
    search = AffinitySearch(problem, problem.transitions, node_weight)
    homes = random_homes(search, 1)
    before = search.value(homes)
    places = [np.arange(4), np.arange(4) // 2]
    tables = [kernels.tables(search.counts, search.back, homes, place_, int(place_[-1]) + 1) for place_ in places]
    won = kernels.anneal(search.counts, search.back, homes, *tables, node_weight, 2, 5000, 20.0, 1.0,
                         np.random.default_rng(0))
    assert before + won == pytest.approx(search.value(homes), rel=1e-12)
    fresh = [kernels.tables(search.counts, search.back, homes, place_, int(place_[-1]) + 1) for place_ in places]
    np.testing.assert_allclose(tables[0], fresh[0])
    if node_weight:
        np.testing.assert_allclose(tables[1], fresh[1])
    assert (np.sort(homes, axis=1) == search.block()).all()


def test_annealing_escapes_where_sweeps_stop() -> None:
    """Annealed plans keep more than swept ones on problems with structure, and never less."""
    won = 0
    for seed in range(6):
        problem = problem_of(seed, 16, 4, num_layers=6)
        swept = place(problem, "affinity", anneal_moves=0).objective
        annealed = place(problem, "affinity", anneal_moves=200).objective
        assert annealed >= swept
        won += annealed > swept
    assert won >= 3


@pytest.mark.parametrize("slots_per_rank", [2, 3])
@pytest.mark.parametrize("node_weight", [0.0, 0.5])
def test_starts_are_never_worsened(slots_per_rank: int, node_weight: float) -> None:
    """Whatever the clock allows, the result keeps at least as much as each start, replicas and odd plans included."""
    for seed in range(12):
        problem = problem_of(seed, 8, 4, slots_per_rank)
        starts = [place(problem, name, seed=seed).plan for name in ("random", "lpt", "eplb")]
        starts.append(place(problem, "affinity", node_weight=node_weight, seed=7).plan)
        result = SOLVERS["affinity"](problem, seed=seed, time_limit_s=1e-9, starts=starts, node_weight=node_weight)
        assert result.objective == kept_fraction(problem, result.plan, node_weight)
        assert result.objective >= max(kept_fraction(problem, plan, node_weight) for plan in starts)


def test_a_start_is_improved_in_place() -> None:
    """Sweeps go on from a start: with no other start in time, the result is the start made better."""
    problem = problem_of(5, 12, 4, num_layers=8)
    good = place(problem, "affinity", anneal_moves=300).plan
    slots = good.physical_to_logical.copy()
    slots[3, [0, 11]] = slots[3, [11, 0]]
    spoilt = PlacementPlan(slots, 4, 12)
    result = SOLVERS["affinity"](problem, seed=0, time_limit_s=10, starts=[spoilt], num_starts=0, anneal_moves=0)
    assert result.objective >= kept_fraction(problem, good) - 1e-12


def test_progress_hears_rising_plans() -> None:
    """Every report is a better plan, and the last is the result's."""
    problem, heard = problem_of(0, 16, 4, num_layers=6), []
    progress = Progress(lambda report: heard.append(report.objective), sense="max")
    result = SOLVERS["affinity"](problem, seed=0, time_limit_s=10, progress=progress)
    found = [value for value in heard if value is not None]
    assert found == sorted(found)
    assert progress.objective == result.objective
    assert OBJECTIVES["affinity"].value(problem, PlacementPlan(progress.slots, 4, 16)) == result.objective


def test_rounding_a_plan_gives_it_back() -> None:
    """The co-location matrices of a plan, taken for relaxed ones, are rounded to a plan that is no worse."""
    problem = problem_of(4, 12, 4)
    search = AffinitySearch(problem, problem.transitions, 0.0)
    homes = search.forward(search.block())
    search.sweep(homes, float("inf"))
    same = np.stack([np.equal.outer(here, there) for here, there in itertools.pairwise(homes)]).astype(float)
    assert search.value(search.round(same)) >= search.value(homes)
