"""The type of an objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moesim.errors import InputError
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem

HOME, COHERENT, ANY = "home", "coherent", "any"
_MISSING = {
    "transitions": "transitions between layers (a trace with token identity, two MoE layers or more)",
    "steps": "token sets step by step (a trace, not counts)",
    "step_cost": "the costs of a layer on a machine (a model and a hardware file)",
    "rates": "rates of compute and exchange (a model and a hardware file)",
    "current": "the plan that is loaded now (--from)",
}


@dataclass(frozen=True)
class Objective:
    """One way to judge a plan.

    Attributes:
        name: the registry's name.
        unit: what the value is, in words with its unit.
        sense: ``min`` or ``max``.
        execution: ``home``, ``coherent`` or ``any``: where it matters.
        matters: one sentence on that.
        needs: fields of the problem that must not be None.
        score: ``(problem, plan) -> float``; call it through `value`.
    """

    name: str
    unit: str
    sense: str
    execution: str
    matters: str
    needs: tuple[str, ...]
    score: Callable[[PlacementProblem, PlacementPlan], float]

    def value(self, problem: PlacementProblem, plan: PlacementPlan) -> float:
        """Return the plan's value; raises InputError if the problem lacks what the objective needs."""
        self.check(problem)
        return self.score(problem, plan)

    def check(self, problem: PlacementProblem) -> None:
        """Raise InputError if the problem lacks what the objective needs."""
        for name in self.needs:
            if getattr(problem, name) is None:
                raise InputError(f"objective {self.name!r} needs {_MISSING[name]}")

    def better(self, new: float, old: float) -> bool:
        """Return whether `new` is better than `old`."""
        return new < old if self.sense == "min" else new > old
