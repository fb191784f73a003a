"""How fast the simulator is: tasks per CPU second, lowering and execution apart, and how the cost grows.

Run ``python benchmarks/simulation.py`` (``--quick`` for the smallest size of each case). All routing is
synthetic and seeded, so the counts of work are exact and `tests/test_benchmark_counts.py` pins them; only
the times depend on the machine. Each case runs in a fresh process, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.graph import ExecutorView, Program, Resource, TaskGraph
from moesim.lowering.machine import offload_machine
from moesim.model.catalog import load_model
from moesim.placement.place import place, problem_from_trace
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point
from moesim.simulate.result import DONE
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.units import MIB, format_bytes

SEED = 0
GROWTH = (1, 2, 4)
NUM_RESOURCES, TASKS_PER_LAYER = 8, 64
COLUMNS = ("case", "work", "tasks", "events", "decisions", "lowering s", "execution s", "tasks/s executed",
           "tasks/s in all", "growth", "peak memory")


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


def peak_bytes() -> int:
    """Return the largest memory this process has held, imports included (getrusage; kB on Linux)."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def median_of(case: str, size: int, repeats: int) -> Measurement:
    """Return the run of median CPU time; counts must not differ between runs, or it is a bug."""
    runs = sorted((measure(case, size) for _ in range(repeats)), key=lambda run: run.total_s)
    if len({(run.tasks, run.events, run.decisions) for run in runs}) != 1:
        raise SystemExit(f"{case} x{size}: the same work was counted differently in {repeats} runs")
    middle = runs[(len(runs) - 1) // 2]
    return Measurement(middle.tasks, middle.events, middle.decisions, median(r.lowering_s for r in runs),
                       median(r.execution_s for r in runs), max(r.peak_bytes for r in runs))


def in_fresh_process(case: str, size: int, repeats: int) -> Measurement:
    """Run `median_of` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(median_of, case, size, repeats).result()


def row(case: str, size: int, run: Measurement, first: Measurement) -> tuple[str, ...]:
    """Return one line of the table; `growth` is time and tasks over those of the smallest size."""
    growth = f"{run.total_s / first.total_s:.2f}x time, {run.tasks / first.tasks:.2f}x tasks"
    return (case, f"x{size}", f"{run.tasks:,}", f"{run.events:,}", f"{run.decisions:,}",
            f"{run.lowering_s:.3f}", f"{run.execution_s:.3f}", f"{run.tasks / run.execution_s:,.0f}",
            f"{run.tasks / run.total_s:,.0f}", growth, format_bytes(round(run.peak_bytes / MIB) * MIB))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest size of each case, once")
    parser.add_argument("--repeats", type=int, default=3, help="runs behind each median (default 3)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    sizes, repeats = (GROWTH[:1], 1) if options.quick else (GROWTH, options.repeats)
    table = Table(*COLUMNS, title=f"SimPy executor, CPU seconds, median of {repeats}")
    for case in CASES:
        runs = {size: in_fresh_process(case, size, repeats) for size in sizes}
        for size, run in runs.items():
            table.add_row(*row(case, size, run, runs[sizes[0]]))
    Console(width=190).print(table)


if __name__ == "__main__":
    main()
