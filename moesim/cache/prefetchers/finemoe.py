"""FineMoE: the router scores of the most similar earlier step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.prefetchers import LookaheadBase, PrefetchMoment, Wish, needed, urgency_of
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext
    from moesim.cache.scores import RouterScores


class FineMoePrefetch(LookaheadBase):
    """The likeliest experts of the layer `lookahead` (6) later, in the most similar earlier step (I2).

    Yu et al., "Taming latency-memory trade-off in MoE-based LLM serving via fine-grained expert offloading", arXiv 2502.05370,
    EuroSys 2026. A map is a step's router probabilities, [layer, expert]. In layer l the stored map is taken whose layers up
    to l are most similar by cosine; of its layer l + d the most probable experts are named until their mass reaches
    ``clip(1 - cosine, 0, 1)``, but at least top_k. What was named and is absent stays wanted until its layer; at each layer the
    order is by ``p / (layer - l)`` (ties: the nearer layer, then the lower expert), and urgency is that in thousandths. The
    released code computes the same. A finished step's map is stored; a full store (1000) replaces the most similar map.

    Left out: the search by the prompt's embedding, which serves the first d layers (here nothing is fetched for them) and
    has its share in the replacement. Of a step of several tokens the mean of their probabilities is one map; the published
    system keeps one per token. Needs the scores of all experts (a trace's gate weights are not enough).

    Raises:
        InputError: no scores, or only those of the chosen experts.
    """

    information: ClassVar[str] = "I2"
    source: ClassVar[str] = "past scores"
    reads: ClassVar[tuple[str, ...]] = ("scores", "training_scores")
    published_lookahead: ClassVar[int] = 6
    capacity: ClassVar[int] = 1000

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self._scores = needed(context.scores, "scores", "the RouterScores of the run, of all experts")
        _check_all_experts(self._scores)
        self.store = MapStore(self.capacity, self.num_layers, self.num_experts)
        if context.training_scores is not None:
            for probabilities in context.training_scores.mean.reshape(-1, self.num_layers, self.num_experts):
                self.store.add(_shares(probabilities))
        self._map = np.zeros((self.num_layers, self.num_experts))
        self._pending: dict[tuple[int, int], float] = {}

    def observe(self, moment: PrefetchMoment) -> None:
        """Go on with this step's map, name experts by the closest one, and store it when it is whole."""
        layer = moment.layer
        if layer == 0:
            self._pending = {}
            self.store.begin()
        self._map[layer] = _shares(self._scores.mean[moment.now])
        self.store.extend(layer, self._map[layer])
        if layer + self.lookahead < self.num_layers and self.store.size:
            self._name(layer + self.lookahead, *self.store.closest())
        if layer + 1 == self.num_layers:
            self.store.add(self._map)

    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield what is wanted, by probability and nearness."""
        ranked = sorted((-share / (layer - moment.layer), layer, expert)
                        for (layer, expert), share in self._pending.items() if layer > moment.layer)
        for priority, layer, expert in ranked:
            yield from (Wish(layer, one, urgency_of(-priority)) for one in self.absent(moment, layer, [expert]))

    def _name(self, layer: int, cosine: float, place: int) -> None:
        share = self.store.maps[place, layer]
        order = np.argsort(-share, kind="stable")
        short = int((np.cumsum(share[order]) < np.clip(1 - cosine, 0, 1)).sum())
        count = max(self._scores.top_k, short + 1)
        self._pending |= {(layer, expert): float(share[expert]) for expert in order[:count].tolist()}


class MapStore:
    """Maps of finished steps, and how similar each is to the step in progress.

    Attributes:
        maps: float64[map, layer, expert], probabilities; the first `size` are filled.
    """

    def __init__(self, capacity: int, num_layers: int, num_experts: int) -> None:
        self.size, self._capacity = 0, capacity
        self.maps = np.zeros((min(capacity, 1), num_layers, num_experts))
        self.begin()

    def begin(self) -> None:
        """Begin a step."""
        self._dots, self._norms, self._own = np.zeros(self.size), np.zeros(self.size), 0.0

    def extend(self, layer: int, probabilities: np.ndarray) -> None:
        """Add the next layer of the step, float64[expert]."""
        rows = self.maps[: self.size, layer]
        self._dots += rows @ probabilities
        self._norms += (rows**2).sum(axis=1)
        self._own += float(probabilities @ probabilities)

    def closest(self) -> tuple[float, int]:
        """Return the largest cosine with the step's layers so far, and whose it is (the first, if several)."""
        norms = np.sqrt(self._norms * self._own)
        cosines = self._dots / np.where(norms > 0, norms, 1)
        place = int(np.argmax(cosines))
        return float(cosines[place]), place

    def add(self, probabilities: np.ndarray) -> None:
        """Store a whole map, float64[layer, expert]; if there is no room, in the place of the most similar one."""
        if self.size == self._capacity:
            self.maps[self._most_similar(probabilities)] = probabilities
            return
        if self.size == len(self.maps):
            grown = np.zeros((min(2 * self.size, self._capacity), *self.maps.shape[1:]))
            grown[: self.size] = self.maps
            self.maps = grown
        self.maps[self.size] = probabilities
        self.size += 1

    def _most_similar(self, probabilities: np.ndarray) -> int:
        flat = self.maps[: self.size].reshape(self.size, -1)
        norms = np.sqrt((flat**2).sum(axis=1) * (probabilities**2).sum())
        return int(np.argmax(flat @ probabilities.ravel() / np.where(norms > 0, norms, 1)))


def _shares(scores: np.ndarray) -> np.ndarray:
    """Return scores whose rows sum to one (rows of zeros stay)."""
    total = scores.sum(axis=-1, keepdims=True)
    return scores / np.where(total > 0, total, 1)


def _check_all_experts(scores: RouterScores) -> None:
    scored = int((scores.first > 0).sum(axis=1).max(initial=0))
    if scored <= scores.top_k < scores.first.shape[1]:
        raise InputError(
            f"finemoe: the scores are those of the {scores.top_k} chosen experts only, but it needs the router's "
            f"probabilities of all {scores.first.shape[1]}: capture them, and give router_scores(trace, steps, scores)")
