"""Bottleneck: annealed pair swaps on the true objective, compute plus exchange of the busiest rank and port."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moesim.errors import InputError, SolverError
from moesim.placement.bounds import counted_transitions
from moesim.placement.bounds.bottleneck import quick_bottleneck
from moesim.placement.constraints import ALL_LAYERS, Apart, Capacity
from moesim.placement.metrics import presence
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.result import SolveResult, SolveStatus
from moesim.placement.solvers.affinity import affinity
from moesim.placement.solvers.eplb import eplb
from moesim.placement.solvers.exact import exact, is_small
from moesim.placement.solvers.lpt import lpt_row

_HOT, _COLD = 0.64, 0.032  # temperatures, as parts of a layer's mean cost per item; tuned on the benchmark's instances
_MEAN_PART, _MEAN_UNTIL = 0.9, 0.9  # the blend with mean ports at the start, and when it has faded out
_LATE = 0.1  # of the time may pass (compiling, say) before the clock hastens the cooling
_CHUNK_MOVES = 20_000  # of one compiled call, some 0.1 s at most
_REBUILD = 64  # chunks after which the sums are computed afresh
_DESCENT_SHARE = 0.12  # of the time, kept for the descent at the end
_LEAST = 2.0**-40  # of the objective: what a swap must win in the descent, above rounding


def bottleneck(problem: PlacementProblem, *, seed: int, time_limit_s: float, moves: int = 60_000_000,
               starts: Sequence[PlacementPlan] = (), progress: Progress | None = None) -> SolveResult:
    """Minimise the busiest rank's compute plus the busiest port's exchange (`objectives.bottleneck`).

    MoETuner (Go and Mahajan, arXiv 2502.06643) balances loads first and assigns the groups to GPUs afterwards;
    that is a start here (`balance_then_assign`). Small layers go to `exact`. Otherwise the best of `starts`,
    balance-then-assign, EPLB (with redundant slots) and a short affinity sweep is annealed by swaps of two items of a
    layer (an item: an expert, or one copy of it with its share), at O(ranks) per swap on the true objective, blended
    at first with the mean instead of the largest port, which shows the way down where no single swap moves a maximum.
    A descent over all pairs of every layer ends it. Two threads work on the layers before and after a layer that
    rests, so that they share nothing; the result does not depend on their timing.

    Redundant slots: the number of copies and their shares stay those of the start, copies are moved like experts.
    Constraints: experts that one names, and all of a rank or node with a capacity, stay where the start has them;
    starts that break one are left out.

    Options: `moves`, the swaps tried, in all. The same seed gives the same plan unless the clock cuts that short.

    Raises:
        InputError: no transitions, no rates, or an option out of range.
        SolverError: no start keeps the constraints.
    """
    started_s = time.perf_counter()
    goal = OBJECTIVES["bottleneck"]
    goal.check(problem)
    if problem.num_layers > 1:
        counted_transitions(problem)
    if moves < 0:
        raise InputError(f"bottleneck: moves must not be negative, got {moves}")
    if is_small(problem, "bottleneck"):
        result = exact(problem, seed=seed, time_limit_s=time_limit_s, objective="bottleneck", starts=starts,
                       progress=progress)
        if result.plan is not None:
            return dataclasses.replace(result, solver="bottleneck")
    plan, value = _best_start(problem, seed, time_limit_s, starts, progress)
    if time.perf_counter() < started_s + time_limit_s and problem.num_ranks > 1:
        search = _Search(problem, plan, seed, progress)
        new = search.run(moves, started_s + time_limit_s)
        new_value = goal.value(problem, new)
        if new_value < value:
            plan, value = new, new_value
    proof = quick_bottleneck(problem)
    return SolveResult(
        solver="bottleneck", status=SolveStatus.OPTIMAL if value <= proof.bound * (1 + _LEAST) else SolveStatus.FEASIBLE,
        plan=plan, objective_name=goal.unit, objective=value, objective_bound=min(value, proof.bound),
        time_s=time.perf_counter() - started_s, seed=seed, bound_method=proof.method, certificate=proof)


def balance_then_assign(problem: PlacementProblem) -> PlacementPlan:
    """Return the two-stage plan: LPT groups of every layer, then groups to ranks, layer by layer.

    The idea of MoETuner (arXiv 2502.06643, section 4) with greedy grouping in place of its first integer program and
    one exact assignment per layer, given the layer before, in place of the second: the sum of port seconds is least.
    """
    from scipy.optimize import linear_sum_assignment

    counts = counted_transitions(problem)
    assert problem.rates is not None
    link = problem.rates.link_s(problem.num_ranks, problem.ranks_per_node)
    rows: list[np.ndarray] = []
    for layer, load in enumerate(problem.expert_load):
        groups = lpt_row(load, problem.num_slots, problem.num_ranks).reshape(problem.num_ranks, -1)
        if layer:
            before, here = (presence(_one_layer(row, problem), 0) for row in (rows[-1], groups.ravel()))
            flow = before.T @ counts[layer - 1] @ here
            _, chosen = linear_sum_assignment(link.T @ flow)
            groups = groups[chosen]
        rows.append(groups.ravel())
    return PlacementPlan(np.stack(rows), problem.num_ranks, problem.num_experts)


def _one_layer(row: np.ndarray, problem: PlacementProblem) -> PlacementPlan:
    return PlacementPlan(row[None, :], problem.num_ranks, problem.num_experts)


def _best_start(problem: PlacementProblem, seed: int, time_limit_s: float, starts: Sequence[PlacementPlan],
                progress: Progress | None) -> tuple[PlacementPlan, float]:
    """Return the best plan to start from that keeps the constraints, and its value."""
    best, value = None, math.inf
    for plan in (*starts, *_own_starts(problem, seed, time_limit_s)):
        if problem.constraints and problem.constraints.broken(plan, problem.ranks_per_node):
            continue
        new = OBJECTIVES["bottleneck"].value(problem, plan)
        if progress is not None:
            progress.found(plan.physical_to_logical, new)
        if new < value:
            best, value = plan, new
    if best is None:
        raise SolverError("bottleneck: no start keeps the constraints; give one that does (`starts`)")
    return best, value


def _own_starts(problem: PlacementProblem, seed: int, time_limit_s: float) -> Iterator[PlacementPlan]:
    if problem.num_layers > 1:
        yield balance_then_assign(problem)
    if problem.num_slots > problem.num_experts or problem.num_layers == 1:
        found = eplb(problem, seed=seed, time_limit_s=time_limit_s).plan
        assert found is not None
        yield found
    if problem.num_layers > 1 and problem.num_experts <= 64:  # larger layers: sweeps take long and overload ranks
        found = affinity(problem, seed=seed, time_limit_s=time_limit_s / 10, num_starts=0, anneal_moves=0).plan
        assert found is not None
        yield found


def _movable(problem: PlacementProblem, plan: PlacementPlan) -> np.ndarray:
    """Return bool[layer, slot]: no constraint names the slot's expert or its rank or node."""
    free = np.ones(plan.physical_to_logical.shape, bool)
    for one in problem.constraints:
        if isinstance(one, Capacity):
            width = 1 if one.scope == "rank" else problem.ranks_per_node
            free[:, plan.slot_rank // width == one.place] = False
            continue
        named = [one.first, one.second] if isinstance(one, Apart) else [one.expert]
        layers = slice(None) if one.layer == ALL_LAYERS else slice(one.layer, one.layer + 1)
        free[layers] &= ~np.isin(plan.physical_to_logical[layers], named)
    return free


class _Search:
    """Annealing from one plan. Item i of a layer is what slot i of the start holds."""

    def __init__(self, problem: PlacementProblem, plan: PlacementPlan, seed: int, progress: Progress | None) -> None:
        self.problem, self.start, self.progress = problem, plan, progress
        layers, slots, ranks = problem.num_layers, problem.num_slots, problem.num_ranks
        assert problem.rates is not None
        self.items, self.share = plan.physical_to_logical.astype(np.int64), plan.share
        self.at = np.tile(np.arange(slots), (layers, 1))
        self.home = self.at // problem.slots_per_rank
        self.rows = np.take_along_axis(problem.expert_load, self.items, axis=1) * self.share * problem.rates.row_s
        self.flow = self._flow()
        self.back = np.ascontiguousarray(self.flow.transpose(0, 2, 1))
        self.link = problem.rates.link_s(ranks, problem.ranks_per_node)
        self.movable = _movable(problem, plan)
        self.into, self.onto = np.zeros((layers, slots, ranks)), np.zeros((layers, slots, ranks))
        self.busy, self.send = np.zeros((layers, ranks)), np.zeros((layers - 1, ranks))
        self.receive = np.zeros((layers - 1, ranks))
        # one stream per thread; xorshift must not start at 0
        self.streams = [np.random.default_rng([seed, half]).integers(1, 2**63, size=1, dtype=np.uint64)
                        for half in range(2)]
        self.build()
        self.best, self.best_at = self.value(), self.at.copy()

    def _flow(self) -> np.ndarray:
        """Return float64[pair, slot, slot], tokens between items."""
        problem = self.problem
        assert problem.transitions is not None
        assert problem.rates is not None
        flow = np.empty((problem.num_layers - 1, problem.num_slots, problem.num_slots))
        for pair, counts in enumerate(problem.transitions):
            share = self.share[pair][:, None] * self.share[pair + 1][None, :] * problem.rates.pair_weight
            flow[pair] = counts[np.ix_(self.items[pair], self.items[pair + 1])] * share
        return flow

    def build(self) -> None:
        """Recompute the sums from the homes, so that rounding does not add up."""
        from moesim.placement.kernels import bottleneck as kernels

        kernels.build(self.home, self.rows, self.flow, self.link, *self.sums)

    @property
    def sums(self) -> tuple[np.ndarray, ...]:
        """The tables and sums of the kernels, in their order."""
        return self.into, self.onto, self.busy, self.send, self.receive

    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """Everything that a kernel changes or reads, in its order."""
        return self.movable, self.at, self.home, self.rows, self.flow, self.back, self.link, *self.sums

    def value(self) -> float:
        """Return the objective, seconds."""
        ports = np.maximum(self.send.max(axis=1), self.receive.max(axis=1)) if len(self.send) else np.zeros(1)
        return float(self.busy.max(axis=1).sum() + ports.sum())

    def plan(self, at: np.ndarray) -> PlacementPlan:
        """Return the plan of int64[layer, slot] items; shares that were stated move with their copies."""
        share = None if self.start.slot_share is None else np.take_along_axis(self.share, at, axis=1)
        return PlacementPlan(np.take_along_axis(self.items, at, axis=1), self.problem.num_ranks,
                             self.problem.num_experts, {}, share)

    def keep(self) -> None:
        """Remember the plan if it is the best so far."""
        value = self.value()
        if value < self.best:
            self.best, self.best_at = value, self.at.copy()
            if self.progress is not None and self.start.slot_share is None:
                self.progress.found(self.plan(self.at).physical_to_logical, value)

    def run(self, moves: int, until_s: float) -> PlacementPlan:
        """Anneal, then descend; return the best plan."""
        began_s = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            self.anneal(pool, moves, began_s, began_s + (until_s - began_s) * (1 - _DESCENT_SHARE))
            self.build()
            self.keep()
            self.descend(until_s)
        return self.plan(self.best_at)

    def anneal(self, pool: ThreadPoolExecutor, moves: int, began_s: float, until_s: float) -> None:
        """Cool down over `moves` swaps, faster where the clock demands it."""
        done, turn, chunk, scale = 0, 0, _CHUNK_MOVES, self.value() / self.home.size
        while done < moves:
            now_s = time.perf_counter()
            clock = (now_s - began_s) / max(until_s - began_s, 2.0**-20)
            part = max(done / moves, (clock - _LATE) / (1 - _LATE))
            if part >= 1:
                break
            soft = max(0.0, _MEAN_PART * (1 - part / _MEAN_UNTIL))
            self.step(pool, chunk, scale * _HOT * (_COLD / _HOT) ** part, soft, turn)
            done, turn = done + 2 * chunk, turn + 1
            if part > _MEAN_UNTIL:
                self.keep()
            if turn % _REBUILD == 0:
                self.build()

    def step(self, pool: ThreadPoolExecutor, chunk: int, temperature: float, soft: float, turn: int) -> None:
        """Try `chunk` swaps in the layers before a resting one and as many in those after it."""
        from moesim.placement.kernels import bottleneck as kernels

        layers = self.problem.num_layers
        rest = min(max(layers // 2 - 1 + turn % 3, 0), layers - 1)
        ranges = [(first, last) for first, last in ((0, rest), (rest + 1, layers)) if last > first]
        if not ranges:
            ranges = [(0, layers)]
        jobs = [pool.submit(kernels.anneal, chunk, temperature, soft, first, last, stream, *self.tables)
                for (first, last), stream in zip(ranges, self.streams, strict=False)]
        for job in jobs:
            job.result()

    def descend(self, until_s: float) -> None:
        """Take every swap that wins, layer by layer, until none does in a whole pass or the time is up."""
        from moesim.placement.kernels import bottleneck as kernels

        improved = True
        while improved:
            improved = False
            for layer in range(self.problem.num_layers):
                if time.perf_counter() > until_s:
                    return
                improved |= bool(kernels.descend(layer, _LEAST * self.best, *self.tables))
            self.build()
            self.keep()
