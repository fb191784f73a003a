"""ARC: recency and frequency share the slots, and the share follows the ghosts that come back."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.cache.policies.pooled import NOBODY, PooledPolicy, first_of

ONCE, TWICE = range(2)


class ArcPolicy(PooledPolicy):
    """Adaptive replacement cache (Megiddo and Modha, "ARC", FAST 2003, Figure 4; I1).

    Residents used once (T1) and more often (T2), each in order of use, and who left them (the ghosts B1 and B2), of c
    slots. A use of a ghost of B1 raises the target p of T1 by ``max(1, |B2| / |B1|)``, one of B2 lowers it by the inverse;
    p stays in 0 ... c. The least recent of T1 leaves if T1 is larger than p (or as large, for a ghost of B2), else that of
    T2. |T1| + |B1| <= c, and all four hold 2 c at most. No ties: experts of one access are used in rising order.

    A prefetched expert enters T1, whatever it was before. If all of the list that should yield are protected, the other
    yields.
    """

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Make the lists."""
        super().attach(slots_per_layer, shared)
        self._lists: list[tuple[dict[int, None], dict[int, None]]] = [({}, {}) for _ in range(self.num_pools)]
        self._ghosts: list[tuple[dict[int, None], dict[int, None]]] = [({}, {}) for _ in range(self.num_pools)]
        self._target = [0.0] * self.num_pools
        self._came_from = [NOBODY] * self.num_keys

    def touch(self, key: int, now: int) -> None:
        """Move a resident to the recent end of T2; a ghost moves the target."""
        pool = self.pool_of(key)
        lists, ghosts = self._lists[pool], self._ghosts[pool]
        if self._resident[key]:
            lists[ONCE].pop(key, None)
            lists[TWICE].pop(key, None)
            lists[TWICE][key] = None
            return
        for which in (ONCE, TWICE):
            if key in ghosts[which]:
                self._adapt(pool, which)
                del ghosts[which][key]
                self._came_from[key] = which

    def insert(self, key: int, now: int) -> None:
        """Put `key` at the recent end of T2 if it came back, else of T1; forget ghosts beyond the limits."""
        super().insert(key, now)
        pool = self.pool_of(key)
        once, twice = self._lists[pool]
        ghosts_once, ghosts_twice = self._ghosts[pool]
        (once if self._came_from[key] == NOBODY else twice)[key] = None
        self._came_from[key] = NOBODY
        ghosts_once.pop(key, None)
        ghosts_twice.pop(key, None)
        while ghosts_once and len(once) + len(ghosts_once) > self.pool_slots:
            del ghosts_once[next(iter(ghosts_once))]
        while ghosts_twice and len(once) + len(twice) + len(ghosts_once) + len(ghosts_twice) > 2 * self.pool_slots:
            del ghosts_twice[next(iter(ghosts_twice))]

    def evict(self, key: int) -> None:
        """Make `key` a ghost of its list."""
        super().evict(key)
        pool = self.pool_of(key)
        which = ONCE if key in self._lists[pool][ONCE] else TWICE
        del self._lists[pool][which][key]
        self._ghosts[pool][which][key] = None

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Return the least recent candidate of the list that should yield."""
        pool = self.pool_of(next(iter(candidates)))
        once, twice = self._lists[pool]
        over = len(once) - self._target[pool]
        once_yields = over > 0 or (over == 0 and self._came_from[self._incoming] == TWICE)
        key = first_of(once if once_yields else twice, candidates)
        return first_of(twice if once_yields else once, candidates) if key == NOBODY else key

    def _adapt(self, pool: int, which: int) -> None:
        """Move the target towards the list whose ghost came back."""
        sizes = len(self._ghosts[pool][ONCE]), len(self._ghosts[pool][TWICE])
        step = max(1.0, sizes[1 - which] / sizes[which])
        target = self._target[pool] + (step if which == ONCE else -step)
        self._target[pool] = min(max(target, 0.0), float(self.pool_slots))
