"""Prefetchers, one file each. A new one: copy `promoe.py`, add a line to `PREFETCHERS` in `prefetch.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import numpy as np

from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.cache.policy import AccessStream
    from moesim.cache.prefetch import PrefetchContext

T = TypeVar("T")

URGENCY_STEPS = 1000  # how finely a priority between 1 and 0 is told apart


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


class LookaheadBase(ABC):
    """The parts that lookahead prefetchers share. One serves one run, and is asked at every access of it, in order.

    A child fills `choose`, and `observe` if it learns from the run.

    Attributes:
        reads: the fields of `PrefetchContext` that it is built from, beside sizes, width, lookahead and seed.
        published_lookahead: layers ahead, where the context does not say.
        published_recall: by distance in layers, where the context does not say; empty: none is published.
        masks: whether the experts in `named` may not be evicted for other predictions (HOBBIT's mask).
        named: what the last call expected to be used, (layer, expert), resident or not, as far as it looked.
    """

    information: ClassVar[str]
    source: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    published_lookahead: ClassVar[int] = 1
    published_recall: ClassVar[tuple[float, ...]] = ()
    masks: ClassVar[bool] = False

    def __init__(self, context: PrefetchContext) -> None:
        self.num_layers, self.num_experts, self.width = context.num_layers, context.num_experts, context.width
        self.lookahead = self.published_lookahead if context.lookahead is None else context.lookahead
        self.named: list[tuple[int, int]] = []

    def wishes(self, moment: PrefetchMoment) -> list[Wish]:
        """Return absent experts to fetch, the most wanted first, at most `width`."""
        self.named = []
        self.observe(moment)
        return list(islice(self.choose(moment), self.width))

    def observe(self, moment: PrefetchMoment) -> None:  # noqa: B027 (a hook that a prefetcher may leave out)
        """Learn from the access; comes before `choose`."""

    @abstractmethod
    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield absent experts, the most wanted first; no more are taken than the width allows."""

    def layers_ahead(self, layer: int) -> range:
        """Return the layers after `layer` that the lookahead reaches."""
        return range(layer + 1, min(layer + self.lookahead, self.num_layers - 1) + 1)

    def absent(self, moment: PrefetchMoment, layer: int, experts: Iterable[int]) -> Iterator[int]:
        """Yield those of the expected experts of a layer that are not resident, and note all in `named`."""
        for expert in experts:
            self.named.append((layer, expert))
            if not moment.is_resident(layer, expert):
                yield expert


def needed(value: T | None, name: str, meaning: str) -> T:
    """Return a value of the context; raises InputError if it is not there."""
    if value is None:
        raise InputError(f"this prefetcher needs {name}: give PrefetchContext({name}=...), {meaning}")
    return value


def best_first(scores: np.ndarray, width: int) -> list[int]:
    """Return the ids of the highest positive scores, at most `width`, ties to the lower id."""
    order = np.argsort(-scores, kind="stable")[:width]
    return [int(expert) for expert in order if scores[expert] > 0]


def access_ahead(future: AccessStream, layer: int, now: int, distance: int) -> int:
    """Return the access `distance` after `now`; raises InputError unless it is of the layer so much later in the step."""
    layers, then = future.layers, now + distance
    if then >= len(layers) or layers[now] != layer or layers[then] != layer + distance:
        raise InputError(
            f"prefetch: the future does not hold layers {layer} and {layer + distance} at accesses {now} and "
            f"{then}; give the stream that is being run")
    return then


def urgency_of(priority: float) -> int:
    """Return the urgency of a priority in 0 ... 1: thousandths below 1."""
    return round((1.0 - priority) * URGENCY_STEPS)
