"""Replay: hit counts against brute force, naive rules, libcachesim, and fixed integers."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.cache import ExpertCache
from moesim.cache.policies import RankedPolicy
from moesim.cache.policy import POLICIES, AccessStream, PolicyContext, make_policy
from moesim.cache.replay import CacheStats, replay
from moesim.errors import CheckError, InputError

Accesses = list[tuple[int, list[int]]]
NO_FUTURE = ("lru", "lfu", "lfu-resident")


def stream_of(accesses: Accesses) -> AccessStream:
    """Return the stream of (layer, experts) pairs."""
    sizes = [len(experts) for _, experts in accesses]
    return AccessStream(
        np.array([layer for layer, _ in accesses]), np.cumsum([0, *sizes]),
        np.array([expert for _, experts in accesses for expert in experts], dtype=np.int64))


def run(name: str, stream: AccessStream, slots: int, *, layers: int = 1, experts: int = 6, shared: bool = False,
        popularity: np.ndarray | None = None, **options: object) -> CacheStats:
    """Return the statistics of a new cache."""
    policy = make_policy(name, PolicyContext(layers, experts, popularity=popularity, future=stream))
    return replay(stream, ExpertCache(layers, experts, slots, policy, shared=shared), **options)  # type: ignore[arg-type]


def streams(layers: int = 1, experts: int = 6, width: int = 3, length: int = 14) -> st.SearchStrategy[Accesses]:
    """Draw short lists of (layer, sorted distinct experts)."""
    some = st.sets(st.integers(0, experts - 1), min_size=1, max_size=width).map(sorted)
    return st.lists(st.tuples(st.integers(0, layers - 1), some), min_size=1, max_size=length)


def fewest_misses(accesses: Accesses, slots: int, *, bypass: bool) -> int:
    """Return the least misses over every possible choice of contents (dynamic programming over all of them).

    One pool. Without bypass, an access's experts must all be resident after it (they must fit).
    """
    best: dict[frozenset[tuple[int, int]], int] = {frozenset(): 0}
    for layer, experts in accesses:
        used = frozenset((layer, expert) for expert in experts)
        following: dict[frozenset[tuple[int, int]], int] = {}
        for content, misses in best.items():
            cost = misses + len(used - content)
            must = frozenset() if bypass else used
            others = sorted((content | used) - must)
            for size in range(min(slots - len(must), len(others)) + 1):
                for kept in combinations(others, size):
                    after = must | frozenset(kept)
                    following[after] = min(following.get(after, cost), cost)
        best = following
    return min(best.values())


@settings(max_examples=30, deadline=None)
@given(accesses=streams(length=10), slots=st.integers(3, 5))
def test_belady_is_optimal_among_policies_that_load_every_miss(accesses: Accesses, slots: int) -> None:
    """Under set semantics with the current experts protected, no choice of victims misses less often."""
    assert run("belady", stream_of(accesses), slots).misses.sum() == fewest_misses(accesses, slots, bypass=False)


@settings(max_examples=30, deadline=None)
@given(accesses=streams(layers=2, experts=4, width=2, length=9))
def test_belady_is_optimal_for_shared_slots(accesses: Accesses) -> None:
    """The same with the slots of two layers in one pool."""
    stats = run("belady", stream_of(accesses), 1, layers=2, experts=4, shared=True)
    assert stats.misses.sum() == fewest_misses(accesses, 2, bypass=False)


@settings(max_examples=30, deadline=None)
@given(accesses=streams(length=10), slots=st.integers(1, 4))
def test_belady_with_bypass_is_optimal_among_all(accesses: Accesses, slots: int) -> None:
    """If misses may pass through and anything may leave, no choice of contents misses less often."""
    stats = run("belady-bypass", stream_of(accesses), slots, current_evictable=True)
    assert stats.misses.sum() == fewest_misses(accesses, slots, bypass=True)


def naive_hits(accesses: Accesses, slots: int, name: str) -> int:
    """Return the hits of one pool by scanning everything, set semantics, current experts protected."""
    hits, uses, last = 0, dict.fromkeys(range(99), 0), dict.fromkeys(range(99), (-1, 0))
    content: set[int] = set()
    for now, (_, experts) in enumerate(accesses):
        hits += len(content & set(experts))
        missed = [expert for expert in experts if expert not in content]
        for expert in experts:
            uses[expert] += 1
            last[expert] = (now, expert)
        for expert in missed:
            if len(content) == slots:
                free_to_go = content - set(experts)
                if not free_to_go:
                    continue
                rank = (lambda e: last[e]) if name == "lru" else (lambda e: (uses[e], last[e]))
                victim = min(free_to_go, key=rank)
                content.remove(victim)
                if name == "lfu-resident":
                    uses[victim] = 0
            content.add(expert)
    return hits


@settings(max_examples=30, deadline=None)
@given(accesses=streams(length=60), slots=st.integers(1, 5), name=st.sampled_from(NO_FUTURE))
def test_policies_equal_their_definition(accesses: Accesses, slots: int, name: str) -> None:
    """Each policy hits as often as a naive scan by its definition, overflowing accesses included."""
    assert run(name, stream_of(accesses), slots).hits.sum() == naive_hits(accesses, slots, name)


@settings(max_examples=30, deadline=None)
@given(accesses=streams(length=60), slots=st.integers(3, 5), name=st.sampled_from(NO_FUTURE))
def test_no_policy_that_loads_every_miss_beats_belady(accesses: Accesses, slots: int, name: str) -> None:
    """Belady's hits are at least those of every demand policy of the same size."""
    stream = stream_of(accesses)
    assert run("belady", stream, slots).hits.sum() >= run(name, stream, slots).hits.sum()


@settings(max_examples=30, deadline=None)
@given(accesses=streams(layers=2, length=40), slots=st.integers(1, 5), name=st.sampled_from(POLICIES.names()),
       shared=st.booleans(), semantics=st.sampled_from(["set", "sequential"]))
def test_no_policy_beats_belady_with_bypass(
        accesses: Accesses, slots: int, name: str, shared: bool, semantics: str) -> None:
    """With anything evictable, Belady with bypass is an upper bound for all policies, static ones too."""
    stream, popularity = stream_of(accesses), np.arange(12.0).reshape(2, 6)
    one, other = (
        run(each, stream, slots, layers=2, shared=shared, popularity=popularity, semantics=semantics,
            current_evictable=True).hits.sum() for each in ("belady-bypass", name))
    assert one >= other


def test_a_static_cache_can_beat_belady_that_must_load() -> None:
    """Belady without bypass is no bound for a policy that may refuse: here it never hits, static does."""
    stream = stream_of([(0, [e]) for e in (0, 1, 0, 2, 0, 3, 0, 4)])
    popularity = np.array([[9.0, 1, 1, 1, 1, 0]])
    hits = {name: int(run(name, stream, 1, popularity=popularity).hits.sum())
            for name in ("belady", "static", "belady-bypass")}
    assert hits == {"belady": 0, "static": 3, "belady-bypass": 3}


@settings(max_examples=30, deadline=None)
@given(accesses=streams(length=60))
def test_more_slots_never_cost_lru_a_hit(accesses: Accesses) -> None:
    """LRU has the inclusion property under set semantics, once an access fits in its slots."""
    hits = [run("lru", stream_of(accesses), slots).hits.sum() for slots in (3, 4, 5, 6)]
    assert hits == sorted(hits)


@settings(max_examples=30, deadline=None)
@given(accesses=streams(layers=3, length=40), slots=st.integers(1, 6), name=st.sampled_from(POLICIES.names()),
       shared=st.booleans(), semantics=st.sampled_from(["set", "sequential"]), count_cold=st.booleans(),
       current_evictable=st.booleans())
def test_counts_are_conserved(accesses: Accesses, slots: int, name: str, shared: bool, semantics: str,
                              count_cold: bool, current_evictable: bool) -> None:
    """Per layer, hits + misses are the accesses, and loads are evictions plus what is still resident."""
    stream = stream_of(accesses)
    policy = make_policy(name, PolicyContext(3, 6, popularity=np.ones((3, 6)), future=stream))
    cache = ExpertCache(3, 6, slots, policy, shared=shared)
    stats = replay(stream, cache, semantics=semantics, count_cold=count_cold, current_evictable=current_evictable)
    cache.check()
    used = [sum(len(experts) for at, experts in accesses if at == layer) for layer in range(3)]
    assert stats.accesses.tolist() == used
    assert (stats.hits + stats.misses).tolist() == used
    distinct = [len({e for at, experts in accesses if at == layer for e in experts}) for layer in range(3)]
    assert stats.cold_misses.tolist() == distinct
    if count_cold:
        resident = sum(len(cache.residents(layer)) for layer in range(3))
        assert (stats.misses - stats.bypasses).sum() == stats.evictions.sum() + resident


@settings(max_examples=20, deadline=None)
@given(accesses=streams(layers=2, length=40), name=st.sampled_from(POLICIES.names()))
def test_layers_do_not_disturb_each_other(accesses: Accesses, name: str) -> None:
    """Without shared slots, each layer hits exactly as if it ran alone."""
    popularity = np.arange(6.0)[None]
    both = run(name, stream_of(accesses), 3, layers=2, popularity=np.repeat(popularity, 2, axis=0))
    for layer in (0, 1):
        alone = [(0, experts) for at, experts in accesses if at == layer]
        hits = int(run(name, stream_of(alone), 3, popularity=popularity).hits[0]) if alone else 0
        assert both.hits[layer] == hits


@pytest.mark.parametrize(("ours", "theirs"), [("lru", "LRU"), ("lfu-resident", "LFU"), ("belady", "Belady")])
@pytest.mark.parametrize("slots", [1, 4, 13, 40])
def test_hits_equal_libcachesim(ours: str, theirs: str, slots: int) -> None:
    """On a stream of single keys, hits equal those of libcachesim (Belady there needs next-access times)."""
    libcachesim = pytest.importorskip("libcachesim")
    weights = 1 / np.arange(1, 65)
    keys = np.random.default_rng(7).choice(64, size=3000, p=weights / weights.sum()).tolist()
    upcoming: dict[int, int] = {}
    next_access = [0] * len(keys)
    for position in reversed(range(len(keys))):
        next_access[position] = upcoming.get(keys[position], 2**63 - 1)
        upcoming[keys[position]] = position
    cache = getattr(libcachesim, theirs)(cache_size=slots, hashpower=12)
    expected = sum(
        cache.get(libcachesim.Request(obj_size=1, obj_id=key, next_access_vtime=later))
        for key, later in zip(keys, next_access, strict=True))
    stats = run(ours, stream_of([(0, [key]) for key in keys]), slots, experts=64, semantics="sequential")
    assert 0 < expected < len(keys)
    assert int(stats.hits.sum()) == expected


def test_set_and_sequential_semantics_differ() -> None:
    """Worked by hand: tested together both 0 and 1 hit; one by one, loading 0 first throws out 1."""
    stream = stream_of([(0, [1, 2]), (0, [0, 1])])
    together = run("lru", stream, 2)
    one_by_one = run("lru", stream, 2, semantics="sequential")
    assert (together.hits.tolist(), one_by_one.hits.tolist()) == ([1], [0])
    assert one_by_one.evictions.tolist() == [2]


def test_overflowing_access_passes_through() -> None:
    """With two slots and three experts, hits stay, misses fill what is left in rising order, the rest bypass."""
    stream = stream_of([(0, [4]), (0, [1, 2, 4]), (0, [1, 4])])
    stats = run("lru", stream, 2)
    assert (stats.hits.tolist(), stats.bypasses.tolist(), stats.evictions.tolist()) == ([3], [1], [0])
    evictable = run("lru", stream, 2, current_evictable=True)  # 1 enters, 2 evicts 1 (the lower key); then 4 hits
    assert (evictable.hits.tolist(), evictable.bypasses.tolist(), evictable.evictions.tolist()) == ([2], [0], [2])


def test_cold_misses_into_free_slots_can_count_as_hits() -> None:
    """As in moe-lrc: first uses hit while a slot is free, so a cache of all experts reaches a hit rate of one."""
    stream = stream_of([(0, [0, 1]), (0, [2, 3]), (0, [0, 3]), (0, [4, 5])])
    assert run("lru", stream, 6, count_cold=False).hit_rate == 1.0
    assert run("lru", stream, 6).hits.tolist() == [2]
    three = run("lru", stream, 3, count_cold=False)  # 0, 1, 2 find free slots; 3 evicts 0
    assert (three.hits.tolist(), three.misses.tolist(), three.cold_misses.tolist()) == ([4], [4], [6])


def test_preloaded_experts_hit_at_once() -> None:
    """A preloaded expert is a hit on its first use, and no cold miss."""
    stream = stream_of([(0, [3])])
    cache = ExpertCache(1, 6, 2, make_policy("lru", PolicyContext(1, 6)))
    cache.preload([3])
    stats = replay(stream, cache)
    assert (stats.hits.tolist(), stats.cold_misses.tolist()) == ([1], [0])


def test_golden_hits() -> None:
    """Hits of a seeded, skewed stream of 2 layers x 32 experts, top-4, 300 steps, per layer and policy."""
    rng = np.random.default_rng(2026)
    scores = rng.gumbel(size=(600, 32)) - 0.8 * np.log(np.arange(1, 33))
    stream = stream_of([(i % 2, sorted(np.argsort(-row)[:4].tolist())) for i, row in enumerate(scores)])
    popularity = np.tile(1 / np.arange(1, 33), (2, 1))
    found = {name: run(name, stream, 10, layers=2, experts=32, popularity=popularity).hits.tolist()
             for name in (*NO_FUTURE, "belady", "belady-bypass", "static")}
    assert found == {
        "lru": [575, 554],
        "lfu": [691, 683],
        "lfu-resident": [671, 660],
        "belady": [817, 803],
        "belady-bypass": [848, 840],
        "static": [732, 706],
    }


def test_a_replay_is_repeatable_and_leaves_its_input() -> None:
    """Two replays of one stream give the same frame, and the stream keeps its bytes."""
    stream = stream_of([(0, [0, 1]), (1, [2]), (0, [1, 5])])
    before = stream.experts.tobytes()
    first, second = (run("lru", stream, 1, layers=2, shared=True).to_frame() for _ in range(2))
    assert first.equals(second)
    assert stream.experts.tobytes() == before


def test_frame_has_a_row_per_layer() -> None:
    """The frame gives the counts and the hit rate of each layer; a layer without accesses has no rate."""
    frame = run("lru", stream_of([(0, [0]), (0, [0]), (0, [1])]), 1, layers=2).to_frame()
    assert list(frame.columns) == [
        "layer", "accesses", "hits", "misses", "cold_misses", "evictions", "bypasses", "hit_rate"]
    assert frame.loc[0].tolist() == [0, 3, 1, 2, 2, 1, 0, 1 / 3]
    assert np.isnan(frame.loc[1, "hit_rate"])


def test_an_access_without_experts_counts_nothing() -> None:
    """Fully padded accesses are allowed; the hit rate of nothing is not a number."""
    assert np.isnan(run("lru", stream_of([(0, []), (0, [])]), 2).hit_rate)


def test_heaps_stay_small_without_evictions() -> None:
    """A long run of hits does not grow the policy's heap beyond eight ranks per slot, and keeps its order."""
    policy = make_policy("lru", PolicyContext(1, 6))
    cache = ExpertCache(1, 6, 3, policy)
    replay(stream_of([(0, [now % 3]) for now in range(500)]), cache)
    assert isinstance(policy, RankedPolicy)
    assert len(policy._heaps[0]) <= 24
    reservation = cache.reserve(0, 5, 500)
    assert reservation is not None
    assert reservation.victim_key == 497 % 3


def test_replay_refuses_unknown_semantics() -> None:
    """A misspelt option is an error with a suggestion."""
    with pytest.raises(InputError, match="unknown access semantics 'sets'\\. Did you mean 'set'"):
        run("lru", stream_of([(0, [0])]), 1, semantics="sets")


def test_replay_refuses_a_stream_of_another_model() -> None:
    """A stream that names experts which the cache does not know is an error, not a miss."""
    with pytest.raises(InputError, match="names layer 1 and expert 0, but there are 1 layers x 6 experts"):
        replay(stream_of([(1, [0])]), ExpertCache(1, 6, 1, make_policy("lru", PolicyContext(1, 6))))


def test_replay_refuses_a_used_cache() -> None:
    """Replaying twice on one cache is an error, because its past would be mistaken for the present."""
    stream = stream_of([(0, [0]), (0, [1])])
    cache = ExpertCache(1, 6, 1, make_policy("lru", PolicyContext(1, 6)))
    replay(stream, cache)
    with pytest.raises(InputError, match="use a new cache for each run"):
        replay(stream, cache)


def test_belady_with_the_future_of_a_shorter_run_is_an_error() -> None:
    """A future that ends before the run does is noticed."""
    short, long = stream_of([(0, [0])]), stream_of([(0, [0]), (0, [1])])
    cache = ExpertCache(1, 6, 1, make_policy("belady", PolicyContext(1, 6, future=short)))
    with pytest.raises(InputError, match="past the end of the future"):
        replay(long, cache)


def test_statistics_that_do_not_add_up_are_refused() -> None:
    """CacheStats checks that hits and misses make up the accesses."""
    stats = run("lru", stream_of([(0, [0])]), 1)
    with pytest.raises(CheckError, match="hits \\+ misses are not the accesses"):
        dataclasses.replace(stats, hits=np.array([5]))
