"""What an offloaded run must have counted: replay of the plain model's routing, which the run had no part in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.policy import AccessStream
from moesim.cache.prefetch import Prefetcher
from moesim.cache.replay import replay
from moesim.errors import CheckError

REPLAYED = ("accesses", "hits", "misses", "evictions", "bypasses")


def replayed_counts(stream: AccessStream, cache: ExpertCache) -> dict[str, np.ndarray]:
    """Return int64[layer] by name, what `moesim.cache.replay` counts on a new cache."""
    stats = replay(stream, cache)
    return {name: getattr(stats, name) for name in REPLAYED}


def prefetched_counts(stream: AccessStream, cache: ExpertCache, prefetcher: Prefetcher,
                      tokens: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the same counts, and `prefetches`, where experts of the next layer are fetched at each router.

    Hits count whether or not a prefetch would have landed. `tokens` is per access int64[expert], tokens of its experts.
    """
    counts = {name: np.zeros(cache.num_layers, np.int64) for name in (*REPLAYED, "prefetches")}
    for now, layer in enumerate(stream.layers.tolist()):
        wanted = stream.experts_of(now).astype(np.int64)
        missed = cache.touch(layer, wanted.tolist(), now)
        own = frozenset(cache.keys_of(layer, wanted.tolist()))
        found = [cache.reserve(layer, expert, now, own) for expert in missed]
        row = (len(wanted), len(wanted) - len(missed), len(missed), sum(r.num_victims for r in found if r), found.count(None))
        for name, value in zip(REPLAYED, row, strict=True):
            counts[name][layer] += value
        if layer + 1 == cache.num_layers:
            continue
        predicted = prefetcher.predict(layer, wanted, tokens[now], now)
        absent = [expert for expert in predicted if cache.slot_of(layer + 1, expert) < 0]
        keep = own | frozenset(cache.keys_of(layer + 1, predicted))
        ahead = [r for r in (cache.reserve(layer + 1, expert, now, keep) for expert in absent) if r]
        counts["prefetches"][layer + 1] += len(ahead)
        counts["evictions"][layer + 1] += sum(r.num_victims for r in ahead)
    return counts


def check_counts(measured: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Raise CheckError unless a run counted, layer by layer, what was expected."""
    for name, values in expected.items():
        if not np.array_equal(measured[name], values):
            layer = int(np.flatnonzero(measured[name] != values)[0])
            raise CheckError(f"the run counted {measured[name][layer]} {name} in layer {layer}, replay of the plain model's "
                             f"routing {values[layer]}")
