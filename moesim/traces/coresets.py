"""Fewer distinct experts per pass: routing of a diffusion language model rewritten to a coreset that its tokens share.

A rewrite changes what the model computes. What it costs in accuracy is looked up in the published tables (`PUBLISHED`)
and never estimated: for another model or setting it is unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moesim.errors import InputError, unknown
from moesim.traces.denoise_passes import DenoisePasses
from moesim.traces.trace import PAD, RoutingTrace

CAPACITY_SCHEDULES = ("static", "linear-reverse", "linear")
DES, DMOE, EC = "DES, arXiv 2602.00879, table 1", "dMoE, arXiv 2605.30876", "EC-DLM, arXiv 2604.01622, retrofit of LLaDA-MoE"


class Published(NamedTuple):
    """One row of a published table.

    `unique_experts` per layer and pass and `relative_accuracy` (1: the unchanged model's) as printed; `setting` is top-k'
    of DES-Seq, beta of DES-Vote, p of dMoE, experts per token of expert choice with capacities 2 ... 14 (its unique experts
    are all, by construction). The accuracies of dMoE and of expert choice need weights that were trained further.
    """

    method: str
    setting: float
    model: str
    unique_experts: float
    relative_accuracy: float
    source: str


PUBLISHED = (
    Published("none", 0, "llada2.0-mini", 84, 1.0, DES),
    Published("des-seq", 3, "llada2.0-mini", 45, 0.972, DES),
    Published("des-seq", 2, "llada2.0-mini", 34, 0.957, DES),
    Published("des-vote", 0.15, "llada2.0-mini", 38, 0.995, DES),
    Published("des-vote", 0.10, "llada2.0-mini", 25, 0.964, DES),
    Published("none", 0, "llada-moe-7b-a1b", 59, 1.0, DES),
    Published("des-seq", 3, "llada-moe-7b-a1b", 42, 0.969, DES),
    Published("des-seq", 2, "llada-moe-7b-a1b", 34, 0.954, DES),
    Published("des-vote", 0.6, "llada-moe-7b-a1b", 38, 0.976, DES),
    Published("des-vote", 0.4, "llada-moe-7b-a1b", 25, 0.960, DES),
    # the mean over MATH500, GSM8K, ARC-C and MMLU of 16.3, 16.6, 16.9 and 16.5 experts
    Published("dmoe", 0.6, "llada2.0-mini", 16.575, 0.9955, DMOE),
    # accuracies 52.6 (token choice), 53.6 and 54.9
    Published("expert-choice-static", 8, "llada-moe-7b-a1b", 64, 53.6 / 52.6, EC),
    Published("expert-choice-linear-reverse", 8, "llada-moe-7b-a1b", 64, 54.9 / 52.6, EC),
)


def published_debit(method: str, setting: float, model: str) -> Published | None:
    """Return the published row of exactly this method, setting and model, None where there is none."""
    return next((row for row in PUBLISHED if row[:3] == (method, setting, model)), None)


def expected_union(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Return the distinct experts of independent, uniform tokens, ``M (1 - (1 - K / M)^N)``.

    It is what a pass uses if its tokens have nothing in common; any common preference makes it less (DES, arXiv 2602.00879).

    Raises:
        InputError: sizes out of range.
    """
    if not 1 <= top_k <= num_experts or num_tokens < 0:
        raise InputError(f"expected union: top_k must be in 1 ... {num_experts} and tokens not negative, got "
                         f"{top_k} and {num_tokens}")
    return num_experts * (1.0 - (1.0 - top_k / num_experts) ** num_tokens)


def des_seq(trace: RoutingTrace, passes: DenoisePasses, keep: int, *, scores: np.ndarray | None = None) -> RoutingTrace:
    """Return the trace with each pass confined to the union of its tokens' `keep` best experts (DES-Seq).

    Args:
        scores: float[token, layer, expert], router scores of all experts (not negative). With them every token takes its
            top-k inside the coreset, gate weights normalised. Without them it keeps those of its recorded experts that
            are in the coreset, and the places that the method would fill with others stay empty: the experts
            in use are the same, their loads too low. ``metadata["coreset"]`` says which share of the places that is.

    Raises:
        InputError: `keep` outside 1 ... top-k, or scores of another shape.
    """
    if not 1 <= keep <= trace.top_k:
        raise InputError(f"DES-Seq: keep must be in 1 ... {trace.top_k} (the trace's top-k), got {keep}")
    coresets = [_one_hot(trace.expert_ids[rows][..., :keep], trace.num_experts) for rows in passes.rows]
    return _confine(trace, passes, coresets, scores)


def des_vote(trace: RoutingTrace, passes: DenoisePasses, beta: float, *, scores: np.ndarray | None = None) -> RoutingTrace:
    """Return the trace with each pass confined to the ``floor(beta * experts)`` experts with most votes (DES-Vote).

    A token votes with its router scores, all but its top-k set to zero: the scores if they are given, else the
    recorded gate weights (the same up to a factor per token). Ties go to the lower id. `scores` as in `des_seq`; without
    them a token may be left with no expert.

    Raises:
        InputError: beta outside (0, 1], a coreset smaller than top-k, or neither scores nor weights.
    """
    size = int(beta * trace.num_experts) if 0 < beta <= 1 else 0
    if size < trace.top_k:
        raise InputError(f"DES-Vote: beta {beta} of {trace.num_experts} experts must leave at least top-k {trace.top_k}")
    coresets = [_first(votes, np.arange(trace.num_experts) < size) for votes in _votes(trace, passes, scores)]
    return _confine(trace, passes, coresets, scores)


def dmoe(trace: RoutingTrace, passes: DenoisePasses, mass: float, *, scores: np.ndarray | None = None) -> RoutingTrace:
    """Return the trace with each pass confined to the fewest experts that hold a share `mass` of its votes (dMoE).

    Votes as in `des_vote`, summed over the pass and normalised; at least top-k experts are kept. dMoE fine-tunes the
    model for this (arXiv 2605.30876); the routing here is that of the model that was recorded.

    Raises:
        InputError: mass outside (0, 1], or neither scores nor weights.
    """
    if not 0 < mass <= 1:
        raise InputError(f"dMoE: mass must lie in (0, 1], got {mass}")

    coresets = []
    for votes in _votes(trace, passes, scores):
        ranked = np.sort(votes, axis=1)[:, ::-1]
        before = np.cumsum(ranked, axis=1) - ranked
        few = before < mass * votes.sum(axis=1, keepdims=True)
        coresets.append(_first(votes, few | (np.arange(trace.num_experts) < trace.top_k)))
    return _confine(trace, passes, coresets, scores)


def expert_capacity(masked: np.ndarray, schedule: str = "linear-reverse", *, least: float = 2.0,
                    most: float = 14.0) -> np.ndarray:
    """Return float64[step], experts per token when a share `masked` of the block is masked (EC-DLM, arXiv 2604.01622).

    ``k(r) = least + (most - least) s(r)``, with s = 1 - r for ``linear-reverse`` (the best of the paper's: more
    experts when little is masked), r for ``linear``, 1/2 for ``static``. The paper's cosine and Gaussian schedules, which
    did worse, are left out.

    Raises:
        InputError: an unknown schedule, shares outside 0 ... 1, or ``most`` below ``least``.
    """
    if schedule not in CAPACITY_SCHEDULES:
        raise unknown("capacity schedule", schedule, CAPACITY_SCHEDULES)
    ratio = np.asarray(masked, np.float64)
    if ratio.size and not (ratio.min() >= 0 and ratio.max() <= 1):
        raise InputError("capacity schedule: the masked share must lie between 0 and 1")
    if not 0 <= least <= most:
        raise InputError(f"capacity schedule: least and most must rise from 0, got {least} and {most}")
    shape = {"static": np.full(ratio.shape, 0.5), "linear-reverse": 1 - ratio, "linear": ratio}[schedule]
    return least + (most - least) * shape


class ExpertChoice(NamedTuple):
    """Loads when experts choose tokens: `load` int64[step], tokens of every expert of every layer (the same for all), and
    `uncovered` float64[step], the share of (token, layer) pairs that no expert chose (NaN without scores)."""

    load: np.ndarray
    uncovered: np.ndarray


def expert_choice(passes: DenoisePasses, capacity: Sequence[float] | np.ndarray, *, num_experts: int,
                  scores: np.ndarray | None = None) -> ExpertChoice:
    """Return what each expert gets when it takes its ``c = round(k N / E)`` best of a pass's N tokens, at least one.

    So every expert has the same load and no rank waits for another; in return a token gets no expert or many.

    Args:
        capacity: k, experts per token on average, for each pass (`expert_capacity`).
        scores: float[token, layer, expert] over the trace's rows; only they say which tokens are left out.

    Raises:
        InputError: a capacity per pass is missing or not positive.
    """
    mean = np.asarray(capacity, np.float64)
    if mean.shape != (passes.num_steps,) or not (mean > 0).all():
        raise InputError(f"expert choice: one positive capacity per pass is needed, {passes.num_steps} in all")
    tokens = np.array([len(rows) for rows in passes.rows])
    load = np.clip(np.rint(mean * tokens / num_experts).astype(np.int64), 1, tokens)
    uncovered = np.full(passes.num_steps, np.nan)
    if scores is not None:
        for step, rows in enumerate(passes.rows):
            uncovered[step] = 1.0 - chosen_tokens(scores[rows], int(load[step])).any(axis=2).mean()
    return ExpertChoice(load, uncovered)


def chosen_tokens(scores: np.ndarray, load: int) -> np.ndarray:
    """Return bool[token, layer, expert], the `load` best tokens of every expert; of equal scores the earlier token."""
    order = np.argsort(-scores, axis=0, kind="stable")[:load]
    taken = np.zeros(scores.shape, bool)
    np.put_along_axis(taken, order, True, axis=0)
    return taken


def _first(votes: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return bool[layer, expert] from float64[layer, expert]: who stands, from the most votes down, where `keep` is true."""
    order = np.argsort(-votes, axis=1, kind="stable")
    found = np.zeros(votes.shape, bool)
    np.put_along_axis(found, order, np.broadcast_to(keep, votes.shape), axis=1)
    return found


def _votes(trace: RoutingTrace, passes: DenoisePasses, scores: np.ndarray | None) -> list[np.ndarray]:
    """Return per pass float64[layer, expert], the tokens' votes for their own top-k."""
    if scores is not None:
        _check_scores(trace, scores)
        found = np.take_along_axis(scores, np.maximum(trace.expert_ids, 0).astype(np.int64), 2)
        weights = np.where(trace.expert_ids == PAD, 0.0, found)
    elif trace.gate_weights is not None:
        weights = trace.gate_weights
    else:
        raise InputError("votes need router scores or a trace with gate weights; this trace has neither")
    layers = np.arange(trace.num_layers)[None, :, None] * trace.num_experts
    size = trace.num_layers * trace.num_experts
    votes = []
    for rows in passes.rows:
        keys = (np.maximum(trace.expert_ids[rows], 0) + layers).ravel()  # a pad adds 0 to expert 0
        votes.append(np.bincount(keys, weights[rows].ravel(), size).reshape(trace.num_layers, trace.num_experts))
    return votes


def _check_scores(trace: RoutingTrace, scores: np.ndarray) -> None:
    shape = trace.num_tokens, trace.num_layers, trace.num_experts
    if scores.shape != shape or not (np.isfinite(scores).all() and scores.min() >= 0):
        raise InputError(f"scores must be [token, layer, expert] = {shape}, finite and not negative, got {scores.shape}")


def _confine(trace: RoutingTrace, passes: DenoisePasses, coresets: Sequence[np.ndarray],
             scores: np.ndarray | None) -> RoutingTrace:
    """Return the trace with the rows of each pass confined to its coreset bool[layer, expert]."""
    if scores is not None:
        _check_scores(trace, scores)
    ids = trace.expert_ids.copy()
    weights = None if trace.gate_weights is None else trace.gate_weights.astype(np.float64)
    for rows, coreset in zip(passes.rows, coresets, strict=True):
        if scores is None:
            ids[rows], own = _kept(ids[rows], None if weights is None else weights[rows], coreset)
        else:
            ids[rows], own = _refilled(scores[rows].astype(np.float64), coreset, trace.top_k)
        if weights is not None:
            weights[rows] = own
    empty = 1.0 - (ids != PAD).sum() / max((trace.expert_ids != PAD).sum(), 1)
    about = {"refilled": scores is not None, "empty_share": float(empty)}
    return dataclasses.replace(trace, expert_ids=ids, gate_weights=weights, metadata=trace.metadata | {"coreset": about})


def _kept(ids: np.ndarray, weights: np.ndarray | None, coreset: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (ids, weights) of each token's recorded experts that are in the coreset, moved to the front."""
    inside = (ids != PAD) & coreset[np.arange(len(coreset))[None, :, None], ids]
    order = np.argsort(~inside, axis=2, kind="stable")
    moved = np.take_along_axis(np.where(inside, ids, PAD), order, 2)
    if weights is None:
        return moved, None
    left = np.take_along_axis(np.where(inside, weights, 0.0), order, 2)
    total = left.sum(axis=2, keepdims=True)
    return moved, np.divide(left, total, out=left, where=total > 0)


def _refilled(scores: np.ndarray, coreset: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, weights) of each token's `top_k` best experts inside the coreset; pads where it is smaller."""
    inside = np.where(coreset, scores, -1.0)
    order = np.argsort(-inside, axis=2, kind="stable")[..., :top_k]
    best = np.take_along_axis(inside, order, 2)
    weights = np.maximum(best, 0.0)
    return np.where(best < 0, PAD, order), weights / weights.sum(axis=2, keepdims=True)


def _one_hot(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Return bool[layer, expert], who is named in int16[token, layer, k]."""
    found = np.zeros((expert_ids.shape[1], num_experts + 1), bool)
    found[np.arange(expert_ids.shape[1])[None, :, None], expert_ids] = True  # a pad (-1) marks the extra column
    return found[:, :-1]
