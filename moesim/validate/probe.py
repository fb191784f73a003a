"""Micro-benchmarks beside a run: each kind of task alone, in random order, on the executor's own lanes.

They run on the same threads, with the same kernels and cold operands, as the run that they predict, and
between its repetitions: calibrated once beside the run a prototype was 13 % off, interleaved 1 to 2 %.
None of them looks at the run: which experts and slots they touch is random.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from moesim.calibrate.shapes import attention_shape, expert_shape, router_shape
from moesim.hardware.profile import MeasuredTable
from moesim.lowering.graph import ExecutorView, TaskGraph
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.work import compute_dtype, head_work
from moesim.model.spec import ModelSpec
from moesim.units import s_from_ns
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

    seconds: dict[tuple[str, tuple[float, ...]], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, tasks: pd.DataFrame) -> None:
        """Take the durations of a probe's tasks."""
        columns = (
            tasks[name].to_numpy() for name in ("kind", "tokens", "context", "num_bytes", "duration_ns")
        )
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


class ProbeProgram:
    """A chain of single tasks: layer-like motifs of attention, router, experts, copies, in random order."""

    def __init__(
        self,
        model: ModelSpec,
        machine: OffloadMachine,
        plan: ProbePlan,
        num_slots: int,
        rounds: int,
        seed: int,
    ) -> None:
        self.graph = TaskGraph(machine.resources())
        self._model, self._machine, self._plan, self._num_slots, self._rounds = (
            model,
            machine,
            plan,
            num_slots,
            rounds,
        )
        self._random = np.random.default_rng(seed)

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Hand over the whole chain."""
        last: tuple[int, ...] = ()
        for _ in range(self._rounds):
            kinds = self._round()
            for place in self._random.permutation(len(kinds)):
                last = (self._emit(*kinds[place], last),)
        yield last[0]

    def _round(self) -> list[tuple[str, int, int]]:
        """One of everything that is to be measured, as (kind, tokens, context or chunk)."""
        plan = self._plan
        contexts = [("attention", n, n * c) for n in plan.step_tokens for c in plan.contexts]
        steps = [(kind, n, 0) for kind in ("router", "head") for n in plan.step_tokens]
        experts = [
            (kind, n, 0)
            for n in plan.expert_tokens
            for kind in ("expert", *(("cpu_expert",) * plan.with_cpu))
        ]
        moves = (
            [(kind, 1, 0) for kind in ("send", "receive")]
            if plan.with_cpu and self._machine.out_index >= 0
            else []
        )
        return (
            contexts
            + steps
            + experts * 2
            + moves
            + [("load", 0, chunk) for chunk in range(len(plan.chunk_bytes))]
        )

    def _emit(self, kind: str, tokens: int, extra: int, after: tuple[int, ...]) -> int:
        model, machine = self._model, self._machine
        resource = {
            "load": machine.route_indexes[-1],
            "cpu_expert": machine.cpu_index,
            "send": machine.out_index,
            "receive": machine.in_index,
        }.get(kind, machine.compute_index)
        labels = {
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
) -> Samples:
    """Run one block of micro-benchmarks and return its samples."""
    samples = Samples()
    samples.add(run_torch(ProbeProgram(model, machine, plan, num_slots, rounds, seed), world, device=device))
    return samples


def measured_tables(
    samples: Samples, model: ModelSpec, device_kind: str, link_kind: str
) -> tuple[MeasuredTable, ...]:
    """Turn samples into calibration tables: medians, with the interquartile range over the median as spread."""
    dtype = compute_dtype(model)
    experts = {"expert": ("grouped_ffn", device_kind, expert_shape(model), ("tokens",))}
    if device_kind == "cpu":  # one kind of core runs both
        samples = _experts_together(samples)
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
        rows = sorted((size, values) for (name, size), values in samples.seconds.items() if name == kind)
        if rows:
            tables.append(_table(op, device, shape, dtype, axes, rows))
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
    rows: Sequence[tuple[tuple[float, ...], list[float]]],
) -> MeasuredTable:
    medians = tuple(float(np.median(values)) for _, values in rows)
    spreads = tuple(
        float(np.subtract(*np.percentile(values, [75, 25])) / np.median(values)) for _, values in rows
    )
    sizes = tuple(tuple(float(part) for part in size) for size, _ in rows)
    return MeasuredTable(
        op, device, shape, dtype, axes, sizes, medians, spreads, tuple(len(values) for _, values in rows)
    )
