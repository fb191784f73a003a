"""The eigensolver without Python's lock against numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.placement.kernels.lapack import symmetric_eigen


@pytest.mark.parametrize("size", [1, 2, 7, 64, 130])
def test_eigenpairs_are_those_of_numpy(size: int) -> None:
    """Values agree with float64, vectors are orthonormal and give the matrix again, which is left as it was."""
    half = np.random.default_rng(size).standard_normal((size, size)).astype(np.float32)
    matrix = half + half.T
    before = matrix.copy()
    values, vectors = symmetric_eigen(matrix)
    assert np.array_equal(matrix, before)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix.astype(np.float64)), atol=2e-4 * size)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=1e-4)
    np.testing.assert_allclose((vectors * values) @ vectors.T, matrix, atol=2e-4 * size)


def test_what_is_not_finite_does_not_pass_for_a_result() -> None:
    """A matrix with NaN either fails to converge or gives NaN, never numbers."""
    try:
        values, _ = symmetric_eigen(np.full((8, 8), np.nan, np.float32))
    except np.linalg.LinAlgError:
        return
    assert not np.all(np.isfinite(values))
