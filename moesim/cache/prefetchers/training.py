"""What prefetchers learn from a training part of a trace, and the tokens of each use of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.cache.policy import AccessStream
from moesim.traces.trace import RoutingTrace


def token_accesses(trace: RoutingTrace) -> tuple[AccessStream, np.ndarray]:
    """Return the accesses of a trace run token by token, and bool[access]: whether a request begins with it.

    Requests follow one another by rising id, each in the order of its positions. For `PrefetchContext.training` and
    `training_starts`.
    """
    order = np.lexsort((trace.position, trace.request_id))
    ids = np.sort(trace.expert_ids[order], axis=2)  # padding, -1, first
    offsets = np.concatenate([[0], np.cumsum((ids >= 0).sum(axis=2).ravel())])
    layers = np.tile(np.arange(trace.num_layers, dtype=np.int32), trace.num_tokens)
    starts = np.zeros((trace.num_tokens, trace.num_layers), dtype=bool)
    starts[0, 0], starts[1:, 0] = True, np.diff(trace.request_id[order]) != 0
    return AccessStream(layers, offsets, ids[ids >= 0]), starts.ravel()


def use_tokens(trace: RoutingTrace, steps: Sequence[np.ndarray]) -> np.ndarray:
    """Return int64[use], the tokens of each use in ``access_stream(trace, steps).experts``; for `future_tokens`."""
    parts = []
    for rows in steps:
        counts = np.zeros((trace.num_layers, trace.num_experts + 1), dtype=np.int64)
        np.add.at(counts, (np.arange(trace.num_layers)[:, None], trace.expert_ids[rows]), 1)
        counts = counts[:, :-1]  # padding, -1, is counted in the spare last column
        parts.append(counts[counts > 0])
    return np.concatenate(parts)
