"""Replay: hits and misses of a stream of accesses on a cache, without any notion of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moesim.cache.cache import ExpertCache
from moesim.cache.policy import AccessStream
from moesim.errors import CheckError, unknown

COUNTS = ("accesses", "hits", "misses", "cold_misses", "evictions", "bypasses")


@dataclass(frozen=True)
class CacheStats:
    """Counts per layer, int64[layer], and the access semantics under which they were counted.

    Attributes:
        accesses: expert accesses; ``accesses = hits + misses``.
        hits, misses: whether the expert was resident when tested.
        cold_misses: experts used for the first time and not resident then. They are among `misses`, but with
            ``count_cold=False`` those that found a free slot are among `hits` instead.
        evictions: experts that left for another.
        bypasses: misses that got no slot (the policy refused, or the slots were all protected).
        semantics, count_cold, current_evictable: see `replay`; hit rates compare only where these agree.

    Raises:
        CheckError: hits and misses do not sum to the accesses.
    """

    accesses: np.ndarray
    hits: np.ndarray
    misses: np.ndarray
    cold_misses: np.ndarray
    evictions: np.ndarray
    bypasses: np.ndarray
    semantics: str
    count_cold: bool
    current_evictable: bool

    def __post_init__(self) -> None:
        for name in COUNTS:
            array = np.array(getattr(self, name), dtype=np.int64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if not np.array_equal(self.hits + self.misses, self.accesses):
            raise CheckError("cache statistics: hits + misses are not the accesses")

    @property
    def hit_rate(self) -> float:
        """Hits per access over all layers; nan if there was no access."""
        total = int(self.accesses.sum())
        return int(self.hits.sum()) / total if total else float("nan")

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer: layer, the counts, hit_rate (nan without accesses)."""
        counts = pd.DataFrame({name: getattr(self, name) for name in COUNTS})
        frame = counts.rename_axis("layer").reset_index()
        return frame.assign(hit_rate=frame["hits"] / frame["accesses"].where(frame["accesses"] > 0))


def replay(stream: AccessStream, cache: ExpertCache, *, semantics: str = "set", count_cold: bool = True,
           current_evictable: bool = False) -> CacheStats:
    """Run `stream` on `cache` (new, or preloaded) and return what hit.

    Args:
        stream: the accesses; each is one (step, layer) with its distinct experts.
        cache: is changed, and can serve one replay only.
        semantics: ``set`` tests all experts of an access against the content before the access, then inserts
            the missed ones in rising order; ``sequential`` tests and inserts one expert after the other, so
            that experts of one access may evict each other (`current_evictable` then has no effect).
        count_cold: if False, the first use of an expert that finds a free slot counts as a hit, as in moe-lrc
            (arXiv 2505.16056), so that a cache as large as the model reaches a hit rate of one.
        current_evictable: if False, ``set`` protects the experts of the current access; when they outnumber
            the slots, those left over pass through: misses without a slot (a bypass). If True, they may be
            evicted by each other.

    Raises:
        InputError: an unknown semantics, a stream outside the cache's model, a cache that ran before.
    """
    if semantics not in SEMANTICS:
        raise unknown("access semantics", semantics, SEMANTICS)
    stream.check_fits(cache.num_layers, cache.num_experts)
    run = _Replay(cache, current_evictable or semantics == "sequential")
    step = SEMANTICS[semantics]
    offsets, experts = stream.offsets.tolist(), stream.experts.tolist()
    for now, layer in enumerate(stream.layers.tolist()):
        step(run, layer, experts[offsets[now]: offsets[now + 1]], now)
    return run.stats(stream, semantics, count_cold, current_evictable)


class _Replay:
    """The counts of a replay in progress."""

    def __init__(self, cache: ExpertCache, current_evictable: bool) -> None:
        self.cache, self.current_evictable = cache, current_evictable
        self.seen = bytearray(cache.num_layers * cache.num_experts)
        self.misses, self.cold, self.cold_in_free, self.evictions, self.bypasses = (
            [0] * cache.num_layers for _ in range(5))

    def stats(self, stream: AccessStream, semantics: str, count_cold: bool,
              current_evictable: bool) -> CacheStats:
        """Return the finished counts."""
        accesses = np.zeros(self.cache.num_layers, dtype=np.int64)
        np.add.at(accesses, stream.layers, np.diff(stream.offsets))
        misses = np.array(self.misses)
        if not count_cold:
            misses -= np.array(self.cold_in_free)
        return CacheStats(
            accesses=accesses, hits=accesses - misses, misses=misses, cold_misses=np.array(self.cold),
            evictions=np.array(self.evictions), bypasses=np.array(self.bypasses), semantics=semantics,
            count_cold=count_cold, current_evictable=current_evictable)

    def load(self, layer: int, missed: list[int], now: int, protected: frozenset[int]) -> None:
        """Count missed experts and bring them in."""
        first = layer * self.cache.num_experts
        self.misses[layer] += len(missed)
        for expert in missed:
            reservation = self.cache.reserve(layer, expert, now, protected)
            if reservation is None:
                self.bypasses[layer] += 1
            else:
                self.evictions[layer] += reservation.num_victims
            if not self.seen[first + expert]:
                self.cold[layer] += 1
                self.cold_in_free[layer] += reservation is not None and not reservation.num_victims


def _set_access(run: _Replay, layer: int, experts: list[int], now: int) -> None:
    """Test all, then insert."""
    cache, first = run.cache, layer * run.cache.num_experts
    missed = cache.touch(layer, experts, now)
    if missed:
        keep = () if run.current_evictable else (first + expert for expert in experts)
        run.load(layer, missed, now, frozenset(keep))
    for expert in experts:
        run.seen[first + expert] = 1


def _sequential_access(run: _Replay, layer: int, experts: list[int], now: int) -> None:
    """Test and insert one by one."""
    cache, first = run.cache, layer * run.cache.num_experts
    for expert in experts:
        missed = cache.touch(layer, (expert,), now)
        if missed:
            run.load(layer, missed, now, frozenset())
        run.seen[first + expert] = 1


SEMANTICS: dict[str, Callable[[_Replay, int, list[int], int], None]] = {
    "set": _set_access,
    "sequential": _sequential_access,
}
