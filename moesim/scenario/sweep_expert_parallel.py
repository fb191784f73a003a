"""The expert-parallel side of a sweep: what steps ask of a machine is counted once per plan, then every machine is priced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from moesim.hardware.cost import CostModel
from moesim.hardware.vary import vary
from moesim.lowering.expert_parallel_arrays import supports
from moesim.lowering.expert_parallel_loads import step_loads
from moesim.lowering.expert_parallel_times import StepTimes, step_times
from moesim.placement.plan import PlacementPlan
from moesim.scenario.expert_parallel import ExpertParallelSetup
from moesim.scenario.schema import PlanChoice
from moesim.scenario.sweep_axes import EFFICIENCY
from moesim.simulate.executors import execute
from moesim.simulate.run import step_table
from moesim.units import NS_PER_S


class ExpertParallelSweep:
    """Times the plans of an expert-parallel study on many machines. Plans are made once, on the study's own machine."""

    def __init__(self, setup: ExpertParallelSetup) -> None:
        self.setup = setup

    def check(self, choices: Sequence[PlanChoice], machines: Sequence[dict[str, float]]) -> None:
        """Raise the error of a plan or a machine that cannot work."""
        del choices  # the study has them
        self.setup.check()
        for values in machines:
            self._cost(values)

    def rows(self, choice: PlanChoice, machines: Sequence[dict[str, float]]) -> pd.DataFrame:
        """Return one row per machine: its varied numbers, the plan, and what came out."""
        plan = self.setup.make_plan(choice)
        head: dict[str, Any] = {"placement": choice.label, "redundant_experts": plan.num_slots - plan.num_experts}
        if not supports(self.setup.program(plan)):
            return pd.DataFrame([values | head | self._executed(plan, values) for values in machines])
        inexact = any(values.get(EFFICIENCY, self.setup.cost.route_efficiency) != 1.0 for values in machines)
        loads = step_loads(self.setup.program(plan), keep_sent=inexact)
        system, model = self.setup.study.system, self.setup.inputs.model
        head["imbalance"] = float(loads.imbalance[self.setup.study.workload.warmup_steps:].mean())
        return pd.DataFrame([
            values | head | self._outcome(step_times(loads, model, self._cost(values), dispatch_bytes=system.dispatch_bytes))
            for values in machines])

    def _cost(self, values: dict[str, float]) -> CostModel:
        own = {key: value for key, value in values.items() if key != EFFICIENCY}
        hardware = vary(self.setup.hardware, own) if own else self.setup.hardware
        efficiency = values.get(EFFICIENCY, self.setup.cost.route_efficiency)
        return CostModel(hardware, self.setup.cost.profile, route_efficiency=efficiency)

    def _outcome(self, times: StepTimes) -> dict[str, Any]:
        warmup = self.setup.study.workload.warmup_steps
        parts = times.parts_ns[warmup:].sum(axis=0) / times.parts_ns[warmup:].sum()
        return {
            "cross_node_bytes_per_step": float(times.remote_bytes[warmup:, 2:].sum(axis=1).mean()),
            **self._rates(times.duration_ns[warmup:]),
            "ranks_share": float(parts[0]), "exchange_share": float(parts[1] + parts[3]), "experts_share": float(parts[2]),
        }

    def _executed(self, plan: PlacementPlan, values: dict[str, float]) -> dict[str, Any]:
        """Run a program that has tasks of its own (links one by one, a balancer, tokens that move on)."""
        program = self.setup.program(plan, self._cost(values))
        steps = step_table(program, execute(program).table())
        return self._rates(steps["duration_ns"].to_numpy()[self.setup.study.workload.warmup_steps:])

    def _rates(self, step_ns: np.ndarray) -> dict[str, float]:
        warmup = self.setup.study.workload.warmup_steps
        elapsed_s = int(step_ns.sum()) / NS_PER_S
        tokens = sum(step.num_tokens for step in self.setup.steps[warmup:])
        return {"step_time_s": elapsed_s / len(step_ns), "tokens_per_s": tokens / elapsed_s}
