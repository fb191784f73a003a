"""Load every absent expert: the device computes everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moesim.lowering.misses.rule import Assignment, LayerWork, split


@dataclass(frozen=True)
class LoadRule:
    """Every expert runs on the device; the absent ones are loaded."""

    information: ClassVar[str] = "I0"
    source: ClassVar[str] = "on-demand loading"

    def assign(self, work: LayerWork) -> Assignment:
        """Return everything on the device."""
        return split(work, set())
