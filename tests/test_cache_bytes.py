"""ByteCache: experts of different sizes, by hand and against a scan of its definition."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.byte_cache import ByteCache
from moesim.cache.cache import Reservation
from moesim.cache.policies.static import popular_keys_in_bytes
from moesim.cache.policy import AccessStream, PolicyContext, make_policy
from moesim.cache.replay import replay
from moesim.cache.sizes import most_residents_per_layer
from moesim.errors import CheckError, InputError


def stream_of(accesses: list[list[int]]) -> AccessStream:
    """Return the stream of accesses of one layer."""
    return AccessStream(np.zeros(len(accesses), np.int64), np.cumsum([0, *map(len, accesses)]),
                        np.array([expert for experts in accesses for expert in experts], dtype=np.int64))


def new_cache(sizes: list[int], room_bytes: int, policy: str = "lru", stream: AccessStream | None = None) -> ByteCache:
    """Return an empty cache of one layer."""
    context = PolicyContext(1, len(sizes), np.arange(len(sizes), 0, -1.0)[None], stream)
    return ByteCache(1, len(sizes), room_bytes, np.array([sizes]), make_policy(policy, context))


def test_as_many_leave_as_the_newcomer_needs() -> None:
    """Ten bytes hold 4 + 3 + 3; an expert of 6 takes the place of the two oldest, which free 7."""
    cache = new_cache([4, 3, 3, 6], 10)
    for now, expert in enumerate((0, 1, 2)):
        assert cache.reserve(0, expert, now) == Reservation(now, -1)
    reservation = cache.reserve(0, 3, 3)
    assert reservation == Reservation(0, 0, (1,))
    assert reservation.num_victims == 2
    assert (cache.residents(0), cache.num_free_bytes(0)) == ([2, 3], 1)
    cache.check()


def test_nobody_leaves_in_vain() -> None:
    """If what may leave is too small in all, it stays: 2 is protected, and 0 alone frees too little."""
    cache = new_cache([2, 4, 7], 8)
    cache.reserve(0, 0, 0)
    cache.reserve(0, 1, 1)
    assert cache.reserve(0, 2, 2, protected={1}) is None
    assert (cache.residents(0), cache.num_free_bytes(0)) == ([0, 1], 2)
    assert cache.reserve(0, 2, 3) == Reservation(0, 0, (1,))
    cache.check()


def test_an_expert_larger_than_the_pool_passes_through() -> None:
    """It is a bypass at every use, and disturbs nobody."""
    stats = replay(stream_of([[0], [1], [0], [1]]), new_cache([3, 9], 8))
    assert (stats.hits.tolist(), stats.bypasses.tolist(), stats.evictions.tolist()) == ([1], [2], [0])


def test_bypass_keeps_all_victims_if_one_is_worth_more() -> None:
    """Expert 2 would need both others out; it is used before 0 but after 1, so it stays outside."""
    stream = stream_of([[0], [1], [2], [1], [2], [0]])
    bypass = replay(stream, new_cache([2, 2, 4], 4, "belady-bypass", stream))
    assert (bypass.hits.tolist(), bypass.bypasses.tolist(), bypass.evictions.tolist()) == ([2], [2], [0])
    must = replay(stream, new_cache([2, 2, 4], 4, "belady", stream))
    assert (must.hits.tolist(), must.evictions.tolist()) == ([0], [5])


def naive(accesses: list[list[int]], sizes: Sequence[int], room: int) -> tuple[int, int, int]:
    """Return hits, evictions and bypasses of LRU by its definition: current experts stay, all or nobody leaves."""
    order: list[int] = []  # oldest first
    hits = evictions = bypasses = 0
    for experts in accesses:
        missed = [expert for expert in experts if expert not in order]
        hits += len(experts) - len(missed)
        content = set(order)
        for expert in missed:
            leaving = _leaving(order, content, set(experts), sizes, room - sizes[expert])
            if leaving is None:
                bypasses += 1
                continue
            evictions += len(leaving)
            content = content - set(leaving) | {expert}
        order = [expert for expert in order if expert in content and expert not in experts]
        order += [expert for expert in experts if expert in content]
    return hits, evictions, bypasses


def _leaving(order: list[int], content: Collection[int], staying: set[int], sizes: Sequence[int],
             allowed: int) -> list[int] | None:
    """Return the oldest experts without which the content is at most `allowed` bytes."""
    if allowed < 0:
        return None
    used, leaving = sum(sizes[expert] for expert in content), []
    for expert in order:
        if used > allowed and expert in content and expert not in staying:
            leaving.append(expert)
            used -= sizes[expert]
    return leaving if used <= allowed else None


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=6, max_size=6), room=st.integers(1, 14),
       accesses=st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=3).map(sorted), min_size=1, max_size=40))
def test_lru_in_bytes_equals_its_definition(sizes: list[int], room: int, accesses: list[list[int]]) -> None:
    """Hits, evictions and bypasses are those of a scan; and the cache is sound at the end."""
    cache = new_cache(sizes, room)
    stats = replay(stream_of(accesses), cache)
    cache.check()
    assert (int(stats.hits[0]), int(stats.evictions[0]), int(stats.bypasses[0])) == naive(accesses, sizes, room)


def test_a_fixed_set_fills_the_bytes() -> None:
    """The most popular first; one that no longer fits is left out for a smaller one. Shared: the bytes of all layers."""
    popularity = np.array([[9.0, 8, 7, 1], [6, 5, 4, 3]])
    sizes = np.array([[3, 4, 2, 1], [5, 1, 1, 1]])
    assert popular_keys_in_bytes(popularity, 6, sizes) == [0, 2, 4, 5, 3]
    assert popular_keys_in_bytes(popularity, 6, sizes, shared=True) == [0, 1, 2, 5, 6, 7]
    policy = make_policy("static", PolicyContext(2, 4, popularity))
    cache = ByteCache(2, 4, 6, sizes, policy)
    cache.preload([0, 2, 4, 5, 3])
    assert cache.reserve(0, 1, 0) is None
    assert (cache.residents(0), cache.residents(1)) == ([0, 2, 3], [0, 1])


@pytest.mark.parametrize(("room", "shared", "expected"), [(6, False, 5), (2, False, 2), (1, False, 1), (6, True, 5), (2, True, 2)])
def test_no_content_outnumbers_the_slots(room: int, shared: bool, expected: int) -> None:
    """Slots are numbers: as many as the smallest experts could fill, per layer or over both."""
    sizes = np.array([[1, 1, 1, 1, 1], [9, 2, 3, 1, 1]])
    assert most_residents_per_layer(sizes, room, shared=shared) == expected


def test_released_bytes_are_free_again() -> None:
    """A cancelled expert gives back its bytes and its slot."""
    cache = new_cache([4, 3, 3], 7)
    cache.reserve(0, 0, 0)
    cache.reserve(0, 1, 0)
    cache.release(0, 0)
    assert cache.num_free_bytes(0) == 4
    assert cache.reserve(0, 2, 1) == Reservation(0, -1)
    cache.check()


def test_check_finds_lost_bytes() -> None:
    """The check itself sees bytes that nobody owns."""
    cache = new_cache([4, 3], 7)
    cache.reserve(0, 0, 0)
    cache._free_bytes[0] += 1
    with pytest.raises(CheckError, match="pool 0 of 7 bytes holds 4 and says that 4 are free"):
        cache.check()


@pytest.mark.parametrize(("sizes", "room", "message"), [
    ([[1.5, 2.0]], 4, "expert_bytes must be integers \\[1, 2\\], got float64\\[1, 2\\]"),
    ([[1, 2, 3]], 4, "expert_bytes must be integers \\[1, 2\\], got int64\\[1, 3\\]"),
    ([[1, 0]], 4, "expert_bytes must be at least 1, got 0"),
    ([[1, 2]], 0, "bytes_per_layer must be at least 1, got 0"),
])
def test_bad_sizes_are_refused(sizes: list[list[float]], room: int, message: str) -> None:
    """Fractions, another shape, nothing, and no room."""
    with pytest.raises(InputError, match=message):
        ByteCache(1, 2, room, np.array(sizes), make_policy("lru", PolicyContext(1, 2)))


def test_a_policy_without_a_notion_of_bytes_learns_slots() -> None:
    """A plug-in that only meets the protocol is attached with the most slots that could be filled."""
    told = []

    class Plain:
        """The last candidate leaves."""

        information = "I1"

        def attach(self, slots_per_layer: int, shared: bool) -> None:
            told.append((slots_per_layer, shared))

        def admits(self, key: int, now: int) -> bool:
            return True

        def prefers(self, key: int, victim: int, now: int) -> bool:
            return True

        def touch(self, key: int, now: int) -> None: ...

        def insert(self, key: int, now: int) -> None: ...

        def evict(self, key: int) -> None: ...

        def victim(self, candidates: Sequence[int], now: int) -> int:
            return list(candidates)[-1]

    cache = ByteCache(1, 3, 5, np.array([[2, 3, 4]]), Plain())
    assert told == [(2, False)]
    stats = replay(stream_of([[0], [1], [2], [1]]), cache)
    assert (stats.hits.tolist(), stats.evictions.tolist()) == ([0], [3])
