"""How fast the simulator is: SimPy and the compiled side on the same work, every target, and how the cost grows.

Run ``python benchmarks/simulation.py`` (``--check``: exit 1 when a target is missed; ``--long``: 100 M tasks, too). All
routing is synthetic and seeded, so the counts of work are exact and `tests/test_benchmark_counts.py` pins them; only the
times depend on the machine. What is compared runs in one process, in turns, and must give the same tables.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np
import pandas as pd
from _measure import peak_bytes

from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.graph import ExecutorView, Program, Resource, TaskGraph
from moesim.lowering.machine import offload_machine
from moesim.model.catalog import load_model
from moesim.placement.place import place, problem_from_trace
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point
from moesim.simulate.executors import execute_compiled
from moesim.simulate.result import DONE
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.units import GIB, MIB, format_bytes

T = TypeVar("T")
SEED = 0
NUM_RESOURCES, TASKS_PER_LAYER = 8, 64
STEP_MS, WHAT_IF, REDUCTION = 0.3, 2e6, 5e8
LINEAR, WINDOW_BYTES = 1.5, 256 * MIB


class LayeredProgram:
    """`num_layers` layers of 64 tasks on 8 resources, a barrier after each layer; handed over at once."""

    def __init__(self, num_layers: int) -> None:
        self.graph = TaskGraph(tuple(Resource(f"r{i}", "bench", f"r{i}") for i in range(NUM_RESOURCES)))
        self.durations_ns = np.random.default_rng(SEED).integers(1, 1000, (num_layers, TASKS_PER_LAYER))

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Add every layer, then wait for the last."""
        done: tuple[int, ...] = ()
        for row in self.durations_ns.tolist():
            layer = [self.graph.add("experts", task % NUM_RESOURCES, duration_ns, done)
                     for task, duration_ns in enumerate(row)]
            done = (self.graph.barrier(layer),)
        yield done[0]


class TimedProgram:
    """A program that keeps the CPU time spent in its own decisions (the lowering), and counts them."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, program.graph
        self.lowering_s, self.num_decisions = 0.0, 0

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Pass the inner program's decisions on."""
        inner, last = self.program.decisions(view), object()
        while True:
            start = time.process_time()
            task = next(inner, last)
            self.lowering_s += time.process_time() - start
            if task is last:
                return
            self.num_decisions += 1
            yield task


@dataclass(frozen=True)
class Measurement:
    """One run: counts of work (exact), CPU seconds (of this machine), peak memory of the process."""

    tasks: int
    events: int
    decisions: int
    lowering_s: float
    execution_s: float
    peak_bytes: int

    @property
    def total_s(self) -> float:
        """CPU seconds of the run."""
        return self.lowering_s + self.execution_s


def layered(size: int) -> Program:
    """A static graph: what the executor alone costs. 200 layers x size."""
    return LayeredProgram(200 * size)


def offload_olmoe(size: int) -> Program:
    """Decode of one request with OLMoE's sizes on a 24 GB GPU, 32 of 64 slots, LRU. 16 steps x size."""
    return _offload("olmoe-1b-7b", "rtx-4090", slots_per_layer=32, num_steps=16 * size)


def offload_deepseek(size: int) -> Program:
    """Decode of one request with DeepSeek-V3's sizes on one H100, 16 of 256 slots, LRU. 4 steps x size."""
    return _offload("deepseek-v3", "h100-sxm", slots_per_layer=16, num_steps=4 * size)


def expert_parallel_8(size: int) -> Program:
    """Decode of 256 requests with OLMoE's sizes on 8 ranks, contiguous plan. 4 steps x size."""
    return _expert_parallel("olmoe-1b-7b", num_nodes=1, num_steps=4 * size)


def expert_parallel_64(size: int) -> Program:
    """Decode of 256 requests with DeepSeek-V3's sizes on 64 ranks, contiguous plan. 1 step x size."""
    return _expert_parallel("deepseek-v3", num_nodes=8, num_steps=size)


CASES: dict[str, Callable[[int], Program]] = {
    "layered graph": layered,
    "offload, OLMoE": offload_olmoe,
    "offload, DeepSeek-V3": offload_deepseek,
    "8 ranks, OLMoE": expert_parallel_8,
    "64 ranks, DeepSeek-V3": expert_parallel_64,
}


def _offload(model_name: str, hardware_name: str, *, slots_per_layer: int, num_steps: int) -> Program:
    model, hardware = load_model(model_name), load_hardware(hardware_name)
    trace = synthetic_trace(96, model.num_moe_layers, model.num_experts, model.top_k, 4, seed=SEED)
    train, test = split_requests(trace, 0.5, SEED)
    steps = closed_loop_steps(test, batch_size=1, max_steps=num_steps, include_prefill=False, repeat=True,
                              seed=SEED)
    offload = Offload(model, train, test, steps, offload_machine(hardware), SEED)
    return offload.program(Point("lru", slots_per_layer), CostModel(hardware))


def _expert_parallel(model_name: str, *, num_nodes: int, num_steps: int) -> Program:
    model, hardware = load_model(model_name), load_hardware("h100-sxm", num_nodes=num_nodes)
    trace = synthetic_trace(512, model.num_moe_layers, model.num_experts, model.top_k, 256, seed=SEED)
    problem = problem_from_trace(trace, num_ranks=hardware.num_ranks, ranks_per_node=hardware.ranks_per_node)
    steps = closed_loop_steps(trace, batch_size=256, max_steps=num_steps, include_prefill=False, repeat=True,
                              seed=SEED)
    plan = place(problem, "contiguous").plan
    assert plan is not None  # place() raises otherwise
    return ExpertParallelProgram(model, trace, steps, plan, CostModel(hardware))


def count_events(tasks: pd.DataFrame) -> int:
    """Return the SimPy events behind a task table: one completion per task that ran, one settling per instant.

    The instants are those at which something completed, and the start.
    """
    ended = tasks.loc[(tasks["state"] == DONE) & (tasks["resource"] != ""), "end_ns"]
    return len(ended) + ended.nunique() + 1


def measure(case: str, size: int) -> Measurement:
    """Build one case and run it once on SimPy; building (trace, plan) is not timed."""
    program = TimedProgram(CASES[case](size))
    start = time.process_time()
    tasks = run_simpy(program)
    total_s = time.process_time() - start
    return Measurement(len(tasks), count_events(tasks), program.num_decisions, program.lowering_s,
                       total_s - program.lowering_s, peak_bytes())


def median_of(case: str, size: int, repeats: int) -> Measurement:
    """Return the run of median CPU time; counts must not differ between runs, or it is a bug."""
    runs = sorted((measure(case, size) for _ in range(repeats)), key=lambda run: run.total_s)
    if len({(run.tasks, run.events, run.decisions) for run in runs}) != 1:
        raise SystemExit(f"{case} x{size}: the same work was counted differently in {repeats} runs")
    middle = runs[(len(runs) - 1) // 2]
    return Measurement(middle.tasks, middle.events, middle.decisions, median(r.lowering_s for r in runs),
                       median(r.execution_s for r in runs), max(r.peak_bytes for r in runs))


@dataclass(frozen=True)
class Sides:
    """One case on SimPy and on the compiled side, both from the program to the task table: CPU seconds, peak memory."""

    run: Measurement
    compiled_s: float
    simpy_peak: int
    compiled_peak: int


def sides(case: str, repeats: int) -> Sides:
    """Run a case on both sides in turns; the tables must be equal. Building (trace, plan) is not timed."""
    expected, compiled = run_simpy(CASES[case](1)), []
    run = median_of(case, 1, repeats)
    simpy_peak = peak_bytes()
    if not execute_compiled(CASES[case](1)).table().equals(expected):
        raise SystemExit(f"{case}: the compiled table is not SimPy's")
    for _ in range(repeats):
        program = CASES[case](1)
        start = time.process_time()
        execute_compiled(program).table()
        compiled.append(time.process_time() - start)
    return Sides(run, median(compiled), simpy_peak, peak_bytes())


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Run a measurement in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@dataclass(frozen=True)
class Line:
    """One target: what was reached, and whether that is enough."""

    what: str
    reached: str
    target: str
    met: bool


def offload_lines(repeats: int) -> Iterator[Line]:
    """Offloaded decode, DeepSeek-V3-like, without a task table."""
    import _offload as part

    for case in part.CASES:
        if case.targeted:
            run = part.speed(case, repeats)
            met = run.times >= part.RATE_TARGET and run.ratio >= part.RATIO_TARGET
            yield Line(f"offloaded decode: {case.name}", f"{run.times:,.0f} tokens/s, {run.ratio:,.0f}x SimPy ({run.tasks:.0f} tasks per "
                       f"token; {run.table:,.0f} tokens/s with the task table)",
                       f">= {part.RATE_TARGET:,} tokens/s and {part.RATIO_TARGET}x", met)


def generic_lines(repeats: int, size: int) -> Iterator[Line]:
    """Static task graphs on the generic executor."""
    import _generic as part

    for case in part.CASES:
        run, large = part.compare(case, repeats=repeats), in_fresh_process(part.alone, case, size)
        rate = large.tasks / large.execute_s
        yield Line(f"task graph: {case}", f"{run.ratio:.0f}x SimPy; {rate / 1e6:.1f} M tasks/s of {large.tasks / 1e6:g} M, "
                   f"peak {large.peak_bytes / GIB:.2f} GiB", f">= {part.RATIO_TARGET}x and {part.RATE_TARGET / 1e6:g} M tasks/s",
                   run.ratio >= part.RATIO_TARGET and rate >= part.RATE_TARGET)


def step_lines(repeats: int) -> Iterator[Line]:
    """Expert-parallel steps by recurrence, from the trace."""
    import _expert_parallel as part

    for case in part.CASES[1:4]:
        run = part.measure(case, repeats)
        step_ms, targeted = 1e3 * run.times / case.num_steps, case.batch_size == 256 and not case.redundant
        yield Line(f"decode step: {case.name}, {case.batch_size} requests", f"{step_ms:.3f} ms, of it reductions "
                   f"{1e3 * run.loads / case.num_steps:.3f} ms; another machine {1e3 * run.machine / case.num_steps:.3f} ms",
                   f"<= {STEP_MS} ms" if targeted else "", not targeted or step_ms <= STEP_MS)


def what_if_lines(repeats: int) -> Iterator[Line]:
    """Clock-blind policies: decided once, timed on 256 machines."""
    import _what_if as part

    for model, hardware, slots in (("olmoe-1b-7b", "rtx-4090", 32), ("deepseek-v3", "h100-sxm", 16)):
        run = part.what_if_rate(model, model, hardware, slots, repeats=repeats)
        yield Line(f"what-if: {model}, {run.tokens:,} tokens x {run.machines} machines", f"{run.token_points_per_s / 1e6:.1f} M "
                   f"token-points/s ({run.patterns} layer graphs)", f">= {WHAT_IF / 1e6:g} M token-points/s",
                   run.token_points_per_s >= WHAT_IF)


def reduction_lines(num_tokens: int) -> Iterator[Line]:
    """Counting over a trace, in memory and streamed from Parquet."""
    import tempfile
    from pathlib import Path

    import _reductions as part

    trace = part.sample_trace(num_tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = part.write_repeated(trace, 1, Path(folder) / "a.trace.parquet")
        for rate in part.reduction_rates(trace, path):
            targeted = rate.name == "load"
            yield Line(f"reduction: {rate.name}", f"{rate.in_memory / 1e6:,.0f} M selections/s in memory, "
                       f"{rate.streamed / 1e6:,.0f} M streamed from Parquet", f">= {REDUCTION / 1e6:g} M" if targeted else "",
                       not targeted or rate.in_memory >= REDUCTION)


def growth_lines(long: bool) -> Iterator[Line]:
    """Time and memory as the work grows by 10 and by 100."""
    import _generic as generic
    import _offload as offload

    sizes = (generic.WINDOW, 10 * generic.WINDOW) + ((100 * generic.WINDOW,) if long else ())
    before = in_fresh_process(generic.windowed, sizes[0])
    for size in sizes[1:]:
        run = in_fresh_process(generic.windowed, size)
        yield _growth(f"growth: layered graph through windows, {run.tasks / 1e6:.0f} M tasks over {before.tasks / 1e6:.0f} M",
                      run.execute_s / before.execute_s, run.tasks / before.tasks, run.peak_bytes - before.peak_bytes)
        before = run
    case = offload.CASES[3]
    few = in_fresh_process(offload.growth, case, offload.GROWTH[0])
    for fewer, steps in itertools.pairwise(offload.GROWTH):
        run = in_fresh_process(offload.growth, case, steps)
        yield _growth(f"growth: {case.name}, {steps:,} tokens over {fewer:,}", run.seconds / few.seconds,
                      steps / fewer, run.peak_bytes - few.peak_bytes)
        few = run


def _growth(what: str, time_ratio: float, work_ratio: float, more_bytes: int) -> Line:
    """Linear: no more than half as much again per unit of work on a noisy machine; memory of the window only."""
    met = time_ratio <= LINEAR * work_ratio and more_bytes <= WINDOW_BYTES
    return Line(what, f"{time_ratio:.1f}x the time for {work_ratio:.0f}x the work, {max(0, more_bytes) / MIB:,.0f} MiB more",
                f"linear (within {LINEAR:g}x), < {WINDOW_BYTES / MIB:.0f} MiB more", met)


def print_sides(repeats: int) -> None:
    """Print SimPy beside the compiled side, as Markdown."""
    print("**From the program to the task table**, CPU seconds\n\n| case | tasks | events | SimPy lowering | SimPy execution "
          "| SimPy tasks/s | compiled | compiled tasks/s | ratio | peak SimPy | peak with compiled |\n" + "|---" * 11 + "|")
    for case in CASES:
        found = in_fresh_process(sides, case, repeats)
        run = found.run
        print(f"| {case} | {run.tasks:,} | {run.events:,} | {run.lowering_s:.3f} | {run.execution_s:.3f} | {run.tasks / run.total_s:,.0f} "
              f"| {found.compiled_s:.4f} | {run.tasks / found.compiled_s:,.0f} | {run.total_s / found.compiled_s:,.0f}x "
              f"| {format_bytes(found.simpy_peak)} | {format_bytes(found.compiled_peak)} |", flush=True)


def print_lines(lines: Iterable[Line]) -> list[str]:
    """Print targets as Markdown; return those that were missed."""
    print("\n**Targets**, CPU time of one core\n\n| what | reached | target | met |\n|---|---|---|---|")
    missed = []
    for line in lines:
        print(f"| {line.what} | {line.reached} | {line.target} | {('yes' if line.met else '**no**') if line.target else ''} |", flush=True)
        missed += [] if line.met else [line.what]
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both tables; return 1 where `--check` finds a target missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes, each once; its ratios are rough")
    parser.add_argument("--long", action="store_true", help="also 100 M tasks through windows (minutes)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--repeats", type=int, default=3, help="runs behind each median (default 3)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    repeats = 1 if options.quick else options.repeats
    print_sides(repeats)
    missed = print_lines(itertools.chain(
        offload_lines(repeats), generic_lines(repeats, (1 if options.quick else 10) * 100_000), step_lines(repeats),
        what_if_lines(repeats), reduction_lines(1 << (14 if options.quick else 18)),
        () if options.quick else growth_lines(options.long)))
    print("\nEvery target met." if not missed else f"\nMissed: {'; '.join(missed)}.")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
