"""Joint: placement and replication together, annealed on sampled step times (or fan-out), from every baseline."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

import numpy as np

from moesim.errors import InputError, MoesimError, unknown
from moesim.placement.layer_search import FanoutSearch, LayerSearch, StepTimeSearch, resampled, split_steps
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.objectives.fanout import layer_fanout
from moesim.placement.objectives.migration import moved_experts
from moesim.placement.objectives.step_time import layer_times_ns
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.repair import repair
from moesim.placement.result import SolveResult, SolveStatus

GOALS = ("step_time", "fanout")
BASELINES = ("contiguous", "lpt", "eplb", "balance", "affinity")
_CHUNK_S, _PROBES = 0.1, 48
_HOT, _COLD = 0.5, 0.02  # temperatures in units of the median change of a random move


def joint(problem: PlacementProblem, *, seed: int, time_limit_s: float, objective: str = "step_time",
          node_weight: float = 0.0, migration_weight: float = 0.0, moves: int = 60_000, resample: int = 3,
          validate: float = 0.25, threads: int = 2,
          starts: Sequence[PlacementPlan] = (), progress: Progress | None = None) -> SolveResult:
    """Minimise the sampled step time, or the fan-out, layer by layer over slots and replicas at once.

    Both objectives are sums over layers, of what `objectives.step_time.layer_times_ns` (the simulator's integers) or
    `objectives.fanout.layer_fanout` count on ``problem.steps``, plus ``migration_weight`` per byte that the plan has
    to copy from ``problem.current``. Every layer begins with its best row among contiguous, lpt, eplb, balance,
    affinity (where there are transitions), the current plan and `starts`; then simulated annealing swaps slots of
    two ranks and gives redundant slots to other experts, half of the moves from a bottleneck (the rank whose experts
    end last, the port that receives most). No move puts two copies of an expert on one rank. At the end the searched
    row and every start's row of a layer are scored by the exact function and the best is kept, so no start is
    better, in any layer (of starts with uneven shares: in sum, since a plan cannot mix the two ways to split). Found
    plans split evenly. A local optimum; the clock decides only if it cuts the search short (``complete``). Compiling the
    loops, once on a machine, does not count.

    Args:
        objective: ``step_time`` (ns, mean over steps) or ``fanout`` (distinct ranks, mean over tokens and layers).
        node_weight: fan-out only: what a distinct node counts beside a rank.
        migration_weight: ns (step time) or ranks (fan-out) that copying one byte may cost.
        moves: tried per layer. threads: layers searched at once.
        resample: step time only: how many more times the tokens of each home rank are dealt into steps for the search
            (not for the score). Without it the search learns by heart who happened to share a step.
        validate: the share of steps (the last ones) that the search does not see; a layer's found row is taken only if
            it beats its start on them too, so that what is learned by heart stays out of the plan.

    Raises:
        InputError: no steps, no step costs, an option out of range.
        SolverError: constraints that no plan keeps.
    """
    started_s = time.perf_counter()
    _check(problem, objective, node_weight, migration_weight, moves, threads, resample, validate)
    score = _Score(problem, objective, node_weight, migration_weight)
    choice, uneven = _Choice(problem, score, progress), _Choice(problem, score, shared=True)
    for plan in [repair(problem, one) for one in (*starts, *_baselines(problem, seed, started_s + 0.2 * time_limit_s))]:
        choice.offer(plan)
        if plan.slot_share is not None:
            uneven.offer(plan)
    seen, unseen = split_steps(problem, validate)
    dealt = resampled(seen, resample if objective == "step_time" else 0, seed)
    search = _Search(dealt, unseen, score, seed, moves, threads, started_s + time_limit_s - 1.5 * score.seconds)
    complete = search.run(choice)
    choice.offer(choice.searched())
    if len(uneven.costs):
        uneven.offer(choice.plan({}))
        choice = min(choice, uneven, key=lambda one: float(one.costs.sum()))
    return SolveResult(
        solver="joint", status=SolveStatus.FEASIBLE, plan=choice.plan({"complete": complete, "objective": objective}),
        objective_name=score.name, objective=float(choice.costs.sum()), objective_bound=None,
        time_s=time.perf_counter() - started_s, seed=seed)


def _check(problem: PlacementProblem, objective: str, node_weight: float, migration_weight: float, moves: int,
           threads: int, resample: int, validate: float) -> None:
    if objective not in GOALS:
        raise unknown("objective of joint", objective, GOALS)
    OBJECTIVES[objective].check(problem)
    if not 0 <= node_weight < float("inf") or not 0 <= migration_weight < float("inf"):
        raise InputError(f"joint: weights must be finite and not negative, got node_weight {node_weight} and "
                         f"migration_weight {migration_weight}")
    if moves < 1 or threads < 1 or resample < 0:
        raise InputError(f"joint: moves and threads must be at least 1 and resample not negative, got {moves}, "
                         f"{threads} and {resample}")
    if not 0 <= validate < 1:
        raise InputError(f"joint: validate must be at least 0 and below 1, got {validate}")
    if migration_weight > 0 and problem.current is None:
        raise InputError("joint: migration_weight needs the plan that is loaded now (--from)")


def _baselines(problem: PlacementProblem, seed: int, until_s: float) -> list[PlacementPlan]:
    """Return the plans of the other solvers that can answer this problem, the current plan first."""
    from moesim.placement.solvers import SOLVERS

    found = [] if problem.current is None else [problem.current]
    for name in BASELINES:
        left_s = until_s - time.perf_counter()
        if left_s <= 0 and found:
            continue
        if name == "affinity" and problem.transitions is None:
            continue
        options = {"num_starts": 0} if name == "affinity" else {}
        left_s *= 0.3 if name == "affinity" else 1.0  # it seldom is the best start here
        try:
            result = SOLVERS[name](problem, seed=seed, time_limit_s=max(0.05, left_s), **options)
        except MoesimError:
            continue  # a baseline that cannot answer is no start
        if result.plan is not None:
            found.append(result.plan)
    return found


class _Score:
    """The exact cost of every layer of a plan, in the objective's unit."""

    def __init__(self, problem: PlacementProblem, objective: str, node_weight: float, migration_weight: float) -> None:
        assert problem.steps is not None
        self.problem, self.objective, self.node_weight = problem, objective, node_weight
        sizes = problem.expert_bytes if len(problem.expert_bytes) else np.ones(problem.num_layers)
        self.move_cost = migration_weight * np.asarray(sizes, np.float64)
        tokens = len(problem.steps.expert_ids) * problem.num_layers
        self.unit = float(problem.steps.num_steps if objective == "step_time" else tokens)
        self.seconds = 0.0
        extra = f" + {migration_weight:g} per byte moved" if migration_weight else ""
        nodes = f" + {node_weight:g} x distinct nodes" if objective == "fanout" and node_weight else ""
        self.name = OBJECTIVES[objective].unit + nodes + extra

    def layers(self, plan: PlacementPlan) -> np.ndarray:
        """Return float64[layer]."""
        began_s = time.perf_counter()
        if self.objective == "step_time":
            costs = layer_times_ns(self.problem, plan).sum(axis=0) / self.unit
        else:
            reached = layer_fanout(self.problem, plan)
            costs = (reached["ranks"] + self.node_weight * reached["nodes"]) / self.unit
        if self.problem.current is not None and self.move_cost.any():
            costs = costs + self.move_cost * moved_experts(self.problem.current, plan)
        self.seconds = time.perf_counter() - began_s
        return costs

    def search(self, problem: PlacementProblem, layer: int, seed: int) -> LayerSearch:
        """Return the compiled search of a layer of this problem, or of one with more steps (its costs are sums)."""
        assert self.problem.steps is not None
        assert problem.steps is not None
        times = len(problem.steps.expert_ids) / len(self.problem.steps.expert_ids)
        if self.objective == "step_time":
            times = problem.steps.num_steps / self.problem.steps.num_steps
        move_cost = float(self.move_cost[layer]) * self.unit * times if problem.current is not None else 0.0
        if self.objective == "step_time":
            return StepTimeSearch(problem, layer, seed, move_cost)
        return FanoutSearch(problem, layer, seed, move_cost, self.node_weight)

    def of_row(self, layer: int, row: np.ndarray) -> float:
        """Return the cost of one layer's slots, evenly split, by the compiled count."""
        return self.search(self.problem, layer, 0).start(row) / self.unit


@dataclass
class _Choice:
    """The best row of every layer so far, by the exact cost; and what the searches have found.

    A plan splits either all its layers by turns or all by stated shares (`metrics.slot_of_token`), so rows of the two
    kinds are never mixed: `shared` says which kind this choice keeps.
    """

    problem: PlacementProblem
    score: _Score
    progress: Progress | None = None
    shared: bool = False
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    shares: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    costs: np.ndarray = field(default_factory=lambda: np.zeros(0))
    found: dict[int, tuple[np.ndarray, float]] = field(default_factory=dict)

    def offer(self, plan: PlacementPlan) -> None:
        """Keep those of the plan's layers that are cheaper than what is known."""
        self.problem.check(plan)
        if self.shared != (plan.slot_share is not None):
            plan = dataclasses.replace(plan, slot_share=plan.share if self.shared else None)
        costs = self.score.layers(plan)
        if not len(self.costs):
            self.rows, self.shares = np.array(plan.physical_to_logical), np.array(plan.share)
            self.costs = costs
        better = costs < self.costs
        self.rows[better], self.shares[better] = plan.physical_to_logical[better], plan.share[better]
        self.costs = np.where(better, costs, self.costs)
        self._tell()

    def searched(self) -> PlacementPlan:
        """Return the plan of the rows that searches found to be cheaper, the known ones elsewhere."""
        rows = self.rows.copy()
        for layer, (row, cost) in self.found.items():
            if cost < self.costs[layer]:
                rows[layer] = row
        return PlacementPlan(rows, self.problem.num_ranks, self.problem.num_experts)

    def add(self, layer: int, row: np.ndarray, cost: float) -> None:
        """Take the result of a layer's search."""
        self.found[layer] = row, cost
        self._tell()

    def plan(self, provenance: dict[str, object]) -> PlacementPlan:
        """Return the best plan."""
        return PlacementPlan(self.rows, self.problem.num_ranks, self.problem.num_experts, provenance,
                             self.shares if self.shared else None)

    def _tell(self) -> None:
        if self.progress is not None:
            costs = self.costs.copy()
            for layer, (_, cost) in self.found.items():
                costs[layer] = min(costs[layer], cost)
            self.progress.found(self.searched().physical_to_logical, float(costs.sum()))


class _Search:
    """Layers in turn over a few threads; each gets its share of the time that is left."""

    def __init__(self, problem: PlacementProblem, unseen: PlacementProblem | None, score: _Score, seed: int,
                 moves: int, threads: int, until_s: float) -> None:
        self.unseen = unseen
        self.problem, self.score, self.seed, self.moves, self.threads = problem, score, seed, moves, threads
        self.until_s, self.left, self.stop = until_s, problem.num_layers, threading.Event()

    def run(self, choice: _Choice) -> bool:
        """Search every layer; return whether all tried as many moves as they should."""
        order = np.argsort(-choice.costs, kind="stable").tolist()
        complete, began_s = True, time.perf_counter()
        self._warm_up(choice)
        self.until_s += time.perf_counter() - began_s  # the first compilation ever is not the search's time
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                tasks = {pool.submit(self._layer, layer, choice.rows[layer]): layer for layer in order}
                for task in as_completed(tasks):
                    found, whole = task.result()
                    complete = complete and whole
                    if found is not None:
                        choice.add(tasks[task], *found)
            finally:
                self.stop.set()
        return complete

    def _warm_up(self, choice: _Choice) -> None:
        """Load the kernels once, before threads would compile them twice."""
        search = self.score.search(self.problem, 0, self.seed)
        search.start(choice.rows[0])
        search.anneal(1, 1.0, 1.0)

    def _layer(self, layer: int, row: np.ndarray) -> tuple[tuple[np.ndarray, float] | None, bool]:
        """Return the best int[slot] found and its cost (None: no time), and whether all moves were tried."""
        if self.stop.is_set() or time.perf_counter() > self.until_s:
            self.left -= 1
            return None, False
        search = self.score.search(self.problem, layer, self.seed)
        search.start(row)
        until_s = time.perf_counter() + (self.until_s - time.perf_counter()) * self.threads / max(self.threads, self.left)
        whole = self._anneal(search, _median_change(search, self.seed), until_s)
        self.left -= 1
        if self.unseen is not None:
            judge = self.score.search(self.unseen, layer, self.seed)
            if judge.start(search.best) >= judge.start(row):
                return None, whole
        return (search.best, self.score.of_row(layer, search.best)), whole

    def _anneal(self, search: LayerSearch, step: float, until_s: float) -> bool:
        """Cool down over all moves, or over as many as the time allows by the speed of the first ones."""
        size, done, planned = 100, 0, self.moves
        while done < planned and not self.stop.is_set():
            began_s = time.perf_counter()
            size = min(size, planned - done)
            hot, cold = (step * _HOT * (_COLD / _HOT) ** (part / planned) for part in (done, done + size))
            search.anneal(size, hot, cold)
            done += size
            now_s = time.perf_counter()
            speed = size / max(now_s - began_s, 2.0**-20)
            planned = min(self.moves, done + int(max(0.0, until_s - now_s) * speed))
            size = max(20, int(_CHUNK_S * speed))
        return done >= self.moves


def _median_change(search: LayerSearch, seed: int) -> float:
    """Return the median cost change of random swaps (1 where nothing changes), undone again."""
    place: Callable[[int], int] = lambda slot: int(search.place.slots[slot])  # type: ignore[attr-defined] # noqa: E731
    rng = np.random.default_rng(seed)
    width = search.rules.slots_per_rank  # type: ignore[attr-defined]
    before, changes = search.change(0, -1, place(0)), []
    for slot, other in rng.integers(len(search.best), size=(_PROBES, 2)).tolist():
        first, second = place(slot), place(other)
        if slot // width != other // width and first != second:
            changes.append(abs(search.change(slot, other, second) - before))
            search.change(slot, other, first)
    real = [one for one in changes if 0 < one < 2.0**40]
    return float(np.median(real)) if real else 1.0
