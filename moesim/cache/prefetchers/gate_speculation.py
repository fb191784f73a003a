"""Speculative loading: the next layer's gate on this layer's hidden state (Mixtral-offloading)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.prefetchers.stated_recall import StatedPredictions

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class GateSpeculationPrefetch:
    """The top experts that the next layer's gate names for the current hidden state (I3, stated recall).

    Eliseev and Mazur, "Fast inference of mixture-of-experts language models with offloading", arXiv 2312.17238, section 3.2:
    fetch the top one or two (`width`) once the experts of the current layer are in. The program's classes of copies see to
    that order. A trace has no hidden states, so the truth is blurred by a stated recall (`StatedPredictions`); none is
    built in. The authors' repository has no speculative loading.
    """

    information: ClassVar[str] = "I3"
    source: ClassVar[str] = "stated"
    reads: ClassVar[tuple[str, ...]] = StatedPredictions.reads

    def __init__(self, context: PrefetchContext) -> None:
        self._stated = StatedPredictions(context)
        self._num_layers, self._width = context.num_layers, context.width

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return the top guesses for the next layer; a resident one is not replaced by the one after it."""
        return self._stated.experts(layer, now)[: self._width] if layer + 1 < self._num_layers else []
