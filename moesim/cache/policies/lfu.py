"""LFU: the resident expert with the fewest uses leaves; two ways to count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.cache.policies import RankedPolicy

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext

# Worth is `count * COUNT_STEP + last use`, so recency only breaks ties; no run has so many accesses.
COUNT_STEP = 1 << 40


class LfuPolicy(RankedPolicy):
    """Least frequently used since the beginning of the run ("perfect LFU", I1).

    Uses count whether or not the expert was resident, and are never forgotten. Only uses count: a prefetch
    does not. Ties: the least recently used (or inserted) leaves, then the lower key.
    """

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._count = [0] * self.num_keys

    def touch(self, key: int, now: int) -> None:
        """Count one use of `key`."""
        self._count[key] += 1
        super().touch(key, now)

    def worth(self, key: int, now: int) -> int:
        """Return the number of uses, then recency."""
        return self._count[key] * COUNT_STEP + now


class LfuResidentPolicy(LfuPolicy):
    """Least frequently used since the last eviction (in-cache LFU, I1): eviction forgets the count."""

    def evict(self, key: int) -> None:
        """Forget the uses of `key`."""
        super().evict(key)
        self._count[key] = 0
