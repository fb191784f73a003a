"""The least cost of any use of the slots, where an access has a price: a minimum-cost flow of slots through time.

`fewest_misses` counts absent experts, each the same. Here an access is charged by how many of its experts are absent, how
many of those are fetched, and how many are left off the device altogether; the optimum over every content of the slots at
every instant is found exactly, up to one relaxation that `cheapest_slots` names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.cache.bounds import pool_slots
from moesim.cache.policy import AccessStream
from moesim.errors import InputError, SolverError


@dataclass(frozen=True)
class SlotPrices:
    """What an access costs, in whole units, by how many of its experts do not wait in a slot.

    Attributes:
        sizes: int64[access], experts of the access.
        table: int64[access, width + 1]. Without `fetch` the price of m absent experts, any of which may stay after the
            access. With it the price of u experts left off the device: neither waiting nor fetched, so that they cannot stay.
        fetch: price of one fetch, or None.

    Raises:
        InputError: a negative price of a fetch; a row that falls or is not convex up to its access's size.
    """

    sizes: np.ndarray
    table: np.ndarray
    fetch: int | None = None

    def __post_init__(self) -> None:
        if self.fetch is not None and self.fetch < 0:
            raise InputError(f"slot prices: a fetch must not cost less than nothing, got {self.fetch}")
        steps, width = np.diff(self.table, axis=1), self.table.shape[1] - 1
        inside = np.arange(width) < self.sizes[:, None]
        bent = (np.diff(steps, axis=1) < 0) & inside[:, 1:]
        if width < self.sizes.max(initial=0) or np.any((steps < 0) & inside) or np.any(bent):
            raise InputError("slot prices: each row must rise and be convex up to its access's size")


@dataclass(frozen=True)
class SlotFlow:
    """The optimum: its cost, and int64[access] each: experts that did not wait in a slot, and those that were fetched
    (0 without a price of fetches)."""

    cost: int
    absent: np.ndarray
    fetched: np.ndarray


def cheapest_slots(
    stream: AccessStream,
    num_experts: int,
    slots_per_layer: int | Sequence[int],
    prices: SlotPrices,
    *,
    preload: Collection[int] = (),
    shared: bool = False,
) -> SlotFlow:
    """Return the least total price over all ways to use the slots.

    A unit of flow is a slot. It waits in its pool from access to access, or holds an expert from one use to the next (arcs of
    capacity one); at an access the arrivals, and what is fetched, leave over arcs of rising price, one for each
    expert. So every schedule of a cache with these slots is a flow, and the least flow costs no more than it. An expert in
    use needs no slot (bypass, staging), and a fetch may happen at any time before the use.
    With a price of fetches there is one relaxation: arrivals and fetches of an access are counted, not named. If r of its
    experts waited in a slot and q were fetched, any r + q of them may stay.

    Raises:
        InputError: a layer without slots, or a stream of another model or other sizes.
    """
    num_layers = int(stream.layers.max()) + 1
    capacity = pool_slots(slots_per_layer, num_layers, shared)
    stream.check_fits(num_layers, num_experts)
    if len(prices.sizes) != stream.num_accesses or np.any(prices.sizes != np.diff(stream.offsets)):
        raise InputError("slot prices: the sizes are not those of the stream's accesses")
    uses = _uses(stream, num_experts, np.unique(np.fromiter(preload, np.int64, len(preload))))
    cost, counts = 0, np.zeros((2, stream.num_accesses), np.int64)
    for layer in (0,) if shared else np.unique(stream.layers).tolist():
        accesses = np.arange(stream.num_accesses) if shared else np.flatnonzero(stream.layers == layer)
        network = _Network(accesses, prices, int(capacity[layer]))
        network.add_stays(*(_of_pool(part, accesses, stream.num_accesses) for part in uses))
        part, found = network.solve()
        cost += part
        counts[:, accesses] = found
    return SlotFlow(cost, *counts)


def _uses(stream: AccessStream, num_experts: int, preload: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int64[stay, 2], accesses from which and to which an expert could stay; and int64[...], first uses of the
    preloaded keys."""
    keys = stream.keys(num_experts)
    access = np.repeat(np.arange(stream.num_accesses), np.diff(stream.offsets))
    order = np.argsort(keys, kind="stable")
    again = keys[order][1:] == keys[order][:-1]
    stays = np.stack([access[order][:-1][again], access[order][1:][again]], axis=1)
    first = np.concatenate([[True], ~again]) if len(keys) else np.zeros(0, bool)
    begins = access[order][first][np.isin(keys[order][first], preload)]
    return stays, np.stack([np.full(len(begins), -1), begins], axis=1)


def spread(prices: SlotPrices, misses: int) -> int:
    """Return the least total price if all accesses together have so many absent experts, at whichever accesses they be.

    A bound that needs no flow, and is no larger than `cheapest_slots` with the same prices. As the prices are convex, the
    cheapest steps may be taken in any order; an absent expert takes a step of the table, or a fetch where that is cheaper.
    """
    steps = np.diff(prices.table, axis=1)
    taken = np.sort(steps[np.arange(steps.shape[1]) < prices.sizes[:, None]])[:misses]
    if prices.fetch is not None:
        taken = np.minimum(taken, prices.fetch)
    return int(prices.table[:, 0].sum() + taken.sum())


def _of_pool(stays: np.ndarray, accesses: np.ndarray, num_accesses: int) -> np.ndarray:
    """Return the stays that end in a pool's accesses, as places in it (-1: from the beginning)."""
    place = np.full(num_accesses + 1, -1)
    place[accesses] = np.arange(len(accesses))
    return place[stays[place[stays[:, 1]] >= 0]]


class _Network:
    """The flow of one pool. Nodes: the source; then per access the pool, and, where fetches have a price, what is on the
    device before and after it is counted (otherwise arrivals are counted on their way into the pool)."""

    def __init__(self, accesses: np.ndarray, prices: SlotPrices, capacity: int) -> None:
        from ortools.graph.python import min_cost_flow

        self._flow = min_cost_flow.SimpleMinCostFlow()
        self._sizes, self._capacity, places = prices.sizes[accesses], capacity, np.arange(len(accesses))
        self._pool, self._arrive = 1 + places, 1 + len(places) + places
        self._begin = self._pool if prices.fetch is None else 1 + 2 * len(places) + places
        self._arcs(np.concatenate([[0], self._pool[:-1]]), self._pool, np.full(len(places), capacity))
        steps = np.diff(prices.table[accesses], axis=1)
        self._place, which = np.nonzero(np.arange(steps.shape[1]) < self._sizes[:, None])
        self._base = int(prices.table[accesses, self._sizes].sum())
        # the n-th expert on the device takes the (size - n + 1)-th step off the price; the steepest are taken first
        self._counted = self._arcs(self._arrive[self._place], self._begin[self._place], np.ones(len(which), np.int64),
                                   -steps[self._place, which])
        self._fetches = np.zeros(0, np.int64)
        if prices.fetch is not None:
            self._fetches = self._arcs(self._pool, self._arrive, self._sizes, np.full(len(places), prices.fetch))
            self._arcs(self._begin, self._pool, self._sizes)

    def add_stays(self, stays: np.ndarray, begins: np.ndarray) -> None:
        """Add the stays from use to use, and those from the preload; equal ones are one arc."""
        for part in (stays, begins):
            pairs, number = np.unique(part, axis=0, return_counts=True)
            tails = np.where(pairs[:, 0] < 0, 0, self._begin[pairs[:, 0]])
            self._arcs(tails, self._arrive[pairs[:, 1]], number)

    def solve(self) -> tuple[int, np.ndarray]:
        """Return the cost, and int64[2, access]: absent, fetched."""
        self._flow.set_nodes_supplies(np.array([0, self._pool[-1]]), np.array([self._capacity, -self._capacity]))
        status = self._flow.solve()
        if status != self._flow.OPTIMAL:
            raise SolverError(f"slot flow: the minimum-cost flow ended with status {status.name}")
        counted = np.bincount(self._place, weights=self._flow.flows(self._counted), minlength=len(self._sizes))
        fetched = self._flow.flows(self._fetches) if len(self._fetches) else np.zeros(len(self._sizes), np.int64)
        absent = self._sizes - counted.astype(np.int64) + fetched
        return self._base + self._flow.optimal_cost(), np.stack([absent, fetched])

    def _arcs(self, tails: np.ndarray, heads: np.ndarray, capacity: np.ndarray, cost: np.ndarray | None = None) -> np.ndarray:
        price = np.zeros(len(tails), np.int64) if cost is None else cost
        return self._flow.add_arcs_with_capacity_and_unit_cost(tails, heads, capacity, price)
