"""How much weight can lie on pairs of experts that share a rank: a spectral and counting bound with its multipliers."""

from __future__ import annotations

import time

import numpy as np

_RELAX = 1.6


def colocation_value(weight: np.ndarray, pairs: np.ndarray, diagonal: np.ndarray, per_rank: int) -> float:
    """Return a proven upper bound on ``sum_(i != j) weight[i, j] U[i, j]`` over every division into ranks of `per_rank`.

    U[i, j] = 1 where i and j share a rank. Every row then has ``per_rank - 1`` ones beside the diagonal, and U is
    `per_rank` times a projector of rank ``E / per_rank`` that keeps the vector of ones. So for any symmetric
    multipliers N (`pairs`) and y (`diagonal`), with ``Q = weight - N + diag(y)``::

        <weight, U> <= sum_i (largest per_rank - 1 of N[i, j], j != i)
                       + per_rank (1'Q1 / E + largest E / per_rank - 1 eigenvalues of Q across the ones) - sum y

    (eigenvalue bound of Donath and Hoffman, IBM J. Res. Dev. 17, 1973, with the counting bound split off.)
    """
    size = len(weight)
    off = ~np.eye(size, dtype=bool)
    rows = np.where(off, pairs, -np.inf)
    counted = float(np.sum(-np.sort(-rows, axis=1)[:, : per_rank - 1])) if per_rank > 1 else 0.0
    matrix = np.where(off, weight - pairs, 0.0) + np.diag(diagonal)
    along = float(matrix.sum()) / size
    top = np.linalg.eigvalsh(_across(matrix))  # the ones contribute one more eigenvalue, 0
    top = np.sort(np.delete(top, np.argmin(np.abs(top))))[::-1][: size // per_rank - 1]
    return counted + per_rank * (along + float(top.sum())) - float(diagonal.sum())


def colocation_multipliers(weight: np.ndarray, per_rank: int, until_s: float, iterations: int,
                           ) -> tuple[np.ndarray, np.ndarray, float]:
    """Return multipliers ``(pairs float32[E, E], diagonal float64[E])`` and their bound, by the splitting method.

    ADMM (Boyd et al., Found. Trends Mach. Learn. 3(1), 2011) on max <weight, U> over U in both sets: `per_rank` times a
    relaxed projector, and entries in 0 ... 1 with a unit diagonal. Any iterate gives a valid bound; the best is kept.
    """
    size = len(weight)
    best_pairs, best_diagonal = weight.astype(np.float32), np.zeros(size)
    best = colocation_value(weight, best_pairs.astype(np.float64), best_diagonal, per_rank)
    off = ~np.eye(size, dtype=bool)
    scale = float(weight[off].std()) if size > 1 else 0.0
    if scale <= 0 or per_rank in (1, size):
        return best_pairs, best_diagonal, best
    penalty = 4.0 * scale
    inside, dual = np.full((size, size), (per_rank - 1) / max(1, size - 1)), np.zeros((size, size))
    np.fill_diagonal(inside, 1.0)
    target = np.where(off, weight, 0.0) / penalty
    for turn in range(iterations):
        if time.perf_counter() > until_s:
            break
        free = _projector(inside - dual + target, per_rank)
        mixed = _RELAX * free + (1 - _RELAX) * inside
        inside = np.clip(mixed + dual, 0.0, 1.0)
        np.fill_diagonal(inside, 1.0)
        dual = dual + mixed - inside
        if turn % 5 == 4 or turn == iterations - 1:
            pairs = np.where(off, penalty * dual, 0.0).astype(np.float32)
            diagonal = -penalty * np.diag(dual)
            value = colocation_value(weight, pairs.astype(np.float64), diagonal, per_rank)
            if value < best:
                best, best_pairs, best_diagonal = value, pairs, diagonal
    return best_pairs, best_diagonal, best


def _across(matrix: np.ndarray) -> np.ndarray:
    """Return the matrix between vectors that sum to zero."""
    mean = matrix.mean(axis=0, keepdims=True)
    half = matrix - mean
    return half - half.mean(axis=1, keepdims=True)


def _projector(matrix: np.ndarray, per_rank: int) -> np.ndarray:
    """Return the nearest matrix with eigenvalue `per_rank` on the ones, the others in 0 ... `per_rank`, trace E."""
    size = len(matrix)
    values, vectors = np.linalg.eigh(_across((matrix + matrix.T) / 2))
    low, high = float(values.min()) - per_rank - 1, float(values.max()) + 1
    for _ in range(60):
        shift = (low + high) / 2
        if np.clip(values - shift, 0, per_rank).sum() > size - per_rank:
            low = shift
        else:
            high = shift
    kept = np.clip(values - (low + high) / 2, 0, per_rank)
    return (vectors * kept) @ vectors.T + per_rank / size
