"""MoE-Infinity: what requests like this one did not use leaves, late layers before early ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.policies.scanned import ScannedPolicy

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext

EPSILON = 2.0**-20  # keeps the order of layers among experts that no matched request used


class MoeInfinityPolicy(ScannedPolicy):
    """Activation-aware eviction (Xue et al., "MoE-Infinity", arXiv 2401.14361, Algorithm 1; I1).

    The lowest ``(p[l, e] / sum(p[l]) + epsilon) (1 - l / L)`` leaves; early layers are protected, because a prefetch
    serves them least. p is the sum of the stored activation matrices (uses by layer and expert of a finished request)
    that are most similar to that of the current request, by cosine; those equally similar are summed. How many to match
    is not printed. Before a request has finished, and so always without ``PolicyContext.request_starts``, p is the current
    request's own matrix. A full collection replaces the entry most similar to the new one, as in the paper; the repository
    replaces the least accessed. An access counts each expert once, whatever its tokens. In a pool per layer, only p counts.
    Ties: the least recently used, then the lower key.
    """

    information: ClassVar[str] = "I1"
    capacity: ClassVar[int] = 120  # stored matrices; the paper finds them enough for 290 tasks

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._current = np.zeros((self.num_layers, self.num_experts))
        self._stored = np.zeros((0, self.num_keys))
        self._share: np.ndarray | None = None

    def request_started(self) -> None:
        """Store the finished request's matrix, if it has one."""
        if self._current.any():
            flat = self._current.reshape(1, -1)
            if len(self._stored) < self.capacity:
                self._stored = np.concatenate([self._stored, flat])
            else:
                self._stored[np.argmax(_cosines(self._stored, flat[0]))] = flat[0]
        self._current[:] = 0
        self._share = None

    def used(self, key: int, now: int) -> None:
        """Count the use in the current request."""
        self._current.flat[key] += 1
        self._share = None

    def score(self, key: int, now: int) -> float:
        """Return the predicted share of the layer's uses, weighted by how early the layer is."""
        if self._share is None:
            self._share = self._predicted_share()
        return (float(self._share.flat[key]) + EPSILON) * (1 - key // self.num_experts / self.num_layers)

    def _predicted_share(self) -> np.ndarray:
        predicted = self._current
        if len(self._stored):
            similar = _cosines(self._stored, self._current.ravel())
            predicted = self._stored[similar == similar.max()].sum(axis=0).reshape(self._current.shape)
        return predicted / np.maximum(predicted.sum(axis=1, keepdims=True), 1)


def _cosines(stored: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Return float64[entry], the cosine of each row with `one`; 0 where `one` is all zero."""
    norms = np.sqrt((stored**2).sum(axis=1) * (one**2).sum())
    return (stored @ one) / np.where(norms > 0, norms, 1)
