"""Units: SI inside, integer nanoseconds in the executors; nothing else multiplies by 1e9.

GB is 1e9 bytes, GiB is 2**30 bytes, and a link's bytes per second are per direction.
"""

from __future__ import annotations

NS_PER_S = 1_000_000_000
NS_PER_US = 1_000
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB = 2**10, 2**20, 2**30

_BYTE_STEPS = ((TB, "TB"), (GB, "GB"), (MB, "MB"), (KB, "kB"), (1, "B"))
_TIME_STEPS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def ns_from_s(seconds: float) -> int:
    """Return `seconds` as whole nanoseconds, rounded half to even, never negative."""
    if not seconds >= 0.0 or seconds == float("inf"):
        raise ValueError(f"a duration must be finite and not negative, got {seconds!r} s")
    return round(seconds * NS_PER_S)


def s_from_ns(ns: int) -> float:
    """Return whole nanoseconds as seconds."""
    return ns / NS_PER_S


def us_from_ns(ns: int) -> float:
    """Return whole nanoseconds as microseconds (the Trace Event format's unit)."""
    return ns / NS_PER_US


def format_bytes(num_bytes: float) -> str:
    """Return e.g. ``12.6 MB`` (decimal units)."""
    for step, name in _BYTE_STEPS:
        if abs(num_bytes) >= step:
            return f"{num_bytes / step:.3g} {name}"
    return f"{num_bytes:.3g} B"


def format_seconds(seconds: float) -> str:
    """Return e.g. ``1.53 ms``."""
    for step, name in _TIME_STEPS:
        if abs(seconds) >= step:
            return f"{seconds / step:.4g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def format_rate(bytes_per_s: float) -> str:
    """Return e.g. ``25 GB/s``."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_percent(fraction: float) -> str:
    """Return e.g. ``3.1 %``."""
    return f"{100 * fraction:.1f} %"
