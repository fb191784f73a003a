"""ExpertCache: slots, reservations, release and preload."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moesim.cache.cache import ExpertCache, Reservation
from moesim.cache.policies.lru import LruPolicy
from moesim.cache.policies.static import popular_keys
from moesim.cache.policy import PolicyContext, make_policy
from moesim.errors import CheckError, InputError

LAYERS, EXPERTS = 2, 4


def lru_cache(slots: int, *, shared: bool = False) -> ExpertCache:
    """Return an empty LRU cache of 2 layers x 4 experts."""
    return ExpertCache(LAYERS, EXPERTS, slots, LruPolicy(PolicyContext(LAYERS, EXPERTS)), shared=shared)


def test_free_slots_go_lowest_first_within_the_layer() -> None:
    """An expert takes the lowest free slot of its layer's pool, and a released slot is used again."""
    cache = lru_cache(3)
    assert [cache.reserve(1, expert, 0) for expert in (2, 0, 3)] == [
        Reservation(3, -1), Reservation(4, -1), Reservation(5, -1)]
    cache.release(1, 3)
    cache.release(1, 2)
    assert cache.reserve(1, 1, 0) == Reservation(3, -1)
    assert (cache.residents(1), cache.residents(0), cache.num_free(1), cache.num_slots) == ([0, 1], [], 1, 6)


def test_a_full_pool_evicts_the_policys_victim_into_its_slot() -> None:
    """The newcomer gets the slot of the least recently used resident, which is then absent."""
    cache = lru_cache(2)
    cache.reserve(0, 0, 0)
    cache.reserve(0, 1, 1)
    cache.touch(0, [0], 2)
    assert cache.reserve(0, 3, 3) == Reservation(slot=1, victim_key=1)
    assert (cache.slot_of(0, 1), cache.slot_of(0, 3)) == (-1, 1)


def test_layers_compete_only_for_shared_slots() -> None:
    """A full layer takes another layer's slot when slots are shared, never otherwise."""
    for shared, victim in ((False, 1 * EXPERTS + 0), (True, 0)):
        cache = lru_cache(1, shared=shared)
        cache.reserve(0, 0, 0)
        cache.reserve(1, 0, 1)
        reservation = cache.reserve(1, 1, 2)
        assert reservation is not None
        assert reservation.victim_key == victim


def test_protected_experts_stay() -> None:
    """The least recent resident is passed over while protected; with all protected there is no reservation."""
    cache = lru_cache(2)
    cache.reserve(0, 0, 0)
    cache.reserve(0, 1, 1)
    assert cache.reserve(0, 2, 2, protected=[0, 1]) is None
    assert cache.slot_of(0, 2) == -1
    reservation = cache.reserve(0, 2, 2, protected=[0])
    assert reservation == Reservation(1, 1)
    assert cache.reserve(0, 3, 3, protected={2}) == Reservation(0, 0)


def test_looking_is_not_touching() -> None:
    """slot_of and residents leave the order of eviction as it was."""
    cache = lru_cache(2)
    cache.reserve(0, 0, 0)
    cache.reserve(0, 1, 1)
    cache.slot_of(0, 0)
    cache.residents(0)
    reservation = cache.reserve(0, 2, 2)
    assert reservation is not None
    assert reservation.victim_key == 0


def test_touch_returns_the_missed_experts() -> None:
    """Touching makes nothing resident; the absent experts come back in the order given."""
    cache = lru_cache(2)
    cache.reserve(1, 0, 0)
    assert cache.touch(1, [3, 0, 2], 1) == [3, 2]
    assert cache.residents(1) == [0]


def test_numpy_ids_do_not_overflow() -> None:
    """int16 experts of a large model are found under keys that int16 cannot hold."""
    context = PolicyContext(200, 256)
    cache = ExpertCache(200, 256, 1, LruPolicy(context))
    cache.reserve(np.int16(199), np.int16(255), 0)
    cache.touch(199, np.array([255], dtype=np.int16), 1)
    assert (cache.key_of(199, 255), cache.slot_of(199, 255)) == (51_199, 199)


def test_preload_fills_slots_before_the_run() -> None:
    """Preloaded experts are resident, count as older than any access, and leave lowest key first."""
    cache = lru_cache(2)
    cache.preload([3, 1, EXPERTS + 2])
    assert (cache.slot_of(0, 3), cache.slot_of(0, 1), cache.residents(1)) == (0, 1, [2])
    reservation = cache.reserve(0, 0, 0)
    assert reservation is not None
    assert reservation.victim_key == 1


def test_static_cache_keeps_the_popular_and_refuses_the_rest() -> None:
    """Only the most popular experts enter a static cache, and none of them ever leaves."""
    popularity = np.array([[1.0, 5, 2, 9], [4, 4, 0, 4]])
    cache = ExpertCache(2, 4, 2, make_policy("static", PolicyContext(2, 4, popularity=popularity)))
    for now, expert in enumerate((0, 1, 2, 3, 0, 2)):
        cache.touch(0, [expert], now)
        if cache.slot_of(0, expert) < 0:
            cache.reserve(0, expert, now)
    assert cache.residents(0) == [1, 3]
    assert cache.reserve(1, 3, 9) is None  # a tie goes to the lower id
    with pytest.raises(CheckError, match="asked for a victim"):
        cache.policy.victim([1, 3], 9)


def test_popular_keys_per_layer_and_shared() -> None:
    """Per layer the best of each layer are chosen, shared the best of all; the most popular comes first."""
    popularity = np.array([[1.0, 5, 2, 9], [4, 3, 0, 4]])
    assert popular_keys(popularity, 2) == [3, 1, 4, 7]
    assert popular_keys(popularity, 1, shared=True) == [3, 1]
    assert popular_keys(popularity, 9) == [3, 1, 4, 7, 5, 2, 0, 6]


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 4, 1), "needs layers and experts, got 0 x 4"),
    ((2, 4, 0), "slots_per_layer must be at least 1, got 0"),
    ((2, 4, -3), "slots_per_layer must be at least 1, got -3"),
])
def test_a_cache_needs_slots(arguments: tuple[int, int, int], message: str) -> None:
    """A capacity of nothing is refused (libcachesim accepts it)."""
    with pytest.raises(InputError, match=message):
        ExpertCache(*arguments, LruPolicy(PolicyContext(2, 4)))


@pytest.mark.parametrize(("layer", "expert"), [(2, 0), (-1, 0), (0, 4), (0, -1)])
def test_experts_outside_the_model_are_refused(layer: int, expert: int) -> None:
    """Negative ids do not wrap around, and too large ones do not reach another layer."""
    cache = lru_cache(2)
    message = f"no expert {expert} in layer {layer}: there are 2 layers x 4 experts"
    for call in (cache.slot_of, cache.release, lambda *at: cache.reserve(*at, 0), lambda a, b: cache.touch(a, [b], 0)):
        with pytest.raises(InputError, match=message):
            call(layer, expert)


def test_a_slot_has_one_owner() -> None:
    """Reserving a resident, or releasing an absent expert, breaks a rule and is refused."""
    cache = lru_cache(2)
    cache.reserve(1, 2, 0)
    with pytest.raises(CheckError, match="layer 1, expert 2 already owns slot 2"):
        cache.reserve(1, 2, 1)
    with pytest.raises(CheckError, match="cannot release layer 0, expert 2"):
        cache.release(0, 2)


def test_check_finds_a_slot_with_two_owners() -> None:
    """The invariant check notices corrupted bookkeeping."""
    cache = lru_cache(2)
    cache.reserve(0, 0, 0)
    cache._slot[1] = cache._slot[0]
    with pytest.raises(CheckError, match="2 owned and 3 free slots are not the 4"):
        cache.check()
    cache._slot[1], cache._residents[0] = -1, {1: None}
    with pytest.raises(CheckError, match="do not list the experts"):
        cache.check()


def test_time_and_policies_are_used_once() -> None:
    """A second run on a used cache, and a policy in two caches, are errors and not wrong hit rates."""
    cache = lru_cache(2)
    cache.touch(0, [1], 5)
    with pytest.raises(InputError, match="access index fell from 5 to 4; use a new cache"):
        cache.touch(0, [1], 4)
    with pytest.raises(InputError, match="preload comes before the first access"):
        cache.preload([0])
    with pytest.raises(InputError, match="LruPolicy serves one cache"):
        ExpertCache(LAYERS, EXPERTS, 1, cache.policy)


@pytest.mark.parametrize(("keys", "message"), [
    ([1, 1], "layer 0, expert 1 twice"),
    ([0, 1, 2], r"more experts than slots at layer 0, expert 2 \(2 slots per layer, not shared\)"),
    ([8], "no expert 0 in layer 2"),
    ([-1], "no expert 3 in layer -1"),
])
def test_bad_preloads_are_refused(keys: list[int], message: str) -> None:
    """A preload must fit and name experts of the model once."""
    with pytest.raises(InputError, match=message):
        lru_cache(2).preload(keys)


def test_preload_respects_admission() -> None:
    """An expert outside the static set cannot be preloaded into it."""
    policy = make_policy("static", PolicyContext(1, 3, popularity=np.array([[3.0, 2, 1]])))
    with pytest.raises(InputError, match="does not admit layer 0, expert 2"):
        ExpertCache(1, 3, 1, policy).preload([2])


def test_a_policy_that_evicts_a_stranger_is_caught() -> None:
    """A plug-in that names a key which is not among the candidates cannot corrupt the cache."""
    cache = lru_cache(1)
    cache.reserve(0, 0, 0)
    cache.policy.victim = lambda candidates, now: 5  # type: ignore[method-assign]
    with pytest.raises(CheckError, match="evicts key 5, which is not among its candidates"):
        cache.reserve(0, 1, 1)


class CacheMachine(RuleBasedStateMachine):
    """Random reserves, touches and releases against a plain dict of key -> slot."""

    @initialize(name=st.sampled_from(["lru", "lfu", "lfu-resident"]), slots=st.integers(1, 5), shared=st.booleans())
    def start(self, name: str, slots: int, shared: bool) -> None:
        """Make an empty cache."""
        policy = make_policy(name, PolicyContext(LAYERS, EXPERTS))
        self.cache = ExpertCache(LAYERS, EXPERTS, slots, policy, shared=shared)
        self.slots: dict[int, int] = {}
        self.now = 0

    @rule(key=st.integers(0, LAYERS * EXPERTS - 1), protected=st.sets(st.integers(0, LAYERS * EXPERTS - 1)))
    def reserve(self, key: int, protected: set[int]) -> None:
        """A reservation takes a free slot or that of an unprotected resident of the same pool."""
        layer, expert = divmod(key, EXPERTS)
        if key in self.slots:
            return
        free = self.cache.num_free(layer)
        pool = [k for k in self.slots if self.cache.shared or k // EXPERTS == layer]
        self.now += 1
        reservation = self.cache.reserve(layer, expert, self.now, protected)
        if reservation is None:
            assert free == 0
            assert set(pool) <= protected
            return
        assert (reservation.victim_key == -1) == (free > 0)
        if reservation.victim_key >= 0:
            assert reservation.victim_key in set(pool) - protected
            assert self.slots.pop(reservation.victim_key) == reservation.slot
        self.slots[key] = reservation.slot

    @rule(key=st.integers(0, LAYERS * EXPERTS - 1))
    def touch(self, key: int) -> None:
        """A touch changes no residency."""
        self.now += 1
        self.cache.touch(key // EXPERTS, [key % EXPERTS], self.now)

    @precondition(lambda self: self.slots)
    @rule(pick=st.integers(0, 100))
    def release(self, pick: int) -> None:
        """A release frees the expert's slot."""
        key = sorted(self.slots)[pick % len(self.slots)]
        self.cache.release(*divmod(key, EXPERTS))
        del self.slots[key]

    @invariant()
    def agrees(self) -> None:
        """The cache says of every expert what the dict says, and its bookkeeping is whole."""
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        found = {key: self.cache.slot_of(*divmod(key, EXPERTS)) for key in range(LAYERS * EXPERTS)}
        assert {key: slot for key, slot in found.items() if slot >= 0} == self.slots


CacheMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestCacheMachine = CacheMachine.TestCase
