"""Stays of named experts at prices of their accesses: every sequence of contents tried, and the simpler flows as limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cache_flow_bound import stream_of

from moesim.cache.bounds import fewest_misses
from moesim.cache.flow_bound import SlotPrices, cheapest_slots
from moesim.cache.policy import AccessStream
from moesim.cache.stay_flow import StayFlow
from moesim.errors import InputError


@st.composite
def cases(draw: st.DrawFn) -> tuple[AccessStream, np.ndarray, np.ndarray, int, tuple[int, ...], bool]:
    """Up to two layers of three experts; prices of a fetch and of leaving one to the CPU; slots, preload, one pool or two."""
    layers = draw(st.integers(1, 2))
    sets = draw(st.lists(st.sets(st.integers(0, 2), min_size=1, max_size=3).map(sorted), min_size=2, max_size=6))
    stream = stream_of([(place % layers, experts) for place, experts in enumerate(sets)])
    fetch, left = (np.array(draw(st.lists(st.integers(0, 9), min_size=len(sets), max_size=len(sets)))) for _ in range(2))
    slots = draw(st.integers(1, 2))
    preload = tuple(layer * 3 + e for layer in range(layers)
                    for e in sorted(draw(st.sets(st.integers(0, 2), max_size=slots))))
    return stream, fetch, left, slots, preload, draw(st.booleans())


def exhaustive(stream: AccessStream, fetch: np.ndarray, left: np.ndarray, slots: int, preload: tuple[int, ...],
               shared: bool) -> int:
    """The least price over every content and every set of fetches; what stays was there or was fetched."""
    layers = int(stream.layers.max()) + 1
    best = {frozenset(preload): 0}
    for access, layer in enumerate(stream.layers.tolist()):
        used = {layer * 3 + e for e in stream.experts_of(access).tolist()}
        following: dict[frozenset[int], int] = {}
        for content, cost in best.items():
            absent = sorted(used - content)
            for size in range(len(absent) + 1):
                for fetched in itertools.combinations(absent, size):
                    total = cost + size * int(fetch[access]) + (len(absent) - size) * int(left[access])
                    there = sorted(content | set(fetched))
                    for count in range(len(there) + 1):
                        for part in itertools.combinations(there, count):
                            held = [sum(key // 3 == pool for key in part) for pool in range(layers)]
                            if count <= slots * layers if shared else max(held) <= slots:
                                kept = frozenset(part)
                                following[kept] = min(total, following.get(kept, total))
        best = following
    return min(best.values())


@settings(max_examples=120, deadline=None)
@given(cases())
def test_the_cheapest_stays_are_exact(case: tuple[AccessStream, np.ndarray, np.ndarray, int, tuple[int, ...], bool]) -> None:
    """No relaxation: the least over every sequence of contents, and the counts have that price."""
    stream, fetch, left, slots, preload, shared = case
    found = StayFlow(stream, 3, slots, preload=preload, shared=shared).cheapest(fetch, left)
    assert found.cost == exhaustive(*case)
    assert found.cost == (found.fetched * fetch + (found.absent - found.fetched) * left).sum()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_naming_the_experts_never_costs_less(
        case: tuple[AccessStream, np.ndarray, np.ndarray, int, tuple[int, ...], bool]) -> None:
    """At the same prices in all accesses, the flow that only counts is at most this; if fetches are free to stay, equal."""
    stream, fetch, left, slots, preload, shared = case
    stays = StayFlow(stream, 3, slots, preload=preload, shared=shared)
    table = left[:, None] * np.arange(4)
    counted = cheapest_slots(stream, 3, slots, SlotPrices(np.diff(stream.offsets), table, int(fetch[0])), preload=preload,
                             shared=shared)
    assert counted.cost <= stays.cheapest(np.full(len(fetch), fetch[0]), left).cost
    misses = fewest_misses(stream, 3, slots, preload=preload, shared=shared).sum()
    assert stays.cheapest(np.ones_like(fetch), np.full_like(left, 5)).cost == misses


def test_a_stream_by_hand() -> None:
    """One slot, uses 0 1 0 1; a fetch costs 4, the CPU 3: one fetch of 0 saves its second use, or one of 1."""
    stream = stream_of([(0, [0]), (0, [1]), (0, [0]), (0, [1])])
    found = StayFlow(stream, 2, 1).cheapest(np.full(4, 4), np.full(4, 3))
    assert (found.cost, found.absent.sum(), found.fetched.sum()) == (10, 3, 1)
    assert StayFlow(stream, 2, 1).cheapest(np.full(4, 7), np.full(4, 3)).cost == 12  # a fetch does not pay
    assert StayFlow(stream, 2, 1, preload=[1]).cheapest(np.full(4, 7), np.full(4, 3)).cost == 6


def test_prices_must_be_one_per_access() -> None:
    """Of the right number, and not negative."""
    stays = StayFlow(stream_of([(0, [0]), (0, [1])]), 2, 1)
    for fetch in (np.ones(3, int), np.array([1, -1])):
        with pytest.raises(InputError, match="prices must be 2 numbers that are not negative"):
            stays.cheapest(fetch, np.ones(2, int))
    with pytest.raises(InputError, match="slots_per_layer must be at least 1"):
        StayFlow(stream_of([(0, [0])]), 2, 0)
