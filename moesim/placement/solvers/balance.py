"""Balance: copies and their ranks searched together, layer by layer; never above EPLB."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, unknown
from moesim.placement.balance_result import balance_result, step_loads, step_maxima, steps_result
from moesim.placement.bounds.balance import balance_bound
from moesim.placement.metrics import rank_load
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.result import SolveResult
from moesim.placement.solvers.eplb import eplb
from moesim.placement.solvers.sglang import sglang_slots
from moesim.placement.split import static_split

OVER = ("mean", "steps")
SPLITS = ("even", "optimal")
# copies go to the largest load^power / copies; 1 first, since it usually suffices
_POWERS = (1.0, *(0.6 + 0.05 * k for k in range(21) if k != 8))
_CLOSE = 0.5  # the search aims at this part of `gap` above the bound
_ROUNDS = 1000  # tabu rounds between two looks at the clock, about 5 ms
_TENURE = 10
_RECOUNTS, _HOT = 4.0, 0.05  # per slot; of the bound. Few slots need more of both
_TRIES, _STEP_WORK = 2000, 100_000_000  # moves of one descent over steps, at most 0.3 s


@dataclass(frozen=True)
class _Search:
    """What the layers of one search share."""

    num_ranks: int
    num_slots: int
    gap: float
    rounds: int
    seed: int
    ends_s: float
    stop: threading.Event

    @property
    def over(self) -> bool:
        """Whether the search must end now."""
        return self.stop.is_set() or time.perf_counter() >= self.ends_s


def balance(problem: PlacementProblem, *, seed: int, time_limit_s: float, over: str = "mean", split: str = "even",
            gap: float = 0.0009, rounds: int = 12_000, threads: int = 2, starts: Sequence[PlacementPlan] = (),
            progress: Progress | None = None) -> SolveResult:
    """Minimise ``sum_l max_r sum_(slots s of r) load[l, e(s)] / copies[l, e(s)]`` by search; never above EPLB.

    Per layer, ending as soon as the largest rank load is within `gap` of its proven bound:

    1. greedy starts: copies to the largest ``load^power / copies`` for 21 powers (1 is EPLB's rule), heaviest first
       to the lightest rank; then swaps with the busiest rank while they help;
    2. tabu search over swaps and changes of copies from the best starts, on the squared excess above the bound;
    3. annealing and tabu search again from the best layer.

    No rank gets two copies of one expert where that can be avoided: the second would be a wasted slot. The result
    takes each layer from the best of the search, EPLB's plan and `starts`, scored by the same function, so it is never
    worse than any of them.

    Args:
        problem: the problem; constraints are left to the caller (`placement.repair`).
        seed: of the search.
        time_limit_s: wall clock; what is not reached then keeps its start.
        over: ``mean`` (the loads summed) or ``steps``: the sum over the steps of `problem.steps` of the largest rank
            load of each step, which is what a run of the steps waits for.
        split: ``even``, or ``optimal``: shares of replicas that minimise the largest rank load of each layer.
        gap: relative distance to the bound at which a layer is good enough; 0 searches on.
        rounds: tabu rounds per layer at most.
        threads: layers searched at a time.
        starts: plans to start from.
        progress: told of every layer.

    Raises:
        InputError: an unknown option value, a gap or count out of range, or `over` steps without steps.
    """
    started_s = time.perf_counter()
    _check_options(problem, over, split, gap, rounds, threads)
    search = _Search(problem.num_ranks, problem.num_slots, gap, rounds, seed, started_s + time_limit_s,
                     threading.Event())
    base = eplb(problem, seed=seed, time_limit_s=time_limit_s).plan
    assert base is not None
    if over == "steps":
        return _over_steps(problem, search, [base, *starts], started_s, progress)
    slots = _searched(problem, search, base, threads, progress)
    plans = [PlacementPlan(slots, problem.num_ranks, problem.num_experts), base, *starts]
    chosen, shares = _best_layers(plans, np.stack([rank_load(plan, problem.expert_load).max(axis=1)
                                                   for plan in plans]))
    if split == "optimal":
        plan = static_split(PlacementPlan(chosen, problem.num_ranks, problem.num_experts), problem.expert_load)
        shares = plan.slot_share
    return balance_result(problem, chosen, solver="balance", seed=seed, started_s=started_s, slot_share=shares)


def _check_options(problem: PlacementProblem, over: str, split: str, gap: float, rounds: int, threads: int) -> None:
    if over not in OVER:
        raise unknown("balance option over", over, OVER)
    if split not in SPLITS:
        raise unknown("balance option split", split, SPLITS)
    if not 0 <= gap < 1 or rounds < 0 or threads < 1:
        raise InputError(f"balance: needs 0 <= gap < 1, rounds >= 0 and threads >= 1, got {gap}, {rounds}, {threads}")
    if over == "steps" and problem.steps is None:
        raise InputError("balance: over 'steps' needs token sets step by step (a trace, not counts); use over 'mean'")
    if over == "steps" and split == "optimal":
        raise InputError("balance: split 'optimal' belongs to over 'mean'; over 'steps' splits evenly")


def _searched(problem: PlacementProblem, search: _Search, base: PlacementPlan, threads: int,
              progress: Progress | None) -> np.ndarray:
    """Return int32[layer, slot], every layer searched; a layer that the clock cut off keeps its slots in `base`."""
    slots, bounds = np.array(base.physical_to_logical), balance_bound(problem)
    largest = rank_load(base, problem.expert_load).max(axis=1)
    _warm()
    with ThreadPoolExecutor(threads) as pool:
        done = pool.map(lambda layer: _layer(problem.expert_load[layer].copy(), float(bounds[layer]), slots[layer].copy(), search,
                                             layer), range(problem.num_layers))
        try:
            for layer, (row, value) in enumerate(done):
                if value <= largest[layer]:
                    slots[layer], largest[layer] = row, value
                if progress is not None:
                    progress.found(slots, float(largest.sum()))
        except BaseException:
            search.stop.set()  # so that an interrupt is not held up
            raise
    return slots


def _warm() -> None:
    """Load every kernel before the threads start, with the types of all later calls: one compiled form each."""
    search = _Search(2, 4, 0.0, 8, 0, np.inf, threading.Event())
    for _ in _candidates(np.array([3.0, 2.0, 1.0]), 1.0, search, 0):
        pass


def _layer(load: np.ndarray, bound: float, base: np.ndarray, search: _Search, layer: int) -> tuple[np.ndarray, float]:
    """Return the best slots found for one layer and their largest rank load."""
    from moesim.placement.kernels import balance as kernels

    if search.num_slots == search.num_ranks or search.over or bound <= 0:
        return base, kernels.exact_maximum(load, base, search.num_ranks)
    best, value = base, np.inf
    for row, found in _candidates(load, bound, search, search.seed * 1009 + layer):
        if found < value:
            best, value = row, found
        if value <= bound * (1 + search.gap) or search.over:
            break
    return best, value


def _candidates(load: np.ndarray, bound: float, search: _Search, seed: int) -> Iterator[tuple[np.ndarray, float]]:
    """Yield int32[slot] and its largest rank load, one attempt after another."""
    from moesim.placement.kernels import balance as kernels
    from moesim.placement.kernels import balance_search as searching

    target = bound * (1 + _CLOSE * search.gap)
    found = []
    for power in _POWERS:
        row = kernels.greedy(load, search.num_slots, search.num_ranks, power)
        kernels.part_duplicates(load, row, search.num_ranks)
        value = kernels.swap_descent(load, row, search.num_ranks, target)
        found.append((value, power, row))
        yield row, value
    found.sort(key=lambda one: one[:2])
    quarter = search.rounds // 4
    for _, _, row in found[:3]:
        yield from _tabu(load, row.copy(), bound, search, quarter // 2, seed)
    for attempt in range(3):
        row, hot = found[attempt][2].copy(), max(_HOT, 2.0 / search.num_slots) * bound
        searching.anneal(load, row, search.num_ranks, bound * (1 + 0.9 * search.gap), hot**2, (hot / 50) ** 2,
                       30 * search.rounds, 0.6, seed + attempt)
        yield from _tabu(load, row, bound, search, quarter, seed + attempt)


def _tabu(load: np.ndarray, row: np.ndarray, bound: float, search: _Search, rounds: int, seed: int,
          ) -> Iterator[tuple[np.ndarray, float]]:
    from moesim.placement.kernels import balance as kernels
    from moesim.placement.kernels import balance_search as searching

    recounts = min(0.3, _RECOUNTS / search.num_slots) if search.num_slots > len(load) else 0.0
    for start in range(0, rounds, _ROUNDS):
        searching.tabu(load, row, search.num_ranks, bound * (1 + 0.9 * search.gap), min(_ROUNDS, rounds - start),
                     _TENURE, recounts, seed + start)
        yield row.copy(), kernels.exact_maximum(load, row, search.num_ranks)


def _best_layers(plans: Sequence[PlacementPlan], largest: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the slots and shares that take each layer from the plan with the lowest of float64[plan, layer]."""
    winner = largest.argmin(axis=0)
    layers = np.arange(largest.shape[1])
    slots = np.stack([plan.physical_to_logical for plan in plans])[winner, layers]
    if all(plans[index].slot_share is None for index in set(winner.tolist())):
        return slots, None
    return slots, np.stack([plan.share for plan in plans])[winner, layers]


def _over_steps(problem: PlacementProblem, search: _Search, plans: Sequence[PlacementPlan], started_s: float,
                progress: Progress | None) -> SolveResult:
    """Descend from the best of the plans and the mean's search, layer by layer, on the sum of the steps' maxima."""
    from moesim.placement.kernels import balance_search as searching

    loads = step_loads(problem)
    sizes = (problem.num_ranks, problem.num_experts)
    plans = [PlacementPlan(_searched(problem, search, plans[0], 1, None), *sizes),
             PlacementPlan(sglang_slots(problem, loads), *sizes), *plans]
    value = np.stack([step_maxima(plan, loads) for plan in plans])
    slots = np.array(_best_layers(plans, value)[0], np.int32)
    tries = min(_TRIES, 1 + _STEP_WORK // (loads[0].shape[0] * problem.num_slots))
    for chunk in range(search.rounds // 500):
        for layer in range(problem.num_layers):
            if not search.over:
                searching.step_descent(loads[layer], slots[layer], problem.num_ranks, tries, 0.2,
                                     search.seed * 1009 + layer + chunk * 100_003)
        if progress is not None:
            progress.found(slots, float(step_maxima(PlacementPlan(slots, *sizes), loads).sum()))
    plans = [PlacementPlan(slots, *sizes), *plans]
    chosen, shares = _best_layers(plans, np.stack([step_maxima(plan, loads) for plan in plans]))
    return steps_result(problem, chosen, loads, solver="balance", seed=search.seed, started_s=started_s,
                        slot_share=shares)
