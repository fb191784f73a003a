"""LFU with the second rule for ties: of experts used equally often, the one that entered first leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.cache.policies import RankedPolicy
from moesim.cache.policies.lfu import COUNT_STEP

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext


class LfuFifoPolicy(RankedPolicy):
    """Least frequently used since the last eviction; ties leave in the order of entry, not of last use (I1).

    Published "LFU" hit rates differ by this rule alone: `lfu-resident` (and libCacheSim's LFU) takes the least recently
    used of those tied; an LFU that keeps counts in a table in order of entry and takes the first of the smallest takes
    the one that entered first.
    """

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._count = [0] * self.num_keys
        self._entry = [0] * self.num_keys
        self._entries = 0

    def touch(self, key: int, now: int) -> None:
        """Count one use of `key`."""
        self._count[key] += 1
        super().touch(key, now)

    def insert(self, key: int, now: int) -> None:
        """Give `key` its place in the order of entry."""
        self._entries += 1
        self._entry[key] = self._entries
        super().insert(key, now)

    def evict(self, key: int) -> None:
        """Forget the uses of `key`."""
        super().evict(key)
        self._count[key] = 0

    def worth(self, key: int, now: int) -> int:
        """Return the number of uses, then the place in the order of entry."""
        return self._count[key] * COUNT_STEP + self._entry[key]
