"""The compiled offload engine against SimPy: decoded tokens per CPU second, with a task table and without, and growth.

Run ``python benchmarks/_offload.py`` (``--quick``: small sizes; ``--check``: exit 1 when a target is missed). Routing is
synthetic and seeded. SimPy runs the first tokens of a case, the engine the same ones in turns with it (and their times
are compared), then more of them alone; every growth row has a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from statistics import median

import numpy as np
from _measure import cpu_seconds
from rich.console import Console
from rich.table import Table

from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.lowering.machine import offload_machine
from moesim.lowering.offload import OffloadProgram
from moesim.model.catalog import load_model
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point
from moesim.simulate.compiled_offload import execute_offload, offload_times, predictions, times_of
from moesim.simulate.simpy_executor import execute_simpy
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import RoutingTrace
from moesim.units import MIB

SEED = 0
SIMPY_TOKENS, ENGINE_TOKENS, TABLE_TOKENS, REPEATS = 8, 2000, 200, 5
GROWTH = (1000, 10_000, 100_000)
RATE_TARGET, RATIO_TARGET = 50_000, 250


@dataclass(frozen=True)
class Case:
    """A run of some number of tokens, one request at a time; `targeted` cases must reach the targets."""

    name: str
    model: str
    hardware: str
    point: Point
    chunks: int
    weight_bytes: float | None = None
    targeted: bool = False

    def offload(self, num_steps: int) -> Offload:
        """Return its model, routing, machine and the first `num_steps` tokens."""
        model = load_model(self.model)
        if self.weight_bytes is not None:
            model = model.replace(weight_bytes=self.weight_bytes)
        train, test = split_requests(_trace(model.num_moe_layers, model.num_experts, model.top_k), 0.5, SEED)
        steps = closed_loop_steps(test, batch_size=1, max_steps=num_steps, include_prefill=False, repeat=True, seed=SEED)
        return Offload(model, train, test, steps, offload_machine(load_hardware(self.hardware)), SEED, chunks=self.chunks)


@cache
def _trace(num_layers: int, num_experts: int, top_k: int) -> RoutingTrace:
    """Routing with locality: four of five experts come from those of the request's last token."""
    return synthetic_trace(1200, num_layers, num_experts, top_k, 12, locality=0.8, seed=SEED)


def _deepseek(point: Point, chunks: int, *, targeted: bool = False) -> Case:
    """DeepSeek-V3's sizes with experts of four bits, 64 of 256 slots per layer unless the point says otherwise."""
    ahead = "" if point.prefetch == "none" else f", {point.prefetch} {point.prefetch_width}"
    name = f"DeepSeek-V3, {point.policy}{ahead}, miss {point.miss}, chunks {chunks}"
    return Case(name, "deepseek-v3", "h200-sxm", point, chunks, 0.5, targeted)


CASES = (
    *(_deepseek(Point("lru", 64, *ahead), chunks, targeted=True)
      for chunks in (1, 3) for ahead in (("none", 0), ("oracle", 8), ("transition", 8))),
    *(_deepseek(Point(policy, 64, "oracle", 8), 3) for policy in ("lfu", "belady")),
    _deepseek(Point("lru", 64, "transition", 8, None, "cpu"), 3),
    _deepseek(Point("lru", 64, "transition", 8, None, "faster"), 3),
    Case("OLMoE, lru, 32 of 64 slots", "olmoe-1b-7b", "rtx-4090", Point("lru", 32), 3),
    Case("DeepSeek-V3, lru, 16 of 256 slots", "deepseek-v3", "h100-sxm", Point("lru", 16), 3))


@dataclass(frozen=True)
class Speed:
    """One case: tokens per CPU second, the ratio to SimPy, tasks per token, seconds to predict."""

    simpy: float
    times: float
    table: float
    ratio: float
    tasks: float
    predict_s: float


def speed(case: Case, repeats: int = REPEATS) -> Speed:
    """Measure one case; a program is made for every run, outside of the time.

    Raises SystemExit if the engine's times are not SimPy's.
    """
    small, middle, large = (case.offload(size) for size in (SIMPY_TOKENS, TABLE_TOKENS, ENGINE_TOKENS))
    cost = CostModel(large.machine.hardware)
    named, predict_s = _named(large.program(case.point, cost))
    few, some = (named if named is None else named[:size * large.model.num_moe_layers]
                 for size in (SIMPY_TOKENS, TABLE_TOKENS))
    compare(case, small, few)
    slow, times, tables = [], [], []
    for _ in range(repeats):
        programs = [offload.program(case.point, cost) for offload in (small, large, middle)]
        slow.append(cpu_seconds(partial(execute_simpy, programs[0])))
        times.append(cpu_seconds(partial(offload_times, programs[1], named)))
        tables.append(cpu_seconds(partial(execute_offload, programs[2], some)))
    simpy, engine = SIMPY_TOKENS / median(slow), ENGINE_TOKENS / median(times)
    tasks = offload_times(large.program(case.point, cost), named).num_tasks / ENGINE_TOKENS
    return Speed(simpy, engine, TABLE_TOKENS / median(tables), engine / simpy, tasks, predict_s)


def _named(program: OffloadProgram) -> tuple[np.ndarray | None, float]:
    """Return the predictions of a program (None without a prefetcher), and the CPU seconds they took."""
    if program.prefetcher is None:
        return None, 0.0
    start = time.process_time()
    return predictions(program), time.process_time() - start


def compare(case: Case, offload: Offload, named: np.ndarray | None) -> None:
    """Raise SystemExit unless SimPy and the engine agree on every task of a case."""
    cost = CostModel(offload.machine.hardware)
    reference = offload.program(case.point, cost)
    expected = execute_simpy(reference)
    if not execute_offload(offload.program(case.point, cost), named).table().equals(expected.table()):
        raise SystemExit(f"{case.name}: the engine's task table is not SimPy's")
    found = offload_times(offload.program(case.point, cost), named)
    if found.work != times_of(reference, expected).work:
        raise SystemExit(f"{case.name}: the engine's times are not SimPy's")


@dataclass(frozen=True)
class Growth:
    """Runs without a table: CPU seconds of one, and the most bytes that another one took at once."""

    seconds: float
    peak_bytes: int


def growth(case: Case, num_steps: int) -> Growth:
    """Run a case once, compiled beforehand; call it in a process of its own."""
    cost = CostModel(load_hardware(case.hardware))
    offload_times(case.offload(2).program(case.point, cost))
    offload = case.offload(num_steps)
    seconds = cpu_seconds(partial(offload_times, offload.program(case.point, cost)))
    program = offload.program(case.point, cost)
    tracemalloc.start()
    offload_times(program)
    return Growth(seconds, tracemalloc.get_traced_memory()[1])


def growth_in_fresh_process(case: Case, num_steps: int) -> Growth:
    """Run `growth` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(growth, case, num_steps).result()


def speed_table(cases: Sequence[Case], repeats: int) -> tuple[Table, list[str]]:
    """Return the table of speeds, and the targets that were missed."""
    table = Table("case", "tasks/token", "SimPy tokens/s", "tokens/s", "ratio", "tokens/s with table",
                  "predictions us/token",
                  title="One request, decoded tokens per CPU second; ratio to SimPy in the same process")
    missed = []
    for case in cases:
        run = speed(case, repeats)
        table.add_row(case.name, f"{run.tasks:.0f}", f"{run.simpy:.1f}", f"{run.times:,.0f}", f"{run.ratio:,.0f}x",
                      f"{run.table:,.0f}", f"{run.predict_s / ENGINE_TOKENS * 1e6:.0f}")
        if case.targeted and (run.times < RATE_TARGET or run.ratio < RATIO_TARGET):
            missed.append(f"{case.name}: {run.times:,.0f} tokens/s, {run.ratio:,.0f}x")
    return table, missed


def growth_table(case: Case, sizes: Sequence[int]) -> Table:
    """Return how time and memory of one case grow with its tokens."""
    table = Table("tokens", "CPU s", "us/token", "peak memory of the run", title=f"{case.name}: growth")
    for size in sizes:
        run = growth_in_fresh_process(case, size)
        table.add_row(f"{size:,}", f"{run.seconds:.2f}", f"{run.seconds / size * 1e6:.1f}",
                      f"{run.peak_bytes / MIB:,.1f} MiB")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases and sizes")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    table, missed = speed_table(CASES[:2] if options.quick else CASES, 3 if options.quick else REPEATS)
    console.print(table)
    for case in CASES[:1] if options.quick else CASES[3:5]:
        console.print(growth_table(case, GROWTH[:2] if options.quick else GROWTH))
    for text in missed:
        console.print(f"missed {RATE_TARGET:,} tokens/s or {RATIO_TARGET}x: {text}")
    if missed and options.check:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
