"""MoE-Infinity: what similar requests used in all layers that are left."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.policies.moe_infinity import _cosines
from moesim.cache.prefetchers import LookaheadBase, PrefetchMoment, Wish, urgency_of

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext

UNUSED = 1e-8  # what the repository adds, so that experts without a use come last and not never


class MoeInfinityPrefetch(LookaheadBase):
    """The experts of all later layers, by their share in similar requests and their nearness (I1).

    Xue et al., "MoE-Infinity", arXiv 2401.14361. A collection keeps activation matrices (tokens by layer and expert) of finished
    requests. The matrix of the step in progress, with its layers so far, is matched by cosine; the most similar entries
    (several, if they tie) are summed, each row divided by its sum, and expert e of layer i is fetched with priority
    ``share[i, e] (1 - (i - l) / L)``, l being the layer in progress, while the share is above zero. Ties: the nearer layer,
    then the lower expert. Urgency is the priority in thousandths, so that a later call's better wish overtakes.

    A full collection (120: enough for 290 tasks) replaces its entry most similar to the new one. It begins with the requests
    of `training`, if given, and takes in each request when the next begins (without request starts: none); while it is
    empty, the request's own matrix so far stands in. Where requests run side by side, a newcomer ends the record of the others.

    Attributes:
        stored: float64[entry, layer * expert], the collection.
    """

    information: ClassVar[str] = "I1"
    source: ClassVar[str] = "past requests"
    reads: ClassVar[tuple[str, ...]] = ("training", "training_starts")
    capacity: ClassVar[int] = 120
    training_capacity: ClassVar[int | None] = None

    def __init__(self, context: PrefetchContext) -> None:
        super().__init__(context)
        self._request = np.zeros((self.num_layers, self.num_experts))
        self.stored = np.zeros((0, self._request.size))
        for matrix in islice(_request_matrices(context), self.training_capacity):
            self.store(matrix)
        self.begin_step()

    def observe(self, moment: PrefetchMoment) -> None:
        """Count the access; a new request puts the last one into the collection."""
        if moment.request_start:
            if self._request.any():
                self.store(self._request.ravel())
            self._request[:] = 0
        if moment.layer == 0:
            self.begin_step()
        self._request[moment.layer, moment.experts] += moment.counts
        self.extend(moment)
        self._priority = self.priority(moment.layer)[moment.layer + 1:].ravel()

    def choose(self, moment: PrefetchMoment) -> Iterator[Wish]:
        """Yield the absent experts by their priority."""
        for place in np.argsort(-self._priority, kind="stable"):
            priority = float(self._priority[place])
            if priority <= 0:
                return
            ahead, expert = divmod(int(place), self.num_experts)
            layer = moment.layer + 1 + ahead
            yield from (Wish(layer, one, self.urgency(priority)) for one in self.absent(moment, layer, [expert]))

    def store(self, matrix: np.ndarray) -> None:
        """Put the matrix of a finished request, float64[layer * expert], into the collection."""
        if len(self.stored) < self.capacity:
            self.stored = np.concatenate([self.stored, matrix[None]])
        else:
            self.stored[np.argmax(_cosines(self.stored, matrix))] = matrix

    def begin_step(self) -> None:
        """Begin to match: products of each entry and the step's matrix, and squares of both, all exact integers."""
        self._dots, self._own, self._squares = np.zeros(len(self.stored)), 0.0, (self.stored**2).sum(axis=1)

    def extend(self, moment: PrefetchMoment) -> None:
        """Match one layer more."""
        counts = np.asarray(moment.counts, dtype=np.float64)
        self._dots += self.stored[:, moment.layer * self.num_experts + moment.experts] @ counts
        self._own += float(counts @ counts)

    def priority(self, layer: int) -> np.ndarray:
        """Return float64[layer, expert], the priority of each expert seen from `layer` (of later layers)."""
        predicted = self._request
        if len(self.stored):
            norms = np.sqrt(self._squares * self._own)
            similar = self._dots / np.where(norms > 0, norms, 1)
            predicted = self.stored[similar == similar.max()].sum(axis=0).reshape(self._request.shape)
        total = predicted.sum(axis=1, keepdims=True)
        share = np.divide(predicted, total, out=np.zeros_like(predicted), where=total > 0)
        return share * (1 - (np.arange(self.num_layers) - layer) / self.num_layers)[:, None]

    def urgency(self, priority: float) -> int:
        """Return the urgency of a wish."""
        return urgency_of(priority)


class MoeInfinityRepositoryPrefetch(MoeInfinityPrefetch):
    """MoE-Infinity as released (I1); see `MoeInfinityPrefetch` for what both share.

    The matrix of the whole request so far is matched, by the mean over layers of the cosines of rows, and only the layers
    after the one in progress count. The one most similar entry (ties: the first) predicts; priority is ``(tokens + 1e-8) (1 - (i
    - l) / (L + 1))``, with tokens as counted, so that busy layers and long requests come first and experts without a use
    last. Copies go in the order of each call. A full collection (1000) replaces the entry that was matched least, never one
    from `training`, of which the first 1000 requests are kept (if nothing else is there: the first entry). While it is empty
    nothing is fetched. The released code also queues the layer in progress, whose router has spoken here.
    """

    capacity: ClassVar[int] = 1000
    training_capacity: ClassVar[int | None] = 1000

    def __init__(self, context: PrefetchContext) -> None:
        self._matched: list[float] = []
        super().__init__(context)
        self._persistent = len(self.stored)

    def store(self, matrix: np.ndarray) -> None:
        """Put a matrix into the collection, in the place of the one matched least if it is full."""
        if len(self.stored) < self.capacity:
            self.stored = np.concatenate([self.stored, matrix[None]])
            self._matched.append(1.0)
        else:
            place = int(np.argmin([np.inf] * self._persistent + self._matched[self._persistent:]))
            self.stored[place], self._matched[place] = matrix, 1.0

    def begin_step(self) -> None:
        """Take the cosine of every row with the request's row; a new request has none."""
        if not self._request.any():
            rows = self.stored.reshape(-1, *self._request.shape)
            self._row_squares, self._rows = (rows**2).sum(axis=2), np.zeros(rows.shape[:2])

    def extend(self, moment: PrefetchMoment) -> None:
        """Take the cosines of the one row that has changed."""
        layer, own = moment.layer, self._request[moment.layer]
        norms = np.sqrt(self._row_squares[:, layer] * (own @ own))
        dots = self.stored[:, layer * self.num_experts: (layer + 1) * self.num_experts] @ own
        self._rows[:, layer] = dots / np.where(norms > 0, norms, 1)

    def priority(self, layer: int) -> np.ndarray:
        """Return float64[layer, expert]; counts the match."""
        shape = self._request.shape
        if not len(self.stored):
            return np.zeros(shape)
        place = int(np.argmax(self._rows[:, layer + 1:].sum(axis=1)))
        self._matched[place] += 1
        nearness = 1 - (np.arange(self.num_layers) - layer) / (self.num_layers + 1)
        return (self.stored[place].reshape(shape) + UNUSED) * nearness[:, None]

    def urgency(self, priority: float) -> int:
        """Return 0."""
        return 0


def _request_matrices(context: PrefetchContext) -> Iterator[np.ndarray]:
    """Yield float64[layer * expert], the uses by each training request, in order."""
    training, starts = context.training, context.training_starts
    if training is None:
        return
    keys, begins = training.keys(context.num_experts), np.zeros(1, dtype=np.int64)
    if starts is not None:
        begins = np.union1d(begins, np.flatnonzero(starts))
    ends = np.append(begins[1:], training.num_accesses)
    for first, last in zip(training.offsets[begins], training.offsets[ends], strict=True):
        counts = np.bincount(keys[first:last], minlength=context.num_layers * context.num_experts)
        if counts.any():
            yield counts.astype(np.float64)
