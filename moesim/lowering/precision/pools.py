"""HOBBIT's pools: one cache and one queue of copies for each width, and what was fetched ahead into them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.prefetchers import Wish
from moesim.lowering.graph import PRIORITY_PREFETCH
from moesim.lowering.prefetching import Prefetching
from moesim.lowering.transfers import Transfers

if TYPE_CHECKING:
    from moesim.lowering.offload import LayerMoment
    from moesim.lowering.precision.hobbit import HobbitProgram


class Pool:
    """The slots of one width. Slots are numbered from `first_slot`, so that two pools share no number."""

    def __init__(self, level: int, cache: ExpertCache, transfers: Transfers, first_slot: int, num_bytes: int) -> None:
        self.level, self.cache, self.transfers = level, cache, transfers
        self.first_slot, self.num_bytes = first_slot, num_bytes

    def slot_of(self, layer: int, expert: int) -> int:
        """Return the expert's slot, -1 if it has none here."""
        slot = self.cache.slot_of(layer, expert)
        return slot if slot < 0 else self.first_slot + slot

    def has_arrived(self, layer: int, expert: int) -> bool:
        """Whether nothing of an expert in this pool is under way."""
        return self.transfers.has_arrived(self.cache.key_of(layer, expert))


class PoolPrefetching(Prefetching):
    """`Prefetching` into pools: what waits for its use is a version, ``level * num_keys + key``."""

    def __init__(self, program: HobbitProgram) -> None:
        super().__init__(program)
        self._pooled = program
        self._num_keys = program.model.num_moe_layers * program.model.num_experts

    def version(self, level: int, layer: int, expert: int) -> int:
        """Return the number of a version."""
        return level * self._num_keys + self._pooled.key(layer, expert)

    def served(self, level: int, layer: int, expert: int) -> bool:
        """Note the use of a version; returns whether it had been prefetched and not used since."""
        version = self.version(level, layer, expert)
        found = version in self._waiting
        self._waiting.discard(version)
        return found

    def lost(self, key: int) -> None:
        """Note that a version (given by its number) leaves its slot."""
        if key in self._waiting:
            self._waiting.discard(key)
            self._count("useless_prefetches", key % self._num_keys // self._pooled.model.num_experts)

    def drop_unserved(self, layer: int, serving: Mapping[int, int]) -> None:
        """Cancel what is still queued of this layer's prefetches that serve nothing (`serving`: expert -> level)."""
        num_experts = self._pooled.model.num_experts
        for version in sorted(v for v in self._waiting if v % self._num_keys // num_experts == layer):
            level, expert = version // self._num_keys, version % num_experts
            if serving.get(expert) == level:
                continue
            self._waiting.discard(version)
            self._count("useless_prefetches", layer)
            pool, key = self._pooled.pools[level], self._pooled.key(layer, expert)
            if not pool.transfers.has_arrived(key) and pool.transfers.cancel_rest(key):
                self._count("cancelled_prefetches", layer)
                pool.cache.release(layer, expert)

    def fetch(self, at: LayerMoment, wanted: np.ndarray) -> None:
        """Fetch predicted experts, each in the width that it is taken to need."""
        wishes = self._wishes(at, wanted)
        levels = self._pooled.wished_levels(at, wishes)
        protected = {self._pooled.key(wish.layer, wish.expert) for wish in wishes}
        protected |= {self._pooled.key(at.layer, expert) for expert in wanted.tolist()}
        if hasattr(self._pooled.prefetcher, "wishes"):
            protected |= {version % self._num_keys for version in self._waiting}
            prefetcher: Any = self._pooled.prefetcher
            masked = prefetcher.named if getattr(prefetcher, "masks", False) else ()
            protected |= {self._pooled.key(*named) for named in masked}
        for wish, level in zip(wishes, levels, strict=True):
            if level >= 0 and not self._pooled.holds(wish.layer, wish.expert, level):
                self._fetch_level(at, wish, level, protected)

    def _fetch_level(self, at: LayerMoment, wish: Wish, level: int, protected: Collection[int]) -> None:
        pool = self._pooled.pools[level]
        slot = self._pooled.reserve_in(pool, at, wish.layer, wish.expert, protected)
        if slot < 0:
            return
        key = self._pooled.key(wish.layer, wish.expert)
        pool.transfers.fetch(key, slot, "prefetch", PRIORITY_PREFETCH + wish.urgency, at.router, at.step.index)
        self._waiting.add(self.version(level, wish.layer, wish.expert))
        self._count("prefetches", wish.layer)
        self._pooled.cache_counts["prefetched_bytes"][wish.layer] += pool.num_bytes
