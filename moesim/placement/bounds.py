"""Proven bounds on what any plan can reach, and results scored against them."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.errors import InputError, SolverError, unknown
from moesim.placement.metrics import rank_load
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult, SolveStatus

BALANCE_OBJECTIVE = "sum over layers of the largest rank load, tokens"
SCOPES = ("rank", "node")
_MEETS = 1e-9  # a plan meets its bound when only rounding is between them (loads scaled to whole numbers)
_COST_MAX = 2**40  # min-cost flow multiplies costs by the number of nodes, within int64


def copies_by_load(load: Sequence[float] | np.ndarray, num_slots: int) -> tuple[np.ndarray, list[int]]:
    """Give each expert a slot and every further slot to the largest load per copy (ties: the lower id).

    This greedy minimises ``m = max_e load[e] / copies[e]``: m never rises while copies are given, so every
    expert f had a share of at least the final m before its last copy. A smaller maximum thus needs as many
    copies of every f, and one more of the expert that attains m: more slots than there are.

    Returns:
        int64[expert] copies, and the expert of each further slot in the order given.
    """
    copies = np.ones(len(load), np.int64)
    heap = [(-float(value), expert) for expert, value in enumerate(load)]
    heapq.heapify(heap)
    given = []
    for _ in range(num_slots - len(load)):
        expert = heap[0][1]
        given.append(expert)
        copies[expert] += 1
        heapq.heapreplace(heap, (-float(load[expert]) / int(copies[expert]), expert))
    return copies, given


def balance_bound(problem: PlacementProblem) -> np.ndarray:
    """Return float64[layer], proven lower bounds on the largest rank load of any plan with these slots.

    The largest of

    - the mean rank load;
    - with redundant slots: the smallest possible ``max_e load[e] / copies[e]`` over all ways to fill the
      slots, since the rank with that copy carries at least it (exact, by `copies_by_load`);
    - with exactly one slot per expert (S per rank, R ranks), for j = 0 ... S - 1: one rank holds at least
      j + 1 of the j R + 1 heaviest experts (pigeonhole), and S experts in all, so at least the j + 1
      lightest of those and the S - j - 1 lightest of the layer (j = 0: the heaviest expert). Whole
      loads have a whole largest rank load, so the mean is then rounded up.

    Complexity: O(E log E) per layer, and O(log E) per redundant slot.
    """
    return np.array([_layer_bound(load, problem) for load in problem.expert_load])


def _layer_bound(load: np.ndarray, problem: PlacementProblem) -> float:
    mean = float(load.sum()) / problem.num_ranks
    if problem.num_slots > problem.num_experts:
        copies, _ = copies_by_load(load, problem.num_slots)
        return max(mean, float(np.max(load / copies)))
    if np.all(load == np.floor(load)) and load.sum() < 2**53:
        mean = float(-(-int(load.sum()) // problem.num_ranks))
    return max(mean, _pigeonhole_bound(load, problem.num_ranks, problem.slots_per_rank))


def _pigeonhole_bound(load: np.ndarray, num_ranks: int, slots_per_rank: int) -> float:
    falling = np.sort(load)[::-1]
    rising = np.concatenate([[0.0], np.cumsum(falling[::-1])])
    return max(float(falling[j * num_ranks - j : j * num_ranks + 1].sum() + rising[slots_per_rank - j - 1])
               for j in range(slots_per_rank))


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


def balance_result(
    problem: PlacementProblem, slots: np.ndarray, *, solver: str, seed: int, started_s: float,
    layer_bound: np.ndarray | None = None, provenance: dict[str, Any] | None = None,
) -> SolveResult:
    """Return the result of a balance solver: its plan scored and set beside the proven bound.

    Args:
        problem: the problem.
        slots: int[layer, slot], the expert in each slot.
        solver, seed: for the record.
        started_s: `time.perf_counter` when the solver began.
        layer_bound: float64[layer], the solver's own proven bounds; None: `balance_bound`.
        provenance: further facts about the plan.

    The status is OPTIMAL where the plan meets the bound of every layer, else FEASIBLE.
    """
    plan = PlacementPlan(slots, problem.num_ranks, problem.num_experts, provenance or {})
    largest = rank_load(plan, problem.expert_load).max(axis=1)
    bound = balance_bound(problem) if layer_bound is None else layer_bound
    optimal = bool(np.all(largest <= bound * (1 + _MEETS)))
    return SolveResult(
        solver=solver, status=SolveStatus.OPTIMAL if optimal else SolveStatus.FEASIBLE, plan=plan,
        objective_name=BALANCE_OBJECTIVE, objective=float(largest.sum()), objective_bound=float(bound.sum()),
        time_s=time.perf_counter() - started_s, seed=seed)
