"""The true experts of the next layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.prefetchers import access_ahead, needed

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class OraclePrefetch:
    """The true experts of the next layer, in rising order, cut to `width` (I4)."""

    information: ClassVar[str] = "I4"
    source: ClassVar[str] = "exact future"
    reads: ClassVar[tuple[str, ...]] = ("future",)

    def __init__(self, context: PrefetchContext) -> None:
        self._future = needed(context.future, "future", "the AccessStream that will be run")
        self._num_layers, self._width = context.num_layers, context.width

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return the first `width` experts of access ``now + 1``."""
        if layer + 1 >= self._num_layers:
            return []
        then = access_ahead(self._future, layer, now, 1)
        return self._future.experts_of(then)[: self._width].tolist()
