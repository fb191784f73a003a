"""FIFO: the resident expert that entered first leaves."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.cache.policies import BasePolicy


class FifoPolicy(BasePolicy):
    """First in, first out (I1): uses change nothing. There are no ties; experts of one access enter in rising order."""

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Return the candidate that entered first."""
        return next(iter(candidates))
