"""Balance: the busiest rank of each layer, by tokens."""

from __future__ import annotations

from moesim.placement.metrics import rank_load
from moesim.placement.objectives.objective import ANY, Objective
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem


def _score(problem: PlacementProblem, plan: PlacementPlan) -> float:
    """Return ``sum_l max_r load[l, r]``, tokens."""
    return float(rank_load(plan, problem.expert_load).max(axis=1).sum())


BALANCE = Objective(
    "balance", "sum over layers of the largest rank load, tokens", "min", ANY,
    "matters wherever a layer ends when its busiest rank does and rows, not weights, set the time (large batches)",
    (), _score)
