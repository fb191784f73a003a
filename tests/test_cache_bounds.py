"""The fewest possible misses: by exhaustive search, and below every policy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.bounds import fewest_misses
from moesim.cache.cache import ExpertCache
from moesim.cache.policies.static import popular_keys
from moesim.cache.policy import POLICIES, AccessStream, PolicyContext, make_policy
from moesim.cache.replay import replay
from moesim.errors import InputError


def stream_of(accesses: list[tuple[int, list[int]]]) -> AccessStream:
    """A stream from (layer, experts) pairs."""
    sizes = [len(experts) for _, experts in accesses]
    return AccessStream(np.array([layer for layer, _ in accesses]), np.concatenate([[0], np.cumsum(sizes)]),
                        np.array([expert for _, experts in accesses for expert in experts], dtype=np.int16))


@st.composite
def streams(draw: st.DrawFn, num_layers: int, num_experts: int, longest: int) -> AccessStream:
    """Layers in turn, each access with one to three distinct experts."""
    subset = st.sets(st.integers(0, num_experts - 1), min_size=1, max_size=min(3, num_experts)).map(sorted)
    rounds = draw(st.lists(st.tuples(*[subset] * num_layers), min_size=1, max_size=longest))
    return stream_of([(layer, experts) for turn in rounds for layer, experts in enumerate(turn)])


def exhaustive(stream: AccessStream, num_experts: int, capacity: int, preload: tuple[int, ...]) -> int:
    """Fewest misses over every possible content after every access.

    A content may keep what was there and take what was just used, nothing else, up to the capacity.
    """
    cost = {frozenset(preload): 0}
    for access, layer in enumerate(stream.layers.tolist()):
        used = {layer * num_experts + expert for expert in stream.experts_of(access).tolist()}
        following: dict[frozenset[int], int] = {}
        for content, misses in cost.items():
            total = misses + len(used - content)
            for size in range(capacity + 1):
                for kept in itertools.combinations(sorted(content | used), size):
                    key = frozenset(kept)
                    following[key] = min(total, following.get(key, total))
        cost = following
    return min(cost.values())


@settings(max_examples=50, deadline=None)
@given(streams(1, 4, 8), st.integers(1, 3), st.sets(st.integers(0, 3), max_size=3))
def test_one_pool_is_optimal(stream: AccessStream, capacity: int, preload: set[int]) -> None:
    """No sequence of contents misses less, whatever is admitted or bypassed."""
    kept = tuple(sorted(preload))[:capacity]
    assert fewest_misses(stream, 4, capacity, preload=kept).sum() == exhaustive(stream, 4, capacity, kept)


@settings(max_examples=25, deadline=None)
@given(streams(2, 3, 4), st.integers(1, 2), st.booleans())
def test_pools_of_layers_and_shared_pools_are_optimal(stream: AccessStream, slots: int, preloaded: bool) -> None:
    """Two layers: one pool of twice the slots, or two pools that are searched one by one."""
    preload = (0, 3) if preloaded else ()
    assert fewest_misses(stream, 3, slots, preload=preload, shared=True).sum() == exhaustive(
        stream, 3, 2 * slots, preload)
    apart = 0
    for layer in range(2):
        own = np.flatnonzero(stream.layers == layer)
        part = stream_of([(layer, stream.experts_of(access).tolist()) for access in own])
        apart += exhaustive(part, 3, slots, tuple(key for key in preload if key // 3 == layer))
    assert fewest_misses(stream, 3, slots, preload=preload).sum() == apart


@pytest.mark.parametrize("policy", POLICIES.names())
@settings(max_examples=15, deadline=None)
@given(stream=streams(2, 5, 12), slots=st.integers(1, 5), shared=st.booleans(), preloaded=st.booleans())
def test_no_policy_misses_less(policy: str, stream: AccessStream, slots: int, shared: bool, preloaded: bool) -> None:
    """Replayed with set semantics, cold misses counted, from the same content."""
    popularity = np.bincount(stream.keys(5), minlength=10).reshape(2, 5).astype(float)
    preload = popular_keys(popularity, slots, shared=shared) if preloaded else []
    cache = ExpertCache(2, 5, slots, make_policy(policy, PolicyContext(2, 5, popularity, stream)), shared=shared)
    cache.preload(preload)
    least = fewest_misses(stream, 5, slots, preload=preload, shared=shared)
    assert least.sum() <= replay(stream, cache).misses.sum()


def test_a_stream_by_hand() -> None:
    """One slot, uses 0 1 0 1 0: keeping 0 throughout misses 0 once and 1 twice; which use misses is said."""
    stream = stream_of([(0, [0]), (0, [1]), (0, [0]), (0, [1]), (0, [0])])
    assert fewest_misses(stream, 2, 1).tolist() == [1, 1, 0, 1, 0]
    assert fewest_misses(stream, 2, 1, preload=[0]).tolist() == [0, 1, 0, 1, 0]
    assert fewest_misses(stream, 2, 2).tolist() == [1, 1, 0, 0, 0]


def test_slots_and_preload_must_make_sense() -> None:
    """No slots, or more preloaded experts than slots, of a layer or in all."""
    stream = stream_of([(0, [0]), (1, [1])])
    with pytest.raises(InputError, match="slots_per_layer must be at least 1, got 0"):
        fewest_misses(stream, 2, 0)
    with pytest.raises(InputError, match="the preload holds 2 experts for 1 slots"):
        fewest_misses(stream, 2, 1, preload=[2, 3])
    with pytest.raises(InputError, match="the preload holds 3 experts for 2 slots"):
        fewest_misses(stream, 2, 1, preload=[0, 1, 2], shared=True)
