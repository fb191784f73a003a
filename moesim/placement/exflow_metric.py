"""ExFlow's own figure of a plan: hops of a token on its way through the layers, by level."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moesim.errors import InputError
from moesim.placement.metrics import presence
from moesim.placement.plan import PlacementPlan


class Hops(NamedTuple):
    """Mean hops of one token over all its transitions (0 ... layers - 1), as ExFlow's solution files name them.

    Attributes:
        intra, inter: hops to another rank of the same node, and to another node.
        cost: ``intra + 2 inter``.
        cintra: `intra` over the other ranks of a node (``ranks_per_node - 1``), 0 where there are none.
        cinter: `inter` over the ranks of other nodes (``ranks_per_node (nodes - 1)``), 0 where there are none.
    """

    intra: float
    inter: float
    cost: float
    cintra: float
    cinter: float


def hop_metric(plan: PlacementPlan, transitions: np.ndarray, ranks_per_node: int) -> Hops:
    """Return the hops of the mean token (Yao et al., arXiv 2401.08383, and the names of the files that they publish).

    Each pair of layers counts with its mean, so a top-1 trace gives ExFlow's figure exactly; with top-k > 1 every pair
    of experts of a token counts as an equal part of it. Replicas count by expectation (`metrics.presence`).

    Args:
        plan: the plan.
        transitions: float[layer - 1, expert, expert], pairs of experts that one token used.
        ranks_per_node: ranks per node.

    Raises:
        InputError: another shape, ranks that are not whole nodes, or a pair of layers without any transition.
    """
    expected = (plan.num_layers - 1, plan.num_experts, plan.num_experts)
    if np.shape(transitions) != expected:
        raise InputError(f"hops: transitions must be {expected}, got {np.shape(transitions)}")
    if ranks_per_node < 1 or plan.num_ranks % ranks_per_node:
        raise InputError(f"hops: {plan.num_ranks} ranks are not whole nodes of {ranks_per_node}")
    node = np.arange(plan.num_ranks) // ranks_per_node
    same_node, same_rank = np.equal.outer(node, node), np.eye(plan.num_ranks, dtype=bool)
    intra = inter = 0.0
    for layer, counts in enumerate(transitions):
        total = float(np.sum(counts))
        if total <= 0:
            raise InputError(f"hops: no transition from layer {layer} to layer {layer + 1} was counted")
        flow = presence(plan, layer).T @ counts @ presence(plan, layer + 1)
        intra += float(flow[same_node & ~same_rank].sum()) / total
        inter += float(flow[~same_node].sum()) / total
    peers, others = ranks_per_node - 1, plan.num_ranks - ranks_per_node
    return Hops(intra, inter, intra + 2.0 * inter, intra / peers if peers else 0.0, inter / others if others else 0.0)
