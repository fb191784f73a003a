"""A predictor of a stated recall, and what the published ones that look at hidden states share: the truth, blurred."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from moesim.cache.prefetchers import access_ahead, needed

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class Guess(NamedTuple):
    """An expert that a predictor names, and the tokens that it expects there."""

    expert: int
    tokens: int


class StatedPredictions:
    """The truth of a later layer, blurred by a stated recall: a what-if, not a measurement.

    Systems that apply a gate to an earlier layer's hidden state cannot be run on a trace, which has no hidden states.
    Here each true expert is named with probability ``recall`` of the distance; otherwise a random expert that the layer does
    not use, and that was not named yet, takes its place and its tokens (if one is left). The draws depend on the seed and
    on the access that is predicted only: who is recognised from afar is recognised from near, where recall falls with
    distance. `RouterScores`, if the context has them, give the order of guesses (the highest first), else the tokens.

    Raises:
        InputError: no future, or no recall where none is published.
    """

    reads: ClassVar[tuple[str, ...]] = ("future", "future_tokens", "scores", "recall")

    def __init__(self, context: PrefetchContext, published: tuple[float, ...] = ()) -> None:
        self._future = needed(context.future, "future", "the AccessStream that will be run")
        self._recall = needed(
            context.recalls or published or None, "recall", "a share in 0 ... 1, or one for each distance in layers")
        self._tokens, self._scores = context.future_tokens, context.scores
        self._num_experts, self._seed = context.num_experts, context.seed

    def guesses(self, layer: int, now: int, distance: int = 1) -> list[Guess]:
        """Return what is predicted in access `now` of `layer` for the layer `distance` later: distinct, the best first."""
        then = access_ahead(self._future, layer, now, distance)
        truth = self._future.experts_of(then)
        tokens = self._tokens_of(then, len(truth))
        rank = tokens if self._scores is None else self._scores.mean[then][truth]
        named = blurred(truth, self._num_experts, self._recall_at(distance), self._seed, then - 1)
        order = np.argsort(-rank, kind="stable").tolist()
        return [Guess(expert, int(tokens[place])) for place in order if (expert := named[place]) is not None]

    def experts(self, layer: int, now: int, distance: int = 1) -> list[int]:
        """Return the experts of `guesses`."""
        return [guess.expert for guess in self.guesses(layer, now, distance)]

    def _recall_at(self, distance: int) -> float:
        """Recall `distance` layers ahead; beyond the last stated one it stays the same."""
        return self._recall[min(distance, len(self._recall)) - 1]

    def _tokens_of(self, access: int, count: int) -> np.ndarray:
        if self._tokens is None:
            return np.ones(count, dtype=np.int64)
        return self._tokens[self._future.offsets[access]: self._future.offsets[access + 1]]


def blurred(truth: np.ndarray, num_experts: int, recall: float, seed: int, draw: int) -> list[int | None]:
    """Return for each true expert itself with probability `recall`, else a random other one (None: none is left).

    The same (seed, draw) recognises under a higher recall all that it recognises under a lower one.
    """
    rng = np.random.default_rng([seed, draw])
    right = rng.random(len(truth)) < recall
    wrong = iter(rng.permutation(np.setdiff1d(np.arange(num_experts), truth)).tolist())
    return [expert if known else next(wrong, None) for expert, known in zip(truth.tolist(), right, strict=True)]


class StatedRecallPrefetch:
    """A predictor of a stated recall: a what-if, not a measurement (I3).

    Each true expert of the next layer is named with probability `recall` (1 if none is stated); otherwise a random expert
    that the next layer does not use, and that was not named yet, takes its place (if one is left). The draws depend on
    the seed and on `now` only. Right and wrong guesses are in no telling order; `width` cuts both alike.
    """

    information: ClassVar[str] = "I3"
    source: ClassVar[str] = "stated"
    reads: ClassVar[tuple[str, ...]] = ("future", "recall")

    def __init__(self, context: PrefetchContext) -> None:
        self._future = needed(context.future, "future", "the AccessStream that will be run")
        self._num_layers, self._num_experts, self._width = context.num_layers, context.num_experts, context.width
        self._recall, self._seed = (context.recalls or (1.0,))[0], context.seed

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return the blurred truth."""
        if layer + 1 >= self._num_layers:
            return []
        truth = self._future.experts_of(access_ahead(self._future, layer, now, 1))
        named = blurred(truth, self._num_experts, self._recall, self._seed, now)
        return [expert for expert in named if expert is not None][: self._width]
