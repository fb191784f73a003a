"""The expert-parallel study: several plans of one model on one cluster, judged on requests they have not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import HardwareSpec
from moesim.lowering.bounds import ExpertParallelBound
from moesim.lowering.coherent_bound import ContextCoherentBound
from moesim.lowering.context_coherent import ContextCoherentProgram
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.placement.bounds import balance_bound
from moesim.placement.metrics import imbalance, rank_load
from moesim.placement.place import place, problem_from_trace
from moesim.placement.plan import PlacementPlan, read_plan
from moesim.placement.problem import PlacementProblem
from moesim.placement.prove import prove
from moesim.scenario.inputs import Inputs, load_machine, make_steps, source_note
from moesim.scenario.placing import TRAIN_STEPS, full_steps, with_costs
from moesim.scenario.schema import ExpertParallelStudy, PlanChoice
from moesim.simulate.critical_path import bounded_by
from moesim.simulate.executors import AUTO, executor_of
from moesim.simulate.result import SimulationResult
from moesim.simulate.run import simulate
from moesim.traces.split import split_requests
from moesim.traces.steps import Step, closed_loop_steps
from moesim.units import s_from_ns

BOUND_NOTE = (
    "Bounds: imbalance, the best that any plan with these slots could reach on the judged requests; step time, no plan with "
    "these slots can be faster under the same costs (slowest attention; then what one plan for all steps must pay: experts that "
    "share a rank save traffic and cost balance at once)."
)
BOUND_S = 4.0  # seconds for the proof of what one plan must pay

BALANCER_NOTE = (
    "Balancer {name}: every batch is balanced anew after its router, at the price of an exchange of counts and a stated time to "
    "solve in every layer (llep: and the weights of spilled experts); the imbalance shown is the plan's without it."
)
COHERENT_NOTE = (
    "Context-coherent execution: tokens move on from layer to layer, every rank holds the context of all requests (its memory "
    "was checked) and repeats their prefill; bytes between ranks include the AllGather that ends each step. Bounds: imbalance, "
    "the best that any plan with these slots could reach on the judged requests; step time, no plan with these slots can be "
    "faster under the same costs (an even split of rows and distinct experts, only forced traffic, an even AllGather)."
)


Tell = Callable[[dict[str, Any]], None]


def _quiet(row: dict[str, Any]) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class PlannedPoint:
    """One plan, how it was made, and its simulated run."""

    label: str
    plan: PlacementPlan
    row: dict[str, Any]
    result: SimulationResult


class ExpertParallelSetup:
    """Everything that the plans of a study share. Plans are made from `train`, judged on `test`."""

    def __init__(self, inputs: Inputs, study: ExpertParallelStudy, executor: str = AUTO) -> None:
        self.inputs, self.study, self.seed = inputs, study, inputs.scenario.seed
        self.execute = executor_of(executor)
        self.hardware: HardwareSpec
        self.cost: CostModel
        self.hardware, self.cost = load_machine(study.hardware, study.profile)
        if self.hardware.num_ranks < 2:
            raise InputError(
                f"study {study.name!r}: expert parallelism needs at least 2 GPUs, {study.hardware.name!r} gives "
                f"{self.hardware.num_ranks}"
            )
        self.train, self.test = split_requests(inputs.trace, study.placement.train_fraction, self.seed)
        self._problems: dict[int, PlacementProblem] = {}
        self._bounds: dict[int, float] = {}
        self.steps: list[Step] = make_steps(self.test, study.workload, self.seed)

    @cached_property
    def test_load(self) -> np.ndarray:
        """int64[layer, expert], the load of the rows that are simulated."""
        rows = np.concatenate([step.rows for step in self.steps])
        return np.stack(
            [
                np.bincount(ids[ids >= 0].ravel(), minlength=self.inputs.model.num_experts)
                for ids in np.moveaxis(self.test.expert_ids[rows], 1, 0)
            ]
        )

    def problem(self, redundant_experts: int) -> PlacementProblem:
        """Return the placement problem of the training requests on this cluster, with the memory left for experts."""
        if redundant_experts not in self._problems:
            self._problems[redundant_experts] = self._make_problem(redundant_experts)
        return self._problems[redundant_experts]

    def _make_problem(self, redundant_experts: int) -> PlacementProblem:
        model = self.inputs.model
        free = (
            min(self.hardware.memory_of(rank).num_bytes for rank in self.hardware.ranks)
            - model.non_expert_bytes
        )
        problem = problem_from_trace(
            self.train,
            num_ranks=self.hardware.num_ranks,
            ranks_per_node=self.hardware.ranks_per_node,
            redundant_experts=redundant_experts,
            expert_bytes=model.expert_bytes,
            memory_bytes_per_rank=free,
            num_groups=model.num_groups,
        )
        load = self.study.workload
        steps = full_steps(closed_loop_steps(
            self.train, batch_size=min(load.batch_size, len(self.train.requests())), max_steps=TRAIN_STEPS,
            include_prefill=load.include_prefill, seed=self.seed))
        return with_costs(problem, model, self.cost, self.train, steps, self.study.system.dispatch_bytes)

    def check(self) -> None:
        """Raise the error of any plan of the study that cannot work, before the first is simulated."""
        for choice in self.study.placement.plans:
            if choice.plan is not None:
                self.program(read_plan(choice.plan))
            else:
                self.problem(choice.redundant_experts)

    def make_plan(self, choice: PlanChoice) -> PlacementPlan:
        """Solve for a plan, or read it."""
        if choice.plan is not None:
            return read_plan(choice.plan)
        problem = self.problem(choice.redundant_experts)
        limit = self.study.placement.time_limit_s
        plan = place(problem, str(choice.solver), seed=self.seed, time_limit_s=limit, **choice.options).plan
        assert plan is not None  # place() raises otherwise
        return plan

    def program(self, plan: PlacementPlan, cost: CostModel | None = None) -> ExpertParallelProgram:
        """Lower the judged steps under a plan, on the study's machine or on one with other costs."""
        system, cost = self.study.system, cost or self.cost
        if system.execution == "coherent":
            return ContextCoherentProgram(self.inputs.model, self.test, self.steps, plan, cost,
                                   dispatch_bytes=system.dispatch_bytes, gather=system.gather)
        return ExpertParallelProgram(
            self.inputs.model,
            self.test,
            self.steps,
            plan,
            cost,
            dispatch_bytes=system.dispatch_bytes,
            collective=system.collective,
            balancer=system.balancer.options,
        )

    def point(self, choice: PlanChoice, tell: Tell = _quiet) -> PlannedPoint:
        """Make one plan, simulate it, tell the listener, and put its figures beside their bounds."""
        plan = self.make_plan(choice)
        program = self.program(plan)
        warmup = self.study.workload.warmup_steps
        provenance = self.inputs.provenance | {"study": self.study.name, "placement": choice.label}
        result = simulate(
            program, name=f"{self.study.name}/{choice.label}", warmup_steps=warmup, executor=self.execute,
            provenance=provenance,
        )
        row = self._row(choice, plan, program, result)
        tell(row)
        return PlannedPoint(choice.label, plan, self._bounded(row, plan.slots_per_rank), result)

    def bound_s(self, slots_per_rank: int) -> float | None:
        """Return the lower bound on the mean step time of any plan with these slots (LLEP: none)."""
        system = self.study.system
        if system.balancer.name == "llep":  # LLEP computes experts without a slot
            return None
        if slots_per_rank not in self._bounds:
            bound = ExpertParallelBound(self.inputs.model, self.test, self.cost, slots_per_rank, system.dispatch_bytes)
            if system.execution == "coherent":
                bound = ContextCoherentBound(self.inputs.model, self.test, self.cost, slots_per_rank,
                                             system.dispatch_bytes, system.gather)
            parts = [bound.step(step) for step in self.steps[self.study.workload.warmup_steps :]]
            total = sum(part.total_ns for part in parts) / len(parts)
            if (system.execution, system.balancer.name) == ("home", "none"):
                fixed = sum(part.fixed_ns for part in parts) / len(parts)
                total = max(total, fixed + self._one_plan_bound_ns(slots_per_rank))
            self._bounds[slots_per_rank] = s_from_ns(int(total))
        return self._bounds[slots_per_rank]

    def _one_plan_bound_ns(self, slots_per_rank: int) -> float:
        """Return what experts and exchanges of one plan take at least, ns, mean over the judged steps."""
        steps = self.steps[self.study.workload.warmup_steps :]
        problem = PlacementProblem(self.test_load, self.hardware.num_ranks, slots_per_rank, self.hardware.ranks_per_node)
        problem = with_costs(problem, self.inputs.model, self.cost, self.test, steps, self.study.system.dispatch_bytes)
        return prove(problem, "step_time", time_limit_s=BOUND_S).bound

    def _row(
        self,
        choice: PlanChoice,
        plan: PlacementPlan,
        program: ExpertParallelProgram,
        result: SimulationResult,
    ) -> dict[str, Any]:
        """Return the row without its bound on step time, whose proof takes seconds (`_bounded`)."""
        redundant = plan.num_slots - plan.num_experts
        real, best = self._imbalance(plan)
        moved, moved_bytes = program.remote_tokens, program.remote_bytes
        return {
            "placement": choice.label,
            "redundant_experts": redundant,
            "imbalance": real,
            "imbalance_bound": best,
            "imbalance_gap": (real - best) / real,
            "cross_rank_fraction": moved["rank"] / max(1, moved["all"]),
            "cross_node_fraction": moved["node"] / max(1, moved["all"]),
            "cross_rank_bytes_per_step": moved_bytes["rank"] / len(self.steps),
            "cross_node_bytes_per_step": moved_bytes["node"] / len(self.steps),
            "step_time_s": result.summary["step_time_s"],
            "step_time_bound_s": None,
            "step_time_gap": None,
            "tokens_per_s": result.summary["tokens_per_s"],
            "tokens_per_s_bound": None,
            "bound_by": bounded_by(result.tables["critical_path"]),
            "objective_gap": plan.provenance.get("gap"),
            **({"scratch_bytes": program.scratch_bytes} if self.study.system.balancer.name == "llep" else {}),
        }

    def _bounded(self, row: dict[str, Any], slots_per_rank: int) -> dict[str, Any]:
        """Return a row with what no plan with these slots can beat."""
        step_s, bound_s = row["step_time_s"], self.bound_s(slots_per_rank)
        if bound_s is None:
            return row
        return row | {"step_time_bound_s": bound_s, "step_time_gap": (step_s - bound_s) / step_s,
                      "tokens_per_s_bound": row["tokens_per_s"] * step_s / bound_s}

    def _imbalance(self, plan: PlacementPlan) -> tuple[float, float]:
        """Busiest rank over the mean, averaged over layers by load: the plan's, and the least possible."""
        load = self.test_load
        problem = PlacementProblem(load, plan.num_ranks, plan.slots_per_rank, self.hardware.ranks_per_node)
        mean = rank_load(plan, load).mean(axis=1)
        return float(np.average(imbalance(plan, load), weights=mean)), float(
            np.sum(balance_bound(problem)) / mean.sum()
        )

    def notes(self, sources: dict[str, int]) -> tuple[str, ...]:
        """Return what a reader must know."""
        share, balancer = self.study.placement.train_fraction, self.study.system.balancer.name
        return (
            f"{self.hardware.num_ranks} ranks in {self.hardware.num_nodes} nodes of {self.hardware.name}; "
            f"{len(self.steps)} {'' if self.study.workload.include_prefill else 'decode '}steps of {self.study.workload.batch_size} requests.",
            f"Plans are made from {share:.0%} of the requests and judged on the others.",
            *self.inputs.notes(),
            *((COHERENT_NOTE,) if self.study.system.execution == "coherent" else (BOUND_NOTE,)),
            *((BALANCER_NOTE.format(name=balancer),) if balancer != "none" else ()),
            source_note(sources),
        )

    def points(self, tell: Tell = _quiet) -> Iterator[PlannedPoint]:
        """Yield every plan of the study in order; `tell` gets each row as soon as it is simulated, before its bounds."""
        self.check()
        for choice in self.study.placement.plans:
            yield self.point(choice, tell)
