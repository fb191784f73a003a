"""The executors: the tie rule, an independent simulator, decisions, the critical path; each rule on SimPy and compiled."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import CheckError
from moesim.lowering.graph import ExecutorView, Program, Resource, TaskGraph
from moesim.lowering.task_arrays import arrays_of
from moesim.simulate.compiled_executor import execute_program
from moesim.simulate.critical_path import WAIT, critical_path
from moesim.simulate.execution import Execution
from moesim.simulate.result import CANCELLED, DONE
from moesim.simulate.simpy_executor import execute_simpy

A, B = 0, 1
TWO = (Resource("a", "a", "a"), Resource("b", "b", "b"))

Script = Callable[[TaskGraph, ExecutorView], Iterator[int]]


@dataclass
class Scripted:
    """A program whose decisions are a function in a test."""

    graph: TaskGraph
    script: Script

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Run the script."""
        return self.script(self.graph, view)


@pytest.fixture(params=["simpy", "compiled"], scope="module", autouse=True)
def executor(request: pytest.FixtureRequest) -> None:
    """Run every test of this module on both executors."""
    EXECUTE[0] = {"simpy": execute_simpy, "compiled": execute_program}[request.param]


EXECUTE: list[Callable[[Program], Execution]] = [execute_simpy]


def execute(program: Program) -> pd.DataFrame:
    """The task table of a program, from the executor under test."""
    return EXECUTE[0](program).table()


def run(script: Script, resources: tuple[Resource, ...] = TWO) -> pd.DataFrame:
    """Simulate a script."""
    return execute(Scripted(TaskGraph(resources), script))


def starts(tasks: pd.DataFrame) -> list[int]:
    """Start times in task order."""
    return tasks["start_ns"].tolist()


# ---------------------------------------------------------------- the tie rule


def test_a_queue_is_served_by_priority_then_ready_time_then_id() -> None:
    """Behind a task that ends at 10 wait tasks of both priorities, ready at 0 and at 5."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        graph.add("load", A, 10)
        late = graph.add("router", B, 5)
        graph.add("load", A, 1, priority=1)  # ready at 0
        graph.add("load", A, 1, [late], priority=0)  # ready at 5
        graph.add("load", A, 1, priority=0)  # ready at 0
        graph.add("load", A, 1, priority=0)  # ready at 0, higher id
        yield late

    assert starts(run(script)) == [0, 0, 13, 12, 10, 11]


def test_decisions_fall_after_all_completions_and_before_dispatch() -> None:
    """Two tasks end at 10: the program, woken by the first, sees both done, and what it adds goes before the queue."""
    seen = []

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        first, other = graph.add("router", A, 10), graph.add("load", B, 10)
        graph.add("load", A, 3, priority=5)
        yield first
        seen.append((view.now_ns, view.is_done(other), view.is_started(2)))
        yield graph.add("load", A, 4, priority=0)

    assert starts(run(script)) == [0, 0, 14, 10]
    assert seen == [(10, True, False)]


def test_a_freed_lane_goes_to_a_task_that_becomes_ready_at_the_same_instant() -> None:
    """A task released by another resource at 10 competes for the lane freed at 10, whichever completes first."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        graph.add("load", A, 10)
        gate = graph.add("router", B, 10)
        graph.add("load", A, 5, priority=1)
        yield graph.add("load", A, 5, [gate], priority=0)

    assert starts(run(script)) == [0, 0, 15, 10]


def test_a_running_task_is_not_preempted() -> None:
    """An urgent task that becomes ready at 1 waits until 100."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        graph.add("load", A, 100, priority=9)
        gate = graph.add("router", B, 1)
        yield graph.add("load", A, 1, [gate], priority=0)

    assert starts(run(script)) == [0, 0, 100]


def test_barriers_take_no_time_and_chain_at_one_instant() -> None:
    """A barrier on a barrier on two tasks completes when the later one does, and wakes the program then."""
    woken = []

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        ends = graph.barrier([graph.barrier([graph.add("load", A, 7), graph.add("load", B, 9)])])
        yield ends
        woken.append(view.now_ns)
        yield graph.barrier([])

    tasks = run(script)
    assert tasks["end_ns"].tolist() == [7, 9, 9, 9, 9]
    assert woken == [9]


def test_a_resource_with_lanes_runs_as_many_at_once() -> None:
    """Three tasks of 10 on two lanes: two start at 0, one at 10, and the barrier falls at 20."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        yield graph.barrier([graph.add("load", 0, 10) for _ in range(3)])

    assert starts(run(script, (Resource("a", "a", "a", capacity=2),))) == [0, 0, 10, 20]


# ---------------------------------------------------------------- cancel and priorities


def test_a_cancelled_task_never_runs_and_has_no_times() -> None:
    """A queued task is withdrawn at 4; the one behind it takes its place."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        graph.add("load", A, 10)
        doomed, gate = graph.add("prefetch", A, 50), graph.add("router", B, 4)
        graph.add("load", A, 2)
        yield gate
        view.cancel(doomed)

    tasks = run(script)
    assert starts(tasks) == [0, -1, 0, 10]
    assert tasks["state"].tolist() == [DONE, CANCELLED, DONE, DONE]
    assert tasks["end_ns"][1] == -1


def test_a_task_may_be_cancelled_or_moved_in_the_decision_that_added_it() -> None:
    """The program changes its mind before anyone has seen the tasks."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        doomed, last, first = (graph.add("load", A, 5) for _ in range(3))
        view.cancel(doomed)
        view.set_priority(last, 3)
        yield first

    tasks = run(script)
    assert starts(tasks) == [-1, 5, 0]
    assert tasks["priority"].tolist() == [0, 3, 0]


def test_priority_changes_reorder_the_queue_and_may_be_taken_back() -> None:
    """Of three queued tasks the last is promoted, and one that was promoted and demoted stays last."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        graph.add("load", A, 10)
        tasks = [graph.add("prefetch", A, 1, priority=2) for _ in range(3)]
        yield graph.add("router", B, 4)
        view.set_priority(tasks[0], 0)
        view.set_priority(tasks[2], 0)
        view.set_priority(tasks[0], 5)

    tasks = run(script)
    assert starts(tasks)[1:4] == [12, 11, 10]
    assert tasks["priority"].tolist() == [0, 5, 2, 0, 0]


@pytest.mark.parametrize(("act", "message"), [
    (lambda view: view.cancel(0), "task 0 cannot be cancelled: it has started"),
    (lambda view: view.set_priority(0, 1), "task 0 has started; its priority is fixed"),
    (lambda view: view.cancel(1), r"task 1 cannot be cancelled: tasks \[2\] wait for it"),
    (lambda view: (view.cancel(2), view.cancel(2)), "task 2 cannot be cancelled: it has been already"),
])
def test_what_has_started_or_is_waited_for_cannot_be_changed(
        act: Callable[[ExecutorView], object], message: str) -> None:
    """Cancelling and moving have rules, and breaking one is an error."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        running = graph.add("load", A, 10)
        waiting = graph.add("load", A, 10)
        graph.add("load", A, 10, [waiting])
        yield graph.add("router", B, 1)
        act(view)
        yield running

    with pytest.raises(CheckError, match=message):
        run(script)


def test_cancelling_a_child_first_frees_its_parent() -> None:
    """A chain can be withdrawn from its end."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        busy = graph.add("load", A, 10)
        parent = graph.add("load", A, 10)
        child = graph.add("load", B, 10, [parent])
        yield graph.add("router", B, 1)
        view.cancel(child)
        view.cancel(parent)
        yield busy

    assert run(script)["state"].tolist() == [DONE, CANCELLED, CANCELLED, DONE]


def test_tasks_that_can_never_run_are_an_error() -> None:
    """The program waits for a task that it cancelled, and another waits for it too."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        busy, doomed = graph.add("load", A, 10), graph.add("load", A, 10)
        yield graph.add("router", B, 1)
        view.cancel(doomed)
        graph.add("load", B, 1, [doomed])
        yield doomed
        yield busy

    with pytest.raises(CheckError, match=r"1 tasks never ran, the first are \[3\]; the program waits for 1"):
        run(script)


def test_a_task_may_only_wait_for_earlier_ones() -> None:
    """The graph is acyclic by construction."""
    graph = TaskGraph(TWO)
    with pytest.raises(CheckError, match=r"task 0 \(load\) waits for \[0\]; a task may only wait for earlier ones"):
        graph.add("load", A, 1, [0])


# ---------------------------------------------------------------- against an independent simulator


@dataclass(frozen=True)
class Case:
    """A graph in stages: the tasks of stage s are known when `awaited[s - 1]` has ended.

    tasks: (resource or -1, duration, priority, deps) each; stage: of each task.
    """

    capacity: tuple[int, ...]
    tasks: tuple[tuple[int, int, int, tuple[int, ...]], ...]
    stage: tuple[int, ...]
    awaited: tuple[int, ...]


@st.composite
def graphs(draw: st.DrawFn) -> Case:
    """Small random graphs with many ties: durations 1 to 4, priorities 0 to 2, up to three stages."""
    capacity = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    tasks, stage, awaited = [], [], []
    for number in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 10))):
            place = len(tasks)
            deps = draw(st.lists(st.integers(0, place - 1), unique=True, max_size=3)) if place else []
            resource = draw(st.integers(-1, len(capacity) - 1))
            tasks.append((resource, draw(st.integers(1, 4)), draw(st.integers(0, 2)), tuple(deps)))
            stage.append(number)
        awaited.append(draw(st.integers(0, len(tasks) - 1)))
    return Case(capacity, tuple(tasks), tuple(stage), tuple(awaited))


def program_of(case: Case) -> Scripted:
    """The case as a program."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        for number, awaited in enumerate(case.awaited):
            for place, (resource, duration, priority, deps) in enumerate(case.tasks):
                if case.stage[place] == number:
                    kind = "load" if resource >= 0 else "barrier"
                    graph.add(kind, resource, duration, deps, priority=priority)
            yield awaited

    resources = tuple(Resource(f"r{n}", "g", "l", capacity) for n, capacity in enumerate(case.capacity))
    return Scripted(TaskGraph(resources), script)


def step_by_step(case: Case) -> list[tuple[int, int, int]]:
    """(ready, start, end) of each task, one nanosecond at a time and by the words of the tie rule."""
    count = len(case.tasks)
    ready, start, end = [-1] * count, [-1] * count, [-1] * count
    stage, now = 0, 0

    def is_done(task: int) -> bool:
        return end[task] >= 0 and end[task] <= now

    while not all(is_done(task) for task in range(count)):
        changed = True
        while changed:  # completions, barriers and decisions of this instant, until nothing more follows
            changed = False
            for task, (resource, _, _, deps) in enumerate(case.tasks):
                if ready[task] < 0 and case.stage[task] <= stage and all(is_done(dep) for dep in deps):
                    ready[task], changed = now, True
                    if resource < 0:
                        start[task] = end[task] = now
            if stage < len(case.awaited) - 1 and is_done(case.awaited[stage]):
                stage, changed = stage + 1, True
        for number, capacity in enumerate(case.capacity):
            mine = [task for task in range(count) if case.tasks[task][0] == number and ready[task] >= 0]
            running = sum(start[task] >= 0 and not is_done(task) for task in mine)
            queue = sorted((case.tasks[t][2], ready[t], t) for t in mine if start[t] < 0)
            for _, _, task in queue[: capacity - running]:
                start[task], end[task] = now, now + case.tasks[task][1]
        now += 1
    return list(zip(ready, start, end, strict=True))


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_the_executor_agrees_with_a_simulator_that_steps_through_time(case: Case) -> None:
    """Ready, start and end of every task, to the nanosecond, on random graphs full of ties."""
    tasks = execute(program_of(case))
    found = list(zip(tasks["ready_ns"], tasks["start_ns"], tasks["end_ns"], strict=True))
    assert found == step_by_step(case)


@settings(max_examples=25, deadline=None)
@given(graphs())
def test_two_runs_give_the_same_table(case: Case) -> None:
    """Nothing but the graph decides."""
    assert execute(program_of(case)).equals(execute(program_of(case)))


DIGEST = """
import hashlib
from moesim.lowering.graph import Resource, TaskGraph
from moesim.simulate.simpy_executor import run_simpy
from moesim.simulate.compiled_executor import run_compiled
class Program:
    graph = TaskGraph(tuple(Resource(n, n, n, 1 + (n == "b")) for n in "abc"))
    def decisions(self, view):
        for round in range(20):
            last = [self.graph.add("load", i % 3, 1 + i * 7 % 5, priority=i % 2) for i in range(12)]
            yield self.graph.barrier(last[::2])
for run in (run_simpy, run_compiled):
    Program.graph = TaskGraph(Program.graph.resources)
    print(hashlib.sha256(run(Program()).to_csv().encode()).hexdigest())
"""


def test_the_table_does_not_depend_on_the_hash_seed() -> None:
    """Two processes with different string hashes print the same bytes, twice."""
    root = Path(__file__).parent.parent
    environments = [os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)} for seed in ("0", "4242")]
    digests = {subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True,
                              check=True).stdout for env in environments}
    assert len(digests) == 1
    assert len(set(digests.pop().split())) == 1, "SimPy and the compiled executor print the same"


# ---------------------------------------------------------------- the critical path


def step_back(execution: Execution, before: list[int]) -> dict[tuple[str, str], list[int]]:
    """The critical path in plain Python: time and tasks by (resource, kind)."""
    arrays = execution.arrays
    start, end = execution.start_ns.tolist(), execution.end_ns.tolist()
    names = [resource.name for resource in arrays.resources] + [""]
    labels = [(names[resource], arrays.kinds[kind]) for resource, kind in zip(arrays.resource, arrays.kind, strict=True)]
    spent: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    done = np.flatnonzero(execution.done).tolist()
    task, origin = max(done, key=lambda task: (end[task], -task)), min(start[task] for task in done)
    cursor = end[task]
    while cursor > origin:
        if cursor > start[task]:
            spent[labels[task]][0] += cursor - start[task]
            spent[labels[task]][1] += 1
        cursor = min(cursor, start[task])
        deps = arrays.deps[arrays.dep_offsets[task]:arrays.dep_offsets[task + 1]].tolist()
        candidates = [dep for dep in (*deps, before[task]) if dep >= 0]
        if not candidates:
            if cursor > origin:
                spent[WAIT, WAIT][0] += cursor - origin
            break
        task = max(candidates, key=lambda dep: (end[dep], dep))
        if cursor > end[task]:
            spent[WAIT, WAIT][0] += cursor - end[task]
            spent[WAIT, WAIT][1] += 1
            cursor = end[task]
    return spent


def before_on_resource(execution: Execution) -> list[int]:
    """For each task the one on its resource with the latest end (then id) not after its start, or -1."""
    start, end, resource = execution.start_ns, execution.end_ns, execution.arrays.resource
    real = np.flatnonzero(execution.on_resource).tolist()
    before = [-1] * len(execution)
    for task in real:
        earlier = [(end[other], other) for other in real if resource[other] == resource[task] and end[other] <= start[task]]
        latest = max(earlier)[1] if earlier else -1
        before[task] = -1 if latest == task else latest
    return before


def by_label(path: pd.DataFrame) -> dict[tuple[str, str], list[int]]:
    """A critical path as `step_back` tells it."""
    return {(row.resource, row.kind): [row.time_ns, row.num_tasks] for row in path.itertuples()}


def measured(seed: int) -> Execution:
    """Times as of a real run: gaps, overlaps on one resource, tasks of no length, two resources of one name."""
    rng = np.random.default_rng(seed)
    graph = TaskGraph((Resource("a", "g", "l"), Resource("a", "h", "l"), Resource("wait", "g", "m")))
    state = (rng.random(30) < 0.1).astype(np.int8)
    state[0] = DONE
    for task in range(30):
        deps = sorted(set(rng.integers(0, task, rng.integers(0, 3)).tolist())) if task else []
        deps = [dep for dep in deps if state[dep] == DONE]
        graph.add(("load", "expert", "wait")[rng.integers(3)], int(rng.integers(-1, 3)), 1, deps)
    start, end = np.full(30, -1), np.full(30, -1)
    for task in np.flatnonzero(state == DONE).tolist():
        start[task] = max([5, *(end[dep] for dep in graph.deps[task])]) + rng.integers(0, 6)
        end[task] = start[task] + (rng.integers(0, 9) if graph.resource[task] >= 0 else 0)
    return Execution(arrays_of(graph), start, start, end, np.zeros(30, np.int64), state)


def test_the_critical_path_is_that_of_plain_python() -> None:
    """Row for row on simulated and on made-up measured runs, in order of time, resource, kind."""
    for seed in range(150):
        execution = measured(seed)
        path = critical_path(execution)
        assert by_label(path) == step_back(execution, before_on_resource(execution))
        rows = [(-time_ns, resource, kind) for resource, kind, time_ns, _ in path.itertuples(index=False)]
        assert rows == sorted(rows)
        assert -sum(row[0] for row in rows) == execution.end_ns.max() - execution.start_ns[execution.done].min()


@settings(max_examples=30, deadline=None)
@given(graphs())
def test_the_critical_path_of_a_simulated_run_is_that_of_plain_python(case: Case) -> None:
    """Also where lanes overlap on one resource."""
    execution = EXECUTE[0](program_of(case))
    if execution.end_ns.max() > 0:
        assert by_label(critical_path(execution)) == step_back(execution, before_on_resource(execution))


@settings(max_examples=30, deadline=None)
@given(graphs())
def test_the_critical_path_sums_to_the_makespan(case: Case) -> None:
    """Its parts ran where it says, none longer than that resource was busy; it never waits."""
    # a task is also after every decision before it, also one that awaited what was long done
    tied = tuple((*task[:3], (*task[3], *case.awaited[:stage])) if stage else task
                 for task, stage in zip(case.tasks, case.stage, strict=True))
    program = program_of(dataclasses.replace(case, tasks=tied))
    execution = EXECUTE[0](program)
    tasks, path = execution.table(), critical_path(execution)
    assert path["time_ns"].sum() == tasks["end_ns"].max() - tasks["start_ns"].min()
    busy: dict[tuple[str, str], int] = defaultdict(int)
    for resource, kind, duration in zip(tasks["resource"], tasks["kind"], tasks["duration_ns"], strict=True):
        busy[resource, kind] += duration
    for resource, kind, spent in zip(path["resource"], path["kind"], path["time_ns"], strict=True):
        assert resource != "wait", "a simulated run is never idle on its critical path"
        assert spent <= busy[resource, kind]


def test_the_critical_path_of_a_fork_follows_the_longer_branch() -> None:
    """Attention 5, then copy 20 beside compute 8, then the head 3: compute 8, copy 20 of 28."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        attention = graph.add("attention", A, 5)
        copied = graph.add("load", B, 20, [attention])
        computed = graph.add("expert", A, 8, [attention])
        yield graph.add("head", A, 3, [copied, computed])

    program = Scripted(TaskGraph(TWO), script)
    path = critical_path(EXECUTE[0](program)).set_index(["resource", "kind"])["time_ns"].to_dict()
    assert path == {("b", "load"): 20, ("a", "attention"): 5, ("a", "head"): 3}


def test_time_in_which_nothing_ran_is_named_wait() -> None:
    """In a real run a gap between a task and what it waited for is the executor's own time."""
    graph = TaskGraph(TWO)
    first = graph.add("router", A, 10)
    graph.add("expert", A, 5, [first])
    start, zero = np.array([100, 117]), np.zeros(2, np.int64)
    real = Execution(arrays_of(graph), start, start, np.array([110, 122]), zero, np.full(2, DONE, np.int8))
    path = critical_path(real).set_index("kind")["time_ns"].to_dict()
    assert path == {"router": 10, "wait": 7, "expert": 5}
    assert np.sum(list(path.values())) == 22
