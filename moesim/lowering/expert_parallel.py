"""Expert parallelism: every rank runs attention for its requests, experts live where the plan puts them.

One step: per layer attention and router on each token's home rank, dispatch (all-to-all), experts on
each rank, combine (all-to-all back); shared experts run on the home rank while the dispatch is under
way. Tokens return home after each layer (DeepEP's execution). A token is sent once to a rank however
many of its experts live there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.hardware.collective import all_to_all_transfers
from moesim.hardware.cost import CostModel
from moesim.hardware.work import Cost, DenseWork
from moesim.lowering.balancers import COUNT_BYTES, Assignment, BalancerOptions, make_balancer
from moesim.lowering.batch import StepRecord, context_sums, home_ranks, last_rows
from moesim.lowering.graph import ExecutorView, Resource, TaskGraph
from moesim.lowering.work import attention_work, dense_work, experts_work, head_work, router_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.placement.metrics import slot_of_token
from moesim.placement.plan import PlacementPlan
from moesim.traces.steps import Step
from moesim.traces.trace import PAD, RoutingTrace
from moesim.units import ns_from_s

COLLECTIVES = ("closed_form", "per_link")
LATENCY_LANES = 1 << 20


@dataclass(frozen=True)
class LayerTraffic:
    """Who sends what in one layer of one step.

    Attributes:
        sent: int64[rank, rank], tokens that go from home rank to expert rank (diagonal: they stay).
        slot_tokens: int64[slot], tokens of each physical slot (a balancer: int64[rank, group], of each copy).
    """

    sent: np.ndarray
    slot_tokens: np.ndarray


def layer_traffic(plan: PlacementPlan, slots: np.ndarray, home: np.ndarray) -> LayerTraffic:
    """Return the traffic of one layer from int32[token, k] physical slots (-1 pads) and int32[token] homes."""
    valid = slots != PAD
    slot_tokens = np.bincount(slots[valid].ravel(), minlength=plan.num_slots)
    ranks = np.where(valid, plan.slot_rank[np.maximum(slots, 0)], PAD)
    return LayerTraffic(sent_tokens(ranks, home, plan.num_ranks), slot_tokens)


def sent_tokens(ranks: np.ndarray, home: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return int64[rank, rank], tokens from home to the ranks int[token, k] that compute them, once to each."""
    reached = np.zeros((len(home), num_ranks + 1), bool)
    reached[np.arange(len(home))[:, None], ranks] = True  # PAD is the last column
    sent = np.zeros((num_ranks, num_ranks), np.int64)
    np.add.at(sent, home, reached[:, :num_ranks])
    return sent


class ExpertParallelProgram:
    """Lowers steps of a trace under a plan. Every step is static; one decision point at its end.

    Args:
        dispatch_bytes: bytes per hidden value sent out (1 for fp8 dispatch); default the activations'.
        collective: ``closed_form`` (one task per all-to-all) or ``per_link`` (one task per transfer).
        balancer: decides per batch and layer who computes what (`lowering.balancers`); it costs an exchange of
            counts, the time to solve and, for LLEP, the weights of spilled experts, all before the experts.

    Attributes:
        scratch_bytes: the most weights of foreign experts that a rank holds at a time (LLEP).

    Raises:
        InputError: trace, model, plan and hardware that do not fit each other.
    """

    def __init__(
        self,
        model: ModelSpec,
        trace: RoutingTrace,
        steps: list[Step],
        plan: PlacementPlan,
        cost: CostModel,
        *,
        dispatch_bytes: float | None = None,
        collective: str = "closed_form",
        balancer: BalancerOptions = BalancerOptions(),
    ) -> None:
        trace.check_model(model)
        hardware = cost.hardware
        if plan.num_ranks != hardware.num_ranks:
            raise InputError(
                f"the plan is for {plan.num_ranks} ranks, hardware {hardware.name!r} has {hardware.num_ranks}"
            )
        if (plan.num_layers, plan.num_experts) != (model.num_moe_layers, model.num_experts):
            raise InputError(
                f"the plan has {plan.num_layers} layers x {plan.num_experts} experts, "
                f"model {model.name!r} has {model.num_moe_layers} x {model.num_experts}"
            )
        if collective not in COLLECTIVES:
            raise InputError(f"collective must be one of {', '.join(COLLECTIVES)}, got {collective!r}")
        self.model, self.trace, self.plan, self.cost, self.collective = model, trace, plan, cost, collective
        self.steps = [StepRecord(step, len(step.rows)) for step in steps]
        self.dispatch_bytes = model.activation_bytes if dispatch_bytes is None else dispatch_bytes
        self.home = home_ranks(trace, plan.num_ranks)
        self.graph = TaskGraph(self._resources())
        self._index = {resource.name: place for place, resource in enumerate(self.graph.resources)}
        self.remote_tokens = {"rank": 0, "node": 0, "all": 0}
        self.remote_bytes = {"rank": 0.0, "node": 0.0}
        self._balancer, self._options, self.scratch_bytes = make_balancer(balancer, plan), balancer, 0.0

    def _resources(self) -> tuple[Resource, ...]:
        ranks = [Resource(f"{name}.compute", name, "compute") for name in self.cost.hardware.ranks]
        network = [Resource("network", "network", "all-to-all")]
        if self.collective == "per_link":
            network = [Resource("network.latency", "network", "latency", LATENCY_LANES)]
            full = np.ones((self.plan.num_ranks, self.plan.num_ranks))
            wires = sorted({transfer.wire for transfer in all_to_all_transfers(self.cost.hardware, full)})
            network += [Resource(wire, "network", wire) for wire in wires]
        return (*ranks, *network)

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Hand over one step at a time."""
        before: tuple[int, ...] = ()
        for record in self.steps:
            record.first_task = len(self.graph)
            record.last_task = self._lower_step(record.step, before)
            before = (record.last_task,)
            yield record.last_task

    def _lower_step(self, step: Step, before: tuple[int, ...]) -> int:
        rows = step.rows
        home = self.home[rows]
        tokens = np.bincount(home, minlength=self.plan.num_ranks)
        context = context_sums(self.trace.position[rows], home, self.plan.num_ranks)
        slots = slot_of_token(self.plan, self.trace.expert_ids[rows])
        moe_index = {layer: place for place, layer in enumerate(self.model.moe_layers)}
        done = before
        for layer in range(self.model.num_layers):
            attention = self._on_ranks(
                "attention",
                step,
                moe_index.get(layer, -1),
                tokens,
                done,
                lambda r: attention_work(self.model, int(tokens[r]), int(context[r])),
            )
            if layer in moe_index:
                done = (self._lower_moe(step, moe_index[layer], slots[:, moe_index[layer]], home, tokens, attention),)
            else:
                done = tuple(
                    self._on_ranks(
                        "dense", step, -1, tokens, attention, lambda r: dense_work(self.model, int(tokens[r]))
                    )
                )
        heads = np.bincount(self.home[last_rows(step)], minlength=self.plan.num_ranks)
        head = self._on_ranks("head", step, -1, heads, done, lambda r: head_work(self.model, int(heads[r])))
        return self.graph.barrier(head or done, step=step.index)

    def _lower_moe(
        self,
        step: Step,
        layer: int,
        slots: np.ndarray,
        home: np.ndarray,
        tokens: np.ndarray,
        attention: list[int],
    ) -> int:
        """One MoE layer; returns the barrier at which every rank has its tokens back."""
        traffic, weights = layer_traffic(self.plan, slots, home), None
        router = self._on_ranks(
            "router", step, layer, tokens, attention, lambda r: router_work(self.model, int(tokens[r]))
        )
        decided = router
        if self._balancer is not None:
            chosen: Assignment = self._balancer(layer, self.trace.expert_ids[step.rows, layer])
            traffic = LayerTraffic(sent_tokens(chosen.rank, home, self.plan.num_ranks), chosen.group_tokens)
            decided, weights = self._decide(step, layer, router), chosen.weights
        self._count(traffic)
        shared: list[int] = []
        if self.model.shared_intermediate_size:
            shared = self._on_ranks(
                "shared_expert",
                step,
                layer,
                tokens,
                router,
                lambda r: shared_work(self.model, int(tokens[r])),
            )
        width = self.model.hidden_size
        dispatched = self._all_to_all("dispatch", step, layer, traffic.sent, width * self.dispatch_bytes, decided)
        if weights is not None and weights.any():
            dispatched = self._all_to_all("weights", step, layer, weights, self.model.expert_bytes, dispatched)
            foreign = float(weights.sum(axis=0).max()) * self.model.expert_bytes
            self.scratch_bytes = max(self.scratch_bytes, foreign)
        experts = self._experts(step, layer, traffic, dispatched)
        back = self._all_to_all(
            "combine", step, layer, traffic.sent.T, width * self.model.activation_bytes, experts or dispatched
        )
        return self.graph.barrier([*back, *shared], step=step.index, layer=layer)

    def _decide(self, step: Step, layer: int, router: list[int]) -> list[int]:
        """Add a balancer's exchange of counts, every rank to every other, and the time of its decision.

        All ranks decide at the same time, on the host or a few multiprocessors, so shared experts go on meanwhile: the
        decision holds the network, which has nothing to do until it has fallen.
        """
        counts = np.ones((self.plan.num_ranks, self.plan.num_ranks), np.int64)
        known = self._all_to_all("counts", step, layer, counts, self.plan.num_experts * COUNT_BYTES, router)
        solve = Cost(self._options.solve_s, "stated")
        lane = self._index["network" if self.collective == "closed_form" else "network.latency"]
        return [self._add("balance", lane, solve, known, step, layer)]

    def _count(self, traffic: LayerTraffic) -> None:
        other_rank, other_node = self._elsewhere()
        self.remote_tokens["all"] += int(traffic.sent.sum())
        self.remote_tokens["rank"] += int(traffic.sent[other_rank].sum())
        self.remote_tokens["node"] += int(traffic.sent[other_node].sum())

    def _count_bytes(self, traffic: np.ndarray) -> None:
        other_rank, other_node = self._elsewhere()
        self.remote_bytes["rank"] += float(traffic[other_rank].sum())
        self.remote_bytes["node"] += float(traffic[other_node].sum())

    def _elsewhere(self) -> tuple[np.ndarray, np.ndarray]:
        """Masks bool[rank, rank]: pairs of different ranks, and of ranks in different nodes."""
        nodes = np.arange(self.plan.num_ranks) // self.cost.hardware.ranks_per_node
        return ~np.eye(self.plan.num_ranks, dtype=bool), nodes[:, None] != nodes[None, :]

    def _experts(self, step: Step, layer: int, traffic: LayerTraffic, dispatched: list[int]) -> list[int]:
        per_rank = traffic.slot_tokens.reshape(self.plan.num_ranks, -1)
        tasks = []
        for rank, counts in enumerate(per_rank):
            work = experts_work(self.model, int(counts.sum()), int(np.count_nonzero(counts)), int(counts.max()))
            if work.tokens:
                cost = self.cost.grouped_ffn(self.cost.hardware.ranks[rank], work)
                num_bytes = round(work.groups * work.bytes_per_group)
                tasks.append(
                    self._add(
                        "experts",
                        rank,
                        cost,
                        dispatched,
                        step,
                        layer,
                        rank=rank,
                        tokens=work.tokens,
                        num_bytes=num_bytes,
                        flops=work.tokens * work.flops_per_token,
                    )
                )
        return tasks

    def _on_ranks(
        self,
        kind: str,
        step: Step,
        layer: int,
        tokens: np.ndarray,
        deps: list[int] | tuple[int, ...],
        work_of: Callable[[int], DenseWork],
    ) -> list[int]:
        """Add one dense task per rank that has tokens. The dependencies of the same rank come first in `deps`."""
        tasks = []
        for rank in np.flatnonzero(tokens).tolist():
            work: DenseWork = work_of(rank)
            cost = self.cost.dense(self.cost.hardware.ranks[rank], work)
            tasks.append(
                self._add(
                    kind,
                    rank,
                    cost,
                    self._own(deps, rank),
                    step,
                    layer,
                    rank=rank,
                    tokens=work.tokens,
                    num_bytes=round(work.num_bytes),
                    flops=work.flops,
                )
            )
        return tasks

    def _own(self, deps: list[int] | tuple[int, ...], rank: int) -> list[int]:
        """Keep of `deps` what this rank waits for: its own tasks, and barriers."""
        ranks = self.graph.labels["rank"]
        return [dep for dep in deps if ranks[dep] in (rank, -1)]

    def _all_to_all(
        self, kind: str, step: Step, layer: int, sent: np.ndarray, token_bytes: float, deps: list[int]
    ) -> list[int]:
        """Add one all-to-all; every rank enters together (`deps`) and leaves together (the returned tasks)."""
        off_diagonal = sent * ~np.eye(len(sent), dtype=bool)
        traffic = off_diagonal * float(token_bytes)
        self._count_bytes(traffic)
        moved, stayed = int(off_diagonal.sum()), int(np.trace(sent))
        if not moved:
            return [self.graph.add("barrier", -1, 0, deps, step=step.index, layer=layer, tokens=stayed)]
        if self.collective == "per_link":
            return self._per_link(kind, step, layer, traffic, token_bytes, deps, stayed)
        cost = self.cost.all_to_all(traffic)
        return [
            self._add(
                kind,
                self._index["network"],
                cost,
                deps,
                step,
                layer,
                tokens=moved + stayed,
                num_bytes=round(traffic.sum()),
            )
        ]

    def _per_link(
        self,
        kind: str,
        step: Step,
        layer: int,
        traffic: np.ndarray,
        token_bytes: float,
        deps: list[int],
        stayed: int,
    ) -> list[int]:
        """One task per transfer on its wire, and one for its latency, which keeps no wire busy."""
        arrived: list[int] = []
        for transfer in all_to_all_transfers(self.cost.hardware, traffic):
            relayed = transfer.after >= 0
            before = [arrived[transfer.after]] if relayed else deps
            tokens = 0 if relayed else round(transfer.num_bytes / token_bytes)
            wire = self._add(
                kind,
                self._index[transfer.wire],
                Cost(transfer.seconds, "nameplate"),
                before,
                step,
                layer,
                rank=transfer.source,
                tokens=tokens,
                num_bytes=round(transfer.num_bytes),
            )
            if transfer.latency_s:
                latency = Cost(transfer.latency_s, "nameplate")
                wire = self._add("latency", self._index["network.latency"], latency, [wire], step, layer)
            arrived.append(wire)
        stay = self.graph.add("barrier", -1, 0, deps, step=step.index, layer=layer, tokens=stayed)
        return [stay, *arrived]

    def _add(self, kind: str, resource: int, cost: Cost, deps: list[int], step: Step, layer: int, **labels: Any) -> int:
        overhead = self.cost.task_overhead(kind).seconds
        return self.graph.add(
            kind,
            resource,
            ns_from_s(cost.seconds + overhead),
            deps,
            source=cost.source,
            step=step.index,
            layer=layer,
            **labels,
        )
