"""Call a solver with what it can take of the common keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.result import SolveResult

COMMON = ("seed", "time_limit_s", "starts", "progress")


def takes(function: Callable[..., Any], name: str) -> bool:
    """Return whether a solver has a keyword of its own by this name."""
    return name in inspect.signature(function).parameters


def call_solver(function: Callable[..., SolveResult], problem: PlacementProblem, *, seed: int, time_limit_s: float,
                starts: Sequence[PlacementPlan] = (), progress: Progress | None = None,
                **options: Any) -> SolveResult:
    """Call `function`, leaving out `starts` and `progress` where it does not know them."""
    more = {"starts": tuple(starts), "progress": progress}
    known = {name: value for name, value in more.items() if takes(function, name)}
    return function(problem, seed=seed, time_limit_s=time_limit_s, **known, **options)
