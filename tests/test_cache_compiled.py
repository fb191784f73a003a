"""The compiled replay: equal to the readable one in every count, for every policy and option; and to libcachesim."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache import bounds, compiled_replay
from moesim.cache.bounds import fewest_misses
from moesim.cache.byte_cache import ByteCache
from moesim.cache.cache import ExpertCache
from moesim.cache.compiled_replay import replay_compiled
from moesim.cache.policies.lru import LruPolicy
from moesim.cache.policy import POLICIES, AccessStream, PolicyContext, make_policy
from moesim.cache.replay import COUNTS, CacheStats, replay
from moesim.errors import InputError

Accesses = list[tuple[int, list[int]]]
POLICY_NAMES = ("lru", "lfu", "lfu-resident", "belady", "belady-bypass", "static")


def stream_of(accesses: Accesses) -> AccessStream:
    """Return the stream of (layer, experts) pairs."""
    sizes = [len(experts) for _, experts in accesses]
    return AccessStream(
        np.array([layer for layer, _ in accesses]), np.cumsum([0, *sizes]),
        np.array([expert for _, experts in accesses for expert in experts], dtype=np.int64))


def random_stream(seed: int, num_layers: int, num_experts: int, num_accesses: int, width: int) -> AccessStream:
    """Return accesses of random layers and of zero to `width` experts, low numbers more often."""
    rng = np.random.default_rng(seed)
    weight = 1.0 / np.arange(1, num_experts + 1)
    accesses = []
    for _ in range(num_accesses):
        size = min(int(rng.integers(0, width + 1)), num_experts)
        chosen = rng.choice(num_experts, size, replace=False, p=weight / weight.sum())
        accesses.append((int(rng.integers(num_layers)), sorted(chosen.tolist())))
    return stream_of(accesses)


@dataclass(frozen=True)
class Case:
    """A replay to be run twice: compiled, and readable."""

    stream: AccessStream
    policy: str
    num_layers: int
    num_experts: int
    slots: int | None = None
    room_bytes: int | None = None
    expert_bytes: np.ndarray | None = None
    shared: bool = False
    preload: tuple[int, ...] = ()
    semantics: str = "set"
    count_cold: bool = True
    current_evictable: bool = False

    def context(self) -> PolicyContext:
        """Popularity is the stream's own; every other expert has the same one, so that ties come up."""
        keys = self.stream.keys(self.num_experts)
        popularity = np.bincount(keys, minlength=self.num_layers * self.num_experts) // 3
        return PolicyContext(self.num_layers, self.num_experts,
                             popularity.reshape(self.num_layers, self.num_experts).astype(float), self.stream)

    def options(self) -> dict[str, object]:
        """The access semantics."""
        return {"semantics": self.semantics, "count_cold": self.count_cold, "current_evictable": self.current_evictable}

    def compiled(self) -> CacheStats:
        """What is under test."""
        return replay_compiled(
            self.stream, self.policy, self.context(), slots_per_layer=self.slots, bytes_per_layer=self.room_bytes,
            expert_bytes=self.expert_bytes, shared=self.shared, preload=self.preload, **self.options())  # type: ignore[arg-type]

    def cache(self) -> ExpertCache:
        """A new cache for the readable replay."""
        policy = make_policy(self.policy, self.context())
        if self.slots is not None:
            return ExpertCache(self.num_layers, self.num_experts, self.slots, policy, shared=self.shared)
        assert self.room_bytes is not None
        assert self.expert_bytes is not None
        return ByteCache(self.num_layers, self.num_experts, self.room_bytes, self.expert_bytes, policy,
                         shared=self.shared)

    def readable(self) -> CacheStats:
        """The specification."""
        cache = self.cache()
        cache.preload(self.preload)
        stats = replay(self.stream, cache, **self.options())  # type: ignore[arg-type]
        cache.check()
        return stats


def counts(stats: CacheStats) -> dict[str, list[int]]:
    """Return every count by layer."""
    return {name: getattr(stats, name).tolist() for name in COUNTS}


def check_equal(case: Case) -> None:
    """Fail unless both replays agree in every count and say the same semantics."""
    found, expected = case.compiled(), case.readable()
    assert counts(found) == counts(expected)
    assert (found.semantics, found.count_cold, found.current_evictable) == (
        expected.semantics, expected.count_cold, expected.current_evictable)


@st.composite
def preloads(draw: st.DrawFn, case: Case) -> tuple[int, ...]:
    """Draw keys that the empty cache of `case` takes, in any order."""
    keys = draw(st.lists(st.integers(0, case.num_layers * case.num_experts - 1), unique=True, max_size=8))
    kept: list[int] = []
    for key in keys:
        try:
            case.cache().preload([*kept, key])
        except InputError:
            continue
        kept.append(key)
    return tuple(kept)


@st.composite
def cases(draw: st.DrawFn, *, in_bytes: bool) -> Case:
    """Draw a short stream and all options."""
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    some = st.sets(st.integers(0, num_experts - 1), max_size=4).map(sorted)
    accesses = draw(st.lists(st.tuples(st.integers(0, num_layers - 1), some), min_size=1, max_size=40))
    sizes = draw(st.lists(st.integers(1, 5), min_size=num_layers * num_experts, max_size=num_layers * num_experts))
    case = Case(
        stream_of(accesses), draw(st.sampled_from(POLICY_NAMES)), num_layers, num_experts,
        slots=None if in_bytes else draw(st.integers(1, 8)), room_bytes=draw(st.integers(1, 16)) if in_bytes else None,
        expert_bytes=np.array(sizes).reshape(num_layers, num_experts) if in_bytes else None,
        shared=draw(st.booleans()), semantics=draw(st.sampled_from(["set", "sequential"])),
        count_cold=draw(st.booleans()), current_evictable=draw(st.booleans()))
    return Case(**{**case.__dict__, "preload": draw(preloads(case)) if draw(st.booleans()) else ()})


@settings(max_examples=300, deadline=None)
@given(case=cases(in_bytes=False))
def test_counts_equal_the_readable_replay(case: Case) -> None:
    """Every policy, both semantics, layers apart or shared, preloaded or not: the same six counts per layer."""
    check_equal(case)


@settings(max_examples=300, deadline=None)
@given(case=cases(in_bytes=True))
def test_counts_equal_the_readable_replay_in_bytes(case: Case) -> None:
    """The same with experts of one to five bytes and pools of one to sixteen."""
    check_equal(case)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("semantics", ["set", "sequential"])
def test_more_than_one_block(policy: str, shared: bool, semantics: str) -> None:
    """150 experts in 3 layers take several blocks of 64 ranks per pool, also a last one that is not full."""
    stream = random_stream(5, 3, 150, 900, 12)
    preload = (7, 160) if policy == "static" else (7, 160, 149)  # 149 is no member of the fixed set
    check_equal(Case(stream, policy, 3, 150, slots=40, shared=shared, semantics=semantics, preload=preload))
    sizes = np.random.default_rng(8).integers(1, 9, (3, 150))
    check_equal(Case(stream, policy, 3, 150, room_bytes=170, expert_bytes=sizes, shared=shared, semantics=semantics))


@pytest.mark.parametrize("current_evictable", [False, True])
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_accesses_larger_than_the_pool(policy: str, current_evictable: bool) -> None:
    """Experts that outnumber the slots pass through, or push each other out, as in the readable replay."""
    stream = random_stream(6, 2, 20, 600, 14)
    for shared in (False, True):
        check_equal(Case(stream, policy, 2, 20, slots=4, shared=shared, current_evictable=current_evictable))


def test_a_full_lru_queue_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue hardly larger than the slots is packed again and again, and nothing changes."""
    monkeypatch.setattr(compiled_replay, "QUEUE_PER_SLOT", 1)
    monkeypatch.setattr(compiled_replay, "QUEUE_ENTRIES", 0)
    stream = random_stream(7, 2, 20, 1500, 6)
    for shared in (False, True):
        for semantics in ("set", "sequential"):
            check_equal(Case(stream, "lru", 2, 20, slots=5, shared=shared, semantics=semantics))


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_the_loops_for_lru_and_for_ranked_policies_agree(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LRU has a loop of its own; the loop of the ranked policies gives the same counts (and Belady has no choice)."""
    stream = random_stream(9, 3, 64, 3000, 8)
    case = Case(stream, policy, 3, 64, slots=20)
    own = counts(case.compiled())
    monkeypatch.setattr(compiled_replay._Run, "suits_lru", lambda self, preload: False)
    assert counts(case.compiled()) == own


def single_keys(seed: int, num_keys: int, length: int) -> np.ndarray:
    """Return int64[use], keys of falling popularity."""
    weights = 1 / np.arange(1, num_keys + 1)
    return np.random.default_rng(seed).choice(num_keys, size=length, p=weights / weights.sum())


@pytest.mark.parametrize(("ours", "theirs"), [("lru", "LRU"), ("lfu-resident", "LFU"), ("belady", "Belady")])
@pytest.mark.parametrize("slots", [1, 4, 13, 40])
def test_hits_equal_libcachesim(ours: str, theirs: str, slots: int) -> None:
    """On single keys, hits equal those of libcachesim (Belady there answers nonsense without next-access times).

    Its LFU forgets evicted counts, and breaks ties by the last use, as `lfu-resident` does.
    """
    libcachesim = pytest.importorskip("libcachesim")
    keys = single_keys(7, 64, 20_000).tolist()
    upcoming: dict[int, int] = {}
    next_access = [0] * len(keys)
    for position in reversed(range(len(keys))):
        next_access[position] = upcoming.get(keys[position], 2**63 - 1)
        upcoming[keys[position]] = position
    cache = getattr(libcachesim, theirs)(cache_size=slots, hashpower=12)
    expected = sum(
        cache.get(libcachesim.Request(obj_size=1, obj_id=key, next_access_vtime=later))
        for key, later in zip(keys, next_access, strict=True))
    stream = stream_of([(0, [key]) for key in keys])
    stats = replay_compiled(stream, ours, PolicyContext(1, 64, future=stream), slots_per_layer=slots)
    assert 0 < expected < len(keys)
    assert int(stats.hits.sum()) == expected


def test_golden_hits() -> None:
    """Hits of a seeded stream of 2 layers x 32 experts, top-4, as the readable replay's own test has them."""
    rng = np.random.default_rng(2026)
    scores = rng.gumbel(size=(600, 32)) - 0.8 * np.log(np.arange(1, 33))
    stream = stream_of([(i % 2, sorted(np.argsort(-row)[:4].tolist())) for i, row in enumerate(scores)])
    context = PolicyContext(2, 32, np.tile(1 / np.arange(1, 33), (2, 1)), stream)
    found = {name: replay_compiled(stream, name, context, slots_per_layer=10).hits.tolist() for name in POLICY_NAMES}
    assert found == {
        "lru": [575, 554],
        "lfu": [691, 683],
        "lfu-resident": [671, 660],
        "belady": [817, 803],
        "belady-bypass": [848, 840],
        "static": [732, 706],
    }


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), slots=st.integers(4, 12), name=st.sampled_from(["lru", "lfu", "lfu-resident"]))
def test_no_policy_that_loads_every_miss_beats_belady(seed: int, slots: int, name: str) -> None:
    """Where every access fits, Belady misses least; and with bypass no more than that."""
    stream = random_stream(seed, 2, 16, 300, 4)
    context = PolicyContext(2, 16, future=stream)
    misses = {each: int(replay_compiled(stream, each, context, slots_per_layer=slots).misses.sum())
              for each in (name, "belady")}
    assert misses["belady"] <= misses[name]
    free = replay_compiled(stream, "belady-bypass", context, slots_per_layer=slots, current_evictable=True)
    assert free.misses.sum() <= misses["belady"]


@settings(max_examples=40, deadline=None)
@given(case=cases(in_bytes=True))
def test_every_load_is_evicted_or_stays(case: Case) -> None:
    """Hits and misses are the accesses; what entered and did not leave is resident; cold misses are first uses."""
    stats, cache = case.compiled(), case.cache()
    cache.preload(case.preload)
    replay(case.stream, cache, **case.options())  # type: ignore[arg-type]
    assert (stats.hits + stats.misses).tolist() == stats.accesses.tolist()
    assert (stats.cold_misses <= stats.accesses).all()
    if case.count_cold:
        entered = (stats.misses - stats.bypasses).sum() + len(case.preload)
        resident = sum(len(cache.residents(layer)) for layer in range(case.num_layers))
        assert entered == stats.evictions.sum() + resident


def test_bytes_of_one_size_are_slots() -> None:
    """Experts of seven bytes in pools of 7 n + 6 bytes behave as n slots."""
    stream = random_stream(11, 2, 20, 500, 5)
    for policy in POLICY_NAMES:
        by_slots = Case(stream, policy, 2, 20, slots=6)
        by_bytes = Case(stream, policy, 2, 20, room_bytes=48, expert_bytes=np.full((2, 20), 7))
        assert counts(by_bytes.compiled()) == counts(by_slots.compiled())


class _Newest(LruPolicy):
    """A policy without a compiled form: the most recently used leaves."""

    def worth(self, key: int, now: int) -> int:
        return -now


def test_other_policies_run_in_the_readable_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in's policy is run, not guessed: its counts are those of `replay`."""
    monkeypatch.setitem(POLICIES._entries, "newest", _Newest)
    case = Case(random_stream(12, 2, 12, 300, 4), "newest", 2, 12, slots=5)
    check_equal(case)
    assert counts(case.compiled()) != counts(Case(case.stream, "lru", 2, 12, slots=5).compiled())


def test_a_future_that_is_another_stream_is_the_readable_replays() -> None:
    """An equal future is compiled; another one is followed as `replay` follows it, its mistakes included."""
    stream, other = random_stream(13, 1, 12, 200, 4), random_stream(14, 1, 12, 250, 4)
    policy = make_policy("belady", PolicyContext(1, 12, future=other))
    expected = replay(stream, ExpertCache(1, 12, 5, policy))
    found = replay_compiled(stream, "belady", PolicyContext(1, 12, future=other), slots_per_layer=5)
    assert counts(found) == counts(expected)
    twin = AccessStream(stream.layers.copy(), stream.offsets.copy(), stream.experts.copy())
    assert compiled_replay._compiled_code("belady", stream, PolicyContext(1, 12, future=twin)) is not None
    assert compiled_replay._compiled_code("belady", stream, PolicyContext(1, 12, future=other)) is None
    with pytest.raises(InputError, match="past the end of the future"):
        replay_compiled(other, "belady", PolicyContext(1, 12, future=stream), slots_per_layer=5)


def test_streams_too_long_for_the_ranks_are_the_readable_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bits of a rank no compiled loop runs."""
    stream = random_stream(15, 1, 6, 50, 3)
    assert compiled_replay._compiled_code("lfu", stream, PolicyContext(1, 6)) is not None
    monkeypatch.setattr(compiled_replay, "MAX_ACCESSES", 49)
    assert compiled_replay._compiled_code("lfu", stream, PolicyContext(1, 6)) is None
    check_equal(Case(stream, "lfu", 1, 6, slots=3))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"policy_name": "lur"}, "unknown cache policy 'lur'. Did you mean 'lru'"),
    ({"semantics": "sets"}, "unknown access semantics 'sets'. Did you mean 'set'"),
    ({"policy_name": "belady"}, "cache policy 'belady' needs the exact future"),
    ({"policy_name": "static"}, "cache policy 'static' needs popularity"),
    ({"slots_per_layer": 0}, "slots_per_layer must be at least 1, got 0"),
    ({"slots_per_layer": None}, "give slots_per_layer, or bytes_per_layer with expert_bytes"),
    ({"bytes_per_layer": 8}, "give slots_per_layer, or bytes_per_layer with expert_bytes"),
    ({"preload": [3, 3]}, "preload names layer 0, expert 3 twice"),
    ({"preload": [0, 1, 2]}, "preload has more experts than slots at layer 0, expert 2"),
    ({"preload": [6]}, "no expert 0 in layer 1"),
    ({"slots_per_layer": None, "bytes_per_layer": 0, "expert_bytes": np.ones((1, 6), int)},
     "bytes_per_layer must be at least 1, got 0"),
    ({"slots_per_layer": None, "bytes_per_layer": 5, "expert_bytes": np.ones((2, 6), int)},
     "expert_bytes must be integers \\[1, 6\\]"),
    ({"slots_per_layer": None, "bytes_per_layer": 5, "expert_bytes": np.zeros((1, 6), int)},
     "expert_bytes must be at least 1, got 0"),
    ({"slots_per_layer": None, "bytes_per_layer": 5, "expert_bytes": np.full((1, 6), 3), "preload": [0, 1]},
     "preload has more bytes than fit at layer 0, expert 1: it needs 3, and 2 of the pool's 5 are free"),
])
def test_bad_input_is_refused(arguments: dict[str, object], message: str) -> None:
    """The words of the readable parts: a wrong name, a missing need, a capacity or a preload that makes no sense."""
    stream = stream_of([(0, [1, 2])])
    given = {"policy_name": "lru", "context": PolicyContext(1, 6), "slots_per_layer": 2, **arguments}
    with pytest.raises(InputError, match=message):
        replay_compiled(stream, **given)  # type: ignore[arg-type]


def test_a_stream_of_another_model_is_refused() -> None:
    """Unlike an index out of range, which a compiled loop would not notice."""
    with pytest.raises(InputError, match="names layer 1 and expert 0, but there are 1 layers x 6 experts"):
        replay_compiled(stream_of([(1, [0])]), "lru", PolicyContext(1, 6), slots_per_layer=1)


def misses_of_a_heap(stream: AccessStream, num_experts: int, slots: int, preload: Collection[int], shared: bool) -> np.ndarray:
    """Return int64[access], as `fewest_misses`: the same rule with a dict of stays and a heap, pool by pool."""
    layers, keys = np.repeat(stream.layers, np.diff(stream.offsets)), stream.keys(num_experts).tolist()
    capacity = slots * (int(stream.layers.max()) + 1) if shared else slots
    misses = np.zeros(stream.num_accesses, np.int64)
    for layer in [None] if shared else np.unique(stream.layers).tolist():
        uses = [use for use in range(len(keys)) if shared or layers[use] == layer]
        next_use, seen = {}, {}
        for use in reversed(uses):
            next_use[use] = seen.get(keys[use], -1)
            seen[keys[use]] = use
        kept = {key: seen[key] for key in preload if key in seen}
        farthest = [(-until, key) for key, until in kept.items()]
        heapq.heapify(farthest)
        for access in range(stream.num_accesses):
            own = [use for use in range(stream.offsets[access], stream.offsets[access + 1]) if use in next_use]
            for use in own:
                misses[access] += kept.pop(keys[use], None) != use
            for use in own:
                if next_use[use] >= 0:
                    kept[keys[use]] = next_use[use]
                    heapq.heappush(farthest, (-next_use[use], keys[use]))
            while len(kept) > capacity:
                until, key = heapq.heappop(farthest)
                if kept.get(key) == -until:
                    del kept[key]
    return misses


@settings(max_examples=100, deadline=None)
@given(case=cases(in_bytes=False))
def test_fewest_misses_equal_a_heap(case: Case) -> None:
    """The bound's compiled loop says of every access what a plain heap says, preloaded and shared too."""
    assert case.slots is not None
    preload = [key for key in case.preload if key < (int(case.stream.layers.max()) + 1) * case.num_experts]
    found = fewest_misses(case.stream, case.num_experts, case.slots, preload=preload, shared=case.shared)
    expected = misses_of_a_heap(case.stream, case.num_experts, case.slots, preload, case.shared)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("shared", [False, True])
def test_fewest_misses_of_many_experts_equal_a_heap(shared: bool) -> None:
    """Several blocks of ranks per pool; in all, as few as Belady with bypass."""
    stream = random_stream(21, 3, 150, 800, 12)
    found = fewest_misses(stream, 150, 20, preload=[0, 1, 151, 152], shared=shared)
    assert found.tolist() == misses_of_a_heap(stream, 150, 20, [0, 1, 151, 152], shared).tolist()
    stats = replay_compiled(stream, "belady-bypass", PolicyContext(3, 150, future=stream), slots_per_layer=20,
                            shared=shared, preload=[0, 1, 151, 152], current_evictable=True)
    assert found.sum() == stats.misses.sum()


def test_fewest_misses_refuses_what_the_loop_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert outside the model, or more uses than positions have bits, is an error and no wrong count."""
    stream = stream_of([(0, [0, 5])])
    with pytest.raises(InputError, match="names layer 0 and expert 5, but there are 1 layers x 5 experts"):
        fewest_misses(stream, 5, 2)
    monkeypatch.setattr(bounds, "MAX_USES", 1)
    with pytest.raises(InputError, match="the stream has 2 uses; at most 1 can be counted"):
        fewest_misses(stream, 6, 2)
