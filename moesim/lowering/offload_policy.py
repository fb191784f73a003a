"""What an offloaded run does with a miss, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import InputError

MISSES = ("load", "cpu", "faster")
CACHE_COLUMNS = (
    "accesses",
    "hits",
    "late_hits",
    "misses",
    "cpu_misses",
    "loads",
    "admits",
    "prefetches",
    "useful_prefetches",
    "late_prefetches",
    "useless_prefetches",
    "cancelled_prefetches",
)


@dataclass(frozen=True)
class OffloadPolicy:
    """What to do with a miss, and what to fetch ahead.

    `miss`: ``load`` (fetch, then compute on the device), ``cpu`` (compute where the weights are; with
    `admit` they are also fetched in the background), ``faster`` (Fiddler's rule, arXiv 2402.07033: whichever is
    estimated to take less time for this expert's tokens). `chunks`: pieces of one expert's copy, the grain at which a
    demand load overtakes prefetches (ProMoE uses 3: gate, up, down). `write_back`: an expert that leaves its slot is copied
    back over the link (Mixtral-offloading's swap); otherwise the slow memory has kept its copy.
    """

    miss: str = "load"
    admit: bool = True
    chunks: int = 3
    write_back: bool = False

    def __post_init__(self) -> None:
        if self.miss not in MISSES:
            raise InputError(f"miss must be one of {', '.join(MISSES)}, got {self.miss!r}")
        if self.chunks < 1:
            raise InputError(f"chunks must be at least 1, got {self.chunks}")
