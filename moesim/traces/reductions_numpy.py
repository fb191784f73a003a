"""Counts of a trace in plain numpy: for traces so small that compiling loops would take longer than counting."""

from __future__ import annotations

import numpy as np

from moesim.traces.trace import RoutingTrace

_CHUNK_PAIRS = 1 << 23
_OVERLAP_ROWS = 4096


def load(trace: RoutingTrace) -> np.ndarray:
    """Return int64[layer, expert]: tokens routed to each expert (padding not counted)."""
    layers, experts = trace.num_layers, trace.num_experts
    cell = trace.expert_ids.astype(np.int64) + experts * np.arange(layers)[:, None]
    counts = np.bincount(cell[trace.expert_ids >= 0], minlength=layers * experts)
    return counts.reshape(layers, experts)


def pairs(first: np.ndarray, second: np.ndarray, num_experts: int) -> np.ndarray:
    """Return int64[expert, expert] over ids [token, k]: tokens with i in `first` and j in `second`."""
    counts = np.zeros(num_experts * num_experts, dtype=np.int64)
    rows = max(1, _CHUNK_PAIRS // (first.shape[1] * second.shape[1]))
    for start in range(0, len(first), rows):
        i = first[start:start + rows, :, None].astype(np.int64)
        j = second[start:start + rows, None, :]
        cell = (i * num_experts + j)[(i >= 0) & (j >= 0)]
        counts += np.bincount(cell, minlength=len(counts))
    return counts.reshape(num_experts, num_experts)


def transitions(trace: RoutingTrace) -> np.ndarray:
    """Return int64[layer - 1, expert, expert]: tokens with expert i in layer l and j in layer l + 1."""
    ids, experts = trace.expert_ids, trace.num_experts
    counts = [pairs(ids[:, layer], ids[:, layer + 1], experts) for layer in range(trace.num_layers - 1)]
    return np.array(counts, dtype=np.int64).reshape(trace.num_layers - 1, experts, experts)


def co_activation(trace: RoutingTrace) -> np.ndarray:
    """Return int64[layer, expert, expert]: tokens with both i and j in one layer."""
    ids = trace.expert_ids
    return np.array([pairs(ids[:, layer], ids[:, layer], trace.num_experts) for layer in range(trace.num_layers)],
                    dtype=np.int64)


def overlap(trace: RoutingTrace) -> tuple[np.ndarray, np.ndarray]:
    """Return int64[layer]: experts that the next row of the request uses again, and experts of rows with a next one.

    Args:
        trace: rows of each request adjoining.
    """
    follows = np.flatnonzero(np.diff(trace.request_id) == 0)
    ids = trace.expert_ids
    again, picks = np.zeros(trace.num_layers, np.int64), np.zeros(trace.num_layers, np.int64)
    for start in range(0, len(follows), _OVERLAP_ROWS):
        rows = follows[start:start + _OVERLAP_ROWS]
        same = (ids[rows, :, :, None] == ids[rows + 1, :, None, :]) & (ids[rows, :, :, None] >= 0)
        again += same.sum(axis=(0, 2, 3))
        picks += (ids[rows] >= 0).sum(axis=(0, 2))
    return again, picks


def stack_distances(trace: RoutingTrace) -> np.ndarray:
    """Return int64[layer, expert + 1]: picks by the number of experts used since their last use; last: never used."""
    layers, experts = trace.num_layers, trace.num_experts
    counts = np.zeros((layers, experts + 2), dtype=np.int64)  # distance E: never used; E + 1: padding
    last_use = np.full((layers, experts + 1), -1, dtype=np.int64)  # last column: padding
    for token, picks in enumerate(trace.expert_ids.astype(np.int64)):
        used = np.take_along_axis(last_use, picks, axis=1)
        distance = (last_use[:, None, :experts] > used[:, :, None]).sum(axis=2)
        distance[used < 0] = experts
        distance[picks < 0] = experts + 1
        np.add.at(counts, (np.arange(layers)[:, None], distance), 1)
        np.put_along_axis(last_use, picks, token * trace.top_k + np.arange(trace.top_k)[None], axis=1)
    return counts[:, :experts + 1]
