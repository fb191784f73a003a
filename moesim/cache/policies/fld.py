"""FLD: the expert whose layer comes up last leaves."""

from __future__ import annotations

from typing import ClassVar

from moesim.cache.policies.scanned import ScannedPolicy


class FldPolicy(ScannedPolicy):
    """Farthest layer distance: the fourth priority of HOBBIT alone (arXiv 2411.01433; I1).

    The expert of layer l_t with the largest ``(l_t - l_i + L) mod L`` leaves, l_i the current layer of L: the layer just
    executed goes first, the current one last. In a pool per layer all are equal, and the rule for ties makes it LRU.
    Ties: the least recently used, then the lower key.
    """

    information: ClassVar[str] = "I1"

    def score(self, key: int, now: int) -> float:
        """Return minus the layers until the expert's layer."""
        return -((key // self.num_experts - self.layer) % self.num_layers)
