"""Bottleneck: the busiest rank's compute plus the busiest port's exchange, on mean counts (MoETuner's world)."""

from __future__ import annotations

import numpy as np

from moesim.placement.metrics import presence, rank_load
from moesim.placement.objectives.objective import COHERENT, Objective
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem


def bottleneck_parts(problem: PlacementProblem, plan: PlacementPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return float64[layer] compute and float64[layer - 1] exchange, seconds over the counted tokens.

    Compute of a layer: ``row_s max_r load[r]``. Exchange of a pair of layers, with F[r, s] the tokens that pass
    from rank r to s (transitions times `pair_weight`) and c[r, s] the port seconds per token:
    ``max_r max(sum_s F[r, s] c[r, s], sum_s F[s, r] c[s, r])``: a port sends and receives at once.
    """
    assert problem.transitions is not None
    assert problem.rates is not None
    rates = problem.rates
    cost = rates.link_s(problem.num_ranks, problem.ranks_per_node)
    exchange = np.zeros(problem.num_layers - 1)
    following = presence(plan, 0)
    for pair, counts in enumerate(problem.transitions):
        current, following = following, presence(plan, pair + 1)
        busy = rates.pair_weight * (current.T @ counts @ following) * cost
        exchange[pair] = max(busy.sum(axis=1).max(), busy.sum(axis=0).max())
    return rates.row_s * rank_load(plan, problem.expert_load).max(axis=1), exchange


def _score(problem: PlacementProblem, plan: PlacementPlan) -> float:
    compute, exchange = bottleneck_parts(problem, plan)
    return float(compute.sum() + exchange.sum())


BOTTLENECK = Objective(
    "bottleneck", "busiest rank's compute plus busiest port's exchange, seconds over the counted tokens", "min",
    COHERENT, "matters where tokens move on from layer to layer and each layer waits for its slowest rank and port",
    ("transitions", "rates"), _score)
