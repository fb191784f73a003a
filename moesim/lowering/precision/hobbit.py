"""HOBBIT as a program: two pools, and a width for each missing expert by its tokens' gate weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.precision import ExpertVersions
from moesim.cache.precision_hobbit import HIGH, LOW, SKIP, HobbitPrecision, miss_penalty
from moesim.cache.prefetch import SEES_FUTURE, LookaheadPrefetcher, Prefetcher
from moesim.cache.prefetchers import Wish
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.graph import PRIORITY_DEMAND
from moesim.lowering.machine import STAGING_SLOTS, OffloadMachine
from moesim.lowering.offload import LayerMoment
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.lowering.precision.pools import Pool, PoolPrefetching
from moesim.lowering.precision.program import VersionPlan, VersionProgram
from moesim.lowering.transfers import Transfers
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace

PREFETCH_BITS = ("mixed", "high", "low")
PAPER_WIDTHS = ((16, 4), (8, 2))  # on an RTX 4090, on a Jetson AGX Orin
HIT, LATE, MISS, SKIPPED = "hit", "late", "miss", "skipped"


class Served(NamedTuple):
    """How one chosen expert is served: at which level, and what was found of it."""

    expert: int
    level: int
    found: str


class HobbitProgram(VersionProgram):
    """Tang et al., "HOBBIT", arXiv 2411.01433, GPU-centric: token-level loading, two pools, mixed-precision prefetch.

    An expert whose high copy is there is computed with it; the low copy serves those that need no more; what is there also
    serves an expert that might be skipped. What serves the need but is still on its way is awaited, unless the expert
    may be skipped. Only what is then missing is loaded, in the width that it needs, or skipped. A skipped expert adds
    nothing to its tokens: `debit` counts their gate weight. Records of policies are of experts: both pools are told of every use.

    Args:
        high, low: the pools, of the model's shape; each with a policy of its own.
        prefetch_bits: the width in which a predicted expert is fetched. ``mixed``: what it will need, where the prefetcher is a
            what-if that is built from the future (a wrong guess is fetched low); else high for the first
            guess of a layer and low for the others (ours: predictors here give no weights).

    Raises:
        InputError: a trace without gate weights, and as `VersionProgram`.
    """

    method: ClassVar[str] = "hobbit"
    extra_columns: ClassVar[tuple[str, ...]] = ("high_hits", "low_hits", "high_loads", "low_loads", "skips")

    def __init__(
        self,
        model: ModelSpec,
        trace: RoutingTrace,
        steps: list[Step],
        machine: OffloadMachine,
        cost: CostModel,
        high: ExpertCache,
        low: ExpertCache,
        policy: OffloadPolicy,
        precision: HobbitPrecision,
        prefetcher: Prefetcher | LookaheadPrefetcher | None = None,
        *,
        versions: ExpertVersions | None = None,
        prefetch_bits: str = "mixed",
        dequantize_share: float = 0.0,
    ) -> None:
        if trace.gate_weights is None:
            raise InputError("hobbit: the trace has no gate weights, by which it chooses widths")
        if prefetch_bits not in PREFETCH_BITS:
            raise InputError(f"hobbit: prefetch_bits must be one of {', '.join(PREFETCH_BITS)}, got {prefetch_bits!r}")
        found = precision.versions(model) if versions is None else versions
        _check_versions(found, precision)
        rooms = [cache.num_slots + STAGING_SLOTS for cache in (low, high)]
        device_bytes = sum(room * found.weight_bytes(level) for level, room in enumerate(rooms))
        plan = VersionPlan(found, device_bytes, model.num_pool_experts * found.slow_bytes, dequantize_share)
        super().__init__(model, trace, steps, machine, cost, high, policy, prefetcher, plan)
        self.precision, self.prefetch_bits = precision, prefetch_bits
        self.pools = [self._pool(LOW, low, rooms[HIGH]), self._pool(HIGH, high, 0)]
        self.transfers = self.pools[HIGH].transfers
        self._pool_prefetching = PoolPrefetching(self)
        self._raw: set[int] = set()  # versions that have arrived, or will, and are not dequantised yet

    def miss_penalty(self) -> float:
        """Return the loads on demand in loads of the high version."""
        high, low = (int(self.cache_counts[name].sum()) for name in ("high_loads", "low_loads"))
        return miss_penalty(high, low, self.versions)

    def holds(self, layer: int, expert: int, level: int) -> bool:
        """Return whether a version of at least this level is in a slot or on its way to one."""
        return any(pool.slot_of(layer, expert) >= 0 for pool in self.pools[level:])

    def needs(self, access: int) -> np.ndarray:
        """Return int8[expert], the level that each expert of an access needs (`SKIP`, `NOT_CHOSEN` below 0)."""
        step, layer = divmod(access, self.model.num_moe_layers)
        rows, weights = self.steps[step].step.rows, self.trace.gate_weights
        assert weights is not None
        return self.precision.needs(self.trace.expert_ids[rows, layer], weights[rows, layer], self.model.num_experts)

    def wished_levels(self, at: LayerMoment, wishes: Sequence[Wish]) -> list[int]:
        """Return the level in which each predicted expert is fetched, `SKIP` for one that would be skipped."""
        if self.prefetch_bits != "mixed":
            return [HIGH if self.prefetch_bits == "high" else LOW] * len(wishes)
        if getattr(self.prefetcher, "information", "") in SEES_FUTURE:
            return [self._future_level(at, wish) for wish in wishes]
        first: set[int] = set()
        levels = []
        for wish in wishes:
            levels.append(LOW if wish.layer in first else HIGH)
            first.add(wish.layer)
        return levels

    def reserve_in(self, pool: Pool, at: LayerMoment, layer: int, expert: int, protected: Collection[int]) -> int:
        """Return a slot of a pool, -1 if the expert gets none; whoever leaves the slot is forgotten."""
        reservation = pool.cache.reserve(layer, expert, at.now, protected)
        if reservation is None:
            return -1
        if reservation.victim_key >= 0:
            self._pool_prefetching.lost(self._pool_prefetching.version(pool.level, 0, 0) + reservation.victim_key)
            pool.transfers.forget(reservation.victim_key)
        self._raw.add(self._pool_prefetching.version(pool.level, layer, expert))
        return pool.first_slot + reservation.slot

    def _pool(self, level: int, cache: ExpertCache, first_slot: int) -> Pool:
        num_bytes = self.versions.weight_bytes(level)
        transfers = Transfers(self.graph, self.machine, self.cost, num_bytes, self.policy.chunks,
                              first_slot + cache.num_slots, self.model.num_experts)
        return Pool(level, cache, transfers, first_slot, num_bytes)

    def _about(self) -> tuple[str, Mapping[str, Any]]:
        rule = self.precision
        settings = {"t1": rule.t1, "t2": rule.t2, "paper_widths": (rule.high_bits, rule.low_bits) in PAPER_WIDTHS}
        return f"gate weights, t1 {rule.t1:g}, t2 {rule.t2:g}", settings

    def _all_transfers(self) -> tuple[Transfers, ...]:
        return tuple(pool.transfers for pool in self.pools)

    def _future_level(self, at: LayerMoment, wish: Wish) -> int:
        """The level needed at the layer's next access; low for a wrong guess or one past the end."""
        layers = self.model.num_moe_layers
        access = at.now + (wish.layer - at.layer if wish.layer > at.layer else layers - at.layer + wish.layer)
        if access >= layers * len(self.steps):
            return LOW
        need = int(self.needs(access)[wish.expert])
        return need if need >= SKIP else LOW

    def _moe_layer(self, at: LayerMoment) -> int:
        """Schedule one layer's experts; returns the barrier that ends it."""
        wanted, needs = np.flatnonzero(at.counts), self.needs(at.now)
        served = [self._serve(at.layer, expert, int(needs[expert])) for expert in wanted.tolist()]
        self._pool_prefetching.drop_unserved(at.layer, {s.expert: s.level for s in served})
        self._count_served(at, served)
        used = [s.expert for s in served if s.found != SKIPPED]
        for pool in self.pools:
            pool.cache.touch(at.layer, used, at.now)
        self._shared_expert(at)
        for one in sorted((s for s in served if s.found in (HIT, LATE)), key=lambda s: s.found == LATE):
            self._compute_found(at, one)
        for one in sorted((s for s in served if s.found == MISS), key=lambda s: (-int(at.counts[s.expert]), s.expert)):
            self._load_version(at, one, used)
        self._pool_prefetching.fetch(at, wanted)
        self._add_debit(at, served)
        return self._end(at)

    def _serve(self, layer: int, expert: int, need: int) -> Served:
        """Choose the version that serves an expert: the widest that is there, then one on its way, then a load or nothing."""
        enough = [pool for pool in reversed(self.pools) if pool.level >= need and pool.slot_of(layer, expert) >= 0]
        there = [pool for pool in enough if pool.has_arrived(layer, expert)]
        if there:
            return Served(expert, there[0].level, HIT)
        if need == SKIP:
            return Served(expert, SKIP, SKIPPED)
        return Served(expert, enough[-1].level, LATE) if enough else Served(expert, need, MISS)

    def _count_served(self, at: LayerMoment, served: Sequence[Served]) -> None:
        for one in served:
            ahead = one.level >= 0 and self._pool_prefetching.served(one.level, at.layer, one.expert)
            width = "high" if one.level == HIGH else "low"
            names = {HIT: ["hits", f"{width}_hits"], LATE: ["late_hits"], SKIPPED: ["misses", "skips"],
                     MISS: ["misses", "loads", f"{width}_loads"]}[one.found]
            names += ["late_prefetches" if one.found == LATE else "useful_prefetches"] if ahead else []
            self._count(at.layer, accesses=1, **dict.fromkeys(names, 1))

    def _compute_found(self, at: LayerMoment, one: Served) -> None:
        pool = self.pools[one.level]
        arrival = pool.transfers.promote(self.key(at.layer, one.expert), PRIORITY_DEMAND)
        self._compute_version(at, one, pool.slot_of(at.layer, one.expert), [at.router, *arrival])

    def _load_version(self, at: LayerMoment, one: Served, used: Sequence[int]) -> None:
        """Fetch a version into a slot of its pool, or through a staging slot, then compute it."""
        pool, key = self.pools[one.level], self.key(at.layer, one.expert)
        pool.transfers.forget(key)
        reserved = self.reserve_in(pool, at, at.layer, one.expert, {self.key(at.layer, e) for e in used})
        slot = pool.transfers.staging_slot() if reserved < 0 else reserved
        self._raw.add(self._pool_prefetching.version(one.level, at.layer, one.expert))
        arrival = pool.transfers.fetch(key, slot, "load", PRIORITY_DEMAND, at.router, at.step.index, resident=reserved >= 0)
        self._count(at.layer, loaded_bytes=pool.num_bytes)
        self._compute_version(at, one, slot, [at.router, arrival])

    def _compute_version(self, at: LayerMoment, one: Served, slot: int, deps: list[int]) -> None:
        pool, version = self.pools[one.level], self._pool_prefetching.version(one.level, at.layer, one.expert)
        if version in self._raw:
            deps = self._dequantize(at, one.expert, one.level, pool.num_bytes, slot, deps)
        self._raw.discard(version)
        pool.transfers.use(slot, self._kernel(at, one.expert, one.level, int(at.counts[one.expert]), slot, deps))

    def _add_debit(self, at: LayerMoment, served: Sequence[Served]) -> None:
        level_of = np.full(self.model.num_experts, SKIP, np.int8)
        for one in served:
            level_of[one.expert] = one.level
        ids, weights = self._rows(at)
        self._counter.add(ids, weights, level_of[ids])


def _check_versions(versions: ExpertVersions, precision: HobbitPrecision) -> None:
    if versions.nested or versions.bits != (precision.low_bits, precision.high_bits):
        raise InputError(f"hobbit: needs exclusive copies of {precision.low_bits} and {precision.high_bits} bits, got "
                         f"{'nested ' if versions.nested else ''}{list(versions.bits)}")
    if versions.on_slow_tier != (LOW, HIGH):
        raise InputError("hobbit: both copies of every expert must lie on the slow tier")
