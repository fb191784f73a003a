"""Compiled parts of the search for balance, one layer at a time: greedy starts, moves, descent.

Compiled because one layer takes some 10^5 moves of a few dozen operations each; plain Python takes a minute for
what 20 ms must do. All functions change their arguments in place.

State of a layer: ``slots`` int32[slot] experts; ``copies`` int64[expert]; ``rank_load`` float64[rank];
``held`` int16[rank, expert] copies of an expert on a rank; ``head`` int32[expert], ``after`` and ``before``
int32[slot]: doubly linked lists of each expert's slots (-1 ends them).
"""

from __future__ import annotations

import numba
import numpy as np

_STALL = 2000  # descents in a row; only a safeguard, each one lowers the largest rank load


@numba.njit(cache=True, nogil=True)
def build(load, slots, num_ranks):  # type: ignore[no-untyped-def]
    """Return copies, rank_load, held, head, after, before of a layer's slots."""
    num_slots, num_experts = len(slots), len(load)
    size = num_slots // num_ranks
    copies = np.zeros(num_experts, np.int64)
    held = np.zeros((num_ranks, num_experts), np.int16)
    head = np.full(num_experts, -1, np.int32)
    after = np.full(num_slots, -1, np.int32)
    before = np.full(num_slots, -1, np.int32)
    for s in range(num_slots):
        copies[slots[s]] += 1
        held[s // size, slots[s]] += 1
        _link(slots[s], s, head, after, before)
    rank_load = np.zeros(num_ranks)
    for s in range(num_slots):
        rank_load[s // size] += load[slots[s]] / copies[slots[s]]
    return copies, rank_load, held, head, after, before


@numba.njit(cache=True, nogil=True, inline="always")
def _link(e, s, head, after, before):  # type: ignore[no-untyped-def]
    after[s], before[s] = head[e], -1
    if head[e] >= 0:
        before[head[e]] = s
    head[e] = s


@numba.njit(cache=True, nogil=True, inline="always")
def _unlink(e, s, head, after, before):  # type: ignore[no-untyped-def]
    if before[s] >= 0:
        after[before[s]] = after[s]
    else:
        head[e] = after[s]
    if after[s] >= 0:
        before[after[s]] = before[s]


@numba.njit(cache=True, nogil=True)
def swap(i, j, size, load, slots, copies, rank_load, held, head, after, before):  # type: ignore[no-untyped-def]
    """Exchange the experts of two slots on two ranks."""
    a, b, p, q = slots[i], slots[j], i // size, j // size
    difference = load[a] / copies[a] - load[b] / copies[b]
    rank_load[p] -= difference
    rank_load[q] += difference
    held[p, a] -= 1
    held[q, a] += 1
    held[q, b] -= 1
    held[p, b] += 1
    _unlink(a, i, head, after, before)
    _unlink(b, j, head, after, before)
    slots[i], slots[j] = b, a
    _link(b, i, head, after, before)
    _link(a, j, head, after, before)


@numba.njit(cache=True, nogil=True)
def recount(s, b, size, load, slots, copies, rank_load, held, head, after, before):  # type: ignore[no-untyped-def]
    """Give slot `s`, one of several copies of its expert, to expert `b`."""
    a, r = slots[s], s // size
    old_a, new_a = load[a] / copies[a], load[a] / (copies[a] - 1)
    old_b, new_b = load[b] / copies[b], load[b] / (copies[b] + 1)
    rank_load[r] += new_b - old_a
    _unlink(a, s, head, after, before)
    t = head[a]
    while t >= 0:
        rank_load[t // size] += new_a - old_a
        t = after[t]
    t = head[b]
    while t >= 0:
        rank_load[t // size] += new_b - old_b
        t = after[t]
    slots[s] = b
    _link(b, s, head, after, before)
    copies[a] -= 1
    copies[b] += 1
    held[r, a] -= 1
    held[r, b] += 1


@numba.njit(cache=True, nogil=True)
def greedy(load, num_slots, num_ranks, power):  # type: ignore[no-untyped-def]
    """Return int32[slot]: copies to the largest ``load^power / copies``, then heaviest first to the lightest rank.

    `power` 1 gives the copies of EPLB and LPT; above 1 the heaviest experts get more copies and the middle ones
    larger shares, below 1 the reverse. A rank takes no second copy of an expert while another with room has none.
    """
    num_experts, size = len(load), num_slots // num_ranks
    copies = np.ones(num_experts, np.int64)
    weight = load ** power
    for _ in range(num_slots - num_experts):
        copies[np.argmax(weight / copies)] += 1
    order = np.argsort(-load / copies)
    slots = np.full(num_slots, -1, np.int32)
    filled = np.zeros(num_ranks, np.int64)
    rank_load = np.zeros(num_ranks)
    for e in order:
        for _ in range(copies[e]):
            chosen, clean = -1, False
            for r in range(num_ranks):
                if filled[r] == size:
                    continue
                free = True
                for s in range(r * size, r * size + filled[r]):
                    free = free and slots[s] != e
                if chosen < 0 or (free and not clean) or (free == clean and rank_load[r] < rank_load[chosen]):
                    chosen, clean = r, free
            slots[chosen * size + filled[chosen]] = e
            filled[chosen] += 1
            rank_load[chosen] += load[e] / copies[e]
    return slots


@numba.njit(cache=True, nogil=True)
def part_duplicates(load, slots, num_ranks):  # type: ignore[no-untyped-def]
    """Swap second copies of an expert on one rank away, to the slot that changes the loads least; return how many stay."""
    copies, rank_load, held, head, after, before = build(load, slots, num_ranks)
    num_slots = len(slots)
    size, left = num_slots // num_ranks, 0
    for i in range(num_slots):
        a, p = slots[i], i // size
        if held[p, a] < 2:
            continue
        best, best_j = np.inf, -1
        for j in range(num_slots):
            b, q = slots[j], j // size
            if held[q, a] or held[p, b]:
                continue
            difference = load[a] / copies[a] - load[b] / copies[b]
            larger = max(rank_load[p] - difference, rank_load[q] + difference)
            if larger < best:
                best, best_j = larger, j
        if best_j < 0:
            left += 1
        else:
            swap(i, best_j, size, load, slots, copies, rank_load, held, head, after, before)
    return left


@numba.njit(cache=True, nogil=True)
def swap_descent(load, slots, num_ranks, target):  # type: ignore[no-untyped-def]
    """Swap a slot of the busiest rank with one elsewhere while that lowers the larger of the two; return the maximum.

    Of all such swaps the one with the lowest larger rank load is taken; no swap puts an expert on a rank twice. Ends
    at or below `target`, or where no swap helps. O(slots per rank * slots) per swap.
    """
    copies, rank_load, held, head, after, before = build(load, slots, num_ranks)
    num_slots = len(slots)
    size = num_slots // num_ranks
    for _ in range(_STALL):
        h = np.argmax(rank_load)
        top = rank_load[h]
        if top <= target:
            break
        best, best_i, best_j = top * (1 - 2.0**-40), -1, -1
        for i in range(h * size, (h + 1) * size):
            a = slots[i]
            share = load[a] / copies[a]
            for j in range(num_slots):
                b, q = slots[j], j // size
                difference = share - load[b] / copies[b]
                if difference <= 0 or q == h or held[q, a] or held[h, b]:
                    continue
                larger = max(top - difference, rank_load[q] + difference)
                if larger < best:
                    best, best_i, best_j = larger, i, j
        if best_i < 0:
            break
        swap(best_i, best_j, size, load, slots, copies, rank_load, held, head, after, before)
    return exact_maximum(load, slots, num_ranks)


@numba.njit(cache=True, nogil=True)
def exact_maximum(load, slots, num_ranks):  # type: ignore[no-untyped-def]
    """Return the largest rank load under an even split, summed afresh in slot order."""
    copies = np.zeros(len(load), np.int64)
    for e in slots:
        copies[e] += 1
    size, largest = len(slots) // num_ranks, 0.0
    for r in range(num_ranks):
        total = 0.0
        for s in range(r * size, (r + 1) * size):
            total += load[slots[s]] / copies[slots[s]]
        largest = max(largest, total)
    return largest


@numba.njit(cache=True, nogil=True)
def sum_of_maxima(loads, slots, num_ranks):  # type: ignore[no-untyped-def]
    """Return ``sum_t max_r`` of the rank loads of float64[step, expert] `loads` under an even split."""
    copies = np.zeros(loads.shape[1], np.int64)
    for e in slots:
        copies[e] += 1
    size, total = len(slots) // num_ranks, 0.0
    for t in range(len(loads)):
        largest = 0.0
        for r in range(num_ranks):
            value = 0.0
            for s in range(r * size, (r + 1) * size):
                value += loads[t, slots[s]] / copies[slots[s]]
            largest = max(largest, value)
        total += largest
    return total
