"""EdgeMoE: a dictionary from the last two layers' experts to the next layer's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.prefetchers import LookaheadBase, PrefetchMoment, Wish, best_first, needed

if TYPE_CHECKING:
    from moesim.cache.policy import AccessStream
    from moesim.cache.prefetch import PrefetchContext


class EdgeMoePrefetch(LookaheadBase):
    """The likeliest experts of the next layer, given all experts of this layer and of the one before (I1).

    Yi et al., "EdgeMoE", arXiv 2308.14352, preloading by a dictionary that a training part fills: from the activated experts of
    two consecutive MoE layers to the probability of each expert in the next. Experts of probability above zero are
    fetched in falling order (ties: the lower one) as far as the copies come before the router has spoken: the program
    cancels what has not started then, so give a wide `width`. A pair of sets not seen in training falls back to this layer's
    set alone, and that to the popularity of the next layer; the paper prints no rule for this. Nothing is fetched for
    the first layer.

    The paper has one token at a time and one or two experts per token. Of larger sets hardly any recurs, and what is left is
    popularity.
    """

    information: ClassVar[str] = "I1"
    source: ClassVar[str] = "training trace"
    reads: ClassVar[tuple[str, ...]] = ("training",)

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self._training = needed(context.training, "training", "the AccessStream of training, token by token")
        self._accesses = _accesses_after(self._training)
        self._popularity = np.bincount(
            self._training.keys(self.num_experts), minlength=self.num_layers * self.num_experts
        ).reshape(self.num_layers, self.num_experts)
        self._seen = (-1, -1)
        self._before: bytes | None = None
        self._current = b""

    def observe(self, moment: PrefetchMoment) -> None:
        """Remember the experts of this layer, and those of the layer before in the same step."""
        follows = self._seen == (moment.now - 1, moment.layer - 1)
        self._before = self._current if follows else None
        self._current = _name(moment.experts)
        self._seen = (moment.now, moment.layer)

    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield the absent experts by their probability."""
        layer = moment.layer + 1
        if layer < self.num_layers:
            likeliest = best_first(self.counts(layer), self.num_experts)
            yield from (Wish(layer, expert) for expert in self.absent(moment, layer, likeliest))

    def counts(self, layer: int) -> np.ndarray:
        """Return int64[expert]: how often each expert of `layer` followed what was seen last, in training."""
        for before in (self._before, None):
            accesses = self._accesses.get((layer, before, self._current))
            if accesses:
                used = np.concatenate([self._training.experts_of(access) for access in accesses])
                return np.bincount(used, minlength=self.num_experts)
        return self._popularity[layer]


def _accesses_after(training: AccessStream) -> dict[tuple[int, bytes | None, bytes], list[int]]:
    """Return from (layer, set two layers before or None, set one layer before) to the accesses of `layer` that followed."""
    found: dict[tuple[int, bytes | None, bytes], list[int]] = {}
    names = [_name(training.experts_of(access)) for access in range(training.num_accesses)]
    follows = np.diff(training.layers, prepend=training.layers[:1]) == 1
    for access in np.flatnonzero(follows).tolist():
        layer, last = int(training.layers[access]), names[access - 1]
        found.setdefault((layer, None, last), []).append(access)
        if follows[access - 1]:
            found.setdefault((layer, names[access - 2], last), []).append(access)
    return found


def _name(experts: np.ndarray) -> bytes:
    """Return a key for a set of experts in rising order."""
    return np.asarray(experts).astype(np.int16).tobytes()
