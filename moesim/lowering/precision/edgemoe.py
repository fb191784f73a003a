"""EdgeMoE as a program: every expert has one width, chosen offline; a buffer in bytes holds as many as fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from moesim.cache.byte_cache import ByteCache
from moesim.cache.precision import ExpertVersions, Quantization, exclusive_versions
from moesim.cache.precision_bits import BitChoice
from moesim.cache.prefetch import LookaheadPrefetcher, Prefetcher
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.graph import TaskGraph
from moesim.lowering.machine import STAGING_SLOTS, OffloadMachine
from moesim.lowering.offload import LayerMoment
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.lowering.precision.program import VersionPlan, VersionProgram
from moesim.lowering.transfers import Transfers
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace

DEQUANTIZE_SHARE = 0.027  # of the pure I/O time, on a Jetson TX2 (arXiv 2308.14352)


class SizedTransfers(Transfers):
    """`Transfers` of experts that each have a size of their own, into slots that are only numbers.

    Args:
        sizes: bytes of every expert, by key.
    """

    def __init__(self, graph: TaskGraph, machine: OffloadMachine, cost: CostModel, sizes: Sequence[int], chunks: int,
                 num_slots: int, num_experts: int) -> None:
        super().__init__(graph, machine, cost, max(sizes), chunks, num_slots, num_experts)
        self.sizes = sizes
        self.fresh: set[int] = set()  # copied, and not dequantised since
        self.asked_bytes = {kind: np.zeros(-(-len(sizes) // num_experts), np.int64) for kind in ("load", "prefetch")}

    def fetch(self, key: int, slot: int, kind: str, *args: Any, **options: Any) -> int:
        """Emit the copy of one expert, as many bytes as it has."""
        self.fresh.add(key)
        self.asked_bytes[kind][key // self.num_experts] += self.sizes[key]
        return super().fetch(key, slot, kind, *args, **{"num_bytes": self.sizes[key], **options})


class EdgeMoeProgram(VersionProgram):
    """Yi et al., "EdgeMoE", arXiv 2308.14352: experts of different bytes in one buffer, dequantised after each copy.

    The order of an `OffloadProgram`: prefetches queue behind demand loads, and what its router did not choose is cancelled, so that
    preloading ends with the router. An expert that the buffer does not take passes through a staging slot. Memory is taken as paged: the
    bytes of an expert may lie in several places. They can be taken over at once: whoever leaves has no reader (the layers
    before are done, this layer's experts are protected), and what is still being copied into them holds the same link.

    Args:
        cache: `ByteCache` of `expert_bytes_of(choice.bits, versions)`; the paper shares one pool among all layers.
        choice: the bits of each expert. versions: copies at these widths; one of each expert lies on the slow tier.

    Raises:
        InputError: bits of another shape or that no version has, a cache of other sizes, and as `VersionProgram`.
    """

    method: ClassVar[str] = "edgemoe"

    def __init__(
        self,
        model: ModelSpec,
        trace: RoutingTrace,
        steps: list[Step],
        machine: OffloadMachine,
        cost: CostModel,
        cache: ByteCache,
        policy: OffloadPolicy,
        choice: BitChoice,
        versions: ExpertVersions,
        prefetcher: Prefetcher | LookaheadPrefetcher | None = None,
        *,
        dequantize_share: float = DEQUANTIZE_SHARE,
    ) -> None:
        sizes = expert_bytes_of(choice.bits, versions)
        if sizes.shape != (model.num_moe_layers, model.num_experts) or not np.array_equal(sizes, cache.expert_bytes):
            raise InputError(f"edgemoe: the cache must hold experts of the chosen widths, int[{model.num_moe_layers}, "
                             f"{model.num_experts}]; make it with expert_bytes_of")
        staging = STAGING_SLOTS * int(sizes.max())
        plan = VersionPlan(versions, cache.bytes_per_layer * cache.num_layers + staging, int(sizes.sum()), dequantize_share)
        super().__init__(model, trace, steps, machine, cost, cache, policy, prefetcher, plan)
        self.choice, self.levels = choice, _levels(choice.bits, versions)
        self.copies = SizedTransfers(self.graph, machine, cost, sizes.ravel().tolist(), policy.chunks, cache.num_slots,
                                     model.num_experts)
        self.transfers = self.copies
        self.cache_counts |= {"loaded_bytes": self.copies.asked_bytes["load"],
                              "prefetched_bytes": self.copies.asked_bytes["prefetch"]}

    def _about(self) -> tuple[str, Mapping[str, Any]]:
        return self.choice.source, {"tolerable_loss": self.choice.tolerable_loss, "proxy": self.choice.proxy}

    def reserve(self, at: LayerMoment, layer: int, expert: int, protected: set[int]) -> int:
        """Return a slot for an expert, -1 if it gets none; all who leave for it are forgotten."""
        reservation = self.cache.reserve(layer, expert, at.now, protected)
        if reservation is None:
            return -1
        for victim in (reservation.victim_key, *reservation.other_victim_keys):
            if victim >= 0:
                self._ahead.lost(victim)
                self.transfers.forget(victim)
        return reservation.slot

    def _schedule(self, at: LayerMoment, wanted: list[int], hits: list[int], misses: list[int]) -> None:
        super()._schedule(at, wanted, hits, misses)
        ids, weights = self._rows(at)
        self._counter.add(ids, weights, self.levels[at.layer][ids])

    def _compute(self, at: LayerMoment, expert: int, slot: int, deps: list[int]) -> None:
        key, level = self.key(at.layer, expert), int(self.levels[at.layer, expert])
        if key in self.copies.fresh:
            self.copies.fresh.discard(key)
            deps = self._dequantize(at, expert, level, self.copies.sizes[key], slot, deps)
        self.transfers.use(slot, self._kernel(at, expert, level, int(at.counts[expert]), slot, deps))


def edgemoe_versions(model: ModelSpec, choice: BitChoice, how: Quantization | None = None) -> ExpertVersions:
    """Return copies at the widths that a choice uses; `how` defaults to groups of 128."""
    return exclusive_versions(model, np.unique(choice.bits).tolist(), how)


def expert_bytes_of(bits: np.ndarray, versions: ExpertVersions) -> np.ndarray:
    """Return int64[layer, expert], the bytes of each expert; raises InputError for bits that no version has."""
    return np.array([versions.weight_bytes(level) for level in range(versions.num_levels)])[_levels(bits, versions)]


def _levels(bits: np.ndarray, versions: ExpertVersions) -> np.ndarray:
    if versions.nested:
        raise InputError("edgemoe: needs exclusive copies, got nested versions")
    level_of = {int(width): versions.level_of(int(width)) for width in np.unique(bits)}
    return np.vectorize(level_of.__getitem__, otypes=[np.int64])(bits)
