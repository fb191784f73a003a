"""What the benchmarks measure with: CPU time of a call, and the largest memory of the process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from moesim.units import KIB


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def peak_bytes() -> int:
    """Return the largest memory that this process has held, imports included.

    On Linux from ``/proc``: what `getrusage` says starts with the memory of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * KIB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB
