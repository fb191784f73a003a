"""Compiled engines that are never waited for: SimPy answers while they are compiled in the background.

The kernels are compiled by numba at their first use and kept on disk, once per machine and version. That takes tens of
seconds, so the first run on a machine starts a second process that compiles them, and runs on SimPy until it is
done: both give the same table, bit for bit, so a run may change over at any point. ``moesim compile`` does it at once.
``MOESIM_BACKGROUND_COMPILE=0`` keeps the second process away (a batch system may not want it); runs then stay on SimPy
until ``moesim compile`` was called.

A marker file (named by a digest of the sources, numba, Python and the processor) says that they are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

FOLDERS = ("hardware", "cache", "lowering", "simulate")


def compiled_ready() -> bool:
    """Return whether the kernels of this version have been compiled on this machine."""
    return _marker().is_file()


def compile_in_background() -> None:
    """Start compiling in a process of its own, once per run; failures are silent, SimPy goes on."""
    if os.environ.get("MOESIM_BACKGROUND_COMPILE") == "0" or not _started():
        return
    with contextlib.suppress(OSError):
        subprocess.Popen(
            [sys.executable, "-m", "moesim.simulate.compile_ahead"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)


def compile_now() -> Path:
    """Compile every kernel that is not on disk yet, by running one small case of each engine; returns the marker."""
    from moesim.artifacts import write_text
    from moesim.simulate.small_cases import run_small_cases

    run_small_cases()
    return write_text(_marker(), "the compiled loops of moesim are in numba's cache\n")


@cache
def _marker() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moesim" / f"compiled-{_digest()}"


def _digest() -> str:
    """Digest of everything that a compiled kernel depends on."""
    from importlib.metadata import version

    import llvmlite.binding as llvm

    package = Path(__file__).parent.parent
    hasher = hashlib.sha256(f"{sys.version} {version('numba')} {llvm.get_host_cpu_name()} {package}".encode())
    hasher.update(os.environ.get("NUMBA_CACHE_DIR", "").encode())
    for folder in FOLDERS:
        for file in sorted((package / folder).rglob("*.py")):  # kernels take constants from beside them
            hasher.update(file.read_bytes())
    return hasher.hexdigest()[:16]


@cache
def _once() -> list[bool]:
    return []


def _started() -> bool:
    """Whether this is the first call of the process."""
    first = not _once()
    _once().append(True)
    return first


if __name__ == "__main__":
    compile_now()
