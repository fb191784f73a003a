"""LayeredCache: an expert cache whose layers have pools of different sizes (AdapMoE's and ExpertFlow's allocations)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.policy import EvictionPolicy
from moesim.errors import InputError


class LayeredPolicy:
    """One policy per layer, each with the capacity of its own layer; it sees the accesses of that layer only."""

    information: ClassVar[str] = "I0"
    source: ClassVar[str] = "the policies of its layers"

    def __init__(self, policies: Sequence[EvictionPolicy], num_experts: int, slots: Sequence[int]) -> None:
        self._policies, self._num_experts, self._slots = list(policies), num_experts, list(slots)

    def _of(self, key: int) -> EvictionPolicy:
        return self._policies[key // self._num_experts]

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Give every policy its layer's capacity."""
        del slots_per_layer, shared
        for policy, slots in zip(self._policies, self._slots, strict=True):
            policy.attach(slots, False)

    def admits(self, key: int, now: int) -> bool:
        """Ask the layer's policy."""
        return self._of(key).admits(key, now)

    def prefers(self, key: int, victim: int, now: int) -> bool:
        """Ask the layer's policy."""
        return self._of(key).prefers(key, victim, now)

    def touch(self, key: int, now: int) -> None:
        """Tell the layer's policy."""
        self._of(key).touch(key, now)

    def insert(self, key: int, now: int) -> None:
        """Tell the layer's policy."""
        self._of(key).insert(key, now)

    def evict(self, key: int) -> None:
        """Tell the layer's policy."""
        self._of(key).evict(key)

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Ask the policy of the candidates' layer."""
        return self._of(next(iter(candidates))).victim(candidates, now)


class LayeredCache(ExpertCache):
    """An `ExpertCache` with `slots[layer]` slots in the pool of each layer.

    Args:
        num_experts: of each layer. slots: int[layer], at least 1 each.
        policies: one new policy per layer.

    Raises:
        InputError: no layer, slots below one, or another number of policies than layers.
    """

    def __init__(self, num_experts: int, slots: Sequence[int] | np.ndarray, policies: Sequence[EvictionPolicy]) -> None:
        self.slots = tuple(int(count) for count in slots)
        if not self.slots or min(self.slots) < 1:
            raise InputError(f"cache: every layer needs at least one slot, got {list(self.slots)}")
        if len(policies) != len(self.slots):
            raise InputError(f"cache: {len(self.slots)} layers need a policy each, got {len(policies)}")
        super().__init__(len(self.slots), num_experts, max(self.slots), LayeredPolicy(policies, num_experts, self.slots))

    def _pools(self) -> list[list[int]]:
        starts = np.concatenate([[0], np.cumsum(self.slots)]).tolist()
        return [list(range(first, last)) for first, last in itertools.pairwise(starts)]

