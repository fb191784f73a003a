"""No prefetch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from moesim.cache.prefetch import PrefetchContext


class NoPrefetch:
    """Fetches nothing ahead (I0)."""

    information: ClassVar[str] = "I0"
    source: ClassVar[str] = "none"

    def __init__(self, context: PrefetchContext) -> None:
        del context  # every factory takes one

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return nothing."""
        return []
