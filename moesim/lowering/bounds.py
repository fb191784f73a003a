"""Lower bounds on simulated time: what no plan and no cache policy can beat under the same cost model.

They share the cost model with the simulator but not its schedule, so a simulated time below its bound is
a bug (a test looks for one), and the gap says how much a better plan or policy could still win.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.hardware.cost import CostModel
from moesim.lowering.batch import context_sums, expert_counts, home_ranks
from moesim.lowering.expert_parallel import _last_rows
from moesim.lowering.work import attention_work, dense_work, experts_work, head_work, router_work
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.units import ns_from_s


@dataclass(frozen=True)
class StepBound:
    """A proven lower bound on the step time of any plan with these slots, and its parts (ns)."""

    total_ns: int
    fixed_ns: int
    experts_ns: int
    traffic_ns: int


class ExpertParallelBound:
    """Lower bound over all plans with `slots_per_rank` slots, replicas included.

    Per layer: the slowest rank's attention and router (they do not depend on the plan), then the experts of the
    busiest rank. Some rank has at least the mean number of rows, and some rank reads at least
    ``ceil(distinct / ranks)`` experts; a rank's kernel costs at least the cheaper way to hold that many. Tokens whose k
    experts cannot fit on one rank must travel: ``ceil(k / slots_per_rank) - 1`` ranks each, at best over perfectly even ports.
    """

    def __init__(self, model: ModelSpec, trace: RoutingTrace, cost: CostModel, slots_per_rank: int) -> None:
        self.model, self.trace, self.cost, self.slots = model, trace, cost, slots_per_rank
        self.num_ranks = cost.hardware.num_ranks
        self.home = home_ranks(trace, self.num_ranks)
        self._expert_cache: dict[tuple[int, int], int] = {}

    def step(self, step: Step) -> StepBound:
        """Return the bound of one step."""
        rows, home = step.rows, self.home[step.rows]
        tokens = np.bincount(home, minlength=self.num_ranks)
        context = context_sums(self.trace.position[rows], home, self.num_ranks)
        attention = self._slowest(
            "attention", lambda r: attention_work(self.model, int(tokens[r]), int(context[r])), tokens
        )
        router = self._slowest("router", lambda r: router_work(self.model, int(tokens[r])), tokens)
        dense = (
            self._slowest("dense", lambda r: dense_work(self.model, int(tokens[r])), tokens)
            if self.model.num_dense_layers
            else 0
        )
        heads = np.bincount(self.home[_last_rows(self.trace, rows)], minlength=self.num_ranks)
        head = self._slowest("head", lambda r: head_work(self.model, int(heads[r])), heads)
        fixed = self.model.num_layers * max(attention, 0) + self.model.num_dense_layers * dense + head
        fixed += self.model.num_moe_layers * self._router_beside(router, tokens, context)
        experts = sum(
            self._experts(self.trace.expert_ids[rows, layer]) for layer in range(self.model.num_moe_layers)
        )
        traffic = self.model.num_moe_layers * self._traffic(len(rows))
        return StepBound(fixed + experts + traffic, fixed, experts, traffic)

    def _router_beside(self, router: int, tokens: np.ndarray, context: np.ndarray) -> int:
        """The router of the rank whose attention is slowest (the dispatch waits for both)."""
        slowest = max(
            np.flatnonzero(tokens).tolist(),
            key=lambda r: self._dense_ns(
                "attention", r, attention_work(self.model, int(tokens[r]), int(context[r]))
            ),
        )
        return min(router, self._dense_ns("router", slowest, router_work(self.model, int(tokens[slowest]))))

    def _dense_ns(self, kind: str, rank: int, work) -> int:
        seconds = self.cost.dense(self.cost.hardware.ranks[rank], work).seconds
        return ns_from_s(seconds + self.cost.task_overhead(kind).seconds)

    def _slowest(self, kind: str, work_of, tokens: np.ndarray) -> int:
        return max(
            (self._dense_ns(kind, rank, work_of(rank)) for rank in np.flatnonzero(tokens).tolist()), default=0
        )

    def _experts(self, expert_ids: np.ndarray) -> int:
        counts = expert_counts(expert_ids, self.model.num_experts)
        rows = -(-int(counts.sum()) // self.num_ranks)
        distinct = -(-int(np.count_nonzero(counts)) // self.num_ranks)
        if (rows, distinct) not in self._expert_cache:
            by_rows = min(self._kernel_ns(rows, groups) for groups in range(1, min(rows, self.slots) + 1))
            self._expert_cache[rows, distinct] = max(by_rows, self._kernel_ns(distinct, distinct))
        return self._expert_cache[rows, distinct]

    def _kernel_ns(self, rows: int, groups: int) -> int:
        work = experts_work(self.model, rows, groups, -(-rows // groups))
        seconds = min(self.cost.grouped_ffn(name, work).seconds for name in set(self.cost.hardware.ranks[:1]))
        return ns_from_s(seconds + self.cost.task_overhead("experts").seconds)

    def _traffic(self, tokens: int) -> int:
        """Both all-to-alls at their best: forced copies only, spread evenly over the fastest fabric."""
        forced = tokens * (-(-self.model.top_k // self.slots) - 1)
        if forced <= 0 or self.num_ranks == 1:
            return 0
        fastest = max(fabric.bytes_per_s for fabric in self.cost.hardware.fabrics)
        seconds = forced * self.model.hidden_size / self.num_ranks / fastest
        return ns_from_s(seconds * 1) + ns_from_s(seconds * self.model.activation_bytes)
