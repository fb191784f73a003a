"""A lower bound on misses that holds for every eviction, admission and prefetch policy."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from moesim.cache.compiled_layout import FREE, MAX_USES, SOON, Layout
from moesim.cache.policy import AccessStream
from moesim.errors import InputError


def fewest_misses(
    stream: AccessStream,
    num_experts: int,
    slots_per_layer: int | Sequence[int],
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

    Args:
        slots_per_layer: of every layer, or of each; `shared` pools them all.

    Raises:
        InputError: no slots, not one number per layer, a preload larger than the slots, or a stream of another model or
            of more than 2^31 uses.
    """
    if len(stream.experts) > MAX_USES:
        raise InputError(f"the stream has {len(stream.experts)} uses; at most {MAX_USES} can be counted")
    num_layers = int(stream.layers.max()) + 1
    stream.check_fits(num_layers, num_experts)
    layout = Layout(num_layers, num_experts, shared)
    keys = _own_preload(stream, preload, layout)
    capacity = pool_slots(slots_per_layer, num_layers, shared)
    held = np.bincount(np.zeros(len(keys), int) if shared else keys // num_experts, minlength=layout.num_pools)
    if np.any(full := held[:layout.num_pools] > capacity):
        pool = int(np.argmax(full))
        raise InputError(f"the preload holds {held[pool]} experts for {capacity[pool]} slots")
    return _misses(stream, layout, keys[keys < num_layers * num_experts], capacity)


def pool_slots(slots_per_layer: int | Sequence[int], num_layers: int, shared: bool) -> np.ndarray:
    """Return int64[pool], the slots of each layer's pool, or of the one that all share.

    Raises:
        InputError: a layer without slots, or fewer numbers than layers.
    """
    slots = np.asarray(slots_per_layer, np.int64)
    if slots.min(initial=1) < 1:
        raise InputError(f"slots_per_layer must be at least 1, got {slots.min()}")
    if slots.ndim and len(slots) < num_layers:
        raise InputError(f"slots_per_layer has {len(slots)} numbers for {num_layers} layers")
    each = np.full(num_layers, slots) if slots.ndim == 0 else slots
    return each.sum(keepdims=True) if shared else each[:num_layers]


def _own_preload(stream: AccessStream, preload: Collection[int], layout: Layout) -> np.ndarray:
    """Return the preloaded keys, each once, without those of layers that the stream does not use (unless shared)."""
    keys = np.unique(np.fromiter(preload, np.int64, len(preload)))
    return keys if layout.shared else keys[np.isin(keys // layout.num_experts, stream.layers)]


def _misses(stream: AccessStream, layout: Layout, preload: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    from moesim.cache.kernels.fewest import fewest_misses as compiled

    upcoming, first = layout.next_uses(stream)
    state = layout.empty_state()
    held = layout.indices(preload)
    held = held[first[held] >= 0]  # the others are not used, so that they need no slot
    layout.rank(state, held, SOON - first[held])
    state[FREE, :layout.num_pools] = capacity
    np.subtract.at(state[FREE], np.zeros(len(held), int) if layout.shared else held // layout.row_width, 1)
    misses = np.zeros(stream.num_accesses, np.int64)
    compiled(stream.layers, stream.offsets, stream.experts, upcoming, layout.shared, layout.row_width,
             layout.pool_blocks, state, misses)
    return misses
