"""Make a plan from one part of a trace and judge it on another: what `moesim place` runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.hardware.profile import read_profile
from moesim.hardware.shorthand import parse_cluster
from moesim.hardware.spec import HardwareSpec
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.step_cost import step_cost, step_sample
from moesim.lowering.work import experts_work
from moesim.model.catalog import load_model
from moesim.model.spec import ModelSpec
from moesim.placement.constraints import Constraints
from moesim.placement.goal import parse_goal
from moesim.placement.metrics import imbalance, rank_load
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.objectives.migration import moved_experts
from moesim.placement.objectives.objective import COHERENT, HOME
from moesim.placement.place import problem_from_trace
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.sample_size import tokens_needed
from moesim.placement.step_sample import ExchangeRates
from moesim.simulate.executors import execute
from moesim.simulate.run import simulate
from moesim.traces.split import split_requests
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.store import read_trace, resolve_trace
from moesim.traces.trace import PHASES, PREFILL, RoutingTrace

TRAIN_STEPS, JUDGE_STEPS, REQUESTS_PER_RANK = 64, 16, 8
FULL_SHARE = 0.75
OVERFIT_SHARE = 0.8
_ROWS_FOR_RATE = 4096  # rows per expert at which a kernel's time per row is taken: weights no longer count


@dataclass(frozen=True)
class PlaceRequest:
    """What to place where, and how to judge it.

    Attributes:
        trace, model, hardware, profile: names or files; no model: the trace's own.
        holdout: share of the requests kept for judging, 0 ... 1 (0: none; every figure is then the training part's).
        execution: ``home`` or ``coherent`` (`moesim.placement.objectives`); decides what ``auto`` means.
        batch_size: requests active at once in the steps that are sampled and judged (None: 8 per rank, or all).
        current: the plan that is loaded now.
    """

    trace: str
    hardware: str
    model: str | None = None
    profile: str | None = None
    num_nodes: int = 1
    gpus_per_node: int | None = None
    redundant_experts: int = 0
    holdout: float = 0.5
    execution: str = HOME
    batch_size: int | None = None
    current: PlacementPlan | None = None
    constraints: Constraints = field(default_factory=Constraints)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise InputError(f"holdout must be at least 0 and below 1, got {self.holdout}")
        if self.execution not in (HOME, COHERENT):
            raise InputError(f"execution must be {HOME} or {COHERENT}, got {self.execution!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"batch size must be at least 1, got {self.batch_size}")


class PlaceSetup:
    """A request with its files read: the problem of the training part, and the judge of the other."""

    def __init__(self, request: PlaceRequest) -> None:
        self.request = request
        self.trace: RoutingTrace = read_trace(resolve_trace(request.trace))
        self.model: ModelSpec = load_model(request.model or self._trace_model())
        self.trace.check_model(self.model)
        name, gpus, nodes = parse_cluster(request.hardware)
        self.hardware: HardwareSpec = load_hardware(
            name, num_nodes=nodes or request.num_nodes, gpus_per_node=gpus or request.gpus_per_node)
        if not self.hardware.num_ranks:
            raise InputError(f"hardware {self.hardware.name!r} has no GPUs to place experts on")
        self.cost = CostModel(self.hardware, read_profile(request.profile) if request.profile else None)
        self.train, self.test = self._split()

    def _trace_model(self) -> str:
        if not self.trace.model:
            raise InputError(f"{self.request.trace}: the trace does not name its model; give --model")
        return self.trace.model

    def _split(self) -> tuple[RoutingTrace, RoutingTrace | None]:
        if not self.request.holdout:
            return self.trace, None
        return split_requests(self.trace, 1 - self.request.holdout, self.request.seed)

    @cached_property
    def problem(self) -> PlacementProblem:
        """The training part's problem, with everything that any objective needs."""
        return self._problem(self.train, self.steps_of(self.train, TRAIN_STEPS))

    @cached_property
    def held_out(self) -> PlacementProblem | None:
        """The held-out part as a problem, to score plans on."""
        return None if self.test is None else self._problem(self.test, self.judge_steps)

    @cached_property
    def judge_steps(self) -> list[Step]:
        """The steps that are simulated to judge a plan (of the training part, where nothing is held out)."""
        return self.steps_of(self.test or self.train, JUDGE_STEPS)

    def steps_of(self, trace: RoutingTrace, max_steps: int) -> list[Step]:
        """Return decode steps of a trace (or its prefill, where it has nothing else)."""
        decodes = bool(np.any(trace.phase != PREFILL))
        batch = self.request.batch_size or REQUESTS_PER_RANK * self.hardware.num_ranks
        return full_steps(closed_loop_steps(
            trace, batch_size=min(batch, len(trace.requests())), max_steps=max_steps, include_prefill=not decodes,
            seed=self.request.seed))

    def _problem(self, trace: RoutingTrace, steps: list[Step]) -> PlacementProblem:
        free = min(self.hardware.memory_of(rank).num_bytes for rank in self.hardware.ranks)
        problem = problem_from_trace(
            trace, num_ranks=self.hardware.num_ranks, ranks_per_node=self.hardware.ranks_per_node,
            redundant_experts=self.request.redundant_experts, expert_bytes=self.model.expert_bytes,
            memory_bytes_per_rank=free - self.model.non_expert_bytes, num_groups=self.model.num_groups)
        problem = with_costs(problem, self.model, self.cost, trace, steps)
        return dataclasses.replace(problem, current=self.request.current, constraints=self.request.constraints)

    def goal_text(self, objective: str | None) -> str | None:
        """Return the objective that is meant: ``auto`` goes by the execution."""
        if objective != "auto":
            return objective
        return "bottleneck" if self.request.execution == COHERENT and self.problem.num_layers > 1 else "step_time"

    def simulated_step_s(self, plan: PlacementPlan) -> float:
        """Return the simulated time of a judged step under `plan`, seconds."""
        result = simulate(self.program(plan, self.judge_steps), name="place", executor=execute)
        return float(result.summary["step_time_s"])

    def program(self, plan: PlacementPlan, steps: list[Step]) -> Any:
        """Lower steps of the judged part under a plan, in the request's execution."""
        from moesim.lowering.context_coherent import ContextCoherentProgram

        kind: Any = ContextCoherentProgram if self.request.execution == COHERENT else ExpertParallelProgram
        return kind(self.model, self.test or self.train, steps, plan, self.cost)

    def judge(self, plan: PlacementPlan, objective: str | None) -> dict[str, Any]:
        """Return a plan's figures on the held-out part (on the training part, where nothing is held out)."""
        problem = self.held_out or self.problem
        ranks = rank_load(plan, problem.expert_load)
        facts: dict[str, Any] = {
            "imbalance": float(ranks.max(axis=1).sum() / ranks.mean(axis=1).sum()),
            "imbalance_worst_layer": float(imbalance(plan, problem.expert_load).max())}
        if problem.num_layers > 1:
            from moesim.placement.metrics import kept_transitions

            kept = kept_transitions(plan, np.asarray(problem.transitions), problem.ranks_per_node)
            facts |= {f"kept_on_{scope}_fraction": value for scope, value in kept.items()}
        program = self.program(plan, self.judge_steps)
        facts["step_time_s"] = float(simulate(program, name="place", executor=execute).summary["step_time_s"])
        facts |= self._traffic(program)
        if self.request.current is not None:
            facts["migration_bytes"] = OBJECTIVES["migration"].value(self.problem, plan)
            facts["moved_experts"] = int(moved_experts(self.request.current, plan).sum())
        facts |= self._both(plan, objective)
        return facts

    def _traffic(self, program: Any) -> dict[str, float]:
        steps = len(self.judge_steps)
        return {f"cross_{scope}_bytes_per_step": program.remote_bytes[scope] / steps for scope in ("rank", "node")}

    def _both(self, plan: PlacementPlan, objective: str | None) -> dict[str, Any]:
        """Return the goal's value on the training and on the held-out part, and what a contiguous plan has."""
        if objective is None or self.held_out is None:
            return {}
        goal = parse_goal(objective)
        plain = contiguous_plan(self.problem)
        parts = {"train": self.problem, "held_out": self.held_out}
        values = {name: [goal.key(part, one)[0] for one in (plan, plain)] for name, part in parts.items()}
        sign = -1.0 if goal.single is not None and goal.single.sense == "max" else 1.0
        gains = {name: (base - own) / abs(base) if base else 0.0 for name, (own, base) in values.items()}
        return {"objective_train": sign * values["train"][0], "objective_held_out": sign * values["held_out"][0],
                "gain_train_fraction": gains["train"], "gain_held_out_fraction": gains["held_out"]}

    def warnings(self, facts: dict[str, Any], objective: str | None) -> list[str]:
        """Return what a reader must know: too few tokens, a gain that does not carry over."""
        found = []
        names = tuple(one.name for one in parse_goal(objective).objectives) if objective else ()
        needed = tokens_needed(self.trace.num_experts, self.trace.top_k, names)
        if self.train.num_tokens < needed:
            found.append(f"the plan is made from {self.train.num_tokens:,} tokens; for {self.trace.num_experts} experts, "
                         f"top-{self.trace.top_k}, some {needed:,} are needed before its gain can be trusted")
        train, other = facts.get("gain_train_fraction", 0.0), facts.get("gain_held_out_fraction", 0.0)
        if train > 0 and other < OVERFIT_SHARE * train:
            found.append(f"the plan overfits: against a contiguous plan it gains {train:.1%} on the tokens that it was "
                         f"made from, {other:.1%} on the others")
        return found


def full_steps(steps: list[Step]) -> list[Step]:
    """Return the steps up to where the batch drains (requests have run out): later ones are of another kind."""
    prefill = PHASES[PREFILL]  # prompts differ in length at any time
    least = FULL_SHARE * max((step.num_tokens for step in steps if step.phase != prefill), default=0)
    drained = (index for index, step in enumerate(steps) if step.phase != prefill and step.num_tokens < least)
    return steps[:next(drained, len(steps))] or steps[:1]


def with_costs(problem: PlacementProblem, model: ModelSpec, cost: CostModel, trace: RoutingTrace,
               steps: list[Step], dispatch_bytes: float | None = None) -> PlacementProblem:
    """Return the problem with token sets by step and the machine's costs, which some objectives need."""
    return dataclasses.replace(
        problem, steps=step_sample(trace, steps, problem.num_ranks, model=model, cost=cost), rates=exchange_rates(model, cost),
        step_cost=step_cost(model, cost, dispatch_bytes=dispatch_bytes))


def contiguous_plan(problem: PlacementProblem) -> PlacementPlan:
    """Return the plan that engines start with: slot i holds expert i mod E."""
    row = np.arange(problem.num_slots) % problem.num_experts
    return PlacementPlan(np.tile(row, (problem.num_layers, 1)), problem.num_ranks, problem.num_experts)


def exchange_rates(model: ModelSpec, cost: CostModel) -> ExchangeRates:
    """Return the linear rates of the bottleneck objective: a row of a full kernel, a token on a port per level."""
    rank = cost.hardware.ranks[0]
    work = experts_work(model, _ROWS_FOR_RATE, 1, _ROWS_FOR_RATE)
    seconds = {}
    for scope in ("node", "cluster"):
        fabric = cost.hardware.fabric(scope)
        size = model.hidden_size * model.activation_bytes
        seconds[scope] = 0.0 if fabric is None else size * fabric.ranks_per_port / fabric.bytes_per_s
    row_s = cost.grouped_ffn(rank, work).seconds / _ROWS_FOR_RATE
    if not math.isfinite(row_s):
        raise InputError(f"hardware {cost.hardware.name!r}: no rate for an expert's rows")
    return ExchangeRates(row_s, seconds["node"], seconds["cluster"], 1.0 / model.top_k)
