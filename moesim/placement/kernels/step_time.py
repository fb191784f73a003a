"""Annealing of one layer on the sampled step times, with the simulator's own costs.

Compiled because every move redoes, for each sampled step, the fan-out of the tokens of two experts, the ports and the
kernels; a numpy pass over the sample takes milliseconds, this some microseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from moesim.placement.kernels.moves import Place, Rules, Uses, below, extra_cost, fill, fraction, pick, propose, put
from moesim.placement.step_cost import EGRESS, PAIR
from moesim.units import NS_PER_S


class Net(NamedTuple):
    """Network and kernel as arrays; level 0 is inside nodes, 1 between them.

    ``kernel`` = overhead, task overhead, flops per row, flops/s, bytes per group, bytes per row, bytes/s, tile;
    ``width`` = bytes of a dispatched and a combined token; ``extra`` = the executor's seconds for each.
    """

    latency: np.ndarray
    rate: np.ndarray
    port: np.ndarray
    contention: np.ndarray
    width: np.ndarray
    extra: np.ndarray
    kernel: np.ndarray
    until: np.ndarray


class Times(NamedTuple):
    """What the search keeps of every step; ``value`` = current, best, accepted moves."""

    sent: np.ndarray
    received: np.ndarray
    pair: np.ndarray
    rows: np.ndarray
    kernel: np.ndarray
    total: np.ndarray
    value: np.ndarray
    old: np.ndarray


@numba.njit(cache=True, nogil=True, inline="always")
def _bump(net: Net, rules: Rules, times: Times, step: int, home: int, rank: int, sign: int) -> None:
    if home == rank:
        return
    level = 0 if rules.node_of[home] == rules.node_of[rank] else 1
    source, target = net.port[level, home], net.port[level, rank]
    times.sent[step, level, source] += sign
    times.received[step, level, target] += sign
    if times.pair.size:
        times.pair[step, level, source, target] += sign


@numba.njit(cache=True, nogil=True)
def _shift(uses: Uses, net: Net, place: Place, rules: Rules, times: Times, expert: int, old: np.ndarray,
           num_old: int) -> None:
    """Take the uses of `expert` from its `old` replicas to the present ones."""
    num_new = place.copies[expert]
    for use in range(uses.first[expert], uses.first[expert + 1]):
        turn = uses.turn[use]
        before = pick(old, num_old, turn)
        after = pick(place.replicas[expert], num_new, turn)
        if before == after:
            continue
        token = uses.token[use]
        step = uses.step[token]
        times.rows[step, before] -= 1
        times.rows[step, after] += 1
        source, target = rules.rank_of[before], rules.rank_of[after]
        if source == target:
            continue
        home = uses.home[token]
        place.reached[token, source] -= 1
        if place.reached[token, source] == 0:
            _bump(net, rules, times, step, home, source, -1)
        if place.reached[token, target] == 0:
            _bump(net, rules, times, step, home, target, 1)
        place.reached[token, target] += 1


@numba.njit(cache=True, nogil=True, inline="always")
def _kernel_ns(net: Net, times: Times, step: int, rank: int, width: int) -> int:
    """Return a rank's kernel in ns, -1 without rows; as `KernelRates.ns`."""
    rows, groups, largest = 0, 0, 0
    for slot in range(rank * width, (rank + 1) * width):
        count = times.rows[step, slot]
        rows += count
        groups += count > 0
        largest = max(largest, count)
    if rows == 0:
        return -1
    k = net.kernel
    tile, padding = k[7], (k[7] - 1) / 2
    if groups == 1:
        padded = np.ceil(rows / tile) * tile
    else:
        big = max(tile, largest + padding)
        padded = big + max((groups - 1) * tile, rows - largest + (groups - 1) * padding)
    busy = max(padded * k[2] / k[3], (groups * k[4] + rows * k[5]) / k[6])
    return int(np.rint((k[0] + busy + k[1]) * NS_PER_S))


@numba.njit(cache=True, nogil=True, inline="always")
def _exchange(net: Net, times: Times, step: int) -> tuple[int, int]:
    """Return dispatch and combine of a step in ns."""
    out, back, used = 0.0, 0.0, False
    for level in range(2):
        sent, received = 0, 0
        for port in range(times.sent.shape[2]):
            sent = max(sent, times.sent[step, level, port])
            received = max(received, times.received[step, level, port])
        if sent == 0:
            continue
        used = True
        forth = max(sent, received)
        home = forth
        if net.contention[level] == EGRESS:
            forth, home = sent, received
        elif net.contention[level] == PAIR:
            forth = times.pair[step, level].max()
            home = forth
        out = max(out, net.latency[level] + forth * net.width[0] / net.rate[level])
        back = max(back, net.latency[level] + home * net.width[1] / net.rate[level])
    if not used:
        return 0, 0
    return int(np.rint((out + net.extra[0]) * NS_PER_S)), int(np.rint((back + net.extra[1]) * NS_PER_S))


@numba.njit(cache=True, nogil=True, inline="always")
def _total(net: Net, times: Times, step: int) -> int:
    dispatch, combine = _exchange(net, times, step)
    end, last = dispatch, 0
    for rank in range(times.kernel.shape[1]):
        until = net.until[step, rank]
        last = max(last, until)
        if times.kernel[step, rank] >= 0:
            end = max(end, max(dispatch, until) + times.kernel[step, rank])
    return max(end + combine, last)


@numba.njit(cache=True, nogil=True)
def start(uses: Uses, net: Net, place: Place, rules: Rules, times: Times) -> float:
    """Set every count from the slots; return the cost (ns over all steps, plus moves and broken constraints)."""
    fill(place, rules)
    place.reached[:] = 0
    times.sent[:] = 0
    times.received[:] = 0
    times.pair[:] = 0
    times.rows[:] = 0
    for expert in range(len(place.copies)):
        for use in range(uses.first[expert], uses.first[expert + 1]):
            slot = pick(place.replicas[expert], place.copies[expert], uses.turn[use])
            token, rank = uses.token[use], rules.rank_of[slot]
            times.rows[uses.step[token], slot] += 1
            if place.reached[token, rank] == 0:
                _bump(net, rules, times, uses.step[token], uses.home[token], rank, 1)
            place.reached[token, rank] += 1
    for step in range(len(times.total)):
        for rank in range(times.kernel.shape[1]):
            times.kernel[step, rank] = _kernel_ns(net, times, step, rank, rules.slots_per_rank)
        times.total[step] = _total(net, times, step)
    times.value[0] = times.total.sum() + extra_cost(place, rules)
    return times.value[0]


@numba.njit(cache=True, nogil=True)
def _refresh(net: Net, place: Place, rules: Rules, times: Times, expert: int, num_old: int, which: int) -> None:
    """Recompute the kernels of the ranks that hold or held copies of an expert."""
    for index in range(num_old + place.copies[expert]):
        slot = times.old[which, index] if index < num_old else place.replicas[expert, index - num_old]
        rank = rules.rank_of[slot]
        for step in range(len(times.total)):
            times.kernel[step, rank] = _kernel_ns(net, times, step, rank, rules.slots_per_rank)


@numba.njit(cache=True, nogil=True)
def change(uses: Uses, net: Net, place: Place, rules: Rules, times: Times, slot: int, other: int,
           expert: int) -> float:
    """Put `expert` into `slot`, and what was there into `other` (unless -1); return the new cost."""
    first = place.slots[slot]
    num_first, num_second = place.copies[first], place.copies[expert]
    times.old[0, :num_first] = place.replicas[first, :num_first]
    times.old[1, :num_second] = place.replicas[expert, :num_second]
    put(place, rules, slot, expert)
    if other >= 0:
        put(place, rules, other, first)
    _shift(uses, net, place, rules, times, first, times.old[0], num_first)
    _shift(uses, net, place, rules, times, expert, times.old[1], num_second)
    _refresh(net, place, rules, times, first, num_first, 0)
    if num_first > 1 or num_second > 1 or other < 0:  # a swap of single copies touches two ranks, both done
        _refresh(net, place, rules, times, expert, num_second, 1)
    total = 0
    for step in range(len(times.total)):
        times.total[step] = _total(net, times, step)
        total += times.total[step]
    times.value[0] = total + extra_cost(place, rules)
    return times.value[0]


@numba.njit(cache=True, nogil=True)
def _busy_slot(net: Net, rules: Rules, times: Times, state: np.ndarray) -> int:
    """Return a slot of the rank whose experts end last in a random step, or whose port receives most."""
    step, best, rank = below(state, len(times.total)), -1, 0
    by_port = fraction(state) < 0.5
    level = below(state, 2)
    for one in range(times.kernel.shape[1]):
        busy = times.received[step, level, net.port[level, one]] if by_port else times.kernel[step, one]
        if busy > best:
            best, rank = busy, one
    return rank * rules.slots_per_rank + below(state, rules.slots_per_rank)


@numba.njit(cache=True, nogil=True)
def anneal(uses: Uses, net: Net, place: Place, rules: Rules, times: Times, best: np.ndarray, state: np.ndarray,
           moves: int, hot: float, cold: float, guided: float) -> int:
    """Try `moves` moves at temperatures from `hot` to `cold` ns; keep the best slots in `best`. Returns those taken.

    Kirkpatrick, Gelatt, Vecchi, "Optimization by Simulated Annealing", Science 220, 1983; a part `guided` of the moves
    starts at a bottleneck.
    """
    taken, cooling = 0, (cold / hot) ** (1.0 / max(1, moves))
    temperature = hot
    for _ in range(moves):
        temperature *= cooling
        slot = below(state, len(place.slots))
        if fraction(state) < guided:
            slot = _busy_slot(net, rules, times, state)
        slot, other, expert = propose(place, rules, state, slot)
        if slot < 0:
            continue
        value, first = times.value[0], place.slots[slot]
        delta = change(uses, net, place, rules, times, slot, other, expert) - value
        if delta > 0 and fraction(state) >= np.exp(-delta / temperature):
            change(uses, net, place, rules, times, slot, other, first)
            continue
        taken += 1
        if times.value[0] < times.value[1]:
            times.value[1] = times.value[0]
            best[:] = place.slots
    return taken
