"""The offloaded run itself: at each layer's router decide, load what is missing, and hand the experts their weights.

Accesses have the semantics of `moesim.cache.replay` (``set``): all experts of an access are tested against the content
before it, then the missed ones enter in rising order, none of the access's own leaving. The decisions do not look at the
clock, so the counts of two runs are equal.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.prefetch import Prefetcher
from moesim.errors import CheckError
from moesim.lowering.graph import PRIORITY_ADMIT, PRIORITY_DEMAND, PRIORITY_PREFETCH
from moesim.validate.hf_loader import Load, Loader, synchronize
from moesim.validate.hf_weights import PASSING_SLOTS, Parts, SlotPool, SlowTier

COUNTED = ("accesses", "hits", "misses", "evictions", "bypasses", "loads", "cpu_misses", "prefetches")
MISSES = ("load", "cpu")


class Span(NamedTuple):
    """What the computing thread did from one instant to another; -1 where a label does not apply."""

    kind: str
    step: int
    layer: int
    expert: int
    slot: int
    tokens: int
    start_ns: int
    end_ns: int


@dataclass
class _Access:
    """The layer in progress: its experts' tokens, and what passes through without a slot of its own."""

    layer: int
    tokens: dict[int, int]
    passing: list[int]
    loads: dict[int, Load]


class ExpertRuntime:
    """Serves the experts of one run; not to be used for another.

    Args:
        cache: new, with the policy; its slots are the pool's first ones.
        miss: ``load``, or ``cpu``: a missing expert is computed from the slow tier, and loaded in the background.
        prefetcher: names experts of the next layer at each router, or None.

    Attributes:
        counts: by name, int64[layer]. spans: what the computing thread did. most_resident: most experts in slots at once.
    """

    def __init__(self, tier: SlowTier, pool: SlotPool, loader: Loader, cache: ExpertCache, *, miss: str = "load",
                 prefetcher: Prefetcher | None = None, device: str = "cpu") -> None:
        self._tier, self._pool, self._loader, self.cache = tier, pool, loader, cache
        self._miss, self._prefetcher, self._device = miss, prefetcher, device
        self.counts = {name: np.zeros(cache.num_layers, np.int64) for name in COUNTED}
        self.spans: list[Span] = []
        self.most_resident = 0
        self._resident = 0
        self._step, self._tokens, self._mark = -1, 0, 0
        self._access: _Access | None = None
        self._current, self._parts, self._slot = -1, {}, -1  # type: int, Parts, int
        self._arriving: dict[int, Load] = {}
        self._asked: list[tuple[Load, int]] = []

    # ------------------------------------------------------------ what the model's hooks call

    def begin_pass(self, tokens: int) -> None:
        """A forward pass over so many tokens starts; what was done since the last one belongs to its first layer."""
        self._step, self._tokens = self._step + 1, tokens
        if not self._mark:
            self.mark()

    def mark(self) -> None:
        """What is done from now on belongs to what is noted next."""
        self._mark = self._now()

    def end_pass(self) -> None:
        """The pass is over: what came after the last layer is its head."""
        self._note("head", -1)

    def begin(self, layer: int, counts: np.ndarray) -> None:
        """The router of a layer has spoken: int64[expert], tokens by expert. Decide what to load."""
        self._note("attention", layer)
        wanted = np.flatnonzero(counts)
        access = _Access(layer, dict(zip(wanted.tolist(), counts[wanted].tolist(), strict=True)), [], {})
        self._access, self._current = access, -1
        now = self._step * self.cache.num_layers + layer
        missed = self.cache.touch(layer, wanted.tolist(), now)
        self._add(layer, accesses=len(wanted), hits=len(wanted) - len(missed), misses=len(missed))
        for expert in access.tokens:
            if expert not in missed and (load := self._arriving.get(self._key(layer, expert))) and self._miss == "load":
                self._loader.promote(load)
        own = frozenset(self.cache.keys_of(layer, wanted.tolist()))
        for expert in missed:
            self._bring(access, expert, now, own)
        for expert in access.passing[:PASSING_SLOTS]:
            self._pass_through(access, expert)
        if self._prefetcher is not None and layer + 1 < self.cache.num_layers:
            self._prefetch(layer, wanted, counts[wanted], now, own)

    def weights(self, layer: int, name: str, expert: int) -> Parts:
        """Return one weight of an expert of the layer in progress, waiting until it is there."""
        access = self._access
        if access is None or access.layer != layer or expert not in access.tokens:
            raise CheckError(f"layer {layer} computes expert {expert}, which its router did not choose")
        if expert != self._current:
            self._end_expert(layer)
            self._parts, self._slot = self._find(access, expert)
            self._current, self._mark = expert, self._now()
        return self._parts[name]

    def end(self, layer: int) -> None:
        """The experts of a layer are done."""
        self._end_expert(layer)
        self._access, self._current = None, -1

    # ------------------------------------------------------------ decisions

    def _key(self, layer: int, expert: int) -> int:
        return layer * self.cache.num_experts + expert

    def _bring(self, access: _Access, expert: int, now: int, own: frozenset[int]) -> None:
        """Give a missed expert a slot, or let it pass through."""
        on_cpu = self._miss == "cpu"
        slot = self._reserve(access.layer, expert, now, own)
        self._add(access.layer, cpu_misses=on_cpu, loads=not on_cpu, bypasses=slot < 0)
        if slot >= 0:
            kind, priority = ("admit", PRIORITY_ADMIT) if on_cpu else ("load", PRIORITY_DEMAND)
            self._fetch(kind, access.layer, expert, slot, priority)
        elif not on_cpu:
            access.passing.append(expert)

    def _reserve(self, layer: int, expert: int, now: int, protected: frozenset[int]) -> int:
        reservation = self.cache.reserve(layer, expert, now, protected)
        if reservation is None:
            return -1
        self._add(layer, evictions=reservation.num_victims)
        self._arriving.pop(reservation.victim_key, None)
        self._resident += 1 - reservation.num_victims
        self.most_resident = max(self.most_resident, self._resident)
        if reservation.slot >= self._pool.num_slots:
            raise CheckError(f"the cache gave slot {reservation.slot}, but the pool has {self._pool.num_slots}")
        return reservation.slot

    def _fetch(self, kind: str, layer: int, expert: int, slot: int, priority: int) -> Load:
        load = Load(kind, self._step, layer, expert, slot)
        if slot < self._pool.num_slots:
            self._arriving[self._key(layer, expert)] = load
        self._asked.append((load, priority))
        return load

    def _ask(self) -> None:
        """Hand over what was decided, when the router's part is over: a simulated run's copies begin there too."""
        for load, priority in self._asked:
            self._loader.ask(load, priority)
        self._asked = []

    def _pass_through(self, access: _Access, expert: int) -> None:
        """Load an expert that gets no slot into one of the passing slots, in turn."""
        slot = self._pool.num_slots + access.passing.index(expert) % PASSING_SLOTS
        access.loads[expert] = self._fetch("load", access.layer, expert, slot, PRIORITY_DEMAND)

    def _prefetch(self, layer: int, wanted: np.ndarray, counts: np.ndarray, now: int, own: frozenset[int]) -> None:
        assert self._prefetcher is not None
        predicted = self._prefetcher.predict(layer, wanted, counts, now)
        protected = own | frozenset(self.cache.keys_of(layer + 1, predicted))
        for expert in predicted:
            if self.cache.slot_of(layer + 1, expert) < 0:
                slot = self._reserve(layer + 1, expert, now, protected)
                if slot >= 0:
                    self._add(layer + 1, prefetches=1)
                    self._fetch("prefetch", layer + 1, expert, slot, PRIORITY_PREFETCH)

    # ------------------------------------------------------------ weights and time

    def _find(self, access: _Access, expert: int) -> tuple[Parts, int]:
        """Return an expert's weights and slot (-1: the slow tier), when they are there."""
        layer = access.layer
        slot, key = self.cache.slot_of(layer, expert), self._key(layer, expert)
        load = access.loads.get(expert) or self._arriving.get(key)
        if self._miss == "cpu" and (slot < 0 or (load is not None and not load.done)):
            return self._tier.of(layer, expert), -1
        if load is not None:
            self._loader.wait(load)
            self._arriving.pop(key, None)
        if slot < 0:
            assert load is not None
            self._pass_next(access, expert)
            slot = load.slot
        return self._pool.of(slot), slot

    def _pass_next(self, access: _Access, expert: int) -> None:
        """The passing expert before this one is done with its slot: load the next into it."""
        place = access.passing.index(expert) + 1
        if place >= PASSING_SLOTS and place < len(access.passing):
            self._pass_through(access, access.passing[place])
            self._ask()

    def _end_expert(self, layer: int) -> None:
        """Close the span of the expert in progress, or of the router where there was none yet."""
        if self._current < 0:
            self._note("router", layer)
            self._ask()
            return
        assert self._access is not None
        kind = "expert" if self._slot >= 0 else "cpu_expert"
        self._note(kind, layer, self._current, self._slot, self._access.tokens[self._current])

    def _note(self, kind: str, layer: int, expert: int = -1, slot: int = -1, tokens: int = 0) -> None:
        end = max(self._now(), self._mark + 1)
        self.spans.append(Span(kind, self._step, layer, expert, slot, tokens or self._tokens, self._mark, end))
        self._mark = end

    def _now(self) -> int:
        synchronize(self._device)
        return time.perf_counter_ns()

    def _add(self, layer: int, **values: int) -> None:
        for name, value in values.items():
            self.counts[name][layer] += value

    def contents(self) -> dict[int, tuple[int, int]]:
        """Return slot -> (layer, expert) of what is resident."""
        cache = self.cache
        return {cache.slot_of(layer, expert): (layer, expert)
                for layer in range(cache.num_layers) for expert in cache.residents(layer)}

    def check(self) -> None:
        """Raise CheckError unless every slot holds its expert's bytes and no layer has more than its slots."""
        self._loader.drain()
        self.cache.check()
        fullest = max(len(self.cache.residents(layer)) for layer in range(self.cache.num_layers))
        if fullest > self.cache.slots_per_layer:
            raise CheckError(f"a layer has {fullest} experts in {self.cache.slots_per_layer} slots")
        for slot, (layer, expert) in self.contents().items():
            if not self._pool.holds(slot, self._tier.of(layer, expert)):
                raise CheckError(f"after the run slot {slot} does not hold expert {expert} of layer {layer}")
