"""Per forward pass and layer: distinct experts, and the busiest rank under a plan.

A pass that is open (rows of it are still to come) has a slot of state. What a slot holds counts only where its stamp
is that of the pass, so that nothing is cleared between passes.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def add_distinct(ids: np.ndarray, step: np.ndarray, slot: np.ndarray, stamp: np.ndarray,
                 distinct: np.ndarray) -> None:
    """Add each expert once per pass to distinct int32[step, layer]; stamp int32[slot, layer, expert] starts at -1."""
    for token in range(ids.shape[0]):
        which = step[token]
        for layer in range(ids.shape[1]):
            seen = stamp[slot[token], layer]
            for pick in range(ids.shape[2]):
                expert = ids[token, layer, pick]
                if expert >= 0 and seen[np.uint16(expert)] != which:
                    seen[np.uint16(expert)] = which
                    distinct[which, layer] += 1


@numba.njit(cache=True, nogil=True)
def add_rank_load(ids: np.ndarray, step: np.ndarray, slot: np.ndarray, first: np.ndarray, rank: np.ndarray,
                  share: np.ndarray, stamp: np.ndarray, load: np.ndarray, largest: np.ndarray) -> None:
    """Raise largest float64[step, layer] to the largest rank load so far.

    Loads only grow within a pass, so that the running maximum is that of the whole pass. Copies ``first[layer,
    expert] ... first[layer, expert + 1] - 1`` of an expert are at `rank` with `share`; stamp int32 and load float64
    are [slot, layer, rank].
    """
    for token in range(ids.shape[0]):
        which, where = step[token], slot[token]
        for layer in range(ids.shape[1]):
            for pick in range(ids.shape[2]):
                expert = ids[token, layer, pick]
                if expert < 0:
                    continue
                for copy in range(first[layer, expert], first[layer, expert + 1]):
                    at = rank[copy]
                    if stamp[where, layer, at] != which:
                        stamp[where, layer, at] = which
                        load[where, layer, at] = 0.0
                    load[where, layer, at] += share[copy]
                    if load[where, layer, at] > largest[which, layer]:
                        largest[which, layer] = load[where, layer, at]
