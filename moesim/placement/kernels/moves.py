"""What the compiled searches of `fanout` and `step_time` share: one layer's uses, its slots, and the rules for moves.

Compiled because a search looks at some 10**5 moves per layer, each of which touches every use of two experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

BROKEN = 2.0**50  # what a broken constraint costs: more than any plan


class Uses(NamedTuple):
    """Uses of the experts of one layer: those of expert e stand at ``first[e] ... first[e + 1] - 1``, tokens rising.

    ``turn`` is the number of earlier uses of the expert in the same step: it picks the replica (`turn mod replicas`).
    """

    first: np.ndarray
    token: np.ndarray
    turn: np.ndarray
    step: np.ndarray
    home: np.ndarray


class Place(NamedTuple):
    """The slots of one layer and what follows from them; `moved` counts experts that `before` does not hold."""

    slots: np.ndarray
    replicas: np.ndarray
    copies: np.ndarray
    held: np.ndarray
    reached: np.ndarray
    moved: np.ndarray


class Rules(NamedTuple):
    """Constraints of a layer, and the price of a moved expert; rank of each slot, node of each rank.

    Those two are tables because a division takes longer than all else that is done per use.
    """

    pins: np.ndarray
    apart: np.ndarray
    capacities: np.ndarray
    before: np.ndarray
    move_cost: float
    slots_per_rank: int
    rank_of: np.ndarray
    node_of: np.ndarray


@numba.njit(cache=True, nogil=True, inline="always")
def draw(state: np.ndarray) -> np.uint64:
    """Return the next number of an xorshift64* sequence (Vigna, ACM TOMS 42(4), 2016); `state` is uint64[1]."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return x * np.uint64(2685821657736338717)


@numba.njit(cache=True, nogil=True, inline="always")
def below(state: np.ndarray, limit: int) -> int:
    """Return a whole number in 0 ... limit - 1."""
    return int(np.int64((draw(state) >> np.uint64(33)) % np.uint64(limit)))


@numba.njit(cache=True, nogil=True, inline="always")
def fraction(state: np.ndarray) -> float:
    """Return a number in [0, 1)."""
    return np.float64(draw(state) >> np.uint64(11)) * 2.0**-53


@numba.njit(cache=True, nogil=True, inline="always")
def pick(replicas: np.ndarray, count: int, turn: int) -> int:
    """Return the slot of a use: replica `turn mod count`."""
    return replicas[0] if count == 1 else replicas[turn % count]


@numba.njit(cache=True, nogil=True)
def fill(place: Place, rules: Rules) -> None:
    """Set replicas, counts, holdings and moves from the slots."""
    place.copies[:] = 0
    place.held[:] = 0
    place.moved[0] = 0
    for slot in range(len(place.slots)):
        expert, rank = place.slots[slot], rules.rank_of[slot]
        place.replicas[expert, place.copies[expert]] = slot
        place.copies[expert] += 1
        place.held[rank, expert] += 1
        if place.held[rank, expert] == 1 and rules.before[rank, expert] == 0:
            place.moved[0] += 1


@numba.njit(cache=True, nogil=True)
def put(place: Place, rules: Rules, slot: int, expert: int) -> None:
    """Put `expert` into `slot`; replicas stay in rising order of slots."""
    old, rank = place.slots[slot], rules.rank_of[slot]
    place.held[rank, old] -= 1
    if place.held[rank, old] == 0 and rules.before[rank, old] == 0:
        place.moved[0] -= 1
    count, at = place.copies[old], 0
    while place.replicas[old, at] != slot:
        at += 1
    for index in range(at, count - 1):
        place.replicas[old, index] = place.replicas[old, index + 1]
    place.copies[old] = count - 1
    at = place.copies[expert]
    while at > 0 and place.replicas[expert, at - 1] > slot:
        place.replicas[expert, at] = place.replicas[expert, at - 1]
        at -= 1
    place.replicas[expert, at] = slot
    place.copies[expert] += 1
    place.slots[slot] = expert
    place.held[rank, expert] += 1
    if place.held[rank, expert] == 1 and rules.before[rank, expert] == 0:
        place.moved[0] += 1


@numba.njit(cache=True, nogil=True)
def extra_cost(place: Place, rules: Rules) -> float:
    """Return the price of moved experts and broken constraints."""
    broken = 0
    for index in range(len(rules.pins)):
        broken += place.held[rules.pins[index, 1], rules.pins[index, 0]] == 0
    for index in range(len(rules.apart)):
        for rank in range(len(place.held)):
            both = place.held[rank, rules.apart[index, 0]] > 0 and place.held[rank, rules.apart[index, 1]] > 0
            broken += both
    for index in range(len(rules.capacities)):
        distinct = 0
        for expert in range(place.held.shape[1]):
            for rank in range(rules.capacities[index, 0], rules.capacities[index, 1]):
                if place.held[rank, expert] > 0:
                    distinct += 1
                    break
        broken += max(0, distinct - rules.capacities[index, 2])
    return broken * BROKEN + place.moved[0] * rules.move_cost


@numba.njit(cache=True, nogil=True)
def propose(place: Place, rules: Rules, state: np.ndarray, slot: int) -> tuple[int, int, int]:
    """Return ``(slot, other slot or -1, expert for the slot)``: a swap, or another replica; slot -1: no move."""
    old, rank = place.slots[slot], rules.rank_of[slot]
    if place.copies[old] > 1 and fraction(state) < 0.5:
        expert = below(state, len(place.copies))
        if place.held[rank, expert] > 0:
            return -1, -1, -1
        return slot, -1, expert
    other = below(state, len(place.slots))
    expert = place.slots[other]
    if rules.rank_of[other] == rank or expert == old:
        return -1, -1, -1
    # two copies of an expert on one rank are wasted
    if place.held[rank, expert] > 0 or place.held[rules.rank_of[other], old] > 0:
        return -1, -1, -1
    return slot, other, expert
