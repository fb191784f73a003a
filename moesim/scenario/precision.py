"""Points of an offload study with experts in several widths: what a point may say, and its program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moesim.cache.byte_cache import ByteCache
from moesim.cache.cache import ExpertCache
from moesim.cache.policies.static import popular_keys
from moesim.cache.precision import Quantization, nested_versions
from moesim.cache.precision_bits import gate_mass_loss, read_expert_loss
from moesim.cache.precision_hobbit import HobbitPrecision
from moesim.cache.precision_levels import bit_levels
from moesim.cache.precision_planes import PlaneCache
from moesim.cache.prefetch import LookaheadPrefetcher, Prefetcher
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.lowering.precision.d2moe import D2MoeProgram
from moesim.lowering.precision.edgemoe import EdgeMoeProgram, edgemoe_versions, expert_bytes_of
from moesim.lowering.precision.hobbit import HobbitProgram
from moesim.lowering.precision.program import VersionProgram
from moesim.scenario.schema import NO_PREFETCH, Point

if TYPE_CHECKING:
    from moesim.scenario.offload_build import Offload
    from moesim.scenario.schema_precision import PrecisionChoice


def precision_program(offload: Offload, point: Point, cost: CostModel,
                      prefetcher: Prefetcher | LookaheadPrefetcher | None) -> VersionProgram:
    """Return the program of a point with `precision`; its slots are turned into bytes where the method counts bytes."""
    choice = point.precision
    assert choice is not None
    build = {"hobbit": _hobbit, "edgemoe": _edgemoe, "d2moe": _d2moe}[choice.method]
    policy = OffloadPolicy("load", offload.admit, offload.chunks, offload.write_back)
    return build(offload, point, choice, cost, policy, prefetcher)


def _hobbit(offload: Offload, point: Point, choice: PrecisionChoice, cost: CostModel, policy: OffloadPolicy,
            prefetcher: Prefetcher | LookaheadPrefetcher | None) -> VersionProgram:
    model = offload.model
    rule = HobbitPrecision(choice.t1, choice.t2, choice.high_bits, choice.low_bits)
    low_slots = min(choice.low_slots_per_layer or point.slots_per_layer, model.num_experts)
    low = ExpertCache(model.num_moe_layers, model.num_experts, low_slots, offload.policy(point.policy), shared=offload.shared)
    return HobbitProgram(
        model, offload.test, offload.steps, offload.machine, cost, offload.cache(point), low, policy, rule, prefetcher,
        versions=rule.versions(model, Quantization(choice.group_size)), prefetch_bits=choice.prefetch_bits,
        dequantize_share=choice.dequantize_share or 0.0)


def _edgemoe(offload: Offload, point: Point, choice: PrecisionChoice, cost: CostModel, policy: OffloadPolicy,
             prefetcher: Prefetcher | LookaheadPrefetcher | None) -> VersionProgram:
    model = offload.model
    loss = (gate_mass_loss(offload.train, choice.widths or (2, 4, 8)) if choice.loss is None
            else read_expert_loss(choice.loss, model.num_moe_layers, model.num_experts))
    bits = loss.choose(choice.tolerable_loss)
    versions = edgemoe_versions(model, bits, Quantization(choice.group_size))
    sizes = expert_bytes_of(bits.bits, versions)
    room = min(point.slots_per_layer, model.num_experts) * model.expert_bytes
    cache = ByteCache(model.num_moe_layers, model.num_experts, room, sizes, offload.policy(point.policy),
                      shared=offload.shared)
    if offload.preload == "popular":
        cache.preload(_fitting(offload, sizes, room))
    share = {} if choice.dequantize_share is None else {"dequantize_share": choice.dequantize_share}
    return EdgeMoeProgram(model, offload.test, offload.steps, offload.machine, cost, cache, policy, bits, versions, prefetcher,
                          **share)


def _d2moe(offload: Offload, point: Point, choice: PrecisionChoice, cost: CostModel, policy: OffloadPolicy,
           prefetcher: Prefetcher | LookaheadPrefetcher | None) -> VersionProgram:
    if prefetcher is not None or point.prefetch != NO_PREFETCH:
        raise InputError("precision: d2moe fetches nothing ahead; leave out 'prefetch'")
    model = offload.model
    versions = nested_versions(model, choice.widths or (2, 3, 4), Quantization(choice.group_size))
    budget = min(point.slots_per_layer, model.num_experts) * model.num_moe_layers * model.expert_bytes
    levels = bit_levels(offload.test, choice.capacity, by=choice.by, seed=offload.seed)
    planes = PlaneCache(model.num_moe_layers, model.num_experts, budget, versions)
    source = f"stated capacity {', '.join(f'{share:g}' for share in choice.capacity)} by {choice.by}"
    return D2MoeProgram(model, offload.test, offload.steps, offload.machine, cost, planes, policy, levels, order=choice.order,
                        levels_source=source, dequantize_share=choice.dequantize_share or 0.0)


def _fitting(offload: Offload, sizes: np.ndarray, room: int) -> list[int]:
    """Return the popular keys, each that still fits into its pool."""
    layers, experts = sizes.shape
    free = np.full(1 if offload.shared else layers, room * (layers if offload.shared else 1))
    keys = []
    for key in popular_keys(offload.popularity, experts, shared=offload.shared):
        pool = 0 if offload.shared else key // experts
        if sizes.ravel()[key] <= free[pool]:
            free[pool] -= sizes.ravel()[key]
            keys.append(key)
    return keys
