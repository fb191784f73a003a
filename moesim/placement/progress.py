"""Progress of a search: the best plan so far and the best proven bound, shared by all parts of a solve."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Report:
    """One moment of a search, for a progress line. `objective` and `bound` may be None."""

    seconds: float
    objective: float | None
    bound: float | None
    sense: str
    stage: str


@dataclass
class Progress:
    """What a search has found. Solvers call `found` and `proved`; Ctrl-C then loses nothing.

    Attributes:
        listener: called with a `Report` at every improvement.
        sense: ``min`` or ``max``, set by who starts the search.
    """

    listener: Callable[[Report], None] | None = None
    sense: str = "min"
    stage: str = ""
    slots: np.ndarray | None = None
    objective: float | None = None
    bound: float | None = None
    _started_s: float = field(default_factory=time.perf_counter)

    def found(self, slots: np.ndarray, objective: float) -> bool:
        """Record int[layer, slot] if it is better than what is known; return whether it is."""
        if self.objective is not None and not self._better(objective, self.objective):
            return False
        self.slots, self.objective = np.array(slots, np.int32), objective
        self._tell()
        return True

    def proved(self, bound: float) -> None:
        """Record a bound if it is tighter."""
        if self.bound is None or self._better(self.bound, bound):
            self.bound = bound
            self._tell()

    def at(self, stage: str) -> None:
        """Say what is being done now."""
        self.stage = stage
        self._tell()

    def _better(self, new: float, old: float) -> bool:
        return new < old if self.sense == "min" else new > old

    def _tell(self) -> None:
        if self.listener is not None:
            seconds = time.perf_counter() - self._started_s
            self.listener(Report(seconds, self.objective, self.bound, self.sense, self.stage))
