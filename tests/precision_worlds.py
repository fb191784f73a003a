"""Worlds of the programs with experts in several widths. Not a test module (imported by name, as `offload_worlds`)."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from offload_worlds import random_machine, random_model

from moesim.cache.byte_cache import ByteCache
from moesim.cache.cache import ExpertCache
from moesim.cache.policies.static import popular_keys
from moesim.cache.policy import PolicyContext, access_stream, make_policy
from moesim.cache.precision import nested_versions
from moesim.cache.precision_bits import gate_mass_loss
from moesim.cache.precision_hobbit import HobbitPrecision
from moesim.cache.precision_levels import bit_levels, level_counts
from moesim.cache.precision_planes import PlaneCache
from moesim.cache.prefetch import LookaheadPrefetcher, PrefetchContext, Prefetcher, make_prefetcher
from moesim.cache.scores import request_starts, router_scores
from moesim.hardware.cost import CostModel
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.lowering.precision.d2moe import D2MoeProgram
from moesim.lowering.precision.edgemoe import EdgeMoeProgram, edgemoe_versions, expert_bytes_of
from moesim.lowering.precision.hobbit import HobbitProgram
from moesim.lowering.precision.program import VersionProgram
from moesim.model.spec import ModelSpec
from moesim.simulate.result import DONE
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.stats import load_counts, transition_counts
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import RoutingTrace

COPIES = ("load", "prefetch")
POLICIES = ("lru", "lfu", "belady", "hobbit", "static", "edgemoe")
PREFETCHERS = ("none", "none", "transition", "stated_recall", "oracle", "read-me", "hobbit")


@dataclass(frozen=True)
class World:
    """A machine, a model, routing with gate weights, and steps of it."""

    seed: int
    machine: OffloadMachine
    model: ModelSpec
    trace: RoutingTrace
    steps: list[Step]
    policy: OffloadPolicy

    @property
    def rows(self) -> list[np.ndarray]:
        """The trace rows of each step."""
        return [step.rows for step in self.steps]

    def context(self) -> PolicyContext:
        """What policies may be built from."""
        return PolicyContext(self.model.num_moe_layers, self.model.num_experts, load_counts(self.trace).astype(float),
                             access_stream(self.trace, self.rows), request_starts(self.trace, self.rows),
                             router_scores(self.trace, self.rows))

    def cache(self, slots: int, policy: str, *, shared: bool, preload: bool) -> ExpertCache:
        """A cache in slots, filled with popular experts or empty."""
        context = self.context()
        cache = ExpertCache(context.num_layers, context.num_experts, slots, make_policy(policy, context), shared=shared)
        if preload:
            assert context.popularity is not None
            cache.preload(popular_keys(context.popularity, slots, shared=shared))
        return cache

    def prefetcher(self, name: str, width: int, recall: float) -> Prefetcher | LookaheadPrefetcher | None:
        """A prefetcher, or None."""
        if name == "none":
            return None
        return make_prefetcher(name, PrefetchContext(
            num_layers=self.model.num_moe_layers, num_experts=self.model.num_experts, width=width,
            transitions=transition_counts(self.trace).astype(float), popularity=load_counts(self.trace).astype(float),
            future=access_stream(self.trace, self.rows), recall=recall, seed=self.seed))


def random_world(seed: int, *, one_link: bool = False) -> World:
    """A small world; most of its machines make tasks end together."""
    draw = random.Random(seed)
    machine, model = random_machine(draw, "load"), random_model(draw)
    while one_link and len(machine.route) > 1:
        machine = random_machine(draw, "load")
    trace = synthetic_trace(40, model.num_moe_layers, model.num_experts, model.top_k, 5, seed=seed % 11)
    steps = closed_loop_steps(trace, batch_size=draw.randint(1, 4), max_steps=draw.randint(1, 8),
                              include_prefill=draw.random() < 0.5, repeat=True, seed=seed)
    return World(seed, machine, model, trace, steps, OffloadPolicy("load", True, draw.choice((1, 1, 2, 3))))


def hobbit_program(world: World) -> HobbitProgram:
    """A random HOBBIT run; the same world, the same program."""
    draw = random.Random(world.seed + 1)
    experts = world.model.num_experts
    thresholds = sorted((draw.choice((0.0, 0.3, 0.6)), draw.choice((0.6, 0.9, 1.0))))
    rule = HobbitPrecision(*thresholds, *draw.choice(((16, 4), (8, 2))))
    shared, preload = draw.random() < 0.5, draw.random() < 0.5
    high, low = (world.cache(draw.randint(1, experts), draw.choice(POLICIES), shared=shared, preload=preload)
                 for _ in range(2))
    prefetcher = world.prefetcher(draw.choice(PREFETCHERS), draw.randint(1, 4), draw.choice((0.0, 0.5, 1.0)))
    return HobbitProgram(world.model, world.trace, world.steps, world.machine, CostModel(world.machine.hardware), high, low,
                         world.policy, rule, prefetcher, prefetch_bits=draw.choice(("mixed", "mixed", "high", "low")),
                         dequantize_share=draw.choice((0.0, 0.1)))


def edgemoe_program(world: World) -> EdgeMoeProgram:
    """A random EdgeMoE run, in one buffer or one per layer, of room for a few experts."""
    draw = random.Random(world.seed + 2)
    model = world.model
    choice = gate_mass_loss(world.trace, (2, 4, 8)).choose(draw.choice((0.02, 0.06, 0.3)))
    versions = edgemoe_versions(model, choice)
    sizes = expert_bytes_of(choice.bits, versions)
    room = int(sizes.mean() * draw.uniform(0.5, model.num_experts))
    context = world.context()
    policy = draw.choice(POLICIES)
    cache = ByteCache(model.num_moe_layers, model.num_experts, room, sizes, make_policy(policy, context),
                      shared=draw.random() < 0.6)
    if draw.random() < 0.5 and sizes[0].min() <= room and policy != "static":  # which admits its own choice only
        cache.preload([int(sizes[0].argmin())])
    prefetcher = world.prefetcher(draw.choice(PREFETCHERS), draw.randint(1, 4), draw.choice((0.0, 0.5, 1.0)))
    return EdgeMoeProgram(model, world.trace, world.steps, world.machine, CostModel(world.machine.hardware), cache,
                          world.policy, choice, versions, prefetcher, dequantize_share=draw.choice((0.0, 0.027)))


def d2moe_program(world: World, order: str | None = None) -> D2MoeProgram:
    """A random D2MoE run, with a budget from the largest layer of a step upwards."""
    draw = random.Random(world.seed + 3)
    model = world.model
    versions = nested_versions(model, draw.choice(((2, 3, 4), (2, 4), (3, 4, 5, 6))))
    capacity = np.full(versions.num_levels, 1 / versions.num_levels)
    levels = bit_levels(world.trace, capacity, by=draw.choice(("rank", "draw")), seed=world.seed)
    needed = 0
    for rows in world.rows:
        for layer in range(model.num_moe_layers):
            counts = level_counts(world.trace.expert_ids[rows, layer], levels[rows, layer], model.num_experts,
                                  versions.num_levels)
            needed = max(needed, sum(versions.weight_bytes(int(np.flatnonzero(row)[-1])) for row in counts if row.any()))
    planes = PlaneCache(model.num_moe_layers, model.num_experts, int(needed * draw.choice((1.0, 1.3, 2.5))), versions)
    return D2MoeProgram(model, world.trace, world.steps, world.machine, CostModel(world.machine.hardware), planes,
                        world.policy, levels, order=order or draw.choice(("hebf", "id")),
                        dequantize_share=draw.choice((0.0, 0.1)))


PROGRAMS = {"hobbit": hobbit_program, "edgemoe": edgemoe_program, "d2moe": d2moe_program}


@dataclass(frozen=True)
class Ran:
    """A program that has run, and what its slots held before."""

    world: World
    program: VersionProgram
    table: pd.DataFrame
    preload: dict[int, int]

    @cached_property
    def tasks(self) -> pd.DataFrame:
        """The tasks that were done."""
        return self.table[self.table["state"] == DONE]

    @property
    def counts(self) -> dict[str, int]:
        """The counts over all layers."""
        return {name: int(values.sum()) for name, values in self.program.cache_counts.items()}

    @cached_property
    def into_device(self) -> pd.DataFrame:
        """Copies over the last link of the route, cancelled ones too (a chunk's hops follow each other as tasks)."""
        hops = len(self.program.machine.route)
        copies = self.table[self.table["kind"].isin(COPIES)].sort_values("task")
        assert (np.diff(copies["task"].to_numpy().reshape(-1, hops), axis=1) == 1).all()
        return copies.iloc[hops - 1 :: hops]

    @cached_property
    def kernels(self) -> pd.DataFrame:
        """The experts that were computed."""
        return self.tasks[self.tasks["kind"] == "expert"]

    def key(self, row: object) -> int:
        """The key of a task's expert."""
        return row.layer * self.world.model.num_experts + row.expert  # type: ignore[attr-defined]

    def computed(self) -> dict[tuple[int, int, int], list[object]]:
        """(step, layer, expert) -> its kernels."""
        found = defaultdict(list)
        for row in self.kernels.itertuples():
            found[row.step, row.layer, row.expert].append(row)
        return found


def run_world(world: World, method: str) -> Ran:
    """Run a random program of a method on SimPy."""
    program = PROGRAMS[method](world)
    preload = {}
    if isinstance(program, HobbitProgram):
        preload = {pool.slot_of(layer, e): layer * world.model.num_experts + e for pool in program.pools
                   for layer in range(world.model.num_moe_layers) for e in pool.cache.residents(layer)}
    if isinstance(program, EdgeMoeProgram):
        preload = {program.cache.slot_of(layer, e): layer * world.model.num_experts + e
                   for layer in range(world.model.num_moe_layers) for e in program.cache.residents(layer)}
    return Ran(world, program, run_simpy(program), preload)
