"""llama.cpp: whole layers of experts on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moesim.lowering.misses.rule import Assignment, LayerWork, check_not_negative, cpu_times, split


@dataclass(frozen=True)
class LlamaCppRule:
    """llama.cpp's ``--n-cpu-moe N``: the experts of the first N MoE layers on the CPU, all others on the device.

    The engine counts the model's own layers from 0, dense ones included; here `cpu_layers` counts MoE layers.
    """

    cpu_layers: int = 0
    information: ClassVar[str] = "I0"
    source: ClassVar[str] = "llama.cpp --n-cpu-moe"

    def __post_init__(self) -> None:
        check_not_negative("llamacpp", cpu_layers=self.cpu_layers)

    def assign(self, work: LayerWork) -> Assignment:
        """Return everything on one side."""
        if work.layer >= self.cpu_layers:
            return split(work, set())
        cpu_times(work, "llamacpp")
        return split(work, set(work.experts))
