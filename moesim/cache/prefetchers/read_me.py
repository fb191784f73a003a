"""Read-ME: one router in front of all layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from moesim.cache.prefetchers import LookaheadBase, PrefetchMoment, Wish, access_ahead, needed

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class ReadMePrefetch(LookaheadBase):
    """The exact experts of all layers that are left of the step, the next layer first (I4).

    Cai et al., "Read-ME", arXiv 2410.19123, NeurIPS 2024: a router apart from the layers chooses before they run, so that
    the whole path of a step is known. Nearer layers are more urgent; within a layer the lower expert comes first. The next
    step is not looked at: its token is not known before this step ends. A trace of an ordinary model stands in for one of a
    model whose layers all use the same expert. Its batching by expert belongs to the workload, its eviction is `belady`.
    """

    information: ClassVar[str] = "I4"
    source: ClassVar[str] = "exact future"
    reads: ClassVar[tuple[str, ...]] = ("future",)

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self.lookahead = self.num_layers if context.lookahead is None else context.lookahead
        self._future = needed(context.future, "future", "the AccessStream that will be run")

    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield the absent experts, layer after layer."""
        for layer in self.layers_ahead(moment.layer):
            distance = layer - moment.layer
            then = access_ahead(self._future, moment.layer, moment.now, distance)
            for expert in self.absent(moment, layer, self._future.experts_of(then).tolist()):
                yield Wish(layer, expert, distance - 1)
