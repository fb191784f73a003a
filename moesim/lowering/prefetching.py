"""What an offloaded run has fetched ahead: which predictions came true, in time or late, and which were useless."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moesim.cache.prefetch import check_wishes, looks_ahead
from moesim.cache.prefetchers import PrefetchMoment, Wish
from moesim.lowering.graph import PRIORITY_PREFETCH

if TYPE_CHECKING:
    from moesim.cache.prefetch import Prefetcher
    from moesim.lowering.offload import LayerMoment, OffloadProgram


class Prefetching:
    """Turns predictions into copies of the class ``prefetch``, and counts what became of them.

    A prefetched expert counts as useful or late at its first use, and as useless when its layer's router did not choose
    it or when it left its slot before: once in all. What a router did not choose and is still queued is cancelled.
    """

    def __init__(self, program: OffloadProgram) -> None:
        self._program = program
        self._waiting: set[int] = set()

    def used(self, layer: int, hits: Iterable[int]) -> list[int]:
        """Return those of the hits that had been prefetched and not used since."""
        ahead = [expert for expert in hits if self._program.key(layer, expert) in self._waiting]
        self._waiting -= {self._program.key(layer, expert) for expert in ahead}
        return ahead

    def lost(self, key: int) -> None:
        """Note that an expert leaves its slot."""
        if key in self._waiting:
            self._waiting.discard(key)
            self._count("useless_prefetches", key // self._program.model.num_experts)

    def drop_useless(self, layer: int, wanted: set[int]) -> None:
        """Cancel what is still queued of this layer's prefetches that the router did not choose."""
        program, num_experts = self._program, self._program.model.num_experts
        for key in sorted(k for k in self._waiting if k // num_experts == layer):
            expert = key % num_experts
            if expert in wanted:
                continue
            self._waiting.discard(key)
            self._count("useless_prefetches", layer)
            if not program.transfers.has_arrived(key) and program.transfers.cancel_rest(key):
                self._count("cancelled_prefetches", layer)
                program.cache.release(layer, expert)

    def fetch(self, at: LayerMoment, wanted: np.ndarray) -> None:
        """Fetch predicted experts into slots that no other prediction holds."""
        wishes = self._wishes(at, wanted)
        if not wishes:
            return
        key = self._program.key
        protected = {key(wish.layer, wish.expert) for wish in wishes} | {key(at.layer, e) for e in wanted.tolist()}
        if looks_ahead(self._program.prefetcher):
            protected |= self._waiting  # predictions of several layers stand side by side
            prefetcher: Any = self._program.prefetcher
            protected |= {key(*named) for named in prefetcher.named} if getattr(prefetcher, "masks", False) else set()
        for wish in wishes:
            if self._program.cache.slot_of(wish.layer, wish.expert) < 0:
                self._fetch(at, wish, protected)

    def _wishes(self, at: LayerMoment, wanted: np.ndarray) -> list[Wish]:
        prefetcher, layers = self._program.prefetcher, self._program.model.num_moe_layers
        if prefetcher is None:
            return []
        if looks_ahead(prefetcher):
            moment = PrefetchMoment(
                at.layer, at.now, wanted, at.counts[wanted],
                lambda layer, expert: self._program.cache.slot_of(layer, expert) >= 0, layers,
                self._program.begins_request(at))
            wishes = prefetcher.wishes(moment)
            check_wishes(wishes, layers, self._program.model.num_experts)
            return wishes
        if at.layer + 1 == layers:
            return []
        named = cast("Prefetcher", prefetcher).predict(at.layer, wanted, at.counts[wanted], at.now)
        return [Wish(at.layer + 1, expert) for expert in named]

    def _fetch(self, at: LayerMoment, wish: Wish, protected: set[int]) -> None:
        slot = self._program.reserve(at, wish.layer, wish.expert, protected)
        if slot < 0:
            return
        key = self._program.key(wish.layer, wish.expert)
        self._program.transfers.fetch(
            key, slot, "prefetch", PRIORITY_PREFETCH + wish.urgency, at.router, at.step.index)
        self._waiting.add(key)
        self._count("prefetches", wish.layer)

    def _count(self, name: str, layer: int) -> None:
        self._program.cache_counts[name][layer] += 1
