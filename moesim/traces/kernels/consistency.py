"""Windows of a trace by how often each expert is used in them: a count changes only where a use enters or leaves."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True, inline="always")
def _change(experts: np.ndarray, by: int, window: int, counts: np.ndarray, since: np.ndarray,
            histogram: np.ndarray) -> None:
    """Add `by` to the count of each expert (-1: none) from window number `window` on."""
    for expert in experts:
        if expert >= 0:
            histogram[expert, counts[expert]] += window - since[expert]
            since[expert] = window
            counts[expert] += by


@numba.njit(cache=True, nogil=True)
def window_histograms(expert_ids: np.ndarray, bounds: np.ndarray, window_tokens: int, histogram: np.ndarray) -> None:
    """Add the windows of every request to `histogram`, int64[layer, expert, uses].

    `expert_ids` is int16[token, layer, k], request after request; request r has the tokens ``bounds[r] ...
    bounds[r + 1] - 1``. A window number below 0 has not begun, so that what happens there counts for window 0.
    """
    num_layers, num_experts = histogram.shape[:2]
    counts, since = np.zeros(num_experts, np.int64), np.zeros(num_experts, np.int64)
    for request in range(len(bounds) - 1):
        first, last = bounds[request], bounds[request + 1]
        num_windows = last - first - window_tokens + 1
        if num_windows < 1:
            continue
        for layer in range(num_layers):
            counts[:] = 0
            since[:] = 0
            for token in range(first, last):
                window = token - first - window_tokens + 1
                if window > 0:
                    _change(expert_ids[token - window_tokens, layer], -1, window, counts, since, histogram[layer])
                _change(expert_ids[token, layer], 1, max(window, 0), counts, since, histogram[layer])
            for expert in range(num_experts):
                histogram[layer, expert, counts[expert]] += num_windows - since[expert]
