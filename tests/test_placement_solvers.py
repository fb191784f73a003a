"""One contract for every placement solver, and what each built-in one promises beyond it."""

from __future__ import annotations

import dataclasses
import importlib
from itertools import pairwise

import numpy as np
import pytest
import step_worlds as worlds

from moesim.errors import InputError, SolverError
from moesim.hardware.cost import CostModel
from moesim.lowering.step_cost import step_cost
from moesim.placement import metrics
from moesim.placement.bounds import affinity_bound, balance_bound
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.place import place
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveStatus
from moesim.placement.solvers import SOLVERS
from moesim.placement.step_sample import ExchangeRates, StepSample
from moesim.placement.verify.values import VALUES
from moesim.traces.trace import RoutingTrace

# DeepSeek EPLB's README example: 2 layers x 12 experts, 16 slots, 4 groups, 2 nodes, 8 ranks.
README_LOAD = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
README_PLAN = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
               [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def make(num_experts: int, num_ranks: int, slots_per_rank: int, *, num_layers: int = 3, ranks_per_node: int = 2,
         num_groups: int = 1, seed: int = 5) -> PlacementProblem:
    """Return a problem with skewed loads and uneven transitions, and everything else that a solver may ask for."""
    rng = np.random.default_rng(seed)
    load = np.floor(rng.lognormal(3, 1, (num_layers, num_experts)))
    transitions = np.floor(rng.lognormal(1, 1.5, (num_layers - 1, num_experts, num_experts)))
    problem = PlacementProblem(load, num_ranks, slots_per_rank, ranks_per_node, transitions=transitions,
                               num_groups=num_groups)
    return enriched(problem, rng)


def enriched(problem: PlacementProblem, rng: np.random.Generator) -> PlacementProblem:
    """Return the problem with random token sets in four steps, the costs of a small machine, and rates."""
    top_k = min(2, problem.num_experts)
    ids = np.argsort(rng.random((24, problem.num_layers, problem.num_experts)), axis=2)[..., :top_k]
    zeros = np.zeros(24, np.int32)
    trace = RoutingTrace(expert_ids=ids, request_id=zeros, position=np.arange(24), phase=zeros, step=zeros,
                         num_experts=problem.num_experts, layer_ids=np.arange(problem.num_layers))
    cost = CostModel(worlds.cluster(problem.num_ranks, problem.ranks_per_node))
    steps = StepSample(ids.astype(np.int16), np.repeat(np.arange(4), 6), np.arange(24, dtype=np.int32) % problem.num_ranks)
    return dataclasses.replace(
        problem, steps=steps, step_cost=step_cost(worlds.tiny_model(trace), cost),
        rates=ExchangeRates(row_s=2.0, node_s=1.0, cluster_s=4.0, pair_weight=0.5))


def readme_problem(num_groups: int = 4) -> PlacementProblem:
    """Return the problem of EPLB's README."""
    return PlacementProblem(README_LOAD, num_ranks=8, slots_per_rank=2, ranks_per_node=4, num_groups=num_groups)


PROBLEMS = {
    "no redundant slot": make(8, 4, 2),
    "one slot per rank": make(4, 4, 1),
    "redundant slots": make(12, 4, 4, num_groups=4),
    "slots that experts do not fill evenly": make(10, 4, 3),
    "two experts on many slots": make(2, 4, 2),
    "one rank": make(5, 1, 6, ranks_per_node=1),
}
_REDUNDANT = ("redundant slots", "slots that experts do not fill evenly", "two experts on many slots", "one rank")
_UNEVEN = ("slots that experts do not fill evenly", "two experts on many slots")
REFUSED = ({("exact", name): "exact: needs one slot per expert, got" for name in _REDUNDANT}
           | {("exflow", name): "experts do not divide over 4 ranks" for name in _UNEVEN}
           | {("moetuner", name): "fixed size need experts that divide over the ranks" for name in _UNEVEN})
EVEN_ONLY = ("exact", "exflow", "moetuner", "ilp")
CASES = [pytest.param(solver, problem, id=f"{solver}, {name}")
         for solver in SOLVERS.names() for name, problem in PROBLEMS.items() if (solver, name) not in REFUSED]


@pytest.mark.parametrize(("solver", "problem"), CASES)
def test_every_solver_gives_a_checked_plan_and_an_honest_bound(solver: str, problem: PlacementProblem) -> None:
    """The plan passes the check, the objective is on the right side of a bound that names its proof."""
    result = place(problem, solver, time_limit_s=5 if solver == "exact" else 0.3)
    assert result.plan is not None
    problem.check(result.plan)
    assert result.solver == solver
    if result.sense == "min":
        assert result.objective >= result.objective_bound * (1 - 1e-12)
    else:
        assert result.objective <= result.objective_bound * (1 + 1e-12)
    assert 0.0 <= result.gap <= 1.0
    assert result.bound_method
    if result.status is SolveStatus.OPTIMAL:
        assert result.objective == pytest.approx(result.objective_bound, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("solver", "problem"), CASES)
def test_the_objective_is_that_of_the_plan(solver: str, problem: PlacementProblem) -> None:
    """Recomputing the objective from the slots alone gives the number in the result."""
    result = place(problem, solver, time_limit_s=0.3)
    name = next(name for name in OBJECTIVES.names() if OBJECTIVES[name].unit == result.objective_name)
    assert result.sense == OBJECTIVES[name].sense
    again = VALUES[name] if name in VALUES else OBJECTIVES[name].value
    assert result.objective == pytest.approx(again(problem, result.plan), rel=1e-12)


@pytest.mark.parametrize(("solver", "name"), sorted(REFUSED))
def test_what_a_solver_cannot_place_it_refuses_with_the_reason(solver: str, name: str) -> None:
    """One clear sentence, no plan and no traceback."""
    with pytest.raises((InputError, SolverError), match=REFUSED[solver, name]):
        place(PROBLEMS[name], solver, time_limit_s=0.3)


@pytest.mark.parametrize("solver", SOLVERS.names())
def test_every_solver_repeats_itself_and_leaves_its_input_alone(solver: str) -> None:
    """The same seed gives the same slots, and neither loads nor transitions change."""
    problem = make(8, 2, 4) if solver in EVEN_ONLY else make(10, 4, 3)  # ILP: what it proves before any limit
    load, transitions = problem.expert_load.copy(), problem.transitions.copy()
    first, second = (place(problem, solver, seed=3, time_limit_s=30) for _ in range(2))
    assert first.plan.physical_to_logical.tobytes() == second.plan.physical_to_logical.tobytes()
    assert (first.objective, first.objective_bound) == (second.objective, second.objective_bound)
    np.testing.assert_array_equal(problem.expert_load, load)
    np.testing.assert_array_equal(problem.transitions, transitions)


@pytest.mark.parametrize("solver", SOLVERS.names())
def test_every_solver_survives_layers_without_load(solver: str) -> None:
    """A layer that no token used still gets a home for every expert, at objective and bound zero."""
    transitions = np.ones((1, 4, 4))
    slots = 2 if solver == "exact" else 3
    problem = enriched(PlacementProblem(np.zeros((2, 4)), 2, slots, 1, transitions=transitions), np.random.default_rng(0))
    result = place(problem, solver, time_limit_s=5)
    if result.objective_name == OBJECTIVES["balance"].unit:
        assert (result.objective, result.objective_bound, result.gap) == (0.0, 0.0, 0.0)
    assert result.plan.replica_count.min() >= 1


def test_random_depends_on_its_seed() -> None:
    """Two seeds give two plans, so the seed is really used."""
    problem = make(12, 4, 4)
    plans = {place(problem, "random", seed=seed).plan.physical_to_logical.tobytes() for seed in range(5)}
    assert len(plans) == 5


def test_random_spreads_the_redundant_slots() -> None:
    """The copies of any two experts differ by at most one."""
    counts = place(make(10, 4, 6), "random", seed=2).plan.replica_count
    assert set(np.unique(counts)) == {2, 3}


def test_contiguous_is_the_engines_first_map() -> None:
    """Slot i holds expert i mod E: identity, then the redundant slots from expert 0 on."""
    plan = place(make(10, 4, 3), "contiguous").plan
    assert plan.physical_to_logical[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_lpt_by_hand() -> None:
    """Of 9, 7, 6, 5, 4, 1 the 9 goes to one rank, 7 and 6 to the other, 5 to the first, 4 and 1 likewise."""
    plan = place(PlacementProblem(np.array([[9, 7, 6, 5, 4, 1]]), 2, 3, 1), "lpt").plan
    assert plan.physical_to_logical.tolist() == [[0, 3, 5, 1, 2, 4]]
    assert metrics.rank_load(plan, np.array([[9, 7, 6, 5, 4, 1]])).tolist() == [[15.0, 17.0]]


def test_lpt_replicates_the_expert_with_the_largest_share() -> None:
    """Loads 12, 4, 2 in six slots: 12 falls to 6, 4 and 3 and takes all three redundant slots."""
    plan = place(PlacementProblem(np.array([[12, 4, 2]]), 2, 3, 1), "lpt").plan
    assert plan.replica_count.tolist() == [[4, 1, 1]]


def test_eplb_reproduces_the_readme_slot_for_slot() -> None:
    """The hierarchical policy gives the printed rows, hence the published imbalance 1.208 and 1.242."""
    result = place(readme_problem(), "eplb")
    assert result.plan.physical_to_logical.tolist() == README_PLAN
    assert metrics.imbalance(result.plan, README_LOAD).round(3).tolist() == [1.208, 1.242]
    assert metrics.rank_load(result.plan, README_LOAD).tolist() == [
        [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152], [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5]]
    assert metrics.node_load(result.plan, README_LOAD, 4).tolist() == [[446, 587], [645, 511]]


def test_eplb_hierarchical_keeps_every_group_on_one_node() -> None:
    """All copies of the experts of a group lie on the same node, the same number of groups on each."""
    problem = make(24, 8, 4, ranks_per_node=4, num_groups=6)
    plan = place(problem, "eplb", policy="hierarchical").plan
    for slots in plan.physical_to_logical:
        nodes = [set(slots[:16] // 4), set(slots[16:] // 4)]
        assert [len(groups) for groups in nodes] == [3, 3]
        assert not nodes[0] & nodes[1]


def test_eplb_auto_is_global_where_groups_do_not_divide() -> None:
    """Three groups on two nodes give the global plan, which is better balanced than the README's."""
    auto = place(readme_problem(num_groups=3), "eplb")
    overall = place(readme_problem(num_groups=4), "eplb", policy="global")
    np.testing.assert_array_equal(auto.plan.physical_to_logical, overall.plan.physical_to_logical)
    assert overall.objective < place(readme_problem(), "eplb").objective


def test_eplb_refuses_hierarchical_where_groups_do_not_divide() -> None:
    """Asking for the hierarchical policy never falls back silently."""
    with pytest.raises(InputError, match="3 groups do not divide over 2 nodes; use policy 'global' or 'auto'"):
        place(readme_problem(num_groups=3), "eplb", policy="hierarchical")


def test_eplb_refuses_groups_that_do_not_divide_the_experts() -> None:
    """Eight groups of twelve experts are no groups."""
    with pytest.raises(InputError, match="12 experts do not divide into 8 groups"):
        place(readme_problem(num_groups=8), "eplb")


@pytest.mark.parametrize(("solver", "options", "text"), [
    ("eplb", {"policy": "globl"}, "unknown eplb policy 'globl'. Did you mean 'global'?"),
    ("ilp", {"backend": "gurobi"}, "unknown ilp backend 'gurobi'"),
    ("ilp", {"replicas": "fre"}, "unknown ilp replicas 'fre'. Did you mean 'free'?"),
    ("ilp", {"num_workers": 0}, "num_workers must be at least 1, got 0"),
    ("affinity", {"node_weight": 1.5}, "node_weight must be in 0 ... 1, got 1.5"),
    ("affinity", {"node_weight": float("nan")}, "node_weight must be in 0 ... 1, got nan"),
    ("affinity", {"num_starts": -1}, "num_starts must not be negative, got -1"),
    ("affinity", {"anneal_moves": -2}, "anneal_moves must not be negative, got -2"),
])
def test_option_values_out_of_range_are_refused(solver: str, options: dict[str, object], text: str) -> None:
    """A wrong value is named with what was expected."""
    with pytest.raises(InputError) as caught:
        place(readme_problem(), solver, **options)
    assert text in str(caught.value)


def test_affinity_says_why_it_needs_transitions() -> None:
    """A problem of counts only is refused with the reason and the alternative."""
    with pytest.raises(InputError, match=r"holds counts only \(a trace without token identity\)"):
        place(readme_problem(), "affinity")


@pytest.mark.parametrize(("transitions", "text"), [
    (np.zeros((1, 4, 4)), "no transition was counted"),
    (np.full((1, 4, 4), -1.0), "finite and not negative"),
    (np.full((1, 4, 4), np.nan), "finite and not negative"),
])
def test_affinity_refuses_transitions_without_meaning(transitions: np.ndarray, text: str) -> None:
    """Empty, negative and undefined counts never become a fraction."""
    problem = PlacementProblem(np.ones((2, 4)), 2, 2, 1, transitions=transitions)
    with pytest.raises(InputError, match=text):
        place(problem, "affinity")


def test_affinity_finds_hidden_blocks() -> None:
    """Experts that only hand on inside hidden blocks of one rank's size are kept whole, proven optimal."""
    rng = np.random.default_rng(0)
    block = [rng.permutation(np.repeat(np.arange(4), 3)) for _ in range(5)]
    transitions = np.stack([np.equal.outer(here, there) * rng.integers(1, 9, (12, 12))
                            for here, there in pairwise(block)]).astype(float)
    problem = PlacementProblem(np.ones((5, 12)), 4, 3, 2, transitions=transitions)
    result = place(problem, "affinity")
    assert result.status is SolveStatus.OPTIMAL
    assert result.objective == 1.0


def test_affinity_with_node_weight_trades_ranks_for_nodes() -> None:
    """Weighing nodes keeps at least as many transitions on a node as weighing ranks alone."""
    problem = make(16, 8, 2, num_layers=6, ranks_per_node=4, seed=1)
    kept = {weight: metrics.kept_transitions(
        place(problem, "affinity", node_weight=weight).plan, problem.transitions, 4) for weight in (0.0, 1.0)}
    assert kept[1.0]["node"] > kept[0.0]["node"]
    assert kept[1.0]["rank"] < kept[0.0]["rank"]
    assert kept[1.0]["node"] <= affinity_bound(problem, "node")


def test_affinity_puts_equal_numbers_of_homes_on_the_ranks() -> None:
    """Without redundant slots every rank holds each of its experts once."""
    plan = place(make(8, 4, 2), "affinity").plan
    assert plan.replica_count.max() == 1
    assert metrics.duplicates_on_rank(plan).sum() == 0


def test_affinity_out_of_time_says_so() -> None:
    """A search cut short still gives a valid plan and marks it as incomplete."""
    problem = make(12, 4, 3)
    cut, full = place(problem, "affinity", time_limit_s=1e-9), place(problem, "affinity")
    assert (cut.plan.provenance["complete"], full.plan.provenance["complete"]) == (False, True)
    assert full.objective > cut.objective


def test_ilp_out_of_time_keeps_the_plan_of_lpt() -> None:
    """With no time for a search the LPT plan comes back, feasible, with the trivial bound, and says so."""
    problem = make(12, 4, 4)
    result, greedy = place(problem, "ilp", time_limit_s=1e-9), place(problem, "lpt")
    np.testing.assert_array_equal(result.plan.physical_to_logical, greedy.plan.physical_to_logical)
    assert result.status is SolveStatus.FEASIBLE
    assert result.objective_bound == balance_bound(problem).sum() < result.objective
    assert result.plan.provenance["layers_from_lpt"] == [0, 1, 2]


def test_ilp_keeps_the_plan_of_lpt_where_the_search_found_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that ends unknown leaves each layer LPT's plan and whatever bound it had proven."""
    module = importlib.import_module("moesim.placement.solvers.ilp")
    problem = make(8, 2, 4)
    bound = float(balance_bound(problem).sum())
    monkeypatch.setattr(module, "_cpsat", lambda layer, effort: module._Answer(None, float(layer.floor)))
    result = place(problem, "ilp")
    assert result.objective == place(problem, "lpt").objective > bound
    assert (result.status, result.objective_bound) == (SolveStatus.FEASIBLE, bound)
    assert result.plan.provenance["layers_from_lpt"] == [0, 1, 2]
