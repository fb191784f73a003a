"""LAPACK's symmetric eigensolver without Python's lock: scipy's own call holds it, so that two threads take turns."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numba.extending import get_cython_function_address

_INT, _FLOATS = ctypes.POINTER(ctypes.c_int), ctypes.c_void_p


@cache
def _ssyevd() -> Any:
    """Return scipy's ``ssyevd`` as a foreign function; ctypes lets other threads run while it works."""
    address = get_cython_function_address("scipy.linalg.cython_lapack", "ssyevd")
    kind = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, _INT, _FLOATS, _INT, _FLOATS, _FLOATS, _INT,
                            _FLOATS, _INT, _INT)
    return kind(address)


def symmetric_eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (values float32[n], rising; vectors float32[n, n], one per column) of a symmetric float32[n, n].

    Divide and conquer (LAPACK ``ssyevd``). `matrix` is left as it is.

    Raises:
        numpy.linalg.LinAlgError: no convergence.
    """
    size = len(matrix)
    vectors = np.array(matrix, np.float32, order="F")
    values = np.empty(size, np.float32)
    work, int_work = np.empty(1 + 6 * size + 2 * size**2, np.float32), np.empty(3 + 5 * size, np.intc)
    order, info = ctypes.c_int(size), ctypes.c_int(0)
    _ssyevd()(b"V", b"L", order, vectors.ctypes.data, order, values.ctypes.data, work.ctypes.data,
              ctypes.c_int(len(work)), int_work.ctypes.data, ctypes.c_int(len(int_work)), info)
    if info.value:
        raise np.linalg.LinAlgError(f"ssyevd ended with info {info.value}")
    return values, vectors
