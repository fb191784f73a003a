"""How the slots of all layers are divided: by the rules of `cache.allocation`, on what the training requests show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesim.cache.allocation import adapmoe_slots, measured_slots, plec_slots
from moesim.cache.curves import hit_curves
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.scenario.offload_build import Offload
    from moesim.scenario.schema import Point


# by layer, of the repository (Mixtral); the last one, the middle of what it lists further on, stands for all later layers
ADAPMOE_ACCURACY = (0.0, 0.57, 0.72, 0.79, 0.9)


def slots_by_layer(point: Point, offload: Offload) -> np.ndarray:
    """Return int64[layer], at least one slot each and ``slots_per_layer`` times the layers in sum (or all experts).

    - ``uniform``: the same everywhere;
    - ``plec``: in proportion to the distinct experts that training requests use in each layer (ExpertFlow's rule);
    - ``adapmoe``: by AdapMoE's program, with the point's `prefetch_recall` as accuracy in every layer but the first (without one
      the accuracies of its repository, which are Mixtral's) and the share of training tokens that use one expert;
    - ``measured``: the fewest misses of an LRU cache on the training requests.

    Raises:
        InputError: a shared pool, which has nothing to divide.
    """
    model = offload.model
    layers, experts = model.num_moe_layers, model.num_experts
    if offload.shared:
        raise InputError(f"allocation: {point.allocation} divides slots between layers; it needs cache.shared: false")
    total = min(point.slots_per_layer, experts) * layers
    if point.allocation == "plec":
        return _at_least_one(plec_slots(_demand(offload), total), experts)
    if point.allocation == "adapmoe":
        stated = point.prefetch_recall
        known = ADAPMOE_ACCURACY if stated is None else (0.0, stated)
        accuracy = [known[min(layer, len(known) - 1)] for layer in range(layers)]
        return adapmoe_slots(total, accuracy, _single_share(offload), experts, model.top_k)
    if point.allocation == "measured":
        curve = hit_curves(offload.training[0], experts, num_layers=layers, policies=("lru",))["lru"]
        return measured_slots(curve, total)
    return np.full(layers, total // layers, np.int64)


def _demand(offload: Offload) -> list[int]:
    """Distinct experts of each layer that a training request uses, in sum over the requests."""
    train = offload.train
    wanted = np.zeros(train.num_layers, np.int64)
    for request in np.unique(train.request_id):
        ids = train.expert_ids[train.request_id == request]
        wanted += [len(np.unique(layer[layer >= 0])) for layer in ids.transpose(1, 0, 2)]
    return wanted.tolist()


def _single_share(offload: Offload) -> list[float]:
    """The share of training tokens with one expert, by layer."""
    return ((offload.train.expert_ids >= 0).sum(axis=2) == 1).mean(axis=0).tolist()


def _at_least_one(slots: np.ndarray, experts: int) -> np.ndarray:
    """Return the slots with none below one and none above `experts`; what is short comes from the largest."""
    slots = slots.copy()
    while slots.min() < 1 or slots.max() > experts:
        source = int(slots.argmax())
        slots[source] -= 1
        slots[int(slots.argmin())] += 1
    return slots
