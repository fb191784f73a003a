"""Rows of coresets and expert choice in a diffusion study: routing rewritten, timed with every expert on the device."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from moesim.hardware.cost import CostModel
from moesim.lowering.refresh_hbm import coreset_row, resident_ns
from moesim.lowering.refresh_rows import Denoised, decided_tokens
from moesim.model.spec import ModelSpec
from moesim.scenario.schema_diffusion import EXPERT_CHOICE, CoresetPoint
from moesim.traces.coresets import des_seq, des_vote, dmoe, expert_capacity, expert_choice
from moesim.traces.denoise_passes import DenoisePasses, denoise_passes, masked_fraction
from moesim.traces.expert_choice import expert_choice_trace, lost_weight_share
from moesim.traces.trace import RoutingTrace
from moesim.units import s_from_ns

RESIDENT = "resident"
PUBLISHED_CAPACITY = (2.0, 14.0)


class Rewritten(NamedTuple):
    """Passes with other counts, and what the rewrite took away; None where it cannot be told."""

    passes: DenoisePasses
    lost_weight_share: float | None = None
    uncovered_share: float | None = None
    empty_share: float | None = None


def rewrite(point: CoresetPoint, trace: RoutingTrace, passes: DenoisePasses, scores: np.ndarray | None) -> Rewritten:
    """Return the passes under one coreset.

    Raises:
        InputError: a parameter out of the model's range, or a trace without the weights, scores or token ids that the
            method needs.
    """
    if point.method == "none":
        return Rewritten(passes, 0.0)
    if point.method == EXPERT_CHOICE:
        return _expert_choice(point, trace, passes, scores)
    if point.method == "des-seq":
        found = des_seq(trace, passes, int(point.setting), scores=scores)
    else:
        found = {"des-vote": des_vote, "dmoe": dmoe}[point.method](trace, passes, point.setting, scores=scores)
    return Rewritten(denoise_passes(found), lost_weight_share(trace, found),
                     empty_share=found.metadata["coreset"]["empty_share"])


def _expert_choice(point: CoresetPoint, trace: RoutingTrace, passes: DenoisePasses,
                   scores: np.ndarray | None) -> Rewritten:
    masked = np.zeros(passes.num_steps) if point.schedule == "static" else masked_fraction(trace, passes)
    capacity = expert_capacity(masked, point.schedule, least=point.k_min, most=point.k_max)
    chosen = expert_choice(passes, capacity, num_experts=trace.num_experts, scores=scores)
    counts = np.broadcast_to(chosen.load[:, None, None], passes.counts.shape).astype(np.int64)
    even = dataclasses.replace(passes, counts=counts)
    if scores is None:
        return Rewritten(even)
    routed = expert_choice_trace(trace, passes, chosen.load, scores)
    return Rewritten(even, lost_weight_share(trace, routed), float(chosen.uncovered.mean()))


def first_pass(trace: RoutingTrace, passes: DenoisePasses,
               scores: np.ndarray | None) -> tuple[RoutingTrace, DenoisePasses, np.ndarray | None]:
    """Return trace, passes and scores of the first pass alone, to try a rewrite on."""
    rows = passes.rows[0]
    one = trace.take(rows)
    return one, denoise_passes(one), None if scores is None else scores[rows]


def resident_row(model: ModelSpec, point: CoresetPoint, test: Denoised, scores: np.ndarray | None, cost: CostModel,
                 device: str) -> dict[str, Any]:
    """Return the row of one coreset, or of the routing as it is, with every expert in the memory of `device`."""
    rewritten = rewrite(point, test.trace, test.passes, scores)
    about = coreset_row(model, *_published_key(point), rewritten.passes, cost, device)
    experts, other = resident_ns(model, test.trace, rewritten.passes, cost, device)
    total_s = s_from_ns(int((experts + other).sum()))
    steps = test.passes.num_steps
    return {
        "policy": RESIDENT if point.method == "none" else point.label, "coreset": point.label,
        "slots_per_layer": model.num_experts,
        "resident_fraction": 1.0, "unique_experts": about["unique_experts"],
        "no_locality_experts": about["no_locality_experts"], "published_experts": about["published_experts"],
        "expert_bytes_per_layer": about["expert_bytes_per_layer"], "experts_step_s": s_from_ns(int(experts.sum())) / steps,
        "other_step_s": s_from_ns(int(other.sum())) / steps, "step_time_s": total_s / steps,
        "tokens_per_s": decided_tokens(test.passes) / total_s, "published_accuracy_fraction": about["published_accuracy"],
        "lost_weight_share": rewritten.lost_weight_share, "uncovered_share": rewritten.uncovered_share,
        "empty_share": rewritten.empty_share, "published_source": about["published_source"],
    }


def _published_key(point: CoresetPoint) -> tuple[str, float]:
    """Return (method, setting) under which a point's accuracy may be published."""
    if point.method != EXPERT_CHOICE:
        return point.method, point.setting
    known = point.schedule == "static" or (point.k_min, point.k_max) == PUBLISHED_CAPACITY
    return (f"{EXPERT_CHOICE}-{point.schedule}", point.setting) if known else (EXPERT_CHOICE, 0.0)
