"""The generic compiled executor against SimPy: tasks per CPU second, growth, peak memory.

Run ``python benchmarks/_generic.py`` (``--quick``: small sizes; ``--long``: 100 M tasks through windows). The graphs are
seeded and static. SimPy and the compiled executor run the same graph in turns, in one process, and the times of all
tasks are compared; every growth row has a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median

import numpy as np
from _measure import peak_bytes
from rich.console import Console
from rich.table import Table

from moesim.lowering.graph import KINDS, LABELS, ExecutorView, Resource, TaskGraph
from moesim.lowering.task_arrays import TaskArrays, arrays_of
from moesim.simulate.compiled_executor import execute_arrays, execute_program
from moesim.simulate.critical_path import critical_path
from moesim.simulate.execution import Execution
from moesim.simulate.simpy_executor import execute_simpy
from moesim.simulate.windows import run_windows
from moesim.units import GIB

SEED = 0
COMPARED, ALONE, WINDOW = 40_000, 1_000_000, 1_000_000
RATIO_TARGET, RATE_TARGET = 60, 8_000_000


def layered(size: int, *, num_resources: int = 8, width: int = 64, first: int = 0) -> TaskArrays:
    """About `size` tasks: layers of `width` kernels on `num_resources`, each followed by a barrier.

    With `first` not 0, the tasks that follow on `first` tasks of the same graph: they wait for the last of those.
    """
    num_layers = max(1, size // (width + 1))
    duration = np.random.default_rng((SEED, first)).integers(1, 1000, (num_layers, width + 1))
    resource = np.append(np.arange(width) % num_resources, -1)
    counts = np.append(np.ones(width, int), width)
    start = first + np.arange(num_layers)[:, None] * (width + 1)
    deps = np.concatenate([np.repeat(start - 1, width, axis=1), start + np.arange(width)], axis=1).ravel()
    counts = np.tile(counts, num_layers)
    if first == 0:
        counts[:width] = 0
        deps = deps[width:]
    return columns(np.tile(resource, num_layers), duration.ravel(), counts, deps, num_resources, first=first)


def random(size: int, *, num_resources: int = 64, num_priorities: int = 4, reach: int = 4) -> TaskArrays:
    """Tasks on random resources, of random priorities, each waiting for two of the last ``reach * num_resources``."""
    rng = np.random.default_rng(SEED)
    counts = np.where(np.arange(size) < num_resources, 0, 2)
    own = np.repeat(np.arange(size), counts)
    deps = np.maximum(0, own - 1 - rng.integers(0, reach * num_resources, len(own)))
    return columns(rng.integers(0, num_resources, size), rng.integers(1, 1000, size), counts, deps, num_resources,
                   priority=rng.integers(0, num_priorities, size))


def columns(resource: np.ndarray, duration: np.ndarray, counts: np.ndarray, deps: np.ndarray, num_resources: int, *,
            priority: np.ndarray | None = None, first: int = 0) -> TaskArrays:
    """Tasks as columns, without labels."""
    size, zero = len(resource), np.zeros(len(resource), np.int64)
    resources = tuple(Resource(f"r{n}", "bench", f"r{n}") for n in range(num_resources))
    kind = np.where(resource < 0, KINDS.index("barrier"), KINDS.index("experts")).astype(np.int16)
    offsets = np.zeros(size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return TaskArrays(resources, kind, resource.astype(np.int32), np.where(resource < 0, 0, duration),
                      zero if priority is None else priority, zero.astype(np.int16), offsets, deps, zero.astype(float),
                      dict.fromkeys(LABELS, zero), first=first)


CASES: dict[str, Callable[[int], TaskArrays]] = {
    "layers of 64 on 8 resources": layered,
    "layers of 512 on 64 resources": lambda size: layered(size, num_resources=64, width=512),
    "layers of 4,096 on 512 resources": lambda size: layered(size, num_resources=512, width=4096),
    "random, 8 resources, 4 priorities": lambda size: random(size, num_resources=8),
    "random, 64 resources, 4 priorities": random,
    "random, 512 resources, 4 priorities": lambda size: random(size, num_resources=512),
    "random, 64 resources, 1,000 priorities (heaps)": lambda size: random(size, num_priorities=1000),
    "random, 64 resources, deps anywhere": lambda size: random(size, reach=max(4, size // 64)),
}


class Given:
    """A program whose graph is there from the start."""

    def __init__(self, arrays: TaskArrays) -> None:
        self.graph = TaskGraph(arrays.resources)
        ends = arrays.dep_offsets.tolist()
        for task, (kind, resource, duration, priority) in enumerate(zip(
                arrays.kind.tolist(), arrays.resource.tolist(), arrays.duration_ns.tolist(), arrays.priority.tolist(),
                strict=True)):
            self.graph.add(arrays.kinds[kind], resource, duration, arrays.deps[ends[task]:ends[task + 1]].tolist(),
                           priority=priority)

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Decide nothing."""
        return iter(())


@dataclass(frozen=True)
class Compared:
    """CPU seconds per task: SimPy, compiled from the same graph, compiled from columns; and how many tasks."""

    tasks: int
    simpy_s: float
    program_s: float
    arrays_s: float

    @property
    def ratio(self) -> float:
        """How many times the tasks of SimPy, from columns."""
        return self.simpy_s / self.arrays_s


def compare(case: str, size: int = COMPARED, repeats: int = 5) -> Compared:
    """Run a graph on both executors in turns; medians. What turns a graph into columns is taken off SimPy's time."""
    program = Given(CASES[case](size))
    arrays = arrays_of(program.graph)
    runs: list[list[float]] = [[], [], [], []]
    execute_arrays(arrays)
    for _ in range(repeats):
        expected = timed(runs[0], lambda: execute_simpy(program))
        found = timed(runs[1], lambda: execute_program(program))
        timed(runs[2], lambda: execute_arrays(arrays))
        timed(runs[3], lambda: arrays_of(program.graph))
        if not (np.array_equal(expected.start_ns, found.start_ns) and np.array_equal(expected.end_ns, found.end_ns)):
            raise SystemExit(f"{case}: SimPy and the compiled executor disagree")
    simpy_s, program_s, arrays_s, columns_s = (median(times) / len(arrays) for times in runs)
    return Compared(len(arrays), simpy_s - columns_s, program_s, arrays_s)


@dataclass(frozen=True)
class Alone:
    """CPU seconds of the compiled executor from columns, of the task table, of the critical path; peak memory."""

    tasks: int
    execute_s: float
    table_s: float
    path_s: float
    peak_bytes: int


def alone(case: str, size: int = ALONE, repeats: int = 3) -> Alone:
    """Run a large graph on the compiled executor; the fastest of several runs (others disturb, none helps)."""
    arrays = CASES[case](size)
    runs: list[list[float]] = [[], [], []]
    for _ in range(repeats + 1):
        execution = timed(runs[0], lambda: execute_arrays(arrays))
    peak = peak_bytes()
    timed(runs[1], execution.table)
    critical_path(execution)
    timed(runs[2], lambda: critical_path(execution))
    return Alone(len(arrays), *(min(times) for times in runs), peak)


def windowed(size: int, window: int = WINDOW) -> Alone:
    """Run the layered graph window by window; only the executor's time counts, not that of making the windows."""
    execute_arrays(layered(1000))  # loads the kernels
    run_windows([layered(1000)], lambda rows: None)
    spent: list[float] = []
    last = [0, 0]

    def windows() -> Iterator[TaskArrays]:
        first = 0
        while first < size:
            begun = time.process_time()
            part = layered(min(window, size - first), first=first)
            first += len(part)
            spent.append(begun - time.process_time())
            yield part

    def sink(rows: Execution) -> None:
        last[0], last[1] = last[0] + len(rows), max(last[1], int(rows.end_ns[-1]))

    begun = time.process_time()
    num_tasks = run_windows(windows(), sink)
    if num_tasks != last[0]:
        raise SystemExit(f"{num_tasks} tasks ran, {last[0]} came out")
    return Alone(num_tasks, time.process_time() - begun + sum(spent), 0.0, 0.0, peak_bytes())


def timed(times: list[float], run: Callable[[], Execution]) -> Execution:
    """Run and keep the CPU time."""
    begun = time.process_time()
    result = run()
    times.append(time.process_time() - begun)
    return result


def in_fresh_process(function: Callable[..., Alone], *arguments: object) -> Alone:
    """Run a measurement in a process of its own, with the kernels loaded from disk."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def comparison_table(size: int, repeats: int) -> Table:
    """SimPy against compiled, case by case."""
    table = Table("graph", "tasks", "SimPy tasks/s", "compiled, from the graph", "compiled, from columns", "times SimPy",
                  title=f"same graphs, CPU seconds, median of {repeats} turns; target {RATIO_TARGET}x")
    for case in CASES:
        run = compare(case, size, repeats)
        table.add_row(case, f"{run.tasks:,}", *(f"{1 / part:,.0f}" for part in (run.simpy_s, run.program_s, run.arrays_s)),
                      f"{run.ratio:.0f}x")
    return table


def rate_table(size: int) -> Table:
    """The compiled executor on large graphs."""
    table = Table("graph", "tasks", "tasks/s", "with task table", "critical path, ns/task", "peak memory, GiB",
                  title=f"compiled executor from columns, CPU seconds; target {RATE_TARGET:,} tasks/s")
    for case in CASES:
        run = in_fresh_process(alone, case, size)
        table.add_row(case, f"{run.tasks:,}", f"{run.tasks / run.execute_s:,.0f}",
                      f"{run.tasks / (run.execute_s + run.table_s):,.0f}", f"{run.path_s / run.tasks * 10**9:.0f}",
                      f"{run.peak_bytes / GIB:.2f}")
    return table


def growth_table(sizes: Sequence[int], windowed_sizes: Sequence[int]) -> Table:
    """Time and memory as the layered graph grows, in one piece and through windows."""
    table = Table("run", "tasks", "tasks/s", "time over smallest", "tasks over smallest", "peak memory, GiB",
                  title="growth of the layered graph, each in a process of its own")
    for name, function, chosen in (("one piece", one_piece, sizes), ("windows", windowed, windowed_sizes)):
        runs = [in_fresh_process(function, size) for size in chosen]
        for run in runs:
            table.add_row(name, f"{run.tasks:,}", f"{run.tasks / run.execute_s:,.0f}",
                          f"{run.execute_s / runs[0].execute_s:.1f}x", f"{run.tasks / runs[0].tasks:.1f}x",
                          f"{run.peak_bytes / GIB:.2f}")
    return table


def one_piece(size: int) -> Alone:
    """The layered graph in one piece."""
    return alone("layers of 64 on 8 resources", size, repeats=2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--long", action="store_true", help="also 100 M tasks through windows")
    options = parser.parse_args(arguments)
    console, large = Console(width=150), ALONE // 10 if options.quick else ALONE
    console.print(comparison_table(COMPARED // 10 if options.quick else COMPARED, 3 if options.quick else 5))
    console.print(rate_table(large))
    long = (100 * WINDOW,) if options.long else ()
    console.print(growth_table((large // 10, large, large * (1 if options.quick else 10)), (WINDOW, 10 * WINDOW, *long)))


if __name__ == "__main__":
    main()
