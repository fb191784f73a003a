"""Prefetchers: which experts of the next layer to fetch before its router has spoken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np

from moesim.cache.policy import AccessStream, checked_popularity, information_level
from moesim.errors import InputError
from moesim.registry import Registry

T = TypeVar("T")

# Levels whose plug-ins are built with the future: an I3 prediction is simulated by blurring the truth.
SEES_FUTURE = ("I3", "I4")


@dataclass(frozen=True)
class PrefetchContext:
    """What prefetchers may be built from.

    Attributes:
        num_layers, num_experts: the MoE layers, and the experts of each.
        width: the most experts that one call may name.
        transitions: float64[layer - 1, expert, expert], tokens of a training part of the trace with expert i
            in a layer and j in the next, or None.
        popularity: float64[layer, expert] from a training part, or None.
        future: the accesses that will be run, or None.
        recall: probability with which `stated_recall` names a true expert.
        seed: of the random numbers that `stated_recall` draws.

    Raises:
        InputError: sizes below one, a recall outside 0 ... 1, or arrays of another shape.
    """

    num_layers: int
    num_experts: int
    width: int
    transitions: np.ndarray | None = None
    popularity: np.ndarray | None = None
    future: AccessStream | None = None
    recall: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_experts < 1:
            raise InputError(
                f"prefetch: needs layers and experts, got {self.num_layers} x {self.num_experts}")
        if self.width < 1:
            raise InputError(f"prefetch: width must be at least 1, got {self.width}; for none, use 'none'")
        if not 0.0 <= self.recall <= 1.0:
            raise InputError(f"prefetch: recall must lie in 0 ... 1, got {self.recall}")
        if self.seed < 0:
            raise InputError(f"prefetch: seed must not be negative, got {self.seed}")
        if self.transitions is not None:
            object.__setattr__(self, "transitions", _checked_transitions(self))
        if self.popularity is not None:
            object.__setattr__(self, "popularity", checked_popularity(
                self.popularity, self.num_layers, self.num_experts))
        if self.future is not None:
            self.future.check_fits(self.num_layers, self.num_experts)


class Prefetcher(Protocol):
    """Names experts of the next layer; `information` and `source` say on what ground."""

    information: ClassVar[str]
    source: ClassVar[str]

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return distinct experts of ``layer + 1``, best first, at most `width`; none for the last layer.

        `experts_now` is int[n], the distinct experts of access `now` (of `layer`); `counts_now` is int[n],
        the tokens that each of them got.
        """


class Wish(NamedTuple):
    """An expert to fetch ahead: of a later layer, or of the next step where `layer` is not later.

    Copies queue by `urgency` (0 first), then in the order of the wishes.
    """

    layer: int
    expert: int
    urgency: int = 0


@dataclass(frozen=True)
class PrefetchMoment:
    """What a `LookaheadPrefetcher` is told right after the router of `layer`, in access `now`.

    Attributes:
        experts, counts: int[n], the distinct experts of this access and the tokens that each of them got.
        is_resident: of (layer, expert): whether it is in a slot or on its way to one.
        num_layers: the MoE layers of a step. request_start: whether this access begins a request.
    """

    layer: int
    now: int
    experts: np.ndarray
    counts: np.ndarray
    is_resident: Callable[[int, int], bool]
    num_layers: int
    request_start: bool


class LookaheadPrefetcher(Protocol):
    """Wishes for experts of any later layer, and may look at what is resident."""

    information: ClassVar[str]
    source: ClassVar[str]

    def wishes(self, moment: PrefetchMoment) -> list[Wish]:
        """Return absent experts to fetch, the most wanted first."""


class NoPrefetch:
    """Fetches nothing ahead (I0)."""

    information: ClassVar[str] = "I0"
    source: ClassVar[str] = "none"

    def __init__(self, context: PrefetchContext) -> None:
        del context  # every factory takes one

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return nothing."""
        return []


class PopularityPrefetch:
    """The experts of the next layer that were most popular in training, whatever happens (I0)."""

    information: ClassVar[str] = "I0"
    source: ClassVar[str] = "training trace"

    def __init__(self, context: PrefetchContext) -> None:
        popularity = _needed(context.popularity, "popularity", "float64[layer, expert] of a training trace")
        self._best = [_best_first(scores, context.width) for scores in popularity]

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return the same experts for the same layer."""
        return list(self._best[layer + 1]) if layer + 1 < len(self._best) else []


class TransitionPrefetch:
    """The likeliest experts, by a table P(next expert | expert) learned offline (I0).

    Expert j scores ``sum_i counts_now[i] * P[layer, i, j]``, where P is `transitions` with each row divided
    by its sum. Experts that never followed in training score zero and are not named; ties go to the lower id.
    """

    information: ClassVar[str] = "I0"
    source: ClassVar[str] = "training trace"

    def __init__(self, context: PrefetchContext) -> None:
        counts = _needed(context.transitions, "transitions", "float64[layer - 1, expert, expert] of training")
        totals = counts.sum(axis=2, keepdims=True)
        self._probability = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
        self._width = context.width

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return the experts with the highest score."""
        if layer >= len(self._probability):
            return []
        scores = np.asarray(counts_now, dtype=np.float64) @ self._probability[layer, np.asarray(experts_now)]
        return _best_first(scores, self._width)


class OraclePrefetch:
    """The true experts of the next layer, in rising order, cut to `width` (I4)."""

    information: ClassVar[str] = "I4"
    source: ClassVar[str] = "exact future"

    def __init__(self, context: PrefetchContext) -> None:
        self._future = _needed(context.future, "future", "the AccessStream that will be run")
        self._num_layers, self._width = context.num_layers, context.width

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return the first `width` experts of access ``now + 1``."""
        return self._truth(layer, now)[: self._width]

    def _truth(self, layer: int, now: int) -> list[int]:
        if layer + 1 >= self._num_layers:
            return []
        layers = self._future.layers
        if now + 1 >= len(layers) or layers[now] != layer or layers[now + 1] != layer + 1:
            raise InputError(
                f"prefetch: the future does not hold layers {layer} and {layer + 1} at accesses {now} and "
                f"{now + 1}; give the stream that is being run")
        return self._future.experts_of(now + 1).tolist()


class StatedRecallPrefetch(OraclePrefetch):
    """A predictor of a stated recall: a what-if, not a measurement (I3).

    Each true expert of the next layer is named with probability `recall`; otherwise a random expert that the
    next layer does not use, and that was not named yet, takes its place (if one is left). The draws depend on
    the seed and on `now` only. Right and wrong guesses are in no telling order; `width` cuts both alike.
    """

    information: ClassVar[str] = "I3"
    source: ClassVar[str] = "stated"

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self._num_experts, self._recall, self._seed = context.num_experts, context.recall, context.seed

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return the blurred truth."""
        truth = self._truth(layer, now)
        if not truth:
            return []
        rng = np.random.default_rng([self._seed, now])
        right = rng.random(len(truth)) < self._recall
        wrong = iter(rng.permutation(np.setdiff1d(np.arange(self._num_experts), truth)).tolist())
        guesses = [expert if known else next(wrong, None) for expert, known in zip(truth, right, strict=True)]
        return [guess for guess in guesses if guess is not None][: self._width]


PrefetcherFactory = Callable[[PrefetchContext], Prefetcher]

PREFETCHERS: Registry[PrefetcherFactory] = Registry("prefetcher", "moesim.prefetchers", {
    "none": NoPrefetch,
    "popularity": PopularityPrefetch,
    "transition": TransitionPrefetch,
    "stated_recall": StatedRecallPrefetch,
    "oracle": OraclePrefetch,
})


def make_prefetcher(name: str, context: PrefetchContext) -> Prefetcher:
    """Return a prefetcher, built from no more of `context` than its information level allows.

    Raises:
        InputError: an unknown name, no declared level, or a context that lacks what the prefetcher needs.
    """
    factory = PREFETCHERS[name]
    level = information_level(factory, f"prefetcher {name!r}")
    return factory(context if level in SEES_FUTURE else dataclasses.replace(context, future=None))


def _best_first(scores: np.ndarray, width: int) -> list[int]:
    """Return the ids of the highest positive scores, at most `width`, ties to the lower id."""
    order = np.argsort(-scores, kind="stable")[:width]
    return [int(expert) for expert in order if scores[expert] > 0]


def _needed(value: T | None, name: str, meaning: str) -> T:
    if value is None:
        raise InputError(f"this prefetcher needs {name}: give PrefetchContext({name}=...), {meaning}")
    return value


def _checked_transitions(context: PrefetchContext) -> np.ndarray:
    array = np.array(context.transitions, dtype=np.float64)
    expected = (context.num_layers - 1, context.num_experts, context.num_experts)
    if array.shape != expected:
        raise InputError(f"prefetch: transitions must be {list(expected)}, got {list(array.shape)}")
    if not np.all(np.isfinite(array)) or np.any(array < 0):
        raise InputError("prefetch: transitions must be finite and not negative")
    array.setflags(write=False)
    return array
