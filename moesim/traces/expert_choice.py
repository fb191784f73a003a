"""Routing in which experts choose tokens, as a trace; and the share of gate weight that a rewritten trace no longer serves."""

from __future__ import annotations

import dataclasses

import numpy as np

from moesim.errors import InputError
from moesim.traces.coresets import chosen_tokens
from moesim.traces.denoise_passes import DenoisePasses
from moesim.traces.trace import DENOISE, PAD, RoutingTrace

_ROWS = 1024  # compared at a time, so that memory stays small


def expert_choice_trace(trace: RoutingTrace, passes: DenoisePasses, load: np.ndarray, scores: np.ndarray) -> RoutingTrace:
    """Return the trace with the denoising rows routed by expert choice (EC-DLM, arXiv 2604.01622).

    Every expert of every layer takes its `load` best tokens of a pass, so a token gets none, one or many experts: the
    rows are as wide as the token that got most, padded at the end, best first. Gate weights are the scores, normalised
    per token. Other rows stay as they are.

    Args:
        load: int64[step], tokens per expert (`coresets.expert_choice`).
        scores: float[token, layer, expert] over the trace's rows, not negative.

    Raises:
        InputError: scores or loads of another shape, or a load outside 1 ... tokens of its pass.
    """
    shape = trace.num_tokens, trace.num_layers, trace.num_experts
    if scores.shape != shape or not scores.min() >= 0:
        raise InputError(f"scores must be [token, layer, expert] = {shape} and not negative, got {scores.shape}")
    tokens = np.array([len(rows) for rows in passes.rows])
    if load.shape != tokens.shape or not ((load >= 1) & (load <= tokens)).all():
        raise InputError(f"expert choice: a load per pass, 1 ... its tokens, is needed, {len(tokens)} in all")
    routed = [_best_first(scores[rows], chosen_tokens(scores[rows], int(own)))
              for rows, own in zip(passes.rows, load, strict=True)]
    width = max(trace.top_k, *(ids.shape[2] for ids, _ in routed))
    new_ids = _widened(trace.expert_ids, width, PAD)
    old = np.zeros(trace.expert_ids.shape) if trace.gate_weights is None else trace.gate_weights
    weights = _widened(old.astype(np.float64), width, 0.0)
    for rows, (ids, own_weights) in zip(passes.rows, routed, strict=True):
        new_ids[rows], weights[rows] = _widened(ids, width, PAD), _widened(own_weights, width, 0.0)
    return dataclasses.replace(trace, expert_ids=new_ids, gate_weights=None if trace.gate_weights is None else weights,
                               metadata=trace.metadata | {"expert_choice": {"tokens_per_expert": load.tolist()}})


def lost_weight_share(before: RoutingTrace, after: RoutingTrace) -> float | None:
    """Return the share of the denoising rows' gate weight on experts that `after` no longer sends their tokens to.

    It measures what the rewrite takes away, not what that does to the answers. None for a trace without gate weights.

    Raises:
        InputError: traces of different tokens or layers.
    """
    if before.expert_ids.shape[:2] != after.expert_ids.shape[:2]:
        raise InputError(f"lost weight: traces of {before.expert_ids.shape[:2]} and {after.expert_ids.shape[:2]} tokens and "
                         "layers cannot be compared")
    if before.gate_weights is None:
        return None
    rows = np.flatnonzero(before.phase == DENOISE)
    lost = total = 0.0
    for part in np.array_split(rows, max(1, len(rows) // _ROWS)):
        ids, weights = before.expert_ids[part], before.gate_weights[part].astype(np.float64)
        served = (ids[..., :, None] == after.expert_ids[part][..., None, :]).any(axis=3)
        real = ids != PAD
        lost, total = lost + float(weights[real & ~served].sum()), total + float(weights[real].sum())
    return lost / total if total else 0.0


def _best_first(scores: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, weights) [token, layer, k] of a pass from float and bool[token, layer, expert]."""
    width = max(1, int(taken.sum(axis=2).max()))
    inside = np.where(taken, scores.astype(np.float64), -1.0)
    order = np.argsort(-inside, axis=2, kind="stable")[..., :width]
    best = np.take_along_axis(inside, order, 2)
    weights = np.maximum(best, 0.0)
    total = weights.sum(axis=2, keepdims=True)
    return np.where(best < 0, PAD, order).astype(np.int16), np.divide(weights, total, out=weights, where=total > 0)


def _widened(values: np.ndarray, width: int, fill: float) -> np.ndarray:
    """Return a copy of [..., k] with k = `width`, filled at the end."""
    wide = np.full((*values.shape[:-1], width), fill, values.dtype)
    wide[..., :values.shape[-1]] = values
    return wide
