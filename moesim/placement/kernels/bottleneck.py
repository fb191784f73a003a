"""Pair swaps on the bottleneck objective. Compiled: a search tries millions of swaps, each O(ranks) of scalar work.

Items are slots of a layer (an expert, or one copy with its share). Arrays, here and in the functions:

    at         int64[layer, slot], the item in each slot; slot // slots_per_rank is the rank
    home       int64[layer, item], the rank of each item
    rows       float64[layer, item], seconds that an item keeps its rank busy
    flow       float64[pair, item, item], tokens between the items of a layer and of the next; `back` is its transpose
    link       float64[rank, rank], seconds per token
    into       float64[layer, item, rank], tokens that come to an item from each rank of the layer before
    onto       float64[layer, item, rank], tokens that go from an item to each rank of the layer after
    busy       float64[layer, rank]; send, receive float64[pair, rank]: seconds of compute and of both port directions
"""

from __future__ import annotations

import numba
import numpy as np

# Only the order of additions and comparisons may change: nothing here is NaN, infinite or a signed zero.
_FAST = {"reassoc", "nnan", "ninf", "nsz"}
_STAY = 256  # moves in a row within one layer, whose tables then stay in the cache


@numba.njit(cache=True, nogil=True)
def build(home: np.ndarray, rows: np.ndarray, flow: np.ndarray, link: np.ndarray, into: np.ndarray,
          onto: np.ndarray, busy: np.ndarray, send: np.ndarray, receive: np.ndarray) -> None:
    """Fill the tables and sums from `home`."""
    busy[:] = 0.0
    into[:] = 0.0
    onto[:] = 0.0
    send[:] = 0.0
    receive[:] = 0.0
    layers, items = home.shape
    for layer in range(layers):
        for one in range(items):
            busy[layer, home[layer, one]] += rows[layer, one]
    for pair in range(layers - 1):
        for one in range(items):
            rank = home[pair, one]
            for other in range(items):
                there, tokens = home[pair + 1, other], flow[pair, one, other]
                onto[pair, one, there] += tokens
                into[pair + 1, other, rank] += tokens
                send[pair, rank] += tokens * link[rank, there]
                receive[pair, there] += tokens * link[rank, there]


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def _moved(first: np.ndarray, second: np.ndarray, r: int, s: int, link: np.ndarray, far: np.ndarray,
           near: np.ndarray, mean_part: float) -> float:
    """Return the change of a pair's ports once `first` (on r) and `second` (on s) have changed places.

    `first`, `second`: their tokens by rank of the other layer, whose ports are `far`; `near` are the ports on
    their own side. `link` is symmetric, so one function serves both directions.
    """
    to_r, to_s, top, old = 0.0, 0.0, 0.0, 0.0
    link_r, link_s = link[r], link[s]
    for x in range(len(far)):
        change = first[x] - second[x]
        to_r += change * link_r[x]
        to_s += change * link_s[x]
        old = max(old, far[x])
        top = max(top, far[x] + change * (link_s[x] - link_r[x]))
    for x in range(len(near)):
        value = near[x]
        old = max(old, value)
        if x == r:
            value -= to_r
        elif x == s:
            value += to_s
        top = max(top, value)
    return (1.0 - mean_part) * (top - old) + mean_part * (to_s - to_r) / len(near)


@numba.njit(cache=True, nogil=True, fastmath=_FAST)
def swap_change(layer: int, a: int, b: int, r: int, s: int, rows: np.ndarray, link: np.ndarray, into: np.ndarray,
                onto: np.ndarray, busy: np.ndarray, send: np.ndarray, receive: np.ndarray, mean_part: float) -> float:
    """Return by how many seconds the objective changes if items a (on rank r) and b (on s) change places.

    `mean_part`: how far a pair counts with the mean over the ports of one direction instead of the busiest; 0: the
    objective itself.
    """
    load, change = busy[layer], rows[layer, a] - rows[layer, b]
    old, new = 0.0, 0.0
    for x in range(len(load)):
        value = load[x]
        old = max(old, value)
        if x == r:
            value -= change
        elif x == s:
            value += change
        new = max(new, value)
    total = new - old
    if layer > 0:
        total += _moved(into[layer, a], into[layer, b], r, s, link, send[layer - 1], receive[layer - 1], mean_part)
    if layer < len(rows) - 1:
        total += _moved(onto[layer, a], onto[layer, b], r, s, link, receive[layer], send[layer], mean_part)
    return total


@numba.njit(cache=True, nogil=True)
def _shift(first: np.ndarray, second: np.ndarray, r: int, s: int, link: np.ndarray, far: np.ndarray,
           near: np.ndarray) -> None:
    for x in range(len(far)):
        change = first[x] - second[x]
        near[r] -= change * link[r, x]
        near[s] += change * link[s, x]
        far[x] += change * (link[s, x] - link[r, x])


@numba.njit(cache=True, nogil=True)
def apply_swap(layer: int, a: int, b: int, r: int, s: int, home: np.ndarray, rows: np.ndarray, flow: np.ndarray,
               back: np.ndarray, link: np.ndarray, into: np.ndarray, onto: np.ndarray, busy: np.ndarray,
               send: np.ndarray, receive: np.ndarray) -> None:
    """Let items a (on rank r) and b (on s) change places, in `home`, the tables and the sums."""
    change = rows[layer, a] - rows[layer, b]
    busy[layer, r] -= change
    busy[layer, s] += change
    home[layer, a], home[layer, b] = s, r
    if layer > 0:
        p = layer - 1
        _shift(into[layer, a], into[layer, b], r, s, link, send[p], receive[p])
        for other in range(home.shape[1]):
            tokens = back[p, a, other] - back[p, b, other]
            onto[p, other, r] -= tokens
            onto[p, other, s] += tokens
    if layer < len(rows) - 1:
        _shift(onto[layer, a], onto[layer, b], r, s, link, receive[layer], send[layer])
        for other in range(home.shape[1]):
            tokens = flow[layer, a, other] - flow[layer, b, other]
            into[layer + 1, other, r] -= tokens
            into[layer + 1, other, s] += tokens


@numba.njit(cache=True, nogil=True)
def _draw(state: np.ndarray) -> np.uint64:
    """Return the next number of xorshift64 (Marsaglia 2003): a generator per thread, the same on every machine."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return x


@numba.njit(cache=True, nogil=True)
def _below(state: np.ndarray, limit: int) -> int:
    return int(np.int64((_draw(state) >> np.uint64(33)) % np.uint64(limit)))


@numba.njit(cache=True, nogil=True)
def _busiest(layer: int, kind: int, busy: np.ndarray, send: np.ndarray, receive: np.ndarray) -> int:
    """Return a rank worth relieving: the busiest by compute (kind 0), or its busiest port before or after."""
    if kind == 1 and layer > 0:
        out, inn = int(np.argmax(send[layer - 1])), int(np.argmax(receive[layer - 1]))
        return out if send[layer - 1, out] > receive[layer - 1, inn] else inn
    if kind == 2 and layer < len(send):
        out, inn = int(np.argmax(send[layer])), int(np.argmax(receive[layer]))
        return out if send[layer, out] > receive[layer, inn] else inn
    return int(np.argmax(busy[layer]))


@numba.njit(cache=True, nogil=True)
def anneal(num_moves: int, temperature: float, mean_part: float, first: int, last: int, state: np.ndarray, movable: np.ndarray,
           at: np.ndarray, home: np.ndarray, rows: np.ndarray, flow: np.ndarray, back: np.ndarray,
           link: np.ndarray, into: np.ndarray, onto: np.ndarray, busy: np.ndarray, send: np.ndarray,
           receive: np.ndarray) -> int:
    """Try random swaps in layers first ... last - 1 at one temperature (Metropolis); return how many were taken.

    Three times out of four one item is taken from a rank that holds the maximum of some term. Layers outside the
    range are only read where they border it, so two threads may work on ranges with a layer between them.
    """
    ranks, items = len(link), home.shape[1]
    width, taken = items // ranks, 0
    layer = first
    for move in range(num_moves):
        if move % _STAY == 0:
            layer = first + _below(state, last - first)
        kind = _below(state, 4)
        r = _busiest(layer, kind, busy, send, receive) if kind < 3 else _below(state, ranks)
        slot, other = r * width + _below(state, width), _below(state, items)
        a, b, s = at[layer, slot], at[layer, other], other // width
        if r == s or not (movable[layer, a] and movable[layer, b]):
            continue
        change = swap_change(layer, a, b, r, s, rows, link, into, onto, busy, send, receive, mean_part)
        if change > 0.0 and change > -temperature * np.log((np.float64(_draw(state) >> np.uint64(11)) + 1.0) / 2.0**53):
            continue
        apply_swap(layer, a, b, r, s, home, rows, flow, back, link, into, onto, busy, send, receive)
        at[layer, slot], at[layer, other] = b, a
        taken += 1
    return taken


@numba.njit(cache=True, nogil=True)
def descend(layer: int, least: float, movable: np.ndarray, at: np.ndarray, home: np.ndarray, rows: np.ndarray, flow: np.ndarray,
            back: np.ndarray, link: np.ndarray, into: np.ndarray, onto: np.ndarray, busy: np.ndarray,
            send: np.ndarray, receive: np.ndarray) -> int:
    """Try every swap of a layer once and take those that win more than `least` seconds; return how many."""
    items, taken = home.shape[1], 0
    width = items // len(link)
    for slot in range(items):
        for other in range((slot // width + 1) * width, items):
            a, b = at[layer, slot], at[layer, other]
            if not (movable[layer, a] and movable[layer, b]):
                continue
            r, s = slot // width, other // width
            if swap_change(layer, a, b, r, s, rows, link, into, onto, busy, send, receive, 0.0) < -least:
                apply_swap(layer, a, b, r, s, home, rows, flow, back, link, into, onto, busy, send, receive)
                at[layer, slot], at[layer, other] = b, a
                taken += 1
    return taken
