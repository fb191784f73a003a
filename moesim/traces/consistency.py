"""Local routing consistency: how well a router of whole segments could stand in for the router of tokens (SRP).

Liang et al., "Not All Models Suit Expert Offloading: On Local Routing Consistency of MoE Models", arXiv 2505.16056, and
its code. Over all windows of m tokens of all requests (stride 1), a predictor switches an expert on for a whole window
if it is used at least alpha times there, with one alpha for a group of experts; SRP is the best F1 of such a predictor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, unknown
from moesim.traces.trace import RoutingTrace

GROUPS = ("expert", "layer", "model")


@dataclass(frozen=True)
class SegmentRouting:
    """SRP(E, m) of groups of experts; every array has one entry per group: [layer, expert], [layer] or [] (model).

    Attributes:
        window_tokens, group: m, and what a group is: one expert, a layer, or the whole model.
        num_windows: windows looked at.
        srp: float64, the best F1, ``max over alpha of 2 sum(f, f >= alpha) / (m #{f >= alpha} + sum(f))``, f the uses of an
            expert in a window; nan for a group that is never used in one.
        threshold: int64, the lowest alpha that reaches it, 0 ... m; 0 switches on always.
        relative_size: float64, rho-hat: ``m #{f >= threshold} / sum(f)``, how many experts the segment router switches on
            for each that a token uses; nan as `srp`.
        active_share: float64, uses per token and expert.
    """

    window_tokens: int
    group: str
    num_windows: int
    srp: np.ndarray
    threshold: np.ndarray
    relative_size: np.ndarray
    active_share: np.ndarray

    def __post_init__(self) -> None:
        for name in ("srp", "threshold", "relative_size", "active_share"):
            array = np.array(getattr(self, name))
            array.setflags(write=False)
            object.__setattr__(self, name, array)


def segment_routing(trace: RoutingTrace, window_tokens: int, group: str = "model") -> SegmentRouting:
    """Return SRP of each group of experts over windows of `window_tokens`.

    Tokens of a request follow each other in the order of the trace; no window spans two requests, and requests shorter
    than a window have none. Padding (-1) is no use. The authors' windows are powers of 2; here any length will do. Their
    confidence intervals (bootstrap over samples) are not computed.

    Raises:
        InputError: a window below one token, no request as long as a window, or an unknown group.
    """
    if group not in GROUPS:
        raise unknown("group of experts", group, GROUPS)
    histogram, num_windows = _window_histograms(trace, window_tokens)
    axes = {"expert": (), "layer": (1,), "model": (0, 1)}[group]
    return _best_threshold(histogram.sum(axis=axes), window_tokens, group, num_windows)


def segment_routings(trace: RoutingTrace, window_tokens: int) -> dict[str, SegmentRouting]:
    """Return `segment_routing` of every kind of group, counted once."""
    histogram, num_windows = _window_histograms(trace, window_tokens)
    summed = {"expert": histogram, "layer": histogram.sum(axis=1), "model": histogram.sum(axis=(0, 1))}
    return {group: _best_threshold(summed[group], window_tokens, group, num_windows) for group in GROUPS}


def _window_histograms(trace: RoutingTrace, window_tokens: int) -> tuple[np.ndarray, int]:
    """Return int64[layer, expert, uses], the windows in which an expert has so many uses, and their number."""
    from moesim.traces.kernels.consistency import window_histograms

    if window_tokens < 1:
        raise InputError(f"segment routing: the window must be at least 1 token, got {window_tokens}")
    order = np.argsort(trace.request_id, kind="stable")
    lengths = np.unique(trace.request_id, return_counts=True)[1].astype(np.int64)
    num_windows = int(np.maximum(lengths - window_tokens + 1, 0).sum())
    if not num_windows:
        raise InputError(f"segment routing: the longest request has {lengths.max()} tokens, fewer than the window of "
                         f"{window_tokens}")
    histogram = np.zeros((trace.num_layers, trace.num_experts, window_tokens + 1), np.int64)
    window_histograms(trace.expert_ids[order], np.concatenate([[0], np.cumsum(lengths)]), window_tokens, histogram)
    return histogram, num_windows


def _best_threshold(histogram: np.ndarray, window_tokens: int, group: str, num_windows: int) -> SegmentRouting:
    """Return the best F1 of each group; `histogram` is int64[..., uses], windows of all its experts together."""
    uses = histogram * np.arange(window_tokens + 1)
    matches = _sums_from(uses)
    switched_on = _sums_from(histogram) * window_tokens
    all_uses = matches[..., :1]
    f1 = 2 * matches / np.maximum(switched_on + all_uses, 1)
    best = np.argmax(f1, axis=-1, keepdims=True)
    never = all_uses[..., 0] == 0
    size = np.take_along_axis(switched_on, best, axis=-1)[..., 0] / np.maximum(all_uses[..., 0], 1)
    return SegmentRouting(
        window_tokens, group, num_windows,
        srp=np.where(never, np.nan, np.take_along_axis(f1, best, axis=-1)[..., 0]), threshold=best[..., 0],
        relative_size=np.where(never, np.nan, size), active_share=all_uses[..., 0] / switched_on[..., 0])


def _sums_from(values: np.ndarray) -> np.ndarray:
    """Return, along the last axis, the sum of each entry and all after it."""
    return np.flip(np.cumsum(np.flip(values, axis=-1), axis=-1), axis=-1)
