"""Provers of affinity and hops: b-matching at once, then the chain SDP while time is left."""

from __future__ import annotations

import os
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from moesim.placement.affinity_search import ANNEALING, AffinitySearch
from moesim.placement.bounds.chain_sdp_iterate import ChainSDP
from moesim.placement.bounds.chain_sdp_proof import prove_level
from moesim.placement.bounds.matching import counted_transitions, matching_potentials, matching_shape
from moesim.placement.certificate import Certificate
from moesim.placement.objectives.affinity import kept_fraction
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress

_MATCHING, _SDP = "b-matching", "chain SDP"
_EIGH_S = 1.6e-10  # seconds per n^3 of one symmetric eigenproblem, one core: only to guess what fits the time
_PROOF = 5  # a proof costs about as much as so many iterations
_FIRST = 20  # iterations before the first proof; later ones after twice as many each
_CUTS_UP_TO_EXPERTS, _CUTS_UP_TO_CAPACITY = 128, 4  # beyond both, cuts win less than the time they take
_CUTS_PER_PAIR = 3000
_CUTS_FROM, _CUTS_EVERY = 20, 10
_ANNEAL_UP_TO, _MOVES = 4096, 1000  # experts of all layers, and swaps for each, of the annealing after a rounding
_CONVERGED = 2.0**-14
_MET = 2.0**-40


def prove_affinity(problem: PlacementProblem, *, seed: int, time_limit_s: float, node_weight: float = 0.0,
                   incumbent: PlacementPlan | None = None, progress: Progress | None = None) -> Certificate:
    """Return a certified upper bound on ``w kept on the node + (1 - w) kept on the rank`` (w: `node_weight`).

    The b-matching bound comes first (`matching`), then, with one slot per expert, the chain SDP
    (`chain_sdp_iterate`), level by level; the sum of the levels' bounds, weighted, is the bound. Where `progress`
    listens, the relaxed matrices are rounded to plans (sweeps on them, then on the counts) that it is told of.

    Args:
        seed: not used: the method draws nothing.
        time_limit_s: seconds; the b-matching bound comes however little is given.
        incumbent: a plan; the search for a bound ends when its value is met.

    Raises:
        InputError: the problem has no transitions, or none was counted.
    """
    return _prove(problem, "affinity", node_weight, time_limit_s, incumbent, progress)


def prove_hops(problem: PlacementProblem, *, seed: int, time_limit_s: float, incumbent: PlacementPlan | None = None,
               progress: Progress | None = None) -> Certificate:
    """Return a certified lower bound on the mean hops of a transition: ``2 - 2 (node + rank kept) / 2``.

    See `prove_affinity`.
    """
    return _prove(problem, "hops", 0.5, time_limit_s, incumbent, progress)


def _prove(problem: PlacementProblem, objective: str, node_weight: float, time_limit_s: float,
           incumbent: PlacementPlan | None, progress: Progress | None) -> Certificate:
    until_s = time.perf_counter() + time_limit_s
    proof = _Proof(problem, objective, node_weight, incumbent, progress)
    proof.match()
    if problem.num_slots == problem.num_experts and not proof.met():
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(_cores()) as pool:
            proof.relax(until_s, pool)
    return proof.certificate()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Proof:
    """The best bound of each level (rank, node) so far, in transitions, with its arrays."""

    def __init__(self, problem: PlacementProblem, objective: str, node_weight: float,
                 incumbent: PlacementPlan | None, progress: Progress | None) -> None:
        self.problem, self.objective, self.progress = problem, objective, progress
        self.node_weight = node_weight
        self.counts = counted_transitions(problem)
        self.total = float(self.counts.sum())
        self.weights = {name: weight for name, weight in (("rank", 1.0 - node_weight), ("node", node_weight)) if weight}
        self.bounds: dict[str, float] = {}
        self.arrays: dict[str, dict[str, np.ndarray]] = {}
        self.methods: dict[str, str] = {}
        self.kept = -1.0 if incumbent is None else kept_fraction(problem, incumbent, node_weight)
        self.search = AffinitySearch(problem, self.counts, node_weight) if progress is not None else None

    def match(self) -> None:
        """Prove every level by b-matching."""
        for level in self.weights:
            capacity, _ = matching_shape(self.problem, level)
            rows, columns = matching_potentials(self.problem, level)
            over = np.maximum(self.counts - rows[:, :, None] - columns[:, None, :], 0.0)
            value = capacity * float(rows.sum() + columns.sum()) + float(over.sum())
            self._offer(level, min(value, self.total), _MATCHING, {"rows": rows, "columns": columns})
        self._tell()

    def _offer(self, level: str, bound: float, method: str, arrays: dict[str, np.ndarray]) -> bool:
        """Keep a level's bound if it is the tightest; return whether it won a noticeable part."""
        old = self.bounds.get(level, np.inf)
        if bound < old:
            self.bounds[level], self.methods[level], self.arrays[level] = bound, method, arrays
        return bound < old * (1 - _CONVERGED)

    def kept_bound(self) -> float:
        """Return the bound on the weighted fraction kept."""
        return min(1.0, sum(weight * self.bounds[level] for level, weight in self.weights.items()) / self.total)

    def value(self, kept: float) -> float:
        """Return the objective's value of a weighted fraction kept."""
        return kept if self.objective == "affinity" else 2.0 - 2.0 * kept

    def met(self) -> bool:
        """Whether the best known plan reaches the bound."""
        return self.kept >= self.kept_bound() - _MET

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress.proved(self.value(self.kept_bound()))

    def relax(self, until_s: float, pool: Executor) -> None:
        """Run the chain SDP of every level in an even share of the time."""
        levels = [level for level in self.weights if self._capacity(level) < self.problem.num_experts]
        size, pairs = self.problem.num_experts, len(self.counts)
        guess_s = pairs * _EIGH_S * (2 * size) ** 3
        for place, level in enumerate(levels):
            now_s = time.perf_counter()
            share_s = (until_s - now_s) / (len(levels) - place)
            if share_s > (_FIRST + _PROOF) * guess_s:
                self._relax_level(level, now_s + share_s, pool)

    def _capacity(self, level: str) -> int:
        return matching_shape(self.problem, level)[0]

    def _relax_level(self, level: str, until_s: float, pool: Executor) -> None:
        size = self.problem.num_experts
        capacity = self._capacity(level)
        cuts = _CUTS_PER_PAIR if size <= _CUTS_UP_TO_EXPERTS or capacity <= _CUTS_UP_TO_CAPACITY else 0
        sdp = ChainSDP(self.counts, capacity, pool, cuts_per_pair=cuts)
        following, improving, proof_s = _FIRST, True, 0.0
        while improving and not self.met():
            before_s = time.perf_counter()
            if cuts and sdp.rounds >= _CUTS_FROM and sdp.rounds % _CUTS_EVERY == 0:
                sdp.find_cuts()
            sdp.iterate()
            after_s = time.perf_counter()
            round_s = after_s - before_s
            ends = sdp.rounds > 1 and after_s + 1.5 * round_s + max(proof_s, _PROOF * round_s) > until_s
            if sdp.rounds == following or ends:
                improving = self._prove_level(level, sdp) or sdp.rounds < 2 * _FIRST
                self._round(sdp)
                proof_s = time.perf_counter() - after_s
                following *= 2
            if ends:
                return

    def _prove_level(self, level: str, sdp: ChainSDP) -> bool:
        bound, arrays = prove_level(sdp, self.counts)
        improving = self._offer(level, bound, _SDP, arrays)
        self._tell()
        return improving

    def _round(self, sdp: ChainSDP) -> None:
        """Make a plan of the relaxed matrices: sweeps on them, then on the counts; tell of it."""
        if self.search is None or self.progress is None:
            return
        homes = self.search.round(sdp.cross)
        self._found(homes)
        if homes.size <= _ANNEAL_UP_TO:
            for hot, cold in ANNEALING:
                annealed = homes.copy()
                self.search.anneal(annealed, _MOVES * homes.size, sdp.rounds, float("inf"), hot=hot, cold=cold)
                self.search.sweep(annealed, float("inf"))
                self._found(annealed)

    def _found(self, homes: np.ndarray) -> None:
        assert self.search is not None
        assert self.progress is not None
        slots = self.search.slots_of(homes)
        plan = PlacementPlan(slots, self.problem.num_ranks, self.problem.num_experts)
        kept = kept_fraction(self.problem, plan, self.node_weight)
        self.kept = max(self.kept, kept)
        self.progress.found(slots, self.value(kept))

    def certificate(self) -> Certificate:
        """Return the proof: arrays by ``level.name``, the method of every level in the parameters."""
        method = _SDP if _SDP in self.methods.values() else _MATCHING
        parameters: dict[str, Any] = {"node_weight": self.node_weight, "levels": dict(self.methods)}
        arrays = {f"{level}.{name}": array for level, found in self.arrays.items() for name, array in found.items()}
        return Certificate(self.objective, method, self.value(self.kept_bound()), parameters, arrays)
