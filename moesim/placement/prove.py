"""`prove`: the tightest bound on an objective that the known methods reach in the time given."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from moesim.errors import MoesimError
from moesim.placement.certificate import Certificate
from moesim.placement.goal import Goal
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress

Prover = Callable[..., Certificate]

# by objective, imported when asked for (some load numba)
PROVERS: dict[str, str] = {
    "balance": "moesim.placement.bounds.balance:prove_balance",
    "affinity": "moesim.placement.bounds.chain_sdp:prove_affinity",
    "hops": "moesim.placement.bounds.chain_sdp:prove_hops",
    "bottleneck": "moesim.placement.bounds.bottleneck:prove_bottleneck",
    "fanout": "moesim.placement.bounds.fanout:prove_fanout",
    "step_time": "moesim.placement.bounds.step_time:prove_step_time",
}


def prove(problem: PlacementProblem, objective: str, *, seed: int = 0, time_limit_s: float = 1.0,
          incumbent: PlacementPlan | None = None, progress: Progress | None = None) -> Certificate:
    """Return a certificate of the best bound on `objective` over all plans of `problem` found in the time.

    Constraints of the problem are not used: what no plan can reach, no constrained plan can. Migration needs no
    proof: nothing is less than no move.

    Args:
        objective: a name of `OBJECTIVES` with a prover; others are an InputError of the registry.
        time_limit_s: seconds; the quick methods run however little is given.
        incumbent: the best plan known, from which some methods start.
    """
    if objective == "migration":
        return Certificate(objective, "nothing", 0.0)
    module, _, function = PROVERS[objective].partition(":")
    prover: Prover = getattr(importlib.import_module(module), function)
    return prover(problem, seed=seed, time_limit_s=time_limit_s, incumbent=incumbent, progress=progress)


def goal_bound(problem: PlacementProblem, goal: Goal, *, seed: int, time_limit_s: float,
               incumbent: PlacementPlan | None = None) -> float | None:
    """Return a bound on the goal's first level: the weighted sum of the bounds of its objectives.

    None where one of them has no bound or the methods cannot handle the problem.
    """
    total = 0.0
    for weight, one in goal.levels[0]:
        if one.name not in PROVERS and one.name != "migration":
            return None
        try:
            share_s = time_limit_s / len(goal.levels[0])
            bound = prove(problem, one.name, seed=seed, time_limit_s=share_s, incumbent=incumbent).bound
        except MoesimError:
            return None
        total += weight * (bound if one.sense == "min" else -bound)
    return total
