"""Balance: copies and their ranks searched together, layer by layer; never above EPLB."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

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
_POWERS = tuple(0.8 + 0.05 * k for k in range(11))  # copies go to the largest load^power / copies
_CLOSE = 0.5  # the search aims at this part of `gap` above the bound
_SHARE = 0.85  # of the time limit: the rest is for the end of a stage, and for scoring
_AIM, _STEP = 0.9, 0.92  # of `gap`; of the distance to the bound: what a tabu search aims at
_ROUNDS, _FAILURES = 500, 4  # of one tabu search, about 1 ms; searches without gain before a restart
_TENURE, _RECOUNTS = 5, 0.02
_FAR = 1.01  # times the bound: further off, other numbers of copies are a better start
_HOT, _ANNEAL = 0.08, 800  # of the bound; moves per slot
_TRIES, _STEP_WORK = 2000, 100_000_000  # moves of one descent over steps, at most 0.3 s


@dataclasses.dataclass(frozen=True)
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
            gap: float = 0.0009, rounds: int = 24_000, threads: int = 2, starts: Sequence[PlacementPlan] = (),
            progress: Progress | None = None) -> SolveResult:
    """Minimise ``sum_l max_r sum_(slots s of r) load[l, e(s)] / copies[l, e(s)]`` by search; never above EPLB.

    Per layer, ending as soon as the largest rank load is within `gap` of its proven bound:

    1. EPLB's copies, heaviest first to the lightest rank, copies apart; swaps with the busiest rank while they help;
       where that is over 1 % off, the best of 11 such starts that give copies to the largest ``load^power / copies``;
    2. tabu searches over swaps and changes of copies, on the squared excess above an aim that falls from the value
       reached towards the bound;
    3. the same again from layers annealed over these moves.

    All layers pass one stage before any enters the next, the worst first.

    No rank gets two copies of one expert where that can be avoided: the second would be a wasted slot. The result
    takes each layer from the best of the search, EPLB's plan and `starts`, scored by the same function, so it is never
    worse than any of them.

    Args:
        problem: the problem; constraints are left to the caller (`placement.repair`).
        seed: of the search.
        time_limit_s: wall clock, without compiling (once after installation); what is not reached keeps its start.
        over: ``mean`` (the loads summed) or ``steps``: the sum over the steps of `problem.steps` of the largest rank
            load of each step, which is what a run of the steps waits for.
        split: ``even``, or ``optimal``: shares of replicas that minimise the largest rank load of each layer.
        gap: relative distance to the bound at which a layer is good enough; 0 searches on.
        rounds: tabu rounds per layer at most, 500 to a search (about 1 ms with 384 slots); fewer: step 1 alone.
        threads: layers searched at a time.
        starts: plans to start from.
        progress: told of every layer.

    Raises:
        InputError: an unknown option value, a gap or count out of range, or `over` steps without steps.
    """
    started_s = time.perf_counter()
    _check_options(problem, over, split, gap, rounds, threads)
    _warm()
    search = _Search(problem.num_ranks, problem.num_slots, gap, rounds, seed,
                     time.perf_counter() + _SHARE * time_limit_s, threading.Event())
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
    """Return int32[layer, slot]: all layers searched in turn, one stage each, the worst first, until all are good."""
    layers = [_Layer(load.copy(), float(bound), slots.copy(), search, index) for index, (load, bound, slots) in enumerate(
        zip(problem.expert_load, balance_bound(problem), base.physical_to_logical, strict=True))]
    pool = ThreadPoolExecutor(threads)
    try:
        left = layers
        while left and not search.over:
            list(pool.map(_Layer.advance, left))
            left = sorted((one for one in left if not one.done), key=lambda one: one.value / one.bound, reverse=True)
            if progress is not None:
                progress.found(np.stack([one.slots for one in layers]), sum(one.value for one in layers))
    finally:
        search.stop.set()  # so that an interrupt is not held up
        pool.shutdown(cancel_futures=True)
    return np.stack([one.slots for one in layers])


def _warm() -> None:
    """Load every kernel before the threads start, with the types of all later calls: one compiled form each."""
    search = _Search(2, 4, 0.0, (2 * _FAILURES + 1) * _ROUNDS, 0, np.inf, threading.Event())
    for _ in _stages(np.array([3.0, 2.0, 1.0]), 1.0, search, 0):
        pass


class _Layer:
    """One layer's search: its best `slots` so far, their largest rank load `value`, and whether it is `done`."""

    def __init__(self, load: np.ndarray, bound: float, slots: np.ndarray, search: _Search, index: int) -> None:
        from moesim.placement.kernels import balance as kernels

        self.bound, self.slots, self._search = bound, slots, search
        self.value = float(kernels.exact_maximum(load, slots, search.num_ranks))
        self.done = search.num_slots == search.num_ranks or bound <= 0
        self._stages = _stages(load, bound, search, search.seed * 1009 + index)

    def advance(self) -> None:
        """Run the next stage, unless the search is over."""
        found = None if self._search.over else next(self._stages, None)
        self.done = found is None
        if found is not None and found[0] <= self.value:  # of equals the search's: EPLB may waste copies
            self.value, self.slots = float(found[0]), found[1]
        self.done = self.done or self.value <= self.bound * (1 + self._search.gap)


def _stages(load: np.ndarray, bound: float, search: _Search, seed: int) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the largest rank load and int32[slot] of one stage after another."""
    first = _greedy(load, 1.0, bound, search)
    if first[0] > bound * _FAR:
        first = min((_greedy(load, power, bound, search) for power in _POWERS), key=lambda one: one[0])
    yield first
    recounts = max(_RECOUNTS, min(0.3, 4.0 / search.num_slots)) if search.num_slots > len(load) else 0.0
    used, attempt = 0, 0
    while used + _ROUNDS <= search.rounds:
        value, row = first if attempt == 0 else _restart(load, bound, search, first[1], seed, attempt)
        failures = 0
        while failures < _FAILURES and used + _ROUNDS <= search.rounds:
            found, trial = _nearer(load, row, value, bound, search, recounts, seed + used)
            used += _ROUNDS
            failures = 0 if found < value else failures + 1
            if found < value:
                value, row = found, trial
            yield value, row
        attempt += 1


def _nearer(load: np.ndarray, row: np.ndarray, value: float, bound: float, search: _Search, recounts: float,
            seed: int) -> tuple[float, np.ndarray]:
    """Return the layer after tabu search that aims a little below its value: few ranks at a time have to give."""
    from moesim.placement.kernels import balance as kernels
    from moesim.placement.kernels import balance_search as searching

    trial = row.copy()
    aim = max(bound * (1 + _AIM * search.gap), bound + _STEP * (value - bound))
    searching.tabu(load, trial, search.num_ranks, aim, _ROUNDS, _TENURE, recounts, seed)
    return float(kernels.exact_maximum(load, trial, search.num_ranks)), trial


def _restart(load: np.ndarray, bound: float, search: _Search, first: np.ndarray, seed: int,
             attempt: int) -> tuple[float, np.ndarray]:
    """Return another start: an annealed layer."""
    from moesim.placement.kernels import balance as kernels
    from moesim.placement.kernels import balance_search as searching

    row, hot = first.copy(), max(_HOT, 2.0 / search.num_slots) * bound
    searching.anneal(load, row, search.num_ranks, bound * (1 + _AIM * search.gap), hot**2, (hot / 50) ** 2,
                     _ANNEAL * search.num_slots, 0.6, seed + attempt)
    return float(kernels.exact_maximum(load, row, search.num_ranks)), row


def _greedy(load: np.ndarray, power: float, bound: float, search: _Search) -> tuple[float, np.ndarray]:
    from moesim.placement.kernels import balance as kernels

    row = kernels.greedy(load, search.num_slots, search.num_ranks, power)
    kernels.part_duplicates(load, row, search.num_ranks)
    value = kernels.swap_descent(load, row, search.num_ranks, bound * (1 + _CLOSE * search.gap))
    return float(value), row


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
    mean = dataclasses.replace(search, stop=threading.Event())
    plans = [PlacementPlan(_searched(problem, mean, plans[0], 1, None), *sizes),
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
