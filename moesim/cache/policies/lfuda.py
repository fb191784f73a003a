"""LFUDA: LFU whose counts age, so that what was popular long ago does not stay for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesim.cache.policies import RankedPolicy
from moesim.cache.policies.lfu import COUNT_STEP

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext


class LfudaPolicy(RankedPolicy):
    """LFU with dynamic aging (Arlitt, Cherkasova, Dilley, Friedrich, Jin, "Evaluating Content Management Techniques for
    Web Proxy Caches", ACM SIGMETRICS Performance Evaluation Review 27(4), 2000; I1).

    At a use, ``K = C * F + A`` with C = 1, F the uses since entry and A the cache age; the lowest K leaves, and A becomes
    its K. Each pool has an age of its own. An expert that leaves without a victim's fate (a cancelled prefetch) does not
    age the pool. Ties: the least recently used, then the lower key.
    """

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._count = [0] * self.num_keys
        self._asked: set[int] = set()

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Set the age of each pool to 0."""
        super().attach(slots_per_layer, shared)
        self._age = [0] * len(self._heaps)

    def touch(self, key: int, now: int) -> None:
        """Count one use of `key`."""
        self._count[key] += 1
        super().touch(key, now)

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Return the candidate of the lowest K, and remember that it was asked for."""
        key = super().victim(candidates, now)
        self._asked.add(key)
        return key

    def insert(self, key: int, now: int) -> None:
        """Rank `key`; those asked for and still here stay."""
        self._asked.clear()
        super().insert(key, now)

    def evict(self, key: int) -> None:
        """Forget the uses of `key`; the age becomes its K."""
        super().evict(key)
        self._count[key] = 0
        if key in self._asked:
            # The access in a rank is -1 where the expert was preloaded.
            self._age[key // self._pool_keys] = (self._rank[key] // self.num_keys + 1) // COUNT_STEP

    def worth(self, key: int, now: int) -> int:
        """Return K, then recency."""
        return (self._count[key] + self._age[key // self._pool_keys]) * COUNT_STEP + now
