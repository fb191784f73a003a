"""LIRS: experts that are used again soon stay; the others pass through a short queue."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.cache.policies.pooled import NOBODY, PooledPolicy, first_of

HIR_PERCENT = 1


class LirsPolicy(PooledPolicy):
    """Low inter-reference recency set (Jiang and Zhang, "LIRS", SIGMETRICS 2002, section 3; I1).

    A stack S of recent uses and a queue Q of resident HIR experts. The LIR experts have all slots but 1 % (at least one
    slot), as in the paper. A use of an expert that is still in S makes it LIR, and the LIR at the bottom of S the last of Q;
    what lies below the lowest LIR is cut off. A newcomer is LIR while there are too few, else it joins S and Q. The first of
    Q leaves, and stays in S as a non-resident. S is bounded by the number of experts. No ties.

    If all of Q is protected, the unprotected LIR nearest the bottom of S leaves.
    """

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Make the stack and the queue."""
        super().attach(slots_per_layer, shared)
        self.lir_slots = self.pool_slots - max(1, self.pool_slots * HIR_PERCENT // 100)
        self._stack: list[dict[int, None]] = [{} for _ in range(self.num_pools)]
        self._queue: list[dict[int, None]] = [{} for _ in range(self.num_pools)]
        self._is_lir = [False] * self.num_keys
        self._num_lir = [0] * self.num_pools

    def touch(self, key: int, now: int) -> None:
        """Note the use of a resident."""
        if not self._resident[key]:
            return
        pool = self.pool_of(key)
        if not self._is_lir[key]:
            del self._queue[pool][key]
        self._use(key, pool, was_lir=self._is_lir[key], few_lir=False)

    def insert(self, key: int, now: int) -> None:
        """Note the use of a newcomer."""
        super().insert(key, now)
        pool = self.pool_of(key)
        self._use(key, pool, was_lir=False, few_lir=self._num_lir[pool] < self.lir_slots)

    def evict(self, key: int) -> None:
        """Take `key` out of Q; in S it stays, if it is there."""
        super().evict(key)
        pool = self.pool_of(key)
        self._queue[pool].pop(key, None)
        self._set_lir(key, pool, False)
        self._prune(pool)

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Return the first candidate of Q, else the lowest of S."""
        pool = self.pool_of(next(iter(candidates)))
        key = first_of(self._queue[pool], candidates)
        return first_of(self._stack[pool], candidates) if key == NOBODY else key

    def _use(self, key: int, pool: int, *, was_lir: bool, few_lir: bool) -> None:
        """Put `key`, which is not in Q, on top of S, and at the end of Q unless it is LIR from now on."""
        stack = self._stack[pool]
        becomes_lir = was_lir or few_lir or (key in stack and self.lir_slots > 0)
        stack.pop(key, None)
        stack[key] = None
        self._set_lir(key, pool, becomes_lir)
        if not becomes_lir:
            self._queue[pool][key] = None
        if self._num_lir[pool] > self.lir_slots:
            lowest = next(each for each in stack if self._is_lir[each])
            self._set_lir(lowest, pool, False)
            self._queue[pool][lowest] = None
        self._prune(pool)

    def _set_lir(self, key: int, pool: int, is_lir: bool) -> None:
        self._num_lir[pool] += is_lir - self._is_lir[key]
        self._is_lir[key] = is_lir

    def _prune(self, pool: int) -> None:
        """Cut off what lies below the lowest LIR."""
        stack = self._stack[pool]
        while stack and not self._is_lir[lowest := next(iter(stack))]:
            del stack[lowest]
