"""The result of a balance solver: its plan scored and set beside the proven bound."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from moesim.placement.bounds.balance import balance_bound, counting_certificate, step_balance_bound
from moesim.placement.metrics import rank_load
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult, SolveStatus

BALANCE_OBJECTIVE = "sum over layers of the largest rank load, tokens"
STEPS_OBJECTIVE = "sum over layers and steps of the largest rank load, tokens"
_MEETS = 1e-9  # a plan meets its bound when only rounding is between them (loads scaled to whole numbers)


def balance_result(
    problem: PlacementProblem, slots: np.ndarray, *, solver: str, seed: int, started_s: float,
    layer_bound: np.ndarray | None = None, provenance: dict[str, Any] | None = None,
    slot_share: np.ndarray | None = None,
) -> SolveResult:
    """Return the result of a balance solver: its plan scored and set beside the proven bound.

    Args:
        problem: the problem.
        slots: int[layer, slot], the expert in each slot.
        solver, seed: for the record.
        started_s: `time.perf_counter` when the solver began.
        layer_bound: float64[layer], the solver's own proven bounds; None: `balance_bound`.
        provenance: further facts about the plan.
        slot_share: float64[layer, slot], the plan's shares; None: an even split.

    The status is OPTIMAL where the plan meets the bound of every layer, else FEASIBLE.
    """
    plan = PlacementPlan(slots, problem.num_ranks, problem.num_experts, provenance or {}, slot_share)
    largest = rank_load(plan, problem.expert_load).max(axis=1)
    counted = layer_bound is None
    bound = balance_bound(problem) if layer_bound is None else layer_bound
    optimal = bool(np.all(largest <= bound * (1 + _MEETS)))
    return SolveResult(
        solver=solver, status=SolveStatus.OPTIMAL if optimal else SolveStatus.FEASIBLE, plan=plan,
        objective_name=BALANCE_OBJECTIVE, objective=float(largest.sum()), objective_bound=float(bound.sum()),
        time_s=time.perf_counter() - started_s, seed=seed,
        bound_method="counting" if counted else "", certificate=counting_certificate(bound) if counted else None)


def step_loads(problem: PlacementProblem) -> np.ndarray:
    """Return float64[layer, step, expert], tokens per step of `problem.steps`; without steps, the loads as one."""
    steps = problem.steps
    if steps is None:
        return problem.expert_load[:, None, :]
    loads = np.empty((problem.num_layers, steps.num_steps, problem.num_experts))
    for layer in range(problem.num_layers):
        ids = steps.expert_ids[:, layer].astype(np.int64)
        keys = steps.step[:, None] * problem.num_experts + ids
        counts = np.bincount(keys[ids >= 0], minlength=loads[layer].size)
        loads[layer] = counts.reshape(loads[layer].shape)
    return loads


def step_maxima(plan: PlacementPlan, loads: np.ndarray) -> np.ndarray:
    """Return float64[layer], the sum over steps of the largest rank load, of float64[layer, step, expert] loads."""
    value = np.empty(plan.num_layers)
    for layer, slots in enumerate(plan.physical_to_logical):
        tokens = loads[layer][:, slots] * plan.share[layer]
        value[layer] = tokens.reshape(len(tokens), plan.num_ranks, -1).sum(axis=2).max(axis=1).sum()
    return value


def steps_result(
    problem: PlacementProblem, slots: np.ndarray, loads: np.ndarray, *, solver: str, seed: int, started_s: float,
    slot_share: np.ndarray | None = None,
) -> SolveResult:
    """Return the result of a solver that balances step by step, beside `step_balance_bound`; see `balance_result`."""
    plan = PlacementPlan(slots, problem.num_ranks, problem.num_experts, slot_share=slot_share)
    value, bound = step_maxima(plan, loads), step_balance_bound(problem, loads)
    optimal = bool(np.all(value <= bound * (1 + _MEETS)))
    return SolveResult(
        solver=solver, status=SolveStatus.OPTIMAL if optimal else SolveStatus.FEASIBLE, plan=plan,
        objective_name=STEPS_OBJECTIVE, objective=float(value.sum()), objective_bound=float(bound.sum()),
        time_s=time.perf_counter() - started_s, seed=seed, bound_method="counting")
