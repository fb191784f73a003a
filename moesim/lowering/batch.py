"""What a step holds: rows by home rank, context lengths, counts per expert. Shared by all programs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.lowering.graph import NONE
from moesim.traces.steps import Step
from moesim.traces.trace import PAD, RoutingTrace


@dataclass
class StepRecord:
    """One lowered step: what it held, and the tasks at its two ends (filled while lowering)."""

    step: Step
    tokens: int
    first_task: int = NONE
    last_task: int = NONE


def home_ranks(trace: RoutingTrace, num_ranks: int) -> np.ndarray:
    """int32[token]: the rank that runs a token's attention; requests are dealt to ranks in turn."""
    _, first, which = np.unique(trace.request_id, return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.arange(len(first))  # in order of first appearance
    return (place[which] % num_ranks).astype(np.int32)


def expert_counts(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """int64[expert]: tokens per expert, from int16[token, k] (pads left out)."""
    ids = expert_ids[expert_ids != PAD]
    return np.bincount(ids.ravel(), minlength=num_experts)


def context_sums(positions: np.ndarray, home: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64[rank]: cached tokens that the rows of each rank attend to, themselves included."""
    return np.bincount(home, weights=positions + 1, minlength=num_ranks).astype(np.int64)


def head_rows(step: Step) -> int:
    """Rows that need the output embedding: one per request of the step."""
    return len(np.unique(step.requests))


def last_rows(step: Step) -> np.ndarray:
    """int64[request]: the last row of each request of the step (its next token is wanted)."""
    return step.rows[last_places(step)]


def last_places(step: Step) -> np.ndarray:
    """int64[request]: where in `step.rows` the last row of each request of the step stands.

    By the step's own requests: a copy of a request shares its trace rows, not its id.
    """
    last = dict(zip(step.requests.tolist(), range(len(step.rows)), strict=True))
    return np.fromiter(last.values(), np.int64, len(last))
