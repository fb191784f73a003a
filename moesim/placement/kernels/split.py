"""Compiled exact split of tokens over replicas.

Compiled because a balancer runs it for every layer of every step: 58 layers within a few milliseconds. One max-flow
on 64 ranks takes some thousand steps on small arrays, where every numpy call costs more than the step.
"""

from __future__ import annotations

import numba
import numpy as np

_TINY = 2.0**-46  # of the total load: less than this over the target is rounding


@numba.njit(cache=True, nogil=True)
def split_layer(slots, load, num_ranks):  # type: ignore[no-untyped-def]
    """Return float64[slot] tokens per slot, the least possible largest rank load, and bool[rank] the set that forces it.

    Minimises ``max_r sum_(s of r) x_s`` with ``sum_(s of e) x_s = load_e``, ``x >= 0``. For a target T tokens of ranks
    above it move to ranks below it along paths rank - expert - rank, each by breadth-first search from all ranks above
    (Edmonds and Karp, J. ACM 19(2), 1972). Where none is left, the ranks reached form a set B out of which no token
    can move, so its mean is a lower bound: T becomes that mean, and the search goes on. T rises with every round and
    every B is another one; the last T is met and proven: the answer is exact up to rounding (2^-40 of the total).
    """
    num_slots, num_experts = len(slots), len(load)
    size = num_slots // num_ranks
    first = np.zeros(num_experts + 1, np.int64)
    for e in slots:
        first[e + 1] += 1
    for e in range(num_experts):
        first[e + 1] += first[e]
    place, fill = np.empty(num_slots, np.int64), first[:-1].copy()
    tokens, rank_load = np.zeros(num_slots), np.zeros(num_ranks)
    for s in range(num_slots):
        e = slots[s]
        place[fill[e]] = s
        fill[e] += 1
        tokens[s] = load[e] / (first[e + 1] - first[e])
        rank_load[s // size] += tokens[s]
    total = load.sum()
    tiny = _TINY * total
    target = total / num_ranks
    forced = np.ones(num_ranks, np.bool_)
    _level(tokens, rank_load, slots, first, place, size)
    while True:
        reached = _drain(tokens, rank_load, target, slots, first, place, size, tiny)
        inside, count = 0.0, 0
        for r in range(num_ranks):
            if reached[r]:
                inside += rank_load[r]
                count += 1
        if count == 0 or inside / count <= target + tiny:
            return tokens, target, forced
        target = inside / count
        forced = reached


@numba.njit(cache=True, nogil=True)
def _level(tokens, rank_load, slots, first, place, size):  # type: ignore[no-untyped-def]
    """Let each replicated expert in turn fill its ranks to one level; a start that leaves little to move."""
    for _ in range(4):
        for e in range(len(first) - 1):
            count = first[e + 1] - first[e]
            if count < 2:
                continue
            mine = 0.0
            for k in range(first[e], first[e + 1]):
                s = place[k]
                mine += tokens[s]
                rank_load[s // size] -= tokens[s]
            level = _water(mine, rank_load, first[e], first[e + 1], place, size)
            left = mine
            for k in range(first[e], first[e + 1]):
                s = place[k]
                part = min(left, max(0.0, level - rank_load[s // size]))
                if k == first[e + 1] - 1:
                    part = left
                tokens[s] = part
                left -= part
                rank_load[s // size] += part


@numba.njit(cache=True, nogil=True)
def _water(amount, rank_load, start, end, place, size):  # type: ignore[no-untyped-def]
    """Return the level to which `amount` fills the ranks of the slots ``place[start:end]``."""
    base = np.empty(end - start)
    for k in range(start, end):
        base[k - start] = rank_load[place[k] // size]
    base.sort()
    below = 0.0
    for k in range(len(base)):
        below += base[k]
        level = (amount + below) / (k + 1)
        if k == len(base) - 1 or level <= base[k + 1]:
            return level
    return 0.0


@numba.njit(cache=True, nogil=True)
def _drain(tokens, rank_load, target, slots, first, place, size, tiny):  # type: ignore[no-untyped-def]
    """Move tokens from ranks above the target to ranks below it until no path is left; return the ranks reached last."""
    num_ranks = len(rank_load)
    queue = np.empty(num_ranks, np.int64)
    give, take = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
    ends = np.empty(num_ranks, np.int64)
    asked = np.zeros(len(first) - 1, np.int64)
    mark = 0
    while True:
        mark += 1
        reached = rank_load > target + tiny
        filled, found = 0, 0
        for r in range(num_ranks):
            if reached[r]:
                queue[filled] = r
                give[r] = -1
                filled += 1
        at = 0
        while at < filled:
            r = queue[at]
            at += 1
            for s in range(r * size, (r + 1) * size):
                e = slots[s]
                if tokens[s] <= 0 or first[e + 1] - first[e] < 2 or asked[e] == mark:
                    continue
                asked[e] = mark
                for k in range(first[e], first[e + 1]):
                    q = place[k] // size
                    if not reached[q]:
                        reached[q] = True
                        give[q], take[q] = s, place[k]
                        queue[filled] = q
                        filled += 1
                        if rank_load[q] < target:
                            ends[found] = q
                            found += 1
        if filled == 0 or found == 0:
            return reached
        for k in range(found):
            _push(ends[k], tokens, rank_load, target, give, take, size)


@numba.njit(cache=True, nogil=True)
def _push(end, tokens, rank_load, target, give, take, size):  # type: ignore[no-untyped-def]
    """Move along one path of the search tree what its start has too much, its end too little and its slots hold."""
    amount, r = target - rank_load[end], end
    while give[r] >= 0:
        amount = min(amount, tokens[give[r]])
        r = give[r] // size
    amount = min(amount, rank_load[r] - target)
    if amount <= 0:
        return
    rank_load[r] -= amount
    rank_load[end] += amount
    r = end
    while give[r] >= 0:
        tokens[give[r]] -= amount
        tokens[take[r]] += amount
        r = give[r] // size


@numba.njit(cache=True, nogil=True)
def split_layers(slots, load, num_ranks):  # type: ignore[no-untyped-def]
    """Return float64[layer, slot] tokens and float64[layer] largest rank loads of all layers; see `split_layer`."""
    tokens, largest = np.empty(slots.shape), np.empty(len(slots))
    for layer in range(len(slots)):
        tokens[layer], largest[layer], _ = split_layer(slots[layer], load[layer], num_ranks)
    return tokens, largest
