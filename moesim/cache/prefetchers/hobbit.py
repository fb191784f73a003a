"""HOBBIT: look on until a predicted expert is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from moesim.cache.prefetchers import LookaheadBase, PrefetchMoment, Wish
from moesim.cache.prefetchers.stated_recall import StatedPredictions

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class HobbitPrefetch(LookaheadBase):
    """The missing experts of the nearest of the next `lookahead` layers that has any (I3, stated recall).

    Tang et al., "HOBBIT", arXiv 2411.01433, layer-level adaptive prefetching: if everything predicted for the next layer
    is resident, go on to the one after it. Published: 1 to 3 layers, recall 0.96, 0.90 and 0.90 by distance, which are the
    defaults (stated: the top-1 accuracy on Mixtral). Predicted experts are not to be evicted: `named` has them. Low-precision
    copies of prefetched experts are not modelled.
    """

    information: ClassVar[str] = "I3"
    source: ClassVar[str] = "stated"
    reads: ClassVar[tuple[str, ...]] = StatedPredictions.reads
    masks: ClassVar[bool] = True
    published_lookahead: ClassVar[int] = 3
    published_recall: ClassVar[tuple[float, ...]] = (0.96, 0.90, 0.90)

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self._stated = StatedPredictions(context, self.published_recall)

    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield what the first layer with a miss lacks."""
        for layer in self.layers_ahead(moment.layer):
            guesses = self._stated.experts(moment.layer, moment.now, layer - moment.layer)
            missing = list(self.absent(moment, layer, guesses))
            if missing:
                yield from (Wish(layer, expert) for expert in missing)
                return
