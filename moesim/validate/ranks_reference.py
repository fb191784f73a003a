"""The same model in one process, without ranks, slots or exchanges: what a run over ranks must compute.

It shares the kernels and the weights with `ranks_world` and nothing of how tokens find their experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.calibrate.kernels import expert_ffn, router_topk
from moesim.errors import CheckError
from moesim.traces.steps import Step
from moesim.traces.trace import PAD, RoutingTrace
from moesim.validate.ranks_world import EMBEDDINGS, RankWeights, normalised, one_thread

if TYPE_CHECKING:
    import torch

# relative and absolute: the sums of a token's experts are taken in another order
TOLERANCES = {"float32": (1e-4, 1e-4), "bfloat16": (3e-2, 3e-2), "float16": (1e-2, 1e-2)}


def reference_outputs(
    weights: RankWeights, trace: RoutingTrace, steps: Sequence[Step], home: np.ndarray
) -> list[torch.Tensor]:
    """Return each step's hidden rows after the last layer, [token, hidden] in the order of its rows.

    `home` int32[row of the trace]: tokens of one home rank are one batch of attention (each attends to its batch's mean
    context), which the plan does not change.
    """
    import torch

    rows = np.concatenate([step.rows for step in steps])
    groups = _attention_groups(trace, steps, home)
    hidden = weights.embedding[torch.from_numpy(rows % EMBEDDINGS).to(weights.device)]
    with one_thread():
        for layer in range(weights.model.num_moe_layers):
            hidden = _attend(weights, layer, hidden, groups)
            hidden = hidden + _experts(weights, layer, normalised(hidden), trace.expert_ids[rows, layer])
    return list(torch.split(hidden, [len(step.rows) for step in steps]))


def _attention_groups(trace: RoutingTrace, steps: Sequence[Step], home: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Return (places among all rows, context) for each step and home rank."""
    groups, first = [], 0
    for step in steps:
        for rank in np.unique(home[step.rows]):
            own = np.flatnonzero(home[step.rows] == rank)
            groups.append((first + own, int(np.sum(trace.position[step.rows[own]] + 1))))
        first += len(step.rows)
    return groups


def _attend(weights: RankWeights, layer: int, hidden: Any, groups: Sequence[tuple[np.ndarray, int]]) -> Any:
    import torch

    after = torch.empty_like(hidden)
    for places, context in groups:
        own = torch.from_numpy(places).to(weights.device)
        after[own] = hidden[own] + weights.attention[layer].forward(normalised(hidden[own]), context)
    return after


def _experts(weights: RankWeights, layer: int, seen: Any, expert_ids: np.ndarray) -> Any:
    """Every expert in turn over all tokens that name it; int16[token, k], -1 pads."""
    import torch

    model = weights.model
    gates = router_topk(seen, weights.routers[layer], model.top_k)
    ids = torch.from_numpy(expert_ids.astype(np.int64)).to(weights.device)
    total = torch.zeros_like(seen)
    for expert in np.unique(expert_ids[expert_ids != PAD]).tolist():
        gate = (gates * (ids == expert)).sum(dim=1)
        token = (ids == expert).any(dim=1).nonzero()[:, 0]
        out = expert_ffn(seen[token], weights.expert(layer, expert), model.hidden_size, model.expert_intermediate_size)
        total[token] += out * gate[token, None].to(out.dtype)
    return total


def check_outputs(expected: np.ndarray, found: np.ndarray, dtype: str, where: str) -> None:
    """Raise CheckError unless every value agrees within `TOLERANCES` of the dtype."""
    relative, absolute = TOLERANCES[dtype]
    if expected.shape != found.shape:
        raise CheckError(f"{where}: outputs have shape {found.shape}, the single process has {expected.shape}")
    wrong = ~np.isclose(found, expected, rtol=relative, atol=absolute)
    if wrong.any():
        tokens = np.flatnonzero(wrong.any(axis=1))
        raise CheckError(f"{where}: {len(tokens)} of {len(expected)} tokens differ from the single process, the first is token "
                         f"{tokens[0]}; the largest difference is {np.abs(found - expected).max():.3g}")
