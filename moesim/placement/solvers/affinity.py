"""Affinity: keep successive experts of a token on one rank (or node), by exact sweeps over the layers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from moesim.errors import InputError
from moesim.placement.bounds import affinity_bound, counted_transitions
from moesim.placement.metrics import kept_transitions
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult, SolveStatus
from moesim.placement.solvers.lpt import lpt_row

_MEETS = 1e-12


def affinity(problem: PlacementProblem, *, seed: int, time_limit_s: float, node_weight: float = 0.0,
             num_starts: int = 4) -> SolveResult:
    """Minimise the transitions that leave their rank: ExFlow's objective, on counts instead of tokens.

    With ``v(r, s) = w [node(r) = node(s)] + (1 - w) [r = s]``, w = `node_weight`, and x[l, i, r] = 1 where
    expert i of layer l lives on rank r:

        maximise ``sum_l sum_(i, j) transitions[l, i, j] sum_(r, s) x[l, i, r] v(r, s) x[l + 1, j, s]``
        subject to one rank per expert and at most ceil(E / R) experts per rank and layer

    (Yao et al., arXiv 2401.08383, the integer program; they solve w = 1, then w = 0 inside each node.) Given
    its neighbours, one layer is an assignment problem, solved exactly by scipy's `linear_sum_assignment`.
    Starts: the contiguous and LPT plans, and forward greedy passes from the first layer of each and from
    `num_starts` seeded ones; from every start, sweeps to and fro until no layer improves; the best is kept.
    Complexity O(L slots^3) per sweep at worst. A local optimum: exact only where the status is OPTIMAL (the
    bound is met). The result depends on the clock only if `time_limit_s` cuts the search short
    (provenance: ``complete``).

    Redundant slots play no part in the search: afterwards each goes to the expert with the largest load per
    copy, on the lightest rank with a free slot (one without that expert, where there is one). The objective
    is that of the final plan, by expectation under the even split (`metrics.kept_transitions`).

    Raises:
        InputError: no transitions in the problem (a trace of counts only), or an option out of range.
    """
    started_s = time.perf_counter()
    if not 0.0 <= node_weight <= 1.0:
        raise InputError(f"affinity: node_weight must be in 0 ... 1, got {node_weight}")
    if num_starts < 0:
        raise InputError(f"affinity: num_starts must not be negative, got {num_starts}")
    search = _Search(problem, node_weight)
    homes, complete = search.best(seed, num_starts, started_s + time_limit_s)
    rows = [_fill(problem, load, home) for load, home in zip(problem.expert_load, homes, strict=True)]
    plan = PlacementPlan(np.stack(rows), problem.num_ranks, problem.num_experts, {"complete": complete})
    weights = {"node": node_weight, "rank": 1.0 - node_weight}
    kept = kept_transitions(plan, search.transitions, problem.ranks_per_node)
    objective = 1.0 - sum(weight * kept[scope] for scope, weight in weights.items())
    bound = 1.0 - sum(weight * affinity_bound(problem, scope) for scope, weight in weights.items() if weight)
    status = SolveStatus.OPTIMAL if objective <= bound + _MEETS else SolveStatus.FEASIBLE
    return SolveResult(
        solver="affinity", status=status, plan=plan, objective_name=_objective_name(node_weight),
        objective=max(0.0, objective), objective_bound=max(0.0, bound),
        time_s=time.perf_counter() - started_s, seed=seed)


def _objective_name(node_weight: float) -> str:
    if node_weight == 0.0:
        return "fraction of transitions that leave their rank"
    return f"transitions lost: {node_weight:g} x fraction leaving the node + {1 - node_weight:g} x the rank"


class _Search:
    """Assignment sweeps over homes int64[layer, expert] -> rank."""

    def __init__(self, problem: PlacementProblem, node_weight: float) -> None:
        self.problem, self.transitions = problem, counted_transitions(problem)
        ranks = np.arange(problem.num_ranks)
        nodes = ranks // problem.ranks_per_node
        same_node, same_rank = np.equal.outer(nodes, nodes), np.equal.outer(ranks, ranks)
        self.value = node_weight * same_node + (1.0 - node_weight) * same_rank
        self.capacity = -(-problem.num_experts // problem.num_ranks)

    def best(self, seed: int, num_starts: int, until_s: float) -> tuple[np.ndarray, bool]:
        """Return the best homes over all starts, and whether the time sufficed for all of them."""
        best, best_kept, complete = None, -1.0, True
        for homes in self.starts(np.random.default_rng(seed), num_starts):
            complete = self.sweep(homes, until_s) and complete
            kept = self.kept(homes)
            if kept > best_kept:
                best, best_kept = homes, kept
            if not complete:
                break
        assert best is not None  # the contiguous start always comes
        return best, complete

    def starts(self, rng: np.random.Generator, num_starts: int) -> Iterator[np.ndarray]:
        """Yield homes to sweep from: two whole plans, then forward greedy passes."""
        num_layers, num_experts = self.problem.expert_load.shape
        block = np.tile(np.arange(num_experts) // self.capacity, (num_layers, 1))
        balanced = np.stack([self._lpt_homes(load) for load in self.problem.expert_load])
        yield self.forward(block[0])
        yield self.forward(balanced[0])
        yield block
        yield balanced
        for _ in range(num_starts):
            yield self.forward(rng.permutation(block[0]))

    def _lpt_homes(self, load: np.ndarray) -> np.ndarray:
        # Empty places are dummy experts of no load, so that LPT packs as many places on every rank.
        places = self.capacity * self.problem.num_ranks
        row = lpt_row(np.concatenate([load, np.zeros(places - len(load))]), places, self.problem.num_ranks)
        return np.argsort(row)[: len(load)] // self.capacity

    def forward(self, first: np.ndarray) -> np.ndarray:
        """Return homes grown layer by layer, each exact given the layer before."""
        homes = np.tile(first, (self.problem.num_layers, 1))
        for layer in range(1, len(homes)):
            homes[layer] = self.assign(self.gain_before(homes, layer))
        return homes

    def sweep(self, homes: np.ndarray, until_s: float) -> bool:
        """Improve `homes` in place until no layer can be; return False if the time ran out first."""
        layers = range(len(homes))
        improved = True
        while improved:
            improved = False
            for layer in (*layers, *reversed(layers)):
                if time.perf_counter() > until_s:
                    return False
                improved = self.improve(homes, layer) or improved
        return True

    def improve(self, homes: np.ndarray, layer: int) -> bool:
        """Place one layer exactly, given its neighbours; return whether that gained anything."""
        gain = self.gain_before(homes, layer) + self.gain_after(homes, layer)
        experts = np.arange(len(gain))
        new = self.assign(gain)
        old_gain = gain[experts, homes[layer]].sum()
        if gain[experts, new].sum() <= old_gain * (1 + _MEETS):
            return False
        homes[layer] = new
        return True

    def gain_before(self, homes: np.ndarray, layer: int) -> np.ndarray:
        """Return float64[expert, rank], transitions kept with the layer before."""
        if layer == 0:
            return np.zeros((self.problem.num_experts, self.problem.num_ranks))
        return self.transitions[layer - 1].T @ self.value[homes[layer - 1]]

    def gain_after(self, homes: np.ndarray, layer: int) -> np.ndarray:
        """Return float64[expert, rank], transitions kept with the layer after."""
        if layer == len(homes) - 1:
            return np.zeros((self.problem.num_experts, self.problem.num_ranks))
        return self.transitions[layer] @ self.value[homes[layer + 1]]

    def assign(self, gain: np.ndarray) -> np.ndarray:
        """Return int64[expert], ranks of the largest total gain float64[expert, rank] within the capacity."""
        from scipy.optimize import linear_sum_assignment

        _, place = linear_sum_assignment(np.repeat(gain, self.capacity, axis=1), maximize=True)
        return place // self.capacity

    def kept(self, homes: np.ndarray) -> float:
        """Return the weighted transitions that `homes` keeps."""
        pairs = zip(self.transitions, homes, homes[1:], strict=False)
        return float(sum((counts * self.value[np.ix_(here, there)]).sum() for counts, here, there in pairs))


def _fill(problem: PlacementProblem, load: np.ndarray, home: np.ndarray) -> np.ndarray:
    """Return int64[slot] of one layer: each expert on its home rank, then copies of the heavy ones."""
    held = [np.flatnonzero(home == rank).tolist() for rank in range(problem.num_ranks)]
    copies = np.ones(len(load))
    for _ in range(problem.num_slots - problem.num_experts):
        expert = int(np.argmax(load / copies))
        copies[expert] += 1
        free = [rank for rank, experts in enumerate(held) if len(experts) < problem.slots_per_rank]
        totals = {rank: sum(load[e] / copies[e] for e in held[rank]) for rank in free}
        held[min(free, key=lambda rank: (expert in held[rank], totals[rank], rank))].append(expert)
    return np.concatenate([np.array(experts, np.int64) for experts in held])
