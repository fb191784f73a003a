"""Worlds of the offload engine's tests: random machines, models, traces and policies, made to tie often.

Not a test module: test files import it by its name (`pythonpath` in pyproject.toml).
"""

from __future__ import annotations

import random

from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.spec import Device, HardwareSpec, Link, Memory
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.work import compute_dtype, experts_work, router_work
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace

POLICIES = ("lru", "lfu", "lfu-resident", "belady", "belady-bypass", "static")
PREFETCHERS = ("none", "popularity", "transition", "stated_recall", "oracle")
ENDLESS = 1e21  # bytes or flops per second


def random_machine(draw: random.Random, miss: str) -> OffloadMachine:
    """A GPU with experts in DRAM, on flash behind it, or in DRAM behind a bridge.

    Links are full or half duplex, and two hops may share one port. On half of the machines only kernel starts and
    latencies take time, a few microseconds each, so that nearly everything ends together with something else.
    """
    route = draw.choice(("direct", "flash", "bridge") if miss == "load" else ("direct", "bridge"))
    ties = draw.random() < 0.5
    rate = ENDLESS if ties else draw.choice((1e9, 4e9, 16e9, 64e9))
    second = rate if ties else rate * draw.choice((0.5, 1, 2))
    latency_s = [draw.choice((1e-6, 2e-6, 3e-6) if ties else (0, 1e-6, 4e-6)) for _ in range(2)]
    overhead_s = [draw.choice((1e-6, 2e-6) if ties else (0, 1e-6)) for _ in range(2)]
    duplex, port = draw.choice(("full", "half")), draw.choice(("", "shared"))
    rates = {"hbm": (1e10, 1e12, 64e9), "dram": (1e9, 32e9)}
    fast = {name: ENDLESS if ties else draw.choice(choices) for name, choices in rates.items()}
    memories = {name: Memory(name, kind, 1e12, fast.get(name, 1e12))
                for name, kind in (("hbm", "hbm"), ("mid", "hbm"), ("dram", "dram"), ("flash", "flash"))}
    links = [Link("pcie", "dram", "hbm", "pcie", rate, latency_s[0], duplex, port),
             Link("nvme", "flash", "dram", "nvme", second, latency_s[1], draw.choice(("full", "half")), port)]
    if route == "bridge":
        links = [Link("up", "dram", "mid", "pcie", rate, latency_s[0], duplex, port),
                 Link("over", "mid", "hbm", "nvlink", second, latency_s[1], duplex, port)]
    devices = {name: Device(name, name, memory, {"bf16": ENDLESS if ties else draw.choice((1e11, 1e18))}, start_s)
               for name, memory, start_s in (("gpu", "hbm", overhead_s[0]), ("cpu", "dram", overhead_s[1]))}
    spec = HardwareSpec("box", devices, memories, {link.name: link for link in links})
    return OffloadMachine(spec, "gpu", "flash" if route == "flash" else "dram", "cpu")


def random_model(draw: random.Random) -> ModelSpec:
    """A small model; some layers are dense, some have shared experts."""
    num_layers, num_dense, num_experts = draw.randint(1, 4), draw.randint(0, 2), draw.randint(3, 9)
    return ModelSpec(
        name="tiny", num_layers=num_layers + num_dense,
        moe_layers=tuple(sorted(draw.sample(range(num_layers + num_dense), num_layers))), num_experts=num_experts,
        top_k=draw.randint(1, min(4, num_experts)), hidden_size=64, expert_intermediate_size=draw.choice((64, 96)),
        attention=AttentionSpec(4, 2, 16), vocab_size=128, dense_intermediate_size=64,
        shared_intermediate_size=draw.choice((0, 64)))


def random_case(seed: int) -> tuple[Offload, Point]:
    """One offloaded run: every policy, prefetcher, way to handle a miss, and number of slots down to one."""
    draw = random.Random(seed)
    miss = draw.choice(("load", "cpu", "faster"))
    machine, model = random_machine(draw, miss), random_model(draw)
    trace = synthetic_trace(48, model.num_moe_layers, model.num_experts, model.top_k, 6, seed=seed % 7)
    train, test = split_requests(trace, 0.5, seed % 5)
    steps = closed_loop_steps(test, batch_size=draw.randint(1, 4), max_steps=draw.randint(1, 8),
                              include_prefill=draw.random() < 0.5, repeat=True, seed=seed)
    offload = Offload(model, train, test, steps, machine, seed, preload=draw.choice(("popular", "none")),
                      shared=draw.random() < 0.4, chunks=draw.choice((1, 1, 2, 3, 4)), admit=draw.random() < 0.6)
    prefetch = draw.choice(PREFETCHERS)
    recall = draw.choice((0.0, 0.5, 1.0)) if prefetch == "stated_recall" else None
    return offload, Point(draw.choice(POLICIES), draw.randint(1, model.num_experts), prefetch,
                          0 if prefetch == "none" else draw.randint(1, 5), recall, miss)


def random_profile(model: ModelSpec, seed: int) -> CalibrationProfile | None:
    """Measured tables of some of a world's operations and of some overheads; sometimes none at all."""
    draw = random.Random(seed)
    if draw.random() < 0.5:
        return None
    group, dtype = experts_work(model, 1, 1, 1), compute_dtype(model)
    sizes = ((1.0,), (2.0,), (5.0,))
    tables = [MeasuredTable("grouped_ffn", draw.choice(("gpu", "cpu")), group.shape, dtype, ("tokens",), sizes,
                            (3e-6, 4e-6, 9e-6)),
              MeasuredTable("router", "gpu", router_work(model, 1).shape, dtype, ("tokens",), sizes, (1e-6, 1e-6, 2e-6)),
              MeasuredTable("copy", "pcie", "", "", ("bytes",), ((1e3,), (1e5,)), (2e-6, 2e-5)),
              *(MeasuredTable("task_overhead", "gpu", kind, "", ("tokens",), ((1.0,),), (1e-6,))
                for kind in draw.sample(("attention", "expert", "cpu_expert", "send", "load", "head"), 2))]
    return CalibrationProfile("some", tuple(draw.sample(tables, draw.randint(1, len(tables)))))


def cost_of(offload: Offload, seed: int) -> CostModel:
    """A cost model of a world's machine; the same seed, the same costs."""
    return CostModel(offload.machine.hardware, random_profile(offload.model, seed))
