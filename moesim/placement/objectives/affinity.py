"""Affinity and hops: what successive experts of a token cost to join, where a token moves from layer to layer."""

from __future__ import annotations

from moesim.placement.metrics import kept_transitions
from moesim.placement.objectives.objective import COHERENT, Objective
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem

_MATTERS = ("matters where a token moves on from layer to layer (context-coherent execution); worth nothing "
            "where tokens return home after each layer")


def kept_fraction(problem: PlacementProblem, plan: PlacementPlan, node_weight: float = 0.0) -> float:
    """Return ``w kept on the node + (1 - w) kept on the rank``, fractions of all transitions (w: `node_weight`)."""
    assert problem.transitions is not None
    kept = kept_transitions(plan, problem.transitions, problem.ranks_per_node)
    return node_weight * kept["node"] + (1.0 - node_weight) * kept["rank"]


def _affinity(problem: PlacementProblem, plan: PlacementPlan) -> float:
    return kept_fraction(problem, plan)


def _hops(problem: PlacementProblem, plan: PlacementPlan) -> float:
    """Return the mean cost of a transition: 0 on its rank, 1 within its node, 2 between nodes (ExFlow's metric)."""
    return 2.0 - 2.0 * kept_fraction(problem, plan, node_weight=0.5)


AFFINITY = Objective("affinity", "fraction of transitions that stay on their rank", "max", COHERENT, _MATTERS,
                     ("transitions",), _affinity)
HOPS = Objective("hops", "mean hops of a transition (0 same rank, 1 same node, 2 other node)", "min", COHERENT,
                 _MATTERS, ("transitions",), _hops)
