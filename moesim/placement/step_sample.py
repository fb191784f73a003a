"""What a solver may look at beyond counts: token sets step by step, and the rates of compute and exchange."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError


@dataclass(frozen=True)
class StepSample:
    """Forward passes of the training part of a trace, token by token, in order of steps.

    Attributes:
        expert_ids: int16[token, layer, k], -1 padded.
        step: int64[token], rising: the pass that each token belongs to, 0 ... num_steps - 1, none empty.
        home_rank: int32[token], the rank that runs the token's attention (home-based dispatch).
    """

    expert_ids: np.ndarray
    step: np.ndarray
    home_rank: np.ndarray

    def __post_init__(self) -> None:
        num_tokens = len(self.expert_ids)
        if self.expert_ids.ndim != 3 or not num_tokens:
            raise InputError("steps: expert_ids must be [token, layer, k] with at least one token")
        if self.step.shape != (num_tokens,) or self.home_rank.shape != (num_tokens,):
            raise InputError("steps: step and home_rank must have one entry per token")
        if self.step[0] != 0 or np.any((np.diff(self.step) != 0) & (np.diff(self.step) != 1)):
            raise InputError("steps: step must rise from 0 without gaps")

    @property
    def num_steps(self) -> int:
        """Number of forward passes."""
        return int(self.step[-1]) + 1

    @property
    def starts(self) -> np.ndarray:
        """int64[num_steps + 1], the first token of each step, and the number of tokens."""
        return np.searchsorted(self.step, np.arange(self.num_steps + 1))


@dataclass(frozen=True)
class ExchangeRates:
    """Linear rates on mean counts, for execution that moves tokens from layer to layer (context-coherent).

    Attributes:
        row_s: seconds of one row (one token of one expert) on a rank.
        node_s, cluster_s: seconds that one token's activations keep a rank's port busy, to a rank of the same
            node and of another node.
        pair_weight: the part of a token that one transition pair carries (1 / k of the next layer's k).
    """

    row_s: float
    node_s: float
    cluster_s: float
    pair_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("row_s", "node_s", "cluster_s", "pair_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"rates: {name} must be finite and not negative, got {getattr(self, name)}")

    def link_s(self, num_ranks: int, ranks_per_node: int) -> np.ndarray:
        """float64[rank, rank], seconds per token between ranks; 0 on the diagonal."""
        node = np.arange(num_ranks) // ranks_per_node
        cost = np.where(node[:, None] == node[None, :], self.node_s, self.cluster_s)
        np.fill_diagonal(cost, 0.0)
        return cost
