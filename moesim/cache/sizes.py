"""Experts of different sizes: checks, and how many fit."""

from __future__ import annotations

import numpy as np

from moesim.errors import InputError


def checked_expert_bytes(expert_bytes: np.ndarray, num_layers: int, num_experts: int) -> np.ndarray:
    """Return a read-only int64[layer, expert]; raises InputError unless positive whole numbers of this shape."""
    array = np.array(expert_bytes)
    if array.shape != (num_layers, num_experts) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"cache: expert_bytes must be integers [{num_layers}, {num_experts}], got "
                         f"{array.dtype}{list(array.shape)}")
    array = array.astype(np.int64)
    if array.min() < 1:
        raise InputError(f"cache: expert_bytes must be at least 1, got {array.min()}")
    array.setflags(write=False)
    return array


def most_residents_per_layer(expert_bytes: np.ndarray, bytes_per_layer: int, *, shared: bool) -> int:
    """Return the slots per layer that no content of these bytes can outnumber (at least 1).

    `expert_bytes` is int64[layer, expert]; the smallest experts fill a pool with the most residents.
    """
    num_layers = len(expert_bytes)
    if shared:
        total = np.cumsum(np.sort(expert_bytes, axis=None))
        return max(1, -(-int((total <= bytes_per_layer * num_layers).sum()) // num_layers))
    total = np.cumsum(np.sort(expert_bytes, axis=1), axis=1)
    return max(1, int((total <= bytes_per_layer).sum(axis=1).max()))
