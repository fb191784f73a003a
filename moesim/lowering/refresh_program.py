"""A refresh schedule as a program: the same nanoseconds as `refresh.run_schedule`, task by task, for timelines and reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moesim.hardware.cost import CostModel
from moesim.hardware.work import SOURCES
from moesim.lowering.batch import StepRecord
from moesim.lowering.graph import ExecutorView, TaskGraph
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.refresh import RefreshProblem, RefreshResult, pass_works
from moesim.lowering.work import experts_work
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import DENOISE, PHASES, RoutingTrace
from moesim.units import ns_from_s

FIRST_LAYERS = ("attention", "dense")
MOE_LAYER = ("attention", "router")


class RefreshProgram:
    """Denoising passes under a schedule that was run: whatever a layer does on one side is one task.

    Per MoE layer: attention, router, the experts that come in (then those that go back, if they are written), the calls of
    GPU and CPU side by side or one after the other, shared experts. The way of the rows to the CPU and back is part of its
    task. A pass counts its block's tokens if it is the last one of the block, so that rates are of decided tokens.

    Args:
        num_steps: passes to lower, from the first (None: all).
    """

    def __init__(self, model: ModelSpec, trace: RoutingTrace, machine: OffloadMachine, cost: CostModel,
                 problem: RefreshProblem, result: RefreshResult, num_steps: int | None = None) -> None:
        self.model, self.trace, self.machine, self.cost = model, trace, machine, cost
        self.problem, self.result = problem, result
        self.graph = TaskGraph(machine.resources())
        passes = problem.passes
        last = np.append(passes.block_starts[1:], True)
        tokens = passes.active[np.flatnonzero(passes.block_starts)][passes.block_index()]
        self.steps = [StepRecord(Step(step, PHASES[DENOISE], rows, trace.request_id[rows]), int(tokens[step] * last[step]))
                      for step, rows in enumerate(passes.rows[:num_steps])]
        self._copy_source = cost.route_copy(machine.slow_memory, machine.fast_memory, model.expert_bytes).source
        self._sources = {device: self._source(device) for device in (machine.device, machine.cpu)}

    def _source(self, device: str) -> str:
        """The least certain source among the calls that occur: a task stands for several."""
        tokens = np.unique(self.problem.passes.counts)
        found = {self.cost.grouped_ffn(device, experts_work(self.model, n, 1, n)).source for n in tokens[tokens > 0].tolist()}
        return max(found, key=SOURCES.index)

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Hand over one pass at a time."""
        before: tuple[int, ...] = ()
        for record in self.steps:
            record.first_task = len(self.graph)
            before = self._lower(record.step.index, before)
            record.last_task = before[0]
            yield before[0]

    def _lower(self, step: int, before: tuple[int, ...]) -> tuple[int, ...]:
        works = {work.op: (times, work) for times, work in pass_works(self.model, self.trace, self.problem.passes, step)}
        costs = {op: self.cost.dense(self.machine.device, work) for op, (_, work) in works.items()}
        length = {op: ns_from_s(cost.seconds + self.cost.task_overhead(op).seconds) for op, cost in costs.items()}

        def compute(ops: Sequence[str], layer: int, after: tuple[int, ...]) -> tuple[int, ...]:
            for op in ops:
                after = self._then(op, self.machine.compute_index, length[op], after, step, layer, costs[op].source)
            return after

        for _ in range(self.model.num_layers - self.model.num_moe_layers):
            before = compute([op for op in FIRST_LAYERS if op in works], -1, before)
        for layer in range(self.model.num_moe_layers):
            before = compute(MOE_LAYER, layer, before)
            before = self._experts(step, layer, self._moves(step, layer, before))
            before = compute(["shared_expert"] if "shared_expert" in works else [], layer, before)
        before = compute(["head"], -1, before)
        return before if len(before) == 1 else (self.graph.barrier(before, step=step),)

    def _moves(self, step: int, layer: int, before: tuple[int, ...]) -> tuple[int, ...]:
        costs, result, source = self.problem.costs, self.result, self._copy_source
        came, went = int(result.promotions[step, layer]), int(result.demotions[step, layer])
        num_bytes = self.model.expert_bytes
        before = self._then("load", self.machine.route_indexes[-1], came * costs.in_ns, before, step, layer, source,
                            round(came * num_bytes))
        return self._then("write_back", self.machine.back_index, went * costs.out_ns, before, step, layer, source,
                          round(went * num_bytes))

    def _experts(self, step: int, layer: int, before: tuple[int, ...]) -> tuple[int, ...]:
        gpu, cpu = int(self.result.gpu_ns[step, layer]), int(self.result.cpu_ns[step, layer])
        machine = self.machine
        ours = self._then("expert", machine.compute_index, gpu, before, step, layer, self._sources[machine.device])
        after = before if self.problem.costs.overlap else ours
        theirs = self._then("cpu_expert", machine.cpu_index, cpu, after, step, layer, self._sources[machine.cpu])
        if gpu and cpu and self.problem.costs.overlap:
            return (*ours, *theirs)
        return theirs if cpu else ours

    def _then(self, kind: str, resource: int, duration_ns: int, after: tuple[int, ...], step: int, layer: int, source: str,
              num_bytes: int = 0) -> tuple[int, ...]:
        """Add a task after others and return it; without work there is none, and the others are returned."""
        if duration_ns == 0:
            return after
        return (self.graph.add(kind, resource, duration_ns, after, source=source, step=step, layer=layer,
                               num_bytes=num_bytes),)
