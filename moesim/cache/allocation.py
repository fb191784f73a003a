"""How many of all slots each layer gets: AdapMoE's expected loads, ExpertFlow's shares of demand, measured hit curves.

The policies of `moesim.cache` have equal pools; these say what unequal ones would be best.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import comb

import numpy as np

from moesim.cache.curves import HitCurve
from moesim.errors import InputError, unknown

IMPOSSIBLE = np.inf


def adapmoe_costs(accuracy: Sequence[float], single_share: Sequence[float], num_experts: int, top_k: int = 2) -> np.ndarray:
    """Return float64[layer, slots], the expected loads of a token for 0 ... num_experts slots of a layer.

    AdapMoE (ICCAD 2024, arXiv 2408.10284) gives it for 8 experts and 2 per token: with t slots, a share r of tokens that use one
    expert and a prediction of one expert that is right with probability a,
    ``r (1 - t/8) (1 - a) + (1 - r) (2 P2 (1 - a) + P2 a + P1 (1 - a))``, where P1 and P2 are the
    probabilities that one or both experts are absent when every set of experts is equally likely. That is ``E[absent] - a
    P(any absent)`` of k experts drawn without replacement, which is used here for any E and k.

    Raises:
        InputError: not one accuracy and one share in 0 ... 1 per layer, or not 1 <= top_k <= num_experts.
    """
    right, single = _shares("accuracy", accuracy), _shares("single_share", single_share)
    if len(right) != len(single):
        raise InputError(f"adapmoe: {len(right)} accuracies and {len(single)} single shares; one of each per layer")
    if not 1 <= top_k <= num_experts:
        raise InputError(f"adapmoe: top_k must lie in 1 ... {num_experts}, got {top_k}")
    one, many = (_absent(num_experts, k) for k in (1, top_k))
    cost = [r * (one[0] - a * one[1]) + (1 - r) * (many[0] - a * many[1]) for a, r in zip(right, single, strict=True)]
    return np.array(cost)


def adapmoe_slots(total: int, accuracy: Sequence[float], single_share: Sequence[float], num_experts: int,
                  top_k: int = 2) -> np.ndarray:
    """Return int64[layer], the slots that make the sum of `adapmoe_costs` least; each layer gets at least one.

    Raises:
        InputError: as `adapmoe_costs` and `best_slots`.
    """
    return best_slots(adapmoe_costs(accuracy, single_share, num_experts, top_k), total, least=1)


def _shares(name: str, values: Sequence[float]) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not found.size or not np.all((found >= 0) & (found <= 1)):
        raise InputError(f"adapmoe: {name} must be one number in 0 ... 1 per layer, got {values!r}")
    return found


def _absent(num_experts: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float64[slots] twice: how many of k experts are absent on average, and how likely it is that any is."""
    slots = np.arange(num_experts + 1)
    none = np.array([comb(int(t), k) / comb(num_experts, k) for t in slots])
    return k * (num_experts - slots) / num_experts, 1 - none


def best_slots(cost: np.ndarray, total: int, *, least: int = 0) -> np.ndarray:
    """Return int64[layer], the slots of least cost in sum, by dynamic programming over the layers (a knapsack).

    Args:
        cost: float64[layer, slots], of 0 ... E slots; any shape of curve, inf where a layer cannot have so few.
        total: all slots; what E slots in every layer do not take stays unused. least: of each layer.
            Of equally good answers the one that gives later layers fewer slots.

    Raises:
        InputError: fewer slots than the layers need, or a cost that is no table of numbers.
    """
    cost = np.array(cost, np.float64)
    if cost.ndim != 2 or not cost.size or np.isnan(cost).any():
        raise InputError(f"slots: costs must be numbers [layer, slots], got {list(cost.shape)}")
    num_layers, width = cost.shape
    cost[:, :least] = IMPOSSIBLE
    capacity = min(total, num_layers * (width - 1))
    needed = int(sum(_fewest(row) for row in cost))
    if capacity < needed:
        raise InputError(f"slots: {num_layers} layers need at least {needed} slots, got {total}")
    chosen = np.zeros((num_layers, capacity + 1), np.int64)
    best = np.full(capacity + 1, IMPOSSIBLE)
    best[0] = 0.0
    for layer in range(num_layers):
        best, chosen[layer] = _with_layer(best, cost[layer])
    return _read_back(chosen, int(np.argmin(best)))


def _fewest(row: np.ndarray) -> int:
    finite = np.flatnonzero(np.isfinite(row))
    if not finite.size:
        raise InputError("slots: a layer can have no number of slots")
    return int(finite[0])


def _with_layer(best: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least cost of using exactly 0 ... capacity slots with one layer more, and that layer's slots."""
    found, chosen = np.full_like(best, IMPOSSIBLE), np.zeros(len(best), np.int64)
    for slots, cost in enumerate(row[:len(best)].tolist()):
        with_it = best[:len(best) - slots] + cost
        better = with_it < found[slots:]
        found[slots:][better], chosen[slots:][better] = with_it[better], slots
    return found, chosen


def _read_back(chosen: np.ndarray, used: int) -> np.ndarray:
    slots = np.zeros(len(chosen), np.int64)
    for layer in reversed(range(len(chosen))):
        slots[layer] = chosen[layer, used]
        used -= int(slots[layer])
    return slots


def plec_slots(demand: Sequence[int], total: int, *, rounding: str = "dhondt") -> np.ndarray:
    """Return int64[layer], the slots in proportion to the experts that each layer is predicted to need.

    ExpertFlow (arXiv 2410.17954) gives the proportion and one example, 4 slots for demands 3 and 2: 3 and 1. It does not say how
    shares are rounded. ``dhondt`` (the next slot to the layer with the most demand per slot that it then has, ties to the
    larger demand, then to the lower layer) and ``in-order`` (the first layers get what they ask for, no more, until all slots are
    gone) give the example; ``largest-remainder`` gives 2 and 2.

    Raises:
        InputError: an unknown rounding, no demand, a demand or a total below 0.
    """
    wanted = [int(each) for each in demand]
    if rounding not in _ROUNDINGS:
        raise unknown("rounding", rounding, _ROUNDINGS)
    if total < 0 or not wanted or min(wanted) < 0 or not sum(wanted):
        raise InputError(f"plec: needs demands and a total of at least 0, and some demand; got {wanted} and {total}")
    return np.array(_ROUNDINGS[rounding](wanted, total), np.int64)


def _dhondt(wanted: list[int], total: int) -> list[int]:
    slots = [0] * len(wanted)
    heap = [(Fraction(-each), -each, layer) for layer, each in enumerate(wanted) if each]
    heapq.heapify(heap)
    for _ in range(total):
        _, each, layer = heap[0]
        slots[layer] += 1
        heapq.heapreplace(heap, (Fraction(each, slots[layer] + 1), each, layer))
    return slots


def _largest_remainder(wanted: list[int], total: int) -> list[int]:
    every = sum(wanted)
    slots = [each * total // every for each in wanted]
    by_rest = sorted(range(len(wanted)), key=lambda layer: (-(wanted[layer] * total % every), layer))
    for layer in by_rest[:total - sum(slots)]:
        slots[layer] += 1
    return slots


def _in_order(wanted: list[int], total: int) -> list[int]:
    slots = []
    for each in wanted:
        slots.append(min(each, total))
        total -= slots[-1]
    return slots


_ROUNDINGS: dict[str, Callable[[list[int], int], list[int]]] = {
    "dhondt": _dhondt, "largest-remainder": _largest_remainder, "in-order": _in_order}


def measured_slots(curve: HitCurve, total: int, *, method: str = "exact") -> np.ndarray:
    """Return int64[layer], the slots that give the most hits by a measured curve.

    Each layer gets at least the fewest slots for which its curve holds. ``exact``: dynamic programming, for curves of any shape.
    ``marginal``: slot after slot to the layer whose next one adds most hits (ties to the lower layer), which is best where
    no curve bends upwards.

    Raises:
        InputError: an unknown method, or fewer slots than the layers need.
    """
    if method not in ("exact", "marginal"):
        raise unknown("method", method, ("exact", "marginal"))
    known = np.arange(curve.hits.shape[1]) >= curve.smallest_slots[:, None]
    if method == "exact":
        return best_slots(np.where(known, -curve.hits, IMPOSSIBLE), total)
    return _marginal(curve.hits, curve.smallest_slots, total)


def _marginal(hits: np.ndarray, smallest: np.ndarray, total: int) -> np.ndarray:
    slots, most = smallest.copy(), hits.shape[1] - 1
    if total < slots.sum():
        raise InputError(f"slots: {len(slots)} layers need at least {slots.sum()} slots, got {total}")
    gains = [(-int(hits[layer, at + 1] - hits[layer, at]), layer) for layer, at in enumerate(slots.tolist()) if at < most]
    heapq.heapify(gains)
    for _ in range(min(total, len(slots) * most) - int(slots.sum())):
        _, layer = heapq.heappop(gains)
        slots[layer] += 1
        at = int(slots[layer])
        if at < most:
            heapq.heappush(gains, (-int(hits[layer, at + 1] - hits[layer, at]), layer))
    return slots
