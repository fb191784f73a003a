"""The parts that policies with queues share: a pool knows its slots, and which expert is about to enter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moesim.cache.policies import BasePolicy

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext

NOBODY = -1


class PooledPolicy(BasePolicy):
    """Keeps queues per pool; `pool_of` tells which, `pool_slots` how many experts fit in one.

    Such policies are published for one request at a time. Here an access tests all its experts first, and protects
    them: each policy then passes over the protected and takes the next in its own order.
    """

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._incoming = NOBODY

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Make the pools."""
        super().attach(slots_per_layer, shared)
        self.num_pools = 1 if shared else self.num_layers
        self.pool_slots = slots_per_layer * self.num_layers // self.num_pools
        self._resident = [False] * self.num_keys

    def pool_of(self, key: int) -> int:
        """Return the pool of a key."""
        return key * self.num_pools // self.num_keys

    def admits(self, key: int, now: int) -> bool:
        """Admit all, and remember who is about to enter."""
        self._incoming = key
        return True

    def insert(self, key: int, now: int) -> None:
        """Note that `key` is resident."""
        self._resident[key] = True

    def evict(self, key: int) -> None:
        """Note that `key` is not."""
        self._resident[key] = False


def first_of(queue: Iterable[int], candidates: Sequence[int]) -> int:
    """Return the first key of a queue that is a candidate, or -1."""
    return next((key for key in queue if key in candidates), NOBODY)
