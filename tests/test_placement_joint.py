"""Joint: never worse than any start, equal to brute force where that is possible, kernels equal to the objectives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import step_worlds as worlds
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.placement.constraints import Apart, Capacity, Constraints, Pin
from moesim.placement.layer_search import FanoutSearch, StepTimeSearch, split_steps
from moesim.placement.objectives.fanout import FANOUT, layer_fanout
from moesim.placement.objectives.migration import MIGRATION, moved_experts
from moesim.placement.objectives.step_time import STEP_TIME, layer_times_ns
from moesim.placement.place import place
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.solvers.joint import joint

random_plan, world = worlds.random_plan, worlds.world
SHAPES = [{}, {"redundant": 4}, {"contention": "pair", "redundant": 4}, {"contention": "egress"},
          {"ranks_per_port": 2, "num_ranks": 8, "per_node": 4, "redundant": 8}, {"num_ranks": 4, "per_node": 4},
          {"shared_intermediate_size": 2048, "redundant": 4}]


def best_per_layer(problem: PlacementProblem, cost: object) -> np.ndarray:
    """Return float64[layer], the least cost of a layer over all plans with one slot per expert."""
    plans = (PlacementPlan(np.tile(row, (problem.num_layers, 1)), problem.num_ranks, problem.num_experts)
             for row in worlds.all_rows(problem))
    return np.min([cost(plan) for plan in plans], axis=0)  # type: ignore[operator]


@pytest.mark.parametrize("options", SHAPES)
def test_kernels_count_as_the_objectives_do(options: dict) -> None:
    """After any sequence of moves the compiled costs of a layer are those of the exact function on its slots."""
    problem = world(4, **options)[0]
    rng = np.random.default_rng(0)
    plan = random_plan(rng, problem)
    time = StepTimeSearch(problem, 1, 0, 0.0)
    reach = FanoutSearch(problem, 1, 0, 0.0, node_weight=0.5)
    for search in (time, reach):
        search.start(plan.physical_to_logical[1])
        for _ in range(60):
            slot, other = rng.integers(problem.num_slots, size=2).tolist()
            slots = search.place.slots
            if slots[slot] != slots[other]:
                cost = search.change(slot, other, int(slots[other]))
            if search.place.copies[slots[slot]] > 1:
                cost = search.change(slot, -1, int(rng.integers(problem.num_experts)))
            now = PlacementPlan(np.tile(slots, (2, 1)), problem.num_ranks, problem.num_experts)
            reached = layer_fanout(problem, now)
            expected = (layer_times_ns(problem, now)[:, 1].sum() if search is time
                        else reached["ranks"][1] + 0.5 * reached["nodes"][1])
            assert cost == expected


def test_swaps_are_judged_as_they_are_made() -> None:
    """The quick judgement of a swap equals the change that making it brings."""
    from moesim.placement.kernels.fanout import swap_delta

    problem = world(4)[0]
    search, rng = FanoutSearch(problem, 0, 0, 0.0, node_weight=0.75), np.random.default_rng(1)
    cost = search.start(random_plan(rng, problem).physical_to_logical[0])
    for _ in range(200):
        slot, other = rng.integers(problem.num_slots, size=2).tolist()
        first, second = (int(search.place.slots[one]) for one in (slot, other))
        if slot // 2 != other // 2:
            delta = swap_delta(search.uses, search.place, search.nodes, search.rules, 0.75, first, second)
            after = search.change(slot, other, second)
            assert after - cost == delta
            cost = after


@pytest.mark.parametrize(("objective", "value"), [("step_time", STEP_TIME), ("fanout", FANOUT)])
@pytest.mark.parametrize("seed", range(2))
def test_small_layers_are_solved_exactly(objective: str, value: object, seed: int) -> None:
    """With 8 experts on 4 ranks annealing finds the optimum of all 2520 placements, layer by layer."""
    problem = world(seed)[0]
    if objective == "step_time":
        best = best_per_layer(problem, lambda plan: layer_times_ns(problem, plan).sum(axis=0) / 3).sum()
    else:
        tokens = len(problem.steps.expert_ids) * 2  # type: ignore[union-attr]
        best = best_per_layer(problem, lambda plan: layer_fanout(problem, plan)["ranks"]).sum() / tokens
    result = joint(problem, seed=0, objective=objective, moves=4000, resample=0, time_limit_s=30.0)
    assert result.objective == pytest.approx(best, rel=1e-12)
    assert value.value(problem, result.plan) == pytest.approx(best, rel=1e-12)  # type: ignore[attr-defined]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["step_time", "fanout"]), st.integers(0, 2), st.booleans())
def test_no_start_is_better(seed: int, objective: str, redundant: int, shares: bool) -> None:
    """Whatever it starts from, no layer costs more than in any start; with uneven shares, not in sum."""
    problem = world(seed % 7, redundant=4 * redundant)[0]
    rng = np.random.default_rng(seed)
    starts = [random_plan(rng, problem, shares=shares) for _ in range(3)]
    plan = joint(problem, objective=objective, moves=3, seed=seed, time_limit_s=5.0, starts=starts).plan
    assert plan is not None

    def cost(one: PlacementPlan) -> np.ndarray:
        return layer_times_ns(problem, one).sum(axis=0) if objective == "step_time" else layer_fanout(
            problem, one)["ranks"]

    others = [*starts, *(place(problem, name).plan for name in ("contiguous", "lpt", "eplb")
                         if redundant == 0 or name != "contiguous")]
    for other in others:
        assert cost(plan).sum() <= cost(other).sum()
        assert shares or np.all(cost(plan) <= cost(other))


def test_same_seed_same_plan() -> None:
    """Two searches with one seed return the same slots, on one thread or two."""
    problem = world(2, redundant=4)[0]
    plans = [joint(problem, moves=500, threads=threads, seed=3, time_limit_s=60.0).plan
             for threads in (1, 2, 2)]
    rows = [plan.physical_to_logical for plan in plans if plan is not None]
    assert all(np.array_equal(rows[0], row) for row in rows[1:])
    assert plans[0] is not None
    assert plans[0].provenance["complete"] is True


def test_what_is_learned_by_heart_stays_out() -> None:
    """With steps kept from the search, each layer is its start's row or better than it on those steps too."""
    problem = world(9, batch=10, num_steps=12)[0]
    plan = joint(problem, seed=0, moves=1500, validate=0.5, time_limit_s=30.0).plan
    free = joint(problem, seed=0, moves=1500, validate=0.0, resample=0, time_limit_s=30.0)
    start = joint(problem, seed=0, moves=1, validate=0.0, resample=0, time_limit_s=30.0).plan
    assert plan is not None
    assert start is not None
    unseen = split_steps(problem, 0.5)[1]
    assert unseen is not None
    assert unseen.steps is not None
    assert unseen.steps.num_steps == 6
    assert np.array_equal(layer_times_ns(unseen, plan), layer_times_ns(problem, plan)[6:])
    new, old = (layer_times_ns(unseen, one).sum(axis=0) for one in (plan, start))
    same = np.all(plan.physical_to_logical == start.physical_to_logical, axis=1)
    assert np.all(same | (new < old))
    assert free.objective is not None
    assert free.objective <= STEP_TIME.value(problem, plan)


def test_constraints_are_kept() -> None:
    """Pins, pairs apart and capacities hold in the result, and it still improves on the repaired starts."""
    rules = Constraints((Pin(3, 0), Pin(5, 2, 1)), (Apart(0, 1), Apart(2, 4, 0)), (Capacity("node", 0, 4),))
    problem = dataclasses.replace(world(1, redundant=4)[0], constraints=rules)
    plan = joint(problem, seed=0, moves=2000, time_limit_s=30.0).plan
    assert plan is not None
    assert not rules.broken(plan, 2)
    free = joint(dataclasses.replace(problem, constraints=Constraints()), seed=0, moves=2000, time_limit_s=30.0)
    assert STEP_TIME.value(problem, plan) >= free.objective  # type: ignore[operator]


def test_migration_is_weighed() -> None:
    """A prohibitive price keeps the current plan; a small one moves fewer bytes than none at all."""
    problem = world(6)[0]
    current = random_plan(np.random.default_rng(9), problem)
    problem = dataclasses.replace(problem, current=current, expert_bytes=np.array([1000, 1000]))
    stay = joint(problem, seed=0, moves=1000, migration_weight=1e6, time_limit_s=30.0)
    assert stay.plan is not None
    assert moved_experts(current, stay.plan).sum() == 0
    free = joint(problem, seed=0, moves=1000, time_limit_s=30.0)
    some = joint(problem, seed=0, moves=1000, migration_weight=0.5, time_limit_s=30.0)
    assert free.plan is not None
    assert some.plan is not None
    assert some.objective is not None
    assert MIGRATION.value(problem, some.plan) < MIGRATION.value(problem, free.plan)
    total = STEP_TIME.value(problem, some.plan) + 0.5 * MIGRATION.value(problem, some.plan)
    assert some.objective == pytest.approx(total, rel=1e-12)


def test_progress_falls_to_the_result() -> None:
    """Reports of a search never rise, and the last one is the result's objective."""
    problem, seen = world(3)[0], []
    progress = Progress(listener=lambda report: seen.append(report.objective))
    result = joint(problem, seed=0, moves=400, time_limit_s=30.0, progress=progress)
    assert seen == sorted(seen, reverse=True)
    assert len(seen) > 1
    assert progress.objective == pytest.approx(result.objective, rel=1e-9)


@pytest.mark.parametrize(("options", "text"), [
    ({"objective": "fanuot"}, "Did you mean 'fanout'"),
    ({"node_weight": -1.0}, "weights must be finite"),
    ({"moves": 0}, "moves and threads must be at least 1"),
    ({"resample": -1}, "resample not negative"),
    ({"validate": 1.0}, "validate must be at least 0 and below 1"),
    ({"migration_weight": 1.0}, "needs the plan that is loaded now"),
])
def test_bad_options_are_refused(options: dict, text: str) -> None:
    """An option out of range is named with what was expected."""
    with pytest.raises(InputError, match=text):
        joint(world(0)[0], seed=0, time_limit_s=1.0, **options)


def test_steps_are_needed() -> None:
    """Without token sets there is nothing to search."""
    with pytest.raises(InputError, match="needs token sets step by step"):
        joint(dataclasses.replace(world(0)[0], steps=None), seed=0, time_limit_s=1.0)
