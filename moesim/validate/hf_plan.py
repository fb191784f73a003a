"""The plan of an offloaded run, and what a run of it on known routing needs: caches, prefetchers, the simulated program."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.policy import PolicyContext, access_stream, make_policy
from moesim.cache.prefetch import PREFETCHERS, PrefetchContext, Prefetcher, looks_ahead, make_prefetcher
from moesim.cache.scores import request_starts, router_scores
from moesim.errors import InputError, unknown
from moesim.hardware.cost import CostModel
from moesim.lowering.batch import expert_counts
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.traces.stats import load_counts, transition_counts
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.validate.hf_runtime import MISSES
from moesim.validate.hf_weights import TIERS

NO_PREFETCH = "none"


@dataclass(frozen=True)
class HfPlan:
    """How a model is offloaded.

    Attributes:
        slots: per MoE layer. policy, prefetch: names of a cache policy and of a prefetcher (or ``none``).
        miss: ``load``, or ``cpu``: compute a missing expert from the slow tier and load it in the background.
        tier: ``memory`` or ``file``. bytes_per_s: paces the slow tier (None: as fast as it is).
        device: cpu or cuda.

    Raises:
        InputError: a value out of range, or misses on the CPU beside a GPU (their kernels would round otherwise).
    """

    slots: int
    policy: str = "lru"
    prefetch: str = NO_PREFETCH
    prefetch_width: int = 2
    miss: str = "load"
    tier: str = "memory"
    bytes_per_s: float | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("slots", "prefetch_width"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.miss not in MISSES:
            raise unknown("way to handle a miss", self.miss, MISSES)
        if self.tier not in TIERS:
            raise unknown("slow tier", self.tier, TIERS)
        if self.bytes_per_s is not None and not 0 < self.bytes_per_s < float("inf"):
            raise InputError(f"the slow tier's rate must be positive, got {self.bytes_per_s}")
        if self.miss == "cpu" and self.device != "cpu":
            raise InputError("miss cpu needs device cpu: a GPU's kernels round otherwise, so outputs would change")


class InlineMachine(OffloadMachine):
    """A machine whose one processor computes misses too, one thing after the other, as the offloaded run on a CPU does."""

    @property
    def cpu_index(self) -> int:
        """The resource that computes misses: the device's own."""
        return self.compute_index

    @property
    def shares_memory(self) -> bool:
        """The processor computes where the rows already are."""
        return True


@dataclass(frozen=True)
class HfCase:
    """A plan on the routing of one generation.

    Popularity and transitions, which some policies and prefetchers are built from, are those of this same routing.
    """

    plan: HfPlan
    trace: RoutingTrace
    steps: tuple[Step, ...]
    _rows: list[np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", [step.rows for step in self.steps])

    @cached_property
    def context(self) -> PolicyContext:
        """What policies may be built from."""
        trace, scored = self.trace, self.trace.gate_weights is not None
        return PolicyContext(
            trace.num_layers, trace.num_experts, load_counts(trace).astype(np.float64), access_stream(trace, self._rows),
            request_starts(trace, self._rows), router_scores(trace, self._rows) if scored else None)

    def cache(self) -> ExpertCache:
        """Return a new, empty cache with the plan's policy."""
        policy = make_policy(self.plan.policy, self.context)
        return ExpertCache(self.trace.num_layers, self.trace.num_experts, self.slots_per_layer, policy)

    @property
    def slots_per_layer(self) -> int:
        """The plan's slots, at most as many as there are experts."""
        return min(self.plan.slots, self.trace.num_experts)

    def prefetcher(self) -> Prefetcher | None:
        """Return a new prefetcher, or None; raises InputError for one that looks further than the next layer."""
        name = self.plan.prefetch
        if name == NO_PREFETCH:
            return None
        found = make_prefetcher(name, PrefetchContext(
            self.trace.num_layers, self.trace.num_experts, self.plan.prefetch_width,
            transition_counts(self.trace).astype(np.float64), self.context.popularity, self.context.future))
        if looks_ahead(found):
            nearby = [other for other in PREFETCHERS.names() if hasattr(PREFETCHERS[other], "predict")]
            raise InputError(f"prefetcher {name!r} looks further than the next layer, which a real run cannot follow; "
                             f"those that can: {', '.join(nearby)}")
        return cast("Prefetcher", found)

    @cached_property
    def access_tokens(self) -> list[np.ndarray]:
        """Per access int64[expert that is used], its tokens."""
        ids, found = self.trace.expert_ids, []
        for rows in self._rows:
            for layer in range(self.trace.num_layers):
                counts = expert_counts(ids[rows, layer], self.trace.num_experts)
                found.append(counts[counts > 0])
        return found

    def program(self, model: ModelSpec, machine: OffloadMachine, cost: CostModel) -> OffloadProgram:
        """Return the simulated program: an expert is copied in one piece, a layer's hits are computed first."""
        return OffloadProgram(model, self.trace, list(self.steps), machine, cost, self.cache(),
                              OffloadPolicy(self.plan.miss, chunks=1), self.prefetcher())


def stand_in_model(trace: RoutingTrace, hidden_size: int, expert_bytes: int) -> ModelSpec:
    """Return a model of the run's layers, experts and expert size, whose other costs all come from measured tables.

    One ``attention`` stands for all that the real model does between two MoE layers.
    """
    width = max(1, round(expert_bytes / (3 * 4 * hidden_size)))
    return ModelSpec(
        name=trace.model, num_layers=trace.num_layers, moe_layers=tuple(range(trace.num_layers)),
        num_experts=trace.num_experts, top_k=trace.top_k, hidden_size=hidden_size, expert_intermediate_size=width,
        attention=AttentionSpec(1, 1, 1), vocab_size=1, weight_bytes=expert_bytes / (3 * width * hidden_size),
        other_weight_bytes=4.0, activation_bytes=4.0)
