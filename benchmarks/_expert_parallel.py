"""Expert-parallel steps: lowering in Python against whole windows, and step times by recurrence, per CPU second.

Run ``python benchmarks/_expert_parallel.py`` (``--quick``: the two cases of `simulation.py` alone). Each case is one
seeded program of decode steps. What is compared runs in turns in one process; figures are medians of CPU time, and the
results are compared: all columns of all tasks, and the end of every step by the tasks and by the recurrence.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import numpy as np
from _measure import cpu_seconds
from rich.console import Console
from rich.table import Table

from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.expert_parallel_arrays import lower_steps
from moesim.lowering.expert_parallel_loads import step_loads
from moesim.lowering.expert_parallel_prices import price_steps
from moesim.lowering.expert_parallel_times import program_times, step_times, times_of
from moesim.lowering.task_arrays import TaskArrays, arrays_of
from moesim.model.catalog import load_model
from moesim.placement.place import place, problem_from_trace
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace

SEED, REPEATS = 0, 5
COLUMNS = ("case", "requests", "steps", "tasks/step", "lowering: Python", "windows", "ratio", "step time: all",
           "of it reductions", "another machine", "its recurrence")


@dataclass(frozen=True)
class Case:
    """A model on some nodes of eight H100; `redundant` replicas (a plan of EPLB) or a contiguous plan."""

    name: str
    model: str
    num_nodes: int
    batch_size: int
    num_steps: int
    redundant: int = 0


CASES = (
    Case("8 ranks, OLMoE", "olmoe-1b-7b", 1, 256, 64),
    Case("64 ranks, DeepSeek-V3", "deepseek-v3", 8, 256, 64),
    Case("64 ranks, DeepSeek-V3, 64 replicas", "deepseek-v3", 8, 256, 64, 64),
    Case("64 ranks, DeepSeek-V3", "deepseek-v3", 8, 2048, 4),
    Case("64 ranks, DeepSeek-V3", "deepseek-v3", 8, 8192, 2),
    Case("256 ranks, DeepSeek-V3", "deepseek-v3", 32, 1024, 4),
)


@dataclass(frozen=True)
class Measurement:
    """CPU seconds of all steps of a case.

    `python` and `windows`: lowering to tasks. `times`: ends of steps from the trace, of which `loads` for the
    reductions; `machine`: once more for other hardware (`prices` and recurrence), of which `recurrence`.
    """

    tasks: int
    python: float
    windows: float
    times: float
    loads: float
    machine: float
    recurrence: float


def program(case: Case) -> ExpertParallelProgram:
    """Return the program of a case; it has not run."""
    model, hardware = load_model(case.model), load_hardware("h100-sxm", num_nodes=case.num_nodes)
    trace = synthetic_trace(max(512, 2 * case.batch_size), model.num_moe_layers, model.num_experts, model.top_k,
                            case.batch_size, seed=SEED)
    steps = closed_loop_steps(trace, batch_size=case.batch_size, max_steps=case.num_steps, include_prefill=False,
                              repeat=True, seed=SEED)
    problem = problem_from_trace(trace, num_ranks=hardware.num_ranks, ranks_per_node=hardware.ranks_per_node,
                                 redundant_experts=case.redundant)
    plan = place(problem, "eplb" if case.redundant else "contiguous", seed=SEED).plan
    assert plan is not None  # place() raises otherwise
    return ExpertParallelProgram(model, trace, steps, plan, CostModel(hardware))


def renewed(done: ExpertParallelProgram, num_steps: int | None = None) -> ExpertParallelProgram:
    """Return the same program once more, as if it had not run; of its first steps only, if so many are given."""
    steps = [record.step for record in done.steps[:num_steps]]
    return ExpertParallelProgram(done.model, done.trace, steps, done.plan, CostModel(done.cost.hardware))


def lower_in_python(fresh: ExpertParallelProgram) -> None:
    """Add all tasks; nothing runs (the program asks its executor nothing)."""
    for _ in fresh.decisions(cast("Any", None)):
        pass


def ends_of(tasks: TaskArrays, program: ExpertParallelProgram) -> list[int]:
    """Return the end of every step by longest paths: a task starts when all it waits for, and its resource, are done.

    Tasks of one resource run in the order of their ids here, which is the order in which they get ready.
    """
    end, free = np.zeros(len(tasks), np.int64), np.zeros(len(tasks.resources), np.int64)
    bounds = tasks.dep_offsets.tolist()
    for task in range(len(tasks)):
        start = end[tasks.deps[bounds[task]:bounds[task + 1]]].max(initial=0)
        place = int(tasks.resource[task])
        if place >= 0:
            start = max(start, free[place])
            free[place] = start + tasks.duration_ns[task]
        end[task] = start + tasks.duration_ns[task]
    return end[[record.last_task for record in program.steps]].tolist()


def check(case: Case, base: ExpertParallelProgram) -> int:
    """Compare tasks and ends of a few steps; return tasks per step."""
    few = min(2, case.num_steps)
    readable, lowered = renewed(base, few), renewed(base, few)
    lower_in_python(readable)
    found, expected = lower_steps(lowered), arrays_of(readable.graph)
    for column in dataclasses.fields(TaskArrays):
        one, other = getattr(found, column.name), getattr(expected, column.name)
        pairs = [(one[key], other[key]) for key in one] if column.name == "labels" else [(one, other)]
        if not all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs):
            raise SystemExit(f"{case.name}: column {column.name} differs")
    if program_times(renewed(base, few)).end_ns.tolist() != ends_of(found, lowered):
        raise SystemExit(f"{case.name}: the recurrence and the tasks end steps at other times")
    return len(found) // few


def measure(case: Case, repeats: int = REPEATS) -> Measurement:
    """Run everything in turns after a first, unmeasured time (which compiles)."""
    base = program(case)
    tasks, few = check(case, base), min(2, case.num_steps)
    loads = step_loads(base)
    prices = price_steps(loads, base.model, base.cost)
    times: dict[str, list[float]] = {field.name: [] for field in dataclasses.fields(Measurement)[1:]}
    for _ in range(repeats):
        readable, lowered, timed = renewed(base, few), renewed(base), renewed(base)
        times["python"].append(cpu_seconds(lambda: lower_in_python(readable)) * case.num_steps / few)  # noqa: B023
        times["windows"].append(cpu_seconds(lambda: lower_steps(lowered)))  # noqa: B023
        times["times"].append(cpu_seconds(lambda: program_times(timed)))  # noqa: B023
        times["loads"].append(cpu_seconds(lambda: step_loads(timed)))  # noqa: B023
        times["machine"].append(cpu_seconds(lambda: step_times(loads, base.model, base.cost)))
        times["recurrence"].append(cpu_seconds(lambda: times_of(loads, prices)))
    return Measurement(tasks, **{name: median(column) for name, column in times.items()})


def row(case: Case, run: Measurement) -> tuple[str, ...]:
    """Return one line of the table, in ms per step."""
    def ms(seconds: float) -> str:
        return f"{1000 * seconds / case.num_steps:.3f} ms"

    return (case.name, str(case.batch_size), str(case.num_steps), f"{run.tasks:,}", ms(run.python), ms(run.windows),
            f"{run.python / run.windows:.0f}x", ms(run.times), ms(run.loads), ms(run.machine), ms(run.recurrence))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the two cases of simulation.py, once")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"runs behind each median (default {REPEATS})")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    cases, repeats = (CASES[:2], 1) if options.quick else (CASES, options.repeats)
    table = Table(*COLUMNS, title=f"Expert-parallel decode steps, CPU time per step, median of {repeats}")
    for case in cases:
        table.add_row(*row(case, measure(case, repeats)))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
