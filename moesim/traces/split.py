"""Parts of a trace: by request, by phase, and with its tokens shuffled."""

from __future__ import annotations

import dataclasses

import numpy as np

from moesim.errors import InputError, unknown
from moesim.traces.trace import PHASES, RoutingTrace


def split_requests(trace: RoutingTrace, fraction: float, seed: int) -> tuple[RoutingTrace, RoutingTrace]:
    """Return (train, test): whole requests, a random `fraction` of them in train, each part at least one.

    Rows keep their order. Split by request, not by token: tokens of one request resemble each other,
    so that a table learned on some of them would be tested on what it has almost seen.

    Raises:
        InputError: a fraction outside (0, 1), or a trace of one request.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction must lie between 0 and 1, got {fraction}")
    requests = trace.requests()
    if len(requests) < 2:
        raise InputError("a trace of one request cannot be split by request")
    num_train = min(max(round(fraction * len(requests)), 1), len(requests) - 1)
    train = np.random.default_rng(seed).permutation(np.sort(requests))[:num_train]
    in_train = np.isin(trace.request_id, train)
    return trace.take(in_train), trace.take(~in_train)


def shuffle_tokens(trace: RoutingTrace, seed: int) -> RoutingTrace:
    """Return `trace` with the routing of its tokens permuted at random within each phase.

    Requests, positions, phases and steps stay; only which token's routing stands there changes. What
    is left is the load and the layer-to-layer structure; what goes is every link between neighbours.
    """
    rng = np.random.default_rng(seed)
    order = np.arange(trace.num_tokens)
    for phase in range(len(PHASES)):
        rows = np.flatnonzero(trace.phase == phase)
        order[rows] = rng.permutation(rows)
    return dataclasses.replace(
        trace, expert_ids=trace.expert_ids[order],
        gate_weights=None if trace.gate_weights is None else trace.gate_weights[order],
        token_id=None if trace.token_id is None else trace.token_id[order])


def select_phase(trace: RoutingTrace, phase: str) -> RoutingTrace:
    """Return the rows of one phase ("prefill", "decode", "denoise"), or the trace itself for "all".

    Raises:
        InputError: an unknown phase, or one with no rows.
    """
    if phase == "all":
        return trace
    if phase not in PHASES:
        raise unknown("phase", phase, ("all", *PHASES))
    rows = trace.phase == PHASES.index(phase)
    if not rows.any():
        present = ", ".join(PHASES[i] for i in np.unique(trace.phase))
        raise InputError(f"the trace has no {phase} rows (only {present})")
    return trace.take(rows)


def first_requests(trace: RoutingTrace, num_requests: int) -> RoutingTrace:
    """Return the first `num_requests` requests in order of appearance (all, when there are fewer)."""
    if num_requests < 1:
        raise InputError(f"num_requests must be at least 1, got {num_requests}")
    return trace.take(np.isin(trace.request_id, trace.requests()[:num_requests]))
