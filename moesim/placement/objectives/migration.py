"""Migration: what has to be copied to get from the loaded plan to a new one."""

from __future__ import annotations

import numpy as np

from moesim.placement.objectives.objective import ANY, Objective
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem


def moved_experts(before: PlacementPlan, after: PlacementPlan) -> np.ndarray:
    """Return int64[layer], experts that a rank must fetch: it holds them after, and did not before."""
    held = []
    for plan in (before, after):
        flags = np.zeros((plan.num_layers, plan.num_ranks, plan.num_experts), bool)
        layers = np.arange(plan.num_layers)[:, None]
        flags[layers, plan.slot_rank[None, :], plan.physical_to_logical] = True
        held.append(flags)
    return np.sum(held[1] & ~held[0], axis=(1, 2))


def _score(problem: PlacementProblem, plan: PlacementPlan) -> float:
    assert problem.current is not None
    moved = moved_experts(problem.current, plan)
    sizes = problem.expert_bytes if len(problem.expert_bytes) else np.ones(len(moved))
    return float(np.sum(moved * sizes))


MIGRATION = Objective(
    "migration", "bytes of experts to copy from the current plan (experts, where sizes are unknown)", "min", ANY,
    "matters whenever a running engine changes its plan: every moved expert is copied", ("current",), _score)
