"""Auto: every baseline, then the solver made for the goal, then the best of all, layer by layer where it mixes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from moesim.errors import MoesimError
from moesim.placement.call import call_solver
from moesim.placement.goal import Goal, parse_goal
from moesim.placement.layer_search import split_steps
from moesim.placement.objectives.objective import COHERENT
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.relabel import relabelled
from moesim.placement.repair import repair
from moesim.placement.result import SolveResult, SolveStatus
from moesim.placement.split import static_split

BASELINES = ("contiguous", "lpt", "eplb")
# the solver made for each objective; `exact` goes first where its dynamic program is small enough
SPECIALISTS = {"balance": "balance", "affinity": "affinity", "hops": "affinity", "bottleneck": "bottleneck",
               "fanout": "joint", "step_time": "joint"}
EXACT_UP_TO_EXPERTS = 8
_SAME_OBJECTIVE = ("balance", "affinity", "bottleneck", "fanout", "step_time")
_SAMPLED, _UNSEEN_SHARE = ("step_time", "fanout"), 0.25
_EXACT = ("affinity", "hops", "bottleneck")


def auto(problem: PlacementProblem, *, seed: int, time_limit_s: float, starts: Sequence[PlacementPlan] = (),
         progress: Progress | None = None, objective: str = "auto") -> SolveResult:
    """Return the best plan for a goal (`moesim.placement.goal.parse_goal`) that any solver here finds.

    Baselines (contiguous, LPT, EPLB, the current plan, `starts`) are scored first; then the solver made for each
    objective of the goal runs, starting from them, in its share of the time; the best plan is also tried with the
    shares of its replicas that are best for the load. Plans are brought within the constraints, and renamed towards
    the current plan where migration counts. The best by the goal is kept, so the
    result is never worse than a baseline on the goal. For a goal of several objectives the plans found are then
    mixed layer by layer while that helps and time is left.

    Step time and fan-out are scored on a sample of steps, which a search fits to. So they are searched on the first
    three quarters of the steps, affinity and fan-out (which carry over well) give plans too, and of all plans that are
    not worse than the best baseline on the whole sample the one that is best on the last quarter is taken.

    `objective` ``auto`` is step time where the problem has steps and their costs, else balance.

    Raises:
        InputError: a goal that the problem has no data for.
        SolverError: constraints that clash.
    """
    started_s = time.perf_counter()
    goal = parse_goal(default_objective(problem) if objective == "auto" else objective)
    goal.check(problem)
    search = _Portfolio(problem, goal, progress)
    for plan in (*starts, *_current(problem), *_baselines(problem, seed)):
        search.offer(plan)
    search.num_baselines = len(search.plans)
    specialists, until_s = _specialists(problem, goal), started_s + time_limit_s
    for place, (solver, options, weight) in enumerate(specialists):
        began_s = time.perf_counter()
        rest = sum(other for _, _, other in specialists[place:]) + (goal.single is None)
        share_s = max(0.05, (until_s - began_s) * weight / rest)
        search.run(solver, options, seed, share_s)
        # what a solver takes beyond its share (loops compiled for the first time) is not taken from the others
        until_s += max(0.0, time.perf_counter() - began_s - share_s)
    search.offer_split()
    if goal.single is None:
        search.mix(until_s)
    return search.result(seed, started_s)


def default_objective(problem: PlacementProblem) -> str:
    """Return the objective that ``auto`` stands for."""
    return "step_time" if problem.steps is not None and problem.step_cost is not None else "balance"


def _current(problem: PlacementProblem) -> list[PlacementPlan]:
    return [] if problem.current is None else [problem.current]


def _baselines(problem: PlacementProblem, seed: int) -> Iterator[PlacementPlan]:
    from moesim.placement.solvers import SOLVERS

    for name in BASELINES:
        plan = SOLVERS[name](problem, seed=seed, time_limit_s=1.0).plan
        assert plan is not None  # the greedy solvers always give one
        yield plan


def _specialists(problem: PlacementProblem, goal: Goal) -> list[tuple[str, dict[str, object], float]]:
    """Return (solver, options, share of the time) for the goal's objectives, each once."""
    single_home = problem.num_slots == problem.num_experts
    found: list[tuple[str, dict[str, object], float]] = []
    for one in goal.objectives:
        if one.name not in SPECIALISTS:
            continue
        if single_home and problem.num_experts <= EXACT_UP_TO_EXPERTS and one.name in _EXACT:
            found.append(("exact", {"objective": one.name}, 1.0))
            continue
        name = SPECIALISTS[one.name]
        if name == "joint":
            found += _sampled(problem, one.name)
        elif name == "affinity":
            found.append((name, {"node_weight": 0.5 if one.name == "hops" else 0.0}, 1.0))
        else:
            found.append((name, {}, 1.0))
    return found


def _sampled(problem: PlacementProblem, objective: str) -> list[tuple[str, dict[str, object], float]]:
    """Return the solvers for an objective on sampled steps: first those whose plans carry over to other steps."""
    found: list[tuple[str, dict[str, object], float]] = []
    if problem.transitions is not None and problem.num_layers > 1:
        found.append(("affinity", {}, 0.2))
    if objective == "step_time":
        found.append(("joint", {"objective": "fanout"}, 0.3))
    return [*found, ("joint", {"objective": objective}, 0.5)]


class _Portfolio:
    """The plans found so far and the best of them."""

    def __init__(self, problem: PlacementProblem, goal: Goal, progress: Progress | None) -> None:
        self.problem, self.goal, self.progress = problem, goal, progress
        self.fit, self.unseen = problem, None
        if goal.name in _SAMPLED and problem.steps is not None:
            self.fit, self.unseen = split_steps(problem, _UNSEEN_SHARE)
        self.plans: list[tuple[tuple[float, ...], PlacementPlan]] = []
        self.best: tuple[tuple[float, ...], PlacementPlan] | None = None
        self.proof: SolveResult | None = None
        self.passed_over: list[str] = []
        self.num_baselines = 0
        if progress is not None:
            progress.sense = "min" if goal.single is None else goal.single.sense

    def offer(self, plan: PlacementPlan) -> None:
        """Score a plan (within the constraints), and its renamed form where that can help."""
        names_count = any(one.name == "migration" for one in self.goal.objectives)
        forms = [plan]
        if names_count and self.problem.current is not None:
            per_layer = self.goal.execution != COHERENT
            forms.append(relabelled(plan, self.problem.current, self.problem.ranks_per_node, per_layer=per_layer))
        for form in forms:
            form = repair(self.problem, form)
            key = self.goal.key(self.problem, form)
            self.plans.append((key, form))
            if self.best is None or self.goal.better(key, self.best[0]):
                self.best = (key, form)
                self._tell(key, form)

    def _tell(self, key: tuple[float, ...], plan: PlacementPlan) -> None:
        if self.progress is not None:
            one = self.goal.single
            value = key[0] if one is None or one.sense == "min" else -key[0]
            self.progress.found(plan.physical_to_logical, value)

    def run(self, solver: str, options: dict[str, object], seed: int, time_limit_s: float) -> None:
        """Run one solver from the plans found so far; a solver that cannot take the problem is passed over."""
        from moesim.placement.solvers import SOLVERS

        # a specialist reports its own objective, so only where that is the goal may it report to the caller
        same = self.goal.single is not None and self.goal.name in _SAME_OBJECTIVE and self.fit is self.problem
        progress = self.progress if same else None
        try:
            result = call_solver(SOLVERS[solver], self.fit, seed=seed, time_limit_s=time_limit_s,
                                 starts=[plan for _, plan in self.plans], progress=progress, **options)
        except MoesimError as error:
            self.passed_over.append(f"{solver}: {error}")
            return
        if result.plan is not None:
            self.offer(result.plan)
            self.proof = result

    def offer_split(self) -> None:
        """Offer the best plan with the shares of its replicas that are best for the load, where it has replicas."""
        assert self.best is not None
        if self.problem.num_slots > self.problem.num_experts:
            self.offer(static_split(self.best[1], self.problem.expert_load))

    def mix(self, until_s: float) -> None:
        """Take single layers of the other plans into the best one while that is better and time is left."""
        assert self.best is not None
        others = [plan for _, plan in self.plans if plan is not self.best[1]]
        improved = True
        while improved and others:
            improved = False
            for layer in range(self.problem.num_layers):
                for other in others:
                    if time.perf_counter() > until_s:
                        return
                    improved = self._take(layer, other) or improved

    def _take(self, layer: int, other: PlacementPlan) -> bool:
        assert self.best is not None
        key, plan = self.best
        if np.array_equal(plan.physical_to_logical[layer], other.physical_to_logical[layer]):
            return False
        rows, shares = np.array(plan.physical_to_logical), np.array(plan.share)
        rows[layer], shares[layer] = other.physical_to_logical[layer], other.share[layer]
        stated = plan.slot_share is not None or other.slot_share is not None
        mixed = dataclasses.replace(plan, physical_to_logical=rows, slot_share=shares if stated else None)
        new = self.goal.key(self.problem, mixed)
        if not self.goal.better(new, key):
            return False
        self.best = (new, mixed)
        self._tell(new, mixed)
        return True

    def _chosen(self) -> tuple[tuple[float, ...], PlacementPlan]:
        """Return the best plan; on sampled steps, the best on unseen ones of those that no baseline beats."""
        if self.best is None:
            raise MoesimError("auto: no plan was scored")  # unreachable: the baselines always are
        if self.unseen is None:
            return self.best
        baseline = min(key for key, _ in self.plans[:self.num_baselines])
        good = [(key, plan) for key, plan in self.plans if not self.goal.better(baseline, key)]
        return min(good, key=lambda one: self.goal.key(self.unseen, one[1]))  # type: ignore[arg-type]

    def result(self, seed: int, started_s: float) -> SolveResult:
        """Return the best plan; with one objective, the specialist's bound comes along."""
        key, plan = self._chosen()
        one, proof = self.goal.single, self.proof
        objective = key[0] if one is None or one.sense == "min" else -key[0]
        whole = self.fit is self.problem  # a bound on some of the steps is none on all
        known = whole and one is not None and proof is not None and proof.objective_name == one.unit
        bound = proof.objective_bound if known and proof is not None else None
        optimal = known and proof is not None and proof.status is SolveStatus.OPTIMAL and proof.objective == objective
        if self.passed_over:
            plan = dataclasses.replace(plan, provenance=plan.provenance | {"passed_over": self.passed_over})
        return SolveResult(
            solver="auto", status=SolveStatus.OPTIMAL if optimal else SolveStatus.FEASIBLE, plan=plan,
            objective_name=self.goal.name if one is None else one.unit, objective=objective, objective_bound=bound,
            time_s=time.perf_counter() - started_s, seed=seed, sense="min" if one is None else one.sense,
            bound_method=proof.bound_method if known and proof is not None else "",
            certificate=proof.certificate if known and proof is not None else None)
