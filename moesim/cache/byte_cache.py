"""ByteCache: an expert cache whose capacity is in bytes, for experts of different sizes (mixed precision)."""

from __future__ import annotations

import heapq
from collections.abc import Collection

import numpy as np

from moesim.cache.cache import ABSENT, ExpertCache, Reservation
from moesim.cache.policies import BasePolicy
from moesim.cache.policy import EvictionPolicy
from moesim.cache.sizes import checked_expert_bytes, most_residents_per_layer
from moesim.errors import CheckError, InputError


class ByteCache(ExpertCache):
    """An `ExpertCache` whose pools hold bytes instead of slots.

    A missed expert takes free bytes. If they are too few, the policy names victims, one after the other, until it would fit;
    only then do they leave, all at once. If it is larger than its pool, if the experts that may leave are too
    small in all, or if the policy would rather keep one of those it named, then nobody leaves and the expert
    passes through (a bypass). So a policy is asked for victims that may stay; it learns who left by `evict`. With
    experts of one size and a pool of whole experts, this is `ExpertCache`.

    Belady's rule ignores sizes here and is no optimum: with sizes, finding it is NP-hard (Chrobak et al., "Caching
    Is Hard, Even in the Fault Model", Algorithmica 63, 2012).

    A slot here is only a number: the lowest one that no resident has.

    Args:
        num_layers, num_experts: the MoE layers, and the experts of each.
        bytes_per_layer: room of one layer; `shared` pools ``bytes_per_layer * num_layers``.
        expert_bytes: int64[layer, expert], at least 1 each.
        policy: chooses whom to evict; it serves this cache only.

    Raises:
        InputError: as `ExpertCache`, and for sizes that are no positive integers of this shape.
    """

    def __init__(self, num_layers: int, num_experts: int, bytes_per_layer: int, expert_bytes: np.ndarray,
                 policy: EvictionPolicy, *, shared: bool = False) -> None:
        if bytes_per_layer < 1:
            raise InputError(f"cache: bytes_per_layer must be at least 1, got {bytes_per_layer}")
        if num_layers < 1 or num_experts < 1:
            raise InputError(f"cache: needs layers and experts, got {num_layers} x {num_experts}")
        self.bytes_per_layer = bytes_per_layer
        self.expert_bytes = checked_expert_bytes(expert_bytes, num_layers, num_experts)
        self._bytes: list[int] = self.expert_bytes.ravel().tolist()
        self._pool_bytes = bytes_per_layer * (num_layers if shared else 1)
        self._free_bytes = [self._pool_bytes] * (1 if shared else num_layers)
        super().__init__(num_layers, num_experts,
                         most_residents_per_layer(self.expert_bytes, bytes_per_layer, shared=shared), policy,
                         shared=shared)

    def num_free_bytes(self, layer: int) -> int:
        """Return the free bytes of the pool of `layer`."""
        self.key_of(layer, 0)
        return self._free_bytes[0 if self.shared else layer]

    def reserve(self, layer: int, expert: int, now: int,
                protected: Collection[int] = ()) -> Reservation | None:
        """Make an absent expert resident, in place of as many others as its size needs; None: it passes through."""
        key = self._absent_key(layer, expert)
        self._advance(now)
        if not self.policy.admits(key, now):
            return None
        pool = 0 if self.shared else layer
        victims = self._choose_victims(key, pool, now, protected)
        if victims is None:
            return None
        for victim in victims:
            heapq.heappush(self._free[pool], self._leave(victim, pool))
        slot = heapq.heappop(self._free[pool])
        return self._enter(key, slot, victims[0] if victims else ABSENT, pool, now)._replace(
            other_victim_keys=tuple(victims[1:]))

    def check(self) -> None:
        """Raise CheckError unless the slots are sound and the free bytes are those that no resident takes."""
        super().check()
        for pool, residents in enumerate(self._residents):
            used = sum(self._bytes[key] for key in residents)
            if self._free_bytes[pool] != self._pool_bytes - used or self._free_bytes[pool] < 0:
                raise CheckError(f"cache: pool {pool} of {self._pool_bytes} bytes holds {used} and says that "
                                 f"{self._free_bytes[pool]} are free")

    def _choose_victims(self, key: int, pool: int, now: int, protected: Collection[int]) -> list[int] | None:
        """Return the experts that must leave for `key`, or None if it cannot or should not enter."""
        victims: list[int] = []
        short = self._bytes[key] - self._free_bytes[pool]
        if self._bytes[key] > self._pool_bytes:
            return None
        staying = set(protected) & self._residents[pool].keys()
        while short > 0:
            victim = self._choose_victim(key, pool, now, staying)
            if victim is None:
                return None
            victims.append(victim)
            staying.add(victim)
            short -= self._bytes[victim]
        return victims

    def _attach_policy(self) -> None:
        if isinstance(self.policy, BasePolicy):
            self.policy.attach_bytes(self.bytes_per_layer, self.expert_bytes, self.shared)
        else:
            super()._attach_policy()

    def _check_room(self, layer: int, expert: int) -> None:
        needed, free = self._bytes[self.key_of(layer, expert)], self.num_free_bytes(layer)
        if needed > free:
            raise InputError(f"cache: preload has more bytes than fit at layer {layer}, expert {expert}: it needs "
                             f"{needed}, and {free} of the pool's {self._pool_bytes} are free")

    def _enter(self, key: int, slot: int, victim: int, pool: int, now: int) -> Reservation:
        self._free_bytes[pool] -= self._bytes[key]
        return super()._enter(key, slot, victim, pool, now)

    def _leave(self, key: int, pool: int) -> int:
        self._free_bytes[pool] += self._bytes[key]
        return super()._leave(key, pool)
