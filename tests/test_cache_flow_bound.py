"""The cheapest use of the slots: against every sequence of contents, against the fewest misses, against a linear program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.bounds import fewest_misses
from moesim.cache.flow_bound import SlotPrices, cheapest_slots, spread
from moesim.cache.policy import AccessStream
from moesim.errors import InputError


def stream_of(accesses: list[tuple[int, list[int]]]) -> AccessStream:
    """A stream from (layer, experts) pairs."""
    sizes = [len(experts) for _, experts in accesses]
    return AccessStream(np.array([layer for layer, _ in accesses]), np.concatenate([[0], np.cumsum(sizes)]),
                        np.array([expert for _, experts in accesses for expert in experts], dtype=np.int16))


@st.composite
def cases(draw: st.DrawFn) -> tuple[AccessStream, SlotPrices, int, tuple[int, ...]]:
    """One or two layers of three experts, prices of every convex shape, up to two slots, some experts there at first."""
    layers = draw(st.integers(1, 2))
    sets = draw(st.lists(st.sets(st.integers(0, 2), min_size=1, max_size=3).map(sorted), min_size=2, max_size=6))
    stream = stream_of([(place % layers, experts) for place, experts in enumerate(sets)])
    steps = [sorted(draw(st.lists(st.integers(0, 12), min_size=3, max_size=3))) for _ in sets]
    table = np.concatenate([np.full((len(sets), 1), draw(st.integers(0, 5))), np.cumsum(steps, axis=1)], axis=1)
    table[:, 1:] += table[:, :1]
    fetch = draw(st.one_of(st.none(), st.integers(0, 10)))
    slots = draw(st.integers(1, 2))
    preload = tuple(layer * 3 + e for layer in range(layers)
                    for e in sorted(draw(st.sets(st.integers(0, 2), max_size=slots))))
    return stream, SlotPrices(np.diff(stream.offsets), table, fetch), slots, preload


def price(prices: SlotPrices, access: int, absent: int, fetched: int) -> int:
    """What an access costs."""
    if prices.fetch is None:
        return int(prices.table[access, absent])
    return int(prices.table[access, absent - fetched]) + prices.fetch * fetched


def exhaustive(case: tuple[AccessStream, SlotPrices, int, tuple[int, ...]], shared: bool) -> int:
    """The least price over every content after every access, and every choice of what to fetch.

    A content may keep what was there and what was on the device. Pools of layers are searched together.
    """
    stream, prices, slots, preload = case
    layers = int(stream.layers.max()) + 1

    def fits(content: frozenset[int]) -> bool:
        held = [sum(key // 3 == layer for key in content) for layer in range(layers)]
        return sum(held) <= slots * layers if shared else max(held) <= slots

    best = {frozenset(preload): 0}
    for access, layer in enumerate(stream.layers.tolist()):
        used = {layer * 3 + e for e in stream.experts_of(access).tolist()}
        following: dict[frozenset[int], int] = {}
        for content, cost in best.items():
            absent = sorted(used - content)
            subsets = [absent] if prices.fetch is None else [
                list(part) for size in range(len(absent) + 1) for part in itertools.combinations(absent, size)]
            for fetched in subsets:
                total = cost + price(prices, access, len(absent), len(fetched))
                there = sorted(content | set(fetched))
                for size in range(len(there) + 1):
                    for part in itertools.combinations(there, size):
                        kept = frozenset(part)
                        if fits(kept) and total < following.get(kept, total + 1):
                            following[kept] = total
        best = following
    return min(best.values())


@settings(max_examples=120, deadline=None)
@given(cases(), st.booleans())
def test_no_sequence_of_contents_is_cheaper(case: tuple[AccessStream, SlotPrices, int, tuple[int, ...]], shared: bool) -> None:
    """Without a price of fetches the optimum is met exactly; with one it is a lower bound. Both agree with their counts."""
    stream, prices, slots, preload = case
    found = cheapest_slots(stream, 3, slots, prices, preload=preload, shared=shared)
    least = exhaustive(case, shared)
    assert found.cost <= least
    assert prices.fetch is not None or found.cost == least
    counted = zip(found.absent.tolist(), found.fetched.tolist(), strict=True)
    assert found.cost == sum(price(prices, access, *counts) for access, counts in enumerate(counted))


@settings(max_examples=60, deadline=None)
@given(cases(), st.booleans())
def test_spreading_the_fewest_misses_is_below_the_flow(case: tuple[AccessStream, SlotPrices, int, tuple[int, ...]],
                                                       shared: bool) -> None:
    """It forgets where the misses must fall."""
    stream, prices, slots, preload = case
    misses = int(fewest_misses(stream, 3, slots, preload=preload, shared=shared).sum())
    assert spread(prices, misses) <= cheapest_slots(stream, 3, slots, prices, preload=preload, shared=shared).cost


@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans())
def test_equal_prices_count_the_fewest_misses(case: tuple[AccessStream, SlotPrices, int, tuple[int, ...]], shared: bool) -> None:
    """At one unit for every absent expert the flow is what the greedy rule proves."""
    stream, prices, slots, preload = case
    units = SlotPrices(prices.sizes, np.tile(np.arange(4), (stream.num_accesses, 1)))
    found = cheapest_slots(stream, 3, slots, units, preload=preload, shared=shared)
    assert found.cost == fewest_misses(stream, 3, slots, preload=preload, shared=shared).sum()


@settings(max_examples=40, deadline=None)
@given(cases(), st.lists(st.integers(1, 3), min_size=2, max_size=2))
def test_layers_may_have_unequal_slots(case: tuple[AccessStream, SlotPrices, int, tuple[int, ...]], slots: list[int]) -> None:
    """Each layer alone with its own number gives the sum; a shared pool has the sum of the slots."""
    stream, prices, _, _ = case
    layers = int(stream.layers.max()) + 1
    cost = misses = 0
    for layer in range(layers):
        own = np.flatnonzero(stream.layers == layer)
        part = stream_of([(0, stream.experts_of(access).tolist()) for access in own])
        cost += cheapest_slots(part, 3, slots[layer], SlotPrices(prices.sizes[own], prices.table[own], prices.fetch)).cost
        misses += fewest_misses(part, 3, slots[layer]).sum()
    assert cheapest_slots(stream, 3, slots, prices).cost == cost
    assert fewest_misses(stream, 3, slots).sum() == misses
    if layers == 2 and sum(slots) % 2 == 0:
        even = cheapest_slots(stream, 3, sum(slots) // 2, prices, shared=True)
        assert cheapest_slots(stream, 3, slots, prices, shared=True).cost == even.cost


def linear_program(stream: AccessStream, prices: SlotPrices, num_experts: int, slots: int) -> float:
    """The same with stays of named experts and a price of absence only, as a linear program of another library."""
    from scipy.optimize import linprog

    keys, access = stream.keys(num_experts), np.repeat(np.arange(stream.num_accesses), np.diff(stream.offsets))
    stays = [(access[a], access[b]) for a, key in enumerate(keys) for b in range(a + 1, len(keys))
             if keys[b] == key and key not in keys[a + 1:b]]
    steps = np.diff(prices.table, axis=1)
    units = [(t, u) for t, size in enumerate(prices.sizes.tolist()) for u in range(size)]
    cost = np.concatenate([np.zeros(len(stays)), [steps[unit] for unit in units]])
    rows, limits = [], []
    for t in range(stream.num_accesses - 1):  # slots between two accesses
        rows.append([*(float(a <= t < b) for a, b in stays), *(0.0 for _ in units)])
        limits.append(float(slots))
    for t, size in enumerate(prices.sizes.tolist()):  # whoever did not stay is absent
        rows.append([*(-float(b == t) for _, b in stays), *(-float(at == t) for at, _ in units)])
        limits.append(-float(size))
    done = linprog(cost, A_ub=np.array(rows), b_ub=np.array(limits), bounds=(0, 1))
    assert done.status == 0
    return float(done.fun) + float(prices.table[:, 0].sum())


@pytest.mark.parametrize("seed", range(4))
def test_a_linear_program_of_another_library_agrees(seed: int) -> None:
    """Sixty accesses of one layer with twelve experts: the flow's optimum is the program's."""
    rng = np.random.default_rng(seed)
    stream = stream_of([(0, np.sort(rng.choice(12, rng.integers(1, 6), replace=False)).tolist()) for _ in range(60)])
    table = np.concatenate([np.zeros((60, 1), np.int64), np.cumsum(np.sort(rng.integers(0, 99, (60, 6))), axis=1)], axis=1)
    prices = SlotPrices(np.diff(stream.offsets), table)
    assert cheapest_slots(stream, 12, 4, prices).cost == pytest.approx(linear_program(stream, prices, 12, 4))


def test_a_stream_by_hand() -> None:
    """One slot; uses 0 1 0 1. Absence costs 5, 1, 5, 1: expert 0 is kept over its second use, so 5 + 1 + 0 + 1."""
    stream = stream_of([(0, [0]), (0, [1]), (0, [0]), (0, [1])])
    prices = SlotPrices(np.ones(4, int), np.array([[0, 5], [0, 1], [0, 5], [0, 1]]))
    found = cheapest_slots(stream, 2, 1, prices)
    assert (found.cost, found.absent.tolist(), found.fetched.tolist()) == (7, [1, 1, 0, 1], [0, 0, 0, 0])
    # fetching at 2 is cheaper than leaving expert 0 off, and what was never fetched cannot stay
    fetching = cheapest_slots(stream, 2, 1, SlotPrices(prices.sizes, prices.table, 2))
    assert (fetching.cost, fetching.absent.tolist(), fetching.fetched.tolist()) == (4, [1, 1, 0, 1], [1, 0, 0, 0])


@pytest.mark.parametrize(("table", "fetch", "message"), [
    ([[0, 3, 4], [0, 1, 2]], None, "must rise and be convex"),  # steps 3, then 1
    ([[0, -1, 0], [0, 1, 2]], None, "must rise and be convex"),  # falls
    ([[0, 1], [0, 1]], None, "must rise and be convex"),  # too narrow for two experts
    ([[0, 1, 2], [0, 1, 2]], -1, "a fetch must not cost less than nothing, got -1"),
])
def test_prices_must_make_sense(table: list[list[int]], fetch: int | None, message: str) -> None:
    """Each row up to the access's size."""
    with pytest.raises(InputError, match=message):
        SlotPrices(np.array([2, 1]), np.array(table), fetch)


def test_slots_and_sizes_must_fit() -> None:
    """No slots, and prices of other accesses."""
    stream = stream_of([(0, [0]), (0, [1])])
    prices = SlotPrices(np.ones(2, int), np.zeros((2, 2), int))
    with pytest.raises(InputError, match="slots_per_layer must be at least 1, got 0"):
        cheapest_slots(stream, 2, 0, prices)
    with pytest.raises(InputError, match="slots_per_layer has 1 numbers for 2 layers"):
        fewest_misses(stream_of([(0, [0]), (1, [0])]), 2, [3])
    with pytest.raises(InputError, match="the sizes are not those of the stream"):
        cheapest_slots(stream, 2, 1, SlotPrices(np.array([1, 2]), np.zeros((2, 3), int)))
