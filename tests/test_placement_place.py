"""`place` and `problem_from_trace`: look-up, checks, provenance, and the way from a trace to a problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import CheckError, InputError, SolverError
from moesim.placement.place import place, problem_from_trace
from moesim.placement.plan import PlacementPlan, read_plan
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult, SolveStatus
from moesim.placement.solvers import SOLVERS
from moesim.traces.trace import RoutingTrace

PROBLEM = PlacementProblem(np.array([[9.0, 7, 6, 5], [1, 2, 3, 4]]), num_ranks=2, slots_per_rank=2, ranks_per_node=1,
                           transitions=np.arange(16.0).reshape(1, 4, 4))


def make_trace(num_experts: int = 6, num_tokens: int = 40, num_layers: int = 3) -> RoutingTrace:
    """Return a random top-2 trace with padding."""
    rng = np.random.default_rng(2)
    ids = np.argsort(rng.random((num_tokens, num_layers, num_experts)), axis=2)[..., :2]
    ids[::7, num_layers // 2, 1] = -1
    zeros = np.zeros(num_tokens, np.int32)
    return RoutingTrace(expert_ids=ids, request_id=zeros, position=np.arange(num_tokens), phase=zeros, step=zeros,
                        num_experts=num_experts, layer_ids=np.arange(num_layers))


def register(monkeypatch: pytest.MonkeyPatch, name: str, result: SolveResult, seen: list[Any] | None = None) -> None:
    """Add a solver that ends with `result`."""
    def solver(problem: PlacementProblem, *, seed: int, time_limit_s: float, **options: Any) -> SolveResult:
        if seen is not None:
            seen.append((seed, time_limit_s, options))
        return result

    monkeypatch.setitem(SOLVERS._entries, name, solver)


def ended(status: SolveStatus, plan: PlacementPlan | None) -> SolveResult:
    """Return a result that ended so."""
    return SolveResult("stuck", status, plan, "nothing", None, None, 2.5, 0)


def test_a_solver_that_rules_out_every_plan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the solver, its status and its time (a mere time-out falls back to a greedy plan)."""
    register(monkeypatch, "stuck", ended(SolveStatus.INFEASIBLE, None))
    with pytest.raises(SolverError) as caught:
        place(PROBLEM, "stuck", time_limit_s=2)
    assert str(caught.value) == (
        "solver 'stuck' ended with status 'infeasible' and no plan after 2.5 s (time limit 2 s)")


def test_a_plan_that_nobody_vouches_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan beside the status unknown is not read."""
    register(monkeypatch, "stuck", ended(SolveStatus.UNKNOWN, PlacementPlan(np.array([[0, 1, 2, 3]] * 2), 2, 4)))
    with pytest.raises(SolverError, match="status 'unknown' and no plan"):
        place(PROBLEM, "stuck")


@pytest.mark.parametrize(("plan", "text"), [
    (PlacementPlan(np.array([[0, 1, 2, 3]]), 2, 4), r"physical_to_logical is \(1, 4\), the problem needs \(2, 4\)"),
    (PlacementPlan(np.array([[0, 1, 2, 3]] * 2), 4, 4), "made for 4 ranks, the problem has 2"),
    (PlacementPlan(np.array([[0, 1, 2, 0]] * 2), 2, 3), "made for 3 experts, the problem has 4"),
])
def test_no_plan_leaves_unchecked(plan: PlacementPlan, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver's plan for some other problem is caught at the door."""
    register(monkeypatch, "wrong", ended(SolveStatus.OPTIMAL, plan))
    with pytest.raises(CheckError, match=text):
        place(PROBLEM, "wrong")


def test_options_reach_a_third_party_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that takes any option gets it, with the seed and the time limit."""
    seen: list[Any] = []
    plan = PlacementPlan(np.array([[0, 1, 2, 3]] * 2), 2, 4, {"note": "kept"})
    register(monkeypatch, "mine", ended(SolveStatus.FEASIBLE, plan), seen)
    result = place(PROBLEM, "mine", seed=4, time_limit_s=1.5, depth=3)
    assert seen == [(4, 1.5, {"depth": 3})]
    assert result.plan.provenance["note"] == "kept"
    assert result.plan.provenance["options"] == {"depth": 3}


@pytest.mark.parametrize(("solver", "keywords", "text"), [
    ("eplbb", {}, "unknown placement solver 'eplbb'. Did you mean 'eplb'?"),
    ("eplb", {"polcy": "global"}, "solver 'eplb' has no option 'polcy'. Did you mean 'policy'?"),
    ("ilp", {"gap": 0.1}, "solver 'ilp' has no option 'gap'. Known: backend, num_workers, replicas."),
    ("lpt", {"policy": "global"}, "solver 'lpt' has no option 'policy'. It takes none."),
    ("lpt", {"time_limit_s": 0}, "time_limit_s must be positive, got 0"),
    ("lpt", {"time_limit_s": float("nan")}, "time_limit_s must be positive, got nan"),
    ("random", {"seed": -1}, "seed must not be negative, got -1"),
])
def test_what_place_does_not_know_is_refused(solver: str, keywords: dict[str, Any], text: str) -> None:
    """Unknown names come with a suggestion, values out of range with what was expected."""
    with pytest.raises(InputError) as caught:
        place(PROBLEM, solver, **keywords)
    assert str(caught.value).removeprefix("place: ") == text


def test_provenance_tells_the_whole_story(tmp_path: Path) -> None:
    """Solver, options with defaults, status, objective, bound, gap, time and seed are written with the plan."""
    result = place(PROBLEM, "ilp", seed=7, replicas="free")
    document = json.loads(result.plan.write(tmp_path / "a.plan.json").read_text())["provenance"]
    assert document["options"] == {"backend": "cpsat", "replicas": "free", "num_workers": 1}
    assert document["objective_name"] == "sum over layers of the largest rank load, tokens"
    # 9 + 5 against 7 + 6, and 4 + 1 against 3 + 2
    assert [document[key] for key in ("objective", "objective_bound", "gap")] == [19.0, 19.0, 0.0]
    assert (document["solver"], document["status"], document["seed"]) == ("ilp", "optimal", 7)
    assert document["time_s"] == result.time_s > 0
    assert read_plan(tmp_path / "a.plan.json").provenance == document


def test_a_trace_becomes_its_counts() -> None:
    """Loads and transitions are those of a plain loop over tokens, padding left out."""
    trace = make_trace()
    load, transitions = np.zeros((3, 6)), np.zeros((2, 6, 6))
    for token in trace.expert_ids.tolist():
        for layer, ids in enumerate(token):
            load[layer, [expert for expert in ids if expert >= 0]] += 1
            for i in ids if layer < 2 else []:
                for j in token[layer + 1]:
                    transitions[layer, i, j] += i >= 0 and j >= 0
    problem = problem_from_trace(trace, num_ranks=4, ranks_per_node=2, redundant_experts=2, expert_bytes=10,
                                 memory_bytes_per_rank=60, num_groups=3)
    np.testing.assert_array_equal(problem.expert_load, load)
    np.testing.assert_array_equal(problem.transitions, transitions)
    assert (problem.num_slots, problem.slots_per_rank, problem.num_nodes, problem.num_groups) == (8, 2, 2, 3)
    assert problem.expert_bytes.tolist() == [10, 10, 10]


def test_a_trace_of_one_layer_can_be_balanced() -> None:
    """One MoE layer has no transitions, which only the affinity solver needs."""
    problem = problem_from_trace(make_trace(num_layers=1).take(np.arange(5)), num_ranks=2, ranks_per_node=2)
    assert place(problem, "lpt").objective >= 5
    with pytest.raises(InputError, match="no transition was counted"):
        place(problem, "affinity")


@pytest.mark.parametrize(("keywords", "text"), [
    ({"num_ranks": 4}, "6 experts + 0 redundant do not divide over 4 ranks; the nearest redundant_experts that do: 2"),
    ({"num_ranks": 4, "redundant_experts": 5}, "the nearest redundant_experts that do: 2 or 6"),
    ({"num_ranks": 0}, "needs num_ranks >= 1 and redundant_experts >= 0, got 0 and 0"),
    ({"num_ranks": 2, "redundant_experts": -2}, "got 2 and -2"),
    ({"num_ranks": 3, "ranks_per_node": 2}, "3 ranks are not whole nodes of 2"),
    ({"num_ranks": 2, "expert_bytes": np.array([1, 2])}, "one size or one per layer (3), none negative, got shape"),
    ({"num_ranks": 2, "expert_bytes": -5}, "none negative"),
    ({"num_ranks": 2, "expert_bytes": 10, "memory_bytes_per_rank": 89}, "need 90 bytes per rank, but 89 are free"),
])
def test_a_problem_that_cannot_be_is_refused(keywords: dict[str, Any], text: str) -> None:
    """Slots that do not divide, impossible nodes and too little memory are named with what would work."""
    with pytest.raises(InputError) as caught:
        problem_from_trace(make_trace(), **{"ranks_per_node": 1, **keywords})
    assert text in str(caught.value)
