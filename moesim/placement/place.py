"""`place`: the one door to every solver. No plan leaves it unchecked."""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from typing import Any

import numpy as np

from moesim.errors import InputError, MoesimError, SolverError, did_you_mean
from moesim.placement.call import COMMON, call_solver, takes
from moesim.placement.goal import Goal, parse_goal
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.prove import PROVERS, goal_bound, prove
from moesim.placement.repair import repair
from moesim.placement.result import SolveResult, SolveStatus
from moesim.placement.solvers import SOLVERS, Solver
from moesim.traces.stats import load_counts, transition_counts
from moesim.traces.trace import RoutingTrace

_MEETS = 2.0**-40
_QUICK_S = 1.0
PROVING = "proving"  # the stage of reports that come from a prover
FALLBACKS = ("lpt", "eplb", "contiguous")


def place(problem: PlacementProblem, solver: str, *, seed: int = 0, time_limit_s: float = 10.0,
          objective: str | None = None, prove_s: float = 0.0, progress: Progress | None = None,
          **options: Any) -> SolveResult:
    """Solve a placement problem and check the answer.

    Args:
        problem: what to place where.
        solver: a name in `moesim.placement.solvers.SOLVERS`.
        seed: of everything random in the solver; same seed, same plan.
        time_limit_s: wall-clock limit of the search, positive (the greedy solvers need no limit).
        objective: the goal to judge the plan by (`moesim.placement.goal.parse_goal`); solvers that can search for
            it do. None: the solver's own objective, or with ``auto`` the problem's default.
        prove_s: seconds to spend on the bound after the search; 0: what the solver and the quick methods prove.
        progress: told of every improvement; when the search is interrupted (Ctrl-C) its best plan is the answer.
        options: the solver's own keyword arguments.

    Returns:
        The result; its plan keeps the problem's constraints (`repair`), and its provenance records the solver, its
        options, status, objective, bound and how it was proven, gap, time and seed. A search that ran out of time
        without a plan falls back to the best of the greedy plans (provenance: ``fallback``).

    Raises:
        InputError: an unknown solver, objective or option, or a value that the solver refuses.
        SolverError: the solver proved that there is no plan, or the constraints clash.
        CheckError: the solver's plan is not a valid answer to the problem.
    """
    function = SOLVERS[solver]
    if not time_limit_s > 0:
        raise InputError(f"place: time_limit_s must be positive, got {time_limit_s}")
    for name, value in (("seed", seed), ("prove_s", prove_s)):
        if value < 0:
            raise InputError(f"place: {name} must not be negative, got {value}")
    goal = None if objective is None else parse_goal(objective)
    if goal is not None:
        goal.check(problem)
        if takes(function, "objective") and (solver == "auto" or goal.single is not None):
            options = {"objective": objective, **options}
    used = _options(function, solver, options)
    result = _solve(problem, solver, goal, progress, seed=seed, time_limit_s=time_limit_s, **options)
    result = _within_constraints(problem, result)
    own = result.objective_name
    if goal is not None:
        result = _judged(problem, result, goal)
    # a plan that a prover rounds may take the place of a search's plan, never of another method's or objective's
    found = Progress(progress.listener if progress else None, result.sense, PROVING, objective=result.objective)
    proven = _proven(problem, result, prove_s, found)
    searched = takes(function, "progress") and own == result.objective_name
    result = _better_plan(problem, proven, found) if searched else proven
    assert result.plan is not None
    problem.check(result.plan)
    provenance = {
        **result.plan.provenance, "solver": solver, "options": used, "status": result.status.value,
        "objective_name": result.objective_name, "objective": result.objective,
        "objective_bound": result.objective_bound, "bound_method": result.bound_method, "gap": result.gap,
        "time_s": result.time_s, "seed": seed, "searched_for_it": searched}
    return dataclasses.replace(result, plan=dataclasses.replace(result.plan, provenance=provenance))


def _solve(problem: PlacementProblem, solver: str, goal: Goal | None, progress: Progress | None,
           **keywords: Any) -> SolveResult:
    """Return the solver's result, the interrupted search's best plan, or the fallback of a time-out."""
    started_s = time.perf_counter()
    try:
        result = call_solver(SOLVERS[solver], problem, progress=progress, **keywords)
    except KeyboardInterrupt:
        if progress is None or progress.slots is None:
            raise
        plan = PlacementPlan(progress.slots, problem.num_ranks, problem.num_experts, {"interrupted": True})
        return SolveResult(
            solver=solver, status=SolveStatus.FEASIBLE, plan=plan, objective=progress.objective,
            objective_name="the search's own", objective_bound=progress.bound, sense=progress.sense,
            time_s=time.perf_counter() - started_s, seed=keywords["seed"])
    if result.status is SolveStatus.UNKNOWN and result.plan is None:
        return _fallback(problem, result, goal)
    if result.plan is None or not result.status.has_plan:
        raise SolverError(f"solver {solver!r} ended with status '{result.status.value}' and no plan after "
                          f"{result.time_s:.3g} s (time limit {keywords['time_limit_s']:.3g} s)")
    return result


def _fallback(problem: PlacementProblem, ended: SolveResult, goal: Goal | None) -> SolveResult:
    """Return the best greedy plan in place of a search that found none, and say so."""
    goal = goal or parse_goal("balance")
    results = [SOLVERS[name](problem, seed=ended.seed, time_limit_s=1.0) for name in FALLBACKS]
    best = results[0]
    for result in results[1:]:
        assert best.plan is not None  # the greedy solvers always give one
        assert result.plan is not None
        if goal.better(goal.key(problem, result.plan), goal.key(problem, best.plan)):
            best = result
    assert best.plan is not None
    note = (f"{ended.solver} found no plan in {ended.time_s:.3g} s (status '{ended.status.value}'); this is the plan "
            f"of {best.solver}")
    plan = dataclasses.replace(best.plan, provenance=best.plan.provenance | {"fallback": note})
    return dataclasses.replace(best, plan=plan, time_s=ended.time_s + best.time_s)


def _within_constraints(problem: PlacementProblem, result: SolveResult) -> SolveResult:
    """Return the result with its plan moved within the constraints; bounds stay, optimality does not."""
    assert result.plan is not None
    plan = repair(problem, result.plan)
    if plan is result.plan:
        return result
    one = next((OBJECTIVES[name] for name in OBJECTIVES.names() if OBJECTIVES[name].unit == result.objective_name), None)
    plan = dataclasses.replace(plan, provenance=plan.provenance | {"repaired": True})
    return dataclasses.replace(result, plan=plan, status=SolveStatus.FEASIBLE,
                               objective=None if one is None else one.value(problem, plan))


def _judged(problem: PlacementProblem, result: SolveResult, goal: Goal) -> SolveResult:
    """Return the result with the goal's value as its objective; another objective's bound is dropped."""
    assert result.plan is not None
    key, one = goal.key(problem, result.plan)[0], goal.single
    name = goal.name if one is None else one.unit
    value = key if one is None or one.sense == "min" else -key
    if name == result.objective_name:
        return dataclasses.replace(result, objective=value)
    return dataclasses.replace(result, objective=value, objective_name=name, objective_bound=None, bound_method="",
                               certificate=None, status=SolveStatus.FEASIBLE,
                               sense="min" if one is None else one.sense)


def _proven(problem: PlacementProblem, result: SolveResult, prove_s: float, found: Progress) -> SolveResult:
    """Return the result with a bound where it has none, and with a tighter one where `prove_s` finds it.

    `found` is told of the plans that a prover comes across.
    """
    one = next((OBJECTIVES[name] for name in OBJECTIVES.names() if OBJECTIVES[name].unit == result.objective_name), None)
    if one is None or (one.name not in PROVERS and one.name != "migration") or result.objective is None:
        return _composite_bound(problem, result, prove_s)
    optimal = result.status is SolveStatus.OPTIMAL and result.certificate is not None
    if result.objective_bound is not None and (optimal or not prove_s):
        return result
    try:
        proof = prove(problem, one.name, seed=result.seed, time_limit_s=prove_s or _QUICK_S, incumbent=result.plan,
                      progress=found)
    except (KeyboardInterrupt, MoesimError):
        return result  # without a tighter bound
    known = result.objective_bound
    same = result.certificate is None and known is not None and math.isclose(known, proof.bound, rel_tol=_MEETS)
    if known is not None and not same and not one.better(known, proof.bound):
        return result
    tight = math.isclose(proof.bound, result.objective, rel_tol=_MEETS)
    status = SolveStatus.OPTIMAL if tight else result.status
    return dataclasses.replace(result, objective_bound=proof.bound, bound_method=proof.method, certificate=proof,
                               status=status)


def _better_plan(problem: PlacementProblem, result: SolveResult, found: Progress) -> SolveResult:
    """Return the result with the plan that a prover came across (rounding its relaxation), if that is better."""
    one = next((OBJECTIVES[name] for name in OBJECTIVES.names() if OBJECTIVES[name].unit == result.objective_name), None)
    if found.slots is None or one is None or result.objective is None:
        return result
    plan = repair(problem, PlacementPlan(found.slots, problem.num_ranks, problem.num_experts, {"rounded": True}))
    value = one.value(problem, plan)
    return dataclasses.replace(result, plan=plan, objective=value) if one.better(value, result.objective) else result


def _composite_bound(problem: PlacementProblem, result: SolveResult, prove_s: float) -> SolveResult:
    """Return the result with the weighted sum of its objectives' bounds, where it was judged by such a goal."""
    try:
        goal = parse_goal(result.objective_name)
    except InputError:
        return result  # a solver's own objective
    bound = goal_bound(problem, goal, seed=result.seed, time_limit_s=prove_s or _QUICK_S, incumbent=result.plan)
    return dataclasses.replace(result, objective_bound=bound, bound_method="" if bound is None else "sum of bounds")


def problem_from_trace(
    trace: RoutingTrace, *, num_ranks: int, ranks_per_node: int, redundant_experts: int = 0,
    expert_bytes: int | np.ndarray = 0, memory_bytes_per_rank: float = math.inf, num_groups: int = 1,
) -> PlacementProblem:
    """Return the problem of placing a trace's experts: its loads and transitions between neighbouring layers.

    Args and errors as `problem_from_counts`.
    """
    problem = problem_from_counts(
        load_counts(trace), num_ranks=num_ranks, ranks_per_node=ranks_per_node, redundant_experts=redundant_experts,
        expert_bytes=expert_bytes, memory_bytes_per_rank=memory_bytes_per_rank, num_groups=num_groups)
    return dataclasses.replace(problem, transitions=transition_counts(trace).astype(np.float64))


def problem_from_counts(
    expert_load: np.ndarray, *, num_ranks: int, ranks_per_node: int, redundant_experts: int = 0,
    expert_bytes: int | np.ndarray = 0, memory_bytes_per_rank: float = math.inf, num_groups: int = 1,
) -> PlacementProblem:
    """Return the problem of placing experts of known load on `num_ranks` ranks, without transitions.

    Args:
        expert_load: int64[layer, expert], selections of each expert.
        num_ranks, ranks_per_node: the ranks and how they are grouped.
        redundant_experts: further slots per layer, over all ranks.
        expert_bytes: bytes of one expert, one number or int[layer] (0: memory is not checked).
        memory_bytes_per_rank: bytes for experts on one rank.
        num_groups: expert groups of group-limited routing.

    Raises:
        InputError: slots that do not divide over the ranks, or what `PlacementProblem` refuses.
    """
    if num_ranks < 1 or redundant_experts < 0:
        raise InputError(f"placement: needs num_ranks >= 1 and redundant_experts >= 0, got {num_ranks} and "
                         f"{redundant_experts}")
    num_layers, num_experts = expert_load.shape
    num_slots = num_experts + redundant_experts
    if num_slots % num_ranks:
        raise InputError(_indivisible(num_experts, redundant_experts, num_ranks))
    return PlacementProblem(
        expert_load=expert_load, num_ranks=num_ranks, slots_per_rank=num_slots // num_ranks,
        ranks_per_node=ranks_per_node, expert_bytes=_bytes_per_layer(expert_bytes, num_layers),
        memory_bytes_per_rank=memory_bytes_per_rank, num_groups=num_groups)


def _options(function: Solver, solver: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the solver's options with its defaults filled in; raises InputError for an unknown one."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in COMMON]
    known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known) or " It takes none."
                raise InputError(f"solver {solver!r} has no option {name!r}.{hint}")
    return {**known, **options}


def _indivisible(num_experts: int, redundant_experts: int, num_ranks: int) -> str:
    above = redundant_experts + -(num_experts + redundant_experts) % num_ranks
    near = [str(count) for count in (above - num_ranks, above) if count >= 0]
    return (f"placement: {num_experts} experts + {redundant_experts} redundant do not divide over "
            f"{num_ranks} ranks; the nearest redundant_experts that do: {' or '.join(near)}")


def _bytes_per_layer(expert_bytes: int | np.ndarray, num_layers: int) -> np.ndarray:
    sizes = np.asarray(expert_bytes)
    if sizes.ndim == 0:
        sizes = np.full(num_layers if sizes else 0, sizes)
    if sizes.shape not in ((num_layers,), (0,)) or (sizes.size and sizes.min() < 0):
        raise InputError(f"placement: expert_bytes must be one size or one per layer ({num_layers}), none "
                         f"negative, got shape {sizes.shape}")
    return sizes.astype(np.int64)
