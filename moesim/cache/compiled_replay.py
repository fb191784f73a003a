"""Replay in compiled loops: the counts of `moesim.cache.replay.replay`, some hundred times as fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.cache.byte_cache import ByteCache
from moesim.cache.cache import BEFORE_THE_RUN, ExpertCache
from moesim.cache.compiled_layout import (
    ADMITTED,
    BYPASSES,
    CODES,
    COLD,
    COLD_IN_FREE,
    EVICTIONS,
    FREE,
    LRU,
    MAX_ACCESSES,
    MAX_USES,
    MISSES,
    NEED_FUTURE,
    NUM_TALLY_ROWS,
    SIZE,
    SOON,
    STATIC,
    Layout,
)
from moesim.cache.policies.lru import LruPolicy
from moesim.cache.policy import POLICIES, AccessStream, EvictionPolicy, PolicyContext, make_policy
from moesim.cache.replay import SEMANTICS, CacheStats, replay
from moesim.cache.scanned_replay import can_scan, scanned_tally
from moesim.errors import InputError, unknown

# Entries of an LRU queue per slot, and besides: enough that packing it takes a small part of the time.
QUEUE_PER_SLOT, QUEUE_ENTRIES = 16, 4096


def replay_compiled(
    stream: AccessStream, policy_name: str, context: PolicyContext, *, slots_per_layer: int | None = None,
    bytes_per_layer: int | None = None, expert_bytes: np.ndarray | None = None, shared: bool = False,
    preload: Sequence[int] = (), semantics: str = "set", count_cold: bool = True, current_evictable: bool = False,
) -> CacheStats:
    """Return what ``replay(stream, cache)`` returns for a new cache under the named policy; no cache is needed.

    Compiled are the built-in policies but ARC, LIRS, S3-FIFO and SIEVE; those of `moesim.cache.scanned_layout` in slots only,
    and without scores and request starts. All else (a plug-in's policy, a future that is not the stream that is run, streams
    of more than 2^28 accesses or 2^31 uses) goes to the readable `replay`, at its speed.

    Args:
        stream: the accesses; each is one (step, layer) with its distinct experts.
        policy_name, context: as for `make_policy`; the Belady policies need ``context.future``, normally `stream`.
        slots_per_layer: capacity in experts, as of an `ExpertCache`; or
        bytes_per_layer, expert_bytes: capacity in bytes and int64[layer, expert], as of a `ByteCache`.
        shared: one pool for all layers.
        preload: keys that are resident at the start.
        semantics, count_cold, current_evictable: see `replay`.

    Raises:
        InputError: what `replay`, `make_policy`, the cache or its `preload` refuse; both or neither of the capacities.
    """
    if semantics not in SEMANTICS:
        raise unknown("access semantics", semantics, SEMANTICS)
    stream.check_fits(context.num_layers, context.num_experts)
    code = _compiled_code(policy_name, stream, context)
    policy = LruPolicy(context) if code not in (None, STATIC) else make_policy(policy_name, context)
    cache = _new_cache(context, policy, slots_per_layer, bytes_per_layer, expert_bytes, shared)
    cache.preload(preload)
    one_by_one = semantics == "sequential"
    protect = not (one_by_one or current_evictable)
    if code is None and slots_per_layer is not None and can_scan(policy_name, context, stream):
        tally = scanned_tally(stream, POLICIES[policy_name], context.num_layers, context.num_experts, slots_per_layer,
                              shared=shared, preload=preload, one_by_one=one_by_one, protect=protect)
        return _stats(stream, tally, semantics, count_cold, current_evictable)
    if code is None:
        return replay(stream, cache, semantics=semantics, count_cold=count_cold, current_evictable=current_evictable)
    run = _Run(stream, code, cache, one_by_one, protect)
    tally = run.lru() if run.suits_lru(preload) else run.ranked(preload)
    return _stats(stream, tally, semantics, count_cold, current_evictable)


def _compiled_code(policy_name: str, stream: AccessStream, context: PolicyContext) -> int | None:
    """Return the code of the policy, or None if only the readable replay can run it."""
    code = CODES.get(POLICIES[policy_name])
    if stream.num_accesses > MAX_ACCESSES or len(stream.experts) > MAX_USES:
        return None
    if code in NEED_FUTURE and (context.future is None or not _same(context.future, stream)):
        return None
    return code


def _same(one: AccessStream, other: AccessStream) -> bool:
    return one is other or all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("layers", "offsets", "experts"))


def _new_cache(context: PolicyContext, policy: EvictionPolicy, slots: int | None, room_bytes: int | None,
               expert_bytes: np.ndarray | None, shared: bool) -> ExpertCache:
    if slots is not None and room_bytes is None and expert_bytes is None:
        return ExpertCache(context.num_layers, context.num_experts, slots, policy, shared=shared)
    if slots is None and room_bytes is not None and expert_bytes is not None:
        return ByteCache(context.num_layers, context.num_experts, room_bytes, expert_bytes, policy, shared=shared)
    raise InputError("cache: give slots_per_layer, or bytes_per_layer with expert_bytes")


@dataclass(frozen=True)
class _Run:
    """One compiled replay. `cache` was preloaded, and says how much is free and, for a fixed set, who is admitted."""

    stream: AccessStream
    code: int
    cache: ExpertCache
    one_by_one: bool
    protect: bool

    @property
    def layout(self) -> Layout:
        """Where the state keeps each key."""
        return Layout(self.cache.num_layers, self.cache.num_experts, self.cache.shared)

    def suits_lru(self, preload: Sequence[int]) -> bool:
        """Whether the LRU loop can run it: slots, empty at the start, enough of them for each group tested together."""
        if self.code != LRU or len(preload) or isinstance(self.cache, ByteCache):
            return False
        width = 1 if self.one_by_one else int(np.diff(self.stream.offsets).max())
        return width <= self.cache.num_free(0)

    def lru(self) -> np.ndarray:
        """Return the counts, int64[row, layer]; where each access fits, no expert is evicted by its own access."""
        from moesim.cache.kernels.lru import FREE_SLOTS, UNUSED, replay_lru

        layout, slots = self.layout, self.cache.num_free(0)
        pools = np.zeros((layout.num_pools, 3), np.int64)
        pools[:, FREE_SLOTS] = slots
        entries = QUEUE_PER_SLOT * slots + QUEUE_ENTRIES + self.cache.num_experts
        tally = np.zeros((NUM_TALLY_ROWS, self.cache.num_layers), np.int64)
        replay_lru(self.stream.layers, self.stream.offsets, self.stream.experts, layout.shared, self.one_by_one,
                   layout.row_width, np.empty((layout.num_pools, entries), np.int32),
                   np.full(layout.num_indices, UNUSED, np.int64), pools, tally)
        tally[EVICTIONS] = tally[MISSES] - tally[COLD_IN_FREE]
        return tally

    def ranked(self, preload: Sequence[int]) -> np.ndarray:
        """Return the counts, int64[row, layer]."""
        from moesim.cache.kernels.ranked import Rules
        from moesim.cache.kernels.ranked import replay as compiled

        layout, looks_ahead = self.layout, self.code in NEED_FUTURE
        upcoming, first = layout.next_uses(self.stream) if looks_ahead else (np.empty(0, np.int32), None)
        rules = Rules(self.code, self.protect, self.one_by_one, looks_ahead, layout.shared, layout.row_width,
                      layout.pool_blocks)
        tally = np.zeros((NUM_TALLY_ROWS, self.cache.num_layers), np.int64)
        compiled(self.stream.layers, self.stream.offsets, self.stream.experts, upcoming, rules,
                 self._state(layout.indices(preload), first), tally)
        return tally

    def _state(self, preloaded: np.ndarray, first: np.ndarray | None) -> np.ndarray:
        """Return the state at the start, int64[row, index]; `first` as of `Layout.next_uses`."""
        layout, state = self.layout, self.layout.empty_state()
        keys = np.arange(layout.num_layers * layout.num_experts)
        if isinstance(self.cache, ByteCache):
            state[SIZE, layout.indices(keys)] = self.cache.expert_bytes.ravel()
        if self.code == STATIC:
            state[ADMITTED, layout.indices(keys)] = [self.cache.policy.admits(key, BEFORE_THE_RUN) for key in keys.tolist()]
        worth = np.full(len(preloaded), BEFORE_THE_RUN, np.int64)
        if first is not None:
            worth = np.where(first[preloaded] >= 0, SOON - first[preloaded], worth)
        layout.rank(state, preloaded, worth)
        state[FREE, :layout.num_pools] = [self._free(pool) for pool in range(layout.num_pools)]
        return state

    def _free(self, pool: int) -> int:
        return self.cache.num_free_bytes(pool) if isinstance(self.cache, ByteCache) else self.cache.num_free(pool)


def _stats(stream: AccessStream, tally: np.ndarray, semantics: str, count_cold: bool,
           current_evictable: bool) -> CacheStats:
    # Sums below 2^53 are exact in the float64 that bincount adds in.
    accesses = np.bincount(stream.layers, np.diff(stream.offsets), minlength=tally.shape[1]).astype(np.int64)
    misses = tally[MISSES] if count_cold else tally[MISSES] - tally[COLD_IN_FREE]
    return CacheStats(
        accesses=accesses, hits=accesses - misses, misses=misses, cold_misses=tally[COLD], evictions=tally[EVICTIONS],
        bypasses=tally[BYPASSES], semantics=semantics, count_cold=count_cold, current_evictable=current_evictable)
