"""Static: the most popular experts stay, whatever happens; the others never enter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.policies import BasePolicy
from moesim.errors import CheckError, InputError

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext


class StaticPolicy(BasePolicy):
    """A fixed set: the most popular experts of each layer, or of the whole model when slots are shared (I0).

    The members enter at their first use, or at once with ``cache.preload(popular_keys(...))``. An expert
    outside the set is never admitted, so nothing is ever evicted.

    Raises:
        InputError: no popularity was given.
    """

    information: ClassVar[str] = "I0"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if context.popularity is None:
            raise InputError(
                "cache policy 'static' needs popularity: give PolicyContext(popularity=...), float64[layer, "
                "expert] counted on a training part of the trace")
        self._popularity = context.popularity
        self._members: frozenset[int] = frozenset()

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Fix the set for this capacity."""
        super().attach(slots_per_layer, shared)
        self._members = frozenset(popular_keys(self._popularity, slots_per_layer, shared=shared))

    def attach_bytes(self, bytes_per_layer: int, expert_bytes: np.ndarray, shared: bool) -> None:
        """Fix the set for a capacity in bytes: see `popular_keys_in_bytes`."""
        super().attach_bytes(bytes_per_layer, expert_bytes, shared)
        self._members = frozenset(popular_keys_in_bytes(
            self._popularity, bytes_per_layer, expert_bytes, shared=shared))

    def admits(self, key: int, now: int) -> bool:
        """Return whether `key` belongs to the fixed set."""
        return key in self._members

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Never asked: the set has no more members than the cache has slots."""
        raise CheckError("cache policy 'static' was asked for a victim, but its content is fixed")


def popular_keys(popularity: np.ndarray, slots_per_layer: int, *, shared: bool = False) -> list[int]:
    """Return the keys that fill the slots with the most popular experts, the most popular first.

    `popularity` is float64[layer, expert]; ties go to the lower key. With `shared`, the best
    ``slots_per_layer * num_layers`` of all layers; else the best `slots_per_layer` of each.
    """
    num_layers, num_experts = popularity.shape
    ranked = np.argsort(-popularity, axis=None, kind="stable")
    if shared:
        return ranked[: slots_per_layer * num_layers].tolist()
    best = np.argsort(-popularity, axis=1, kind="stable")[:, :slots_per_layer]
    chosen = set((best + np.arange(num_layers)[:, None] * num_experts).ravel().tolist())
    return [key for key in ranked.tolist() if key in chosen]


def popular_keys_in_bytes(popularity: np.ndarray, bytes_per_layer: int, expert_bytes: np.ndarray, *,
                          shared: bool = False) -> list[int]:
    """Return the keys of the most popular experts that fit together, the most popular first.

    Each expert, from the most popular on, joins if the bytes that are left (of its layer, or with `shared` of
    all) hold it; a large one may be left out and a smaller, less popular one join. Ties go to the lower key.
    """
    num_layers, num_experts = popularity.shape
    left = [bytes_per_layer * num_layers] if shared else [bytes_per_layer] * num_layers
    needed = expert_bytes.ravel().tolist()
    chosen = []
    for key in np.argsort(-popularity, axis=None, kind="stable").tolist():
        pool = 0 if shared else key // num_experts
        if needed[key] <= left[pool]:
            left[pool] -= needed[key]
            chosen.append(key)
    return chosen
