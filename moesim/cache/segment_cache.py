"""SCH(m, rho): the hit rate of a cache that knows the next m tokens (arXiv 2505.16056)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.cache.compiled_layout import COLD_IN_FREE, MISSES
from moesim.cache.policy import access_stream
from moesim.cache.scanned_replay import segment_cache_tally
from moesim.errors import InputError
from moesim.traces.trace import RoutingTrace


@dataclass(frozen=True)
class SegmentCacheHits:
    """SCH(m, rho) of a trace.

    Attributes:
        window_tokens, slots_per_layer: m, and rho * top_k.
        shared: whether all layers share the slots.
        accesses, hits: int64[layer], over all requests.
    """

    window_tokens: int
    slots_per_layer: int
    shared: bool
    accesses: np.ndarray
    hits: np.ndarray

    @property
    def hit_rate(self) -> float:
        """Hits per access over all layers."""
        return int(self.hits.sum()) / int(self.accesses.sum())

    @property
    def layer_hit_rates(self) -> np.ndarray:
        """Return float64[layer], hits per access of each layer."""
        return self.hits / np.maximum(self.accesses, 1)


def segment_cache_hits(trace: RoutingTrace, window_tokens: int, rho: float, *, shared: bool = False) -> SegmentCacheHits:
    """Return SCH(m, rho): each request runs token by token on an empty cache of rho * top_k slots per layer.

    As in the authors' code: the experts of a token are tested together against what was there before (set semantics), a
    first use that finds a free slot is a hit, and the policy is `SegmentCachePolicy`, compiled. Their rates are means over samples of
    equal length, which is the same as hits over accesses here.

    Args:
        trace: tokens of a request follow each other in its order.
        window_tokens: m, tokens looked ahead.
        rho: cache size in experts per token; rho * top_k is rounded to whole slots, one per expert at most.
        shared: one pool of rho * top_k * layers, the paper's model-level variant; here a layer of a token is an access.

    Raises:
        InputError: a window or a number of slots below one.
    """
    slots = round(rho * trace.top_k)
    if slots < 1:
        raise InputError(f"segment cache: rho {rho} x top-{trace.top_k} is less than one slot")
    if window_tokens < 1:
        raise InputError(f"segment cache: the window must be at least 1 token, got {window_tokens}")
    slots = min(slots, trace.num_experts)
    accesses, hits = (np.zeros(trace.num_layers, np.int64) for _ in range(2))
    for request in trace.requests():
        steps = [np.array([row]) for row in np.flatnonzero(trace.request_id == request)]
        stream = access_stream(trace, steps)
        tally = segment_cache_tally(stream, trace.num_layers, trace.num_experts, slots, window_tokens, shared=shared)
        uses = np.bincount(stream.layers, np.diff(stream.offsets), minlength=trace.num_layers).astype(np.int64)
        accesses += uses
        hits += uses - tally[MISSES] + tally[COLD_IN_FREE]
    return SegmentCacheHits(window_tokens, slots, shared, accesses, hits)
