"""SIEVE: a hand goes along the queue, spares who was used since it last came by, and evicts the first who was not."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.cache.policies.pooled import NOBODY, PooledPolicy


class SievePolicy(PooledPolicy):
    """SIEVE (Zhang, Yang, Yue, Vigfusson, Rashmi, "SIEVE is Simpler than LRU", NSDI 2024, Algorithm 1; I1).

    A queue in the order of entry with one bit per expert: set by a use after the entry, cleared by the hand. The hand
    starts at the oldest, goes towards the newest and on from the oldest again; whom it finds without the bit leaves, and it
    stays there. Spared experts keep their place. Protected ones are passed over and keep their bit. No ties.
    """

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Make an empty queue per pool."""
        super().attach(slots_per_layer, shared)
        self._used = [False] * self.num_keys
        self._newer, self._older = ([NOBODY] * self.num_keys for _ in range(2))
        self._newest, self._oldest, self._hand = ([NOBODY] * self.num_pools for _ in range(3))

    def touch(self, key: int, now: int) -> None:
        """Set the bit of a resident."""
        self._used[key] = self._resident[key]

    def insert(self, key: int, now: int) -> None:
        """Put `key` at the newest end."""
        super().insert(key, now)
        pool = self.pool_of(key)
        self._used[key] = False
        self._link(self._newest[pool], key, pool)
        self._link(key, NOBODY, pool)

    def evict(self, key: int) -> None:
        """Take `key` out; a hand that pointed to it points to the next newer one."""
        super().evict(key)
        pool = self.pool_of(key)
        if self._hand[pool] == key:
            self._hand[pool] = self._newer[key]
        self._link(self._older[key], self._newer[key], pool)

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Move the hand to the first candidate without the bit."""
        pool = self.pool_of(next(iter(candidates)))
        key = self._hand[pool]
        key = self._oldest[pool] if key == NOBODY else key
        while key not in candidates or self._used[key]:
            if key in candidates:
                self._used[key] = False
            key = self._newer[key] if self._newer[key] != NOBODY else self._oldest[pool]
        self._hand[pool] = key
        return key

    def _link(self, older: int, newer: int, pool: int) -> None:
        """Make two neighbours; nobody stands beyond the ends."""
        if older == NOBODY:
            self._oldest[pool] = newer
        else:
            self._newer[older] = newer
        if newer == NOBODY:
            self._newest[pool] = older
        else:
            self._older[newer] = older
