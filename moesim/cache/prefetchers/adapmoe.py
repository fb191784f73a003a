"""AdapMoE: one missing expert at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from moesim.cache.prefetchers import LookaheadBase, PrefetchMoment, Wish
from moesim.cache.prefetchers.stated_recall import StatedPredictions

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class AdapMoePrefetch(LookaheadBase):
    """The first predicted expert of the next `lookahead` layers that is missing, and no other (I3, stated recall).

    Zhong et al., "AdapMoE", arXiv 2408.10284, ICCAD 2024: the next gates on the current hidden state, layer by layer, the
    highest score first. The paper looks 2 to 3 layers ahead (here 3); the authors' code looks at one (``lookahead=1``) and has
    the copy itself commented out. A trace has no hidden states, so the truth is blurred by a stated recall
    (`StatedPredictions`); none is built in.
    """

    information: ClassVar[str] = "I3"
    source: ClassVar[str] = "stated"
    reads: ClassVar[tuple[str, ...]] = StatedPredictions.reads
    published_lookahead: ClassVar[int] = 3

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self._stated = StatedPredictions(context)

    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield at most one wish."""
        return islice(self._missing(moment), 1)

    def _missing(self, moment: PrefetchMoment) -> Iterator[Wish]:
        for layer in self.layers_ahead(moment.layer):
            guesses = self._stated.experts(moment.layer, moment.now, layer - moment.layer)
            yield from (Wish(layer, expert) for expert in self.absent(moment, layer, guesses))
