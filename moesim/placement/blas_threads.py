"""Keep OpenBLAS to one thread while our own threads share the cores."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# as numpy's and scipy's wheels name them, then as distributions do
_NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads64_",
          "openblas_{}_num_threads")
_Pair = tuple[Callable[[], int], Callable[[int], None]]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit every OpenBLAS of this process to one thread, and restore it afterwards.

    Two of our threads in OpenBLAS at once, each waking a pool of threads that wait by spinning, took up to 70 times
    as long as with one thread each (512 x 512 eigenproblems, two busy cores). Where no OpenBLAS is found (other
    systems than Linux, other libraries), nothing is changed.
    """
    import scipy.linalg  # noqa: F401 (its own OpenBLAS must be loaded before it can be limited)

    found = [(setter, getter()) for getter, setter in _controls()]
    try:
        for setter, _ in found:
            setter(1)
        yield
    finally:
        for setter, before in found:
            setter(before)


def _controls() -> list[_Pair]:
    """Return (get, set) of the number of threads of each OpenBLAS that is loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = sorted({line.split(maxsplit=5)[-1] for line in lines if "openblas" in line and "/" in line})
    return [pair for path in paths if (pair := _control(path)) is not None]


def _control(path: str) -> _Pair | None:
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    for name in _NAMES:
        getter, setter = (getattr(library, name.format(verb), None) for verb in ("get", "set"))
        if getter is not None and setter is not None:
            return getter, setter
    return None
