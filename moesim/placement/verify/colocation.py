"""Pair weight within ranks at given multipliers, shared by the checkers of step time and fan-out."""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh

from moesim.placement.problem import PlacementProblem

_EPS = float(np.finfo(np.float64).eps)


def most_together(weight: np.ndarray, pairs: np.ndarray, diagonal: np.ndarray, problem: PlacementProblem) -> float:
    """Return an upper bound on ``sum_(i != j) weight U`` over divisions into ranks, eigenvalue errors added.

    Args:
        weight, pairs: float64[expert, expert], what pairs weigh and their multipliers (made symmetric here).
        diagonal: float64[expert], multipliers of the unit diagonal.
    """
    size, per_rank, ranks = len(weight), problem.slots_per_rank, problem.num_ranks
    pairs = (pairs + pairs.T) / 2
    counted = 0.0
    for row in range(size):
        others = np.sort(np.delete(pairs[row], row))
        counted += float(others[len(others) - (per_rank - 1):].sum())
    matrix = weight - pairs
    np.fill_diagonal(matrix, diagonal)
    basis = np.linalg.qr(np.column_stack([np.ones(size), np.eye(size)[:, 1:]]))[0][:, 1:]
    inner = basis.T @ matrix @ basis
    values = eigh((inner + inner.T) / 2, eigvals_only=True)
    across = float(np.sort(values)[size - ranks:].sum())  # the largest ranks - 1 of size - 1
    error = 16 * size * ranks * _EPS * (float(np.linalg.norm(matrix)) + float(np.abs(pairs).sum()) / size)
    return counted + per_rank * (float(matrix.sum()) / size + across + error) - float(diagonal.sum())
