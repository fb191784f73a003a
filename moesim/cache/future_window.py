"""How often each expert is used in the next accesses of its layer: what a segment cache knows."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.cache.policy import AccessStream


class FutureWindow:
    """Counts of uses in the next `window` accesses of a layer; with one token per access those are the next tokens.

    Args:
        stream: the accesses that will be run.
        num_layers, num_experts: of the model.
        window: accesses of the expert's own layer that are looked at, after the one in progress.

    Raises:
        InputError: a window below one.
    """

    def __init__(self, stream: AccessStream, num_layers: int, num_experts: int, window: int) -> None:
        if window < 1:
            raise InputError(f"segment cache: the window must be at least 1 token, got {window}")
        self.window, self.num_experts, self.num_accesses = window, num_experts, stream.num_accesses
        self._accesses = [np.flatnonzero(stream.layers == layer).tolist() for layer in range(num_layers)]
        keys = stream.keys(num_experts)
        order = np.argsort(keys, kind="stable")
        access = np.repeat(np.arange(stream.num_accesses), np.diff(stream.offsets))[order]
        bounds = np.searchsorted(keys[order], np.arange(num_layers * num_experts + 1))
        self._uses = [access[start:end].tolist() for start, end in itertools.pairwise(bounds)]

    def count(self, key: int, now: int) -> int:
        """Return the uses of `key` in the next `window` accesses of its layer after access `now`; O(log accesses)."""
        accesses, uses = self._accesses[key // self.num_experts], self._uses[key]
        end = bisect_right(accesses, now) + self.window
        last = accesses[end - 1] if end <= len(accesses) else self.num_accesses
        return bisect_right(uses, last) - bisect_right(uses, now)
