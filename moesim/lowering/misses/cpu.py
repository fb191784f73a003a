"""The CPU computes the absent experts, or all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moesim.lowering.misses.rule import Assignment, LayerWork, absentees, cpu_times, split


@dataclass(frozen=True)
class CpuMissRule:
    """Residents run on the device, absent experts on the CPU."""

    information: ClassVar[str] = "I1"
    source: ClassVar[str] = "compute where the weights are"

    def assign(self, work: LayerWork) -> Assignment:
        """Return the split by residency."""
        absent = set(absentees(work))
        if absent:
            cpu_times(work, "cpu")
        return split(work, absent)


@dataclass(frozen=True)
class CpuOnlyRule:
    """Every expert runs on the CPU, resident or not (llama.cpp's ``--cpu-moe``)."""

    information: ClassVar[str] = "I0"
    source: ClassVar[str] = "llama.cpp --cpu-moe"

    def assign(self, work: LayerWork) -> Assignment:
        """Return everything on the CPU."""
        cpu_times(work, "cpu-only")
        return split(work, set(work.experts))
