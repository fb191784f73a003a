"""Hit counts at all cache sizes in one pass over the accesses: for LRU and for Belady.

Both are stack algorithms (Mattson, Gecsei, Slutz, Traiger, "Evaluation Techniques for Storage Hierarchies", IBM Systems
Journal 9(2), 1970): what n slots hold, n + 1 slots hold too. So each use has a depth, the fewest slots at which it hits.
This is so

- under sequential semantics, at every size;
- under set semantics, from the size on at which each access of the layer fits: below it, experts pass through, and what
  stays is not what one stack would have on top;
- for Belady under set semantics only if the experts of an access may not evict each other. LRU does not do that anyway.

A pool per layer; no preload; capacity in slots. Other policies are no stack algorithms, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moesim.cache.policy import AccessStream
from moesim.cache.replay import SEMANTICS
from moesim.errors import CheckError, InputError, unknown

NOT_DETERMINED = -1


@dataclass(frozen=True)
class HitCurve:
    """The hits of one policy at all sizes.

    Attributes:
        policy, semantics, count_cold: what was counted, as in `replay`.
        accesses: int64[layer], expert accesses.
        hits: int64[layer, slots], for 0 ... num_experts slots per layer; -1 below `smallest_slots`.
        smallest_slots: int64[layer], the fewest slots for which the curve holds: the largest access of the layer under set
            semantics, else 1.

    Raises:
        CheckError: hits that fall with more slots, or exceed the accesses.
    """

    policy: str
    semantics: str
    count_cold: bool
    accesses: np.ndarray
    hits: np.ndarray
    smallest_slots: np.ndarray

    def __post_init__(self) -> None:
        for name in ("accesses", "hits", "smallest_slots"):
            array = np.array(getattr(self, name), dtype=np.int64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if np.any(np.diff(self.hits, axis=1) < 0) or np.any(self.hits > self.accesses[:, None]):
            raise CheckError("hit curve: hits must rise with the slots, up to the accesses at most")

    def hits_at(self, slots_per_layer: int) -> np.ndarray:
        """Return int64[layer], the hits of `replay` with so many slots.

        Raises:
            InputError: fewer slots than the curve holds for.
        """
        if slots_per_layer < self.smallest_slots.max():
            raise InputError(f"hit curve: it holds from {self.smallest_slots.max()} slots per layer on, got "
                             f"{slots_per_layer}; use replay_compiled below")
        return self.hits[:, min(slots_per_layer, self.hits.shape[1] - 1)]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer and size: layer, slots, accesses, hits, hit_rate (nan without accesses)."""
        layer, slots = np.nonzero(self.hits != NOT_DETERMINED)
        frame = pd.DataFrame({"layer": layer, "slots": slots, "accesses": self.accesses[layer],
                              "hits": self.hits[layer, slots]})
        return frame.assign(hit_rate=frame["hits"] / frame["accesses"].where(frame["accesses"] > 0))


def hit_curves(
    accesses: AccessStream | np.ndarray, num_experts: int, *, num_layers: int | None = None,
    policies: Sequence[str] = ("lru", "belady"), semantics: str = "set", count_cold: bool = True,
    current_evictable: bool = False,
) -> dict[str, HitCurve]:
    """Return the curve of each policy, equal to `replay` with a pool per layer at every size from `smallest_slots` on.

    Args:
        accesses: a stream; or int16[token, layer, k], the experts of each token (-1: none), each token being a
            step of its own, so that no stream need be built; their order in a token does not matter, as a stream
            has them rising. Layers are worked on one after the other.
        num_experts, num_layers: of the model; an array says its layers itself.
        policies: ``lru``, ``belady`` or both.
        semantics, count_cold, current_evictable: see `replay`.

    Raises:
        InputError: other policies or options, experts outside the model, an expert twice in one access, or 2^31 - 1
            uses in one layer.
    """
    _check_options(policies, semantics, current_evictable)
    one_by_one = semantics == "sequential"
    experts, layers = _checked(accesses, num_experts, num_layers, one_by_one)
    found = [_layer_depths(experts, starts, stops, num_experts, policies, one_by_one, layer)
             for layer, (starts, stops) in enumerate(layers)]
    num_uses = np.array([uses for uses, _, _ in found])
    smallest = np.array([1 if one_by_one else max(1, width) for _, width, _ in found])
    return {policy: HitCurve(policy, semantics, count_cold, num_uses, _hits(
        np.array([depths[policy] for _, _, depths in found]), num_uses, smallest, count_cold), smallest)
        for policy in policies}


def _check_options(policies: Sequence[str], semantics: str, current_evictable: bool) -> None:
    if semantics not in SEMANTICS:
        raise unknown("access semantics", semantics, SEMANTICS)
    for policy in policies:
        if policy not in _DEPTHS:
            raise InputError(f"hit curve: {policy!r} is no stack algorithm, so each size needs a replay of its own; "
                             f"curves are there for {', '.join(_DEPTHS)}")
        if policy == "belady" and semantics == "set" and current_evictable:
            raise InputError("hit curve: under set semantics 'belady' is a stack algorithm only with "
                             "current_evictable=False")


def _checked(accesses: AccessStream | np.ndarray, num_experts: int, num_layers: int | None, one_by_one: bool,
             ) -> tuple[np.ndarray, Iterator[tuple[np.ndarray, np.ndarray]]]:
    """Return the experts, int16[...] in one row, and for each layer where its accesses start and stop in it."""
    if isinstance(accesses, AccessStream):
        layers = int(accesses.layers.max()) + 1 if num_layers is None else num_layers
        accesses.check_fits(layers, num_experts)
        return accesses.experts, _stream_layers(accesses, layers)
    ids = np.asarray(accesses)
    if ids.ndim != 3 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"hit curve: expert ids must be integers [token, layer, k], got {ids.dtype}{list(ids.shape)}")
    if num_layers not in (None, ids.shape[1]):
        raise InputError(f"hit curve: expert ids have {ids.shape[1]} layers, not {num_layers}")
    if ids.min() < -1 or ids.max() >= min(num_experts, np.iinfo(np.int16).max + 1):
        raise InputError(f"hit curve: expert ids {ids.min()} ... {ids.max()} are not those of {num_experts} experts "
                         "(-1: none)")
    ordered = np.sort(ids, axis=2) if one_by_one else ids  # as a stream has them; padding comes first and is skipped
    flat = np.ascontiguousarray(ordered, dtype=np.int16).reshape(-1).view()
    flat.setflags(write=False)  # as in a stream, so that the loops are compiled for one type
    return flat, _array_layers(*ids.shape)


def _stream_layers(stream: AccessStream, num_layers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for layer in range(num_layers):
        own = np.flatnonzero(stream.layers == layer)
        yield stream.offsets[own], stream.offsets[own + 1]


def _array_layers(num_tokens: int, num_layers: int, top_k: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for layer in range(num_layers):
        starts = (np.arange(num_tokens, dtype=np.int64) * num_layers + layer) * top_k
        yield starts, starts + top_k


def _layer_depths(experts: np.ndarray, starts: np.ndarray, stops: np.ndarray, num_experts: int, policies: Sequence[str],
                  one_by_one: bool, layer: int) -> tuple[int, int, dict[str, np.ndarray]]:
    """Return the layer's uses, its largest access, and for each policy int64[depth from 0], how many uses hit there."""
    from moesim.cache.kernels.curves import MAX_LAYER_USES, gather

    room = int((stops - starts).sum())
    if room >= MAX_LAYER_USES:
        raise InputError(f"hit curve: layer {layer} has {room} uses; at most {MAX_LAYER_USES - 1} can be counted")
    uses, bounds = np.empty(room, np.int16), np.empty(len(starts) + 1, np.int64)
    twice = gather(experts, starts, stops, np.empty(num_experts, np.int64), uses, bounds)
    if twice >= 0:
        raise InputError(f"hit curve: access {twice} of layer {layer} names an expert twice")
    uses, width = uses[:bounds[-1]], int(np.diff(bounds).max(initial=0))
    if one_by_one:
        bounds = np.arange(len(uses) + 1, dtype=np.int64)
    return len(uses), width, {policy: _DEPTHS[policy](uses, bounds, num_experts) for policy in policies}


def _lru_depths(uses: np.ndarray, bounds: np.ndarray, num_experts: int) -> np.ndarray:
    from moesim.cache.kernels.curves import lru_depths

    at_depth = np.zeros(num_experts, np.int64)
    lru_depths(uses, bounds, np.full(num_experts, -1, np.int64), at_depth)
    return at_depth


def _belady_depths(uses: np.ndarray, bounds: np.ndarray, num_experts: int) -> np.ndarray:
    from moesim.cache.kernels.curves import layer_next_uses, opt_depths

    at_depth, upcoming = np.zeros(num_experts, np.int64), np.empty(len(uses), np.int32)
    layer_next_uses(uses, np.empty(num_experts, np.int64), upcoming)
    opt_depths(bounds, upcoming, np.zeros(num_experts + 1, np.int32), at_depth)
    return at_depth


_DEPTHS: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "lru": _lru_depths, "belady": _belady_depths}


def _hits(at_depth: np.ndarray, num_uses: np.ndarray, smallest: np.ndarray, count_cold: bool) -> np.ndarray:
    """Return int64[layer, slots]. A first use finds a free slot while fewer experts than slots have been used."""
    hits = np.zeros((len(at_depth), at_depth.shape[1] + 1), np.int64)
    hits[:, 1:] = np.cumsum(at_depth, axis=1)
    slots = np.arange(hits.shape[1])
    if not count_cold:
        num_distinct = num_uses - at_depth.sum(axis=1)
        hits += np.minimum(slots, num_distinct[:, None])
    hits[slots < smallest[:, None]] = NOT_DETERMINED
    return hits
