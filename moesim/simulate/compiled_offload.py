"""The compiled offload engine: decisions, cache, copies and times of an `OffloadProgram` in one compiled loop.

It gives what SimPy gives with the program in Python: the same tasks in the same rows at the same nanoseconds
(`execute_offload`), or, without a task table, what a sweep needs of them (`offload_times`). What it does not know, such
as a policy of somebody else's, `supports` tells, and the generic executor does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeGuard

import numpy as np

from moesim.cache.cache import BEFORE_THE_RUN, ExpertCache
from moesim.cache.policies.belady import BeladyPolicy
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.work import SOURCES
from moesim.lowering.graph import KINDS, LABELS, NONE, PRIORITY_ADMIT, PRIORITY_PREFETCH, Program
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_policy import CACHE_COLUMNS
from moesim.lowering.task_arrays import TaskArrays
from moesim.lowering.transfers import Transfers
from moesim.simulate import compiled_offload_layout as k
from moesim.simulate.compiled_offload_costs import WORK_KINDS, CostTables
from moesim.simulate.compiled_offload_state import POLICY_TYPES, make_state, ranks_fit, view
from moesim.simulate.compiled_offload_stream import Window, predictions, predictor, windows
from moesim.simulate.compiled_offload_times import OffloadTimes, ResourceWork, times_of
from moesim.simulate.execution import Execution

__all__ = ["OffloadTimes", "ResourceWork", "execute_offload", "offload_times", "predictions", "supports", "times_of"]

COPY_KINDS = ("load", "admit", "prefetch")  # in the order of their codes LOAD ... PREFETCH
TABLE_USES = 1 << 15


def supports(program: Program) -> TypeGuard[OffloadProgram]:
    """Return whether the engine knows a program: offload with built-in parts only, and not run yet."""
    if type(program) is not OffloadProgram or len(program.graph):
        return False
    cache, policy = program.cache, program.cache.policy
    parts = ((program.machine, OffloadMachine), (program.transfers, Transfers), (cache, ExpertCache),
             (program.cost, CostModel))
    if any(type(part) is not expected for part, expected in parts) or type(policy) not in POLICY_TYPES:
        return False
    if program.policy.write_back or program.rule is not None or hasattr(program.prefetcher, "wishes"):
        return False
    if not program.steps or not all(len(record.step.rows) for record in program.steps) or cache._now != BEFORE_THE_RUN:
        return False
    if isinstance(policy, BeladyPolicy) and len(policy._offsets) <= len(program.steps) * cache.num_layers:
        return False
    return ranks_fit(program)


def execute_offload(program: OffloadProgram, predictions: np.ndarray | None = None) -> Execution:
    """Run a program and return its whole task table; the program's steps, cache counts and cost sources tell of it too.

    The program's graph stays empty and its cache as it was.

    Args:
        program: one that the engine `supports`.
        predictions: int16[access, width] of `compiled_offload_stream.predictions`; None: ask the prefetcher.

    Raises:
        InputError: predictions of another number of accesses, or ones that name experts outside the model.
    """
    run = _Run(program, emit=True)
    run.run(windows(program, TABLE_USES), predictions)
    for record, row in zip(program.steps, run.out.tolist(), strict=True):
        record.first_task, record.last_task = row[:2]
    program.cache_counts = run.cache_counts()
    return run.execution()


def offload_times(program: OffloadProgram, predictions: np.ndarray | None = None) -> OffloadTimes:
    """Run a program without a task table, in memory that does not grow with the run (its steps and future aside).

    Arguments and errors are those of `execute_offload`. Of the program only `cost` is changed: it counts what was used.
    """
    run = _Run(program, emit=False)
    run.run(windows(program), predictions)
    return run.times()


class _Run:
    """One run of one program: its state, and what was handed out of it."""

    def __init__(self, program: OffloadProgram, *, emit: bool) -> None:
        self.program = program
        self.m = make_state(program, max(record.tokens for record in program.steps), emit=emit)
        self.costs = CostTables(program, self.m)
        self.out = np.zeros((len(program.steps), 3), np.int64)
        self.table = np.zeros(0, np.int64)
        self.attention_flops: list[np.ndarray] = []
        self.predict = predictor(program)

    def run(self, parts: Iterable[Window], predictions: np.ndarray | None) -> None:
        """Run all windows, then what is still under way."""
        from moesim.simulate.kernels.offload_run import run_out, run_steps

        for window in parts:
            steps, named = self._steps(window), self._named(window, predictions)
            if self.m[k.EMIT]:
                self._make_room(window, named.shape[1])
            out = self.out[window.first:window.first + len(steps)]
            run_steps(self.m, self.table, steps, window.offsets, window.experts, window.tokens, named, out)
        run_out(self.m, self.table)
        self.costs.hand_over()

    def _named(self, window: Window, predictions: np.ndarray | None) -> np.ndarray:
        """int16[access, width]: what the prefetcher names in a window."""
        if not self.m[k.HAS_PREFETCH]:
            return np.zeros((window.num_accesses, 0), np.int16)
        if predictions is None:
            return self.predict(window)
        layers, experts = self.program.trace.num_layers, self.program.trace.num_experts
        first = window.first * layers
        named = np.array(predictions[first:first + window.num_accesses], np.int16, order="C")
        expected = len(self.program.steps) * layers
        if len(predictions) != expected or (named.size and not -1 <= named.min() <= named.max() < experts):
            raise InputError(f"predictions must be [{expected}, width] of experts below {experts}, -1 padded; got "
                             f"{list(predictions.shape)}")
        return named

    def _steps(self, window: Window) -> np.ndarray:
        """Price the steps of a window: int64[step, column]."""
        model, costs = self.program.model, self.costs
        costs.add("router", window.step_tokens, model.num_moe_layers)
        costs.add("head", window.head_rows)
        if model.num_dense_layers:
            costs.add("dense", window.step_tokens, model.num_dense_layers)
        if model.shared_intermediate_size:
            costs.add("shared_expert", window.step_tokens, model.num_moe_layers)
        costs.add_experts(window.tokens)
        ns, attention, num_bytes, flops = costs.attention(window.step_tokens, window.context)
        steps = np.zeros((len(window.label), k.STEP_COLUMNS), np.int64)
        for column, values in ((k.STEP_NS, ns), (k.STEP_BYTES, num_bytes), (k.STEP_SOURCE, attention.source + 1),
                               (k.STEP_CONTEXT, window.context), (k.STEP_TOKENS, window.step_tokens),
                               (k.STEP_HEAD, window.head_rows), (k.STEP_LABEL, window.label)):
            steps[:, column] = values
        if self.m[k.EMIT]:
            self.attention_flops.append(flops)
        return steps

    def _make_room(self, window: Window, width: int) -> None:
        """Let the table hold whatever a window can add (memory that is not written to is not taken)."""
        m = self.m
        chunks, copy = int(m[k.NUM_CHUNKS]), int(m[k.NUM_CHUNKS] * m[k.NUM_HOPS])
        accesses, uses = window.num_accesses, len(window.experts)
        serial = len(window.label) * (2 * self.program.model.num_layers + 1)
        users = max(chunks + 1, int(m[k.NUM_WIRES])) + 1
        rows = serial + 2 * accesses + uses * (copy + 5) + accesses * width * copy
        deps = serial + 2 * accesses + uses * (8 + 2 * chunks) + (uses + accesses * width) * (users * chunks + copy)
        used, capacity = int(m[k.NEXT_TASK]), int(m[k.CAPACITY])
        cells, found = self._cells(used)
        room = len(self.table) - k.TABLE_COLUMNS * capacity
        if used + rows <= capacity and len(found) + deps <= room:
            return
        expected = self._expected(window.first)
        m[k.CAPACITY] = max(capacity, int(used * expected) + 2 * rows)
        room = max(room, int(len(found) * expected) + 2 * deps)
        self.table = np.empty(k.TABLE_COLUMNS * int(m[k.CAPACITY]) + room, np.int64)
        for new, old in zip(self._cells(used, len(found)), (cells, found), strict=True):
            new[:] = old

    def _expected(self, steps: int) -> float:
        """Estimate how many times the tasks of the first steps the whole run has, from the expert uses there can be."""
        most = np.cumsum([min(record.tokens * self.program.trace.top_k, self.program.trace.num_experts)
                          for record in self.program.steps])
        return 1.1 * float(most[-1] / most[steps - 1]) if steps else 1.0

    def _cells(self, rows: int, deps: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return int64[column, row] and the dependencies of the first `rows` tasks."""
        capacity = int(self.m[k.CAPACITY])
        cells = self.table[:k.TABLE_COLUMNS * capacity].reshape(k.TABLE_COLUMNS, capacity)[:, :rows]
        if deps is None:
            deps = int(cells[k.C_DEPS, -1]) if rows else 0
        first = k.TABLE_COLUMNS * capacity
        return cells, self.table[first:first + deps]

    def cache_counts(self) -> dict[str, np.ndarray]:
        """Return the cache's counts, int64[layer] by name."""
        counts = view(self.m, k.COUNTS, k.NUM_COUNTS)
        return {name: counts[:, place].copy() for place, name in enumerate(CACHE_COLUMNS)}

    def times(self) -> OffloadTimes:
        """Return what the run took."""
        m = self.m
        wires_end = int(view(m, k.WIRES, k.WIRE_CELLS)[:, k.W_END].max())
        sources = self.costs.sources() + self._copy_sources()
        return OffloadTimes(
            self.out[:, k.OUT_END].copy(), max(int(m[k.CLOCK]), wires_end), self.cache_counts(), self._work(),
            int(m[k.NEXT_TASK]), int(m[k.CANCELLED]),
            {name: int(count) for name, count in zip(SOURCES, sources, strict=True) if count})

    def _copy_sources(self) -> np.ndarray:
        """int64[source]: copies of experts that ran, by the source of their cost."""
        counts = np.zeros(len(SOURCES), np.int64)
        source = view(self.m, k.HOP_SOURCE) - 1
        np.add.at(counts, source, view(self.m, k.COPIES, len(source)).sum(axis=0))
        return counts

    def _work(self) -> tuple[ResourceWork, ...]:
        """Return what each resource did, by kind."""
        machine, costs, m = self.program.machine, self.costs, self.m
        names = [resource.name for resource in self.program.graph.resources]
        on_cpu = {"cpu_expert": machine.cpu_index, "send": machine.out_index, "receive": machine.in_index}
        work: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(3, np.int64))
        work[names[machine.compute_index], "attention"] += (
            len(self.out) * self.program.model.num_layers, costs.attention_bytes, costs.attention_ns)
        for code, (kind, tokens) in enumerate(costs.uses().items()):
            table = costs.work[code]
            work[names[on_cpu.get(kind, machine.compute_index)], kind] += (
                tokens.sum(), (tokens * table[:, k.WORK_BYTES]).sum(), (tokens * table[:, k.WORK_NS]).sum())
        hop_ns = view(m, k.HOP_NS, int(m[k.NUM_HOPS]))
        copies = view(m, k.COPIES, *hop_ns.shape)
        for code, kind in enumerate(COPY_KINDS):
            for hop, resource in enumerate(machine.route_indexes):
                chunks = copies[code, :, hop]
                work[names[resource], kind] += (
                    chunks.sum(), (chunks * view(m, k.CHUNK_BYTES)).sum(), (chunks * hop_ns[:, hop]).sum())
        rows = (ResourceWork(*pair, *map(int, numbers)) for pair, numbers in work.items() if numbers[0])
        return tuple(sorted(rows))

    def execution(self) -> Execution:
        """Return the task table."""
        cell, deps = self._cells(int(self.m[k.NEXT_TASK]))
        labels = {"rank": np.full(cell.shape[1], NONE, np.int64), "step": cell[k.C_STEP], "layer": cell[k.C_LAYER],
                  "expert": cell[k.C_EXPERT], "slot": cell[k.C_SLOT], "chunk": cell[k.C_CHUNK],
                  "tokens": cell[k.C_TOKENS], "context": cell[k.C_CONTEXT], "num_bytes": cell[k.C_BYTES]}
        kind = cell[k.C_KIND].astype(np.int16)
        arrays = TaskArrays(
            self.program.graph.resources, kind, cell[k.C_RESOURCE].astype(np.int32), cell[k.C_NS], _first_priority(kind),
            cell[k.C_SOURCE].astype(np.int16), np.concatenate([[0], cell[k.C_DEPS]]), deps,
            self._flops(kind, cell[k.C_TOKENS]), {name: labels[name] for name in LABELS})
        return Execution(arrays, cell[k.C_READY], cell[k.C_START], cell[k.C_END], cell[k.C_PRIORITY],
                         cell[k.C_STATE].astype(np.int8))

    def _flops(self, kind: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """float64[task]: by kind and tokens, those of attention by the step."""
        row_of = np.full(len(KINDS), k.NUM_WORKS)
        row_of[[KINDS.index(name) for name in WORK_KINDS]] = np.arange(k.NUM_WORKS)
        by_work = np.concatenate([self.costs.work_flops, np.zeros((1, self.costs.work_flops.shape[1]))])
        flops = by_work[row_of[kind], tokens]
        flops[kind == KINDS.index("attention")] = np.repeat(
            np.concatenate(self.attention_flops), self.program.model.num_layers)
        return flops


def _first_priority(kinds: np.ndarray) -> np.ndarray:
    """int64[task]: the priority with which a task is made; later it may get a higher one."""
    by_kind = np.zeros(len(KINDS), np.int64)
    by_kind[KINDS.index("admit")], by_kind[KINDS.index("prefetch")] = PRIORITY_ADMIT, PRIORITY_PREFETCH
    return by_kind[kinds]
