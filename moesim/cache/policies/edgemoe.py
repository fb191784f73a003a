"""EdgeMoE: few uses, and a layer that comes up late, send an expert away."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moesim.cache.policies.scanned import ScannedPolicy

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext


class EdgeMoePolicy(ScannedPolicy):
    """Frequency over layer distance (Yi et al., "EdgeMoE", arXiv 2308.14352, IEEE TMC 2025, cache eviction; I1).

    The lowest f / d leaves: f the uses since the beginning of the run, d the layers until expert's layer i comes up after
    the current layer I, ``d = (i - I) mod S`` with 0 taken as S, of S MoE layers. This is the text ("evict experts whose
    layers are farther from the current block"). The formula as printed has ``d = (S - i + I) mod S``, which protects
    the layer just executed: `EdgeMoePrintedPolicy`. Made for one pool for all layers; in a pool per layer d is the same
    for all, which leaves LFU. Ties: the least recently used, then the lower key.
    """

    as_printed: ClassVar[bool] = False

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._count = [0] * self.num_keys

    def used(self, key: int, now: int) -> None:
        """Count one use of `key`."""
        self._count[key] += 1

    def score(self, key: int, now: int) -> float:
        """Return uses per layer of distance."""
        ahead = key // self.num_experts - self.layer
        distance = (-ahead if self.as_printed else ahead) % self.num_layers
        return self._count[key] / (distance or self.num_layers)


class EdgeMoePrintedPolicy(EdgeMoePolicy):
    """EdgeMoE's formula as it is printed, against its text; see `EdgeMoePolicy`. Its 0 is taken as S too."""

    as_printed: ClassVar[bool] = True
