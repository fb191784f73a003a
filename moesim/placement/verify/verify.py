"""`verify`: does a plan hold what it claims? Nothing here comes from the solvers."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

from moesim.errors import CheckError, unknown
from moesim.placement.certificate import Certificate
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.verify.values import VALUES

Checker = Callable[[PlacementProblem, Certificate], float]

FAMILIES = ("affinity", "balance", "bottleneck", "exact", "fanout", "step_time")
_AGREE = 2.0**-30  # part by which two float64 sums of the same numbers may differ


@dataclass(frozen=True)
class Verdict:
    """What was re-checked.

    Attributes:
        objective: the plan's value computed again; None for a goal that is not one objective.
        bound: what the certificate's multipliers prove, computed again; None without a certificate.
        claims: per claim, whether it holds, in words.
    """

    objective: float | None
    bound: float | None
    claims: tuple[tuple[str, bool], ...]

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(good for _, good in self.claims)


def checkers() -> dict[str, Checker]:
    """Return every checker by the name of its method."""
    found: dict[str, Checker] = {}
    for family in FAMILIES:
        found |= importlib.import_module(f"moesim.placement.verify.{family}").CHECKS
    return found


def check_certificate(problem: PlacementProblem, certificate: Certificate) -> float:
    """Return the bound that the certificate's multipliers prove; raises CheckError if they prove less than it says."""
    known = checkers()
    if certificate.method not in known:
        raise CheckError(str(unknown("proof method", certificate.method, known)))
    bound = known[certificate.method](problem, certificate)
    best = bound >= certificate.bound if _is_lower(certificate) else bound <= certificate.bound
    if not best and not math.isclose(bound, certificate.bound, rel_tol=_AGREE):
        raise CheckError(f"certificate: it claims a bound of {certificate.bound:.9g}, its multipliers prove "
                         f"{bound:.9g}")
    return bound


def _is_lower(certificate: Certificate) -> bool:
    from moesim.placement.objectives import OBJECTIVES

    return OBJECTIVES[certificate.objective].sense == "min"


def verify(problem: PlacementProblem, plan: PlacementPlan, objective: str | None, claimed: float | None,
           certificate: Certificate | None) -> Verdict:
    """Check a plan, its objective's value and its bound against the problem.

    Args:
        objective, claimed: a name of `OBJECTIVES` and the value that the plan's file gives.
        certificate: the proof beside the plan, if any.
    """
    claims = [_claim("the plan fits the problem and its constraints", lambda: problem.check(plan))]
    value = None
    if objective is not None and claims[0][1]:
        value = _value(problem, plan, objective)
        if claimed is not None:
            same = math.isclose(value, claimed, rel_tol=_AGREE)
            claims.append((f"objective {objective}: claimed {claimed:.9g}, computed again {value:.9g}", same))
    bound = None
    if certificate is not None:
        try:
            bound = check_certificate(problem, certificate)
            claims.append((f"bound by {certificate.method}: claimed {certificate.bound:.9g}, proven again "
                           f"{bound:.9g}", True))
        except CheckError as error:
            claims.append((str(error), False))
        claims += _order(value if value is not None else claimed, certificate.bound, _is_lower(certificate))
    return Verdict(value, bound, tuple(claims))


def _value(problem: PlacementProblem, plan: PlacementPlan, objective: str) -> float:
    """Return the objective by plain loops; step time, fan-out and migration by their definition (which is the simulator's)."""
    from moesim.placement.objectives import OBJECTIVES

    return VALUES[objective](problem, plan) if objective in VALUES else OBJECTIVES[objective].value(problem, plan)


def _order(value: float | None, bound: float, lower: bool) -> list[tuple[str, bool]]:
    if value is None:
        return []
    slack = _AGREE * abs(bound)
    return [("the plan is on the right side of its bound", value >= bound - slack if lower else value <= bound + slack)]


def _claim(text: str, check: Callable[[], None]) -> tuple[str, bool]:
    try:
        check()
    except CheckError as error:
        return f"{text}: {error}", False
    return text, True
