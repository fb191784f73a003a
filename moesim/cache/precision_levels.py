"""D2MoE's bit level of each (token, expert), from a stated capacity: the trained bit router is not in a trace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.errors import InputError
from moesim.traces.trace import PAD, RoutingTrace

CAPACITY = (0.3, 0.4, 0.3)  # of INT2, INT3, INT4 (arXiv 2504.15299, training of the bit router)
HOW = ("rank", "draw")
_ROUNDING = 2.0**-30


def bit_levels(trace: RoutingTrace, capacity: Sequence[float] = CAPACITY, *, by: str = "rank", seed: int = 0) -> np.ndarray:
    """Return int8[token, layer, k], the level of every choice of a trace; -1 where padded. A what-if, not a measurement.

    The paper's router is trained to give each width a share of the choices (`capacity`, the narrowest first); which choice gets which
    is not in a trace. ``rank``: in each layer the choices of the lowest gate weight get the narrowest width, and so on
    (ties: the earlier choice is narrower). ``draw``: at random by `seed`.

    Raises:
        InputError: shares that are negative or do not sum to 1, another `by`, or ranks without gate weights.
    """
    shares = np.asarray(capacity, np.float64)
    if shares.ndim != 1 or not len(shares) or shares.min() < 0 or abs(shares.sum() - 1) > _ROUNDING:
        raise InputError(f"bit levels: capacity must be shares that sum to 1, got {list(capacity)}")
    if by not in HOW:
        raise InputError(f"bit levels: by must be one of {', '.join(HOW)}, got {by!r}")
    if by == "rank" and trace.gate_weights is None:
        raise InputError("bit levels: the trace has no gate weights to rank by; use by='draw'")
    levels = np.full(trace.expert_ids.shape, PAD, np.int8)
    rng = np.random.default_rng(seed)
    for layer in range(trace.num_layers):
        chosen = trace.expert_ids[:, layer] != PAD
        scores = rng.random(int(chosen.sum())) if by == "draw" else _weights(trace, layer)[chosen]
        levels[:, layer][chosen] = _by_rank(scores, shares) if by == "rank" else _by_draw(scores, shares)
    return levels


def level_counts(expert_ids: np.ndarray, levels: np.ndarray, num_experts: int, num_levels: int) -> np.ndarray:
    """Return int64[expert, level], B of the paper: the choices of each expert at each level, from [token, k] of one access."""
    chosen = expert_ids != PAD
    cells = expert_ids[chosen].astype(np.int64) * num_levels + levels[chosen]
    return np.bincount(cells, minlength=num_experts * num_levels).reshape(num_experts, num_levels)


def _weights(trace: RoutingTrace, layer: int) -> np.ndarray:
    assert trace.gate_weights is not None
    return trace.gate_weights[:, layer]


def _by_rank(scores: np.ndarray, shares: np.ndarray) -> np.ndarray:
    rank = np.empty(len(scores), np.int64)
    rank[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    ends = np.rint(np.cumsum(shares) * len(scores))[:-1]
    return np.searchsorted(ends, rank, side="right").astype(np.int8)


def _by_draw(uniform: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(shares)[:-1], uniform, side="right").astype(np.int8)
