"""The compiled executor gives SimPy's table, row for row, on every program; windows give the table of the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from step_worlds import random_plan, world

from moesim.errors import CheckError
from moesim.lowering.balancers import BalancerOptions
from moesim.lowering.context_coherent import ContextCoherentProgram
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.graph import ExecutorView, Program, Resource, TaskGraph
from moesim.lowering.task_arrays import TaskArrays, arrays_of
from moesim.simulate.compiled_executor import CompiledExecutor, execute_arrays, execute_program, run_compiled
from moesim.simulate.execution import Execution
from moesim.simulate.result import CANCELLED, DONE
from moesim.simulate.simpy_executor import execute_simpy, run_simpy
from moesim.simulate.windows import run_windows, write_windows

TIMES = ("ready_ns", "start_ns", "end_ns", "priority", "state")


def same(one: Execution, other: Execution) -> bool:
    """Whether two runs agree in every time, priority and state."""
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in TIMES)


# ---------------------------------------------------------------- random programs


@dataclass
class RandomProgram:
    """Rounds of new tasks, questions, cancellations and priority changes, drawn from a seed; it keeps all answers.

    A decision depends on what was answered, so an executor that answers otherwise goes another way.
    """

    seed: int
    graph: TaskGraph = field(init=False)
    answers: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        rng = self.rng
        self.graph = TaskGraph(tuple(Resource(f"r{n}", "g", f"l{n}", int(rng.choice([1, 1, 2, 3, 1 << 20])))
                                     for n in range(rng.integers(1, 5))))
        self.longest = int(rng.choice([1, 3, 3, 20]))
        self.priorities = rng.integers(-2, 3, 4) if rng.random() < 0.7 else np.arange(150)
        self.actions = int(rng.choice([0, 1, 3, 8]))
        self.careless = rng.random() < 0.5  # waits for tasks that it has cancelled
        self.gone: set[int] = set()

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Add tasks, act on old ones, wait for any."""
        for _ in range(self.rng.integers(1, 7)):
            self.add_tasks(int(self.rng.choice([0, 2, 5, 12, 40])))
            for _ in range(self.rng.integers(0, self.actions + 1)):
                self.act(view)
            if not len(self.graph):
                continue
            there = sorted(set(range(len(self.graph))) - self.gone) or [0]
            yield int(self.rng.choice(there))
            self.answers.append(view.now_ns)
            self.add_tasks(int(self.rng.integers(0, 4)))  # and perhaps awaits what was done long ago
        self.act(view)

    def add_tasks(self, count: int) -> None:
        """Add tasks that wait for up to four earlier ones, mostly late ones."""
        for _ in range(count):
            size, rng = len(self.graph), self.rng
            deps = (size - 1 - rng.integers(0, min(size, int(rng.choice([3, 10, size]))), rng.integers(0, 5))
                    if size else np.empty(0, int))
            deps = [dep for dep in deps.tolist() if dep not in self.gone]
            resource = int(rng.integers(-1, len(self.graph.resources)))
            self.graph.add("load" if resource >= 0 else "barrier", resource, int(rng.integers(1, self.longest + 1)),
                           deps, priority=int(rng.choice(self.priorities)))

    def act(self, view: ExecutorView) -> None:
        """Ask about a task, and perhaps cancel it or give it another priority; refusals are answers too."""
        if not len(self.graph):
            return
        task = int(self.rng.integers(len(self.graph)))
        answer = (view.is_done(task), view.is_started(task), view.is_done(len(self.graph) + 3))
        self.answers.append(answer)
        change = self.rng.random()
        try:
            if change < 0.35 and not answer[1]:
                view.set_priority(task, int(self.rng.choice(self.priorities)))
            elif change < 0.5:
                view.set_priority(task, int(self.rng.integers(1000)))
            elif change < 0.6 or (change < 0.8 and not answer[0] and not self.graph.deps[task]):
                view.cancel(task)
                self.gone |= set() if self.careless else {task}
            elif answer[0]:
                self.graph.add("load", 0, 2, [task])
        except CheckError as refused:
            self.answers.append(str(refused))


def outcome(execute: Callable[[Program], Execution], program: RandomProgram) -> tuple[Execution | str, list[object]]:
    """Run a program: what became of its tasks, or the error, and what it was answered on the way."""
    try:
        return execute(program), program.answers
    except CheckError as error:
        return str(error), program.answers


def agree(seed: int) -> str:
    """Check one random program on both executors; tell what it went through."""
    expected, answers = outcome(execute_simpy, RandomProgram(seed))
    found, answered = outcome(execute_program, RandomProgram(seed))
    assert answered == answers, f"seed {seed}"
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected, f"seed {seed}"
        return "stuck"
    assert same(expected, found), f"seed {seed}"
    return "cancelled" if np.any(expected.state == CANCELLED) else "done"


def test_two_thousand_random_programs_run_as_on_simpy() -> None:
    """Times, priorities, states, answers and errors agree; some programs cancel, some get stuck, most do neither."""
    seen = [agree(seed) for seed in range(2000)]
    assert {kind: seen.count(kind) > 50 for kind in ("stuck", "cancelled", "done")} == {
        "stuck": True, "cancelled": True, "done": True}


@pytest.mark.slow
def test_many_more_random_programs_run_as_on_simpy() -> None:
    """As above, with other seeds."""
    for seed in range(2000, 20_000):
        agree(seed)


def test_random_programs_use_lists_and_heaps_and_change_over() -> None:
    """The seeds above reach every kind of queue: lists only, heaps from too many priorities or from a change."""
    kinds = set()
    for seed in range(150):
        program = RandomProgram(seed)
        executor = CompiledExecutor(program)
        try:
            executor.run()
        except CheckError:
            continue
        kinds.add((len(set(program.graph.priority)) > 64, executor._engine.in_heaps))
    assert kinds == {(False, False), (False, True), (True, True)}


# ---------------------------------------------------------------- random static graphs


def random_graph(seed: int, size: int, *, num_priorities: int = 3, reach: int = 12, longest: int = 4) -> TaskGraph:
    """A static graph that ties often."""
    rng = np.random.default_rng(seed)
    graph = TaskGraph(tuple(Resource(f"r{n}", "g", "l", int(rng.integers(1, 4))) for n in range(rng.integers(1, 6))))
    for task in range(size):
        deps = task - 1 - rng.integers(0, min(task, reach), rng.integers(0, 4)) if task else np.empty(0, int)
        resource = int(rng.integers(-1, len(graph.resources)))
        graph.add("load" if resource >= 0 else "barrier", resource, int(rng.integers(1, longest + 1)), deps.tolist(),
                  priority=int(rng.integers(num_priorities)) - 1, step=task)
    return graph


@dataclass
class Static:
    """A program that adds nothing to a graph that is there."""

    graph: TaskGraph

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Decide nothing."""
        return iter(())


@pytest.mark.parametrize(("size", "num_priorities"), [(30, 3), (300, 1), (300, 64), (300, 65), (300, 1000)])
def test_static_graphs_run_as_on_simpy(size: int, num_priorities: int) -> None:
    """From columns as from the graph, with few priorities (lists) and many (heaps); the whole table is equal."""
    for seed in range(20):
        graph = random_graph(seed, size, num_priorities=num_priorities)
        arrays = arrays_of(graph)
        expected = execute_simpy(Static(graph))
        assert same(execute_arrays(arrays), expected)
        assert same(execute_program(Static(graph)), expected)
    pd.testing.assert_frame_equal(execute_arrays(arrays).table(), expected.table(), check_exact=True)


def test_a_large_instant_is_put_in_order_of_id() -> None:
    """A hundred tasks become ready at one instant in no order: they are served by id."""
    graph = TaskGraph((Resource("a", "a", "a"), Resource("b", "b", "b", 200)))
    gates = [graph.add("router", 1, 5) for _ in range(100)]
    for gate in np.random.default_rng(0).permutation(gates).tolist():
        graph.add("load", 0, 1, [gate])
    found = execute_arrays(arrays_of(graph))
    assert found.start_ns[100:].tolist() == list(range(5, 105))
    assert same(found, execute_simpy(Static(graph)))


def test_an_empty_graph_is_an_empty_run() -> None:
    """No tasks, no rows, and all columns."""
    empty = TaskGraph((Resource("a", "a", "a"),))
    assert len(execute_arrays(arrays_of(empty))) == len(execute_program(Static(empty))) == 0
    assert run_compiled(Static(empty)).equals(run_simpy(Static(empty)))


def test_graphs_that_cannot_be_run_are_refused() -> None:
    """A resource that does not exist, one without lanes, columns that begin in the middle."""
    graph = random_graph(0, 20)
    arrays = arrays_of(graph)
    with pytest.raises(CheckError, match="a task names resource 9; there are "):
        execute_arrays(dataclasses.replace(arrays, resource=np.where(arrays.resource == 0, 9, arrays.resource)))
    with pytest.raises(CheckError, match="begins with task 0, not with 7"):
        execute_arrays(arrays_of(graph, 7))
    closed = TaskGraph((Resource("a", "a", "a", 0),))
    closed.add("load", 0, 1)
    for execute in (execute_simpy, execute_program, lambda program: execute_arrays(arrays_of(program.graph))):
        with pytest.raises(CheckError, match=r"1 tasks never ran, the first are \[0\]; the program waits for None"):
            execute(Static(closed))


def test_columns_that_cannot_be_written_or_are_strided_are_taken() -> None:
    """What a reader of files or another lowering hands over need not be laid out as the kernels want it."""
    arrays = arrays_of(random_graph(3, 100))
    expected = execute_arrays(arrays)
    wide = np.repeat(arrays.duration_ns, 2)[::2]
    wide.setflags(write=False)
    assert same(execute_arrays(dataclasses.replace(arrays, duration_ns=wide, resource=arrays.resource.astype(np.int64))),
                expected)


# ---------------------------------------------------------------- every lowering


def expert_parallel(seed: int, kind: type[ExpertParallelProgram] = ExpertParallelProgram, redundant: int = 4,
                    **options: object) -> ExpertParallelProgram:
    """A small expert-parallel program."""
    problem, trace, model, cost, steps = world(seed, redundant=redundant, contention=("port", "pair")[seed % 2])
    plan = random_plan(np.random.default_rng(seed), problem)
    return kind(model, trace, steps, plan, cost, **options)  # type: ignore[arg-type]


LOWERINGS: dict[str, Callable[[int], Program]] = {
    "closed form": expert_parallel,
    "per link": lambda seed: expert_parallel(seed, collective="per_link"),
    "lp": lambda seed: expert_parallel(seed, balancer=BalancerOptions("lp")),
    "llep": lambda seed: expert_parallel(seed, redundant=0, balancer=BalancerOptions("llep", min_tokens=4)),
    "coherent": lambda seed: expert_parallel(seed, ContextCoherentProgram, redundant=0),
}


@pytest.mark.parametrize("name", LOWERINGS)
def test_expert_parallel_programs_run_as_on_simpy(name: str) -> None:
    """Every collective, balancer and execution: the whole table."""
    for seed in range(4):
        expected = run_simpy(LOWERINGS[name](seed))
        pd.testing.assert_frame_equal(run_compiled(LOWERINGS[name](seed)), expected, check_exact=True)


def offload_cases() -> object:
    """Every policy, prefetcher, miss mode and machine of the offload tests."""
    from test_lowering_offload import cases

    return cases()


@settings(max_examples=60, deadline=None)
@given(offload_cases())
def test_offload_programs_run_as_on_simpy(case: tuple) -> None:
    """Prefetches that are promoted and cancelled, staging, several hops: the table and the cache's counts."""
    offload, point = case
    programs = [offload.program(point, offload_cost(offload)) for _ in range(2)]
    expected, found = run_simpy(programs[0]), run_compiled(programs[1])
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    for name, counts in programs[0].cache_counts.items():
        assert counts.tolist() == programs[1].cache_counts[name].tolist()


def offload_cost(offload: object) -> object:
    """A fresh cost model of a case's machine."""
    from moesim.hardware.cost import CostModel

    return CostModel(offload.machine.hardware)  # type: ignore[attr-defined]


# ---------------------------------------------------------------- windows


@dataclass
class Awaiting:
    """A program that adds windows of a graph, each when the last task of the one before is done."""

    whole: TaskGraph
    cuts: list[int]
    graph: TaskGraph = field(init=False)

    def __post_init__(self) -> None:
        self.graph = TaskGraph(self.whole.resources)

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Copy one window after the other."""
        for first, end in zip(self.cuts, self.cuts[1:], strict=False):
            for task in range(first, end):
                self.graph.add(self.whole.kind[task], self.whole.resource[task], self.whole.duration_ns[task],
                               self.whole.deps[task], priority=self.whole.priority[task],
                               step=self.whole.labels["step"][task])
            yield end - 1


def windows_of(graph: TaskGraph, cuts: list[int]) -> Iterator[TaskArrays]:
    """Cut a graph into windows."""
    whole = arrays_of(graph)
    for first, end in pairwise(cuts):
        part = {name: getattr(whole, name)[first:end]
                for name in ("kind", "resource", "duration_ns", "priority", "source", "flops")}
        offsets = whole.dep_offsets[first:end + 1]
        yield dataclasses.replace(
            whole, **part, labels={name: column[first:end] for name, column in whole.labels.items()}, first=first,
            dep_offsets=offsets - offsets[0], deps=whole.deps[offsets[0]:offsets[-1]])


def in_windows(graph: TaskGraph, cuts: list[int]) -> tuple[pd.DataFrame, list[int]]:
    """The table of a run in windows, in order of id, and how many rows each call of the sink had."""
    parts: list[pd.DataFrame] = []
    assert run_windows(windows_of(graph, cuts), lambda rows: parts.append(rows.table())) == cuts[-1]
    assert all(part["task"].is_monotonic_increasing for part in parts)
    return pd.concat(parts).sort_values("task", ignore_index=True), [len(part) for part in parts]


@pytest.mark.parametrize("num_priorities", [3, 200])
def test_windows_run_as_a_program_that_awaits_the_last_task_of_each(num_priorities: int) -> None:
    """Random graphs, random cuts, tasks that outlast many windows, dependencies on what is long gone."""
    outlasted = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        size = int(rng.integers(2, 250))
        graph = random_graph(seed, size, num_priorities=num_priorities, reach=int(rng.choice([5, 250])),
                             longest=int(rng.choice([3, 60])))
        cuts = sorted({0, size, *rng.integers(0, size, rng.integers(0, 12)).tolist()})
        found, calls = in_windows(graph, cuts)
        pd.testing.assert_frame_equal(found, run_simpy(Awaiting(graph, cuts)), check_exact=True)
        outlasted += len(calls) > len(cuts) - 1
    assert outlasted > 20, "too few runs carried tasks over"


def layered(num_layers: int, straggler: int = 0) -> TaskGraph:
    """Layers of eight tasks and a barrier that the next layer waits for; every ten layers a task waits for nothing else."""
    graph, done = TaskGraph((*(Resource(f"r{n}", "g", "l") for n in range(4)), Resource("slow", "g", "s"))), []
    for layer in range(num_layers):
        tasks = [graph.add("experts", n % 4, 1 + (layer * 7 + n * 5) % 9, done, step=layer) for n in range(8)]
        if straggler and layer % 10 == 0:
            graph.add("load", 4, straggler, done, step=layer)
        done = [graph.barrier(tasks, step=layer)]
    return graph


@pytest.mark.parametrize("straggler", [0, 700])
def test_windows_that_end_in_barriers_give_the_run_in_one_piece(straggler: int) -> None:
    """Nothing can start before the window ahead of it ends, so where the windows end changes nothing."""
    graph = layered(100, straggler)
    ends = [task + 1 for task, kind in enumerate(graph.kind) if kind == "barrier"]
    whole = execute_arrays(arrays_of(graph)).table()
    for every in (1, 7, 100):
        cuts = [0, *ends[every - 1::every]]
        found, calls = in_windows(graph, cuts if cuts[-1] == len(graph) else [*cuts, len(graph)])
        pd.testing.assert_frame_equal(found, whole, check_exact=True)
        assert max(calls) <= every * 10 + 10


def test_the_memory_of_a_long_run_is_that_of_its_window() -> None:
    """Ten times the windows, the same arrays: what is done is forgotten, edges and all."""
    from moesim.simulate.windows import _WindowedRun

    sizes = []
    for num_layers in (50, 500):
        graph = layered(num_layers, 30)
        ends = [task + 1 for task, kind in enumerate(graph.kind) if kind == "barrier"]
        run = _WindowedRun(lambda rows: None)
        for window in windows_of(graph, [0, *ends[4::5]]):
            run.add(window)
        run.finish()
        assert run._engine is not None
        sizes.append((len(run._engine.state.node), len(run._engine.state.edge)))
    assert sizes[0] == sizes[1]


def test_every_row_goes_out_once_with_the_deps_of_its_window() -> None:
    """Rows of a window that ends with all done are the window itself."""
    graph, seen = layered(20), []
    ends = [task + 1 for task, kind in enumerate(graph.kind) if kind == "barrier"]
    run_windows(windows_of(graph, [0, *ends]), seen.append)
    assert [rows.arrays.first for rows in seen] == [0, *ends[:-1]]
    assert all(np.all(rows.state == DONE) for rows in seen)
    assert sum(len(rows.arrays.deps) for rows in seen) == sum(map(len, graph.deps))


def test_windows_that_do_not_follow_on_each_other_are_refused() -> None:
    """A gap, other names, a window whose last task can never run."""
    graph = layered(4)
    first, second, third = windows_of(graph, [0, 9, 18, 27])
    with pytest.raises(CheckError, match="a window begins with task 18; the one before it ends before 9"):
        run_windows([first, third], print_nothing)
    with pytest.raises(CheckError, match="the window of task 9 has other kinds"):
        run_windows([first, dataclasses.replace(second, kinds=(*second.kinds, "new"))], print_nothing)
    closed = TaskGraph((Resource("a", "a", "a", 0),))
    closed.add("load", 0, 1)
    with pytest.raises(CheckError, match=r"1 tasks never ran, the first are \[0\]; the program waits for 0"):
        run_windows([arrays_of(closed)], print_nothing)
    assert run_windows([], print_nothing) == 0


def print_nothing(rows: Execution) -> None:
    """A sink that forgets."""


def test_windows_are_written_as_one_task_table(tmp_path: Path) -> None:
    """A row group for each call, the columns of the whole run; a run that fails leaves no file."""
    import pyarrow.parquet as pq

    graph = layered(30)
    ends = [task + 1 for task, kind in enumerate(graph.kind) if kind == "barrier"]
    path = write_windows(windows_of(graph, [0, *ends[4::5]]), tmp_path / "tasks.parquet")
    assert pq.ParquetFile(path).num_row_groups == 6
    pd.testing.assert_frame_equal(pd.read_parquet(path), execute_arrays(arrays_of(graph)).table(), check_dtype=False)
    with pytest.raises(CheckError, match="a window begins with task 9"):
        write_windows(list(windows_of(graph, ends[:3])), tmp_path / "other.parquet")
    with pytest.raises(CheckError, match="there are no tasks to write"):
        write_windows([], tmp_path / "none.parquet")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tasks.parquet"]
