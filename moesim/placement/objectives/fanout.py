"""Fan-out: the distinct ranks and nodes that one token reaches in one layer."""

from __future__ import annotations

import numpy as np

from moesim.placement.metrics import slot_of_token
from moesim.placement.objectives.objective import HOME, Objective
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem


def mean_fanout(problem: PlacementProblem, plan: PlacementPlan) -> dict[str, float]:
    """Return the mean number of distinct ``ranks`` and ``nodes`` that a token's experts of one layer lie on."""
    assert problem.steps is not None
    slots = slot_of_token(plan, problem.steps.expert_ids, problem.steps.step)
    ranks = np.where(slots < 0, -1, slots // plan.slots_per_rank)
    nodes = np.where(slots < 0, -1, ranks // problem.ranks_per_node)
    return {"ranks": _mean_distinct(ranks), "nodes": _mean_distinct(nodes)}


def _mean_distinct(places: np.ndarray) -> float:
    rising = np.sort(places, axis=2)
    first = np.concatenate([np.ones_like(rising[..., :1], bool), rising[..., 1:] != rising[..., :-1]], axis=2)
    return float(np.mean(np.sum(first & (rising >= 0), axis=2)))


def _score(problem: PlacementProblem, plan: PlacementPlan) -> float:
    return mean_fanout(problem, plan)["ranks"]


FANOUT = Objective(
    "fanout", "distinct ranks that a token reaches in a layer, mean", "min", HOME,
    "matters where tokens return home after each layer (DeepEP): a token is sent once to every rank that holds one "
    "of its experts", ("steps",), _score)
