"""The least cost of any use of the slots where each absent expert has a price of its own access: stays of named experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from moesim.cache.bounds import pool_slots
from moesim.cache.flow_bound import SlotFlow
from moesim.cache.policy import AccessStream
from moesim.errors import InputError, SolverError


class _Pool(NamedTuple):
    """One pool's uses: their numbers, the access of each (in the stream, and as a place in the pool), pairs of one expert's
    uses that follow one another, first uses of preloaded experts (both as places among the uses), and the slots."""

    uses: np.ndarray
    access: np.ndarray
    place: np.ndarray
    before: np.ndarray
    after: np.ndarray
    begins: np.ndarray
    slots: int


class StayFlow:
    """A stream and its slots, to be asked for many prices.

    Args:
        slots_per_layer: of every layer, or of each; `shared` pools them all. preload: keys that are there at first.

    Raises:
        InputError: a layer without slots, or a stream of another model.
    """

    def __init__(self, stream: AccessStream, num_experts: int, slots_per_layer: int | Sequence[int], *,
                 preload: Collection[int] = (), shared: bool = False) -> None:
        num_layers = int(stream.layers.max()) + 1
        stream.check_fits(num_layers, num_experts)
        slots = pool_slots(slots_per_layer, num_layers, shared)
        self._access = np.repeat(np.arange(stream.num_accesses), np.diff(stream.offsets))
        self._num_accesses, keys = stream.num_accesses, stream.keys(num_experts)
        layers = (0,) if shared else np.unique(stream.layers).tolist()
        there = np.unique(np.fromiter(preload, np.int64, len(preload)))
        self._pools = [self._pool(keys, np.arange(len(keys)) if shared else np.flatnonzero(keys // num_experts == layer),
                                  there, int(slots[layer])) for layer in layers]

    def _pool(self, keys: np.ndarray, uses: np.ndarray, preload: np.ndarray, slots: int) -> _Pool:
        own, order = keys[uses], np.argsort(keys[uses], kind="stable")
        again = own[order][1:] == own[order][:-1]
        first = order[np.concatenate([np.ones(min(1, len(uses)), bool), ~again])]
        access = self._access[uses]
        return _Pool(uses, access, np.unique(access, return_inverse=True)[1], order[:-1][again], order[1:][again],
                     first[np.isin(own[first], preload)], slots)

    def cheapest(self, fetch: np.ndarray, left: np.ndarray) -> SlotFlow:
        """Return the least total price over all ways to use the slots.

        Each expert of an access is waiting in a slot, which costs nothing, or is fetched at ``fetch[access]``, or is left off
        the device at ``left[access]``; only in the last case it cannot stay. A unit of flow is a slot: it enters an expert
        at a use for what a fetch costs more than the cheaper of the two, rides from use to use, which saves that cheaper
        one, and leaves. So every schedule is a flow, and every flow a schedule of a cache whose contents may change
        between accesses: nothing is relaxed but that an expert in use needs no slot.

        Args:
            fetch, left: int64[access], not negative.

        Raises:
            InputError: other prices.
        """
        for prices in (fetch, left):
            if prices.shape != (self._num_accesses,) or prices.min(initial=0) < 0:
                raise InputError(f"stay flow: prices must be {self._num_accesses} numbers that are not negative")
        cost, absent, fetched = 0, np.zeros(len(self._access), bool), np.zeros(len(self._access), bool)
        for pool in self._pools:
            part, waited, entered = _solve(pool, fetch[pool.access], left[pool.access])
            cost += part
            absent[pool.uses] = ~waited
            fetched[pool.uses] = ~waited & (entered | (fetch[pool.access] <= left[pool.access]))
        return SlotFlow(cost, self._per_access(absent), self._per_access(fetched))

    def _per_access(self, chosen: np.ndarray) -> np.ndarray:
        return np.bincount(self._access[chosen], minlength=self._num_accesses)


def _solve(pool: _Pool, fetch: np.ndarray, left: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the cost, and bool[use] each: waited in a slot; entered one."""
    from ortools.graph.python import min_cost_flow

    flow, num_uses, length = min_cost_flow.SimpleMinCostFlow(), len(pool.uses), int(pool.place.max(initial=-1)) + 1
    cheaper, nothing = np.minimum(fetch, left), np.zeros(num_uses, np.int64)
    chain, expert = 1 + np.arange(length), 1 + length + np.arange(num_uses)

    def arcs(tails: np.ndarray, heads: np.ndarray, price: np.ndarray, capacity: int = 1) -> np.ndarray:
        return flow.add_arcs_with_capacity_and_unit_cost(tails, heads, np.full(len(tails), capacity), price)

    arcs(np.concatenate([[0], chain[:-1]]), chain, np.zeros(length, np.int64), pool.slots)
    enter = arcs(chain[pool.place], expert, fetch - cheaper)
    arcs(expert, chain[pool.place], nothing)
    ride = arcs(expert[pool.before], expert[pool.after], -cheaper[pool.after])
    begin = arcs(nothing[pool.begins], expert[pool.begins], -cheaper[pool.begins])
    flow.set_nodes_supplies(np.array([0, chain[-1]]), np.array([pool.slots, -pool.slots]))
    status = flow.solve()
    if status != flow.OPTIMAL:
        raise SolverError(f"stay flow: the minimum-cost flow ended with status {status.name}")
    waited = np.zeros(num_uses, bool)
    waited[pool.after[flow.flows(ride) > 0]] = True
    if len(begin):
        waited[pool.begins[flow.flows(begin) > 0]] = True
    return int(cheaper.sum()) + flow.optimal_cost(), waited, flow.flows(enter) > 0
