"""SolveResult: a solver's answer with its status, objective and proven bound."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from moesim.placement.certificate import Certificate
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
    """A plan or none, with its objective and what is proven about it.

    Attributes:
        objective_name: what was minimised or maximised (`sense`), in words with the unit.
        objective_bound: proven: no plan is lower (``min``) or higher (``max``); None without a proof.
        bound_method: how it was proven, e.g. ``counting``, ``b-matching``, ``chain SDP``, ``enumeration``.
        certificate: the multipliers of the proof, where it has any.
    """

    solver: str
    status: SolveStatus
    plan: PlacementPlan | None
    objective_name: str
    objective: float | None
    objective_bound: float | None
    time_s: float
    seed: int
    sense: str = "min"
    bound_method: str = ""
    certificate: Certificate | None = None

    @property
    def gap(self) -> float | None:
        """`relative_gap` of objective and bound; None without a proven bound."""
        if self.objective is None or self.objective_bound is None:
            return None
        return relative_gap(self.objective, self.objective_bound, self.sense)


def relative_gap(objective: float, bound: float, sense: str = "min") -> float:
    """Return the share that could still be won, in 0 ... 1.

    ``(objective - bound) / objective`` where the objective is minimised, ``(bound - objective) / bound`` where it
    is maximised: never flattered by a large part of the objective that no plan can touch.
    """
    larger, smaller = (objective, bound) if sense == "min" else (bound, objective)
    return 0.0 if larger <= 0 else max(0.0, (larger - smaller) / larger)
