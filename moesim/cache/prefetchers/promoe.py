"""ProMoE: a learned predictor some layers ahead, into a queue of low priority."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from moesim.cache.prefetchers import LookaheadBase, PrefetchMoment, Wish
from moesim.cache.prefetchers.stated_recall import StatedPredictions

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class ProMoePrefetch(LookaheadBase):
    """The experts predicted for the layer `lookahead` (the paper's stride, 1) later, and for no other (I3, stated recall).

    Song et al., "ProMoE", arXiv 2410.22134: a small network per layer reads the hidden state of `stride` layers before. A
    trace has no hidden states, so the truth is blurred by a stated recall (`StatedPredictions`); none is built in. The rest of
    the system is the program's: copies in 3 chunks (``chunks: 3``), prefetches behind demand loads, dropped once their layer's
    router has spoken, resident experts computed first.
    """

    information: ClassVar[str] = "I3"
    source: ClassVar[str] = "stated"
    reads: ClassVar[tuple[str, ...]] = StatedPredictions.reads

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self._stated = StatedPredictions(context)

    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield the absent experts of the one layer, the best guess first."""
        layer = moment.layer + self.lookahead
        if layer < self.num_layers:
            guesses = self._stated.experts(moment.layer, moment.now, self.lookahead)
            for expert in self.absent(moment, layer, guesses):
                yield Wish(layer, expert)
