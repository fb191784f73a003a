"""Affinity: keep successive experts of a token on one rank (or node), by exact sweeps over the layers and annealing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from moesim.errors import InputError
from moesim.placement.affinity_search import ANNEALING, AffinitySearch
from moesim.placement.bounds import affinity_bound, counted_transitions
from moesim.placement.objectives.affinity import AFFINITY, kept_fraction
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.result import SolveResult, SolveStatus
from moesim.placement.solvers.lpt import lpt_row

_MEETS = 1e-12
_LONGER, _LONGEST = 4, 16  # rounds that win nothing are followed by longer ones, up to so many times the first
_ANNEAL_SHARE = 0.9  # of the time limit, after which no new round begins


def affinity(problem: PlacementProblem, *, seed: int, time_limit_s: float, starts: Sequence[PlacementPlan] = (),
             progress: Progress | None = None, node_weight: float = 0.0, num_starts: int = 4,
             anneal_moves: int = 1000) -> SolveResult:
    """Maximise the transitions that stay on their rank: ExFlow's objective, on counts instead of tokens.

    With ``v(r, s) = w [node(r) = node(s)] + (1 - w) [r = s]``, w = `node_weight`, and x[l, i, r] = 1 where
    expert i of layer l lives on rank r:

        maximise ``sum_l sum_(i, j) transitions[l, i, j] sum_(r, s) x[l, i, r] v(r, s) x[l + 1, j, s]``
        subject to one rank per expert and at most ceil(E / R) experts per rank and layer

    (Yao et al., arXiv 2401.08383, the integer program; they solve w = 1, then w = 0 inside each node; w = 1/2
    minimises `hops`.) Given its neighbours, one layer is a transportation problem, solved exactly
    (`kernels.affinity.assign`). First plans: the contiguous and LPT plans, and forward greedy passes from the first
    layer of each and from `num_starts` seeded ones; from every one, sweeps to and fro until no layer improves. Then
    rounds of annealing by swaps from the best (at first `anneal_moves` swaps per expert of a layer; hot and cool ones in
    turn), swept again; where two in succession win nothing rounds become four times as long, twice over. A local optimum: exact only where the status is
    OPTIMAL (the bound is met). The result depends on the clock only if `time_limit_s` cuts the search short
    (provenance: ``complete``).

    Redundant slots play no part in the search: afterwards each goes to the expert with the largest load per
    copy, on the lightest rank with a free slot (one without that expert, where there is one). The objective
    is that of the final plan, by expectation under its shares (`metrics.kept_transitions`).

    Args:
        starts: plans to start from; the result keeps at least as much as each of them.
        progress: told of every better plan.
        num_starts: further forward passes, from seeded first layers.
        anneal_moves: swaps per expert of a layer in the first rounds of annealing; 0: none.

    Raises:
        InputError: no transitions in the problem (a trace of counts only), or an option out of range.
    """
    started_s = time.perf_counter()
    if not 0.0 <= node_weight <= 1.0:
        raise InputError(f"affinity: node_weight must be in 0 ... 1, got {node_weight}")
    for name, value in (("num_starts", num_starts), ("anneal_moves", anneal_moves)):
        if value < 0:
            raise InputError(f"affinity: {name} must not be negative, got {value}")
    run = _Run(problem, node_weight, started_s + time_limit_s, progress)
    for plan in starts:
        run.offer_plan(plan)
    complete = run.sweeps(starts, seed, num_starts)
    if anneal_moves and not run.met():
        complete = run.anneals(anneal_moves, seed, started_s + _ANNEAL_SHARE * time_limit_s) and complete
    return run.result(seed, started_s, complete)


def _objective_name(node_weight: float) -> str:
    if node_weight == 0.0:
        return AFFINITY.unit
    return f"transitions kept: {node_weight:g} x fraction on the node + {1 - node_weight:g} x on the rank"


class _Run:
    """One search: the best homes and the best plan so far."""

    def __init__(self, problem: PlacementProblem, node_weight: float, until_s: float,
                 progress: Progress | None) -> None:
        self.problem, self.transitions = problem, counted_transitions(problem)
        self.node_weight, self.until_s, self.progress = node_weight, until_s, progress
        if progress is not None:
            progress.sense = "max"
        self.search = AffinitySearch(problem, self.transitions, node_weight)
        self.homes: np.ndarray | None = None
        self.homes_kept = -1.0
        self.plan: PlacementPlan | None = None
        self.kept = -1.0

    def offer_plan(self, plan: PlacementPlan) -> None:
        """Score a plan with the exact objective; keep it if it is the best."""
        kept = kept_fraction(self.problem, plan, self.node_weight)
        if kept > self.kept:
            self.plan, self.kept = plan, kept
            if self.progress is not None:
                self.progress.found(plan.physical_to_logical, kept)

    def offer(self, homes: np.ndarray) -> bool:
        """Keep homes if they are the best; return whether they are."""
        kept = self.search.value(homes)
        if kept <= self.homes_kept * (1 + _MEETS):
            return False
        self.homes, self.homes_kept = homes.copy(), kept
        rows = [_fill(self.problem, load, home[:self.problem.num_experts])
                for load, home in zip(self.problem.expert_load, homes, strict=True)]
        self.offer_plan(PlacementPlan(np.stack(rows), self.problem.num_ranks, self.problem.num_experts))
        return True

    @cached_property
    def bound(self) -> float:
        """The b-matching bound, computed once there is a plan."""
        weights = {"node": self.node_weight, "rank": 1.0 - self.node_weight}
        bound = sum(weight * affinity_bound(self.problem, scope) for scope, weight in weights.items() if weight)
        if self.progress is not None:
            self.progress.proved(bound)
        return bound

    def met(self) -> bool:
        """Whether the best plan reaches the bound."""
        return self.kept >= self.bound - _MEETS

    def sweeps(self, starts: Sequence[PlacementPlan], seed: int, num_starts: int) -> bool:
        """Sweep from every start; return whether the time sufficed for all of them."""
        for homes in self._starts(starts, np.random.default_rng(seed), num_starts):
            complete = self.search.sweep(homes, self.until_s)
            self.offer(homes)
            if not complete or self.met():
                return complete
        return True

    def _starts(self, plans: Sequence[PlacementPlan], rng: np.random.Generator,
                num_starts: int) -> Iterator[np.ndarray]:
        """Yield homes to sweep from: forward greedy passes, whole plans, further passes."""
        search, loads = self.search, self.problem.expert_load
        block = np.tile(search.block(), (len(loads), 1))
        balanced = np.stack([self._lpt_homes(load) for load in loads])
        yield search.forward(block[0])
        yield search.forward(balanced[0])
        yield from (homes for plan in plans if (homes := search.homes_of(plan.physical_to_logical)) is not None)
        yield block
        yield balanced
        for _ in range(num_starts):
            yield search.forward(rng.permutation(block[0]))

    def _lpt_homes(self, load: np.ndarray) -> np.ndarray:
        # Empty places are dummy experts of no load, so that LPT packs as many places on every rank.
        places = len(self.search.block())
        row = lpt_row(np.concatenate([load, np.zeros(places - len(load))]), places, self.problem.num_ranks)
        return np.argsort(row) // self.search.capacity

    def anneals(self, moves: int, seed: int, last_s: float) -> bool:
        """Anneal and sweep from the best homes, again and again; return whether the time sufficed."""
        assert self.homes is not None
        idle, turn, size = 0, 0, self.homes.size * moves
        while idle < len(ANNEALING) or size < self.homes.size * moves * _LONGEST:
            if idle == len(ANNEALING):
                idle, size = 0, size * _LONGER
            hot, cold = ANNEALING[turn % len(ANNEALING)]
            homes = self.homes.copy()
            complete = self.search.anneal(homes, size, seed * 7919 + turn, last_s, hot=hot, cold=cold)
            complete = self.search.sweep(homes, self.until_s) and complete
            idle = 0 if self.offer(homes) and self.homes_kept > 0 else idle + 1
            if self.met():
                return True
            if not complete:
                return False
            turn += 1
        return True

    def result(self, seed: int, started_s: float, complete: bool) -> SolveResult:
        """Return the best plan with its status and the b-matching bound."""
        assert self.plan is not None  # the first pass always offers one
        plan = PlacementPlan(self.plan.physical_to_logical, self.plan.num_ranks, self.plan.num_experts,
                             {"complete": complete}, self.plan.slot_share)
        return SolveResult(
            solver="affinity", status=SolveStatus.OPTIMAL if self.met() else SolveStatus.FEASIBLE, plan=plan,
            objective_name=_objective_name(self.node_weight), objective=self.kept,
            objective_bound=max(self.bound, self.kept), time_s=time.perf_counter() - started_s, seed=seed, sense="max",
            bound_method="b-matching")


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
