"""The experts that followed those of this layer in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.prefetchers import best_first, needed

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class TransitionPrefetch:
    """The likeliest experts, by a table P(next expert | expert) learned offline (I0).

    Expert j scores ``sum_i counts_now[i] * P[layer, i, j]``, where P is `transitions` with each row divided
    by its sum. Experts that never followed in training score zero and are not named; ties go to the lower id.
    """

    information: ClassVar[str] = "I0"
    source: ClassVar[str] = "training trace"
    reads: ClassVar[tuple[str, ...]] = ("transitions",)

    def __init__(self, context: PrefetchContext) -> None:
        counts = needed(context.transitions, "transitions", "float64[layer - 1, expert, expert] of training")
        totals = counts.sum(axis=2, keepdims=True)
        self._probability = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
        self._width = context.width

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return the experts with the highest score."""
        if layer >= len(self._probability):
            return []
        scores = np.asarray(counts_now, dtype=np.float64) @ self._probability[layer, np.asarray(experts_now)]
        return best_first(scores, self._width)
