"""Two passes equal one: decisions taken once, timed on other machines, against SimPy on each of those machines."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesim.cache.cache import ExpertCache
from moesim.cache.policies.static import popular_keys
from moesim.cache.policy import PolicyContext, access_stream, make_policy
from moesim.errors import CheckError
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import Device, HardwareSpec, Link, Memory
from moesim.hardware.vary import vary
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.lowering.offload_works import cpu_choice, work_ns
from moesim.lowering.task_arrays import arrays_of
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.simulate.run import step_table
from moesim.simulate.simpy_executor import run_simpy
from moesim.simulate.what_if import WhatIf, what_if
from moesim.traces.stats import load_counts
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace

POLICIES = ("lru", "lfu", "lfu-resident", "belady", "belady-bypass", "static")
KEYS = ("pcie.bytes_per_s", "pcie.latency_s", "nvme.bytes_per_s", "hbm.bytes_per_s", "gpu.kernel_overhead_s",
        "gpu.flops_per_s.bf16", "dram.bytes_per_s")


def machine_of(memory: str, duplex: str = "full") -> OffloadMachine:
    """A GPU, a CPU, experts in DRAM or on flash; round numbers, so that tasks end at the same instant often."""
    spec = HardwareSpec(
        "box", {"gpu": Device("gpu", "gpu", "hbm", {"bf16": 1e12}, 1e-6), "cpu": Device("cpu", "cpu", "dram", {"bf16": 1e11}, 1e-6)},
        {"hbm": Memory("hbm", "hbm", 1e9, 1e10), "dram": Memory("dram", "dram", 1e9, 2e9),
         "flash": Memory("flash", "flash", 1e9, 1e9)},
        {"pcie": Link("pcie", "dram", "hbm", "pcie", 1e9, 1e-6, duplex), "nvme": Link("nvme", "flash", "dram", "nvme", 5e8, 1e-6)})
    return OffloadMachine(spec, "gpu", memory, "cpu")


@dataclasses.dataclass(frozen=True)
class World:
    """A small random question: everything but the machine."""

    seed: int
    policy: str
    miss: str
    slots: int
    batch: int
    memory: str
    duplex: str
    shared_expert: int
    chunks: int

    def program(self, machine: OffloadMachine, cost: CostModel, *, admit: bool = False) -> OffloadProgram:
        """The program on a machine, with a cache of its own."""
        model = ModelSpec(
            name="tiny", num_layers=4, moe_layers=(1, 2, 3), num_experts=6, top_k=2, hidden_size=64,
            expert_intermediate_size=96, attention=AttentionSpec(4, 2, 16), vocab_size=128,
            shared_intermediate_size=self.shared_expert, dense_intermediate_size=128)
        trace = synthetic_trace(60, 3, 6, 2, 6, seed=self.seed)
        steps = closed_loop_steps(trace, batch_size=self.batch, max_steps=7, seed=self.seed)
        popularity = load_counts(trace).astype(np.float64)
        context = PolicyContext(3, 6, popularity, access_stream(trace, [step.rows for step in steps]))
        cache = ExpertCache(3, 6, self.slots, make_policy(self.policy, context), shared=self.seed % 2 == 1)
        cache.preload(popular_keys(popularity, self.slots, shared=self.seed % 2 == 1))
        return OffloadProgram(model, trace, steps, machine, cost, cache, OffloadPolicy(self.miss, admit, self.chunks))


def draw(seed: int) -> World:
    """A random world; the CPU can only help where it sees the experts."""
    rng = np.random.default_rng(seed)
    memory = str(rng.choice(["dram", "flash"]))
    misses = ["load", "cpu", "faster"] if memory == "dram" else ["load"]
    return World(seed, str(rng.choice(POLICIES)), str(rng.choice(misses)), int(rng.integers(1, 6)), int(rng.integers(1, 4)),
                 memory, str(rng.choice(["full", "half"])), int(rng.choice([0, 64])), int(rng.integers(1, 4)))


def decided(program: OffloadProgram) -> WhatIf:
    """The decisions of a program, taken on SimPy."""
    run_simpy(program)
    return what_if(arrays_of(program.graph), program.steps)


@pytest.mark.parametrize("seed", range(60))
def test_other_machines_get_simpys_step_times(seed: int) -> None:
    """Decisions taken on one machine, timed on five others, equal SimPy's own run on each, to the nanosecond."""
    world, rng = draw(seed), np.random.default_rng(1000 + seed)
    base = machine_of(world.memory, world.duplex)
    first = world.program(base, CostModel(base.hardware))
    sizes = tuple(range(1, 12))
    run, choice = decided(first), cpu_choice(first, sizes)
    timed = 0
    for _ in range(5):
        values = {str(key): float(rng.choice([1e-6, 2e-6, 0.0]) if str(key).endswith("_s") and "per_s" not in str(key)
                                  else rng.choice([5e8, 1e9, 4e9, 1e10])) for key in rng.choice(KEYS, 3, replace=False)}
        machine = dataclasses.replace(base, hardware=vary(base.hardware, values))
        cost = CostModel(machine.hardware)
        program = world.program(machine, cost)
        if cpu_choice(program, sizes) != choice:
            continue
        timed += 1
        table = run_simpy(program)
        durations = work_ns(run.works, program.model, machine, CostModel(machine.hardware))
        assert run.step_ns(durations[None]).tolist() == [step_table(program, table)["duration_ns"].tolist()]
        busy = table.groupby("resource")["duration_ns"].sum()
        names = [resource.name for resource in machine.resources()]
        found = run.busy_ns(durations[None])[0]
        assert found.tolist() == [int(busy.get(name, 0)) for name in names[:len(found)]]
    assert timed or world.miss == "faster"


def test_many_machines_at_once_are_each_alone() -> None:
    """A table of durations is timed row by row."""
    world = draw(3)
    machine = machine_of(world.memory, world.duplex)
    program = world.program(machine, CostModel(machine.hardware))
    run = decided(program)
    durations = np.random.default_rng(0).integers(1, 50, (20, len(run.works)))
    together = run.step_ns(durations)
    assert together.shape == (20, 7)
    for row, times in zip(durations, together, strict=True):
        assert run.step_ns(row[None])[0].tolist() == times.tolist()


def test_background_copies_are_refused() -> None:
    """A copy that outlives its layer makes time matter; that run is refused, not mistimed."""
    world = World(2, "lru", "cpu", 2, 1, "dram", "full", 0, 2)
    machine = machine_of("dram")
    program = world.program(machine, CostModel(machine.hardware), admit=True)
    run_simpy(program)
    with pytest.raises(CheckError, match="looks at the clock"):
        what_if(arrays_of(program.graph), program.steps)
