"""A lower bound on misses that holds for every eviction, admission and prefetch policy."""

from __future__ import annotations

import heapq
from collections.abc import Collection

import numpy as np

from moesim.cache.policy import AccessStream
from moesim.errors import InputError


def fewest_misses(
    stream: AccessStream,
    num_experts: int,
    slots_per_layer: int,
    *,
    preload: Collection[int] = (),
    shared: bool = False,
) -> np.ndarray:
    """Return int64[access], the misses of an offline optimum; their sum is a proven minimum.

    A hit needs its expert kept from its last use (or from the preload). Each such stay is an interval of time, and at most
    as many may overlap as there are slots. Taking intervals by their end, and dropping the one that ends last
    when a slot is short, keeps the largest possible number of them (Carlisle and Lloyd, Discrete Applied Mathematics 59,
    1995). It is Belady's rule with bypass, so it is a relaxation of every real cache: contents may change
    freely between accesses, and an expert in use need not hold a slot.

    Raises:
        InputError: no slots, or a preload larger than the slots.
    """
    if slots_per_layer < 1:
        raise InputError(f"slots_per_layer must be at least 1, got {slots_per_layer}")
    layers, keys = np.repeat(stream.layers, np.diff(stream.offsets)), stream.keys(num_experts)
    access = np.repeat(np.arange(stream.num_accesses), np.diff(stream.offsets))
    misses = np.zeros(stream.num_accesses, np.int64)
    pools = (
        [np.arange(len(keys))] if shared else [np.flatnonzero(layers == layer) for layer in np.unique(layers)]
    )
    capacity = slots_per_layer * (int(layers.max()) + 1) if shared else slots_per_layer
    for pool in pools:
        own = {key for key in preload if shared or key // num_experts == layers[pool[0]]}
        if len(own) > capacity:
            raise InputError(f"the preload holds {len(own)} experts for {capacity} slots")
        np.add.at(misses, access[pool], _pool_misses(access[pool], keys[pool], capacity, own))
    return misses


def _pool_misses(access: np.ndarray, keys: np.ndarray, capacity: int, preload: Collection[int]) -> np.ndarray:
    """int64[use]: 1 where the optimum misses. `kept` holds keys with their next use; the farthest leaves first."""
    next_use = _next_uses(keys)
    missed = np.ones(len(keys), np.int64)
    first = {int(key): place for place, key in reversed(list(enumerate(keys.tolist())))}
    kept: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    for key in sorted(preload):
        if key in first:
            kept[key] = first[key]
            heapq.heappush(farthest, (-first[key], key))
    cuts = np.flatnonzero(np.diff(access)) + 1
    for uses in np.split(np.arange(len(keys)), cuts):
        for use in uses.tolist():
            if kept.pop(int(keys[use]), None) == use:
                missed[use] = 0
        for use in uses.tolist():
            if next_use[use] >= 0:
                kept[int(keys[use])] = int(next_use[use])
                heapq.heappush(farthest, (-int(next_use[use]), int(keys[use])))
        while len(kept) > capacity:
            until, key = heapq.heappop(farthest)
            if kept.get(key) == -until:
                del kept[key]
    return missed


def _next_uses(keys: np.ndarray) -> np.ndarray:
    """int64[use]: the next use of the same key, -1 if there is none."""
    following = np.full(len(keys), -1, np.int64)
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following
