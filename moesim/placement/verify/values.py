"""Objectives from the plan's slots alone, by plain loops: what a solver claims is compared with this."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem

Parts = list[dict[int, float]]


def _parts(plan: PlacementPlan, layer: int) -> Parts:
    """Return per expert ``{rank: share of its tokens}``."""
    slots = plan.physical_to_logical[layer].tolist()
    width = len(slots) // plan.num_ranks
    found: Parts = [{} for _ in range(plan.num_experts)]
    for slot, expert in enumerate(slots):
        share = 1.0 / slots.count(expert) if plan.slot_share is None else float(plan.slot_share[layer, slot])
        rank = slot // width
        found[expert][rank] = found[expert].get(rank, 0.0) + share
    return found


def _loads(problem: PlacementProblem, plan: PlacementPlan, layer: int) -> list[float]:
    loads = [0.0] * plan.num_ranks
    for expert, parts in enumerate(_parts(plan, layer)):
        for rank, share in parts.items():
            loads[rank] += share * float(problem.expert_load[layer, expert])
    return loads


def balance(problem: PlacementProblem, plan: PlacementPlan) -> float:
    """Return the sum over layers of the largest rank load, tokens."""
    return sum(max(_loads(problem, plan, layer)) for layer in range(plan.num_layers))


def _flows(problem: PlacementProblem, plan: PlacementPlan, pair: int) -> np.ndarray:
    """float64[rank, rank], transitions that pass between ranks."""
    assert problem.transitions is not None
    before, after = _parts(plan, pair), _parts(plan, pair + 1)
    flow = np.zeros((plan.num_ranks, plan.num_ranks))
    for i, here in enumerate(before):
        counts = problem.transitions[pair, i]
        arriving = np.zeros(plan.num_ranks)
        for j in np.flatnonzero(counts).tolist():
            for rank, share in after[j].items():
                arriving[rank] += share * float(counts[j])
        for rank, share in here.items():
            flow[rank] += share * arriving
    return flow


def affinity(problem: PlacementProblem, plan: PlacementPlan) -> float:
    """Return the fraction of transitions that stay on their rank."""
    flows = [_flows(problem, plan, pair) for pair in range(plan.num_layers - 1)]
    return sum(float(np.trace(flow)) for flow in flows) / sum(float(flow.sum()) for flow in flows)


def hops(problem: PlacementProblem, plan: PlacementPlan) -> float:
    """Return the mean hops of a transition."""
    node = [rank // problem.ranks_per_node for rank in range(plan.num_ranks)]
    hop = np.array([[0 if r == s else 1 if node[r] == node[s] else 2 for s in range(plan.num_ranks)]
                    for r in range(plan.num_ranks)])
    flows = [_flows(problem, plan, pair) for pair in range(plan.num_layers - 1)]
    return sum(float((flow * hop).sum()) for flow in flows) / sum(float(flow.sum()) for flow in flows)


def bottleneck(problem: PlacementProblem, plan: PlacementPlan) -> float:
    """Return the busiest rank's compute plus the busiest port's exchange, seconds."""
    assert problem.rates is not None
    rates, total = problem.rates, 0.0
    for layer in range(plan.num_layers):
        total += rates.row_s * max(_loads(problem, plan, layer))
    for pair in range(plan.num_layers - 1):
        flow, sent, got = _flows(problem, plan, pair), [0.0] * plan.num_ranks, [0.0] * plan.num_ranks
        for r in range(plan.num_ranks):
            for s in range(plan.num_ranks):
                if r != s:
                    near = r // problem.ranks_per_node == s // problem.ranks_per_node
                    busy = float(flow[r, s]) * rates.pair_weight * (rates.node_s if near else rates.cluster_s)
                    sent[r] += busy
                    got[s] += busy
        total += max(*sent, *got)
    return total


VALUES: dict[str, Callable[[PlacementProblem, PlacementPlan], float]] = {
    "balance": balance, "affinity": affinity, "hops": hops, "bottleneck": bottleneck}
