"""The popular experts of the next layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.prefetchers import best_first, needed

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class PopularityPrefetch:
    """The experts of the next layer that were most popular in training, whatever happens (I0)."""

    information: ClassVar[str] = "I0"
    source: ClassVar[str] = "training trace"
    reads: ClassVar[tuple[str, ...]] = ("popularity",)

    def __init__(self, context: PrefetchContext) -> None:
        popularity = needed(context.popularity, "popularity", "float64[layer, expert] of a training trace")
        self._best = [best_first(scores, context.width) for scores in popularity]

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return the same experts for the same layer."""
        return list(self._best[layer + 1]) if layer + 1 < len(self._best) else []
