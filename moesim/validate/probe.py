"""Micro-benchmarks beside a run: each kind of task alone, in random order, on the executor's own lanes.

They run on the same threads, with the same kernels and cold operands, as the run that they predict, and
between its repetitions: calibrated once beside the run a prototype was 13 % off, interleaved 1 to 2 %.
Every kind is timed twice: alone, and while the other side (copies beside compute, compute beside copies) is busy,
since both share memory and cores. None of them looks at the run: which experts and slots they touch is random.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from moesim.calibrate.shapes import attention_shape, expert_shape, router_shape
from moesim.hardware.profile import MeasuredTable
from moesim.lowering.graph import ExecutorView, TaskGraph
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.work import compute_dtype, head_work
from moesim.model.spec import ModelSpec
from moesim.simulate.result import DONE
from moesim.units import s_from_ns
from moesim.validate.overhead import typical
from moesim.validate.torch_executor import World, run_torch

COPY_SHAPE = "expert_chunk"


@dataclass(frozen=True)
class ProbePlan:
    """What to measure: token counts of experts, (tokens, context) of attention, chunk sizes in bytes."""

    expert_tokens: tuple[int, ...]
    step_tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    chunk_bytes: tuple[int, ...]
    with_cpu: bool


@dataclass
class Samples:
    """Seconds measured so far, by (kind, size)."""

    seconds: dict[tuple[str, tuple[float, ...]], list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, tasks: pd.DataFrame) -> None:
        """Take the durations of a probe's tasks."""
        columns = (tasks[name].to_numpy() for name in ("kind", "tokens", "context", "num_bytes", "duration_ns"))
        for kind, tokens, context, num_bytes, duration_ns in zip(*columns, strict=True):
            if kind != "barrier":
                self.seconds[_size_key(kind, int(tokens), int(context), int(num_bytes))].append(
                    s_from_ns(int(duration_ns))
                )

    def merged(self, other: Samples) -> Samples:
        """Return the samples of both."""
        both = Samples()
        for part in (self, other):
            for key, values in part.seconds.items():
                both.seconds[key] += values
        return both


def _size_key(kind: str, tokens: int, context: int, num_bytes: int) -> tuple[str, tuple[float, ...]]:
    if kind == "attention":
        return kind, (tokens, context)
    return ("copy", (num_bytes,)) if kind in ("load", "send", "receive") else (kind, (tokens,))


@dataclass(frozen=True)
class Block:
    """One block of micro-benchmarks: every kind alone, and beside a busy other side."""

    alone: Samples
    beside: Samples

    def merged(self, other: Block) -> Block:
        """Return the samples of both blocks."""
        return Block(self.alone.merged(other.alone), self.beside.merged(other.beside))


class ProbeProgram:
    """Single tasks one after the other in random order, on random experts and slots.

    With `copies_per_round` the copies go in a chain of their own, so many for each round of the others: the two
    chains then run side by side.
    """

    def __init__(
        self,
        model: ModelSpec,
        machine: OffloadMachine,
        plan: ProbePlan,
        num_slots: int,
        rounds: int,
        seed: int,
        copies_per_round: int = 0,
    ) -> None:
        self.graph = TaskGraph(machine.resources())
        self._model, self._machine, self._plan, self._num_slots = model, machine, plan, num_slots
        self._rounds, self._copies = rounds, copies_per_round
        self._random = np.random.default_rng(seed)

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Hand over the whole chain (or both)."""
        tasks = self._round()
        chunks = [task for task in tasks if task[0] == "load"]
        if self._copies:
            tasks = [task for task in tasks if task[0] != "load"]
        last = self._chain(tasks * self._rounds)
        copied = self._chain([chunks[n % len(chunks)] for n in range(self._copies * self._rounds)])
        yield self.graph.barrier([*last, *copied])

    def _chain(self, tasks: list[tuple[str, int, int]]) -> tuple[int, ...]:
        last: tuple[int, ...] = ()
        for place in self._random.permutation(len(tasks)).tolist():
            kind, tokens, extra = tasks[place]
            last = (self._emit(kind, tokens, extra, last),)
        return last

    def _round(self) -> list[tuple[str, int, int]]:
        """One of everything that is to be measured, as (kind, tokens, context or chunk)."""
        plan = self._plan
        contexts = [("attention", n, n * c) for n in plan.step_tokens for c in plan.contexts]
        steps = [(kind, n, 0) for kind in ("router", "head") for n in plan.step_tokens]
        experts = [(kind, n, 0) for n in plan.expert_tokens for kind in ("expert", *(("cpu_expert",) * plan.with_cpu))]
        moves = [(kind, 1, 0) for kind in ("send", "receive")] if plan.with_cpu and self._machine.out_index >= 0 else []
        return contexts + steps + experts * 2 + moves + [("load", 0, chunk) for chunk in range(len(plan.chunk_bytes))]

    def _emit(self, kind: str, tokens: int, extra: int, after: tuple[int, ...]) -> int:
        model, machine = self._model, self._machine
        resource = {
            "load": machine.route_indexes[-1],
            "cpu_expert": machine.cpu_index,
            "send": machine.out_index,
            "receive": machine.in_index,
        }.get(kind, machine.compute_index)
        labels: dict[str, Any] = {
            "layer": int(self._random.integers(model.num_moe_layers)),
            "expert": int(self._random.integers(model.num_experts)),
            "slot": int(self._random.integers(self._num_slots)),
            "tokens": tokens,
        }
        if kind == "load":
            labels |= {"chunk": extra, "num_bytes": self._plan.chunk_bytes[extra]}
        elif kind == "attention":
            labels["context"] = extra
        elif kind in ("send", "receive"):
            labels["num_bytes"] = round(tokens * model.hidden_size * model.activation_bytes)
        return self.graph.add(kind, resource, 1, after, **labels)


def probe(
    world: World,
    model: ModelSpec,
    machine: OffloadMachine,
    plan: ProbePlan,
    *,
    num_slots: int,
    rounds: int,
    seed: int,
    device: str,
) -> Block:
    """Run one block of micro-benchmarks and return its samples."""
    alone, beside = Samples(), Samples()
    alone.add(run_torch(ProbeProgram(model, machine, plan, num_slots, rounds, seed), world, device=device))
    totals: dict[bool, float] = {True: 0.0, False: 0.0}
    for (kind, _), values in alone.seconds.items():
        totals[kind == "copy"] += sum(values)
    copies = max(1, round(len(plan.chunk_bytes) * totals[False] / totals[True]))
    program = ProbeProgram(model, machine, plan, num_slots, rounds, seed, copies)
    tasks = run_torch(program, world, device=device)
    is_copy = (tasks["kind"] == "load").to_numpy()
    both_until = min(
        tasks.loc[is_copy, "end_ns"].max(), tasks.loc[~is_copy & (tasks["resource"] != ""), "end_ns"].max()
    )
    beside.add(tasks[tasks["end_ns"] <= both_until])
    return Block(alone, beside)


def overlap_shares(tasks: pd.DataFrame) -> dict[str, float]:
    """Return kind -> the share of its time in which another resource of the schedule was busy."""
    done = tasks[(tasks["state"] == DONE) & (tasks["resource"] != "")]
    shared: dict[str, float] = defaultdict(float)
    for resource, own in done.groupby("resource"):
        others = done[done["resource"] != resource].sort_values("start_ns")
        busy = _busy_before(others["start_ns"].to_numpy(), others["end_ns"].to_numpy())
        start, end = own["start_ns"].to_numpy(), own["end_ns"].to_numpy()
        for kind, time_ns in zip(own["kind"], np.minimum(end - start, busy(end) - busy(start)), strict=True):
            shared[kind] += float(time_ns)
    total = done.groupby("kind")["duration_ns"].sum()
    return {kind: shared[kind] / float(total[kind]) for kind in total.index}


def _busy_before(start: np.ndarray, end: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return t -> time before t in which any of the intervals (sorted by start) was open."""
    if not len(start):
        return lambda t: np.zeros(len(t))
    reach = np.maximum.accumulate(end)
    begin = np.maximum(start, np.concatenate([start[:1], reach[:-1]]))
    length = np.maximum(reach - begin, 0)
    knots = np.stack([begin, begin + length], axis=1).ravel()
    values = np.stack([np.cumsum(length) - length, np.cumsum(length)], axis=1).ravel()
    return lambda t: np.interp(t, knots, values)


def measured_tables(
    block: Block, overlap: Mapping[str, float], model: ModelSpec, device_kind: str, link_kind: str
) -> tuple[MeasuredTable, ...]:
    """Turn samples into calibration tables; the spread is the interquartile range over the median.

    A time is ``(1 - f) * alone + f * beside``, where f is the share of the kind's time in `overlap`.
    """
    dtype = compute_dtype(model)
    experts = {"expert": ("grouped_ffn", device_kind, expert_shape(model), ("tokens",))}
    if device_kind == "cpu":  # one kind of core runs both
        block = Block(_experts_together(block.alone), _experts_together(block.beside))
    else:
        experts["cpu_expert"] = ("grouped_ffn", "cpu", expert_shape(model), ("tokens",))
    shapes = experts | {
        "attention": ("attention", device_kind, attention_shape(model), ("tokens", "context")),
        "router": ("router", device_kind, router_shape(model), ("tokens",)),
        "head": ("head", device_kind, head_work(model, 1).shape, ("tokens",)),
        "copy": ("copy", link_kind, COPY_SHAPE, ("bytes",)),
    }
    tables = []
    for kind, (op, device, shape, axes) in shapes.items():
        rows = sorted((size, values) for (name, size), values in block.alone.seconds.items() if name == kind)
        share = overlap.get("load" if kind == "copy" else kind, 0.0)
        blended = [(size, values, block.beside.seconds.get((kind, size), values), share) for size, values in rows]
        if blended:
            tables.append(_table(op, device, shape, dtype, axes, blended))
    return tuple(tables)


def _experts_together(samples: Samples) -> Samples:
    together = Samples()
    for (kind, size), values in samples.seconds.items():
        together.seconds["expert" if kind == "cpu_expert" else kind, size] += values
    return together


def _table(
    op: str,
    device: str,
    shape: str,
    dtype: str,
    axes: tuple[str, ...],
    rows: Sequence[tuple[tuple[float, ...], list[float], list[float], float]],
) -> MeasuredTable:
    """Build one table from rows of (size, seconds alone, seconds beside, share of time beside)."""
    seconds = tuple((1 - share) * typical(alone) + share * typical(beside) for _, alone, beside, share in rows)
    pooled = [np.asarray([*alone, *beside]) for _, alone, beside, _ in rows]
    spreads = tuple(float(np.subtract(*np.percentile(values, [75, 25])) / np.median(values)) for values in pooled)
    sizes = tuple(tuple(float(part) for part in size) for size, *_ in rows)
    return MeasuredTable(op, device, shape, dtype, axes, sizes, seconds, spreads, tuple(map(len, pooled)))
