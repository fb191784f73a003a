"""Offloaded inference on one device: a bounded pool of expert slots, a slow tier, a CPU that can help.

Routing of a layer becomes known when its router completes; there the program decides: which experts are
resident, which are still on their way, what to fetch, whom to evict, what the CPU computes, what to
prefetch for the next layer, and which queued prefetches turned out useless (they are cancelled).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.prefetch import LookaheadPrefetcher, Prefetcher
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.work import Cost, DenseWork
from moesim.lowering.assigned import Assigned
from moesim.lowering.batch import StepRecord, expert_counts, head_rows
from moesim.lowering.graph import PRIORITY_ADMIT, PRIORITY_COMPUTE, PRIORITY_DEMAND, ExecutorView, TaskGraph
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.misses.rule import MissRule
from moesim.lowering.offload_policy import CACHE_COLUMNS, OffloadPolicy
from moesim.lowering.prefetching import Prefetching
from moesim.lowering.transfers import Transfers
from moesim.lowering.work import attention_work, dense_work, experts_work, head_work, router_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.units import ns_from_s


@dataclass
class LayerMoment:
    """What is known at one decision point; `tasks` end the layer, `deferred` ones the next layer."""

    step: Step
    layer: int
    now: int
    router: int
    counts: np.ndarray
    tasks: list[int] = field(default_factory=list)
    deferred: list[int] = field(default_factory=list)


class OffloadProgram:
    """Lowers steps of a trace on one device with a bounded expert cache.

    Args:
        machine: which device computes, where the experts lie, over which links they come.
        cache: holds the slots; its policy evicts. prefetcher: ranks experts of the next layer, or None.
    """

    def __init__(
        self,
        model: ModelSpec,
        trace: RoutingTrace,
        steps: list[Step],
        machine: OffloadMachine,
        cost: CostModel,
        cache: ExpertCache,
        policy: OffloadPolicy,
        prefetcher: Prefetcher | LookaheadPrefetcher | None = None,
        rule: MissRule | None = None,
    ) -> None:
        trace.check_model(model)
        self._check_memory(model, machine, cache, max((_kv_tokens(trace, step) for step in steps), default=0))
        self.model, self.trace, self.machine, self.cost = model, trace, machine, cost
        if policy.miss != "load":
            self._check_cpu(f"miss: {policy.miss}")
        self.cache, self.policy, self.prefetcher = cache, policy, prefetcher
        self.steps = [StepRecord(step, len(step.rows)) for step in steps]
        self.graph = TaskGraph(machine.resources())
        self.transfers = Transfers(
            self.graph, machine, cost, model.expert_bytes, policy.chunks, cache.num_slots, model.num_experts
        )
        self.cache_counts = {name: np.zeros(model.num_moe_layers, np.int64) for name in CACHE_COLUMNS}
        self.rule = rule
        self._ahead = Prefetching(self)
        self._assigned = Assigned(self, rule) if rule is not None else None
        self._deferred: list[int] = []
        self._seen_requests: set[int] = set()
        self._new_request = False

    def _check_memory(self, model: ModelSpec, machine: OffloadMachine, cache: ExpertCache, kv_tokens: int) -> None:
        """Raise InputError unless the slots fit on the device and all experts in the slow memory."""
        machine.check_memory(model, cache.num_slots, kv_tokens)

    def _check_cpu(self, what: str) -> None:
        """Raise InputError unless the CPU can compute experts."""
        if not self.cpu_can_reach_experts():
            raise InputError(
                f"{what} needs the experts in the CPU's memory, but they lie in {self.machine.slow_memory!r}")

    def cpu_can_reach_experts(self) -> bool:
        """Return whether the CPU can compute an absent expert."""
        return self.machine.cpu_sees_experts

    def _cpu_waits_for(self, at: LayerMoment, expert: int) -> list[int]:
        """Return what the CPU waits for beside the expert's rows."""
        del at, expert
        return []

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Hand over up to the next router, decide there, and go on."""
        self.transfers.view = view
        done: tuple[int, ...] = ()
        for number, record in enumerate(self.steps):
            record.first_task = len(self.graph)
            requests = set(self.trace.request_id[record.step.rows].tolist())
            self._new_request = not requests <= self._seen_requests
            self._seen_requests |= requests
            done = yield from self._lower_step(record.step, number, done)
            record.last_task = done[0]
        if done:
            yield done[0]

    def _lower_step(self, step: Step, number: int, done: tuple[int, ...]) -> Generator[int, None, tuple[int, ...]]:
        tokens, context = len(step.rows), int(np.sum(self.trace.position[step.rows] + 1))
        moe_index = {layer: place for place, layer in enumerate(self.model.moe_layers)}
        for layer in range(self.model.num_layers):
            attention = self._dense(
                "attention", attention_work(self.model, tokens, context), done, step, moe_index.get(layer, -1)
            )
            if layer not in moe_index:
                done = (self._dense("dense", dense_work(self.model, tokens), (attention,), step, -1),)
                continue
            moe_layer = moe_index[layer]
            router = self._dense("router", router_work(self.model, tokens), (attention,), step, moe_layer)
            yield router
            now = number * self.model.num_moe_layers + moe_layer
            counts = expert_counts(self.trace.expert_ids[step.rows, moe_layer], self.model.num_experts)
            done = (self._moe_layer(LayerMoment(step, moe_layer, now, router, counts)),)
        return (self._dense("head", head_work(self.model, head_rows(step)), done, step, -1),)

    def _moe_layer(self, at: LayerMoment) -> int:
        """Schedule one layer's experts; returns the barrier that ends it."""
        wanted = np.flatnonzero(at.counts)
        self._ahead.drop_useless(at.layer, set(wanted.tolist()))
        hits = [e for e in wanted.tolist() if self.cache.slot_of(at.layer, e) >= 0]
        misses = [e for e in wanted.tolist() if self.cache.slot_of(at.layer, e) < 0]
        self._count_accesses(at, hits, misses)
        self.cache.touch(at.layer, wanted.tolist(), at.now)
        if self.model.shared_intermediate_size:
            at.tasks.append(
                self._dense(
                    "shared_expert",
                    shared_work(self.model, len(at.step.rows)),
                    (at.router,),
                    at.step,
                    at.layer,
                )
            )
        self._schedule(at, wanted.tolist(), hits, misses)
        self._ahead.fetch(at, wanted)
        return self._end(at)

    def _schedule(self, at: LayerMoment, wanted: list[int], hits: list[int], misses: list[int]) -> None:
        """Add the tasks of the layer's experts: those that are there first, then the missing ones, the fullest first."""
        if self._assigned is not None:
            self._assigned.schedule(at, wanted)
            return
        for expert in sorted(hits, key=lambda e: not self.transfers.has_arrived(self.key(at.layer, e))):
            self.compute_resident(at, expert)
        for expert in sorted(misses, key=lambda e: (-int(at.counts[e]), e)):
            self._compute_missing(at, expert, set(wanted))

    def _end(self, at: LayerMoment) -> int:
        """Add the barrier that ends the layer; what it defers ends the next one (the last layer defers nothing)."""
        last = at.layer + 1 == self.model.num_moe_layers
        ends = [*at.tasks, *self._deferred, *(at.deferred if last else ())]
        self._deferred = [] if last else at.deferred
        return self.graph.barrier(ends, step=at.step.index, layer=at.layer)

    def begins_request(self, at: LayerMoment) -> bool:
        """Return whether a request that no earlier step held begins with this access."""
        return self._new_request and at.layer == 0

    def key(self, layer: int, expert: int) -> int:
        """Return the cache's key of an expert."""
        return layer * self.model.num_experts + expert

    def _count_accesses(self, at: LayerMoment, hits: Sequence[int], misses: Sequence[int]) -> None:
        late = [e for e in hits if not self.transfers.has_arrived(self.key(at.layer, e))]
        ahead = self._ahead.used(at.layer, hits)
        counts = {
            "accesses": len(hits) + len(misses),
            "hits": len(hits) - len(late),
            "late_hits": len(late),
            "misses": len(misses),
            "useful_prefetches": len(set(ahead) - set(late)),
            "late_prefetches": len(set(ahead) & set(late)),
        }
        for name, value in counts.items():
            self.cache_counts[name][at.layer] += value

    def compute_resident(self, at: LayerMoment, expert: int) -> None:
        """Compute an expert that is in a slot, or on its way to one: then the rest of its copy goes first,
        or the CPU computes it once more where that is its part."""
        key = self.key(at.layer, expert)
        if self.policy.miss == "cpu" and self.transfers.in_background(key):
            at.tasks.append(self.compute_on_cpu(at, expert))
            return
        arrival = self.transfers.promote(key, PRIORITY_DEMAND)
        self._compute(at, expert, self.cache.slot_of(at.layer, expert), [at.router, *arrival])

    def _compute(self, at: LayerMoment, expert: int, slot: int, deps: list[int]) -> None:
        tokens = int(at.counts[expert])
        work = experts_work(self.model, tokens, 1, tokens)
        cost = self.cost.grouped_ffn(self.machine.device, work)
        task = self._add(
            "expert",
            self.machine.compute_index,
            cost,
            deps,
            at.step,
            at.layer,
            expert=expert,
            slot=slot,
            tokens=tokens,
            num_bytes=round(work.bytes_per_group),
            flops=tokens * work.flops_per_token,
        )
        self.transfers.use(slot, task)
        at.tasks.append(task)

    def _compute_missing(self, at: LayerMoment, expert: int, wanted: set[int]) -> None:
        """Run a missing expert on the CPU, or fetch it: into a slot, or through a staging slot.

        The staging slots take what the policy does not admit or would rather not keep, and what a layer
        needs beyond its slots; such an expert is used once and not kept.
        """
        self.transfers.forget(self.key(at.layer, expert))
        if self.on_cpu(int(at.counts[expert])):
            at.tasks.append(self.compute_on_cpu(at, expert))
            if self.policy.admit:
                self._admit(at, expert, wanted)
            return
        self.load(at, expert, wanted)

    def load(self, at: LayerMoment, expert: int, wanted: set[int], *, keep: bool = True) -> None:
        """Fetch an expert, then compute it on the device; without `keep` it passes through a staging slot."""
        key = self.key(at.layer, expert)
        reserved = self.reserve(at, at.layer, expert, {self.key(at.layer, e) for e in wanted}) if keep else -1
        slot = self.transfers.staging_slot() if reserved < 0 else reserved
        arrival = self.transfers.fetch(
            key, slot, "load", PRIORITY_DEMAND, at.router, at.step.index, resident=reserved >= 0
        )
        self.cache_counts["loads"][at.layer] += 1
        self._compute(at, expert, slot, [at.router, arrival])

    def on_cpu(self, tokens: int) -> bool:
        """Return whether a missing expert of so many rows is computed on the CPU."""
        if self.policy.miss != "faster":
            return self.policy.miss == "cpu"
        work = experts_work(self.model, tokens, 1, tokens)
        load_s = self.transfers.seconds() + self.cost.grouped_ffn(self.machine.device, work).seconds
        return self.cost.grouped_ffn(self.machine.cpu, work).seconds < load_s

    def compute_on_cpu(self, at: LayerMoment, expert: int) -> int:
        """Send the rows down, compute there, bring the results back; returns the last of these tasks."""
        tokens = int(at.counts[expert])
        work = experts_work(self.model, tokens, 1, tokens)
        num_bytes = round(tokens * self.model.hidden_size * self.model.activation_bytes)
        last = at.router
        for kind, resource in (
            ("send", self.machine.out_index),
            ("cpu_expert", self.machine.cpu_index),
            ("receive", self.machine.in_index),
        ):
            if kind == "cpu_expert":
                cost = self.cost.grouped_ffn(self.machine.cpu, work)
                last = self._add(
                    kind,
                    resource,
                    cost,
                    [last, *self._cpu_waits_for(at, expert)],
                    at.step,
                    at.layer,
                    expert=expert,
                    tokens=tokens,
                    num_bytes=round(work.bytes_per_group),
                    flops=tokens * work.flops_per_token,
                )
            elif resource >= 0:
                cost = self.machine.activation_copy(self.cost, num_bytes)
                last = self._add(kind, resource, cost, [last], at.step, at.layer, expert=expert, num_bytes=num_bytes)
        self.cache_counts["cpu_misses"][at.layer] += 1
        return last

    def _admit(self, at: LayerMoment, expert: int, wanted: set[int]) -> None:
        """Fetch an expert that the CPU is computing, for its next use."""
        slot = self.reserve(at, at.layer, expert, {self.key(at.layer, e) for e in wanted})
        if slot >= 0:
            key = self.key(at.layer, expert)
            self.transfers.fetch(key, slot, "admit", PRIORITY_ADMIT, at.router, at.step.index)
            self.cache_counts["admits"][at.layer] += 1

    def reserve(self, at: LayerMoment, layer: int, expert: int, protected: set[int]) -> int:
        """Return a slot for an expert, -1 if it gets none; whoever leaves the slot is forgotten."""
        reservation = self.cache.reserve(layer, expert, at.now, protected)
        if reservation is None:
            return -1
        victim = reservation.victim_key
        self._ahead.lost(victim)
        if victim >= 0 and self.policy.write_back and self.transfers.has_arrived(victim):
            self.transfers.write_back(victim, reservation.slot, at.router, at.step.index)
        self.transfers.forget(victim)
        return reservation.slot

    def _dense(self, kind: str, work: DenseWork, deps: tuple[int, ...], step: Step, layer: int) -> int:
        cost = self.cost.dense(self.machine.device, work)
        return self._add(
            kind,
            self.machine.compute_index,
            cost,
            list(deps),
            step,
            layer,
            tokens=work.tokens,
            context=work.context,
            num_bytes=round(work.num_bytes),
            flops=work.flops,
        )

    def _add(self, kind: str, resource: int, cost: Cost, deps: list[int], step: Step, layer: int, **labels: Any) -> int:
        seconds = cost.seconds + self.cost.task_overhead(kind).seconds
        return self.graph.add(
            kind,
            resource,
            ns_from_s(seconds),
            deps,
            priority=PRIORITY_COMPUTE,
            source=cost.source,
            step=step.index,
            layer=layer,
            **labels,
        )


def _kv_tokens(trace: RoutingTrace, step: Step) -> int:
    return int(np.sum(trace.position[step.rows].astype(np.int64) + 1)) if step.phase == "decode" else len(step.rows)
