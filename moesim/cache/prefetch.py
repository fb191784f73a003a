"""What a prefetcher is, what it may know, and the registry of prefetchers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeGuard

import numpy as np

from moesim.cache.policy import AccessStream, checked_popularity, information_level
from moesim.cache.prefetchers import PrefetchMoment, Wish
from moesim.cache.prefetchers.adapmoe import AdapMoePrefetch
from moesim.cache.prefetchers.dali import DaliPrefetch
from moesim.cache.prefetchers.edgemoe import EdgeMoePrefetch
from moesim.cache.prefetchers.finemoe import FineMoePrefetch
from moesim.cache.prefetchers.gate_speculation import GateSpeculationPrefetch
from moesim.cache.prefetchers.hobbit import HobbitPrefetch
from moesim.cache.prefetchers.hybrimoe import (
    HybriMoeAscendPrefetch,
    HybriMoePrefetch,
    HybriMoeRepositoryPrefetch,
)
from moesim.cache.prefetchers.moe_infinity import MoeInfinityPrefetch, MoeInfinityRepositoryPrefetch
from moesim.cache.prefetchers.none import NoPrefetch
from moesim.cache.prefetchers.oracle import OraclePrefetch
from moesim.cache.prefetchers.popularity import PopularityPrefetch
from moesim.cache.prefetchers.pre_gated import PreGatedPrefetch
from moesim.cache.prefetchers.promoe import ProMoePrefetch
from moesim.cache.prefetchers.read_me import ReadMePrefetch
from moesim.cache.prefetchers.stated_recall import StatedRecallPrefetch
from moesim.cache.prefetchers.transition import TransitionPrefetch
from moesim.cache.scores import RouterScores
from moesim.errors import InputError
from moesim.registry import Registry

# Levels whose plug-ins are built with the future: an I3 prediction is simulated by blurring the truth.
SEES_FUTURE = ("I3", "I4")

Makespan = Callable[[Mapping[int, int], AbstractSet[int]], float]


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
        recall: probability with which a stated predictor names a true expert: one, or one for each distance in layers (beyond
            the last it stays the same); None: the published one, if there is any.
        seed: of the random numbers that stated predictors draw.
        lookahead: how many layers ahead to look, or None: as published.
        future_tokens: int64[use], the tokens of each use in `future`, or None: one each.
        scores: what the routers give at each access of the run, or None (level I2). A prefetcher below I3 reads no row of
            a later access.
        training: the accesses of a training part, token by token (`token_accesses`), or None.
        training_starts: bool[access], where its requests begin; None: it is one request.
        training_scores: the scores of its accesses, whole steps, or None.
        makespan: seconds that a layer takes, of (tokens by expert, those of them that are resident), or None.
        copy_s: seconds to copy one expert, or None.

    Raises:
        InputError: sizes below one, a recall outside 0 ... 1, arrays of another shape, or accesses outside the model.
    """

    num_layers: int
    num_experts: int
    width: int
    transitions: np.ndarray | None = None
    popularity: np.ndarray | None = None
    future: AccessStream | None = None
    recall: float | Sequence[float] | None = None
    seed: int = 0
    lookahead: int | None = None
    future_tokens: np.ndarray | None = None
    scores: RouterScores | None = None
    training: AccessStream | None = None
    training_starts: np.ndarray | None = None
    training_scores: RouterScores | None = None
    makespan: Makespan | None = None
    copy_s: float | None = None

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_experts < 1:
            raise InputError(
                f"prefetch: needs layers and experts, got {self.num_layers} x {self.num_experts}")
        _check_numbers(self)
        if self.transitions is not None:
            object.__setattr__(self, "transitions", _checked_transitions(self))
        if self.popularity is not None:
            object.__setattr__(self, "popularity", checked_popularity(
                self.popularity, self.num_layers, self.num_experts))
        for stream in (self.future, self.training):
            if stream is not None:
                stream.check_fits(self.num_layers, self.num_experts)
        if self.future_tokens is not None:
            object.__setattr__(self, "future_tokens", _checked_tokens(self))
        for name in ("scores", "training_scores"):
            _check_scores(getattr(self, name), name, self)
        _check_starts(self)

    @property
    def recalls(self) -> tuple[float, ...]:
        """The stated recall by distance, empty if none is."""
        if self.recall is None:
            return ()
        return tuple(self.recall) if isinstance(self.recall, Sequence) else (float(self.recall),)


class Prefetcher(Protocol):
    """Names experts of the next layer, without a look at the cache; `information` and `source` say on what ground."""

    information: ClassVar[str]
    source: ClassVar[str]

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return distinct experts of ``layer + 1``, best first, at most `width`; none for the last layer.

        `experts_now` is int[n], the distinct experts of access `now` (of `layer`); `counts_now` is int[n],
        the tokens that each of them got.
        """


class LookaheadPrefetcher(Protocol):
    """Wishes for experts of any later layer, and may look at what is resident; serves one run.

    It is asked at every access, also at those of the last layer: some learn from what they see.
    """

    information: ClassVar[str]
    source: ClassVar[str]

    def wishes(self, moment: PrefetchMoment) -> list[Wish]:
        """Return distinct absent experts to fetch, the most wanted first, at most `width`."""


PrefetcherFactory = Callable[[PrefetchContext], Prefetcher | LookaheadPrefetcher]

PREFETCHERS: Registry[PrefetcherFactory] = Registry("prefetcher", "moesim.prefetchers", {
    "none": NoPrefetch,
    "popularity": PopularityPrefetch,
    "transition": TransitionPrefetch,
    "stated_recall": StatedRecallPrefetch,
    "oracle": OraclePrefetch,
    "gate-speculation": GateSpeculationPrefetch,
    "hobbit": HobbitPrefetch,
    "edgemoe": EdgeMoePrefetch,
    "moe-infinity": MoeInfinityPrefetch,
    "moe-infinity-repository": MoeInfinityRepositoryPrefetch,
    "hybrimoe": HybriMoePrefetch,
    "hybrimoe-ascend": HybriMoeAscendPrefetch,
    "hybrimoe-repository": HybriMoeRepositoryPrefetch,
    "promoe": ProMoePrefetch,
    "finemoe": FineMoePrefetch,
    "pre-gated": PreGatedPrefetch,
    "read-me": ReadMePrefetch,
    "adapmoe": AdapMoePrefetch,
    "dali": DaliPrefetch,
})


def make_prefetcher(name: str, context: PrefetchContext) -> Prefetcher | LookaheadPrefetcher:
    """Return a new prefetcher, built from no more of `context` than its information level allows.

    Raises:
        InputError: an unknown name, no declared level, or a context that lacks what the prefetcher needs.
    """
    factory = PREFETCHERS[name]
    level = information_level(factory, f"prefetcher {name!r}")
    sees_future = level in SEES_FUTURE
    return factory(dataclasses.replace(
        context, future=context.future if sees_future else None,
        future_tokens=context.future_tokens if sees_future else None,
        scores=context.scores if level >= "I2" else None))


def looks_ahead(prefetcher: Prefetcher | LookaheadPrefetcher | None) -> TypeGuard[LookaheadPrefetcher]:
    """Return whether a prefetcher is asked by `wishes`, not by `predict`."""
    return hasattr(prefetcher, "wishes")


def check_wishes(wishes: Sequence[Wish], num_layers: int, num_experts: int) -> None:
    """Raise InputError if a wish lies outside the model, or is more urgent than 0."""
    for wish in wishes:
        if not (0 <= wish.layer < num_layers and 0 <= wish.expert < num_experts and wish.urgency >= 0):
            raise InputError(
                f"prefetch: the prefetcher wishes for {wish}, but there are {num_layers} layers x {num_experts} experts, and "
                "urgency must not be negative")


def reads(name: str) -> tuple[str, ...]:
    """Return the fields of the context that a prefetcher is built from, beside sizes, width, lookahead and seed."""
    return getattr(PREFETCHERS[name], "reads", ())


def needs_recall(name: str) -> bool:
    """Return whether a prefetcher rests on a recall that the user must state (False also where one is published)."""
    return "recall" in reads(name) and not getattr(PREFETCHERS[name], "published_recall", ())


def _check_numbers(context: PrefetchContext) -> None:
    if context.width < 1:
        raise InputError(f"prefetch: width must be at least 1, got {context.width}; for none, use 'none'")
    if context.recall is not None and (not context.recalls or not all(0.0 <= share <= 1.0 for share in context.recalls)):
        raise InputError(f"prefetch: recall must lie in 0 ... 1, got {context.recall}")
    if context.seed < 0:
        raise InputError(f"prefetch: seed must not be negative, got {context.seed}")
    if context.lookahead is not None and context.lookahead < 1:
        raise InputError(f"prefetch: lookahead must be at least 1, got {context.lookahead}")
    if context.copy_s is not None and not 0.0 <= context.copy_s < np.inf:
        raise InputError(f"prefetch: copy_s must be a number of seconds, got {context.copy_s}")


def _checked_transitions(context: PrefetchContext) -> np.ndarray:
    array = np.array(context.transitions, dtype=np.float64)
    expected = (context.num_layers - 1, context.num_experts, context.num_experts)
    if array.shape != expected:
        raise InputError(f"prefetch: transitions must be {list(expected)}, got {list(array.shape)}")
    if not np.all(np.isfinite(array)) or np.any(array < 0):
        raise InputError("prefetch: transitions must be finite and not negative")
    array.setflags(write=False)
    return array


def _checked_tokens(context: PrefetchContext) -> np.ndarray:
    array = np.array(context.future_tokens)
    uses = -1 if context.future is None else len(context.future.experts)
    if array.shape != (uses,) or not np.issubdtype(array.dtype, np.integer) or array.min(initial=1) < 1:
        raise InputError(
            f"prefetch: future_tokens must be a positive integer for each of the {max(uses, 0)} uses in future, got "
            f"{array.dtype}{list(array.shape)}")
    array.setflags(write=False)
    return array


def _check_scores(scores: RouterScores | None, name: str, context: PrefetchContext) -> None:
    if scores is None:
        return
    if scores.mean.shape[1] != context.num_experts:
        raise InputError(f"prefetch: {name} are of {scores.mean.shape[1]} experts, not {context.num_experts}")
    if name == "training_scores" and len(scores.mean) % context.num_layers:
        raise InputError(f"prefetch: training_scores must be of whole steps of {context.num_layers} layers, got "
                         f"{len(scores.mean)} accesses")


def _check_starts(context: PrefetchContext) -> None:
    starts, training = context.training_starts, context.training
    if starts is None:
        return
    if training is None or starts.shape != (training.num_accesses,) or starts.dtype != np.bool_:
        raise InputError(
            f"prefetch: training_starts must be bool[access] of `training`, got {starts.dtype}{list(starts.shape)}")
