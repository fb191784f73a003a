"""Tiny offloaded runs in which every decision can be tried: a tape of choices, and a timing model of its own.

Not a test module: test files import it by its name (`pythonpath` in pyproject.toml).
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.policies import BasePolicy
from moesim.cache.policy import AccessStream, PolicyContext, access_stream
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import Device, HardwareSpec, Link, Memory
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_bound import OffloadBound, offload_bound
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.lowering.work import experts_work, shared_work
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.trace import DECODE, RoutingTrace


@dataclass(frozen=True)
class World:
    """One run without its decisions."""

    model: ModelSpec
    trace: RoutingTrace
    machine: OffloadMachine
    batch: int
    slots: int
    shared: bool
    preload: list[int]
    cpu_helps: bool
    chunks: int

    @cached_property
    def steps(self) -> list[Step]:
        """One step per token of each request."""
        return closed_loop_steps(self.trace, batch_size=self.batch, include_prefill=False)

    @cached_property
    def stream(self) -> AccessStream:
        """The accesses."""
        return access_stream(self.trace, [step.rows for step in self.steps])

    @property
    def cost(self) -> CostModel:
        """A cost model of its own."""
        return CostModel(self.machine.hardware)

    def bound(self, stream: AccessStream | None = None, **changes: object) -> OffloadBound:
        """The bound of the world, or of one with other slots and the like."""
        options = {"slots_per_layer": self.slots, "preload": self.preload, "shared": self.shared,
                   "cpu_helps": self.cpu_helps, "chunks": self.chunks} | changes
        return offload_bound(self.model, self.trace, self.steps, self.machine, self.cost, stream or self.stream,
                             **options)  # type: ignore[arg-type]


def tiny_world(seed: int, *, most_steps: int = 4) -> World:
    """Two or three experts in one or two layers, one or two slots, one or two requests."""
    draw = random.Random(seed)
    layers, experts, batch = draw.randint(1, 2), draw.randint(2, 3), draw.randint(1, 2)
    top_k = draw.randint(1, experts - 1)
    steps = draw.randint(2, most_steps if layers == 1 else max(2, most_steps // 2))
    ids = np.array([[draw.sample(range(experts), top_k) for _ in range(layers)] for _ in range(steps * batch)])
    trace = RoutingTrace(
        expert_ids=ids, request_id=np.repeat(np.arange(batch), steps), position=np.tile(np.arange(steps), batch),
        phase=np.full(steps * batch, DECODE), step=np.tile(np.arange(steps), batch), num_experts=experts,
        layer_ids=np.arange(layers))
    model = ModelSpec(
        name="tiny", num_layers=layers, moe_layers=tuple(range(layers)), num_experts=experts, top_k=top_k, hidden_size=64,
        expert_intermediate_size=96, attention=AttentionSpec(4, 2, 16), vocab_size=128,
        shared_intermediate_size=draw.choice((0, 64)))
    slots, cpu_helps = draw.randint(1, 2), draw.random() < 0.5
    machine = _machine(draw, flash=not cpu_helps and draw.random() < 0.3)
    preload = [layer * experts + e for layer in range(layers) for e in draw.sample(range(experts), slots)]
    return World(model, trace, machine, batch, slots, draw.random() < 0.4, preload if draw.random() < 0.5 else [],
                 cpu_helps, draw.choice((1, 2)))


def _machine(draw: random.Random, *, flash: bool) -> OffloadMachine:
    rate, latency_s = draw.choice((2e9, 5e9, 2e10)), draw.choice((0, 1e-6))
    memories = {"hbm": Memory("hbm", "hbm", 1e9, 2e10), "dram": Memory("dram", "dram", 1e9, draw.choice((2e9, 5e9, 2e10))),
                "flash": Memory("flash", "flash", 1e9, 1e9)}
    links = {"pcie": Link("pcie", "dram", "hbm", "pcie", rate, latency_s, draw.choice(("full", "half"))),
             "nvme": Link("nvme", "flash", "dram", "nvme", rate / 2, latency_s)}
    devices = {name: Device(name, name, memory, {"bf16": 1e12}, 1e-6) for name, memory in (("gpu", "hbm"), ("cpu", "dram"))}
    return OffloadMachine(HardwareSpec("box", devices, memories, links), "gpu", "flash" if flash else "dram", "cpu")


# ---------------------------------------------------------------- every sequence of decisions, in the simulator


@dataclass
class Tape:
    """Answers to questions with finitely many answers; `advance` goes to the next combination of answers."""

    answers: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    place: int = 0

    def choose(self, size: int) -> int:
        """Answer the next question."""
        if self.place == len(self.answers):
            self.answers.append(0)
            self.sizes.append(size)
        self.place += 1
        return self.answers[self.place - 1]

    def advance(self) -> bool:
        """Return whether there is a combination that was not tried."""
        self.place = 0
        while self.answers and self.answers[-1] + 1 == self.sizes[-1]:
            self.answers.pop()
            self.sizes.pop()
        if self.answers:
            self.answers[-1] += 1
        return bool(self.answers)


class TapePolicy(BasePolicy):
    """Whom to admit and to evict is read from the tape."""

    def __init__(self, context: PolicyContext, tape: Tape) -> None:
        super().__init__(context)
        self._tape = tape

    def admits(self, key: int, now: int) -> bool:
        """The preload always; later as the tape says."""
        return now < 0 or self._tape.choose(2) == 0

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Any candidate."""
        keys = list(candidates)
        return keys[self._tape.choose(len(keys))]


class TapePrefetcher:
    """Any set of experts of the next layer."""

    information, source = "I4", "stated"

    def __init__(self, tape: Tape, num_experts: int, num_layers: int) -> None:
        self._tape, self._num_experts, self._last = tape, num_experts, num_layers - 1

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """What the tape says."""
        chosen = 0 if layer == self._last else self._tape.choose(1 << self._num_experts)
        return [expert for expert in range(self._num_experts) if chosen >> expert & 1]


class TapeProgram(OffloadProgram):
    """What the CPU computes is read from the tape."""

    tape: Tape

    def on_cpu(self, tokens: int) -> bool:
        """Either, where the CPU may."""
        return self.policy.miss != "load" and self.tape.choose(2) == 0


def elapsed_ns(world: World, *, ahead: bool, most: int) -> list[int]:
    """Return the end of the last step under every sequence of decisions; with `ahead` also of prefetches and of copies in
    the background. Empty if there are more than `most` sequences."""
    tape, ends = Tape(), []
    for _ in range(most):
        context = PolicyContext(world.model.num_moe_layers, world.model.num_experts, None, world.stream)
        cache = ExpertCache(world.model.num_moe_layers, world.model.num_experts, world.slots, TapePolicy(context, tape),
                            shared=world.shared)
        cache.preload(world.preload)
        prefetcher = TapePrefetcher(tape, world.model.num_experts, world.model.num_moe_layers) if ahead else None
        policy = OffloadPolicy("faster" if world.cpu_helps else "load", ahead, world.chunks)
        program = TapeProgram(world.model, world.trace, world.steps, world.machine, world.cost, cache, policy, prefetcher)
        program.tape = tape
        table = run_simpy(program)
        ends.append(int(table["end_ns"].iloc[program.steps[-1].last_task]))
        if not tape.advance():
            return ends
    return []


# ---------------------------------------------------------------- every content, with a timing model of its own


def best_on_demand_ns(world: World, serial_ns: int) -> int:
    """The least time over every content of the slots and every split and order in each layer, without copies ahead.

    For one link in full duplex. `serial_ns`: attention, routers and heads.
    """
    experts, layers = world.model.num_experts, world.model.num_moe_layers
    best: dict[frozenset[int], int] = {frozenset(world.preload): serial_ns}
    for step, layer in itertools.product(world.steps, range(layers)):
        tokens = Counter(world.trace.expert_ids[step.rows, layer].ravel().tolist())
        following: dict[frozenset[int], int] = {}
        for content, time in best.items():
            there = {key % experts for key in content if key // experts == layer}
            for loaded, end in _layer_ends(world, len(step.rows), dict(tokens), there & set(tokens)):
                pool = sorted(content | {layer * experts + e for e in loaded})
                for kept in _fitting(world, pool):
                    following[kept] = min(time + end, following.get(kept, time + end))
        best = following
    return min(best.values())


def _fitting(world: World, keys: list[int]) -> Iterator[frozenset[int]]:
    layers = world.model.num_moe_layers
    for size in range(len(keys) + 1):
        for part in itertools.combinations(keys, size):
            held = Counter(key // world.model.num_experts for key in part)
            if len(part) <= world.slots * layers if world.shared else max(held.values(), default=0) <= world.slots:
                yield frozenset(part)


def _layer_ends(world: World, rows: int, tokens: dict[int, int], there: set[int]) -> list[tuple[frozenset[int], int]]:
    """Return (loaded experts, ns from router to barrier), the best order for each set of experts on the CPU."""
    cost, model = world.cost, world.model
    gpu, cpu = ({e: round(1e9 * cost.grouped_ffn(device, experts_work(model, n, 1, n)).seconds) for e, n in tokens.items()}
                for device in ("gpu", "cpu"))
    row_ns = {e: round(1e9 * cost.copy("pcie", n * model.hidden_size * 2).seconds) for e, n in tokens.items()}
    load = sum(round(1e9 * cost.copy("pcie", model.expert_bytes // world.chunks).seconds) for _ in range(world.chunks))
    shared = round(1e9 * cost.dense("gpu", shared_work(model, rows)).seconds) if model.shared_intermediate_size else 0
    found = []
    for size in range(len(tokens) + 1 if world.cpu_helps else 1):
        for on_cpu in itertools.combinations(sorted(tokens), size):
            loaded = sorted(set(tokens) - there - set(on_cpu))
            resident = sum(gpu[e] for e in there - set(on_cpu))
            device = min(_device_end(order, shared + resident, load, gpu) for order in itertools.permutations(loaded))
            host = min(_results_end(order, len(loaded) * load, cpu, row_ns) for order in itertools.permutations(on_cpu))
            found.append((frozenset(loaded), max(device, host)))
    return found


def _device_end(order: Sequence[int], end: int, load: int, gpu: dict[int, int]) -> int:
    for place, expert in enumerate(order):
        end = max(end, (place + 1) * load) + gpu[expert]
    return end


def _results_end(order: Sequence[int], link: int, cpu: dict[int, int], row_ns: dict[int, int]) -> int:
    sent = computed = 0
    for expert in order:
        sent += row_ns[expert]
        computed = max(computed, sent) + cpu[expert]
        link = max(link, computed) + row_ns[expert]
    return link if order else 0


def full_duplex(world: World) -> World:
    """The same world with one link in full duplex, experts in DRAM, and chunks of equal size."""
    links = {name: replace(link, duplex="full") for name, link in world.machine.hardware.links.items()}
    hardware = replace(world.machine.hardware, links=links)
    return replace(world, machine=replace(world.machine, hardware=hardware, slow_memory="dram"))
