"""`place`: the one door to every solver. No plan leaves it unchecked."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import numpy as np

from moesim.errors import InputError, SolverError, did_you_mean
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult
from moesim.placement.solvers import SOLVERS, Solver
from moesim.traces.stats import load_counts, transition_counts
from moesim.traces.trace import RoutingTrace

_COMMON = ("seed", "time_limit_s", "starts", "progress")


def place(problem: PlacementProblem, solver: str, *, seed: int = 0, time_limit_s: float = 10.0,
          **options: Any) -> SolveResult:
    """Solve a placement problem and check the answer.

    Args:
        problem: what to place where.
        solver: a name in `moesim.placement.solvers.SOLVERS`.
        seed: of everything random in the solver; same seed, same plan.
        time_limit_s: wall-clock limit of the search, positive (the greedy solvers need no limit).
        options: the solver's own keyword arguments.

    Returns:
        The result; its plan's provenance records the solver, its options, status, objective, bound, gap,
        time and seed.

    Raises:
        InputError: an unknown solver or option, or a value that the solver refuses.
        SolverError: the solver ended without a plan; the message has its status and time.
        CheckError: the solver's plan is not a valid answer to the problem.
    """
    function = SOLVERS[solver]
    if not time_limit_s > 0:
        raise InputError(f"place: time_limit_s must be positive, got {time_limit_s}")
    if seed < 0:
        raise InputError(f"place: seed must not be negative, got {seed}")
    used = _options(function, solver, options)
    result = function(problem, seed=seed, time_limit_s=time_limit_s, **options)
    if result.plan is None or not result.status.has_plan:
        raise SolverError(f"solver {solver!r} ended with status '{result.status.value}' and no plan after "
                          f"{result.time_s:.3g} s (time limit {time_limit_s:.3g} s)")
    problem.check(result.plan)
    provenance = {
        **result.plan.provenance, "solver": solver, "options": used, "status": result.status.value,
        "objective_name": result.objective_name, "objective": result.objective,
        "objective_bound": result.objective_bound, "gap": result.gap, "time_s": result.time_s, "seed": seed}
    return dataclasses.replace(result, plan=dataclasses.replace(result.plan, provenance=provenance))


def problem_from_trace(
    trace: RoutingTrace, *, num_ranks: int, ranks_per_node: int, redundant_experts: int = 0,
    expert_bytes: int | np.ndarray = 0, memory_bytes_per_rank: float = math.inf, num_groups: int = 1,
) -> PlacementProblem:
    """Return the problem of placing a trace's experts on `num_ranks` ranks.

    Args:
        trace: routing; its loads and transitions between neighbouring layers are counted.
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
    num_slots = trace.num_experts + redundant_experts
    if num_slots % num_ranks:
        raise InputError(_indivisible(trace.num_experts, redundant_experts, num_ranks))
    return PlacementProblem(
        expert_load=load_counts(trace), num_ranks=num_ranks, slots_per_rank=num_slots // num_ranks,
        ranks_per_node=ranks_per_node, transitions=transition_counts(trace).astype(np.float64),
        expert_bytes=_bytes_per_layer(expert_bytes, trace.num_layers),
        memory_bytes_per_rank=memory_bytes_per_rank, num_groups=num_groups)


def _options(function: Solver, solver: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the solver's options with its defaults filled in; raises InputError for an unknown one."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in _COMMON]
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
