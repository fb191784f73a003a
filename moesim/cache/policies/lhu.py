"""LHU: the expert with the fewest high-precision uses in this sequence leaves."""

from __future__ import annotations

from typing import ClassVar

from moesim.cache.policies.hobbit import HobbitPolicy, HobbitWeights


class LhuPolicy(HobbitPolicy):
    """Least high-precision-used: the third priority of HOBBIT alone (arXiv 2411.01433; I2); see `HobbitPolicy`.

    Without ``PolicyContext.scores`` every use is of high precision, which leaves LFU within a request.
    """

    weights: ClassVar[HobbitWeights] = HobbitWeights(0.0, 0.0, 1.0, 0.0)
