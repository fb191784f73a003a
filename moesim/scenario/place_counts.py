"""Placing by expert counts alone: balance of loads; nothing is simulated, since no token was recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesim.errors import InputError
from moesim.hardware.load import load_hardware
from moesim.hardware.shorthand import parse_cluster
from moesim.model.catalog import load_model
from moesim.placement.metrics import imbalance, rank_load
from moesim.placement.place import place, problem_from_counts
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress, Report
from moesim.scenario.place_run import PlaceOutcome, _facts
from moesim.scenario.placing import PlaceRequest, contiguous_plan
from moesim.traces.counts import COUNTS_ONLY, CountTrace, read_counts


def run_place_counts(request: PlaceRequest, *, solver: str, objective: str | None, time_limit_s: float, prove_s: float,
                     options: dict[str, Any], out: Path, listener: Callable[[Report], None] | None) -> PlaceOutcome:
    """Make a plan from a CountTrace and judge it by the imbalance of its ranks on the same counts.

    Raises:
        InputError: an objective that needs tokens, or counts of another model.
    """
    if objective not in (None, "auto", "balance"):
        raise InputError(f"{request.trace}: objective {objective!r} needs tokens, but {COUNTS_ONLY}: use balance")
    counts = read_counts(request.trace)
    problem = _problem(request, counts)
    result = place(problem, solver, seed=request.seed, time_limit_s=time_limit_s, objective="balance", prove_s=prove_s,
                   progress=Progress(listener), **options)
    assert result.plan is not None  # place() raises otherwise
    facts = {"model": request.model or counts.model, "trace": request.trace, "trace_digest": counts.digest(),
             "hardware": request.hardware, "redundant_experts": request.redundant_experts, "goal": "balance",
             "constraints": [str(one) for one in request.constraints]}
    plan = dataclasses.replace(result.plan, provenance=result.plan.provenance | facts)
    plan.write(out)
    rows = [{"plan": name, **_judged(problem, one)}
            for name, one in (("contiguous", contiguous_plan(problem)), (result.solver, plan))]
    return PlaceOutcome(_facts(result), rows, ["made from counts: step time and traffic are not known"], [out],
                        f"the {counts.num_windows} windows of counts that the plan was made from")


def _problem(request: PlaceRequest, counts: CountTrace) -> PlacementProblem:
    if not request.model and not counts.model:
        raise InputError(f"{request.trace}: the counts do not name their model; give --model")
    model = load_model(request.model or counts.model)
    counts.check_model(model)
    name, gpus, nodes = parse_cluster(request.hardware)
    hardware = load_hardware(name, num_nodes=nodes or request.num_nodes, gpus_per_node=gpus or request.gpus_per_node)
    if not hardware.num_ranks:
        raise InputError(f"hardware {hardware.name!r} has no GPUs to place experts on")
    free = min(hardware.memory_of(rank).num_bytes for rank in hardware.ranks)
    problem = problem_from_counts(
        counts.expert_load(), num_ranks=hardware.num_ranks, ranks_per_node=hardware.ranks_per_node,
        redundant_experts=request.redundant_experts, expert_bytes=model.expert_bytes,
        memory_bytes_per_rank=free - model.non_expert_bytes, num_groups=model.num_groups)
    return dataclasses.replace(problem, current=request.current, constraints=request.constraints)


def _judged(problem: PlacementProblem, plan: PlacementPlan) -> dict[str, float]:
    ranks = rank_load(plan, problem.expert_load)
    return {"imbalance": float(ranks.max(axis=1).sum() / ranks.mean(axis=1).sum()),
            "imbalance_worst_layer": float(imbalance(plan, problem.expert_load).max())}
