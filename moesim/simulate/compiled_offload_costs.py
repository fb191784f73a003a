"""Costs for the compiled offload engine: one question per distinct size, and the exact counts of sources."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moesim.hardware.cost_arrays import Costs, dense_costs, ns_from_seconds
from moesim.hardware.work import SOURCES, Cost
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.work import attention_work, dense_work, experts_work, head_work, router_work, shared_work
from moesim.simulate import compiled_offload_layout as k
from moesim.simulate.compiled_offload_state import view
from moesim.units import ns_from_s

# In the order of the codes ROUTER_WORK ... RECEIVE_WORK of `compiled_offload_layout`.
WORK_KINDS = ("router", "dense", "shared_expert", "head", "expert", "cpu_expert", "send", "receive")
_DENSE = {"router": router_work, "dense": dense_work, "shared_expert": shared_work, "head": head_work}


class CostTables:
    """Fills the tables of `m` for the sizes that occur, and counts who was asked what.

    The program's own cost model is asked nothing; `hand_over` counts in it each cost once per use, as the program does.
    """

    def __init__(self, program: OffloadProgram, m: np.ndarray) -> None:
        self._program, self._cost = program, program.cost.uncounted()
        sizes = int(m[k.NUM_SIZES])
        self.work = view(m, k.WORKS, sizes, k.WORK_CELLS)
        self.work_flops = np.zeros((k.NUM_WORKS, sizes))
        self._on_cpu, self._cpu_done, self._asked = (view(m, region) for region in (k.ON_CPU, k.CPU_DONE, k.ASKED))
        self._overhead_s = {kind: self._cost.task_overhead(kind).seconds for kind in ("attention", *WORK_KINDS)}
        self._measured_overheads = {kind for kind in self._overhead_s if _is_counted(program, kind)}
        self._known = np.zeros((k.NUM_WORKS, sizes), bool)
        self._uses = np.zeros((k.NUM_WORKS, sizes), np.int64)
        self._attention = np.zeros(len(SOURCES), np.int64)
        self.attention_bytes, self.attention_ns = 0, 0
        self._asked_both: list[tuple[str, str]] = [("", "")] * sizes

    def add(self, kind: str, tokens: np.ndarray, times: int = 1) -> None:
        """Note tasks of these sizes, each `times` over, and price the sizes that are new."""
        code = WORK_KINDS.index(kind)
        self._uses[code] += np.bincount(tokens, minlength=self._uses.shape[1]) * times
        self._price(code, np.flatnonzero(self._uses[code]))

    def add_experts(self, tokens: np.ndarray) -> None:
        """Note experts of these sizes; they may be computed on either side."""
        self.add("expert", tokens)
        program = self._program
        if program.policy.miss == "load":
            return
        used, known = self._uses[WORK_KINDS.index("expert")] > 0, self._known[WORK_KINDS.index("cpu_expert")]
        fresh = np.flatnonzero(used & ~known)
        for kind in ("cpu_expert", "send", "receive"):
            self._price(WORK_KINDS.index(kind), fresh)
        for count in fresh.tolist() if program.policy.miss == "faster" else ():
            work = experts_work(program.model, count, 1, count)
            device, cpu = (self._cost.grouped_ffn(name, work) for name in (program.machine.device, program.machine.cpu))
            self._on_cpu[count] = cpu.seconds < program.transfers.seconds() + device.seconds
            self._asked_both[count] = (device.source, cpu.source)

    def attention(self, tokens: np.ndarray, context: np.ndarray) -> tuple[np.ndarray, Costs, np.ndarray, np.ndarray]:
        """Return ns, costs, bytes and flops of one layer's attention in each step, and note that every layer asks."""
        program = self._program
        work = attention_work(program.model, tokens, context)  # type: ignore[arg-type]
        flops = np.asarray(work.flops, np.float64)
        costs = dense_costs(self._cost, program.machine.device, work)
        ns = np.maximum(1, ns_from_seconds(costs.seconds + self._overhead_s["attention"]))
        num_bytes = np.rint(work.num_bytes).astype(np.int64)
        layers = program.model.num_layers
        self._attention += np.bincount(costs.source, minlength=len(SOURCES)) * layers
        self.attention_ns += int(ns.sum()) * layers
        self.attention_bytes += int(num_bytes.sum()) * layers
        return ns, costs, num_bytes, flops

    def uses(self) -> dict[str, np.ndarray]:
        """Return, by kind, int64[tokens]: how many tasks of each size there were, those of attention left out."""
        on_cpu = self._cpu_done
        uses = {kind: self._uses[code] for code, kind in enumerate(WORK_KINDS)}
        return uses | {"expert": uses["expert"] - on_cpu, "cpu_expert": on_cpu, "send": on_cpu, "receive": on_cpu}

    def sources(self) -> np.ndarray:
        """int64[source]: tasks by the source of their cost, copies of experts left out."""
        counts = self._attention.copy()
        for code, tokens in enumerate(self.uses().values()):
            source = self.work[code, :, k.WORK_SOURCE] - 1
            used = np.flatnonzero(tokens)
            counts += np.bincount(source[used], weights=tokens[used], minlength=len(SOURCES)).astype(np.int64)
        return counts

    def hand_over(self) -> None:
        """Count in the program's cost model what the program would have asked it."""
        counts = self.sources()
        tasks = {kind: int(tokens.sum()) for kind, tokens in self.uses().items()}
        tasks["attention"] = int(self._attention.sum())
        counts[SOURCES.index("measured")] += sum(tasks[kind] for kind in self._measured_overheads)
        for count in np.flatnonzero(self._asked).tolist():
            for source in self._asked_both[count]:
                counts[SOURCES.index(source)] += self._asked[count]
        for code, number in enumerate(counts.tolist()):
            self._program.cost.count(np.array([code]), number)

    def _price(self, code: int, tokens: Iterable[int]) -> None:
        kind = WORK_KINDS[code]
        for count in np.asarray(tokens)[~self._known[code, np.asarray(tokens)]].tolist():
            cost, num_bytes, flops = self._ask(kind, count)
            ns = max(1, ns_from_s(cost.seconds + self._overhead_s[kind]))
            self.work[code, count] = ns, num_bytes, 1 + SOURCES.index(cost.source)
            self.work_flops[code, count] = flops
            self._known[code, count] = True

    def _ask(self, kind: str, tokens: int) -> tuple[Cost, int, float]:
        """Return cost, bytes and flops of one task."""
        program, machine = self._program, self._program.machine
        if kind in _DENSE:
            work = _DENSE[kind](program.model, tokens)
            return self._cost.dense(machine.device, work), round(work.num_bytes), work.flops
        if kind in ("send", "receive"):
            num_bytes = round(tokens * program.model.hidden_size * program.model.activation_bytes)
            return machine.activation_copy(self._cost, num_bytes), num_bytes, 0.0
        group = experts_work(program.model, tokens, 1, tokens)
        device = machine.device if kind == "expert" else machine.cpu
        return self._cost.grouped_ffn(device, group), round(group.bytes_per_group), tokens * group.flops_per_token


def _is_counted(program: OffloadProgram, kind: str) -> bool:
    """Whether the model counts a task's overhead (it does if it has measured one)."""
    twin = program.cost.uncounted()
    twin.task_overhead(kind)
    return any(twin.source_counts().values())
