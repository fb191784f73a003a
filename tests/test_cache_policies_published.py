"""Published eviction policies: against their definitions computed anew from the whole history, and libcachesim."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.byte_cache import ByteCache
from moesim.cache.cache import ExpertCache
from moesim.cache.compiled_layout import BYPASSES, CODES, COLD, EVICTIONS, MISSES
from moesim.cache.future_window import FutureWindow
from moesim.cache.policies.arc import ArcPolicy
from moesim.cache.policies.hobbit import HIGH_PRECISION_UP_TO, HobbitPolicy
from moesim.cache.policies.lirs import LirsPolicy
from moesim.cache.policies.moe_infinity import EPSILON, MoeInfinityPolicy
from moesim.cache.policies.s3fifo import S3FifoPolicy
from moesim.cache.policies.sch import SegmentCachePolicy
from moesim.cache.policy import INFORMATION_LEVELS, POLICIES, AccessStream, PolicyContext, access_stream, make_policy
from moesim.cache.replay import CacheStats, replay
from moesim.cache.scanned_layout import SCANNED_CODES
from moesim.cache.scanned_replay import can_scan, scanned_tally
from moesim.cache.scores import RouterScores, request_starts, router_scores
from moesim.cache.segment_cache import segment_cache_hits
from moesim.errors import InputError
from moesim.traces.trace import RoutingTrace

Accesses = list[tuple[int, list[int]]]
LAYERS, EXPERTS = 3, 5
ROOT = Path(__file__).parents[1]


def stream_of(accesses: Accesses) -> AccessStream:
    """Return the stream of (layer, experts) pairs."""
    return AccessStream(
        np.array([layer for layer, _ in accesses]), np.cumsum([0, *(len(experts) for _, experts in accesses)]),
        np.array([expert for _, experts in accesses for expert in experts], dtype=np.int64))


def steps_of(draw: st.DrawFn, length: int = 14) -> Accesses:
    """Draw steps that go through all layers, one to three experts each."""
    some = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=3).map(sorted)
    return [(layer, draw(some)) for _ in range(draw(st.integers(1, length))) for layer in range(LAYERS)]


@dataclass
class World:
    """A run to be checked: the accesses, what is known besides, and the cache."""

    accesses: Accesses
    starts: list[bool]
    scores: np.ndarray
    slots: int
    shared: bool
    top_k: int = 2

    def context(self, *, scored: bool = True) -> PolicyContext:
        """Everything, so that only the level of a policy keeps it from it."""
        scores = RouterScores(self.top_k, self.scores, self.scores) if scored else None
        return PolicyContext(LAYERS, EXPERTS, np.ones((LAYERS, EXPERTS)), stream_of(self.accesses),
                             np.array(self.starts), scores)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Draw steps, request starts at some steps, scores in eighths, and a small cache."""
    accesses = steps_of(draw)
    starts = [index % LAYERS == 0 and draw(st.booleans()) for index in range(len(accesses))]
    eighths = st.lists(st.integers(0, 8), min_size=EXPERTS, max_size=EXPERTS)
    scores = np.array([draw(eighths) for _ in accesses]) / 8
    return World(accesses, starts, scores, draw(st.integers(1, 4)), draw(st.booleans()))


@dataclass
class History:
    """All that happened: accesses ``0 ... now`` (the current one among them), entries and departures by key."""

    world: World
    scored: bool
    now: int = -1
    entries: list[tuple[int, int]] = field(default_factory=list)
    departures: list[tuple[int, int]] = field(default_factory=list)

    def uses(self, key: int, first: int = 0) -> list[int]:
        """Return the accesses ``first ... now`` that use `key`."""
        layer, expert = divmod(key, EXPERTS)
        accesses = self.world.accesses
        return [at for at in range(first, self.now + 1) if accesses[at][0] == layer and expert in accesses[at][1]]

    def last(self, key: int) -> int:
        """Return the access of the last use or entry."""
        return max([at for at, who in self.entries if who == key] + self.uses(key))

    def entry(self, key: int) -> int:
        """Return the place of the last entry among all."""
        return max(place for place, (_, who) in enumerate(self.entries) if who == key)

    def request(self) -> int:
        """Return the access at which the current request began."""
        return max([at for at in range(self.now + 1) if self.world.starts[at]], default=0)

    @property
    def layer(self) -> int:
        """The layer in progress."""
        return self.world.accesses[self.now][0]


Score = Callable[[History, int], object]


def hits_by_definition(world: World, score: Score, *, scored: bool = True) -> list[int]:
    """Return the hits per layer where the candidate of the lowest (score, last use or entry, key) leaves."""
    history, hits, content = History(world, scored), [0] * LAYERS, set()
    capacity = world.slots * (LAYERS if world.shared else 1)
    for now, (layer, experts) in enumerate(world.accesses):
        history.now = now
        keys = [layer * EXPERTS + expert for expert in experts]
        hits[layer] += len(content & set(keys))
        for key in sorted(set(keys) - content):
            pool = {each for each in content if world.shared or each // EXPERTS == layer}
            if len(pool) == capacity:
                if pool <= set(keys):
                    continue
                victim = min(pool - set(keys), key=lambda each: (score(history, each), history.last(each), each))
                content.remove(victim)
                history.departures.append((now, victim))
            content.add(key)
            history.entries.append((now, key))
    return hits


def hits_of(name: str, world: World, *, scored: bool = True) -> list[int]:
    """Return the hits per layer of a policy in the cache."""
    policy = make_policy(name, world.context(scored=scored))
    cache = ExpertCache(LAYERS, EXPERTS, world.slots, policy, shared=world.shared)
    hits = replay(stream_of(world.accesses), cache).hits.tolist()
    cache.check()
    return hits


def distance(history: History, key: int) -> int:
    """Return the layers from the current one on until that of `key`."""
    steps = 0
    while (history.layer + steps) % LAYERS != key // EXPERTS:
        steps += 1
    return steps


def is_important(history: History, at: int, expert: int) -> bool:
    """Whether a use is of high precision: what is ranked before it among the top_k weighs at most 0.6 of them."""
    if not history.scored:
        return True
    row = history.world.scores[at]
    ranked = sorted(range(EXPERTS), key=lambda each: (-row[each], each))[: history.world.top_k]
    if expert not in ranked:
        return False
    total = sum(Fraction(row[each]) for each in ranked) or 1
    before = sum(Fraction(row[each]) for each in ranked[: ranked.index(expert)])
    return before / total <= Fraction(str(HIGH_PRECISION_UP_TO))


def hobbit_terms(history: History, key: int) -> tuple[Fraction, Fraction, Fraction, Fraction]:
    """Return R/T, F/T, H/T and the distance term of HOBBIT's sum, exactly."""
    begin = history.request()
    tokens = [at for at in range(begin, history.now + 1) if history.world.accesses[at][0] == key // EXPERTS]
    here = sum(history.world.accesses[at][0] == history.layer for at in range(begin, history.now + 1))
    uses = history.uses(key, begin)
    marks = uses + [at for at, who in history.entries if who == key and at >= begin]
    recency = sum(at <= max(marks) for at in tokens) if marks else 0
    high = sum(is_important(history, at, key % EXPERTS) for at in uses)
    near = 1 - Fraction(distance(history, key), LAYERS)
    return Fraction(recency, here), Fraction(len(uses), here), Fraction(high, here), near


def edgemoe(history: History, key: int, *, printed: bool) -> Fraction:
    """Return uses per layer of distance, exactly."""
    ahead = distance(history, key)
    layers = (LAYERS - ahead) % LAYERS if printed else ahead
    return Fraction(len(history.uses(key)), layers or LAYERS)


def recent_score(history: History, key: int) -> Fraction:
    """Return the exponential average as one sum over the layer's accesses."""
    layer, expert = divmod(key, EXPERTS)
    own = [at for at in range(history.now + 1) if history.world.accesses[at][0] == layer]
    total = Fraction(0)
    for age, at in enumerate(reversed(own)):
        row = history.world.scores[at]
        best = sorted(range(EXPERTS), key=lambda each: (-row[each], each))[: 2 * history.world.top_k]
        value = (Fraction(row[expert]) if expert in best else 0) if history.scored else int(
            expert in history.world.accesses[at][1])
        total += Fraction(1, 2) ** (age + 1) * value
    return total


def matrix(history: History, begin: int, end: int) -> np.ndarray:
    """Return the uses by layer and expert of accesses ``begin ... end - 1``."""
    found = np.zeros((LAYERS, EXPERTS))
    for layer, experts in history.world.accesses[begin:end]:
        found[layer, experts] += 1
    return found


def moe_infinity(history: History, key: int) -> float:
    """Return Algorithm 1's score from the matrices of all requests before."""
    begins = [at for at in range(history.now + 1) if history.world.starts[at] or at == 0]
    current = matrix(history, begins[-1], history.now + 1)
    stored = [matrix(history, begin, end) for begin, end in itertools.pairwise(begins)]
    predicted = current
    if stored:
        similar = np.array([(one * current).sum() / np.sqrt((one**2).sum() * (current**2).sum()) for one in stored])
        predicted = sum(one for one, value in zip(stored, similar, strict=True) if np.isclose(value, similar.max()))
    layer = key // EXPERTS
    return round((predicted.flat[key] / max(predicted[layer].sum(), 1) + EPSILON) * (1 - layer / LAYERS), 12)


def uses_since_departure(history: History, key: int) -> int:
    """Return the uses since `key` left last."""
    left = max([at for at, who in history.departures if who == key], default=-1)
    return len(history.uses(key, left + 1))


def future_uses(history: History, key: int, window: int) -> int:
    """Return the uses in the next `window` accesses of the expert's layer."""
    layer, expert = divmod(key, EXPERTS)
    later = [experts for at, experts in history.world.accesses[history.now + 1:] if at == layer]
    return sum(expert in experts for experts in later[:window])


DEFINITIONS: dict[str, Score] = {
    "fifo": lambda history, key: history.entry(key),
    "lfu-fifo": lambda history, key: (uses_since_departure(history, key), history.entry(key)),
    "fld": lambda history, key: -distance(history, key),
    "hobbit": lambda history, key: sum(hobbit_terms(history, key)),
    "lhu": lambda history, key: hobbit_terms(history, key)[2],
    "edgemoe": lambda history, key: edgemoe(history, key, printed=False),
    "edgemoe-printed": lambda history, key: edgemoe(history, key, printed=True),
    "mrs": recent_score,
    "mrs-repository": recent_score,
    "moe-infinity": moe_infinity,
    "sch-4": lambda history, key: future_uses(history, key, 4),
    "sch-16": lambda history, key: future_uses(history, key, 16),
    "sch-64": lambda history, key: future_uses(history, key, 64),
}
QUEUES = ("arc", "lirs", "s3-fifo", "sieve", "lfuda")


@pytest.mark.parametrize("name", DEFINITIONS)
@settings(max_examples=40, deadline=None)
@given(world=worlds(), scored=st.booleans())
def test_hits_equal_the_definition(name: str, world: World, scored: bool) -> None:
    """Set semantics, a pool per layer or one for all: each victim is the minimum of the published formula."""
    expected = hits_by_definition(world, DEFINITIONS[name], scored=scored)
    assert hits_of(name, world, scored=scored) == expected


def one_by_one(keys: list[int], slots: int, name: str, num_keys: int) -> int:
    """Return the hits of a stream of single keys in one pool."""
    stream = stream_of([(0, [key]) for key in keys])
    cache = ExpertCache(1, num_keys, slots, make_policy(name, PolicyContext(1, num_keys, future=stream)))
    return int(replay(stream, cache, semantics="sequential").hits.sum())


def lirs_by_hand(keys: list[int], slots: int) -> int:
    """LIRS in the words of its paper, on plain lists: [bottom ... top] of S, [front ... end] of Q, and the LIR set."""
    stack: list[int] = []
    queue: list[int] = []
    lir: set[int] = set()
    room, hits = slots - max(1, slots // 100), 0
    for key in keys:
        in_stack, resident = key in stack, key in lir or key in queue
        hits += resident
        if not resident and len(lir) + len(queue) == slots:
            queue.pop(0)  # the front of Q leaves; in S it stays as a non-resident
        stack = [each for each in stack if each != key] + [key]
        if key not in lir and ((len(lir) < room and not resident) or (in_stack and room)):
            queue = [each for each in queue if each != key]
            lir.add(key)
            if len(lir) > room:
                bottom = next(each for each in stack if each in lir)
                lir.remove(bottom)
                queue.append(bottom)
        elif key not in lir:
            queue = [each for each in queue if each != key] + [key]
        while stack and stack[0] not in lir:
            stack.pop(0)
    return hits


def lfuda_by_hand(keys: list[int], slots: int) -> int:
    """LFUDA on a dict of (K, time of the last use) and uses."""
    content: dict[int, tuple[int, int]] = {}
    uses: dict[int, int] = {}
    age = hits = 0
    for now, key in enumerate(keys):
        hits += key in content
        if key not in content and len(content) == slots:
            victim = min(content, key=lambda each: content[each])
            age = content.pop(victim)[0]
            del uses[victim]
        uses[key] = uses.get(key, 0) + 1
        content[key] = (uses[key] + age, now)
    return hits


def sieve_by_hand(keys: list[int], slots: int) -> int:
    """SIEVE on a list [oldest ... newest] with an index for the hand."""
    queue: list[int] = []
    visited: set[int] = set()
    hand = hits = 0
    for key in keys:
        if key in queue:
            hits += 1
            visited.add(key)
            continue
        if len(queue) == slots:
            hand %= len(queue)
            while queue[hand] in visited:
                visited.remove(queue[hand])
                hand = (hand + 1) % len(queue)
            queue.pop(hand)
            # at the newest end the hand goes back to the oldest before the newcomer joins
            hand = 0 if hand == len(queue) else hand
        queue.append(key)
    return hits


def arc_by_hand(keys: list[int], slots: int) -> int:
    """ARC, figure 4 of its paper, case by case on lists [least recent ... most recent]."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    target, hits = Fraction(0), 0

    def replace(key: int) -> None:
        if t1 and (len(t1) > target or (key in b2 and len(t1) == target)):
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for key in keys:
        if key in t1 or key in t2:  # case I
            hits += 1
            (t1 if key in t1 else t2).remove(key)
            t2.append(key)
        elif key in b1:  # case II
            target = min(target + max(1, Fraction(len(b2), len(b1))), Fraction(slots))
            replace(key)
            b1.remove(key)
            t2.append(key)
        elif key in b2:  # case III
            target = max(target - max(1, Fraction(len(b1), len(b2))), Fraction(0))
            replace(key)
            b2.remove(key)
            t2.append(key)
        else:  # case IV
            if len(t1) + len(b1) == slots:
                if len(t1) < slots:
                    b1.pop(0)
                    replace(key)
                else:
                    t1.pop(0)
            elif (total := len(t1) + len(t2) + len(b1) + len(b2)) >= slots:
                if total == 2 * slots:
                    b2.pop(0)
                replace(key)
            t1.append(key)
    return hits


BY_HAND: dict[str, Callable[[list[int], int], int]] = {
    "lirs": lirs_by_hand, "lfuda": lfuda_by_hand, "sieve": sieve_by_hand, "arc": arc_by_hand}


@pytest.mark.parametrize("name", BY_HAND)
@settings(max_examples=150, deadline=None)
@given(keys=st.lists(st.integers(0, 8), min_size=1, max_size=80), slots=st.integers(1, 6))
def test_queues_equal_their_papers(name: str, keys: list[int], slots: int) -> None:
    """One key at a time in one pool: the hits of the paper's algorithm written down on plain lists."""
    assert one_by_one(keys, slots, name, 9) == BY_HAND[name](keys, slots)


@pytest.mark.parametrize(("ours", "theirs"), [("arc", "ARC"), ("sieve", "Sieve"), ("s3-fifo", "S3FIFO"), ("fifo", "FIFO")])
@pytest.mark.parametrize("slots", [20, 29, 41])
def test_hits_equal_libcachesim(ours: str, theirs: str, slots: int) -> None:
    """The same hits on 5,000 single keys (its S3-FIFO needs ten slots for a small queue; its LIRS departs from the paper)."""
    libcachesim = pytest.importorskip("libcachesim")
    weights = 1 / np.arange(1, 65)
    keys = np.random.default_rng(7).choice(64, size=5000, p=weights / weights.sum()).tolist()
    cache = getattr(libcachesim, theirs)(cache_size=slots, hashpower=12)
    expected = sum(cache.get(libcachesim.Request(obj_size=1, obj_id=key)) for key in keys)
    assert 0 < expected < len(keys)
    assert one_by_one(keys, slots, ours, 64) == expected


def make_any(name: str, world: World) -> tuple[ExpertCache, AccessStream]:
    """Return a cache and its stream."""
    policy = make_policy(name, world.context())
    return ExpertCache(LAYERS, EXPERTS, world.slots, policy, shared=world.shared), stream_of(world.accesses)


@pytest.mark.parametrize("name", POLICIES.names())
@settings(max_examples=15, deadline=None)
@given(world=worlds(), semantics=st.sampled_from(["set", "sequential"]), evictable=st.booleans())
def test_every_policy_keeps_the_contract(name: str, world: World, semantics: str, evictable: bool) -> None:
    """It fills what it is given, never exceeds it, says its level, repeats itself, and serves one cache."""
    assert POLICIES[name].information in INFORMATION_LEVELS  # type: ignore[attr-defined]
    found: list[CacheStats] = []
    for _ in range(2):
        cache, stream = make_any(name, world)
        found.append(replay(stream, cache, semantics=semantics, current_evictable=evictable))
        cache.check()
    assert found[0].hits.tolist() == found[1].hits.tolist()
    distinct = {key // EXPERTS: 0 for key in range(LAYERS * EXPERTS)} | {
        layer: len({e for at, experts in world.accesses if at == layer for e in experts}) for layer in range(LAYERS)}
    if name != "static" and not world.shared:
        assert [len(cache.residents(layer)) for layer in range(LAYERS)] == [
            min(distinct[layer], world.slots) for layer in range(LAYERS)]
    with pytest.raises(InputError, match="serves one cache"):
        ExpertCache(LAYERS, EXPERTS, 1, cache.policy)


@pytest.mark.parametrize("name", POLICIES.names())
@settings(max_examples=10, deadline=None)
@given(world=worlds(), data=st.data())
def test_every_policy_bears_releases_and_prefetches(name: str, world: World, data: st.DataObject) -> None:
    """Between accesses experts are released and brought in ahead, as an offloading program does; all stays sound."""
    cache, _ = make_any(name, world)
    for now, (layer, experts) in enumerate(world.accesses):
        protected = {layer * EXPERTS + expert for expert in experts}
        for expert in cache.touch(layer, experts, now):
            cache.reserve(layer, expert, now, protected)
        ahead, expert = data.draw(st.integers(0, LAYERS - 1)), data.draw(st.integers(0, EXPERTS - 1))
        if cache.slot_of(ahead, expert) < 0:
            cache.reserve(ahead, expert, now, protected)
        elif data.draw(st.booleans()):
            cache.release(ahead, expert)
        cache.check()


@pytest.mark.parametrize("name", POLICIES.names())
def test_every_policy_bears_bytes(name: str) -> None:
    """Experts of one size in a pool of bytes are experts in slots; of several sizes, the bytes hold."""
    rng = np.random.default_rng(4)
    accesses = [(layer, sorted(rng.choice(EXPERTS, 2, replace=False).tolist())) for _ in range(60) for layer in range(LAYERS)]
    world = World(accesses, [False] * len(accesses), rng.random((len(accesses), EXPERTS)), 2, False)
    cache, stream = make_any(name, world)
    by_bytes = ByteCache(LAYERS, EXPERTS, 15, np.full((LAYERS, EXPERTS), 7), make_policy(name, world.context()))
    assert replay(stream, cache).hits.tolist() == replay(stream, by_bytes).hits.tolist()
    mixed = ByteCache(LAYERS, EXPERTS, 15, rng.integers(1, 9, (LAYERS, EXPERTS)), make_policy(name, world.context()))
    replay(stream, mixed)
    mixed.check()


@pytest.mark.parametrize("name", ["fifo", "lfu-fifo", "lfuda", "arc", "lirs", "s3-fifo", "sieve", "sch-16", "lhu"])
def test_a_cache_of_all_experts_misses_only_what_is_new(name: str) -> None:
    """With a slot per expert every later use hits, and nothing is evicted."""
    rng = np.random.default_rng(8)
    accesses = [(0, sorted(rng.choice(EXPERTS, 2, replace=False).tolist())) for _ in range(50)]
    stream = stream_of(accesses)
    stats = replay(stream, ExpertCache(1, EXPERTS, EXPERTS, make_policy(name, PolicyContext(1, EXPERTS, future=stream))))
    assert (stats.misses.tolist(), stats.evictions.tolist()) == ([EXPERTS], [0])


@settings(max_examples=100, deadline=None)
@given(world=worlds())
def test_arc_keeps_its_directory_bounded(world: World) -> None:
    """|T1| + |B1| <= c, all four lists at most 2 c, and the target within 0 ... c, also under set semantics."""
    cache, stream = make_any("arc", world)
    replay(stream, cache)
    policy = cache.policy
    assert isinstance(policy, ArcPolicy)
    for pool in range(policy.num_pools):
        once, twice = map(len, policy._lists[pool])
        ghosts_once, ghosts_twice = map(len, policy._ghosts[pool])
        assert once + twice <= policy.pool_slots
        assert once + ghosts_once <= policy.pool_slots
        assert once + twice + ghosts_once + ghosts_twice <= 2 * policy.pool_slots
        assert 0 <= policy._target[pool] <= policy.pool_slots


@settings(max_examples=100, deadline=None)
@given(world=worlds())
def test_lirs_and_s3_fifo_hold_exactly_the_residents(world: World) -> None:
    """Every resident is LIR or in Q, in the small or in the main queue, and in one of them."""
    for name in ("lirs", "s3-fifo"):
        cache, stream = make_any(name, world)
        replay(stream, cache)
        residents = sorted(key for pool in cache._residents for key in pool)
        if isinstance(cache.policy, LirsPolicy):
            lir = [key for key, is_lir in enumerate(cache.policy._is_lir) if is_lir]
            assert sorted([*lir, *(key for queue in cache.policy._queue for key in queue)]) == residents
        else:
            assert isinstance(cache.policy, S3FifoPolicy)
            queues = [*cache.policy._small, *cache.policy._main]
            assert sorted(key for queue in queues for key in queue) == residents


def test_ties_of_lfu_by_hand() -> None:
    """0 enters before 1 and is used after it, both twice: `lfu-resident` evicts 1, the second rule 0."""
    keys = [0, 1, 1, 0, 2, 0]  # the last use hits only where 0 stayed
    assert one_by_one(keys, 2, "lfu-resident", 3) == 3
    assert one_by_one(keys, 2, "lfu-fifo", 3) == 2


def test_edgemoe_text_and_print_by_hand() -> None:
    """Layer 1 misses; the text evicts from layer 0, two layers ahead, the print from layer 2, the next one."""
    accesses = [(0, [0]), (2, [0]), (2, [1]), (1, [0])]
    left = {}
    for name in ("edgemoe", "edgemoe-printed"):
        cache = ExpertCache(3, 2, 1, make_policy(name, PolicyContext(3, 2)), shared=True)
        replay(stream_of(accesses), cache)
        left[name] = [cache.residents(layer) for layer in range(3)]
    assert left == {"edgemoe": [[], [0], [0, 1]], "edgemoe-printed": [[0], [0], [1]]}


def test_moe_infinity_replaces_the_most_similar_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two, the third request takes the place of the one it resembles."""
    monkeypatch.setattr(MoeInfinityPolicy, "capacity", 2)
    accesses = [(0, [0]), (0, [1, 2]), (0, [1]), (0, [0])]
    policy = MoeInfinityPolicy(PolicyContext(1, 3, request_starts=np.ones(4, bool)))
    replay(stream_of(accesses), ExpertCache(1, 3, 2, policy))
    assert policy._stored.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_hobbit_forgets_at_a_new_request() -> None:
    """The records of a request end with it: uses of the one before weigh nothing."""
    policy = HobbitPolicy(PolicyContext(1, 3, request_starts=np.array([True, False, True])))
    replay(stream_of([(0, [0]), (0, [0, 1]), (0, [2])]), ExpertCache(1, 3, 3, policy))
    assert (policy._uses, policy._token) == ([0, 0, 1], [1])


def skewed_stream(tokens: int = 300, experts: int = 12, top_k: int = 2, seed: int = 11) -> AccessStream:
    """Return accesses of one layer with locality: scores wander, so that neighbours resemble each other."""
    rng = np.random.default_rng(seed)
    scores = np.cumsum(rng.normal(size=(tokens, experts)), axis=0) * 0.4 + rng.gumbel(size=(tokens, experts))
    return stream_of([(0, sorted(np.argsort(-row)[:top_k].tolist())) for row in scores])


@pytest.mark.parametrize("window", [4, 16, 64])
def test_sch_lies_between_the_blind_and_belady_at_every_size(window: int) -> None:
    """Set semantics, cold misses into free slots as hits, on a stream with locality: SCH(m) <= Belady.

    LRU and LFU <= SCH(m) is no law: a window of 4 falls one hit behind LRU at one size, the longer ones never.
    """
    stream = skewed_stream()
    context = PolicyContext(1, 12, future=stream)
    for slots in range(2, 13):
        hits = {name: int(replay(stream, ExpertCache(1, 12, slots, make_policy(name, context)), count_cold=False).hits.sum())
                for name in ("lru", "lfu", "belady")}
        sch = replay(stream, ExpertCache(1, 12, slots, SegmentCachePolicy(context, window)), count_cold=False)
        assert int(sch.hits.sum()) <= hits["belady"]
        assert window == 4 or max(hits["lru"], hits["lfu"]) <= int(sch.hits.sum())


def test_a_window_without_end_is_not_belady() -> None:
    """Fewest uses is not farthest use: 0 is used once but next, 1 often but late; SCH drops 0 and misses it."""
    stream = stream_of([(0, [key]) for key in (0, 1, 2, 0, 1, 1, 1)])
    context = PolicyContext(1, 3, future=stream)
    sch = replay(stream, ExpertCache(1, 3, 2, SegmentCachePolicy(context, 99)))
    belady = replay(stream, ExpertCache(1, 3, 2, make_policy("belady", context)))
    assert (int(sch.hits.sum()), int(belady.hits.sum())) == (3, 3)
    late = stream_of([(0, [key]) for key in (0, 1, 2, 0, 2, 1, 2, 1)])
    context = PolicyContext(1, 3, future=late)
    sch = replay(late, ExpertCache(1, 3, 2, SegmentCachePolicy(context, 99)))
    belady = replay(late, ExpertCache(1, 3, 2, make_policy("belady", context)))
    assert sch.hits.sum() < belady.hits.sum()


@settings(max_examples=100, deadline=None)
@given(world=worlds(), window=st.integers(1, 20), data=st.data())
def test_the_future_window_counts_what_a_scan_counts(world: World, window: int, data: st.DataObject) -> None:
    """Uses in the next accesses of the layer, from any access on, those before the first among them."""
    now = data.draw(st.integers(-1, len(world.accesses) - 1))
    key = data.draw(st.integers(0, LAYERS * EXPERTS - 1))
    found = FutureWindow(stream_of(world.accesses), LAYERS, EXPERTS, window).count(key, now)
    assert found == future_uses(History(world, True, now), key, window)


def small_trace(weights: bool = True) -> RoutingTrace:
    """Return two interleaved requests of 6 tokens, 2 layers, top-2 of 4 experts."""
    rng = np.random.default_rng(2)
    ids = np.argsort(rng.random((12, 2, 4)), axis=2)[:, :, :2].astype(np.int16)
    gates = np.sort(rng.random((12, 2, 2)).astype(np.float32), axis=2)[:, :, ::-1]
    return RoutingTrace(
        expert_ids=ids, gate_weights=gates if weights else None, request_id=np.tile([0, 1], 6),
        position=np.repeat(np.arange(6), 2), phase=np.ones(12, np.int8), step=np.repeat(np.arange(6), 2), num_experts=4,
        layer_ids=np.arange(2))


def test_segment_cache_hits_add_up_by_request() -> None:
    """The hits of a trace are those that the policy has on its requests, each on an empty cache; all slots make the rate 1."""
    trace = small_trace()
    found = segment_cache_hits(trace, 4, 1.0)
    by_request = np.zeros(2, np.int64)
    for request in (0, 1):
        stream = access_stream(trace, [np.array([row]) for row in np.flatnonzero(trace.request_id == request)])
        policy = SegmentCachePolicy(PolicyContext(2, 4, future=stream), 4)
        by_request += replay(stream, ExpertCache(2, 4, 2, policy), count_cold=False).hits
    assert found.hits.tolist() == by_request.tolist()
    apart = [segment_cache_hits(trace.take(trace.request_id == request), 4, 1.0) for request in (0, 1)]
    assert found.hits.tolist() == (apart[0].hits + apart[1].hits).tolist()
    assert found.accesses.tolist() == [24, 24]
    assert found.hit_rate == pytest.approx(found.layer_hit_rates.mean())
    assert segment_cache_hits(trace, 4, 2.0).hit_rate == 1
    assert segment_cache_hits(trace, 4, 2.0, shared=True).hit_rate == 1
    with pytest.raises(InputError, match="the window must be at least 1 token, got 0"):
        segment_cache_hits(trace, 0, 1.0)
    with pytest.raises(InputError, match=r"rho 0\.1 x top-2 is less than one slot"):
        segment_cache_hits(trace, 4, 0.1)


def test_scores_stand_where_the_accesses_do() -> None:
    """Gate weights of the chosen, 0 for others; the mean and the first of a step's tokens; starts at new requests."""
    trace, steps = small_trace(), [np.array([0, 1]), np.array([2]), np.array([3, 4])]
    scores, stream = router_scores(trace, steps), access_stream(small_trace(), steps)
    for access in range(stream.num_accesses):
        rows, layer = steps[access // 2], access % 2
        expected = np.zeros((len(rows), 4))
        for row, token in zip(expected, rows, strict=True):
            row[trace.expert_ids[token, layer]] = trace.gate_weights[token, layer]  # type: ignore[index]
        np.testing.assert_allclose(scores.mean[access], expected.mean(axis=0))
        np.testing.assert_array_equal(scores.first[access], expected[0])
        assert set(np.flatnonzero(scores.mean[access])) == set(stream.experts_of(access).tolist())
    assert request_starts(trace, steps).tolist() == [True, False, False, False, False, False]
    assert request_starts(trace, [np.array([0]), np.array([1]), np.array([2])]).tolist() == [
        True, False, True, False, False, False]


def test_a_policy_sees_scores_only_at_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """I0 gets neither scores nor request starts, I1 the starts, I2 both."""

    class Spy:
        def __init__(self, context: PolicyContext) -> None:
            self.context = context

    context = PolicyContext(1, 2, request_starts=np.zeros(3, bool), scores=RouterScores(1, np.ones((3, 2)), np.ones((3, 2))))
    for level, expected in (("I0", (False, False)), ("I1", (False, True)), ("I2", (True, True)), ("I4", (True, True))):
        monkeypatch.setattr(Spy, "information", level, raising=False)
        monkeypatch.setitem(POLICIES._entries, "spy", Spy)  # type: ignore[arg-type]
        seen = make_policy("spy", context).context  # type: ignore[attr-defined]
        assert (seen.scores is not None, seen.request_starts is not None) == expected


def test_the_repository_variant_of_mrs_reads_the_first_row() -> None:
    """Where mean and first row disagree, the two variants keep different experts."""
    scores = RouterScores(1, np.tile([0.9, 0.1, 0.0], (3, 1)), np.tile([0.1, 0.9, 0.0], (3, 1)))
    stream = stream_of([(0, [0]), (0, [1]), (0, [2])])
    left = {}
    for name in ("mrs", "mrs-repository"):
        cache = ExpertCache(1, 3, 2, make_policy(name, PolicyContext(1, 3, scores=scores)))
        replay(stream, cache)
        left[name] = cache.residents(0)
    assert left == {"mrs": [0, 2], "mrs-repository": [1, 2]}


@pytest.mark.parametrize(("make", "message"), [
    (lambda: make_policy("sch-16", PolicyContext(1, 4)), "cache policy 'sch' needs the exact future"),
    (lambda: SegmentCachePolicy(PolicyContext(1, 4, future=stream_of([(0, [1])])), 0), "window must be at least 1 token"),
    (lambda: PolicyContext(1, 4, request_starts=np.zeros(3)), r"request_starts must be bool\[access\], got float64\[3\]"),
    (lambda: PolicyContext(1, 4, scores=RouterScores(1, np.ones((2, 3)), np.ones((2, 3)))), "scores are of 3 experts, not 4"),
    (lambda: RouterScores(4, np.ones((2, 3)), np.ones((2, 3))), r"top_k must lie in 1 ... 3, got 4"),
    (lambda: RouterScores(1, np.ones((2, 3)), np.ones((2, 2))), r"mean is \[2, 3\], but first \[2, 2\]"),
    (lambda: RouterScores(1, -np.ones((2, 3)), np.ones((2, 3))), "mean must be .* finite and not negative"),
    (lambda: router_scores(small_trace(weights=False), [np.array([0])]), "the trace has no gate weights"),
    (lambda: router_scores(small_trace(), [np.array([12])]), "steps must name rows 0 ... 11"),
    (lambda: router_scores(small_trace(), [np.array([0])], np.ones((12, 2, 3))), r"must be \[12, 2, 4\], got \[12, 2, 3\]"),
])
def test_bad_input_is_refused(make: Callable[[], object], message: str) -> None:
    """One line that says what was expected."""
    with pytest.raises(InputError, match=message):
        make()


def test_a_run_past_the_future_of_sch_is_an_error() -> None:
    """As for Belady."""
    policy = SegmentCachePolicy(PolicyContext(1, 4, future=stream_of([(0, [1])])))
    with pytest.raises(InputError, match="access 1 lies past the end of the future"):
        replay(stream_of([(0, [1]), (0, [2])]), ExpertCache(1, 4, 2, policy))


def page() -> str:
    """Return docs/policies.md."""
    return (ROOT / "docs/policies.md").read_text()


def test_the_page_lists_every_policy() -> None:
    """A row per registered name: the level that the class declares, and whether a compiled loop runs it."""
    rows = {cells[0].strip(" `"): (cells[1].strip(), cells[-1].strip()) for line in page().splitlines()
            if line.startswith("| `") for cells in [line.strip("|").split("|")]}
    compiled = {name: "yes" if POLICIES[name] in CODES | SCANNED_CODES else "no" for name in POLICIES.names()}
    assert rows == {name: (POLICIES[name].information, compiled[name]) for name in POLICIES.names()}  # type: ignore[attr-defined]


def test_the_example_of_an_own_policy_runs() -> None:
    """The page's example is at most 20 lines, runs as it stands and prints what the page says."""
    code, shown = page().split("```python\n")[1].split("```")[0], page().split("```text\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    printed: list[str] = []
    exec(compile(ast.parse(code), "docs/policies.md", "exec"), {"print": lambda *values: printed.append(" ".join(map(str, values)))})
    assert "\n".join(printed) == shown.strip()


SCANNED = [name for name in POLICIES.names() if POLICIES[name] in SCANNED_CODES]


@pytest.mark.parametrize("name", SCANNED)
@settings(max_examples=60, deadline=None)
@given(world=worlds(), order=st.permutations(range(LAYERS * EXPERTS)), one_at_a_time=st.booleans(), protect=st.booleans(),
       holes=st.sets(st.integers(0, 41)))
def test_the_compiled_loop_counts_what_the_readable_replay_counts(
        name: str, world: World, order: list[int], one_at_a_time: bool, protect: bool, holes: set[int]) -> None:
    """Every count by layer: both semantics, protected or not, pools apart or one, preloaded or not, empty accesses too."""
    accesses = [(layer, [] if index in holes else experts) for index, (layer, experts) in enumerate(world.accesses)]
    stream = stream_of(accesses)
    preload: list[int] = []
    for key in order[: world.slots + 1]:
        if sum(each // EXPERTS == key // EXPERTS for each in preload) < world.slots:
            preload.append(key)
    cache = ExpertCache(LAYERS, EXPERTS, world.slots, make_policy(name, PolicyContext(LAYERS, EXPERTS, future=stream)),
                        shared=world.shared)
    cache.preload(preload)
    stats = replay(stream, cache, semantics="sequential" if one_at_a_time else "set", current_evictable=not protect)
    tally = scanned_tally(stream, POLICIES[name], LAYERS, EXPERTS, world.slots, shared=world.shared, preload=preload,
                          one_by_one=one_at_a_time, protect=protect and not one_at_a_time)
    assert tally[[MISSES, COLD, EVICTIONS, BYPASSES]].tolist() == [
        getattr(stats, count).tolist() for count in ("misses", "cold_misses", "evictions", "bypasses")]


def test_the_loop_leaves_what_it_does_not_know() -> None:
    """Scores, request starts, another future and queues are the readable replay's."""
    stream, other = stream_of([(0, [0])]), stream_of([(0, [1])])
    bare = PolicyContext(1, 3, future=stream)
    starts = PolicyContext(1, 3, request_starts=np.ones(1, bool))
    scored = PolicyContext(1, 3, scores=RouterScores(1, np.ones((1, 3)), np.ones((1, 3))))
    assert all(can_scan(name, bare, stream) for name in SCANNED)
    assert {name for name in SCANNED if not can_scan(name, starts, stream)} == {
        "hobbit", "lhu", "moe-infinity", "sch-4", "sch-16", "sch-64"}
    assert {name for name in SCANNED if not can_scan(name, scored, stream)} == {
        "hobbit", "lhu", "mrs", "mrs-repository", "sch-4", "sch-16", "sch-64"}
    assert not can_scan("sch-16", bare, other)
    assert not any(can_scan(name, bare, stream) for name in QUEUES if name != "lfuda")


def test_golden_hits() -> None:
    """Hits of a seeded stream of 2 layers x 32 experts, top-4, 300 steps, per layer and policy."""
    rng = np.random.default_rng(2026)
    scores = rng.gumbel(size=(600, 32)) - 0.8 * np.log(np.arange(1, 33))
    stream = stream_of([(i % 2, sorted(np.argsort(-row)[:4].tolist())) for i, row in enumerate(scores)])
    context = PolicyContext(2, 32, future=stream)
    names = [*SCANNED, "arc", "lirs", "s3-fifo", "sieve"]
    found = {name: replay(stream, ExpertCache(2, 32, 10, make_policy(name, context))).hits.tolist() for name in names}
    assert found == {
        "fifo": [537, 520],
        "lfu-fifo": [660, 661],
        "lfuda": [658, 645],
        "lhu": [691, 683],
        "fld": [575, 554],
        "hobbit": [689, 677],
        "edgemoe": [691, 683],
        "edgemoe-printed": [691, 683],
        "mrs": [597, 573],
        "mrs-repository": [597, 573],
        "moe-infinity": [691, 683],
        "sch-4": [784, 764],
        "sch-16": [759, 731],
        "sch-64": [723, 719],
        "arc": [598, 568],
        "lirs": [577, 545],
        "s3-fifo": [641, 602],
        "sieve": [650, 617],
    }
