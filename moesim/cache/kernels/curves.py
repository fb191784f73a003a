"""Hits at all sizes in one pass, for one layer: stack algorithms under set semantics.

The uses of a layer come as int16[use] with bounds int64[access + 1]; within an access their order does not matter.
"""

from __future__ import annotations

import numba
import numpy as np

# Next use of an expert that is not used again; in which order such experts leave changes no hit.
NO_USE = (1 << 31) - 1
MAX_LAYER_USES = NO_USE


@numba.njit(cache=True, nogil=True)
def gather(experts: np.ndarray, starts: np.ndarray, stops: np.ndarray, last: np.ndarray, uses: np.ndarray,
           bounds: np.ndarray) -> int:
    """Copy the accesses ``experts[starts[i]:stops[i]]`` without padding (-1) into `uses`; `last` is scratch, int64[expert].

    Returns the first access that names an expert twice, or -1.
    """
    last[:] = -1
    end = 0
    for access in range(len(starts)):
        bounds[access] = end
        for source in range(starts[access], stops[access]):
            expert = experts[source]
            if expert >= 0:
                if last[expert] == access:
                    return access
                last[expert] = access
                uses[end] = expert
                end += 1
    bounds[len(starts)] = end
    return -1


@numba.njit(cache=True, nogil=True)
def _num_above(stamps: np.ndarray, stamp: int) -> int:
    """Return how many stamps are higher: some vector instructions."""
    count = 0
    for i in range(len(stamps)):
        count += stamps[i] > stamp
    return count


@numba.njit(cache=True, nogil=True)
def lru_depths(uses: np.ndarray, bounds: np.ndarray, stamps: np.ndarray, at_depth: np.ndarray) -> None:
    """Count the uses by their depth in the LRU stack before their access, int64[depth from 0]; first uses are left out.

    The depth of an expert is the number of later stamps. A stamp is the access of the last use, then the expert, so
    that in one access the lower expert is the older; int64[expert], all -1 at first.
    """
    num_experts = len(stamps)
    for access in range(len(bounds) - 1):
        for use in range(bounds[access], bounds[access + 1]):
            stamp = stamps[uses[use]]
            if stamp >= 0:
                at_depth[_num_above(stamps, stamp)] += 1
        for use in range(bounds[access], bounds[access + 1]):
            stamps[uses[use]] = access * num_experts + uses[use]


@numba.njit(cache=True, nogil=True)
def layer_next_uses(uses: np.ndarray, first: np.ndarray, upcoming: np.ndarray) -> None:
    """Fill upcoming int32[use] with next uses, or NO_USE; first int64[expert] with first uses or -1."""
    first[:] = -1
    for use in range(len(uses) - 1, -1, -1):
        expert = uses[use]
        later = first[expert]
        upcoming[use] = later if later >= 0 else NO_USE
        first[expert] = use


@numba.njit(cache=True, nogil=True)
def _sink(stack: np.ndarray, place: int, until: int) -> int:
    """Take the entry at `place` out of the stack; at each deeper place the nearer next use stays, the other sinks on.

    The last one takes the first hole: an entry below `until`. Returns where that is.
    """
    carried = stack[place]
    if carried >= until:
        place += 1
        below = stack[place]
        while below >= until:
            stack[place] = min(below, carried)
            carried = max(below, carried)
            place += 1
            below = stack[place]
        stack[place] = carried
    return place


@numba.njit(cache=True, nogil=True)
def opt_depths(bounds: np.ndarray, upcoming: np.ndarray, stack: np.ndarray, at_depth: np.ndarray) -> None:
    """Count the uses by their depth in Belady's priority stack before their access, int64[depth from 0].

    An entry of `stack` (int32, one more than the experts) is an expert's next use, which is as good as its name.
    Experts of the access in progress are the entries below its end. They go to the top and leave holes, into which the
    former top entries sink, one after the other. Below the last entry stands -1, the hole of an expert that is new.
    """
    size = 0
    stack[0] = -1
    for access in range(len(bounds) - 1):
        begin, end = bounds[access], bounds[access + 1]
        for j in range(end - begin):
            hole = _sink(stack, j, end)
            if hole < size:
                at_depth[hole] += 1
            else:
                size += 1
                stack[size] = -1
        for use in range(begin, end):
            stack[use - begin] = upcoming[use]
