"""HOBBIT's weighted sum of four priorities; LHU and FLD are two of them alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple

from moesim.cache.policies.scanned import ScannedPolicy

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext

HIGH_PRECISION_UP_TO = 0.6  # T1 for Mixtral


class HobbitWeights(NamedTuple):
    """The weights of the four priorities; they sum to 1. The paper fits them and prints none: these are equal."""

    recency: float = 0.25
    frequency: float = 0.25
    high_precision: float = 0.25
    distance: float = 0.25


class HobbitPolicy(ScannedPolicy):
    """The lowest weighted sum leaves (Tang et al., "HOBBIT", arXiv 2411.01433, multidimensional caching; I2).

    ``p = w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - ((l_t - l_i + L) mod L) / L)``: T the number of the current token in
    its sequence (from 1), R the number of the token that used the expert last (0: none), F and H its uses and
    high-precision uses in the sequence, l_t the expert's layer, l_i the current one, of L. All records begin anew with a
    request, if ``PolicyContext.request_starts`` says where. A layer's accesses are its tokens, so that T is told by each
    layer alone. An expert that enters counts as used then in R.

    H needs ``PolicyContext.scores``: a use is of high precision if the normalised weights ranked before it sum to at most
    T1 = 0.6. Without scores every use is taken as one, and H is F. Experts here have one precision, in one pool (both: `lowering.precision.hobbit`); the
    paper has a pool for each of two. Ties: the least recently used, then the lower key.
    """

    information: ClassVar[str] = "I2"
    weights: ClassVar[HobbitWeights] = HobbitWeights()

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._scores = context.scores
        self.request_started()

    def request_started(self) -> None:
        """Forget all records."""
        self._token = [0] * self.num_layers
        self._used_by = [0] * self.num_keys
        self._uses = [0] * self.num_keys
        self._high_uses = [0] * self.num_keys

    def access_started(self, layer: int, now: int) -> None:
        """Count the token, and find which experts it uses in high precision."""
        self._token[layer] += 1
        if self._scores is not None:
            self._high = self._scores.important(now, HIGH_PRECISION_UP_TO)

    def used(self, key: int, now: int) -> None:
        """Record the use."""
        layer, expert = divmod(key, self.num_experts)
        self._used_by[key] = self._token[layer]
        self._uses[key] += 1
        self._high_uses[key] += self._scores is None or expert in self._high

    def insert(self, key: int, now: int) -> None:
        """Count the entry as a use in R."""
        super().insert(key, now)
        self._used_by[key] = self._token[key // self.num_experts]

    def score(self, key: int, now: int) -> float:
        """Return the weighted sum times T L: the same for all candidates, and exact for the weights given."""
        weights, ahead = self.weights, (key // self.num_experts - self.layer) % self.num_layers
        records = (weights.recency * self._used_by[key] + weights.frequency * self._uses[key]
                   + weights.high_precision * self._high_uses[key])
        near = weights.distance * (self.num_layers - ahead)
        return records * self.num_layers + max(self._token[self.layer], 1) * near
