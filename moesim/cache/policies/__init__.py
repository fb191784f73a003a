"""Eviction policies, one file each. A new one: copy `lru.py`, add a line to `POLICIES` in `policy.py`."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.sizes import most_residents_per_layer
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext


class BasePolicy(ABC):
    """The parts that most policies share. Keys are ``layer * num_experts + expert``."""

    information: ClassVar[str] = "I1"

    def __init__(self, context: PolicyContext) -> None:
        self.num_layers, self.num_experts = context.num_layers, context.num_experts
        self.num_keys = context.num_layers * context.num_experts
        self._attached = False

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Learn the capacity; called once, by the cache that owns the policy."""
        if self._attached:
            raise InputError(
                f"a {type(self).__name__} serves one cache and has it: make a new one with make_policy")
        self._attached = True

    def attach_bytes(self, bytes_per_layer: int, expert_bytes: np.ndarray, shared: bool) -> None:
        """Learn a capacity in bytes for experts of `expert_bytes`, int64[layer, expert]; called once, by a `ByteCache`.

        By default that is `attach` with the most slots that such experts can fill.
        """
        self.attach(most_residents_per_layer(expert_bytes, bytes_per_layer, shared=shared), shared)

    def admits(self, key: int, now: int) -> bool:
        """Return whether an absent expert may enter at all."""
        return True

    def prefers(self, key: int, victim: int, now: int) -> bool:
        """Return whether `key` should take the place of `victim` (False: `key` stays outside)."""
        return True

    def touch(self, key: int, now: int) -> None:  # noqa: B027 (a hook that a policy may leave out)
        """Note that `key` was used by access `now`."""

    def insert(self, key: int, now: int) -> None:  # noqa: B027
        """Note that `key` became resident during access `now`."""

    def evict(self, key: int) -> None:  # noqa: B027
        """Note that `key` is no longer resident."""

    @abstractmethod
    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Return the candidate that leaves."""


class RankedPolicy(BasePolicy):
    """Evicts the candidate of the lowest rank; a child gives `worth`, and amortised O(log slots) follows.

    The rank is ``worth * num_keys + key``: candidates of equal worth leave in the order of their keys, and a
    rank says whose it is. Each pool has a heap that holds, for each resident, its rank or a lower old one; an
    old one is corrected when it comes up, so that a use which raises the rank costs no heap operation.
    """

    @abstractmethod
    def worth(self, key: int, now: int) -> int:
        """Return what `key`, used by or inserted during access `now`, is worth keeping."""

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Make one heap per pool."""
        super().attach(slots_per_layer, shared)
        self._pool_keys = self.num_keys if shared else self.num_experts
        num_pools = self.num_keys // self._pool_keys
        self._heaps: list[list[int]] = [[] for _ in range(num_pools)]
        self._heap_limit = 8 * slots_per_layer * self.num_layers // num_pools
        self._resident = [False] * self.num_keys
        self._rank = [0] * self.num_keys

    def touch(self, key: int, now: int) -> None:
        """Rank `key` anew."""
        rank = self.worth(key, now) * self.num_keys + key
        fell, self._rank[key] = rank < self._rank[key], rank
        if fell and self._resident[key]:
            self._push(key, rank)

    def insert(self, key: int, now: int) -> None:
        """Rank `key` and let it compete."""
        self._resident[key] = True
        self._rank[key] = rank = self.worth(key, now) * self.num_keys + key
        self._push(key, rank)

    def evict(self, key: int) -> None:
        """Forget that `key` was resident; its ranks in the heap are void."""
        self._resident[key] = False

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Return the candidate of the lowest rank."""
        heap = self._heaps[next(iter(candidates)) // self._pool_keys]
        protected = []
        while True:
            key = heap[0] % self.num_keys
            rank = self._rank[key]
            if not self._resident[key] or rank < heap[0]:
                heapq.heappop(heap)
            elif rank > heap[0]:
                heapq.heapreplace(heap, rank)
            elif key in candidates:
                break
            else:
                protected.append(heapq.heappop(heap))
        for rank in protected:
            heapq.heappush(heap, rank)
        return key

    def _push(self, key: int, rank: int) -> None:
        heap = self._heaps[key // self._pool_keys]
        heapq.heappush(heap, rank)
        if len(heap) > self._heap_limit:
            keys = {old % self.num_keys for old in heap}
            heap[:] = [self._rank[each] for each in keys if self._resident[each]]
            heapq.heapify(heap)
