"""Lower bounds on simulated time: what no plan and no cache policy can beat under the same cost model.

They share the cost model with the simulator but not its schedule, so a simulated time below its bound is
a bug (a test looks for one), and the gap says how much a better plan or policy could still win.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.hardware.cost import CostModel
from moesim.hardware.spec import Fabric
from moesim.hardware.work import DenseWork
from moesim.lowering.batch import context_sums, expert_counts, home_ranks, last_rows
from moesim.lowering.work import attention_work, dense_work, experts_work, head_work, router_work
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import PAD, RoutingTrace
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

    Attention, router, dense layers and head do not depend on the plan; ranks meet at the dispatch of each MoE
    layer, and between two meetings the slowest rank's own sum counts. Then the experts of the busiest rank: some
    rank has at least the mean number of rows, and some rank reads at least ``ceil(distinct / ranks)`` experts; a
    rank's kernel costs at least the cheaper way to hold that many. A token whose n experts cannot fit on one rank must
    travel to ``ceil(n / slots_per_rank) - 1`` others, at best over perfectly even wires of all fabrics at once.
    """

    def __init__(
        self,
        model: ModelSpec,
        trace: RoutingTrace,
        cost: CostModel,
        slots_per_rank: int,
        dispatch_bytes: float | None = None,
    ) -> None:
        self.model, self.trace, self.cost, self.slots = model, trace, cost, slots_per_rank
        self.dispatch_bytes = model.activation_bytes if dispatch_bytes is None else dispatch_bytes
        self.num_ranks = cost.hardware.num_ranks
        self.home = home_ranks(trace, self.num_ranks)
        self._expert_cache: dict[tuple[int, int], int] = {}

    def step(self, step: Step) -> StepBound:
        """Return the bound of one step."""
        layers = np.moveaxis(self.trace.expert_ids[step.rows], 1, 0)
        fixed = self._fixed(step)
        experts = sum(self._experts(ids) for ids in layers)
        traffic = sum(self._traffic(ids) for ids in layers)
        return StepBound(fixed + experts + traffic, fixed, experts, traffic)

    def _fixed(self, step: Step) -> int:
        """Everything but experts and traffic, from one meeting of the ranks to the next."""
        model, home = self.model, self.home[step.rows]
        tokens = np.bincount(home, minlength=self.num_ranks)
        context = context_sums(self.trace.position[step.rows], home, self.num_ranks)
        heads = np.bincount(self.home[last_rows(step)], minlength=self.num_ranks)
        attention = self._by_rank("attention", tokens, lambda r: attention_work(model, int(tokens[r]), int(context[r])))
        router = self._by_rank("router", tokens, lambda r: router_work(model, int(tokens[r])))
        dense = self._by_rank("dense", tokens, lambda r: dense_work(model, int(tokens[r])))
        head = self._by_rank("head", heads, lambda r: head_work(model, int(heads[r])))
        total, since = 0, np.zeros_like(attention)
        for layer in range(model.num_layers):
            since = since + attention
            if layer in model.moe_layers:
                total, since = total + int((since + router).max()), np.zeros_like(since)
            else:
                since = since + dense
        return total + int((since + head).max())

    def _by_rank(self, kind: str, tokens: np.ndarray, work_of: Callable[[int], DenseWork]) -> np.ndarray:
        """int64[rank with tokens]: the time of one dense task on each."""
        overhead = self.cost.task_overhead(kind).seconds
        ranks = self.cost.hardware.ranks
        return np.array(
            [
                ns_from_s(self.cost.dense(ranks[rank], work_of(rank)).seconds + overhead)
                for rank in np.flatnonzero(tokens).tolist()
            ],
            dtype=np.int64,
        )

    def _experts(self, expert_ids: np.ndarray) -> int:
        counts = expert_counts(expert_ids, self.model.num_experts)
        if not counts.any():
            return 0
        rows = -(-int(counts.sum()) // self.num_ranks)
        distinct = -(-int(np.count_nonzero(counts)) // self.num_ranks)
        if (rows, distinct) not in self._expert_cache:
            self._expert_cache[rows, distinct] = max(self._rows_ns(rows), self._kernel_ns(distinct, distinct))
        return self._expert_cache[rows, distinct]

    def _rows_ns(self, rows: int) -> int:
        """The cheapest way to hold `rows` rows on one rank."""
        return min(self._kernel_ns(rows, groups) for groups in range(1, min(rows, self.slots) + 1))

    def _kernel_ns(self, rows: int, groups: int) -> int:
        work = experts_work(self.model, rows, groups, -(-rows // groups))
        seconds = min(self.cost.grouped_ffn(name, work).seconds for name in set(self.cost.hardware.ranks[:1]))
        return ns_from_s(seconds + self.cost.task_overhead("experts").seconds)

    def _traffic(self, expert_ids: np.ndarray) -> int:
        """Both all-to-alls of a layer at their best: forced copies only, spread evenly over all wires."""
        forced = self._forced(expert_ids)
        if not forced or self.num_ranks == 1:
            return 0
        rate = sum(fabric.bytes_per_s * self._wires(fabric) for fabric in self.cost.hardware.fabrics)
        values = forced * self.model.hidden_size / self.num_ranks / rate
        return ns_from_s(values * self.dispatch_bytes) + ns_from_s(values * self.model.activation_bytes)

    def _forced(self, expert_ids: np.ndarray) -> int:
        """Copies that must travel because a token's experts do not fit on one rank."""
        experts = np.count_nonzero(expert_ids != PAD, axis=1)
        return int(np.maximum(-(-experts // self.slots) - 1, 0).sum())

    def _wires(self, fabric: Fabric) -> int:
        """The most wires of a fabric on which one rank can send at once."""
        hardware = self.cost.hardware
        peers = hardware.ranks_per_node - 1 if fabric.scope == "node" else hardware.num_ranks - hardware.ranks_per_node
        return min(peers, 1) if fabric.contention != "pair" else peers
