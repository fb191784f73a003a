"""What policies may be told of each access besides its experts: router scores, and where requests begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError
from moesim.traces.trace import RoutingTrace


@dataclass(frozen=True)
class RouterScores:
    """The router's scores of every access of a run, in the order of its `AccessStream` (level I2).

    A policy reads the row of the access in progress, and no later one.

    Attributes:
        top_k: experts per token.
        mean: float64[access, expert], the mean over the access's tokens; 0 where the router gave none.
        first: float64[access, expert], those of its first token.

    Raises:
        InputError: shapes that disagree, scores that are negative or not finite, a top_k outside 1 ... experts.
    """

    top_k: int
    mean: np.ndarray
    first: np.ndarray

    def __post_init__(self) -> None:
        for name in ("mean", "first"):
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.ndim != 2 or not np.all(np.isfinite(array)) or array.min(initial=0) < 0:
                raise InputError(f"router scores: {name} must be [access, expert], finite and not negative")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.mean.shape != self.first.shape:
            raise InputError(f"router scores: mean is {list(self.mean.shape)}, but first {list(self.first.shape)}")
        if not 1 <= self.top_k <= self.mean.shape[1]:
            raise InputError(f"router scores: top_k must lie in 1 ... {self.mean.shape[1]}, got {self.top_k}")

    def important(self, access: int, limit: float) -> frozenset[int]:
        """Return those of the top_k experts of an access before which weights of at most `limit` are ranked.

        Weights are the scores of the top_k, made to sum to 1; of equal ones the lower expert is ranked first.
        """
        row = self.mean[access]
        top = np.argsort(-row, kind="stable")[: self.top_k]
        total = row[top].sum()
        before = np.concatenate([[0.0], np.cumsum(row[top])[:-1]]) / (total if total > 0 else 1.0)
        return frozenset(top[before <= limit].tolist())


def router_scores(trace: RoutingTrace, steps: Sequence[np.ndarray], scores: np.ndarray | None = None) -> RouterScores:
    """Return the scores of the accesses of `steps`, in the order of `access_stream(trace, steps)`.

    Args:
        trace: without `scores`, its gate weights serve: the chosen experts' weights, and 0 for the others.
        steps: each int64[...], the trace rows that it runs.
        scores: float[token, layer, expert], what the routers gave every expert; one row per row of the trace.

    Raises:
        InputError: neither gate weights nor scores, scores of another shape, or a row that the trace does not have.
    """
    full = _gate_scores(trace) if scores is None else np.asarray(scores, dtype=np.float64)
    if full.shape != (trace.num_tokens, trace.num_layers, trace.num_experts):
        raise InputError(f"router scores: must be [{trace.num_tokens}, {trace.num_layers}, {trace.num_experts}], got "
                         f"{list(full.shape)}")
    rows = [np.asarray(step) for step in steps]
    if not rows or any(not step.size or step.min() < 0 or step.max() >= trace.num_tokens for step in rows):
        raise InputError(f"router scores: steps must name rows 0 ... {trace.num_tokens - 1} of the trace")
    shape = (-1, trace.num_experts)
    return RouterScores(trace.top_k, np.concatenate([full[step].mean(axis=0) for step in rows]).reshape(shape),
                        np.concatenate([full[step[0]] for step in rows]).reshape(shape))


def _gate_scores(trace: RoutingTrace) -> np.ndarray:
    """Return float64[token, layer, expert], the gate weights of the chosen experts, 0 for the others."""
    if trace.gate_weights is None:
        raise InputError("router scores: the trace has no gate weights; give scores=float[token, layer, expert]")
    full = np.zeros((trace.num_tokens, trace.num_layers, trace.num_experts + 1))
    np.put_along_axis(full, trace.expert_ids.astype(np.int64), trace.gate_weights, axis=2)  # padding, -1: the last
    return full[:, :, :-1]


def request_starts(trace: RoutingTrace, steps: Sequence[np.ndarray]) -> np.ndarray:
    """Return bool[access]: whether a request that no earlier step held begins with it (at the first layer of a step).

    Policies that keep records of a request (HOBBIT, MoE-Infinity) then begin new ones; where requests run side by side,
    a newcomer ends the records of the others.
    """
    seen: set[int] = set()
    starts = np.zeros(len(steps) * trace.num_layers, dtype=bool)
    for index, rows in enumerate(steps):
        requests = set(trace.request_id[rows].tolist())
        starts[index * trace.num_layers] = not requests <= seen
        seen |= requests
    return starts
