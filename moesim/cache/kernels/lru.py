"""LRU without a linked list: each pool has a queue of uses, and a hand that goes along it.

An entry of the queue is the last use of its expert if the expert's stamp says so. The hand evicts there and passes
over the others, so that a hit costs a stamp and an entry, and a miss some steps of the hand. A full queue is packed.
"""

from __future__ import annotations

import numba
import numpy as np

from moesim.cache.compiled_layout import COLD, COLD_IN_FREE, MISSES

# Stamps below 0: evicted, and never used.
GONE, UNUSED = -1, -2
# Columns of int64[pool, 3]: where the hand is, where the queue ends, how many slots are free.
HAND, TAIL, FREE_SLOTS = range(3)


@numba.njit(cache=True, nogil=True)
def _pack(queue: np.ndarray, stamps: np.ndarray, pools: np.ndarray, pool: int) -> None:
    """Move the entries that are last uses to the beginning of the pool's queue, in their order."""
    tail = 0
    for entry in range(pools[pool, HAND], pools[pool, TAIL]):
        i = queue[pool, entry]
        if stamps[i] == entry:
            queue[pool, tail] = i
            stamps[i] = tail
            tail += 1
    pools[pool, HAND], pools[pool, TAIL] = 0, tail


@numba.njit(cache=True, nogil=True)
def replay_lru(layers: np.ndarray, offsets: np.ndarray, experts: np.ndarray, shared: bool, one_by_one: bool,
               row_width: int, queue: np.ndarray, stamps: np.ndarray, pools: np.ndarray, tally: np.ndarray) -> None:
    """Run the stream on empty pools that hold every access; add to `tally`, int64[row, layer].

    `queue` is int32[pool, entry], with room for more than the slots and an access; stamps, int64[index], are all
    UNUSED; `pools` holds the free slots.
    """
    for now in range(len(layers)):
        layer = int(layers[now])
        base, pool, start, end = layer * row_width, 0 if shared else layer, offsets[now], offsets[now + 1]
        if pools[pool, TAIL] + end - start > queue.shape[1]:
            _pack(queue, stamps, pools, pool)
        hand, tail = pools[pool, HAND], pools[pool, TAIL]
        while start < end:
            stop = start + 1 if one_by_one else end
            num_missed, cold = 0, 0
            for use in range(start, stop):
                i = base + experts[use]
                stamp = stamps[i]
                num_missed += stamp < 0
                cold += stamp == UNUSED
                stamps[i] = tail
                queue[pool, tail] = i
                tail += 1
            tally[MISSES, layer] += num_missed
            if cold > 0:
                # Before the first eviction only experts never used are missed.
                filled = min(cold, pools[pool, FREE_SLOTS])
                pools[pool, FREE_SLOTS] -= filled
                tally[COLD, layer] += cold
                tally[COLD_IN_FREE, layer] += filled
                num_missed -= filled
            while num_missed > 0:
                i = int(queue[pool, hand])
                stamp = stamps[i]
                is_last = stamp == hand  # no branch: it would be mispredicted
                stamps[i] = GONE if is_last else stamp
                num_missed -= is_last
                hand += 1
            start = stop
        pools[pool, HAND], pools[pool, TAIL] = hand, tail
