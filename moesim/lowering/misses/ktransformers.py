"""KTransformers: a static split by residency, with deferred experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moesim.lowering.misses.cpu import CpuMissRule
from moesim.lowering.misses.rule import Assignment, LayerWork, check_not_negative


@dataclass(frozen=True)
class KTransformersRule:
    """KTransformers (SOSP 2025): residents on the device, all others on the CPU, nothing is ever loaded.

    `defer`: so many CPU experts of a layer, those of fewest rows (then of the higher id), are added one layer later, so that the
    CPU works while the device computes the next attention; the last layer defers none. The authors choose by gate weight,
    which is not known here.
    """

    defer: int = 0
    information: ClassVar[str] = "I2"
    source: ClassVar[str] = "KTransformers, SOSP 2025"

    def __post_init__(self) -> None:
        check_not_negative("ktransformers", defer=self.defer)

    def assign(self, work: LayerWork) -> Assignment:
        """Return the split by residency; the deferred ones come last on the CPU, which takes the fullest first."""
        made = CpuMissRule().assign(work)
        number = 0 if work.layer + 1 == work.num_layers else min(self.defer, len(made.cpu))
        return Assignment(made.gpu, made.cpu, frozenset(made.cpu[len(made.cpu) - number:]))
