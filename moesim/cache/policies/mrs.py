"""MRS: experts that the router has scored low of late leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from moesim.cache.policies.scanned import ScannedPolicy

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext

AVERAGING = 0.5


class MrsPolicy(ScannedPolicy):
    """Minus recent score (Zhong et al., "HybriMoE", arXiv 2504.05897, DAC 2025, score-aware caching; I2).

    At every access of a layer, ``S <- a TopP(s) + (1 - a) S`` over all its experts; TopP keeps the p largest scores, the
    others count 0. The lowest S leaves. a = 0.5 and p = 2 top_k are the repository's; the paper prints no others. Of an
    access of several tokens the mean of the score rows is taken; the repository takes the first row only:
    `MrsRepositoryPolicy`. Equal scores at the edge of TopP: the lower expert counts.

    Without ``PolicyContext.scores`` a used expert counts 1 and another 0: an average of use, not of scores, under which
    experts that almost entered gain nothing. Ties: the least recently used, then the lower key.
    """

    information: ClassVar[str] = "I2"
    first_row_only: ClassVar[bool] = False

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._scores = context.scores
        self._recent = np.zeros((self.num_layers, self.num_experts))

    def access_started(self, layer: int, now: int) -> None:
        """Average the layer's scores."""
        self._recent[layer] *= 1 - AVERAGING
        if self._scores is not None:
            row = (self._scores.first if self.first_row_only else self._scores.mean)[now]
            top = np.argsort(-row, kind="stable")[: 2 * self._scores.top_k]
            self._recent[layer, top] += AVERAGING * row[top]

    def used(self, key: int, now: int) -> None:
        """Without scores, count the use."""
        if self._scores is None:
            self._recent.flat[key] += AVERAGING

    def score(self, key: int, now: int) -> float:
        """Return the average of recent scores."""
        return float(self._recent.flat[key])


class MrsRepositoryPolicy(MrsPolicy):
    """MRS as HybriMoE's repository feeds it: the first row of an access's scores stands for all (I2); see `MrsPolicy`.

    The two differ only where an access has several tokens, as in prefill or a batch.
    """

    first_row_only: ClassVar[bool] = True
