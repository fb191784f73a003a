"""The result of a balance solver: its plan scored and set beside the proven bound."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from moesim.placement.bounds.balance import balance_bound
from moesim.placement.metrics import rank_load
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult, SolveStatus

BALANCE_OBJECTIVE = "sum over layers of the largest rank load, tokens"
_MEETS = 1e-9  # a plan meets its bound when only rounding is between them (loads scaled to whole numbers)


def balance_result(
    problem: PlacementProblem, slots: np.ndarray, *, solver: str, seed: int, started_s: float,
    layer_bound: np.ndarray | None = None, provenance: dict[str, Any] | None = None,
) -> SolveResult:
    """Return the result of a balance solver: its plan scored and set beside the proven bound.

    Args:
        problem: the problem.
        slots: int[layer, slot], the expert in each slot.
        solver, seed: for the record.
        started_s: `time.perf_counter` when the solver began.
        layer_bound: float64[layer], the solver's own proven bounds; None: `balance_bound`.
        provenance: further facts about the plan.

    The status is OPTIMAL where the plan meets the bound of every layer, else FEASIBLE.
    """
    plan = PlacementPlan(slots, problem.num_ranks, problem.num_experts, provenance or {})
    largest = rank_load(plan, problem.expert_load).max(axis=1)
    bound = balance_bound(problem) if layer_bound is None else layer_bound
    optimal = bool(np.all(largest <= bound * (1 + _MEETS)))
    return SolveResult(
        solver=solver, status=SolveStatus.OPTIMAL if optimal else SolveStatus.FEASIBLE, plan=plan,
        objective_name=BALANCE_OBJECTIVE, objective=float(largest.sum()), objective_bound=float(bound.sum()),
        time_s=time.perf_counter() - started_s, seed=seed)
