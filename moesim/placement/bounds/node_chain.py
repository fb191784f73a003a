"""How many tokens can stay on their node over all layers: a semidefinite bound along the chain of layers.

With Y[l] in {0, 1}^(E x N) the nodes of layer l's experts, the tokens kept are ``sum_l <T[l], Y[l] Y[l + 1]'>``. The
matrix of all products, Z = Y Y', has a unit diagonal, is positive semidefinite, and sums to E / N along every row of
every block. Less its mean, ``Z - 11' / N`` is still positive semidefinite, lives where every block sums to zero, and
has the diagonal 1 - 1 / N. Hence for any d with ``P (Diag(d) - M) P >= 0``, M holding T / 2 beside the diagonal blocks
and P the projection on vectors whose blocks sum to zero:

    tokens kept <= (tokens passed) / N + (1 - 1 / N) sum d

(the dual of the Goemans-Williamson relaxation, J. ACM 42, 1995, with the block sums of Frieze and Jerrum, 1997). The
matrix is block tridiagonal, so that a Cholesky factorisation block by block tests it in O(L E^3).
"""

from __future__ import annotations

import time

import numpy as np

_RANK = 24  # of the low-rank search; more would be exact, and slower
_SWEEPS = 400
_STALLS = 2.0**-14
_HALVINGS = 3
_FIRST_SHIFT = 2.0**-10  # of the mean multiplier
_MARGIN = 2.0**-30  # of the largest multiplier: what a pivot must exceed, far above rounding


def chain_multipliers(counts: np.ndarray, num_nodes: int, until_s: float) -> np.ndarray:
    """Return d float64[layer, expert] of a small sum for transitions float64[pair, expert, expert].

    The maximum over unit vectors v of ``sum <v_i, v_j> M_ij`` with block sums of zero is found by moving one layer at
    a time (the mixing method of Wang, Chang and Kolter, 2017, arXiv 1706.00476, block by block): v_i points along
    ``g_i - y``, g = M v, y the geometric median of the layer's g. Its multipliers ``d_i = |g_i - y|`` are optimal in
    the limit; the smallest common shift that makes them feasible is added.
    """
    blocks = _centred(counts) / 2
    diagonal = _search(blocks, until_s)
    return diagonal + _shift(blocks, diagonal)


def _centred(counts: np.ndarray) -> np.ndarray:
    counts = counts - counts.mean(axis=1, keepdims=True)
    return counts - counts.mean(axis=2, keepdims=True)


def _search(blocks: np.ndarray, until_s: float) -> np.ndarray:
    """Return float64[layer, expert] multipliers of a low-rank optimum."""
    layers, experts = len(blocks) + 1, blocks.shape[1]
    rng = np.random.default_rng(0)  # any start will do; the same one makes the bound reproducible
    vectors = rng.standard_normal((layers, experts, min(_RANK, experts)))
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    median = np.zeros((layers, vectors.shape[2]))
    diagonal, before = np.zeros((layers, experts)), 0.0
    for _ in range(_SWEEPS):
        for layer in (*range(layers), *reversed(range(layers))):
            pull = np.zeros_like(vectors[layer])
            if layer:
                pull += blocks[layer - 1].T @ vectors[layer - 1]
            if layer < layers - 1:
                pull += blocks[layer] @ vectors[layer + 1]
            median[layer] = _median(pull, median[layer])
            pull -= median[layer]
            diagonal[layer] = np.linalg.norm(pull, axis=1)
            vectors[layer] = pull / np.maximum(diagonal[layer], np.finfo(float).tiny)[:, None]
        total = float(diagonal.sum())
        if abs(total - before) <= _STALLS * total / layers or time.perf_counter() > until_s:
            break
        before = total
    return diagonal


def _median(points: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return a few steps of Weiszfeld towards the geometric median of float64[point, axis]."""
    for _ in range(3):
        far = np.linalg.norm(points - start, axis=1)
        if not far.max() > 0:
            return start
        weight = 1 / np.maximum(far, far.max() * _MARGIN)
        start = (weight[:, None] * points).sum(axis=0) / weight.sum()
    return start


def _shift(blocks: np.ndarray, diagonal: np.ndarray) -> float:
    """Return a small s such that ``P (Diag(d + s) - M) P`` is positive definite: growing steps, then bisection."""
    basis = zero_sum_basis(blocks.shape[1])
    inner = np.stack([basis.T @ block @ basis for block in blocks])
    low, high = 0.0, max(float(diagonal.mean()) * _FIRST_SHIFT, np.finfo(float).tiny)
    while not _definite(inner, diagonal + high, basis):
        low, high = high, high * 4
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _definite(inner, diagonal + middle, basis):
            high = middle
        else:
            low = middle
    return high


def zero_sum_basis(size: int) -> np.ndarray:
    """Return float64[size, size - 1], orthonormal columns that sum to zero (Helmert's)."""
    basis = np.zeros((size, size - 1))
    for k in range(1, size):
        basis[:k, k - 1], basis[k, k - 1] = 1.0, -float(k)
        basis[:, k - 1] /= np.sqrt(k * (k + 1.0))
    return basis


def _definite(inner: np.ndarray, diagonal: np.ndarray, basis: np.ndarray) -> bool:
    """Return whether the block tridiagonal matrix is positive definite with some margin."""
    from scipy.linalg import LinAlgError, cholesky, solve_triangular

    margin = _MARGIN * float(diagonal.max()) * 2
    factor = None
    for layer, own in enumerate(diagonal):
        pivot = (basis.T * (own - margin)) @ basis
        if factor is not None:
            half = solve_triangular(factor, inner[layer - 1], lower=True)
            pivot -= half.T @ half
        try:
            factor = cholesky(pivot, lower=True)
        except LinAlgError:
            return False
    return True
