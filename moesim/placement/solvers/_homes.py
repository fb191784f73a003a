"""From homes (one rank per expert) to a plan's slots and back, for the solvers that know no replicas."""

from __future__ import annotations

import numpy as np

from moesim.placement.plan import PlacementPlan


def slots_from_homes(homes: np.ndarray, num_ranks: int, slots_per_rank: int) -> np.ndarray:
    """Return int64[layer, slot] of int[layer, expert] home ranks; every rank has 1 ... `slots_per_rank` experts.

    Each rank lists its experts in rising order. Slots that are left over hold a second (third ...) copy of the rank's
    own experts in turn: a copy beside its original moves no token to another rank, so loads and traffic of the plan are
    exactly those of the homes.
    """
    rows = []
    for layer in homes:
        held = [np.flatnonzero(layer == rank) for rank in range(num_ranks)]
        rows.append(np.concatenate([np.resize(experts, slots_per_rank) for experts in held]))
    return np.stack(rows)


def homes_from_plan(plan: PlacementPlan) -> np.ndarray | None:
    """Return int64[layer, expert] home ranks, or None where an expert has copies on several ranks."""
    rank = plan.slot_rank[np.maximum(plan.logical_to_physical, 0)]
    first = rank[:, :, 0]
    if np.any((plan.logical_to_physical >= 0) & (rank != first[:, :, None])):
        return None
    return first.astype(np.int64)
