"""Annealing of one layer on the distinct ranks and nodes that its sampled tokens reach.

Compiled because a swap is judged by walking the uses of two experts (about 1 us per 600 uses; numpy: 100 us).
"""

from __future__ import annotations

import numba
import numpy as np

from moesim.placement.kernels.moves import Place, Rules, Uses, below, extra_cost, fill, fraction, pick, propose, put


@numba.njit(cache=True, nogil=True, inline="always")
def _take(place: Place, nodes: np.ndarray, rules: Rules, token: int, rank: int, weight: float) -> float:
    """Take one use of a token from a rank; return the change of its fan-out."""
    change, node = 0.0, rules.node_of[rank]
    place.reached[token, rank] -= 1
    if place.reached[token, rank] == 0:
        change -= 1.0
    nodes[token, node] -= 1
    if nodes[token, node] == 0:
        change -= weight
    return change


@numba.njit(cache=True, nogil=True, inline="always")
def _give(place: Place, nodes: np.ndarray, rules: Rules, token: int, rank: int, weight: float) -> float:
    """Give one use of a token to a rank; return the change of its fan-out."""
    change, node = 0.0, rules.node_of[rank]
    if place.reached[token, rank] == 0:
        change += 1.0
    place.reached[token, rank] += 1
    if nodes[token, node] == 0:
        change += weight
    nodes[token, node] += 1
    return change


@numba.njit(cache=True, nogil=True)
def start(uses: Uses, place: Place, nodes: np.ndarray, rules: Rules, value: np.ndarray, weight: float) -> float:
    """Set every count from the slots; return the cost: ranks + weight * nodes, moves and broken constraints."""
    fill(place, rules)
    place.reached[:] = 0
    nodes[:] = 0
    value[2] = 0.0
    for expert in range(len(place.copies)):
        for use in range(uses.first[expert], uses.first[expert + 1]):
            slot = pick(place.replicas[expert], place.copies[expert], uses.turn[use])
            value[2] += _give(place, nodes, rules, uses.token[use], rules.rank_of[slot], weight)
    value[0] = value[2] + extra_cost(place, rules)
    return value[0]


@numba.njit(cache=True, nogil=True)
def _shift(uses: Uses, place: Place, nodes: np.ndarray, rules: Rules, expert: int, old: np.ndarray, num_old: int,
           weight: float) -> float:
    delta, num_new = 0.0, place.copies[expert]
    for use in range(uses.first[expert], uses.first[expert + 1]):
        turn = uses.turn[use]
        before = rules.rank_of[pick(old, num_old, turn)]
        after = rules.rank_of[pick(place.replicas[expert], num_new, turn)]
        if before != after:
            delta += _take(place, nodes, rules, uses.token[use], before, weight)
            delta += _give(place, nodes, rules, uses.token[use], after, weight)
    return delta


@numba.njit(cache=True, nogil=True)
def change(uses: Uses, place: Place, nodes: np.ndarray, rules: Rules, value: np.ndarray, old: np.ndarray,
           weight: float, slot: int, other: int, expert: int) -> float:
    """Put `expert` into `slot`, and what was there into `other` (unless -1); return the new cost."""
    first = place.slots[slot]
    num_first, num_second = place.copies[first], place.copies[expert]
    old[0, :num_first] = place.replicas[first, :num_first]
    old[1, :num_second] = place.replicas[expert, :num_second]
    put(place, rules, slot, expert)
    if other >= 0:
        put(place, rules, other, first)
    value[2] += _shift(uses, place, nodes, rules, first, old[0], num_first, weight)
    value[2] += _shift(uses, place, nodes, rules, expert, old[1], num_second, weight)
    value[0] = value[2] + extra_cost(place, rules)
    return value[0]


@numba.njit(cache=True, nogil=True, inline="always")
def _one(place: Place, nodes: np.ndarray, rules: Rules, token: int, source: int, target: int, weight: float) -> float:
    delta = 0.0
    if place.reached[token, source] == 1:
        delta -= 1.0
    if place.reached[token, target] == 0:
        delta += 1.0
    node, there = rules.node_of[source], rules.node_of[target]
    if node != there:
        if nodes[token, node] == 1:
            delta -= weight
        if nodes[token, there] == 0:
            delta += weight
    return delta


@numba.njit(cache=True, nogil=True)
def swap_delta(uses: Uses, place: Place, nodes: np.ndarray, rules: Rules, weight: float, first: int,
               second: int) -> float:
    """Return what swapping two experts with one copy each would change; tokens that use both keep their fan-out."""
    source = rules.rank_of[place.replicas[first, 0]]
    target = rules.rank_of[place.replicas[second, 0]]
    a, b, delta = uses.first[first], uses.first[second], 0.0
    end_a, end_b = uses.first[first + 1], uses.first[second + 1]
    while a < end_a or b < end_b:
        if b >= end_b or (a < end_a and uses.token[a] < uses.token[b]):
            delta += _one(place, nodes, rules, uses.token[a], source, target, weight)
            a += 1
        elif a >= end_a or uses.token[b] < uses.token[a]:
            delta += _one(place, nodes, rules, uses.token[b], target, source, weight)
            b += 1
        else:
            a += 1
            b += 1
    return delta


@numba.njit(cache=True, nogil=True)
def anneal(uses: Uses, place: Place, nodes: np.ndarray, rules: Rules, value: np.ndarray, old: np.ndarray,
           weight: float, best: np.ndarray, state: np.ndarray, moves: int, hot: float, cold: float,
           plain: bool) -> int:
    """Try `moves` moves at temperatures from `hot` to `cold`; keep the best slots in `best`. Returns those taken.

    `plain`: no constraint, no price of moves and no token with one expert twice, so that most swaps need not be made
    to be judged.
    """
    taken, cooling = 0, (cold / hot) ** (1.0 / max(1, moves))
    temperature = hot
    for _ in range(moves):
        temperature *= cooling
        slot, other, expert = propose(place, rules, state, below(state, len(place.slots)))
        if slot < 0:
            continue
        limit = -temperature * np.log(1.0 - fraction(state))  # a rise up to this is taken
        before, first = value[0], place.slots[slot]
        quick = plain and other >= 0 and place.copies[first] == 1 and place.copies[expert] == 1
        if quick and swap_delta(uses, place, nodes, rules, weight, first, expert) > limit:
            continue
        if change(uses, place, nodes, rules, value, old, weight, slot, other, expert) - before > limit:
            change(uses, place, nodes, rules, value, old, weight, slot, other, first)
            continue
        taken += 1
        if value[0] < value[1] - 0.5 * 2.0**-20:
            value[1] = value[0]
            best[:] = place.slots
    return taken
