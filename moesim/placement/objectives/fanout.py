"""Fan-out: the distinct ranks and nodes that one token reaches in one layer."""

from __future__ import annotations

import itertools

import numpy as np

from moesim.placement.metrics import slot_of_token
from moesim.placement.objectives.objective import HOME, Objective
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem


def slots_by_step(problem: PlacementProblem, plan: PlacementPlan) -> np.ndarray:
    """Return int32[token, layer, k], the slot of each use (-1 pads), counted anew in every step as engines do."""
    steps = problem.steps
    assert steps is not None
    if plan.slot_share is None and int(plan.replica_count.max()) == 1:
        return slot_of_token(plan, steps.expert_ids)  # one slot per expert: nothing is counted
    cuts = steps.starts
    return np.concatenate([slot_of_token(plan, steps.expert_ids[first:last])
                           for first, last in itertools.pairwise(cuts)])


def layer_fanout(problem: PlacementProblem, plan: PlacementPlan) -> dict[str, np.ndarray]:
    """Return int64[layer], the distinct ``ranks`` and ``nodes`` of all tokens, summed."""
    slots = slots_by_step(problem, plan)
    ranks = np.where(slots < 0, -1, slots // plan.slots_per_rank)
    nodes = np.where(slots < 0, -1, ranks // problem.ranks_per_node)
    return {"ranks": _distinct(ranks), "nodes": _distinct(nodes)}


def mean_fanout(problem: PlacementProblem, plan: PlacementPlan) -> dict[str, float]:
    """Return the mean number of distinct ``ranks`` and ``nodes`` that a token's experts of one layer lie on."""
    assert problem.steps is not None
    return {name: float(sums.sum()) / (len(problem.steps.expert_ids) * plan.num_layers)
            for name, sums in layer_fanout(problem, plan).items()}


def _distinct(places: np.ndarray) -> np.ndarray:
    rising = np.sort(places, axis=2)
    first = np.concatenate([np.ones_like(rising[..., :1], bool), rising[..., 1:] != rising[..., :-1]], axis=2)
    return np.asarray(np.sum(first & (rising >= 0), axis=(0, 2), dtype=np.int64))


def _score(problem: PlacementProblem, plan: PlacementPlan) -> float:
    return mean_fanout(problem, plan)["ranks"]


FANOUT = Objective(
    "fanout", "distinct ranks that a token reaches in a layer, mean", "min", HOME,
    "matters where tokens return home after each layer (DeepEP): a token is sent once to every rank that holds one "
    "of its experts", ("steps",), _score)
