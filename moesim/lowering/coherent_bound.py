"""A lower bound on the step time of context-coherent execution: what no plan with these slots can beat."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moesim.hardware.collective import all_gather_seconds, all_reduce_seconds
from moesim.hardware.cost import CostModel
from moesim.hardware.work import DenseWork
from moesim.lowering.bounds import ExpertParallelBound, StepBound
from moesim.lowering.context_coherent import TOKEN_ID_BYTES
from moesim.lowering.work import attention_work, dense_work, head_work, router_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import PAD, PHASES, PREFILL, RoutingTrace
from moesim.units import ns_from_s


class ContextCoherentBound(ExpertParallelBound):
    """Lower bound over all plans with `slots_per_rank` slots, replicas included.

    Decode: ranks meet at the dispatch of each MoE layer. Between two meetings some rank has at least the mean number
    of tokens, with at least the shortest contexts of so many: its shared experts, attention, dense layers and router
    count. So do the experts of the busiest rank, as in home execution. The two add up where ranks must meet between
    them, at a combine that some token forces; and, for the time that rows alone take, where every token has k experts:
    either there is a combine, or all of a token's rows are where it is, so the rank with most tokens has most rows too.
    Else the larger of the two counts. Forced copies go out and their partial sums come back, over perfectly even wires;
    the AllGather is one of even blocks.

    Prefill does not depend on the plan but for the experts, and for top-1 their rows in the AllGather.
    """

    def __init__(self, model: ModelSpec, trace: RoutingTrace, cost: CostModel, slots_per_rank: int,
                 dispatch_bytes: float | None = None, gather: str = "kv") -> None:
        width = model.activation_bytes
        super().__init__(model, trace, cost, slots_per_rank, width if dispatch_bytes is None else min(width, dispatch_bytes))
        self.gather = gather

    def step(self, step: Step) -> StepBound:
        """Return the bound of one step."""
        layers = np.moveaxis(self.trace.expert_ids[step.rows], 1, 0)
        if step.phase == PHASES[PREFILL]:
            fixed, traffic = self._prefill(step, layers)
            experts = sum(self._experts(ids) for ids in layers)
            return StepBound(fixed + experts + traffic, fixed, experts, traffic)
        spans = self._spans(step)
        experts = sum(self._beside(ids, after) for ids, after in zip(layers, spans[1:], strict=True))
        traffic = sum(self._traffic(ids) for ids in layers) + self._last_gather(step)
        return StepBound(sum(spans) + experts + traffic, sum(spans), experts, traffic)

    def _spans(self, step: Step) -> list[int]:
        """ns of the rank with most tokens before each meeting, and after the last one; experts left out."""
        model, rows, heads = self.model, self._even(len(step.rows)), self._even(len(np.unique(step.requests)))
        context = int(np.sort(self.trace.position[step.rows].astype(np.int64) + 1)[:rows].sum())
        attention = self._one("attention", rows, lambda r: attention_work(model, rows, context))
        router = self._one("router", rows, lambda r: router_work(model, rows))
        dense = self._one("dense", rows, lambda r: dense_work(model, rows))
        shared = self._one("shared_expert", rows, lambda r: shared_work(model, rows)) if self._has_shared else 0
        spans, since = [], 0
        for layer in range(model.num_layers):
            since += attention
            if layer in model.moe_layers:
                spans.append(since + router)
                since = shared
            else:
                since += dense
        head = self._one("head", heads, lambda r: head_work(model, heads))
        one_row_each = len(step.rows) == len(np.unique(step.requests))
        return [*spans, since + head if one_row_each else max(since, head)]

    def _beside(self, expert_ids: np.ndarray, after: int) -> int:
        """ns that the experts of a layer add to the span `after` their dispatch."""
        busiest = self._experts(expert_ids)
        if self._forced(expert_ids) and self.num_ranks > 1:
            return busiest
        if np.all(expert_ids != PAD):
            return max(self._rows_ns(self._even(expert_ids.size)), busiest - after)
        return max(0, busiest - after)

    def _prefill(self, step: Step, layers: np.ndarray) -> tuple[int, int]:
        """ns of a prefill step without its experts: compute, and exchange."""
        model, rows = self.model, len(step.rows)
        context = int(np.sum(self.trace.position[step.rows].astype(np.int64) + 1))
        attention = self._one("attention", rows, lambda r: attention_work(model, rows, context))
        moe = self._one("router", rows, lambda r: router_work(model, rows))
        moe += self._one("shared_expert", rows, lambda r: shared_work(model, rows)) if self._has_shared else 0
        dense = self._one("dense", rows, lambda r: dense_work(model, rows))
        heads = self._even(len(np.unique(step.requests)))
        head = self._one("head", heads, lambda r: head_work(model, heads))
        compute = model.num_layers * attention + model.num_moe_layers * moe + model.num_dense_layers * dense + head
        ids = self._gather_ns(self._even(rows) * TOKEN_ID_BYTES) + self._gather_ns(heads * TOKEN_ID_BYTES)
        return compute, ids + sum(self._results_ns(layer) for layer in layers)

    def _results_ns(self, expert_ids: np.ndarray) -> int:
        row, cost = self.model.hidden_size * self.model.activation_bytes, self.cost
        if expert_ids.shape[1] == 1:
            num_bytes = self._even(int(np.count_nonzero(expert_ids != PAD))) * row
            seconds = all_gather_seconds(cost.hardware, num_bytes / cost.route_efficiency)
        else:
            seconds = all_reduce_seconds(cost.hardware, len(expert_ids) * row / cost.route_efficiency)
        return ns_from_s(seconds + cost.task_overhead("combine").seconds) if seconds else 0

    def _last_gather(self, step: Step) -> int:
        heads = self._even(len(np.unique(step.requests)))
        held = self._even(len(step.rows) * self.model.num_layers) * self.model.kv_bytes_per_token_layer
        return self._gather_ns({
            "kv": held + heads * TOKEN_ID_BYTES,
            "activations": heads * self.model.hidden_size * self.model.activation_bytes,
            "ids": heads * TOKEN_ID_BYTES}[self.gather])

    def _gather_ns(self, num_bytes: float) -> int:
        seconds = all_gather_seconds(self.cost.hardware, num_bytes / self.cost.route_efficiency)
        return ns_from_s(seconds + self.cost.task_overhead("all_gather").seconds) if seconds else 0

    def _even(self, count: int) -> int:
        """What the fullest rank has at least."""
        return -(-count // self.num_ranks)

    def _one(self, kind: str, rows: int, work_of: Callable[[int], DenseWork]) -> int:
        return int(self._by_rank(kind, np.array([rows]), work_of)[0])

    @property
    def _has_shared(self) -> bool:
        return bool(self.model.shared_intermediate_size)
