"""S3-FIFO: a small queue on probation, a main queue, and a memory of who left the small one."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.cache.policies.pooled import NOBODY, PooledPolicy, first_of

SMALL_PERCENT, GHOST_PERCENT = 10, 90
USES_TO_MAIN = 2
MOST_USES = 3


class S3FifoPolicy(PooledPolicy):
    """S3-FIFO (Yang, Zhang, Qiu, Yue, Rashmi, "FIFO Queues are All You Need for Cache Eviction", SOSP 2023; I1).

    Newcomers enter the small queue, of a tenth of the slots; who left it of late (the ghosts, as many as nine tenths of
    the slots) and comes back enters the main queue. While the small queue has its tenth, its oldest goes: to the main
    queue if it was used at least twice since, else out. Otherwise the oldest of the main queue goes: to its end if it was
    used (up to three uses are remembered, one is taken), else out. No ties.

    As in the authors' libCacheSim and unlike the paper, newcomers go to the main queue while the small one is full and
    nobody has been evicted yet. The small queue has at least one slot. Protected experts keep their place and uses.
    """

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Make the queues."""
        super().attach(slots_per_layer, shared)
        self.small_slots = max(1, self.pool_slots * SMALL_PERCENT // 100)
        self.ghosts = self.pool_slots * GHOST_PERCENT // 100
        self._small: list[dict[int, None]] = [{} for _ in range(self.num_pools)]
        self._main: list[dict[int, None]] = [{} for _ in range(self.num_pools)]
        self._ghosts: list[dict[int, None]] = [{} for _ in range(self.num_pools)]
        self._has_evicted = [False] * self.num_pools
        self._uses = [0] * self.num_keys
        self._came_back = [False] * self.num_keys

    def touch(self, key: int, now: int) -> None:
        """Count the use of a resident; a ghost is remembered as one that came back."""
        if self._resident[key]:
            self._uses[key] += 1
        elif key in self._ghosts[self.pool_of(key)]:
            del self._ghosts[self.pool_of(key)][key]
            self._came_back[key] = True

    def insert(self, key: int, now: int) -> None:
        """Put `key` at the end of its queue."""
        super().insert(key, now)
        pool = self.pool_of(key)
        fills_up = not self._has_evicted[pool] and len(self._small[pool]) >= self.small_slots
        queue = self._main if self._came_back[key] or fills_up else self._small
        queue[pool][key] = None
        self._came_back[key], self._uses[key] = False, 0
        self._ghosts[pool].pop(key, None)

    def evict(self, key: int) -> None:
        """Take `key` out; from the small queue it goes to the ghosts."""
        super().evict(key)
        pool = self.pool_of(key)
        if key in self._main[pool]:
            del self._main[pool][key]
            return
        del self._small[pool][key]
        ghosts = self._ghosts[pool]
        ghosts[key] = None
        if len(ghosts) > self.ghosts:
            del ghosts[next(iter(ghosts))]

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Return who leaves; others may be moved on the way to it."""
        pool = self.pool_of(next(iter(candidates)))
        self._has_evicted[pool] = True
        key = NOBODY
        if len(self._small[pool]) >= self.small_slots:
            key = self._from_small(pool, candidates)
        if key == NOBODY:
            key = self._from_main(pool, candidates)
        return self._from_small(pool, candidates) if key == NOBODY else key

    def _from_small(self, pool: int, candidates: Sequence[int]) -> int:
        """Return the oldest candidate that was not used twice; -1 if there is none (the others are in the main queue)."""
        small = self._small[pool]
        while (key := first_of(small, candidates)) != NOBODY and self._uses[key] >= USES_TO_MAIN:
            del small[key]
            self._main[pool][key] = None
            self._uses[key] = 0
        return key

    def _from_main(self, pool: int, candidates: Sequence[int]) -> int:
        """Return the oldest candidate that was not used; -1 if there is no candidate."""
        main = self._main[pool]
        while (key := first_of(main, candidates)) != NOBODY and self._uses[key]:
            del main[key]
            main[key] = None
            self._uses[key] = min(self._uses[key], MOST_USES) - 1
        return key
