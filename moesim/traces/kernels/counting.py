"""Counts over blocks of routing, int16[token, layer, k] with -1 pads; every count adds to what is there.

Tables have a spare first row and column for the pads: expert e counts at e + 1, so that the inner loops hold no
branch. Pair counts walk layer by layer, so that one table stays in cache.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def add_load(ids: np.ndarray, counts: np.ndarray) -> None:
    """Add each pick to counts int64[layer, expert + 1]."""
    for token in range(ids.shape[0]):
        for layer in range(ids.shape[1]):
            row = counts[layer]
            for pick in range(ids.shape[2]):
                row[np.uint16(ids[token, layer, pick] + 1)] += 1


@numba.njit(cache=True, nogil=True)
def add_transitions(ids: np.ndarray, counts: np.ndarray) -> None:
    """Add the pairs (expert of a layer, expert of the next) to counts int64[layer - 1, expert + 1, expert + 1]."""
    for layer in range(ids.shape[1] - 1):
        table = counts[layer]
        for token in range(ids.shape[0]):
            for first in range(ids.shape[2]):
                row = table[np.uint16(ids[token, layer, first] + 1)]
                for second in range(ids.shape[2]):
                    row[np.uint16(ids[token, layer + 1, second] + 1)] += 1


@numba.njit(cache=True, nogil=True)
def add_co_activation(ids: np.ndarray, counts: np.ndarray) -> None:
    """Add all pairs of one token and layer to counts int64[layer, expert + 1, expert + 1], both ways round."""
    for layer in range(ids.shape[1]):
        table = counts[layer]
        for token in range(ids.shape[0]):
            for first in range(ids.shape[2]):
                row = table[np.uint16(ids[token, layer, first] + 1)]
                for second in range(ids.shape[2]):  # loops of a fixed length run faster than half the pairs
                    row[np.uint16(ids[token, layer, second] + 1)] += 1


@numba.njit(cache=True, nogil=True)
def add_pairs(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> None:
    """Add the pairs of two columns int16[token, k] to counts int64[expert + 1, expert + 1]."""
    for token in range(first.shape[0]):
        for i in range(first.shape[1]):
            row = counts[np.uint16(first[token, i] + 1)]
            for j in range(second.shape[1]):
                row[np.uint16(second[token, j] + 1)] += 1
