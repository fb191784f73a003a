"""What one layer's experts take on device, CPU and link: what a miss rule is told, and what a prefetcher may weigh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from moesim.hardware.cost import CostModel
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.misses.makespan import makespan_ns
from moesim.lowering.misses.rule import LayerWork, MissRule
from moesim.lowering.work import experts_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.units import ns_from_s, s_from_ns


class ExpertTimes:
    """Integer ns of experts by their number of rows; what it asks of the cost model is not counted.

    Args:
        chunks: pieces of one expert's copy. on_cpu: whether the CPU can compute absent experts.
    """

    def __init__(self, model: ModelSpec, machine: OffloadMachine, cost: CostModel, chunks: int, *, on_cpu: bool) -> None:
        self._model, self._machine, self._cost, self._on_cpu = model, machine, cost.uncounted(), on_cpu
        self._known: dict[int, tuple[int, int, int]] = {}
        self.load_ns = self._copy_ns(chunks)

    def layer(self, experts: Sequence[int], tokens: Sequence[int], resident: Sequence[bool], *, layer: int = 0,
              now: int = 0, step_tokens: int = 0) -> LayerWork:
        """Return a layer's work; `experts` rise, `step_tokens` are those of the shared expert (0: leave it out)."""
        gpu, cpu, copies = zip(*(self.of(count) for count in tokens), strict=True)
        shared = 0
        if self._model.shared_intermediate_size and step_tokens:
            dense = self._cost.dense(self._machine.device, shared_work(self._model, step_tokens))
            shared = self._ns("shared_expert", dense.seconds)
        return LayerWork(layer, now, tuple(experts), tuple(tokens), tuple(resident), gpu, cpu if self._on_cpu else (),
                         copies, self.load_ns, self._model.num_moe_layers, shared)

    def makespan_s(self, rule: MissRule, tokens: Mapping[int, int], resident: AbstractSet[int]) -> float:
        """Return the seconds of a layer of so many rows by expert under a rule, some of its experts resident."""
        experts = sorted(tokens)
        work = self.layer(experts, [tokens[expert] for expert in experts], [expert in resident for expert in experts])
        return s_from_ns(makespan_ns(work, rule.assign(work)))

    def of(self, tokens: int) -> tuple[int, int, int]:
        """Return ns of an expert's rows on the device, on the CPU (0: it cannot), and of their copies there and back."""
        if tokens not in self._known:
            work, machine = experts_work(self._model, tokens, 1, tokens), self._machine
            num_bytes = round(tokens * self._model.hidden_size * self._model.activation_bytes)
            copy_s = machine.activation_copy(self._cost, num_bytes).seconds
            ways = [kind for kind, wire in (("send", machine.out_index), ("receive", machine.in_index)) if wire >= 0]
            cpu_ns = 0
            if self._on_cpu:
                cpu_ns = self._ns("cpu_expert", self._cost.grouped_ffn(machine.cpu, work).seconds)
            self._known[tokens] = (
                self._ns("expert", self._cost.grouped_ffn(machine.device, work).seconds), cpu_ns,
                sum(self._ns(kind, copy_s) for kind in ways))
        return self._known[tokens]

    def _copy_ns(self, chunks: int) -> int:
        """Return the ns for which one expert's copy keeps the busiest link of the route."""
        base, extra = divmod(self._model.expert_bytes, chunks)
        sizes = [size for place in range(chunks) if (size := base + (place < extra))]
        return max(sum(self._ns("load", self._cost.copy(link.name, size).seconds) for size in sizes)
                   for link in self._machine.route)

    def _ns(self, kind: str, seconds: float) -> int:
        return max(1, ns_from_s(seconds + self._cost.task_overhead(kind).seconds))
