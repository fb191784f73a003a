"""DeepSeek's expert-parallel load balancer (EPLB): replicate the heavy experts, pack in greedy order."""

from __future__ import annotations

import time

import numpy as np

from moesim.errors import InputError, unknown
from moesim.placement.balance_result import balance_result
from moesim.placement.bounds import copies_by_load
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult
from moesim.placement.solvers.lpt import pack

POLICIES = ("auto", "hierarchical", "global")


def eplb(problem: PlacementProblem, *, seed: int, time_limit_s: float, policy: str = "auto") -> SolveResult:
    """Place as EPLB does (github.com/deepseek-ai/EPLB, README "The Algorithm"; MIT), slot for slot.

    Minimises ``sum_l max_r sum_(slots s of r) load[l, e(s)] / copies[l, e(s)]`` by three greedies:

    1. pack the expert groups onto nodes, heaviest first, the same number to each;
    2. inside each node give every redundant slot to the largest load per copy;
    3. pack the copies onto the node's ranks, heaviest first, the same number to each.

    `policy` ``hierarchical`` needs groups that divide over the nodes (group-limited routing, prefill);
    ``global`` takes all as one group on one node (decode); ``auto`` is hierarchical exactly where the groups
    divide. Deterministic: `seed` changes nothing. Complexity O(slots log slots) per layer. Exact where the
    status is OPTIMAL. Two copies of one expert may share a rank (`metrics.duplicates_on_rank`).

    Raises:
        InputError: an unknown policy, or groups that do not divide.
    """
    started_s = time.perf_counter()
    num_groups, num_nodes = levels(problem, policy)
    slots = np.stack([_eplb_row(load, problem, num_groups, num_nodes) for load in problem.expert_load])
    return balance_result(problem, slots, solver="eplb", seed=seed, started_s=started_s)


def levels(problem: PlacementProblem, policy: str) -> tuple[int, int]:
    """Return the groups and nodes to plan with; (1, 1) is the global policy."""
    if policy not in POLICIES:
        raise unknown("eplb policy", policy, POLICIES)
    divides = problem.num_groups % problem.num_nodes == 0
    if policy == "hierarchical" and not divides:
        raise InputError(f"eplb: policy 'hierarchical' needs groups that divide over the nodes, but "
                         f"{problem.num_groups} groups do not divide over {problem.num_nodes} nodes; "
                         "use policy 'global' or 'auto'")
    if policy == "global" or not divides:
        return 1, 1
    if problem.num_groups < 1 or problem.num_experts % problem.num_groups:
        raise InputError(f"eplb: {problem.num_experts} experts do not divide into {problem.num_groups} "
                         "groups; correct num_groups or use policy 'global'")
    return problem.num_groups, problem.num_nodes


def _eplb_row(load: np.ndarray, problem: PlacementProblem, num_groups: int, num_nodes: int) -> np.ndarray:
    """Return int64[slot], the expert in each slot of one layer."""
    groups = np.arange(len(load)).reshape(num_groups, -1)
    order = pack(load[groups].sum(axis=1), num_nodes)
    node_slots, node_ranks = problem.num_slots // num_nodes, problem.num_ranks // num_nodes
    return np.concatenate([_node_row(load, groups[chosen].ravel(), node_slots, node_ranks)
                           for chosen in order.reshape(num_nodes, -1)])


def _node_row(load: np.ndarray, experts: np.ndarray, num_slots: int, num_ranks: int) -> np.ndarray:
    """Return int64[slot], the copies of a node's `experts` packed onto its ranks."""
    copies, given = copies_by_load(load[experts], num_slots)
    items = np.concatenate([np.arange(len(experts)), np.array(given, np.int64)])
    return experts[items][pack((load[experts] / copies)[items], num_ranks)]
