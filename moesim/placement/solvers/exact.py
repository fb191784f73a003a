"""Exact: a shortest path over all placements of each layer, for layers small enough to list them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, permutations, product

import numpy as np

from moesim.errors import InputError, SolverError, unknown
from moesim.placement.bounds import counted_transitions
from moesim.placement.certificate import Certificate
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.result import SolveResult, SolveStatus

EXACT_OBJECTIVES = ("affinity", "hops", "bottleneck", "balance")
MAX_STATES = 8_000
MAX_WORK = 2 * 10**10  # additions and comparisons, some 20 s on one core
_MAX_WIDTH = 10  # ranks of a node: the assignments inside it are searched over 2**width subsets
_CHUNK_WORK = 2 * 10**8  # of one compiled call, a fraction of a second
_NUM_THREADS = 2


def exact(problem: PlacementProblem, *, seed: int, time_limit_s: float, objective: str = "affinity",
          starts: Sequence[PlacementPlan] = (), progress: Progress | None = None) -> SolveResult:
    """Return a plan that no plan of one home per expert beats, with the potentials that prove it.

    All four objectives are sums over layers and pairs of layers, so that the best plan is a shortest path whose
    nodes are the placements of a layer. Relabelling the ranks of a node, or whole nodes, in one layer and all later
    ones changes no cost; hence only one placement of each orbit is a state (8 experts on 4 ranks: 105 instead of
    2520), and the cost between two states is the least over the relabellings of the second: nodes in every order,
    ranks inside a node by an assignment, of least total or of least maximum. With one expert per rank on one node
    there is a single state, and each pair of layers is one assignment, whatever its size.

    Bottleneck: joining the ranks that hold group a of a layer and b of the next, with M[a, b] tokens between them,
    out of a go ``node_s`` per token to the node's other groups and ``cluster_s`` beyond: it depends on the order of
    the nodes and on b alone. The same holds for what comes to b. So the cost of the pair is the larger of the two,
    and the exchange is the largest over the assignment.

    Complexity: O(L S^2 N! N (E^2 + m 2^m)) for S states, N nodes of m ranks. Deterministic; `seed` is not used.
    When the time is up the best of `starts` is returned, or no plan (status ``unknown``). The first call of a new
    installation compiles for some seconds, or loads the compiled code in about one.

    Raises:
        InputError: an unknown objective, redundant slots, constraints, or what the objective needs is missing.
        SolverError: too many states; the message says how many.
    """
    started_s = time.perf_counter()
    _check(problem, objective)
    goal = OBJECTIVES[objective]
    search = _Search(_costs(problem, objective), started_s + time_limit_s)
    found = search.assignments() if search.single else search.path()
    candidates = list(starts)
    if found is not None:
        candidates.insert(0, PlacementPlan(np.argsort(found, axis=1, kind="stable"), problem.num_ranks,
                                           problem.num_experts))
    plan, value = None, None
    for one in candidates:
        new = goal.value(problem, one)
        if value is None or goal.better(new, value):
            plan, value = one, new
    proof = None
    if found is not None and value is not None:
        proof = search.certificate(objective)
        if goal.better(value, proof.bound):  # by the last bit: the two add in different orders
            proof = dataclasses.replace(proof, bound=value)
    if progress is not None and plan is not None and value is not None:
        progress.found(plan.physical_to_logical, value)
        if proof is not None:
            progress.proved(proof.bound)
    status = SolveStatus.OPTIMAL if proof else SolveStatus.FEASIBLE if plan else SolveStatus.UNKNOWN
    return SolveResult(
        solver="exact", status=status, plan=plan, objective_name=goal.unit, objective=value,
        objective_bound=proof.bound if proof else None, time_s=time.perf_counter() - started_s, seed=seed,
        sense=goal.sense, bound_method=proof.method if proof else "", certificate=proof)


def num_states(num_experts: int, num_ranks: int, ranks_per_node: int) -> int:
    """Return the placements of one layer, up to relabelling ranks inside nodes and whole nodes."""
    nodes = num_ranks // ranks_per_node
    same = (math.factorial(num_experts // num_ranks) ** num_ranks * math.factorial(ranks_per_node) ** nodes
            * math.factorial(nodes))
    return math.factorial(num_experts) // same


def is_small(problem: PlacementProblem, objective: str) -> bool:
    """Return whether `exact` takes the problem (sizes only; constraints and redundant slots it never takes)."""
    if problem.num_slots != problem.num_experts or problem.constraints:
        return False
    width = _width(problem, objective)
    if width == problem.num_ranks == problem.num_experts:
        return True
    states = num_states(problem.num_experts, problem.num_ranks, width)
    return states <= MAX_STATES and width <= _MAX_WIDTH and _work(problem, width, states) <= MAX_WORK


def _check(problem: PlacementProblem, objective: str) -> None:
    if objective not in EXACT_OBJECTIVES:
        raise unknown("exact objective", objective, EXACT_OBJECTIVES)
    OBJECTIVES[objective].check(problem)
    if objective != "balance" and problem.num_layers > 1:
        counted_transitions(problem)
    if problem.num_slots != problem.num_experts:
        raise InputError(f"exact: needs one slot per expert, got {problem.num_slots} slots for {problem.num_experts} "
                         "experts; use a search (affinity, bottleneck, balance) for redundant slots")
    if problem.constraints:
        raise InputError("exact: takes no constraints (they break the symmetry it lives on); use another solver")
    if not is_small(problem, objective):
        width = _width(problem, objective)
        states = num_states(problem.num_experts, problem.num_ranks, width)
        other = {"balance": "ilp", "bottleneck": "bottleneck"}.get(objective, "affinity")
        raise SolverError(
            f"exact: {problem.num_experts} experts on {problem.num_ranks} ranks have {states} placements per layer up "
            f"to symmetry, about {_work(problem, width, states):.1e} steps over {problem.num_layers} layers (at most "
            f"{MAX_STATES} placements and {MAX_WORK:.0e} steps); use the solver {other!r}")


def _width(problem: PlacementProblem, objective: str) -> int:
    """Return the ranks of a node, or all ranks where the objective does not know nodes."""
    return problem.num_ranks if objective in ("affinity", "balance") else problem.ranks_per_node


def _work(problem: PlacementProblem, width: int, states: int) -> int:
    nodes = problem.num_ranks // width
    each = problem.num_experts**2 + math.factorial(nodes) * nodes * width * 2**width
    return states**2 * each * max(1, problem.num_layers - 1)


@dataclass(frozen=True)
class _Costs:
    """An objective as costs: `weight` (load of a layer, one number per token), `near` and `far` per token that passes.

    `worst`: the busier port direction, and the busiest port of a pair; else the sum. `unit` turns a total cost into
    the objective's value, ``offset + unit * cost``.
    """

    load: np.ndarray
    counts: np.ndarray
    weight: float
    near: float
    far: float
    worst: bool
    width: int
    num_ranks: int
    unit: float = 1.0
    offset: float = 0.0


def _costs(problem: PlacementProblem, objective: str) -> _Costs:
    layers, experts = problem.expert_load.shape
    counts = np.zeros((layers - 1, experts, experts)) if objective == "balance" else \
        np.array(problem.transitions, np.float64)
    total = float(counts.sum()) or 1.0
    rates = problem.rates
    flat = {"balance": (1.0, 0.0, 0.0), "affinity": (0.0, 1.0, 1.0), "hops": (0.0, 1.0, 2.0)}
    if objective == "bottleneck":
        assert rates is not None
        weight, near, far = rates.row_s, rates.pair_weight * rates.node_s, rates.pair_weight * rates.cluster_s
    else:
        weight, near, far = flat[objective]
    unit, offset = {"affinity": (-1.0 / total, 1.0), "hops": (1.0 / total, 0.0)}.get(objective, (1.0, 0.0))
    return _Costs(problem.expert_load, counts, weight, near, far, objective == "bottleneck",
                  _width(problem, objective), problem.num_ranks, unit, offset)


class _Search:
    """Shortest path over states int64[state, expert] (rank ids), or one assignment per pair of layers."""

    def __init__(self, costs: _Costs, until_s: float) -> None:
        self.costs, self.until_s = costs, until_s
        self.single = costs.width == costs.num_ranks == costs.load.shape[1]
        self.arrays: dict[str, np.ndarray] = {}
        self.total = 0.0

    def certificate(self, objective: str) -> Certificate:
        """Return the proof of what `path` or `assignments` found."""
        bound = self.costs.offset + self.costs.unit * self.total
        return Certificate(objective, "assignment-duals" if self.single else "dp-potentials", bound, {}, self.arrays)

    def path(self) -> np.ndarray | None:
        """Return int64[layer, expert], the ranks of the best plan; None when the time ran out."""
        costs = self.costs
        states = np.array(list(_states(costs.load.shape[1], costs.num_ranks, costs.width)), np.int64)
        busy = np.stack([costs.weight * _largest(load, states, costs.num_ranks) for load in costs.load])
        value, parents = [busy[0]], []
        for counts, own in zip(costs.counts, busy[1:], strict=True):
            step = self._relax(counts, states, value[-1])
            if step is None:
                return None
            value.append(step[0] + own)
            parents.append(step[1])
        self.total = float(value[-1].min())
        self.arrays = {"states": states.astype(np.int16), "potential": np.stack(value)}
        chosen = [int(np.argmin(value[-1]))]
        for parent in reversed(parents):
            chosen.append(int(parent[chosen[-1]]))
        return self._labelled(states[chosen[::-1]])

    def _relax(self, counts: np.ndarray, states: np.ndarray,
               value: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return each state's least cost and the state before it; None when the time ran out."""
        from moesim.placement.kernels.exact import relax

        costs, after, parent = self.costs, np.zeros(len(states)), np.zeros(len(states), np.int64)
        if not (costs.near or costs.far):
            return after + value.min(), parent + int(np.argmin(value))
        nodes = costs.num_ranks // costs.width
        orders = np.array(list(permutations(range(nodes))), np.int64)
        held = np.eye(costs.num_ranks)[states]
        sent = np.ascontiguousarray(np.einsum("ij,pir->pjr", counts, held, optimize=True))
        each = len(states) * (states.shape[1] ** 2 + len(orders) * nodes * costs.width * 2**costs.width)
        size = max(1, min(-(-len(states) // _NUM_THREADS), _CHUNK_WORK // each))

        def work(start: int) -> bool:
            if time.perf_counter() > self.until_s:
                return False
            relax(sent, states, start, min(start + size, len(states)), value, orders, costs.near, costs.far,
                  costs.worst, costs.num_ranks, after, parent)
            return True

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            done = list(pool.map(work, range(0, len(states), size)))
        return (after, parent) if all(done) else None

    def _labelled(self, states: np.ndarray) -> np.ndarray:
        """Return int64[layer, expert]: each layer's ranks named so that the pair with the layer before costs least."""
        homes = [states[0]]
        for counts, there in zip(self.costs.counts, states[1:], strict=True):
            flow = _flow(counts, homes[-1], there, self.costs.num_ranks)
            homes.append(np.argsort(self._best_match(flow), kind="stable")[there])
        return np.stack(homes)

    def _best_match(self, flow: np.ndarray) -> np.ndarray:
        """Return int64[rank], the rank of the second state that joins each rank of the first."""
        costs, best, least = self.costs, np.arange(len(flow)), math.inf
        width = costs.width
        for order in permutations(range(len(flow) // width)):
            total, match = 0.0, np.empty(len(flow), np.int64)
            for node, other in enumerate(order):
                here = slice(node * width, (node + 1) * width)
                cost = _join_cost(flow, here, slice(other * width, (other + 1) * width), costs)
                columns, value, _ = assign(cost, costs.worst)
                match[here] = other * width + columns
                total = max(total, value) if costs.worst else total + value
            if total < least:
                best, least = match, total
        return best

    def assignments(self) -> np.ndarray:
        """Return int64[layer, expert] where every rank holds one expert: an assignment per pair of layers."""
        costs, whole = self.costs, slice(0, self.costs.num_ranks)
        homes, proofs = [np.arange(costs.num_ranks)], []
        self.total = float(costs.weight * costs.load.max(axis=1).sum())
        for counts in costs.counts:
            columns, value, proof = assign(_join_cost(counts, whole, whole, costs), costs.worst)
            home = np.empty_like(columns)
            home[columns] = homes[-1]
            homes.append(home)
            proofs.append(proof)
            self.total += value
        names = ("threshold", "rows") if costs.worst else ("row_dual", "column_dual")
        empty = np.zeros((0, costs.num_ranks))
        for index, name in enumerate(names):
            self.arrays[name] = np.array([proof[index] for proof in proofs]) if proofs else empty
        return np.stack(homes)


def _states(num_experts: int, num_ranks: int, width: int) -> Iterator[list[int]]:
    """Yield one placement (the rank of each expert) per orbit: the first free expert opens the next rank or node."""
    per_rank = num_experts // num_ranks
    for nodes in _divide(list(range(num_experts)), per_rank * width):
        for inside in product(*(list(_divide(list(node), per_rank)) for node in nodes)):
            home = [0] * num_experts
            for rank, experts in enumerate(group for node in inside for group in node):
                for expert in experts:
                    home[expert] = rank
            yield home


def _divide(free: list[int], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield every division of `free` into unordered groups of `size`."""
    if not free:
        yield []
        return
    for more in combinations(free[1:], size - 1):
        part = (free[0], *more)
        for others in _divide([one for one in free if one not in part], size):
            yield [part, *others]


def _largest(load: np.ndarray, states: np.ndarray, num_ranks: int) -> np.ndarray:
    totals = np.stack([np.where(states == rank, load, 0.0).sum(axis=1) for rank in range(num_ranks)])
    return totals.max(axis=0)


def _flow(counts: np.ndarray, here: np.ndarray, there: np.ndarray, num_ranks: int) -> np.ndarray:
    return np.eye(num_ranks)[here].T @ counts @ np.eye(num_ranks)[there]


def _join_cost(flow: np.ndarray, here: slice, there: slice, costs: _Costs) -> np.ndarray:
    """Return float64[rank of a node, rank of the other state's node], the cost of making the two one rank."""
    part = flow[here, there]
    out = costs.near * part.sum(axis=1) + costs.far * (flow[here].sum(axis=1) - part.sum(axis=1))
    coming = costs.near * part.sum(axis=0) + costs.far * (flow[:, there].sum(axis=0) - part.sum(axis=0))
    both = np.maximum(out[:, None], coming[None, :]) if costs.worst else out[:, None]
    return both - costs.near * part


def assign(cost: np.ndarray, worst: bool) -> tuple[np.ndarray, float, tuple[np.ndarray | float, np.ndarray]]:
    """Return the columns of an assignment of least total or (`worst`) least maximum, its value and the proof.

    The proof of a total: duals u[row], v[column] with ``u + v <= cost``. Of a maximum t: the rows of a Hall set,
    whose entries below t lie in fewer columns than it has rows.
    """
    from scipy.optimize import linear_sum_assignment

    if worst:
        return _assign_worst(cost)
    rows, columns = linear_sum_assignment(cost)
    value = float(cost[rows, columns].sum())
    return columns, value, _duals(cost, columns)


def _duals(cost: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return duals of an optimal assignment: shortest distances between columns (Bellman-Ford)."""
    matched = cost[np.arange(len(cost)), columns]
    column_dual = np.zeros(len(cost))
    for _ in range(len(cost)):
        lower = np.minimum(column_dual, np.min(cost + (column_dual[columns] - matched)[:, None], axis=0))
        if np.array_equal(lower, column_dual):
            break
        column_dual = lower
    return (cost - column_dual[None, :]).min(axis=1), column_dual


def _assign_worst(cost: np.ndarray) -> tuple[np.ndarray, float, tuple[float, np.ndarray]]:
    """Bottleneck assignment: the least threshold whose entries hold a perfect matching, by bisection."""
    values = np.unique(cost)
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if np.all(_matching(cost <= values[middle]) >= 0) else (middle + 1, high)
    below = cost < values[low]
    return _matching(cost <= values[low]), float(values[low]), (float(values[low]), _hall_rows(below))


def _matching(allowed: np.ndarray) -> np.ndarray:
    """Return int64[row], the column matched to each row (-1: none) in a largest matching."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    return maximum_bipartite_matching(csr_array(allowed), perm_type="column").astype(np.int64)


def _hall_rows(allowed: np.ndarray) -> np.ndarray:
    """Return bool[row]: rows reached by alternating paths from the unmatched ones; they reach too few columns."""
    match = _matching(allowed)
    reached: np.ndarray = np.less(match, 0)
    while True:
        columns = allowed[reached].any(axis=0)
        more: np.ndarray = reached | ((match >= 0) & columns[match])
        if np.array_equal(more, reached):
            return reached
        reached = more
