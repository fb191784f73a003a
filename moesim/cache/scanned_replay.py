"""The compiled replay of the scanned policies (`moesim.cache.policies.scanned`, and some that can be had the same way)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moesim.cache.compiled_layout import NUM_TALLY_ROWS
from moesim.cache.policies.moe_infinity import EPSILON
from moesim.cache.policies.mrs import AVERAGING
from moesim.cache.policies.sch import SegmentCachePolicy
from moesim.cache.policy import POLICIES, AccessStream, PolicyContext
from moesim.cache.scanned_layout import NUM_ROWS, READS_SCORES, READS_STARTS, SCANNED_CODES, SCH, WINDOW

if TYPE_CHECKING:
    from moesim.cache.kernels.scanned import State


def can_scan(policy_name: str, context: PolicyContext, stream: AccessStream) -> bool:
    """Return whether the loop runs this policy on `stream` as the readable replay would.

    It knows neither router scores nor where requests begin, and a segment cache must know the stream that is run.
    """
    code = SCANNED_CODES.get(POLICIES[policy_name])
    if code is None or (code in READS_STARTS and context.request_starts is not None):
        return False
    if code in READS_SCORES and context.scores is not None:
        return False
    return code != SCH or (context.future is not None and _same(context.future, stream))


def _same(one: AccessStream, other: AccessStream) -> bool:
    return one is other or all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("layers", "offsets", "experts"))


def scanned_tally(stream: AccessStream, factory: object, num_layers: int, num_experts: int, slots_per_layer: int, *,
                  shared: bool, preload: Sequence[int] = (), one_by_one: bool = False, protect: bool = True,
                  window: int | None = None) -> np.ndarray:
    """Return the counts, int64[row, layer] (rows as in `moesim.cache.compiled_layout`), of a new cache.

    Args:
        stream: the accesses; a segment cache knows them.
        factory: the policy's class, one of `SCANNED_CODES`.
        num_layers, num_experts, slots_per_layer, shared, preload: of the cache, checked before.
        one_by_one, protect: sequential semantics; whether the experts of an access protect each other from eviction.
        window: of a segment cache, in place of its class's own.
    """
    from moesim.cache.kernels.scanned import Accesses, Rules, replay_scanned

    code = SCANNED_CODES[factory]
    if window is None:
        window = factory.default_window if code == SCH else 0  # type: ignore[attr-defined]
    state = _empty_state(num_layers, num_experts, slots_per_layer, shared)
    entering = np.full(stream.num_accesses, -1, np.int64)
    if code == SCH:
        entering = _entering(stream, num_layers, window)
        state.rows[WINDOW] = _first_windows(stream, num_layers, num_experts, window)
    rules = Rules(code, protect, one_by_one, shared, num_layers, num_experts, window, EPSILON, AVERAGING)
    tally = np.zeros((NUM_TALLY_ROWS, num_layers), np.int64)
    replay_scanned(Accesses(stream.layers, stream.offsets, stream.experts, entering), rules, state,
                   np.array(preload, np.int64), tally)
    return tally


def segment_cache_tally(stream: AccessStream, num_layers: int, num_experts: int, slots_per_layer: int, window: int, *,
                        shared: bool) -> np.ndarray:
    """Return `scanned_tally` of a segment cache of any window."""
    return scanned_tally(stream, SegmentCachePolicy, num_layers, num_experts, slots_per_layer, shared=shared, window=window)


def _empty_state(num_layers: int, num_experts: int, slots_per_layer: int, shared: bool) -> State:
    from moesim.cache.kernels.scanned import State

    num_keys, pools = num_layers * num_experts, 1 if shared else num_layers
    by_layer, by_pool = (num_layers, np.int64), (pools, np.int64)
    return State(
        rows=np.zeros((NUM_ROWS, num_keys), np.int64), recent=np.zeros(num_keys), tokens=np.zeros(*by_layer),
        uses=np.zeros(*by_layer), pools=np.zeros((pools, slots_per_layer * num_layers // pools), np.int64),
        sizes=np.zeros(*by_pool), ages=np.zeros(*by_pool), missed=np.zeros(num_experts, np.int64),
        entries=np.zeros(1, np.int64))


def _places(stream: AccessStream, num_layers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the accesses by layer, int64[access], where each layer begins among them, and each access's place there."""
    order = np.argsort(stream.layers, kind="stable")
    starts = np.searchsorted(stream.layers[order], np.arange(num_layers + 1))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return order, starts, place


def _entering(stream: AccessStream, num_layers: int, window: int) -> np.ndarray:
    """Return int64[access], the access of the same layer `window` places later; -1 where there is none."""
    order, starts, place = _places(stream, num_layers)
    later = place + window
    exists = later < starts[stream.layers + 1]
    return np.where(exists, order[np.where(exists, later, 0)], -1)


def _first_windows(stream: AccessStream, num_layers: int, num_experts: int, window: int) -> np.ndarray:
    """Return int64[key], the uses in the first `window` accesses of each layer."""
    _, starts, place = _places(stream, num_layers)
    early = place - starts[stream.layers] < window
    keys = stream.keys(num_experts)[np.repeat(early, np.diff(stream.offsets))]
    return np.bincount(keys, minlength=num_layers * num_experts)
