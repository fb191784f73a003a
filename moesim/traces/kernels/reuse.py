"""Reuse from token to token: lag curves within requests, and LRU stack distances in row order."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

LAGS_MAX = 63
"""Lags that fit in the bits of one history word."""


class Recent(NamedTuple):
    """State of the open requests, one slot each.

    ``history`` uint64[slot, layer, expert]: bit d is set where the expert was used d tokens before clock ``when``
    int64[slot, layer, expert]; ``picks`` int64[slot, lag, layer], a ring of the last tokens' picks; ``clock`` and
    ``age`` int64[slot], tokens of the slot in all (with gaps between requests) and of its request.
    """

    history: np.ndarray
    when: np.ndarray
    picks: np.ndarray
    clock: np.ndarray
    age: np.ndarray


@numba.njit(cache=True, nogil=True)
def add_lags(ids: np.ndarray, slot: np.ndarray, is_last: np.ndarray, recent: Recent, again: np.ndarray,
             total: np.ndarray, without: np.ndarray) -> None:
    """Count picks used d tokens earlier in the same request, into again int64[layer, lag - 1].

    ``total`` int64[layer] counts all picks, ``without`` int64[layer, lag - 1] those that no token follows at that lag.
    """
    lags = again.shape[1]
    for token in range(ids.shape[0]):
        where = slot[token]
        now, age = recent.clock[where], recent.age[where]
        for layer in range(ids.shape[1]):
            picks = 0
            for pick in range(ids.shape[2]):
                expert = ids[token, layer, pick]
                if expert < 0:
                    continue
                picks += 1
                past = now - recent.when[where, layer, expert]
                bits = recent.history[where, layer, expert] << np.uint64(past) if past <= lags else np.uint64(0)
                for lag in range(lags):
                    again[layer, lag] += np.int64((bits >> np.uint64(lag + 1)) & np.uint64(1))
                recent.history[where, layer, expert] = bits | np.uint64(1)
                recent.when[where, layer, expert] = now
            recent.picks[where, age % lags, layer] = picks
            total[layer] += picks
        recent.clock[where], recent.age[where] = now + 1, age + 1
        if is_last[token]:
            _end_request(recent, where, without)


@numba.njit(cache=True, nogil=True)
def _end_request(recent: Recent, where: int, without: np.ndarray) -> None:
    """Count the picks of a request's last tokens as not followed, and move the clock past all lags."""
    lags, age = without.shape[1], recent.age[where]
    for layer in range(without.shape[0]):
        tail = 0
        for lag in range(lags):
            if lag < age:
                tail += recent.picks[where, (age - 1 - lag) % lags, layer]
            without[layer, lag] += tail
    recent.clock[where] += lags + 1
    recent.age[where] = 0


@numba.njit(cache=True, nogil=True)
def add_stack_distances(ids: np.ndarray, stack: np.ndarray, size: np.ndarray, stamp: np.ndarray, below: np.ndarray,
                        distances: np.ndarray) -> None:
    """Add LRU stack distances to distances int64[layer, expert + 1]; the last column: never used before.

    ``stack`` int16[layer, expert] holds the ``size`` int64[layer] experts used so far, the latest first. All of a
    token's experts are looked up, then touched in order. ``stamp`` int64[expert + 1] starts at 0, its last entry
    counts the look-ups; ``below`` int16[expert] is scratch. (Mattson et al., IBM Systems Journal 1970.)
    """
    num_experts = stack.shape[1]
    for token in range(ids.shape[0]):
        for layer in range(ids.shape[1]):
            stamp[num_experts] += 1
            mark, picks = stamp[num_experts], 0
            for pick in range(ids.shape[2]):
                expert = ids[token, layer, pick]
                if expert >= 0:
                    stamp[expert] = mark
                    picks += 1
            missing, depth, kept = picks, 0, 0
            while missing and depth < size[layer]:
                expert = stack[layer, depth]
                if stamp[expert] == mark:
                    distances[layer, depth] += 1
                    missing -= 1
                else:
                    below[kept] = expert
                    kept += 1
                depth += 1
            distances[layer, num_experts] += missing
            size[layer] += missing
            for at in range(kept):
                stack[layer, picks + at] = below[at]
            at = picks
            for pick in range(ids.shape[2]):
                expert = ids[token, layer, pick]
                if expert >= 0:
                    at -= 1
                    stack[layer, at] = expert
