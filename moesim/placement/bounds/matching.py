"""The b-matching bound on kept transitions: one minimum-cost flow per pair of layers, with its potentials."""

from __future__ import annotations

import numpy as np

from moesim.errors import InputError, SolverError, unknown
from moesim.placement.problem import PlacementProblem

SCOPES = ("rank", "node")
_COST_MAX = 2**40  # min-cost flow multiplies costs by the number of nodes, within int64
_FAR = 2**61


def affinity_bound(problem: PlacementProblem, scope: str = "rank") -> float:
    """Return a proven upper bound on the fraction of transitions that any plan keeps on a rank (node).

    Whatever the plan, the co-location matrix of two neighbouring layers has entries in 0 ... 1, and rows
    and columns that sum to the slots c of a rank (node), or with redundant slots to at most c: whatever the shares,
    ``sum_j sum_r a[i, r] a'[j, r] <= sum_r a[i, r] c = c``. The best such matrix is a
    b-matching, a minimum-cost flow per layer pair; their sum is the LP bound of the tightened ExFlow program.

    Raises:
        InputError: the problem has no transitions, or none was counted.
        SolverError: the flow solver failed.
    """
    transitions = counted_transitions(problem)
    capacity, perfect = matching_shape(problem, scope)
    kept = sum(best_matching(counts, capacity, perfect)[0] for counts in transitions)
    return min(1.0, kept / float(transitions.sum()))


def matching_shape(problem: PlacementProblem, scope: str) -> tuple[int, bool]:
    """Return the sum of a row of the co-location matrix, and whether it is exactly that or at most."""
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    ranks = 1 if scope == "rank" else problem.ranks_per_node
    return (min(problem.num_experts, ranks * problem.slots_per_rank), problem.num_slots == problem.num_experts)


def matching_potentials(problem: PlacementProblem, scope: str) -> tuple[np.ndarray, np.ndarray]:
    """Return float64[pair, expert] twice: potentials of rows and columns that prove `affinity_bound`."""
    capacity, perfect = matching_shape(problem, scope)
    found = [best_matching(counts, capacity, perfect)[1:] for counts in counted_transitions(problem)]
    return np.stack([rows for rows, _ in found]), np.stack([columns for _, columns in found])


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


def best_matching(counts: np.ndarray, capacity: int, perfect: bool, *,
                  diagonal: bool = True) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the largest ``sum counts * X`` over X in {0, 1} with `capacity` ones per row and column, and its proof.

    Exactly so many where `perfect`, else at most: rows and columns then also meet at a node in between, at
    no cost. ``diagonal=False`` keeps the diagonal of X at 0.
    Counts that are not whole are scaled and rounded up, so that the value stays an upper bound.

    Returns:
        The value, and potentials u, v float64[expert] (not negative unless `perfect`): by weak duality no X has more
        than ``capacity (sum u + sum v) + sum max(0, counts - u - v)``, which is the value (up to the scaling).
    """
    from ortools.graph.python import min_cost_flow

    size = len(counts)
    top = float(np.abs(counts).max())
    if top <= 0 or capacity == 0:
        return 0.0, np.zeros(size), np.zeros(size)
    whole = bool(np.all(counts == np.floor(counts))) and top < _COST_MAX
    scale = 1.0 if whole else _COST_MAX / top
    value = np.ceil(counts * scale).astype(np.int64)
    row, column = np.nonzero(np.ones_like(counts) if diagonal else ~np.eye(size, dtype=bool))
    flow = min_cost_flow.SimpleMinCostFlow()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(row, column + size, np.ones_like(row), -value[row, column])
    nodes = np.arange(2 * size)
    if not perfect:
        between, full = np.full(size, 2 * size), np.full(size, capacity)
        flow.add_arcs_with_capacity_and_unit_cost(nodes[:size], between, full, 0 * full)
        flow.add_arcs_with_capacity_and_unit_cost(between, nodes[size:], full, 0 * full)
    flow.set_nodes_supplies(nodes, np.where(nodes < size, capacity, -capacity))
    status = flow.solve()
    if status != flow.OPTIMAL:
        raise SolverError(f"affinity bound: the minimum-cost flow ended with status {status.name}")
    chosen = np.zeros((size, size), bool)
    chosen[row, column] = flow.flows(arcs) > 0
    allowed = np.ones_like(chosen) if diagonal else ~np.eye(size, dtype=bool)
    rows, columns = _potentials(value, chosen, allowed, capacity, perfect)
    return -flow.optimal_cost() / scale, rows / scale, columns / scale


def _potentials(value: np.ndarray, chosen: np.ndarray, allowed: np.ndarray, capacity: int,
                perfect: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return int64[expert] twice, potentials of an optimal flow: shortest distances in its residual graph.

    Arc i -> j costs ``-value`` where X is 0, arc j -> i ``+value`` where it is 1; no cycle is negative, so the
    distances exist (Bellman-Ford), and they meet the complementary slackness conditions.
    """
    size = len(value)
    rows, columns, middle = np.zeros(size, np.int64), np.zeros(size, np.int64), np.int64(0)
    forth = np.where(~chosen & allowed, -value, _FAR)
    back = np.where(chosen, value, _FAR)
    spare_row, spare_column = capacity - chosen.sum(axis=1), capacity - chosen.sum(axis=0)
    while True:
        new_columns = np.minimum(columns, (rows[:, None] + forth).min(axis=0))
        new_rows = np.minimum(rows, (new_columns[None, :] + back).min(axis=1))
        new_middle = middle
        if not perfect:  # arcs row -> middle -> column at no cost, back where they carry flow
            onward = [new_rows[spare_row < capacity].min(initial=_FAR), new_columns[spare_column > 0].min(initial=_FAR)]
            new_middle = min(middle, *onward)
            new_rows[spare_row > 0] = np.minimum(new_rows[spare_row > 0], new_middle)
            new_columns[spare_column < capacity] = np.minimum(new_columns[spare_column < capacity], new_middle)
        same = new_middle == middle and np.array_equal(new_rows, rows) and np.array_equal(new_columns, columns)
        rows, columns, middle = new_rows, new_columns, new_middle
        if same:
            break
    if perfect:
        return rows, -columns
    return np.maximum(0, rows - middle), np.maximum(0, middle - columns)
