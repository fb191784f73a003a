"""Goal: one objective, a weighted sum of several, or several in order of importance."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moesim.errors import InputError
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.objectives.objective import Objective
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem

SAME = 2.0**-20  # values closer than this part of the larger one count as equal in a lexicographic order
_TERM = re.compile(r"\s*(?:(?P<weight>[0-9.eE+-]+?)\s*\*\s*)?(?P<name>[a-z_]+)\s*$")


@dataclass(frozen=True)
class Goal:
    """What a plan is chosen by.

    Attributes:
        levels: the most important level first; each level is a weighted sum of objectives, ``(weight, objective)``.
            An objective that is maximised enters with its sign turned, so that every level is minimised.
    """

    levels: tuple[tuple[tuple[float, Objective], ...], ...]

    @property
    def single(self) -> Objective | None:
        """The objective, where the goal is just one."""
        return self.levels[0][0][1] if len(self.objectives) == 1 else None

    @property
    def objectives(self) -> list[Objective]:
        """Every objective of the goal, in order, each once."""
        return list({one.name: one for level in self.levels for _, one in level}.values())

    @property
    def name(self) -> str:
        """The goal as `parse_goal` reads it."""
        if self.single:
            return self.single.name
        return ",".join("+".join(f"{weight:g}*{one.name}" for weight, one in level) for level in self.levels)

    @property
    def execution(self) -> str:
        """``home`` or ``coherent`` if an objective matters only there, else ``any``."""
        return next((one.execution for one in self.objectives if one.execution != "any"), "any")

    def check(self, problem: PlacementProblem) -> None:
        """Raise InputError if the problem lacks what an objective needs."""
        for one in self.objectives:
            one.check(problem)

    def key(self, problem: PlacementProblem, plan: PlacementPlan) -> tuple[float, ...]:
        """Return the plan's value at every level, to be minimised."""
        values = {one.name: one.value(problem, plan) * (1 if one.sense == "min" else -1) for one in self.objectives}
        return tuple(sum(weight * values[one.name] for weight, one in level) for level in self.levels)

    def better(self, new: tuple[float, ...], old: tuple[float, ...]) -> bool:
        """Return whether `new` comes before `old`: at the first level at which they differ by more than `SAME`."""
        for first, second in zip(new, old, strict=True):
            if abs(first - second) > SAME * max(abs(first), abs(second)):
                return first < second
        return False


def parse_goal(text: str) -> Goal:
    """Return the goal of ``step_time``, ``balance,fanout`` (in order of importance) or ``step_time+0.5*migration``.

    Raises:
        InputError: an unknown objective, a weight that is no positive number, or nothing.
    """
    levels = tuple(tuple(_term(term, text) for term in _terms(level)) for level in text.split(","))
    names = [one.name for level in levels for _, one in level]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"objective {text!r}: {twice!r} appears twice")
    return Goal(levels)


def _terms(level: str) -> list[str]:
    # a plus inside a number (1e+3) does not part two terms
    return re.split(r"(?<![0-9.][eE])\+", level)


def _term(term: str, text: str) -> tuple[float, Objective]:
    found = _TERM.match(term)
    if not found:
        raise InputError(f"objective {text!r}: expected NAME, WEIGHT*NAME+..., or NAME,NAME in order of importance; "
                         f"cannot read {term.strip()!r}")
    try:
        weight = float(found["weight"] or 1.0)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise InputError(f"objective {text!r}: the weight {found['weight']!r} is not a positive number")
    return weight, OBJECTIVES[found["name"]]
