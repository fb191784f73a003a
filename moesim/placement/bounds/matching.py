"""The b-matching bound on kept transitions: one minimum-cost flow per pair of layers."""

from __future__ import annotations

import numpy as np

from moesim.errors import InputError, SolverError, unknown
from moesim.placement.problem import PlacementProblem

SCOPES = ("rank", "node")
_COST_MAX = 2**40  # min-cost flow multiplies costs by the number of nodes, within int64


def affinity_bound(problem: PlacementProblem, scope: str = "rank") -> float:
    """Return a proven upper bound on the fraction of transitions that any plan keeps on a rank (node).

    Whatever the plan, the co-location matrix of two neighbouring layers has entries in 0 ... 1, and rows
    and columns that sum to the slots c of a rank (node), or with redundant slots to at most c: replicas
    split evenly, ``sum_j sum_r a[i, r] a'[j, r] <= sum_r a[i, r] c = c``. The best such matrix is a
    b-matching, a minimum-cost flow per layer pair; their sum is the LP bound of the tightened ExFlow program.

    Raises:
        InputError: the problem has no transitions, or none was counted.
        SolverError: the flow solver failed.
    """
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    transitions = counted_transitions(problem)
    ranks = 1 if scope == "rank" else problem.ranks_per_node
    capacity = min(problem.num_experts, ranks * problem.slots_per_rank)
    perfect = problem.num_slots == problem.num_experts
    kept = sum(_b_matching(counts, capacity, perfect) for counts in transitions)
    return min(1.0, kept / float(transitions.sum()))


def counted_transitions(problem: PlacementProblem) -> np.ndarray:
    """Return the problem's transitions as float64; raises InputError, saying why, without any."""
    if problem.transitions is None:
        raise InputError("placement: this needs transitions between layers, but the problem holds counts "
                         "only (a trace without token identity); use a balance solver: lpt, eplb or ilp")
    transitions = np.asarray(problem.transitions, np.float64)
    if not np.all(np.isfinite(transitions)) or (transitions.size and transitions.min() < 0):
        raise InputError("placement: transitions must be finite and not negative")
    if not transitions.sum() > 0:
        raise InputError("placement: no transition was counted (one MoE layer, or an empty trace)")
    return transitions


def _b_matching(counts: np.ndarray, capacity: int, perfect: bool) -> float:
    """Return the largest ``sum counts * X`` over X in {0, 1} with `capacity` ones per row and column.

    Exactly so many where `perfect`, else at most: rows and columns then also meet at a node in between, at
    no cost.
    Counts that are not whole are scaled and rounded up, so that the value stays an upper bound.
    """
    from ortools.graph.python import min_cost_flow

    size = len(counts)
    top = float(counts.max())
    if top <= 0:
        return 0.0
    whole = bool(np.all(counts == np.floor(counts))) and top < _COST_MAX
    scale = 1.0 if whole else _COST_MAX / top
    value = np.ceil(counts * scale).astype(np.int64).ravel()
    row, column = np.divmod(np.arange(size * size), size)
    flow = min_cost_flow.SimpleMinCostFlow()
    flow.add_arcs_with_capacity_and_unit_cost(row, column + size, np.ones_like(value), -value)
    nodes = np.arange(2 * size)
    if not perfect:
        between, full = np.full(size, 2 * size), np.full(size, capacity)
        flow.add_arcs_with_capacity_and_unit_cost(nodes[:size], between, full, 0 * full)
        flow.add_arcs_with_capacity_and_unit_cost(between, nodes[size:], full, 0 * full)
    flow.set_nodes_supplies(nodes, np.where(nodes < size, capacity, -capacity))
    status = flow.solve()
    if status != flow.OPTIMAL:
        raise SolverError(f"affinity bound: the minimum-cost flow ended with status {status.name}")
    return -flow.optimal_cost() / scale
