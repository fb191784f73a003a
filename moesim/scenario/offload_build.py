"""Offload: what the points of an offloaded run share, and how each point's program is built from its parts."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.layered import LayeredCache
from moesim.cache.policies.static import popular_keys
from moesim.cache.policy import POLICIES, AccessStream, PolicyContext, access_stream, information_level, make_policy
from moesim.cache.prefetch import LookaheadPrefetcher, PrefetchContext, Prefetcher, make_prefetcher, reads
from moesim.cache.prefetchers.training import token_accesses, use_tokens
from moesim.cache.scores import RouterScores, request_starts, router_scores
from moesim.hardware.cost import CostModel
from moesim.lowering.expert_times import ExpertTimes
from moesim.lowering.host_tier import TieredOffloadProgram
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.misses.registry import make_rule
from moesim.lowering.misses.rule import MissRule
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_bound import OffloadBound, offload_bound
from moesim.lowering.offload_policy import MISSES, OffloadPolicy
from moesim.model.spec import ModelSpec
from moesim.scenario.allocation import slots_by_layer
from moesim.scenario.precision import precision_program
from moesim.scenario.schema import NO_PREFETCH, Point
from moesim.traces.stats import load_counts, transition_counts
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace

NAMED_RULES = {"faster": "fiddler"}  # the rule that does what a built-in way of `OffloadPolicy` does


@dataclass(frozen=True)
class Offload:
    """What one offloaded run needs besides its point: model, routing, machine; shared by simulation and real run."""

    model: ModelSpec
    train: RoutingTrace
    test: RoutingTrace
    steps: list[Step]
    machine: OffloadMachine
    seed: int
    preload: str = "popular"
    shared: bool = False
    chunks: int = 3
    admit: bool = True
    write_back: bool = False
    host_slots_per_layer: int | None = None
    host_policy: str = "lru"

    @cached_property
    def stream(self) -> AccessStream:
        """The accesses of the steps."""
        return access_stream(self.test, [step.rows for step in self.steps])

    @cached_property
    def starts(self) -> np.ndarray:
        """bool[access], where a new request begins."""
        return request_starts(self.test, [step.rows for step in self.steps])

    @cached_property
    def scores(self) -> RouterScores | None:
        """The gate weights of each access, if the trace has them."""
        return None if self.test.gate_weights is None else router_scores(self.test, [step.rows for step in self.steps])

    @cached_property
    def popularity(self) -> np.ndarray:
        """float64[layer, expert], load of the training requests."""
        return load_counts(self.train).astype(np.float64)

    @cached_property
    def transitions(self) -> np.ndarray:
        """float64[layer - 1, expert, expert] of the training requests."""
        return transition_counts(self.train).astype(np.float64)

    @cached_property
    def use_tokens(self) -> np.ndarray:
        """int64[use], the tokens of each use of the stream."""
        return use_tokens(self.test, [step.rows for step in self.steps])

    @cached_property
    def training(self) -> tuple[AccessStream, np.ndarray]:
        """The training requests token by token, and bool[access], where a request begins."""
        return token_accesses(self.train)

    @cached_property
    def training_scores(self) -> RouterScores | None:
        """The gate weights of the training accesses, if the trace has them."""
        if self.train.gate_weights is None:
            return None
        order = np.lexsort((self.train.position, self.train.request_id))
        return router_scores(self.train, list(order[:, None]))

    def preloaded(self, slots_per_layer: int) -> list[int]:
        """Return the keys that fill the slots before the run: the most popular experts of each layer, or of all."""
        if self.preload == "none":
            return []
        return popular_keys(self.popularity, min(slots_per_layer, self.model.num_experts), shared=self.shared)

    def slots(self, point: Point) -> np.ndarray:
        """Return int64[layer], the slots of each layer under a point's allocation."""
        return slots_by_layer(point, self)

    def cache(self, point: Point) -> ExpertCache:
        """Return a point's cache, preloaded."""
        model, slots = self.model, min(point.slots_per_layer, self.model.num_experts)
        if point.allocation == "uniform":
            cache = ExpertCache(model.num_moe_layers, model.num_experts, slots, self.policy(point.policy), shared=self.shared)
            cache.preload(self.preloaded(slots))
            return cache
        sizes = self.slots(point)
        layered = LayeredCache(model.num_experts, sizes, [self.policy(point.policy) for _ in sizes])
        if self.preload == "popular":
            for layer, size in enumerate(sizes.tolist()):
                best = np.argsort(-self.popularity[layer], kind="stable")[:size]
                layered.preload((layer * model.num_experts + best).tolist())
        return layered

    def policy(self, name: str) -> Any:
        """Return a new eviction policy."""
        model = self.model
        scored = information_level(POLICIES[name], "a policy") == "I2"
        return make_policy(name, PolicyContext(
            model.num_moe_layers, model.num_experts, self.popularity, self.stream, self.starts,
            self.scores if scored else None))  # scores of a long trace take much memory

    def program(self, point: Point, cost: CostModel) -> OffloadProgram:
        """Build the program of one point with a cache of its own."""
        if point.precision is not None:
            return precision_program(self, point, cost, self._prefetcher(point, cost, None))
        builtin = point.miss in MISSES and not point.miss_options
        policy = OffloadPolicy(point.miss if builtin else "load", self.admit, self.chunks, self.write_back)
        rule = None if builtin else make_rule(point.miss, **dict(point.miss_options))
        parts = (self.model, self.test, self.steps, self.machine, cost, self.cache(point), policy,
                 self._prefetcher(point, cost, rule))
        if self.host_slots_per_layer is not None:
            return TieredOffloadProgram(*parts, rule=rule, host=self._host(self.host_slots_per_layer))
        return OffloadProgram(*parts, rule=rule)

    def _host(self, slots_per_layer: int) -> ExpertCache:
        """Return host memory's experts: one pool for all layers, the popular ones at first."""
        model, slots = self.model, min(slots_per_layer, self.model.num_experts)
        host = ExpertCache(model.num_moe_layers, model.num_experts, slots, self.policy(self.host_policy), shared=True)
        if self.preload == "popular":
            host.preload(popular_keys(self.popularity, slots, shared=True))
        return host

    def _prefetcher(self, point: Point, cost: CostModel, rule: MissRule | None) -> Prefetcher | LookaheadPrefetcher | None:
        if point.prefetch == NO_PREFETCH:
            return None
        context: dict[str, Any] = {
            "num_layers": self.model.num_moe_layers, "num_experts": self.model.num_experts, "width": point.prefetch_width,
            "recall": point.prefetch_recall, "seed": self.seed, "lookahead": point.lookahead}
        wanted = set(reads(point.prefetch)) - {"recall"}
        if not wanted:  # a plug-in that does not say what it reads gets what is cheap
            wanted = {"transitions", "popularity", "future"}
        known = {
            "transitions": lambda: self.transitions, "popularity": lambda: self.popularity, "future": lambda: self.stream,
            "future_tokens": lambda: self.use_tokens, "scores": lambda: self.scores,
            "training": lambda: self.training[0], "training_starts": lambda: self.training[1],
            "training_scores": lambda: self.training_scores, "makespan": lambda: self._makespan(cost, rule or make_rule(NAMED_RULES.get(point.miss, point.miss))),
            "copy_s": lambda: self._copy_s(cost)}
        if "future_tokens" in wanted:
            wanted.add("future")
        return make_prefetcher(point.prefetch, PrefetchContext(**context, **{name: known[name]() for name in sorted(wanted)}))

    def _makespan(self, cost: CostModel, rule: MissRule) -> Any:
        """Return what HybriMoE weighs: a layer's seconds under the point's rule."""
        times = ExpertTimes(self.model, self.machine, cost, self.chunks,
                            on_cpu=self.machine.cpu_sees_experts or self.host_slots_per_layer is not None)

        def seconds(tokens: Mapping[int, int], resident: AbstractSet[int]) -> float:
            return times.makespan_s(rule, tokens, resident)

        return seconds

    def _copy_s(self, cost: CostModel) -> float:
        """Return the seconds of one expert's copy with nothing in the way."""
        return cost.uncounted().route_copy(self.machine.slow_memory, self.machine.fast_memory, self.model.expert_bytes).seconds

    def is_on_demand(self, point: Point) -> bool:
        """Return whether a point fetches an expert only for the layer whose router has just named it."""
        background = point.miss in ("cpu", "faster") and not point.miss_options and self.admit
        return point.prefetch == NO_PREFETCH and not background

    def bound_key(self, point: Point) -> tuple[object, ...] | None:
        """Return what a point's bound depends on; None where there is none (experts in several widths)."""
        if point.precision is not None:
            return None
        slots = point.slots_per_layer if point.allocation == "uniform" else tuple(self.slots(point).tolist())
        return slots, point.miss not in ("load", "gpu-only"), bool(dict(point.miss_options).get("defer"))

    def bound(self, point: Point, cost: CostModel) -> OffloadBound:
        """Return the lower bounds for every policy with the point's slots and the point's ways to handle a miss."""
        model = self.model
        uniform = min(point.slots_per_layer, model.num_experts)
        slots = uniform if point.allocation == "uniform" else self.slots(point).tolist()
        cache = self.cache(point)
        return offload_bound(
            model, self.test, self.steps, self.machine, cost, self.stream, slots_per_layer=slots,
            preload=[cache.key_of(layer, e) for layer in range(model.num_moe_layers) for e in cache.residents(layer)],
            shared=self.shared, cpu_helps=point.miss not in ("load", "gpu-only"), chunks=self.chunks,
            defers=bool(dict(point.miss_options).get("defer")),
            skipped_links=0 if self.host_slots_per_layer is None else 1)

    def debit(self, program: OffloadProgram) -> dict[str, Any]:
        """Return what a run in several widths took from the model's answers; nothing for one that changes nothing."""
        debit = getattr(program, "debit", None)
        return {} if debit is None else debit().columns()
