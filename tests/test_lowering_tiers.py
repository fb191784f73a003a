"""Host memory between flash and the device, write-back of evicted experts, and layers with pools of different sizes."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lowering_offload import Ran, check_slots, machine_of, offload_of

from moesim.cache.cache import ExpertCache
from moesim.cache.layered import LayeredCache
from moesim.cache.policies.lru import LruPolicy
from moesim.cache.policy import PolicyContext, make_policy
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.host_tier import TieredOffloadProgram
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point
from moesim.simulate.compiled_executor import execute_program
from moesim.simulate.compiled_offload import supports
from moesim.simulate.simpy_executor import run_simpy


def lru_cache(offload: Offload, slots: int, *, shared: bool = False) -> ExpertCache:
    """An empty LRU cache of the case's shape."""
    model = offload.model
    context = PolicyContext(model.num_moe_layers, model.num_experts)
    return ExpertCache(model.num_moe_layers, model.num_experts, slots, make_policy("lru", context), shared=shared)


def tiered(offload: Offload, slots: int, host_slots: int, *, miss: str = "load", prefetch: Point | None = None,
           preload: tuple[int, ...] = (), chunks: int = 2) -> TieredOffloadProgram:
    """A program with experts on flash and some in host memory."""
    host = lru_cache(offload, host_slots, shared=True)
    host.preload(preload)
    prefetcher = offload.program(prefetch, CostModel(offload.machine.hardware)).prefetcher if prefetch else None
    return TieredOffloadProgram(
        offload.model, offload.test, offload.steps, offload.machine, CostModel(offload.machine.hardware),
        lru_cache(offload, slots), OffloadPolicy(miss, admit=False, chunks=chunks), prefetcher, host=host)


def ran(offload: Offload, program: OffloadProgram) -> Ran:
    """Run a program on the reference."""
    return Ran(offload, program, {}, program.cost, run_simpy(program))


def flash_case(seed: int = 0, **options: object) -> Offload:
    """A case whose experts lie on flash."""
    return offload_of(machine_of(memory="flash"), steps=8, seed=seed, preload="none", **options)  # type: ignore[arg-type]


def check_reads(done: Ran, preload: tuple[int, ...]) -> None:
    """Whatever goes from the host to the device, or is computed there, has been read from flash whole by then."""
    flash, experts = done.link_tasks(0), done.offload.model.num_experts
    key = flash["layer"] * experts + flash["expert"]
    read_by: dict[tuple[int, int], int] = {}
    for k, chunk, end in zip(key, flash["chunk"], flash["end_ns"], strict=True):
        read_by[int(k), int(chunk)] = min(read_by.get((int(k), int(chunk)), 1 << 62), int(end))
    into = done.link_tasks()
    for layer, expert, chunk, start in zip(into["layer"], into["expert"], into["chunk"], into["start_ns"], strict=True):
        k = int(layer) * experts + int(expert)
        assert k in preload or read_by[k, int(chunk)] <= start
    on_cpu = done.tasks[done.tasks["kind"] == "cpu_expert"]
    for layer, expert, start in zip(on_cpu["layer"], on_cpu["expert"], on_cpu["start_ns"], strict=True):
        k = int(layer) * experts + int(expert)
        assert k in preload or all(read_by[k, chunk] <= start for chunk in range(2))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 6), st.sampled_from(("load", "cpu", "faster")), st.booleans())
def test_nothing_leaves_the_host_before_it_is_there(seed: int, slots: int, host: int, miss: str, ahead: bool) -> None:
    """Reads, copies and slots stay in order for every size of both pools, with and without prefetching."""
    offload = flash_case(seed, batch=2)
    preload = tuple(range(min(host * 3, 4)))
    point = Point("lru", slots, "stated_recall", 2, 0.5) if ahead else None
    done = ran(offload, tiered(offload, slots, host, miss=miss, prefetch=point, preload=preload))
    check_slots(done)
    check_reads(done, preload)
    same = execute_program(tiered(offload, slots, host, miss=miss, prefetch=point, preload=preload)).table()
    assert same.equals(done.table)


def test_a_host_that_holds_everything_is_as_fast_as_experts_in_dram() -> None:
    """With all experts preloaded on the host the flash is never read, and the steps end as with experts in DRAM."""
    offload = flash_case()
    everything = tuple(range(offload.model.num_pool_experts))
    done = ran(offload, tiered(offload, 2, offload.model.num_experts, preload=everything))
    in_dram = offload_of(machine_of(), steps=8, preload="none")
    plain = ran(in_dram, OffloadProgram(
        in_dram.model, in_dram.test, in_dram.steps, in_dram.machine, CostModel(in_dram.machine.hardware),
        lru_cache(in_dram, 2), OffloadPolicy(chunks=2)))
    assert len(done.link_tasks(0)) == 0
    assert done.elapsed_ns == plain.elapsed_ns


@pytest.mark.parametrize("host_slots", [1, 2, 5])
def test_host_hits_are_those_of_an_ordered_dict(host_slots: int) -> None:
    """The keys that the device fetches, in order, hit the host as they hit an OrderedDict; bytes from flash follow."""
    offload = flash_case(seed=3)
    done = ran(offload, tiered(offload, 2, host_slots))
    into = done.link_tasks().drop_duplicates(["layer", "expert", "step"]).sort_values("task")
    capacity, hits, held = host_slots * offload.model.num_moe_layers, 0, OrderedDict[tuple[int, int], None]()
    for key in zip(into["layer"], into["expert"], strict=True):
        if key in held:
            hits += 1
            held.move_to_end(key)
            continue
        if len(held) == capacity:
            held.popitem(last=False)
        held[key] = None
    assert (done.counts["host_hits"], done.counts["host_accesses"]) == (hits, len(into))
    assert done.link_tasks(0)["num_bytes"].sum() == (len(into) - hits) * offload.model.expert_bytes
    assert 0 < hits < len(into) or host_slots == 1


def test_a_host_tier_needs_flash_and_room() -> None:
    """Experts in DRAM need no host tier, and a host smaller than its slots is refused."""
    with pytest.raises(InputError, match="experts on flash"):
        tiered(offload_of(machine_of(), steps=2), 2, 2)
    with pytest.raises(InputError, match="host slots need"):
        tiered(flash_case(), 2, 1 << 20)


def test_write_back_moves_every_evicted_expert_and_nobody_waits() -> None:
    """One copy out per eviction of an arrived expert; on a full-duplex link the run takes as long as without."""
    offload = offload_of(machine_of(), steps=10, preload="none")

    def run(write_back: bool) -> Ran:
        return ran(offload, OffloadProgram(
            offload.model, offload.test, offload.steps, offload.machine, CostModel(offload.machine.hardware),
            lru_cache(offload, 2), OffloadPolicy(chunks=2, write_back=write_back)))

    plain, swapped = run(False), run(True)
    out = swapped.tasks[swapped.tasks["kind"] == "write_back"]
    evicted = plain.counts["loads"] - 2 * offload.model.num_moe_layers
    assert evicted > 0
    assert out["num_bytes"].sum() == evicted * offload.model.expert_bytes
    assert swapped.elapsed_ns == plain.elapsed_ns
    assert not supports(run_program(offload))
    assert set(out["resource"]) == {"pcie.out"}


def run_program(offload: Offload) -> OffloadProgram:
    """A program that writes back, not yet run."""
    return OffloadProgram(
        offload.model, offload.test, offload.steps, offload.machine, CostModel(offload.machine.hardware),
        lru_cache(offload, 2), OffloadPolicy(write_back=True))


def layered(offload: Offload, slots: tuple[int, ...]) -> LayeredCache:
    """An LRU cache with a pool of its own size for each layer."""
    model = offload.model
    context = PolicyContext(model.num_moe_layers, model.num_experts)
    return LayeredCache(model.num_experts, slots, [LruPolicy(context) for _ in slots])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.tuples(*[st.integers(1, 6)] * 3))
def test_layers_of_different_sizes_hit_like_caches_of_one_layer_each(seed: int, slots: tuple[int, ...]) -> None:
    """Each layer of a layered cache hits as an OrderedDict of its own size does; slots stay in order."""
    offload = offload_of(machine_of(), steps=8, seed=seed, preload="none")
    program = OffloadProgram(
        offload.model, offload.test, offload.steps, offload.machine, CostModel(offload.machine.hardware),
        layered(offload, slots), OffloadPolicy(chunks=2))
    assert program.cache.num_slots == sum(slots)
    check_slots(ran(offload, program))
    program.cache.check()
    for layer, size in enumerate(slots):
        if size < offload.model.top_k:  # then experts pass through staging, in an order of their own
            continue
        held, hits = OrderedDict[int, None](), 0
        for access in range(layer, offload.stream.num_accesses, 3):
            experts = offload.stream.experts_of(access).tolist()
            absent = [e for e in experts if e not in held]
            hits += len(experts) - len(absent)
            for expert in experts:
                held.pop(expert, None)
                held[expert] = None
            while len(held) > size:
                held.popitem(last=False)
        assert program.cache_counts["hits"][layer] + program.cache_counts["late_hits"][layer] == hits


def test_layered_caches_are_checked() -> None:
    """A layer without a slot, or layers without a policy each, are refused."""
    context = PolicyContext(2, 4)
    with pytest.raises(InputError, match="at least one slot"):
        LayeredCache(4, np.array([2, 0]), [LruPolicy(context)] * 2)
    with pytest.raises(InputError, match="a policy each"):
        LayeredCache(4, (2, 1), [LruPolicy(context)])
