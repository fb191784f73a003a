"""Compiled loops of the chain SDP: the entrywise step, and cuts found, weighted and added up.

Compiled because each iteration touches 15 million entries at 58 layers x 256 experts, which plain numpy does in eight
passes with temporaries; the cuts need index loops. Two threads run these at once (the GIL is released).

``joint`` arrays are float32[2 E, 2 E] of one pair of layers: experts of the layer, then of the next.
"""

from __future__ import annotations

import numba
import numpy as np

NEAREST = 32  # others around a centre that cuts are looked for among: their number enters cubed
WIDTH = 4  # members of a cut: a centre, then two or three others (-1: none)


@numba.njit(cache=True, nogil=True)
def centred_difference(first: np.ndarray, cross: np.ndarray, second: np.ndarray, dual: np.ndarray,
                       out: np.ndarray) -> None:
    """Fill `out` with ``[[first, cross], [cross', second]] - dual``, its four blocks without row and column means."""
    size = len(first)
    for i in range(size):
        for j in range(size):
            out[i, j] = first[i, j] - dual[i, j]
            out[i, size + j] = cross[i, j] - dual[i, size + j]
            out[size + i, size + j] = second[i, j] - dual[size + i, size + j]
    for i in range(size):
        for j in range(size):
            out[size + j, i] = out[i, size + j]
    part = np.empty(2)
    mean = np.empty((2 * size, 2))
    for i in range(2 * size):
        part[:] = 0.0
        for j in range(size):
            part[0] += out[i, j]
            part[1] += out[i, size + j]
        mean[i, 0], mean[i, 1] = part[0] / size, part[1] / size
    whole = np.zeros((2, 2))
    for i in range(2 * size):
        for b in range(2):
            whole[i // size, b] += mean[i, b] / size
    for i in range(2 * size):
        a = i // size
        for b in range(2):
            shift = whole[a, b] - mean[i, b]
            for j in range(size):
                out[i, b * size + j] += shift - mean[b * size + j, a]


@numba.njit(cache=True, nogil=True)
def entries(before: np.ndarray, after: np.ndarray, cut_before: np.ndarray, cut_after: np.ndarray,
            counts: np.ndarray, penalty: float, same: np.ndarray, cross: np.ndarray, has_before: bool,
            has_after: bool) -> None:
    """Project one layer's entries into 0 ... 1 (diagonal 1), and take them off the duals.

    Args:
        before, after: joint duals (with the spectral parts added) of the pairs that end and begin with the layer.
        cut_before, cut_after: joint weights of the cuts of those pairs.
        counts: float32[E, E], transitions to the next layer.
        penalty: of the augmented Lagrangian.
        same, cross: float32[E, E], filled with the layer's co-location and that with the next layer.
    """
    size = len(same)
    inverse = np.float32(1.0 / penalty)
    share = np.float32(1.0 / (has_before + has_after))
    zero, one, half = np.float32(0.0), np.float32(1.0), np.float32(0.5)
    for i in range(size):
        for j in range(size):
            total = np.float32(0.0)
            if has_before:
                total += before[size + i, size + j] - cut_before[size + i, size + j] * inverse
            if has_after:
                total += after[i, j] - cut_after[i, j] * inverse
            value = min(max(total * share, zero), one)
            if i == j:
                value = one
            same[i, j] = value
            if has_before:
                before[size + i, size + j] -= same[i, j]
            if has_after:
                after[i, j] -= same[i, j]
                mean = after[i, size + j] + (half * counts[i, j] - cut_after[i, size + j]) * inverse
                cross[i, j] = min(max(mean, zero), one)
                after[i, size + j] -= cross[i, j]


@numba.njit(cache=True, nogil=True)
def value_of(joint: np.ndarray, cut: np.ndarray) -> float:
    """Return a cut's left side: centre with others, less the others among themselves (at most 1)."""
    total = 0.0
    for a in range(1, WIDTH):
        if cut[a] >= 0:
            total += joint[cut[0], cut[a]]
            for b in range(a + 1, WIDTH):
                if cut[b] >= 0:
                    total -= joint[cut[a], cut[b]]
    return total


@numba.njit(cache=True, nogil=True)
def find_cuts(joint: np.ndarray, above: float, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int32[cut, WIDTH] and float64[cut]: cuts violated by more than `above`, at most `room` of them.

    Around every centre: all pairs of others, each with the third other that adds most, if one does.
    """
    size = len(joint)
    cuts, excess = np.full((room, WIDTH), -1, np.int32), np.zeros(room)
    found = 0
    near = np.empty(size, np.int64)
    for i in range(size):
        count, floor = NEAREST + 1, above / 1.5
        while count > NEAREST:
            count, floor = 0, floor * 1.5
            for j in range(size):
                if j != i and joint[i, j] > floor:
                    near[count], count = j, count + 1
            if floor > 1.0:
                count = min(count, NEAREST)
        for x in range(count):
            for y in range(x + 1, count):
                j, k = near[x], near[y]
                value = joint[i, j] + joint[i, k] - joint[j, k] - 1.0
                third, most = -1, 0.0
                for z in range(count):
                    m = near[z]
                    if m != j and m != k:
                        more = joint[i, m] - joint[j, m] - joint[k, m]
                        if more > most:
                            third, most = m, more
                if value + most > above and found < room:
                    cuts[found, 0], cuts[found, 1], cuts[found, 2], cuts[found, 3] = i, j, k, third
                    excess[found] = value + most
                    found += 1
    return cuts[:found], excess[:found]


@numba.njit(cache=True, nogil=True)
def weigh_cuts(joint: np.ndarray, cuts: np.ndarray, weight: np.ndarray, step: float, total: np.ndarray) -> None:
    """Raise the weights of violated cuts, lower the others', not below 0; fill `total` with what they sum to.

    A step is divided by the number of live cuts that share the cut's entries, so that steps do not add up to too much.
    """
    shared = np.zeros(joint.shape, np.int32)
    members = np.zeros(len(cuts), np.int64)
    for q in range(len(cuts)):
        if weight[q] > 0.0 or value_of(joint, cuts[q]) > 1.0:
            for a in range(WIDTH):
                for b in range(a + 1, WIDTH):
                    i, j = cuts[q, a], cuts[q, b]
                    if i >= 0 and j >= 0:
                        shared[min(i, j), max(i, j)] += 1
    total[:] = 0.0
    for q in range(len(cuts)):
        members[q] = 0
        for a in range(WIDTH):
            for b in range(a + 1, WIDTH):
                i, j = cuts[q, a], cuts[q, b]
                if i >= 0 and j >= 0:
                    members[q] += shared[min(i, j), max(i, j)]
        weight[q] = max(0.0, weight[q] + step * (value_of(joint, cuts[q]) - 1.0) / max(members[q], 1))
        add_cut(total, cuts[q], weight[q])


@numba.njit(cache=True, nogil=True)
def add_cut(total: np.ndarray, cut: np.ndarray, weight: float) -> None:
    """Add a weighted cut to a symmetric joint matrix, half of it to each of the two entries of a pair."""
    for a in range(WIDTH):
        for b in range(a + 1, WIDTH):
            i, j = cut[a], cut[b]
            if i >= 0 and j >= 0:
                half = 0.5 * weight if a == 0 else -0.5 * weight
                total[i, j] += half
                total[j, i] += half


@numba.njit(cache=True, nogil=True)
def relax(dual: np.ndarray, nearest: np.ndarray, first: np.ndarray, cross: np.ndarray, second: np.ndarray,
          weight: float) -> None:
    """Add ``weight nearest + (1 - weight) entries`` to the upper blocks of a dual."""
    size = len(first)
    part, rest = np.float32(weight), np.float32(1.0 - weight)
    for i in range(size):
        for j in range(size):
            dual[i, j] += part * nearest[i, j] + rest * first[i, j]
            dual[i, size + j] += part * nearest[i, size + j] + rest * cross[i, j]
            dual[size + i, size + j] += part * nearest[size + i, size + j] + rest * second[i, j]
