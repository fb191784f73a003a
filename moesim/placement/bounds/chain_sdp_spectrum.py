"""Nearest matrices with a plan's kind of spectrum: whole eigenproblems, or a subspace followed from step to step."""

from __future__ import annotations

import numpy as np

FULL_EVERY = 24  # steps from one whole eigenproblem to the next
_FOLLOW_FROM = 256  # rows: smaller eigenproblems cost less than the products that avoid them
_DEGREE = 3  # of the Chebyshev filter, one product each
_SPARE = 6  # columns that must stay unused, or the subspace is too small
_WIDEST = 0.55  # of all columns: beyond, nothing is saved
_RIDGE = np.float32(2.0**-20)


class Spectrum:
    """Eigenpairs of one pair of layers, for the projection on eigenvalues in 0 ... `cap` that sum to `total`.

    The matrices come from float32[n, n] of four blocks with rows and columns of mean 0; the two block-constant
    directions are no part of the spectrum. From one step of the method to the next they change little, and only the
    largest third or so of the eigenvalues count: `follow` filters the last eigenvectors with a Chebyshev polynomial,
    makes them orthogonal and solves the small eigenproblem (Zhou, Saad, Tiago, Chelikowsky, J. Comput. Phys. 219,
    2006). On 512 rows it takes about half the time of a whole eigenproblem. Errors cost tightness, never validity.
    """

    def __init__(self, cap: float, total: float) -> None:
        self.cap, self.total = cap, total
        self.vectors: np.ndarray | None = None
        self.values = np.zeros(0)
        self.clipped = np.zeros(0)
        self.lowest = self.edge = 0.0

    def decompose(self, target: np.ndarray) -> None:
        """Solve the whole eigenproblem of `target`, which is overwritten."""
        from moesim.placement.kernels.lapack import symmetric_eigen

        size = len(target) // 2
        # sink the block-constant directions below the rest, then leave them out
        sunk = np.float32(2.0 * float(np.linalg.norm(target)) / size)
        target[:size, :size] -= sunk
        target[size:, size:] -= sunk
        values, vectors = symmetric_eigen(target)
        self._keep(values[2:], vectors[:, 2:])
        self.lowest = float(values[2])
        columns = min(len(self.values), int(1.15 * np.count_nonzero(self.clipped)) + 16)
        self.vectors, self.values, self.clipped = (
            np.ascontiguousarray(part[..., -columns:]) for part in (vectors[:, 2:], self.values, self.clipped))
        self.edge = float(self.values[0])

    def _keep(self, values: np.ndarray, vectors: np.ndarray) -> None:
        self.values, self.vectors = values, vectors
        self.clipped = capped_simplex(values.astype(np.float64), self.cap, self.total)

    def follow(self, target: np.ndarray) -> bool:
        """Follow the subspace to `target`; return False, with nothing changed, where it does not suffice."""
        from scipy.linalg import solve_triangular

        from moesim.placement.kernels.lapack import symmetric_eigen

        if self.vectors is None or len(target) < _FOLLOW_FROM or self.vectors.shape[1] > _WIDEST * len(target):
            return False
        block = self._filtered(target)
        gram = block.T @ block
        gram[np.diag_indices(len(gram))] += _RIDGE
        try:
            factor = np.linalg.cholesky(gram)
        except np.linalg.LinAlgError:
            return False
        basis = solve_triangular(factor, block.T, lower=True, check_finite=False).T
        small = basis.T @ (target @ basis)
        values, turn = symmetric_eigen(0.5 * (small + small.T))
        clipped = capped_simplex(values.astype(np.float64), self.cap, self.total)
        if np.count_nonzero(clipped) > len(values) - _SPARE:
            return False
        self.values, self.vectors, self.clipped = values, basis @ turn, clipped
        self.edge = float(values[0])
        return True

    def _filtered(self, target: np.ndarray) -> np.ndarray:
        """Return the vectors with their part below the subspace's edge damped, columns of length 1."""
        assert self.vectors is not None
        middle, half = np.float32(0.5 * (self.lowest + self.edge)), np.float32(0.5 * (self.edge - self.lowest))
        before, block = self.vectors, (target @ self.vectors - middle * self.vectors) / half
        for _ in range(_DEGREE - 1):
            before, block = block, (2.0 / half) * (target @ block - middle * block) - before
        size = len(target) // 2
        for part in (block[:size], block[size:]):  # rounding must not bring the block-constant directions in
            part -= part.mean(axis=0)
        return block / np.linalg.norm(block, axis=0)

    def root(self) -> np.ndarray:
        """Return float32[n, k] B with ``B B'`` the nearest matrix (block-constant part left out)."""
        assert self.vectors is not None
        used = self.clipped > 0
        return self.vectors[:, used] * np.sqrt(self.clipped[used]).astype(np.float32)


def capped_simplex(values: np.ndarray, cap: float, total: float) -> np.ndarray:
    """Return the nearest float64 vector with entries in 0 ... `cap` that sums to `total`, by bisection."""
    low, high = float(values.min()) - cap, float(values.max())
    for _ in range(64):
        shift = 0.5 * (low + high)
        if np.clip(values - shift, 0.0, cap).sum() > total:
            low = shift
        else:
            high = shift
    return np.clip(values - high, 0.0, cap)
