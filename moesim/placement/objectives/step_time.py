"""Step time: experts and both all-to-alls of every MoE layer, step by step, exactly as the simulator costs them."""

from __future__ import annotations

import itertools

import numpy as np

from moesim.errors import InputError
from moesim.placement.objectives.fanout import slots_by_step
from moesim.placement.objectives.objective import HOME, Objective
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem


def layer_times_ns(problem: PlacementProblem, plan: PlacementPlan) -> np.ndarray:
    """Return int64[step, layer], ns from the slowest router of a layer to the end of its combine.

    ``dispatch + max_r experts(rows, distinct experts, largest expert of rank r) + combine``, where a rank's experts
    also wait for its shared experts (`TimedSteps.until_ns`) and the layer ends no sooner than those. With the
    collectives in closed form the simulated times of two plans differ by the difference of these sums, to the ns. Steps
    without `until_ns` (a model with shared experts, `step_sample` without its model) leave that wait out: then too
    small by at most the largest `until_ns` of each layer.

    To score a plan on other steps: ``layer_times_ns(dataclasses.replace(problem, steps=held_out), plan)``.
    """
    steps = problem.steps
    assert steps is not None
    assert problem.step_cost is not None
    if int(steps.home_rank.max()) >= plan.num_ranks or int(steps.home_rank.min()) < 0:
        raise InputError(f"steps: home_rank must be in 0 ... {plan.num_ranks - 1}")
    slots = slots_by_step(problem, plan)
    until = getattr(steps, "until_ns", None)
    cuts = steps.starts
    times = np.empty((steps.num_steps, plan.num_layers), np.int64)
    for step, (first, last) in enumerate(itertools.pairwise(cuts)):
        waits = np.zeros((plan.num_layers, plan.num_ranks), np.int64) if until is None else np.maximum(until[step], 0)
        times[step] = _step_ns(problem, plan, slots[first:last], steps.home_rank[first:last], waits)
    return times


def _step_ns(problem: PlacementProblem, plan: PlacementPlan, slots: np.ndarray, home: np.ndarray,
             until: np.ndarray) -> np.ndarray:
    """Return int64[layer] of one step: int32[token, layer, k] slots, int32[token] homes, int64[layer, rank] waits."""
    cost = problem.step_cost
    assert cost is not None
    sent = sent_tokens(plan, slots, home)
    node = np.arange(plan.num_ranks) // problem.ranks_per_node
    same_node = node[:, None] == node[None, :]
    dispatch = cost.exchanges_ns(sent, "dispatch", same_node)
    combine = cost.exchanges_ns(np.swapaxes(sent, 1, 2), "combine", same_node)
    counts = slot_tokens(plan, slots).reshape(plan.num_layers, plan.num_ranks, plan.slots_per_rank)
    rows = counts.sum(axis=2)
    kernels = cost.kernels_ns(rows, np.count_nonzero(counts, axis=2), counts.max(axis=2))
    start = np.maximum(dispatch[:, None], until)
    experts = np.where(rows > 0, start + kernels, dispatch[:, None]).max(axis=1)
    return np.maximum(experts + combine, until.max(axis=1))


def slot_tokens(plan: PlacementPlan, slots: np.ndarray) -> np.ndarray:
    """Return int64[layer, slot], uses of each slot, from int32[token, layer, k] slots (-1 pads)."""
    keys = np.where(slots < 0, -1, slots + (np.arange(plan.num_layers) * plan.num_slots)[None, :, None])
    total = plan.num_layers * plan.num_slots
    return np.bincount(keys[keys >= 0].ravel(), minlength=total).reshape(plan.num_layers, plan.num_slots)


def sent_tokens(plan: PlacementPlan, slots: np.ndarray, home: np.ndarray) -> np.ndarray:
    """Return int64[layer, home rank, expert rank]: a token counts once per rank it reaches, however many experts."""
    num_tokens, num_ranks = len(slots), plan.num_ranks
    ranks = np.where(slots < 0, num_ranks, slots // plan.slots_per_rank)
    reached = np.zeros((num_tokens, plan.num_layers, num_ranks + 1), np.float32)
    np.put_along_axis(reached, ranks, 1.0, axis=2)
    owner = np.zeros((num_ranks, num_tokens), np.float32)
    owner[home, np.arange(num_tokens)] = 1.0
    # float32 sums of ones are exact below 2**24 tokens
    flat = owner @ reached[:, :, :num_ranks].reshape(num_tokens, -1)
    return np.rint(flat.reshape(num_ranks, plan.num_layers, num_ranks)).astype(np.int64).transpose(1, 0, 2)


def _score(problem: PlacementProblem, plan: PlacementPlan) -> float:
    return float(layer_times_ns(problem, plan).sum(axis=1).mean())


STEP_TIME = Objective(
    "step_time", "experts and exchanges of one step, ns, mean over the sampled steps", "min", HOME,
    "matters where tokens return home after each layer; what the simulator adds to it (attention, router, head) no "
    "plan changes", ("steps", "step_cost"), _score)
