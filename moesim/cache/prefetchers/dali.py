"""DALI: the next layer's fullest experts, predicted from a corrected hidden state."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.prefetchers import needed
from moesim.cache.prefetchers.stated_recall import StatedPredictions

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class DaliPrefetch:
    """The experts of the next layer that are predicted to get the most tokens (I3, stated recall).

    DALI, arXiv 2602.03495: the next layer's gate on the current hidden state plus a residual vector learned offline for
    each layer. A trace has no hidden states, so the truth is blurred by a stated recall (`StatedPredictions`); the correction
    is a higher one than that of `hybrimoe` or `gate-speculation` (published: +6.9 points on DeepSeek, +15.7 on Qwen).
    Ties of tokens: the lower expert.
    """

    information: ClassVar[str] = "I3"
    source: ClassVar[str] = "stated"
    reads: ClassVar[tuple[str, ...]] = ("future", "future_tokens", "recall")

    def __init__(self, context: PrefetchContext) -> None:
        self._stated = StatedPredictions(context)
        needed(context.future_tokens, "future_tokens", "int64[use], the tokens of each use in `future`")
        self._num_layers, self._width = context.num_layers, context.width

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return the experts with the highest predicted load."""
        if layer + 1 >= self._num_layers:
            return []
        guesses = sorted(self._stated.guesses(layer, now), key=lambda guess: (-guess.tokens, guess.expert))
        return [guess.expert for guess in guesses[: self._width]]
