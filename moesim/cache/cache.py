"""ExpertCache: which experts are resident, in which slot; the bookkeeping that every policy shares."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import index
from typing import NamedTuple

from moesim.cache.policy import EvictionPolicy
from moesim.errors import CheckError, InputError

ABSENT = -1
BEFORE_THE_RUN = -1


class Reservation(NamedTuple):
    """The slot given to an expert, and the key that had to leave for it (-1: none).

    `other_victim_keys`: those that left after it, where experts differ in size (`ByteCache`).
    """

    slot: int
    victim_key: int
    other_victim_keys: tuple[int, ...] = ()

    @property
    def num_victims(self) -> int:
        """Number of experts that had to leave."""
        return (self.victim_key != ABSENT) + len(self.other_victim_keys)


class Candidates(Sequence[int]):
    """The residents of a pool that are not protected, in order of entry; a view, so asking `in` is O(1)."""

    def __init__(self, residents: dict[int, None], protected: Collection[int]) -> None:
        self._residents, self._protected = residents, protected

    def __contains__(self, key: object) -> bool:
        return key in self._residents and key not in self._protected

    def __iter__(self) -> Iterator[int]:
        return (key for key in self._residents if key not in self._protected)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, position: int) -> int:  # type: ignore[override]
        return list(self)[position]


class ExpertCache:
    """Slots that hold experts, in one pool per layer or (`shared`) in one pool for all layers.

    A key is ``layer * num_experts + expert``; slots are numbered through all pools, layer after layer. `now`
    is the index of the access in progress and never falls. One access goes: `touch` all its experts (once, hits
    and misses alike; it returns the missed ones), then `reserve` the missed ones with the access's keys
    protected. A prefetch is a `reserve` without a `touch`, at the `now` of the access in progress.

    Args:
        num_layers, num_experts: the MoE layers, and the experts of each.
        slots_per_layer: slots of one layer; `shared` pools ``slots_per_layer * num_layers``.
        policy: chooses whom to evict; it serves this cache only.

    Raises:
        InputError: sizes below one, an expert outside the model, a `now` that falls, a policy used before.
        CheckError: a rule is broken, e.g. reserving an expert that is resident.
    """

    def __init__(self, num_layers: int, num_experts: int, slots_per_layer: int, policy: EvictionPolicy, *,
                 shared: bool = False) -> None:
        if num_layers < 1 or num_experts < 1:
            raise InputError(f"cache: needs layers and experts, got {num_layers} x {num_experts}")
        if slots_per_layer < 1:
            raise InputError(f"cache: slots_per_layer must be at least 1, got {slots_per_layer}")
        self.num_layers, self.num_experts, self.slots_per_layer = num_layers, num_experts, slots_per_layer
        self.shared, self.policy = shared, policy
        self._slot = [ABSENT] * (num_layers * num_experts)
        self._free = self._pools()
        self.num_slots = sum(map(len, self._free))
        # Residents of each pool in order of entry; a dict, so that leaving is O(1) and order is kept.
        self._residents: list[dict[int, None]] = [{} for _ in self._free]
        self._now = BEFORE_THE_RUN
        self._attach_policy()

    def key_of(self, layer: int, expert: int) -> int:
        """Return the expert's key; raises InputError outside the model."""
        layer, expert = index(layer), index(expert)
        if not (0 <= layer < self.num_layers and 0 <= expert < self.num_experts):
            raise InputError(
                f"cache: no expert {expert} in layer {layer}: there are {self.num_layers} layers x "
                f"{self.num_experts} experts")
        return layer * self.num_experts + expert

    def keys_of(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Return the keys of experts of one layer, in the order given."""
        first = self.key_of(layer, 0)
        keys = [first + index(expert) for expert in experts]
        if keys and (min(keys) < first or max(keys) >= first + self.num_experts):
            outside = next(key - first for key in keys if not 0 <= key - first < self.num_experts)
            self.key_of(layer, outside)
        return keys

    def slot_of(self, layer: int, expert: int) -> int:
        """Return the expert's slot, 0 ... num_slots - 1, or -1 if absent. Looking is not touching."""
        return self._slot[self.key_of(layer, expert)]

    def residents(self, layer: int) -> list[int]:
        """Return the resident experts of `layer`, rising."""
        first = self.key_of(layer, 0)
        slots = self._slot[first: first + self.num_experts]
        return [expert for expert, slot in enumerate(slots) if slot != ABSENT]

    def num_free(self, layer: int) -> int:
        """Return the free slots that an expert of `layer` could take."""
        self.key_of(layer, 0)
        return len(self._free[0 if self.shared else layer])

    def touch(self, layer: int, experts: Iterable[int], now: int) -> list[int]:
        """Tell the policy that access `now` uses these distinct experts of `layer`, resident or not.

        Returns the absent ones, in the order given.
        """
        self._advance(now)
        keys, note_use, slot = self.keys_of(layer, experts), self.policy.touch, self._slot
        for key in keys:
            note_use(key, now)
        return [key % self.num_experts for key in keys if slot[key] == ABSENT]

    def reserve(self, layer: int, expert: int, now: int,
                protected: Collection[int] = ()) -> Reservation | None:
        """Make an absent expert resident: in the lowest free slot, or in that of a victim.

        `protected` holds keys that may not leave. None if the policy does not admit the expert, or every
        resident of the pool is protected, or the policy would rather keep the victim: the expert then
        passes through without a slot.
        """
        key = self._absent_key(layer, expert)
        self._advance(now)
        if not self.policy.admits(key, now):
            return None
        pool = 0 if self.shared else layer
        if self._free[pool]:
            return self._enter(key, heapq.heappop(self._free[pool]), ABSENT, pool, now)
        victim = self._choose_victim(key, pool, now, protected)
        if victim is None:
            return None
        return self._enter(key, self._leave(victim, pool), victim, pool, now)

    def release(self, layer: int, expert: int) -> None:
        """Drop a resident expert (such as a cancelled prefetch) and free its slot."""
        key = self.key_of(layer, expert)
        if self._slot[key] == ABSENT:
            raise CheckError(f"cache: cannot release layer {layer}, expert {expert}: it is not resident")
        pool = 0 if self.shared else layer
        heapq.heappush(self._free[pool], self._leave(key, pool))

    def preload(self, keys: Sequence[int]) -> None:
        """Fill free slots before the run, in the order given.

        Raises:
            InputError: after the run began, a key outside the model or twice, more keys than slots, or a key
                that the policy does not admit.
        """
        if self._now != BEFORE_THE_RUN:
            raise InputError("cache: preload comes before the first access")
        for key in keys:
            layer, expert = divmod(index(key), self.num_experts)
            if self.slot_of(layer, expert) != ABSENT:
                raise InputError(f"cache: preload names layer {layer}, expert {expert} twice")
            self._check_room(layer, expert)
            if self.reserve(layer, expert, BEFORE_THE_RUN) is None:
                raise InputError(f"cache: the policy does not admit layer {layer}, expert {expert}")

    def check(self) -> None:
        """Raise CheckError unless every slot has one owner and is free exactly when it has none."""
        owned = sorted(slot for slot in self._slot if slot != ABSENT)
        free = sorted(slot for pool in self._free for slot in pool)
        if sorted(owned + free) != list(range(self.num_slots)):
            raise CheckError(
                f"cache: {len(owned)} owned and {len(free)} free slots are not the {self.num_slots} slots")
        listed = sorted(key for pool in self._residents for key in pool)
        if listed != [key for key, slot in enumerate(self._slot) if slot != ABSENT]:
            raise CheckError("cache: the pools do not list the experts that own slots")

    def _pools(self) -> list[list[int]]:
        """Return the slots of each pool."""
        num_slots = self.slots_per_layer * self.num_layers
        pool_slots = num_slots if self.shared else self.slots_per_layer
        return [list(range(start, start + pool_slots)) for start in range(0, num_slots, pool_slots)]

    def _attach_policy(self) -> None:
        self.policy.attach(self.slots_per_layer, self.shared)

    def _absent_key(self, layer: int, expert: int) -> int:
        key = self.key_of(layer, expert)
        if self._slot[key] != ABSENT:
            raise CheckError(f"cache: layer {layer}, expert {expert} already owns slot {self._slot[key]}")
        return key

    def _check_room(self, layer: int, expert: int) -> None:
        if not self.num_free(layer):
            raise InputError(
                f"cache: preload has more experts than slots at layer {layer}, expert {expert} "
                f"({self.slots_per_layer} slots per layer, {'shared' if self.shared else 'not shared'})")

    def _advance(self, now: int) -> None:
        if now < self._now:
            raise InputError(
                f"cache: the access index fell from {self._now} to {now}; use a new cache for each run")
        self._now = now

    def _choose_victim(self, key: int, pool: int, now: int, protected: Collection[int]) -> int | None:
        residents = self._residents[pool]
        if len(residents) <= len(protected) and all(resident in protected for resident in residents):
            return None
        candidates = Candidates(residents, protected)
        victim = self.policy.victim(candidates, now)
        if victim not in candidates:
            raise CheckError(f"cache: the policy evicts key {victim}, which is not among its candidates")
        return victim if self.policy.prefers(key, victim, now) else None

    def _enter(self, key: int, slot: int, victim: int, pool: int, now: int) -> Reservation:
        self._slot[key] = slot
        self._residents[pool][key] = None
        self.policy.insert(key, now)
        return Reservation(slot, victim)

    def _leave(self, key: int, pool: int) -> int:
        slot, self._slot[key] = self._slot[key], ABSENT
        del self._residents[pool][key]
        self.policy.evict(key)
        return slot
