"""Exact split of tokens over replicas: the shares that make the busiest rank as light as a plan allows."""

from __future__ import annotations

import dataclasses

import numpy as np

from moesim.errors import InputError
from moesim.placement.plan import PlacementPlan


@dataclasses.dataclass(frozen=True)
class LayerSplit:
    """The best split of one layer.

    Attributes:
        tokens: float64[slot], tokens that each slot serves (fractional).
        largest: the largest rank load of `tokens`, the least possible, up to 2^-40 of the layer's load.
        forced: bool[rank], the proof: the experts of which every copy is on these ranks have `largest` tokens per
            rank of the set. All True where `largest` is the mean rank load.
    """

    tokens: np.ndarray
    largest: float
    forced: np.ndarray


def split_layer(slots: np.ndarray, load: np.ndarray, num_ranks: int) -> LayerSplit:
    """Return the split of one layer's tokens over replicas that minimises the largest rank load.

    The linear program ``min max_r sum_(s of r) x_s`` with ``sum_(s of e) x_s = load_e``, ``x >= 0`` (LPLB's, for any
    copies), solved by maximum flow and Newton steps on the cut (`placement.kernels.split`); by duality the value is
    ``max over sets B of ranks of load(experts with all copies in B) / |B|``.

    Args:
        slots: int[slot], the expert in each slot; every expert has one.
        load: float[expert], tokens, not negative.
        num_ranks: ranks; each owns an equal run of slots.

    Raises:
        InputError: slots that do not divide over the ranks, an expert without a slot, or a load that is not finite.
    """
    from moesim.placement.kernels import split as kernels

    slots, load = np.array(slots, np.int32), np.array(load, np.float64)
    _check(slots[None], load[None], num_ranks)
    tokens, largest, forced = kernels.split_layer(slots, load, num_ranks)
    return LayerSplit(tokens, float(largest), forced)


def optimal_split(plan: PlacementPlan, load: np.ndarray) -> np.ndarray:
    """Return float64[layer, slot], shares for `PlacementPlan.slot_share` that minimise every layer's largest rank load.

    An expert without load keeps an even split.

    Args:
        plan: where the copies are; its own shares do not matter.
        load: float[layer, expert], tokens to be split.

    Raises:
        InputError: a load of another shape, negative or not finite.
    """
    from moesim.placement.kernels import split as kernels

    if np.shape(load) != (plan.num_layers, plan.num_experts):
        raise InputError(f"split: load must be [layer, expert] = {(plan.num_layers, plan.num_experts)}, "
                         f"got {np.shape(load)}")
    slots, load = np.array(plan.physical_to_logical, np.int32), np.array(load, np.float64)
    _check(slots, load, plan.num_ranks)
    tokens, _ = kernels.split_layers(slots, load, plan.num_ranks)
    whole = np.take_along_axis(load, slots.astype(np.intp), axis=1)
    even = 1.0 / np.take_along_axis(plan.replica_count, slots.astype(np.intp), axis=1)
    return np.divide(tokens, whole, out=even, where=whole > 0)


def static_split(plan: PlacementPlan, load: np.ndarray) -> PlacementPlan:
    """Return `plan` with the shares that are best for a training load; they then stay as they are."""
    return dataclasses.replace(plan, slot_share=optimal_split(plan, load))


def _check(slots: np.ndarray, load: np.ndarray, num_ranks: int) -> None:
    if slots.shape[1] < 1 or num_ranks < 1 or slots.shape[1] % num_ranks:
        raise InputError(f"split: {slots.shape[1]} slots do not divide over {num_ranks} ranks")
    if not np.all(np.isfinite(load)) or load.min(initial=0.0) < 0:
        raise InputError("split: loads must be finite and not negative")
    if slots.min() < 0 or slots.max() >= load.shape[1]:
        raise InputError(f"split: slots must hold experts 0 ... {load.shape[1] - 1}")
    for row in slots:
        missing = np.flatnonzero(np.bincount(row, minlength=load.shape[1]) == 0)
        if len(missing):
            raise InputError(f"split: expert {missing[0]} has no slot")
