"""SolveResult: a solver's answer with its status, objective and proven bound."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from moesim.placement.plan import PlacementPlan


class SolveStatus(enum.Enum):
    """How a solver ended."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"

    @property
    def has_plan(self) -> bool:
        """Whether a plan comes with this status."""
        return self in (SolveStatus.OPTIMAL, SolveStatus.FEASIBLE)


@dataclass(frozen=True)
class SolveResult:
    """A plan or none. `objective` is minimised; `objective_bound` is proven (no plan can be lower), or None.

    `objective_name` says what was minimised, in words with the unit.
    """

    solver: str
    status: SolveStatus
    plan: PlacementPlan | None
    objective_name: str
    objective: float | None
    objective_bound: float | None
    time_s: float
    seed: int

    @property
    def gap(self) -> float | None:
        """``(objective - bound) / objective``, in 0 ... 1; None without a proven bound."""
        if self.objective is None or self.objective_bound is None:
            return None
        return 0.0 if self.objective <= 0 else max(0.0, (self.objective - self.objective_bound) / self.objective)
