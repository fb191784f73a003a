"""Step time: experts and both all-to-alls of every MoE layer, step by step, exactly as the simulator costs them."""

from __future__ import annotations

import numpy as np

from moesim.placement.metrics import slot_of_token
from moesim.placement.objectives.objective import HOME, Objective
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem


def layer_times_ns(problem: PlacementProblem, plan: PlacementPlan) -> np.ndarray:
    """Return int64[step, layer], dispatch + slowest rank's expert kernel + combine (see `StepCost`)."""
    raise NotImplementedError


def _score(problem: PlacementProblem, plan: PlacementPlan) -> float:
    return float(layer_times_ns(problem, plan).sum(axis=1).mean())


STEP_TIME = Objective(
    "step_time", "experts and exchanges of one step, ns, mean over the sampled steps", "min", HOME,
    "matters where tokens return home after each layer; what the simulator adds to it (attention, router, head) no "
    "plan changes", ("steps", "step_cost"), _score)
_ = (np, slot_of_token)
