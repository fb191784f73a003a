"""SCH(m): the expert used least often in the next m tokens leaves. Needs the exact future."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moesim.cache.future_window import FutureWindow
from moesim.cache.policies.scanned import ScannedPolicy
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.cache.policy import PolicyContext


class SegmentCachePolicy(ScannedPolicy):
    """Segment cache of m = 16 tokens (Liang et al., "Not All Models Suit Expert Offloading", arXiv 2505.16056; I4).

    The resident with the fewest uses in the next `window` accesses of its layer, the current one excluded, leaves. With one
    token per access and set semantics its hit rate is the paper's SCH(m). A larger window is not Belady: the fewest uses
    leave, not the farthest. The repository's loop adds token t + m after it has worked on token t, so that its m counts
    m - 1 tokens after the current one. Ties: the least recently used, then the lower key.

    Args:
        window: m; the registered names have one each.

    Raises:
        InputError: no future was given, or a window below one.
    """

    information: ClassVar[str] = "I4"
    default_window: ClassVar[int] = 16

    def __init__(self, context: PolicyContext, window: int | None = None) -> None:
        super().__init__(context)
        if context.future is None:
            raise InputError(
                "cache policy 'sch' needs the exact future: give PolicyContext(future=access_stream(...)) of the steps "
                "that will run")
        self._window = FutureWindow(context.future, context.num_layers, context.num_experts,
                                    self.default_window if window is None else window)

    def access_started(self, layer: int, now: int) -> None:
        """Refuse an access that the future does not have."""
        if now >= self._window.num_accesses:
            raise InputError(f"cache policy 'sch': access {now} lies past the end of the future it was given "
                             f"({self._window.num_accesses} accesses); give the stream that is being run")

    def score(self, key: int, now: int) -> float:
        """Return the uses in the window."""
        return self._window.count(key, now)


class SegmentCache4Policy(SegmentCachePolicy):
    """Segment cache of 4 tokens (I4); see `SegmentCachePolicy`."""

    default_window: ClassVar[int] = 4


class SegmentCache64Policy(SegmentCachePolicy):
    """Segment cache of 64 tokens (I4); see `SegmentCachePolicy`."""

    default_window: ClassVar[int] = 64
