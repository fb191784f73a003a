"""HOBBIT's token-level choice of an expert's width: how much gate weight is ranked before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cache.precision import ABSENT_LEVEL, ExpertVersions, Quantization, exclusive_versions
from moesim.errors import InputError
from moesim.model.spec import ModelSpec
from moesim.traces.trace import PAD, RoutingTrace

LOW, HIGH = 0, 1  # levels of the versions
SKIP = ABSENT_LEVEL
NOT_CHOSEN = -2


@dataclass(frozen=True)
class HobbitPrecision:
    """Which version of a missing expert to load (Tang et al., "HOBBIT", arXiv 2411.01433, token-level dynamic loading).

    The chosen experts of a token are sorted by gate weight, normalised to 1. The unimportance of each is the sum of the
    weights ranked before it, 0 for the first. An expert of at most `t1` needs the high width, of at most `t2` the low one, above
    it none (it is skipped). Equal weights are ranked by expert id. The paper runs one token at a time; where several
    tokens of a step choose an expert, the strictest need of any of them counts (our rule).

    Raises:
        InputError: thresholds that are not 0 <= t1 <= t2, or a low width that is not below the high one.
    """

    t1: float = 0.6
    t2: float = 0.9
    high_bits: int = 16
    low_bits: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.t1 <= self.t2:
            raise InputError(f"hobbit: needs 0 <= t1 <= t2, got t1 {self.t1} and t2 {self.t2}")
        if not 1 <= self.low_bits < self.high_bits:
            raise InputError(f"hobbit: low_bits must be below high_bits, got {self.low_bits} and {self.high_bits}")

    def versions(self, model: ModelSpec, how: Quantization | None = None) -> ExpertVersions:
        """Return the two copies of every expert; level 0 is low, 1 is high."""
        return exclusive_versions(model, (self.low_bits, self.high_bits), how)

    def token_needs(self, expert_ids: np.ndarray, gate_weights: np.ndarray) -> np.ndarray:
        """Return int8[token, k]: the level that each chosen expert needs, `SKIP`, or `NOT_CHOSEN` where padded.

        Args:
            expert_ids, gate_weights: [token, k].
        """
        padded = expert_ids == PAD
        weights = np.where(padded, 0.0, np.asarray(gate_weights, np.float64))
        order = np.lexsort((expert_ids, np.where(padded, np.inf, -weights)), axis=-1)
        ranked = np.take_along_axis(weights, order, axis=-1)
        total = ranked.sum(axis=-1, keepdims=True)
        before = np.zeros_like(ranked)
        before[:, 1:] = np.cumsum(ranked, axis=-1)[:, :-1]
        before /= np.where(total > 0, total, 1.0)
        need = np.where(before <= self.t1, HIGH, np.where(before <= self.t2, LOW, SKIP)).astype(np.int8)
        found = np.empty_like(need)
        np.put_along_axis(found, order, need, axis=-1)
        found[padded] = NOT_CHOSEN
        return found

    def needs(self, expert_ids: np.ndarray, gate_weights: np.ndarray, num_experts: int) -> np.ndarray:
        """Return int8[expert]: the strictest need of any token; `NOT_CHOSEN` for experts that no token chose."""
        strictest = np.full(num_experts + 1, NOT_CHOSEN, np.int8)  # padding, -1: the last
        np.maximum.at(strictest, expert_ids.ravel().astype(np.int64), self.token_needs(expert_ids, gate_weights).ravel())
        return strictest[:-1]

    def need_shares(self, trace: RoutingTrace) -> dict[str, float]:
        """Return the shares of a trace's choices, token by token, that need high, low and nothing.

        The paper's Mixtral trace has 67, 30 and 3 % (t1 0.6, t2 0.9). With top-2 the first is always high.
        """
        if trace.gate_weights is None:
            raise InputError("hobbit: the trace has no gate weights, by which it chooses widths")
        flat = trace.expert_ids.reshape(-1, trace.top_k), trace.gate_weights.reshape(-1, trace.top_k)
        found = np.bincount(self.token_needs(*flat).ravel() - NOT_CHOSEN, minlength=4)[1:]
        return dict(zip(("skipped", "low", "high"), (found / found.sum()).tolist(), strict=True))


def miss_penalty(high_loads: int, low_loads: int, versions: ExpertVersions) -> float:
    """Return the loads of a run in loads of the high version: a low one counts B_low / B_high (the paper's miss penalty, C = 1)."""
    return high_loads + low_loads * versions.weight_bytes(LOW) / versions.weight_bytes(HIGH)
