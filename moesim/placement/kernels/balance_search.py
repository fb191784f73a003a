"""Compiled search for balance, one layer at a time: annealing, tabu search, and descent over steps.

Compiled because a layer takes some 10^5 moves of a few dozen operations each; plain Python takes a minute for what
20 ms must do. The state of a layer is that of `kernels.balance`.
"""

from __future__ import annotations

import numba
import numpy as np

from moesim.placement.kernels.balance import build, recount, sum_of_maxima, swap

_STRIDE = 4  # of the changes of copies, a random one in so many is tried
_WINDOW = 40  # lighter slots against which one of a busy rank is tried


@numba.njit(cache=True, nogil=True, inline="always")
def _random(state):  # type: ignore[no-untyped-def]
    """xorshift64* (Vigna, ACM TOMS 42(4), 2016): a float in 0 ... 1 from a one-element state."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return ((x * np.uint64(2685821657736338717)) >> np.uint64(11)) * 2.0**-53


@numba.njit(cache=True, nogil=True, inline="always")
def _over(value, target):  # type: ignore[no-untyped-def]
    return (value - target) ** 2 if value > target else 0.0


@numba.njit(cache=True, nogil=True)
def _total_over(rank_load, target):  # type: ignore[no-untyped-def]
    total = 0.0
    for value in rank_load:
        total += _over(value, target)
    return total


@numba.njit(cache=True, nogil=True)
def anneal(load, slots, num_ranks, target, hot, cold, moves, recounts, seed):  # type: ignore[no-untyped-def]
    """Anneal ``sum_r max(0, load_r - target)^2`` by random swaps and changes of copies; stop where it is 0.

    Args:
        load, slots, num_ranks: the layer; `slots` is changed.
        target: largest rank load wanted.
        hot, cold: temperatures at the two ends, in squared tokens; geometric in between.
        moves: moves tried.
        recounts: share of the moves that take a slot from an expert with several copies and give it to another.
        seed: of the moves.

    Returns the number of moves tried. No move puts a second copy of an expert on a rank.
    """
    state = np.array([np.uint64(seed) * np.uint64(2654435761) + np.uint64(88172645463325252)], np.uint64)
    copies, rank_load, held, head, after, before = build(load, slots, num_ranks)
    num_slots, num_experts = len(slots), len(load)
    size = num_slots // num_ranks
    cooling = (cold / hot) ** (1.0 / max(1, moves))
    temperature, value = hot, _total_over(rank_load, target)
    for move in range(moves):
        temperature *= cooling
        if value <= 0:
            value = _total_over(rank_load, target)
            if value <= 0:
                return move
        i = int(_random(state) * num_slots)
        a, p = slots[i], i // size
        limit = -temperature * np.log(_random(state) + 2.0**-60)
        if _random(state) >= recounts:
            j = int(_random(state) * num_slots)
            b, q = slots[j], j // size
            if p == q or held[q, a] or held[p, b]:
                continue
            d = load[a] / copies[a] - load[b] / copies[b]
            change = (_over(rank_load[p] - d, target) - _over(rank_load[p], target)
                      + _over(rank_load[q] + d, target) - _over(rank_load[q], target))
            if change <= limit:
                swap(i, j, size, load, slots, copies, rank_load, held, head, after, before)
                value += change
        elif copies[a] > 1:
            b = int(_random(state) * num_experts)
            if held[p, b]:
                continue
            change = _recount_change(i, b, size, load, slots, copies, rank_load, head, after, target)
            if change <= limit:
                recount(i, b, size, load, slots, copies, rank_load, held, head, after, before)
                value += change
    return moves


@numba.njit(cache=True, nogil=True)
def _recount_change(s, b, size, load, slots, copies, rank_load, head, after, target):  # type: ignore[no-untyped-def]
    """Return what `recount` would add to the excess; `rank_load` is changed and restored."""
    a, r = slots[s], s // size
    step_a = load[a] / (copies[a] - 1) - load[a] / copies[a]
    step_b = load[b] / (copies[b] + 1) - load[b] / copies[b]
    own = load[b] / (copies[b] + 1) - load[a] / copies[a]
    old = rank_load[r]
    change = _over(old + own, target) - _over(old, target)
    rank_load[r] = old + own
    t = head[a]
    while t >= 0:
        if t != s:
            q = t // size
            change += _over(rank_load[q] + step_a, target) - _over(rank_load[q], target)
            rank_load[q] += step_a
        t = after[t]
    t = head[b]
    while t >= 0:
        q = t // size
        change += _over(rank_load[q] + step_b, target) - _over(rank_load[q], target)
        rank_load[q] += step_b
        t = after[t]
    t = head[b]
    while t >= 0:
        rank_load[t // size] -= step_b
        t = after[t]
    t = head[a]
    while t >= 0:
        if t != s:
            rank_load[t // size] -= step_a
        t = after[t]
    rank_load[r] = old
    return change


@numba.njit(cache=True, nogil=True)
def tabu(load, slots, num_ranks, target, rounds, tenure, recounts, seed):  # type: ignore[no-untyped-def]
    """Lower ``sum_r max(0, load_r - target)^2`` by the best move of an overloaded rank, worse ones included.

    Tabu search (Glover, ORSA J. Computing 1(3), 1989): each round takes a random rank above `target` and makes its
    best swap (in a share `recounts` of the rounds: its best change of copies) that undoes no recent one, unless it
    gives the best layer so far. `slots` ends as the best layer seen.

    Args:
        load, slots, num_ranks: the layer; `slots` is changed.
        target: largest rank load wanted.
        rounds: moves at most.
        tenure: rounds for which a slot (an expert) stays untouched, at most.
        recounts: share of the rounds that change copies.
        seed: of the choices.

    Returns the rounds used; fewer than `rounds`: no rank is above `target`.
    """
    state = np.array([np.uint64(seed) * np.uint64(2654435761) + np.uint64(88172645463325252)], np.uint64)
    copies, rank_load, held, head, after, before = build(load, slots, num_ranks)
    size = len(slots) // num_ranks
    slot_until, expert_until = np.zeros(len(slots), np.int64), np.zeros(len(load), np.int64)
    share = load / copies
    order, place = np.argsort(-share[slots]), np.empty(len(slots), np.int64)
    place[order] = np.arange(len(slots))
    value = best = _total_over(rank_load, target)
    best_slots = slots.copy()
    for step in range(rounds):
        p = _overloaded(rank_load, target, state)
        if p < 0:
            return step
        until = step + 1 + int(_random(state) * tenure)
        if _random(state) < recounts:
            change, i, b = _best_recount(p, size, load, slots, copies, rank_load, held, head, after, target,
                                         expert_until, step, best - value, int(_random(state) * _STRIDE))
            if i < 0:
                continue
            a = slots[i]
            expert_until[a], expert_until[b] = until, until + 1
            share[a], share[b] = load[a] / (copies[a] - 1), load[b] / (copies[b] + 1)
            recount(i, b, size, load, slots, copies, rank_load, held, head, after, before)
            _sort_again(order, place, share, slots)
        else:
            change, i, j = _best_swap(p, size, share, slots, rank_load, held, target, slot_until, step,
                                      best - value, order, place)
            if i < 0:
                continue
            swap(i, j, size, load, slots, copies, rank_load, held, head, after, before)
            order[place[i]], order[place[j]] = j, i
            place[i], place[j] = place[j], place[i]
            slot_until[i], slot_until[j] = until, step + 1 + int(_random(state) * tenure)
        value += change
        if value < best:
            best = value
            best_slots[:] = slots
    slots[:] = best_slots
    return rounds


@numba.njit(cache=True, nogil=True)
def _overloaded(rank_load, target, state):  # type: ignore[no-untyped-def]
    """Return a rank above the target, the first from a random one on; -1 if there is none."""
    ranks = len(rank_load)
    first = int(_random(state) * ranks)
    for r in range(first, ranks):
        if rank_load[r] > target:
            return r
    for r in range(first):
        if rank_load[r] > target:
            return r
    return -1


@numba.njit(cache=True, nogil=True)
def _sort_again(order, place, share, slots):  # type: ignore[no-untyped-def]
    """Bring the slots, almost in falling order of their share, back into it."""
    for k in range(1, len(order)):
        slot, own = order[k], share[slots[order[k]]]
        while k > 0 and share[slots[order[k - 1]]] < own:
            order[k] = order[k - 1]
            place[order[k]] = k
            k -= 1
        order[k] = slot
        place[slot] = k


@numba.njit(cache=True, nogil=True)
def _best_swap(p, size, share, slots, rank_load, held, target, until, step, aspire, order,  # type: ignore[no-untyped-def]
               place):
    """Return the change of the excess, and the slots, of rank p's best swap that is free or beats `aspire`.

    Each slot of p is tried against the `_WINDOW` next lighter ones (`order`): a rank near its target needs a small change.
    """
    found, best_i, best_j = np.inf, -1, -1
    own = _over(rank_load[p], target)
    for i in range(p * size, (p + 1) * size):
        a = slots[i]
        for k in range(place[i] + 1, min(place[i] + 1 + _WINDOW, len(order))):
            j = order[k]
            q = j // size
            d = share[a] - share[slots[j]]
            change = (_over(rank_load[p] - d, target) + _over(rank_load[q] + d, target) - own
                      - _over(rank_load[q], target))
            if change >= found or q == p or held[q, a] or held[p, slots[j]]:
                continue
            if (until[i] <= step and until[j] <= step) or change < aspire:
                found, best_i, best_j = change, i, j
    return found, best_i, best_j


@numba.njit(cache=True, nogil=True)
def _best_recount(p, size, load, slots, copies, rank_load, held, head, after, target, until, step,  # type: ignore[no-untyped-def]
                  aspire, skip):
    """Return the change, the slot and its new expert of rank p's best change of copies.

    Either a slot of p, a copy of an expert that has others, goes to another expert, or an expert of p gets a copy
    more in such a slot elsewhere.
    """
    found, best_s, best_b = np.inf, -1, -1
    for s in range(len(slots)):
        a, r = slots[s], s // size
        if copies[a] < 2 or (r != p and s % _STRIDE != skip):
            continue
        for k in range(skip, len(load), _STRIDE) if r == p else range(size):
            b = k if r == p else slots[p * size + k]
            if held[r, b]:
                continue
            change = _recount_change(s, b, size, load, slots, copies, rank_load, head, after, target)
            if change < found and ((until[a] <= step and until[b] <= step) or change < aspire):
                found, best_s, best_b = change, s, b
    return found, best_s, best_b


@numba.njit(cache=True, nogil=True)
def step_descent(loads, slots, num_ranks, tries, recounts, seed):  # type: ignore[no-untyped-def]
    """Lower `sum_of_maxima` by random swaps and changes of copies, each kept where it helps or costs nothing.

    Args:
        loads: float64[step, expert], tokens of each step.
        slots: int32[slot], changed; no move puts an expert on a rank twice.
        num_ranks, tries: ranks; moves tried, each O(steps * (ranks + slots)).
        recounts: share of the moves that take a slot from an expert with several copies and give it to another.
        seed: of the moves.

    Returns the sum of the maxima.
    """
    state = np.array([np.uint64(seed) * np.uint64(2654435761) + np.uint64(88172645463325252)], np.uint64)
    num_slots, num_experts = len(slots), loads.shape[1]
    size = num_slots // num_ranks
    held = np.zeros((num_ranks, num_experts), np.int16)
    for s in range(num_slots):
        held[s // size, slots[s]] += 1
    copies = held.sum(axis=0)
    best = sum_of_maxima(loads, slots, num_ranks)
    for _ in range(tries):
        i, j = int(_random(state) * num_slots), int(_random(state) * num_slots)
        a, b, p, q = slots[i], slots[j], i // size, j // size
        if a == b or held[p, b] or (p == q):
            continue
        swap = _random(state) >= recounts
        if (swap and held[q, a]) or (not swap and copies[a] < 2):
            continue
        slots[i] = b
        if swap:
            slots[j] = a
        value = sum_of_maxima(loads, slots, num_ranks)
        if value > best:
            slots[i], slots[j] = a, b
            continue
        best = value
        held[p, a] -= 1
        held[p, b] += 1
        if swap:
            held[q, b] -= 1
            held[q, a] += 1
        else:
            copies[a] -= 1
            copies[b] += 1
    return best
