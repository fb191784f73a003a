"""HybriMoE: what shortens the coming layers most, in three forms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.policies.mrs import MrsRepositoryPolicy
from moesim.cache.policy import PolicyContext
from moesim.cache.prefetchers import LookaheadBase, PrefetchMoment, Wish, best_first, needed
from moesim.cache.prefetchers.stated_recall import StatedPredictions

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


@dataclass
class _LayerAhead:
    """A coming layer as predicted: tokens by expert, who of them would be resident, and each absent one's gain."""

    layer: int
    tokens: dict[int, int]
    resident: frozenset[int]
    gains: dict[int, float]


class HybriMoePrefetch(LookaheadBase):
    """The experts that shorten the next `lookahead` (3) layers most (I3, stated recall).

    Zhong et al., "HybriMoE", arXiv 2504.05897, DAC 2025, section IV-C: the gates of the next layers on the current hidden
    state; for every absent expert, the layer's schedule on CPU, GPU and link with and without it in the cache; the one of
    the largest gain is fetched, then the next, given the first. The gain is ``makespan(without) - makespan(with)`` of the layer
    scheduler in the context, and must be positive. Ties: the nearer layer, then the lower expert. A trace has no hidden
    states, so the truth is blurred by a stated recall (`StatedPredictions`); none is built in.
    """

    information: ClassVar[str] = "I3"
    source: ClassVar[str] = "stated"
    reads: ClassVar[tuple[str, ...]] = (*StatedPredictions.reads, "makespan")
    published_lookahead: ClassVar[int] = 3

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self._stated = StatedPredictions(context)
        self._makespan = needed(context.makespan, "makespan", "(tokens by expert, resident experts) -> seconds")

    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield the largest gain, then the largest that is left after it, while there is any."""
        ahead = [self._layer_ahead(moment, layer) for layer in self.layers_ahead(moment.layer)]
        while candidates := _by_gain(ahead):
            _, layer, expert, place = candidates[0]
            yield Wish(layer, expert)
            ahead[place].resident |= {expert}
            ahead[place].gains = self._gains(ahead[place])

    def _layer_ahead(self, moment: PrefetchMoment, layer: int) -> _LayerAhead:
        tokens = dict(self._stated.guesses(moment.layer, moment.now, layer - moment.layer))
        absent = set(self.absent(moment, layer, tokens))
        found = _LayerAhead(layer, tokens, frozenset(tokens.keys() - absent), {})
        found.gains = self._gains(found)
        return found

    def _gains(self, ahead: _LayerAhead) -> dict[int, float]:
        """Return seconds saved by each absent expert that is worth its copy."""
        absent = ahead.tokens.keys() - ahead.resident
        without = self._makespan(ahead.tokens, ahead.resident) if absent else 0.0
        saved = {expert: without - self._makespan(ahead.tokens, ahead.resident | {expert}) for expert in sorted(absent)}
        return {expert: gain - self._price() for expert, gain in saved.items() if gain > self._price()}

    def _price(self) -> float:
        """Seconds that a gain must exceed."""
        return 0.0


class HybriMoeAscendPrefetch(HybriMoePrefetch):
    """HybriMoE as in vllm-ascend (I3, stated recall): a gain counts only as far as it exceeds the time of the copy.

    All gains are taken once, those above zero rank the experts, and `width` cuts. With a scheduler that is optimal for the
    layer no gain exceeds the copy (it could fetch the expert first and lose no more than that), so that this form acts only
    where the scheduler is not optimal.
    """

    reads: ClassVar[tuple[str, ...]] = (*HybriMoePrefetch.reads, "copy_s")

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self._copy_s = needed(context.copy_s, "copy_s", "seconds to copy one expert")

    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield the experts by their gains."""
        ahead = [self._layer_ahead(moment, layer) for layer in self.layers_ahead(moment.layer)]
        for _, layer, expert, _ in _by_gain(ahead):
            yield Wish(layer, expert)

    def _price(self) -> float:
        return self._copy_s


class HybriMoeRepositoryPrefetch(LookaheadBase):
    """HybriMoE as released (I2): the experts of the next layer with the highest recent scores.

    Its `prefetch_size` (here `width`) highest MRS scores (`MrsRepositoryPolicy`) of layer l + 1 are taken; who of them is
    resident is not replaced. Nothing is predicted for the token at hand: the scores are those of earlier tokens. Without
    `RouterScores` uses are averaged instead, as the eviction policy does. The released code prefetches in decode only.
    """

    information: ClassVar[str] = "I2"
    source: ClassVar[str] = "past scores"
    reads: ClassVar[tuple[str, ...]] = ("scores",)

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self._mrs = MrsRepositoryPolicy(PolicyContext(self.num_layers, self.num_experts, scores=context.scores))

    def observe(self, moment: PrefetchMoment) -> None:
        """Average the scores of the layer in progress."""
        for expert in moment.experts.tolist():
            self._mrs.touch(moment.layer * self.num_experts + expert, moment.now)

    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield those of the best scored that are absent."""
        layer = moment.layer + 1
        if layer < self.num_layers:
            keys = range(layer * self.num_experts, (layer + 1) * self.num_experts)
            best = best_first(np.array([self._mrs.score(key, moment.now) for key in keys]), self.width)
            yield from (Wish(layer, expert) for expert in self.absent(moment, layer, best))


def _by_gain(ahead: list[_LayerAhead]) -> list[tuple[float, int, int, int]]:
    """Return (minus gain, layer, expert, place in the list) of all gains, the largest gain first."""
    return sorted((-gain, one.layer, expert, place)
                  for place, one in enumerate(ahead) for expert, gain in one.gains.items())
