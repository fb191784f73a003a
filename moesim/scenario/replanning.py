"""Rolling replanning: plan again every N steps from the last ones, pay for the moves, and compare with one plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.step_cost import step_sample
from moesim.placement.place import place
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.scenario.placing import PlaceSetup
from moesim.simulate.executors import execute
from moesim.simulate.run import simulate
from moesim.traces.stats import load_counts, transition_counts
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace


@dataclass(frozen=True)
class Rolling:
    """How to replan.

    Attributes:
        every: steps between two plans.
        window: the last steps that a plan is made from.
        solver, objective, options, time_limit_s: of every replanning.
    """

    every: int
    window: int
    solver: str
    objective: str | None
    time_limit_s: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 1 or self.window < 1:
            raise InputError(f"rolling: every and window must be at least 1 step, got {self.every} and {self.window}")


def migration_traffic(before: PlacementPlan, after: PlacementPlan, expert_bytes: np.ndarray,
                      ranks_per_node: int) -> np.ndarray:
    """Return float64[rank, rank], bytes copied between ranks to get from one plan to another.

    An expert that a rank newly holds comes from the holder with the fewest bytes to send so far, one of the same
    node before one of another.
    """
    traffic = np.zeros((before.num_ranks, before.num_ranks))
    for layer in range(before.num_layers):
        held = np.zeros((2, before.num_ranks, before.num_experts), bool)
        for which, plan in enumerate((before, after)):
            held[which, plan.slot_rank, plan.physical_to_logical[layer]] = True
        for rank, expert in np.argwhere(held[1] & ~held[0]).tolist():
            sources = np.flatnonzero(held[0, :, expert]).tolist()
            best = min(sources, key=lambda source: (
                source // ranks_per_node != rank // ranks_per_node, traffic[source].sum(), source))
            traffic[best, rank] += float(expert_bytes[layer])
    return traffic


def migration_seconds(before: PlacementPlan, after: PlacementPlan, problem: PlacementProblem,
                      cost: CostModel) -> tuple[float, float]:
    """Return (seconds, bytes) of the copies, all at once over the fabrics, nothing else running."""
    traffic = migration_traffic(before, after, problem.expert_bytes, problem.ranks_per_node)
    return (cost.all_to_all(traffic).seconds if traffic.any() else 0.0), float(traffic.sum())


class Replanner:
    """One run through the held-out steps under a static plan and under plans that roll along."""

    def __init__(self, setup: PlaceSetup, rolling: Rolling, max_steps: int) -> None:
        self.setup, self.rolling = setup, rolling
        self.trace: RoutingTrace = setup.test or setup.train
        self.steps = setup.steps_of(self.trace, max_steps)
        if len(self.steps) <= rolling.every:
            raise InputError(f"rolling: {len(self.steps)} steps are left to run, and a new plan comes every "
                             f"{rolling.every}; use a longer trace or a smaller --every")

    def rows(self, static: PlacementPlan) -> Iterator[dict[str, Any]]:
        """Yield per block of steps: the static plan's and the rolling plan's step time, and the moves paid."""
        rolling, every = static, self.rolling.every
        for start in range(0, len(self.steps), every):
            moved_s, moved_bytes = 0.0, 0.0
            if start:
                new = self._replan(self.steps[max(0, start - self.rolling.window):start], rolling)
                moved_s, moved_bytes = migration_seconds(rolling, new, self.setup.problem, self.setup.cost)
                rolling = new
            block = self.steps[start:start + every]
            times = [self._seconds(plan, block) for plan in (static, rolling)]
            yield {"first_step": start, "num_steps": len(block), "static_step_time_s": times[0],
                   "rolling_step_time_s": times[1], "migration_time_s": moved_s, "migration_bytes": moved_bytes}

    def _seconds(self, plan: PlacementPlan, steps: list[Step]) -> float:
        renumbered = [dataclasses.replace(step, index=index) for index, step in enumerate(steps)]
        result = simulate(self.setup.program(plan, renumbered), name="rolling", executor=execute)
        return float(result.summary["step_time_s"])

    def _replan(self, window: list[Step], current: PlacementPlan) -> PlacementPlan:
        rows = np.concatenate([step.rows for step in window])
        seen = self.trace.take(np.unique(rows))
        problem = dataclasses.replace(
            self.setup.problem, expert_load=load_counts(seen), current=current,
            transitions=transition_counts(seen).astype(np.float64) if seen.num_layers > 1 else None,
            steps=step_sample(self.trace, window, self.setup.hardware.num_ranks))
        plan = place(problem, self.rolling.solver, seed=self.setup.request.seed, objective=self.rolling.objective,
                     time_limit_s=self.rolling.time_limit_s, **self.rolling.options).plan
        assert plan is not None  # place() raises otherwise
        return plan


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean step time of both, the rolling one with its moves paid."""
    steps = sum(row["num_steps"] for row in rows)

    def mean(value: Callable[[dict[str, Any]], float]) -> float:
        return sum(value(row) for row in rows) / steps

    return {"static_step_time_s": mean(lambda row: row["static_step_time_s"] * row["num_steps"]),
            "rolling_step_time_s": mean(lambda row: row["rolling_step_time_s"] * row["num_steps"]),
            "moves_step_time_s": mean(lambda row: row["migration_time_s"]),
            "rolling_with_moves_step_time_s": mean(
                lambda row: row["rolling_step_time_s"] * row["num_steps"] + row["migration_time_s"]),
            "migration_bytes": sum(row["migration_bytes"] for row in rows)}


def static_plan(setup: PlaceSetup, rolling: Rolling) -> PlacementPlan:
    """Return the plan that stays: the same solver's, from the training part."""
    plan = place(setup.problem, rolling.solver, seed=setup.request.seed, objective=rolling.objective,
                 time_limit_s=rolling.time_limit_s, **rolling.options).plan
    assert plan is not None  # place() raises otherwise
    return plan
