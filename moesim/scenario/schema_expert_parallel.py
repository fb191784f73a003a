"""The study kind ``expert_parallel``: plans to compare, and the system they run on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moesim.errors import did_you_mean
from moesim.scenario.balancer import Balancer, BalancerChoice
from moesim.scenario.schema_base import (
    Fraction,
    HardwareChoice,
    Natural,
    Part,
    Positive,
    Rows,
    SolverName,
    StudyBase,
    Text,
    Workload,
)


class PlanChoice(Part):
    """A plan to make with a solver and its options, or one to read from a ``*.plan.json``."""

    solver: SolverName | None = None
    plan: Text | None = None
    redundant_experts: Natural = 0
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            if not isinstance(value, (str, int, float, bool)):
                raise ValueError(f"option {key!r} must be text, a number, true or false, got {value!r}")
        return options

    @model_validator(mode="after")
    def _check_one_source(self) -> PlanChoice:
        if (self.solver is None) == (self.plan is None):
            raise ValueError("give either 'solver' or 'plan'")
        if self.plan is not None and (self.redundant_experts or self.options):
            raise ValueError("'redundant_experts' and 'options' belong to a solver; a plan has its own")
        if self.solver is not None:
            _check_solver_options(self.solver, self.options)
        return self

    @property
    def label(self) -> str:
        """The solver's name, or the plan file's name without its endings."""
        return self.solver or Path(str(self.plan)).name.removesuffix(".json").removesuffix(".plan")


def _check_solver_options(solver: str, options: Iterable[str]) -> None:
    import inspect

    from moesim.placement.solvers import SOLVERS

    parameters = inspect.signature(SOLVERS[solver]).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"seed", "time_limit_s", "starts", "progress"}
    for name in options:
        if name not in known:
            raise ValueError(f"solver {solver!r} has no option {name!r}."
                             f"{did_you_mean(name, known) or ' It takes none.'}")


class PlacementChoice(Part):
    """Plans to compare: made from `train_fraction` of the requests, judged on the others."""

    train_fraction: Fraction = 0.5
    time_limit_s: Positive = 10.0
    plans: Rows[PlanChoice]


class ExpertParallelSystem(Part):
    """`collective`: one task per all-to-all, or one per transfer. `balancer`: see `moesim.scenario.balancer`.

    `dispatch_bytes`: bytes per hidden value sent out (None: the activations'). `execution`: tokens return ``home``
    after each layer, or move on (``coherent``: context on every rank); then `gather` is what ends each step.
    """

    collective: Literal["closed_form", "per_link"] = "closed_form"
    dispatch_bytes: Positive | None = None
    execution: Literal["home", "coherent"] = "home"
    gather: Literal["kv", "activations", "ids"] = "kv"
    balancer: Balancer = BalancerChoice()

    @model_validator(mode="after")
    def _check_execution(self) -> ExpertParallelSystem:
        self.balancer.check(self.execution)
        if self.execution == "coherent" and self.collective != "closed_form":
            raise ValueError(f"execution: coherent knows collective: closed_form only, not {self.collective}")
        if self.execution == "home" and "gather" in self.model_fields_set:
            raise ValueError("'gather' belongs to execution: coherent")
        return self


class ExpertParallelStudy(StudyBase):
    """Which rank should hold which expert?"""

    kind: Literal["expert_parallel"]
    hardware: HardwareChoice
    profile: Text | None = None
    workload: Workload
    placement: PlacementChoice
    system: ExpertParallelSystem = ExpertParallelSystem()
