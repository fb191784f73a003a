"""LRU: the resident expert that was used longest ago leaves."""

from __future__ import annotations

from moesim.cache.policies import RankedPolicy


class LruPolicy(RankedPolicy):
    """Least recently used (I1).

    An expert that enters counts as used then, so a prefetched expert is not the first to go. Among experts of
    one access the lower key is the older. With every access's experts protected and fitting, this is a stack
    algorithm (Mattson et al., IBM Systems Journal 9(2), 1970): more slots never give fewer hits.
    """

    def worth(self, key: int, now: int) -> int:
        """Return the access of the last use."""
        return now
