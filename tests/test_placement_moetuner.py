"""MoETuner: both programs against enumeration, against each other and against the paper's own slip."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from moesim.errors import InputError
from moesim.placement.metrics import rank_load
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.place import place, problem_from_trace
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.solvers._homes import homes_from_plan
from moesim.placement.solvers._moetuner_balance import ClusterTask, solve_clusters
from moesim.placement.solvers._moetuner_mapping import (
    MappingTask,
    _two_sided,
    relative_mapping,
    searched_mapping,
    viterbi_mapping,
)
from moesim.placement.solvers._moetuner_program import solve_program
from moesim.placement.step_sample import ExchangeRates
from moesim.traces.blocks import block_trace


def all_clusters(experts: int, count: int, least: int, most: int) -> list[np.ndarray]:
    """Every way to put experts into clusters of allowed sizes (with repetitions by renaming)."""
    found = []
    for one in itertools.product(range(count), repeat=experts):
        sizes = np.bincount(one, minlength=count)
        if sizes.min() >= least and sizes.max() <= most:
            found.append(np.array(one))
    return found


def zipf(experts: int, seed: int, exponent: float = 1.0) -> np.ndarray:
    """Whole loads that fall like 1 / rank, in random order."""
    rng = np.random.default_rng(seed)
    return np.floor(rng.permutation(10_000 / (np.arange(experts) + 1) ** exponent) + rng.integers(0, 100, experts))


# ---------------------------------------------------------------- the first program


@pytest.mark.parametrize("backend", ["cpsat", "pulp"])
@pytest.mark.parametrize("variant", ["l1", "minmax"])
@pytest.mark.parametrize(("experts", "count", "least", "most"), [(6, 3, 2, 2), (6, 3, 1, 4), (7, 2, 1, 6), (4, 4, 1, 1)])
def test_clusters_are_those_of_enumeration(backend: str, variant: str, experts: int, count: int, least: int,
                                           most: int) -> None:
    """Fixed and free sizes, both objectives, both backends: the optimum, proven, within the tolerance."""
    for seed in range(4 if backend == "cpsat" else 2):
        for tolerance in (0.0, 0.025):
            task = ClusterTask(zipf(experts, seed), count, least, most, variant)
            best = min(task.value(one) for one in all_clusters(experts, count, least, most))
            found = solve_clusters(task, backend=backend, limit_s=120, seed=seed, tolerance=tolerance)  # pauses happen
            assert found.objective == task.value(found.cluster)
            assert best - 1e-3 <= found.objective <= best / (1 - tolerance) + 1e-3
            assert found.bound <= best + 1e-3
            assert found.bound >= best * (1 - tolerance) - 1e-3
            sizes = np.bincount(found.cluster, minlength=count)
            assert least <= sizes.min() <= sizes.max() <= most


@pytest.mark.parametrize("variant", ["l1", "minmax"])
def test_loads_that_are_not_whole_keep_their_bound_valid(variant: str) -> None:
    """Scaled and rounded loads: the optimum of the fractions to within rounding, the bound not above it."""
    for seed in range(5):
        task = ClusterTask(np.random.default_rng(seed).random(6), 3, 2, 2, variant)
        best = min(task.value(one) for one in all_clusters(6, 3, 2, 2))
        found = solve_clusters(task, backend="cpsat", limit_s=10, seed=0, tolerance=0.0)
        assert found.objective == pytest.approx(best, abs=1e-5)
        assert best - 1e-5 <= found.bound <= best


def printed_program(load: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """MoETuner's equations 1-7 as printed: only ``sum_e x[c, e] >= 1``. Returns x[c, e] and the deviation."""
    experts = len(load)
    size = count * experts
    cost = np.concatenate([np.zeros(size), np.ones(count)])
    mean = load.sum() / count
    above, below, filled = (np.zeros((count, size + count)) for _ in range(3))
    for c in range(count):
        own = slice(c * experts, (c + 1) * experts)
        above[c, own], above[c, size + c] = load, -1
        below[c, own], below[c, size + c] = -load, -1
        filled[c, own] = 1
    found = milp(cost, integrality=np.concatenate([np.ones(size), np.zeros(count)]),
                 bounds=Bounds(0, np.concatenate([np.ones(size), np.full(count, np.inf)])),
                 constraints=[LinearConstraint(above, -np.inf, mean), LinearConstraint(below, -np.inf, -mean),
                              LinearConstraint(filled, 1, np.inf)])
    return np.round(found.x[:size]).reshape(count, experts), float(found.fun)


def test_the_program_as_printed_is_degenerate() -> None:
    """Without one cluster per expert, some experts are in several clusters and others in none, at a fraction of the cost.

    8 experts, 4 clusters, a heavy one among them: the deviation of the printed program is far below what any
    assignment reaches; ours is the best assignment.
    """
    load = np.array([30000.0, 9011, 7013, 5003, 3001, 2003, 1009, 503])
    x, deviation = printed_program(load, 4)
    times = x.sum(axis=0)
    assert times.max() > 1
    assert times.min() == 0
    task = ClusterTask(load, 4, 1, 8, "l1")
    best = min(task.value(one) for one in all_clusters(8, 4, 1, 8))
    assert deviation < best / 20
    ours = solve_clusters(task, backend="cpsat", limit_s=10, seed=0, tolerance=0.0)
    assert ours.objective == best


def test_deviation_is_not_the_tail() -> None:
    """Free sizes: some layer's best deviation has a busier cluster than the minmax variant, which is never above."""
    worse = 0
    for seed in range(4):
        load = zipf(9, seed, 0.5)
        totals = {}
        for variant in ("l1", "minmax"):
            task = ClusterTask(load, 4, 1, 6, variant)
            found = solve_clusters(task, backend="cpsat", limit_s=10, seed=0, tolerance=0.0)
            totals[variant] = np.bincount(found.cluster, weights=load).max()
        assert totals["minmax"] <= totals["l1"]
        worse += totals["minmax"] < totals["l1"]
    assert worse


def test_a_large_layer_is_no_worse_than_lpt_in_no_time() -> None:
    """256 experts on 32 ranks, where programs find nothing: LPT's plan stands, and nothing is claimed of it."""
    load = zipf(256, 0)
    problem = PlacementProblem(load[None], 32, 8, 8)
    ours, lpt = (place(problem, name, time_limit_s=1) for name in ("moetuner", "lpt"))
    assert ours.objective is not None
    assert lpt.objective is not None
    assert ours.plan is not None
    assert ours.plan.provenance["balance_bound"] <= ours.plan.provenance["balance_objective"]
    task = ClusterTask(load, 32, 8, 8, "l1")
    assert ours.plan.provenance["balance_objective"] <= task.value(task.greedy())


# ---------------------------------------------------------------- the second program


def random_task(ranks: int, layers: int, seed: int, per_node: int = 0, sizes: np.ndarray | None = None,
                weight: float = 0.0) -> MappingTask:
    """Random counts; links equal, or nine times slower between nodes."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 1000, (layers - 1, ranks, ranks)).astype(float)
    node = np.arange(ranks) // (per_node or ranks)
    link = np.where(node[:, None] == node[None], 1.0, 9.0) - np.eye(ranks)
    return MappingTask(counts, link, np.ones((layers, ranks), np.int64) if sizes is None else sizes, weight)


def best_mapping(task: MappingTask) -> float:
    """Enumerate all mappings of all layers."""
    layers, ranks = task.sizes.shape
    states = [np.array(p) for p in itertools.permutations(range(ranks))]
    return min(task.value(np.stack(one)) for one in itertools.product(states, repeat=layers))


@pytest.mark.parametrize("per_node", [0, 1])
def test_the_shortest_path_is_that_of_enumeration(per_node: int) -> None:
    """Three ranks and layers: Viterbi reaches the least of all 216 mappings, over equal and unequal links."""
    for seed in range(60):
        task = random_task(3, 3, seed, per_node)
        path = viterbi_mapping(task)
        assert path is not None
        assert task.value(path) == best_mapping(task)


def test_with_equal_links_layers_decouple() -> None:
    """The chain of assignments meets its floor and equals the shortest path, up to five ranks."""
    for seed in range(60):
        task = random_task(2 + seed % 4, 5, seed)
        path = viterbi_mapping(task)
        assert path is not None
        assert task.value(relative_mapping(task)) == task.value(path) == task.floors().sum()


@pytest.mark.parametrize("backend", ["cpsat", "pulp"])
def test_the_program_equals_the_shortest_path(backend: str) -> None:
    """Random small instances: from a bad start both backends reach Viterbi's cost, and no bound is above it."""
    for seed in range(12 if backend == "cpsat" else 4):
        task = random_task(3 + seed % 2, 3, seed, 2 if seed % 2 else 1)
        path = viterbi_mapping(task)
        assert path is not None
        best = task.value(path)
        start = np.tile(np.arange(len(task.link)), (3, 1))
        found, bound = solve_program(task, start, backend=backend, limit_s=30, seed=seed, tolerance=0.0)
        assert task.value(start if found is None else found) == best
        assert best * (1 - 2**-20) <= bound <= best


def test_one_layer_between_two_is_mapped_exactly() -> None:
    """The sweep's step against all permutations."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        size = int(rng.integers(2, 6))
        before, after = rng.integers(0, 12, (2, size, size)).astype(float)
        rows = np.arange(size)
        best = min(before[rows, p].max() + after[rows, p].max() for p in map(list, itertools.permutations(range(size))))
        found = _two_sided(before, after)
        assert sorted(found.tolist()) == rows.tolist()
        assert before[rows, found].max() + after[rows, found].max() == best


def test_sweeps_never_beat_the_shortest_path_and_come_close() -> None:
    """Two nodes of two: sweeps stay within a fifth of the optimum on the mean, and above the floors."""
    gaps = []
    for seed in range(20):
        task = random_task(4, 8, seed, 2)
        path = viterbi_mapping(task)
        assert path is not None
        found = task.value(searched_mapping(task, float("inf")))
        assert task.floors().sum() <= task.value(path) <= found
        gaps.append(found / task.value(path) - 1)
    assert np.mean(gaps) < 0.2


@pytest.mark.parametrize("backend", ["cpsat", "pulp"])
def test_memory_over_the_depth_is_paid_for(backend: str) -> None:
    """Unequal clusters: the program reaches the enumerated optimum of traffic plus experts above the share."""
    sizes = np.array([[3, 2, 1], [1, 3, 2], [3, 1, 2]])
    for seed in range(4 if backend == "cpsat" else 2):
        task = random_task(3, 3, seed, 1, sizes, weight=2000.0)
        start = np.tile(np.arange(3), (3, 1))
        found, bound = solve_program(task, start, backend=backend, limit_s=30, seed=seed, tolerance=0.0)
        assert found is not None
        best = best_mapping(task)
        assert task.value(found) == best
        assert bound == pytest.approx(best)
        dear = random_task(3, 3, seed, 1, sizes, weight=1e6)
        balanced, _ = solve_program(dear, start, backend=backend, limit_s=30, seed=seed, tolerance=0.0)
        assert dear.excess(start if balanced is None else balanced) == 0  # 18 experts: 6 each, which these sizes allow


def test_swaps_lower_the_memory_cost_without_a_program() -> None:
    """With free sizes the search alone ends at or below the sweeps' cost of traffic and memory."""
    rng = np.random.default_rng(1)
    sizes = np.stack([rng.permutation([5, 4, 2, 1]) for _ in range(6)])
    free = random_task(4, 6, 3, 2, sizes, weight=0.0)
    paid = random_task(4, 6, 3, 2, sizes, weight=50_000.0)
    assert paid.excess(searched_mapping(paid, float("inf"))) <= paid.excess(searched_mapping(free, float("inf")))
    assert paid.value(searched_mapping(paid, float("inf"))) <= paid.value(searched_mapping(free, float("inf")))


# ---------------------------------------------------------------- the solver


def small_problem(seed: int = 0, ranks: int = 4, per_node: int = 4, layers: int = 4, experts: int = 8, extra: int = 0,
                  rates: ExchangeRates | None = None) -> PlacementProblem:
    """A block trace on a few ranks."""
    trace = block_trace(600, layers, experts, 2, strength=3.0, seed=seed)
    base = problem_from_trace(trace, num_ranks=ranks, ranks_per_node=per_node, redundant_experts=extra)
    return PlacementProblem(base.expert_load, ranks, base.slots_per_rank, per_node, transitions=base.transitions, rates=rates)


@pytest.mark.parametrize(("per_node", "method"), [(4, "assignments"), (2, "shortest path")])
def test_the_plan_is_what_the_programs_say(per_node: int, method: str) -> None:
    """Objectives in provenance are those of the plan, recounted from loads and transitions alone."""
    rates = ExchangeRates(1e-7, 1e-7, 9e-7, 0.5)
    for seed in range(3):
        problem = small_problem(seed, per_node=per_node, rates=rates)
        result = place(problem, "moetuner", seed=seed, time_limit_s=20)
        assert result.plan is not None
        facts = result.plan.provenance
        assert facts["mapping_method"] == method
        loads = rank_load(result.plan, problem.expert_load)
        assert result.objective == loads.max(axis=1).sum()
        deviation = np.abs(loads - loads.mean(axis=1, keepdims=True)).sum()
        assert facts["balance_objective"] == pytest.approx(deviation)
        homes, link = homes_from_plan(result.plan), rates.link_s(4, per_node)
        assert homes is not None
        slowest = 0.0
        assert problem.transitions is not None
        for layer, counts in enumerate(problem.transitions):
            flow = np.zeros((4, 4))
            np.add.at(flow, (homes[layer][:, None], homes[layer + 1][None]), counts)
            slowest += float((0.5 * flow * link).max())
        assert facts["mapping_objective"] == pytest.approx(slowest)
        assert facts["mapping_bound"] == pytest.approx(slowest)
        assert facts["bottleneck_s"] == OBJECTIVES["bottleneck"].value(problem, result.plan)


@pytest.mark.parametrize("backend", ["cpsat", "pulp"])
def test_auto_and_program_agree(backend: str) -> None:
    """The exact short cuts cost what the integer program costs, within its tolerance."""
    problem = small_problem(1, layers=3)
    auto = place(problem, "moetuner", time_limit_s=20)
    program = place(problem, "moetuner", time_limit_s=20, mapping="program", backend=backend, tolerance=0.0)
    costs = [one.plan.provenance["mapping_objective"] for one in (auto, program) if one.plan]
    assert costs[0] == pytest.approx(costs[1])
    assert program.plan is not None
    assert program.plan.provenance["mapping_method"] == "program"


def test_free_sizes_use_the_redundant_slots_as_room() -> None:
    """Free clusters balance at least as well as fixed ones; smaller ranks repeat their own experts and nothing else."""
    better = 0
    for seed in range(4):
        fixed = place(small_problem(seed), "moetuner", variant="minmax", time_limit_s=10, tolerance=0.0)
        problem = small_problem(seed, extra=8)
        free = place(problem, "moetuner", variant="minmax", cluster_size="free", time_limit_s=10, tolerance=0.0)
        assert fixed.objective is not None
        assert free.objective is not None
        assert free.objective <= fixed.objective
        better += free.objective < fixed.objective
        assert free.plan is not None
        assert homes_from_plan(free.plan) is not None  # every expert on one rank only
    assert better


def test_a_proof_of_the_tail_is_a_bound_of_the_plan() -> None:
    """The minmax program without redundant slots covers every plan: the result is optimal where it is solved."""
    for seed in range(4):
        problem = small_problem(seed, layers=2)
        result = place(problem, "moetuner", variant="minmax", tolerance=0.0, time_limit_s=20)
        best = sum(min(np.bincount(one, weights=load).max() for one in all_clusters(8, 4, 2, 2))
                   for load in problem.expert_load)
        assert result.objective == best
        assert result.status.value == "optimal"


def test_the_same_seed_gives_the_same_plan() -> None:
    """Where the programs end by themselves the clock plays no part."""
    problem = small_problem(2, per_node=2, rates=ExchangeRates(1e-7, 1e-7, 9e-7))
    plans = [place(problem, "moetuner", seed=5, time_limit_s=30, mapping="program").plan for _ in range(2)]
    assert np.array_equal(*(plan.physical_to_logical for plan in plans if plan))


def test_one_layer_needs_no_transitions() -> None:
    """A single layer is balanced; nothing is mapped."""
    result = place(PlacementProblem(zipf(8, 0)[None], 4, 2, 4), "moetuner", time_limit_s=5)
    assert isinstance(result.plan, PlacementPlan)
    assert "mapping_objective" not in result.plan.provenance
    assert result.plan.provenance["heaviest_over_mean"] > 1


@pytest.mark.parametrize(("options", "message"), [
    ({"variant": "l2"}, r"unknown moetuner variant 'l2'\. Known: l1, minmax"),
    ({"cluster_size": "fix"}, r"unknown moetuner cluster_size 'fix'\. Did you mean 'fixed'\?"),
    ({"cluster_size": "free"}, "need slots beyond one per expert on some rank .* add redundant experts"),
    ({"tolerance": 1.0}, r"needs tolerance in 0 \.\.\. 1"),
    ({"backend": "gurobi"}, "unknown moetuner backend 'gurobi'"),
])
def test_what_it_cannot_do_is_named(options: dict[str, object], message: str) -> None:
    """Options out of range, and free sizes without room for them."""
    with pytest.raises(InputError, match=message):
        place(small_problem(), "moetuner", **options)


def test_counts_without_transitions_are_refused() -> None:
    """Two layers without token identity cannot be mapped; six experts on four ranks have no fixed clusters."""
    with pytest.raises(InputError, match="needs transitions between layers"):
        place(PlacementProblem(np.ones((2, 8)), 4, 2, 4), "moetuner")
    with pytest.raises(InputError, match="got 6 and 4; use cluster_size 'free' with redundant slots"):
        place(PlacementProblem(np.ones((1, 6)), 4, 2, 4), "moetuner")
