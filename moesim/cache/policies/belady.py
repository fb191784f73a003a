"""Belady: the resident expert whose next use is farthest away leaves. Needs the exact future."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.policies import RankedPolicy
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext

# Worth of "never used again", plus the last use: below minus every position in a stream.
NEVER = -(1 << 62)


class BeladyPolicy(RankedPolicy):
    """Farthest next use leaves first (Belady, IBM Systems Journal 5(2), 1966; information level I4).

    Fewest misses of all policies that must load every missed expert, if the experts of one access fit in its
    slots. Experts that are never used again leave first, the least recently used of them before the others.
    A policy that may leave a missed expert outside can do better: see `BeladyBypassPolicy`.

    Raises:
        InputError: no future was given, it does not fit the model, or `now` lies past its end.
    """

    information: ClassVar[str] = "I4"

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if context.future is None:
            raise InputError(
                "cache policy 'belady' needs the exact future: give PolicyContext(future=access_stream(...)) "
                "of the steps that will run")
        stream = context.future
        self._offsets: list[int] = stream.offsets.tolist()
        self._uses = _positions_by_key(stream.keys(context.num_experts), self.num_keys)

    def worth(self, key: int, now: int) -> int:
        """Return minus the position in the stream of the next use after access `now`; O(log uses)."""
        if now + 1 >= len(self._offsets):
            raise InputError(
                f"cache policy 'belady': access {now} lies past the end of the future it was given "
                f"({len(self._offsets) - 1} accesses); give the stream that is being run")
        uses = self._uses[key]
        index = bisect_left(uses, self._offsets[now + 1])
        return -uses[index] if index < len(uses) else NEVER + now


class BeladyBypassPolicy(BeladyPolicy):
    """Belady that also leaves a missed expert outside if its next use is farther than the victim's (I4).

    The fewest misses of all policies when missed experts may pass through without a slot and the experts of
    the current access may be evicted (``current_evictable=True``).
    """

    def prefers(self, key: int, victim: int, now: int) -> bool:
        """Return whether `key` is used before `victim`."""
        return self.worth(key, now) > self._rank[victim] // self.num_keys


def _positions_by_key(keys: np.ndarray, num_keys: int) -> list[list[int]]:
    """Return, for each key, the rising positions at which `keys` (int64[position]) holds it."""
    order = np.argsort(keys, kind="stable")
    bounds = np.searchsorted(keys[order], np.arange(num_keys + 1)).tolist()
    positions = order.tolist()
    return [positions[start:end] for start, end in pairwise(bounds)]
