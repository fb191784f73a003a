"""Goals, constraints, repair, renaming: what surrounds a solver."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from moesim.errors import CheckError, InputError, SolverError
from moesim.placement.constraints import Apart, Capacity, Constraints, Pin, parse_constraints
from moesim.placement.goal import parse_goal
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.objectives.migration import moved_experts
from moesim.placement.place import place
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.relabel import relabelled
from moesim.placement.repair import repair
from moesim.placement.sample_size import tokens_needed


def make(seed: int = 0, *, num_layers: int = 2, num_experts: int = 8, num_ranks: int = 4, slots_per_rank: int = 2,
         **more: object) -> PlacementProblem:
    """Return a random problem with transitions."""
    rng = np.random.default_rng(seed)
    return PlacementProblem(
        rng.integers(1, 50, (num_layers, num_experts)), num_ranks, slots_per_rank, 2,
        transitions=rng.integers(0, 30, (num_layers - 1, num_experts, num_experts)).astype(float),
        **more)  # type: ignore[arg-type]


def random_plan(problem: PlacementProblem, seed: int) -> PlacementPlan:
    """Return a seeded random plan."""
    plan = place(problem, "random", seed=seed).plan
    assert plan is not None
    return plan


@pytest.mark.parametrize(("text", "levels"), [
    ("balance", [[(1.0, "balance")]]),
    ("balance,affinity", [[(1.0, "balance")], [(1.0, "affinity")]]),
    ("2*balance+1e+3*migration", [[(2.0, "balance"), (1000.0, "migration")]]),
    (" hops , 0.5 * balance ", [[(1.0, "hops")], [(0.5, "balance")]]),
])
def test_goals_are_read(text: str, levels: list[list[tuple[float, str]]]) -> None:
    """Names, weighted sums and orders of importance come out as written, and are written as they are read."""
    goal = parse_goal(text)
    assert [[(weight, one.name) for weight, one in level] for level in goal.levels] == levels
    assert parse_goal(goal.name) == goal


@pytest.mark.parametrize(("text", "message"), [
    ("balnce", "unknown objective 'balnce'. Did you mean 'balance'?"),
    ("0*balance", "the weight '0' is not a positive number"),
    ("-1*balance", "the weight '-1' is not a positive number"),
    ("1e999*balance", "is not a positive number"),
    ("balance,", "cannot read ''"),
    ("x*balance", "cannot read 'x*balance'"),
    ("balance+balance", "'balance' appears twice"),
])
def test_wrong_goals_are_refused(text: str, message: str) -> None:
    """The message says what is wrong with the text."""
    with pytest.raises(InputError) as caught:
        parse_goal(text)
    assert message in str(caught.value)


def test_a_maximised_objective_counts_against() -> None:
    """In a weighted sum affinity, which is maximised, enters with its sign turned."""
    problem, goal = make(), parse_goal("balance+10*affinity")
    plan = random_plan(problem, 1)
    by_hand = OBJECTIVES["balance"].value(problem, plan) - 10 * OBJECTIVES["affinity"].value(problem, plan)
    assert goal.key(problem, plan) == (pytest.approx(by_hand),)


def test_the_order_of_importance_decides_ties_only() -> None:
    """The second level speaks only where the first is equal but for rounding."""
    goal = parse_goal("balance,affinity")
    assert goal.better((10.0, 5.0), (11.0, 1.0))
    assert goal.better((10.0, 1.0), (10.0 * (1 + 2.0**-30), 5.0))
    assert not goal.better((10.0, 1.0), (10.0, 1.0))


def test_a_goal_says_what_the_problem_lacks() -> None:
    """Migration needs the plan that is loaded now."""
    with pytest.raises(InputError, match=r"objective 'migration' needs the plan that is loaded now \(--from\)"):
        place(make(), "lpt", objective="balance+migration")


@pytest.mark.parametrize("objective", ["balance,affinity", "balance+300*affinity", "affinity,balance"])
def test_auto_is_never_worse_than_any_greedy_plan(objective: str) -> None:
    """Whatever the goal, the portfolio's plan does not come after a plan that it starts from."""
    problem, goal = make(3, num_layers=4), parse_goal(objective)
    best = goal.key(problem, place(problem, "auto", objective=objective, time_limit_s=1).plan)
    for name in ("contiguous", "lpt", "eplb"):
        assert not goal.better(goal.key(problem, place(problem, name).plan), best)


def test_constraints_are_written_as_they_are_read() -> None:
    """The texts of a plan's provenance give the constraints again."""
    texts = ["pin 3@1", "pin 0@2:1", "apart 2,5", "apart 1,4:0", "rank-capacity 0=1", "node-capacity 1=3"]
    found = parse_constraints(texts)
    assert found == Constraints((Pin(3, 1), Pin(0, 2, 1)), (Apart(2, 5), Apart(1, 4, 0)),
                                (Capacity("rank", 0, 1), Capacity("node", 1, 3)))
    assert [str(one) for one in found] == texts


@pytest.mark.parametrize(("texts", "message"), [
    (["pin 3"], "constraint pin '3': expected EXPERT@RANK or EXPERT@RANK:LAYER"),
    (["apart 3@1"], "constraint apart '3@1': expected A,B or A,B:LAYER"),
    (["pim 3@1"], "unknown constraint 'pim'. Did you mean 'pin'?"),
    (["pin 8@1"], "constraint 'pin 8@1': expert 8 is outside 0 ... 7"),
    (["pin 1@4"], "constraint 'pin 1@4': rank 4 is outside 0 ... 3"),
    (["pin 1@1:2"], "constraint 'pin 1@1:2': layer 2 is outside 0 ... 1"),
    (["apart 1,1"], "an expert cannot be kept from itself"),
    (["rank-capacity 9=1"], "needs a rank or node that exists"),
])
def test_wrong_constraints_are_refused(texts: list[str], message: str) -> None:
    """A form that cannot be read and a name that the problem lacks are told apart from each other."""
    with pytest.raises(InputError) as caught:
        make(constraints=parse_constraints(texts))
    assert message in str(caught.value)


def fewest_moves(problem: PlacementProblem, plan: PlacementPlan, layer: int) -> int | None:
    """Return by listing every row how few experts must move in one layer to keep the constraints."""
    best = None
    held = [set(part) for part in plan.physical_to_logical[layer].reshape(problem.num_ranks, -1).tolist()]
    for order in itertools.permutations(range(problem.num_experts)):
        ranks = [order[i:i + problem.slots_per_rank] for i in range(0, len(order), problem.slots_per_rank)]
        if any(list(part) != sorted(part) for part in ranks):
            continue
        rows = np.array(plan.physical_to_logical)
        rows[layer] = order
        one = PlacementPlan(rows, problem.num_ranks, problem.num_experts)
        if not any(text.endswith(f"layer {layer})") for text in problem.constraints.broken(one, 2)):
            moves = sum(len(set(part) - was) for part, was in zip(ranks, held, strict=True))
            best = moves if best is None else min(best, moves)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_repair_moves_as_few_experts_as_any_plan_could(seed: int) -> None:
    """On six experts the repaired plan keeps the constraints with the fewest moves that listing all rows finds."""
    rng = np.random.default_rng(seed)
    pins = tuple(Pin(int(e), int(r)) for e, r in zip(rng.permutation(6)[:2], rng.integers(0, 3, 2), strict=True))
    apart = (Apart(*map(int, rng.permutation(6)[:2])), Apart(*map(int, rng.permutation(6)[:2]), 1))
    problem = PlacementProblem(rng.integers(1, 9, (2, 6)), 3, 2, 1, constraints=Constraints(pins, apart))
    plan = random_plan(dataclasses.replace(problem, constraints=Constraints()), seed)
    expected = [fewest_moves(problem, plan, layer) for layer in range(2)]
    if None in expected:
        with pytest.raises(SolverError, match="no plan keeps these constraints together"):
            repair(problem, plan)
        return
    repaired = repair(problem, plan)
    problem.check(repaired)
    assert moved_experts(plan, repaired).tolist() == expected


def test_constraints_that_clash_are_named_and_no_others() -> None:
    """Three experts pinned to a rank of two slots clash; the pair kept apart and the other pin have no part in it."""
    wanted = parse_constraints(["pin 0@3", "pin 1@3", "pin 2@3:1", "pin 4@0", "apart 5,6"])
    with pytest.raises(SolverError) as caught:
        place(make(constraints=wanted), "lpt")
    text = "layer 1: no plan keeps these constraints together: pin 0@3; pin 1@3; pin 2@3:1"
    assert str(caught.value) == text


@pytest.mark.parametrize("solver", ["lpt", "eplb", "auto"])
def test_every_solver_keeps_the_constraints(solver: str) -> None:
    """Pins, pairs apart and capacities hold in the plan that leaves `place`, with redundant slots too."""
    texts = ["pin 0@3", "apart 1,2", "apart 3,4:0", "node-capacity 0=4", "rank-capacity 2=2"]
    problem = make(slots_per_rank=3, constraints=parse_constraints(texts))
    plan = place(problem, solver, time_limit_s=0.5).plan
    problem.check(plan)
    free = dataclasses.replace(problem, constraints=Constraints())
    with pytest.raises(CheckError, match="it breaks"):
        problem.check(random_plan(free, 0))


def kept(plan: PlacementPlan, current: PlacementPlan) -> int:
    """Return the experts that stay on their ranks."""
    return plan.num_layers * plan.num_slots - int(moved_experts(current, plan).sum())


@pytest.mark.parametrize("per_layer", [True, False])
def test_renaming_keeps_as_much_as_any_renaming_could(per_layer: bool) -> None:
    """Over all eight renamings of 2 nodes of 2 ranks none keeps more experts in place, and none changes affinity."""
    problem = make(5, num_layers=3)
    plan, current = random_plan(problem, 1), random_plan(problem, 2)
    names = [[2 * node + rank for node, flip in zip(nodes, flips, strict=True) for rank in ((0, 1), (1, 0))[flip]]
             for nodes in ((0, 1), (1, 0)) for flips in itertools.product((0, 1), repeat=2)]
    by_rank = plan.physical_to_logical.reshape(3, 4, 2)

    def renamed(layer_names: list[list[int]]) -> PlacementPlan:
        rows = np.stack([rows[order] for rows, order in zip(by_rank, layer_names, strict=True)])
        return PlacementPlan(rows.reshape(3, 8), 4, 8)

    if per_layer:
        best = sum(max(kept(PlacementPlan(by_rank[layer][order].reshape(1, 8), 4, 8),
                            PlacementPlan(current.physical_to_logical[layer:layer + 1], 4, 8)) for order in names)
                   for layer in range(3))
    else:
        best = max(kept(renamed([order] * 3), current) for order in names)
    found = relabelled(plan, current, 2, per_layer=per_layer)
    assert kept(found, current) == best
    if not per_layer:
        for name in ("affinity", "hops", "balance"):
            assert OBJECTIVES[name].value(problem, found) == pytest.approx(OBJECTIVES[name].value(problem, plan))


def test_migration_counts_the_experts_that_a_rank_did_not_hold() -> None:
    """Two experts that change ranks are two copies of their layer's size; a new order of slots is none."""
    current = PlacementPlan(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), 2, 4)
    problem = PlacementProblem(np.ones((2, 4)), 2, 2, 1, expert_bytes=np.array([10, 70]), current=current)
    plan = PlacementPlan(np.array([[1, 0, 3, 2], [0, 2, 1, 3]]), 2, 4)
    assert OBJECTIVES["migration"].value(problem, plan) == 140
    assert OBJECTIVES["migration"].value(problem, current) == 0


def test_few_moves_come_when_they_are_asked_for() -> None:
    """With migration first in importance auto stays where it is; with balance first it moves."""
    problem = make(7, num_layers=3)
    current = random_plan(problem, 4)
    problem = dataclasses.replace(problem, current=current)
    stay = place(problem, "auto", objective="migration,balance", time_limit_s=1).plan
    move = place(problem, "auto", objective="balance,migration", time_limit_s=1).plan
    assert moved_experts(current, stay).sum() == 0
    assert moved_experts(current, move).sum() > 0
    assert OBJECTIVES["balance"].value(problem, move) < OBJECTIVES["balance"].value(problem, stay)


@pytest.mark.parametrize(("num_experts", "top_k", "objective", "least", "most"), [
    (64, 1, "affinity", 10_000, 15_000),  # 3,000 tokens lose 7 % of what is kept, 10,000 lose 2 %
    (256, 8, "affinity", 3_000, 15_000),  # 3,000 lose 5 %, 10,000 lose 1 %
    (8, 2, "affinity", 300, 3_000),  # Mixtral needs only 300
    (64, 8, "balance", 1_000, 10_000),  # a load is one count, not a table of pairs
])
def test_the_tokens_asked_for_are_those_of_the_experiments(num_experts: int, top_k: int, objective: str, least: int,
                                                           most: int) -> None:
    """The rule asks for about as many tokens as measured learning curves need."""
    assert least <= tokens_needed(num_experts, top_k, (objective,)) <= most


def test_a_time_out_falls_back_to_the_best_greedy_plan_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that ends with nothing gives the best baseline by the goal, with a note of what happened."""
    from moesim.placement.result import SolveResult, SolveStatus
    from moesim.placement.solvers import SOLVERS

    def stuck(problem: PlacementProblem, *, seed: int, time_limit_s: float) -> SolveResult:
        return SolveResult("stuck", SolveStatus.UNKNOWN, None, "nothing", None, None, 2.5, seed)

    monkeypatch.setitem(SOLVERS._entries, "stuck", stuck)
    problem = make(2)
    result = place(problem, "stuck")
    best = min(("lpt", "eplb", "contiguous"), key=lambda name: place(problem, name).objective)
    assert result.objective == place(problem, best).objective
    assert result.plan.provenance["fallback"] == (
        f"stuck found no plan in 2.5 s (status 'unknown'); this is the plan of {best}")


def test_an_interrupted_search_keeps_its_best_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a search gives the best plan that it had reported, within its bound."""
    from moesim.placement.progress import Progress
    from moesim.placement.result import SolveResult
    from moesim.placement.solvers import SOLVERS

    problem = make(2)
    good = place(problem, "lpt").plan

    def searching(problem: PlacementProblem, *, seed: int, time_limit_s: float,
                  progress: Progress | None = None) -> SolveResult:
        progress = progress or Progress()
        progress.found(random_plan(problem, 1).physical_to_logical, 900.0)
        progress.found(good.physical_to_logical, 100.0)
        progress.found(random_plan(problem, 2).physical_to_logical, 500.0)
        raise KeyboardInterrupt

    monkeypatch.setitem(SOLVERS._entries, "searching", searching)
    result = place(problem, "searching", progress=Progress(), objective="balance")
    assert np.array_equal(result.plan.physical_to_logical, good.physical_to_logical)
    assert result.plan.provenance["interrupted"] is True
    assert result.objective == OBJECTIVES["balance"].value(problem, good)
    with pytest.raises(KeyboardInterrupt):
        place(problem, "searching")
