"""The parts that policies share whose order of eviction may change without a use: a scan over the candidates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesim.cache.policies import BasePolicy

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext

NEVER_USED = -1


class ScannedPolicy(BasePolicy):
    """Evicts the candidate of the lowest `score`; O(candidates) per eviction.

    Where `RankedPolicy` wants a worth that stands until the next use, a score here may depend on the layer in
    progress, the tokens so far or the router's scores. Ties: the least recently used (or inserted) leaves, then the
    lower key. A child fills `score` and, as it needs, the hooks `request_started`, `access_started` and `used`.

    Attributes:
        layer: the layer of the access in progress.
        last_use: for each key, the access of its last use or entry; -1 before.
    """

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.layer = 0
        self._access = NEVER_USED
        self.last_use = [NEVER_USED] * self.num_keys
        self._starts: list[bool] = [] if context.request_starts is None else context.request_starts.tolist()

    @abstractmethod
    def score(self, key: int, now: int) -> float:
        """Return what the resident `key` is worth keeping during access `now`."""

    def request_started(self) -> None:
        """Note that a new request begins (known only if the context says where: ``request_starts``)."""

    def access_started(self, layer: int, now: int) -> None:
        """Note that access `now`, of `layer`, begins; comes before `used`."""

    def used(self, key: int, now: int) -> None:
        """Note that access `now` uses `key`, resident or not."""

    def touch(self, key: int, now: int) -> None:
        """Begin the access if `key` is its first expert, and note the use."""
        if now != self._access:
            self._begin(key // self.num_experts, now)
        self.last_use[key] = now
        self.used(key, now)

    def insert(self, key: int, now: int) -> None:
        """Count the entry as a use in the order of ties, so that a prefetched expert is not the first to go."""
        self.last_use[key] = now

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Return the candidate of the lowest score."""
        return min(candidates, key=lambda key: (self.score(key, now), self.last_use[key], key))

    def _begin(self, layer: int, now: int) -> None:
        if any(self._starts[self._access + 1: now + 1]):
            self.request_started()
        self.layer, self._access = layer, now
        self.access_started(layer, now)
