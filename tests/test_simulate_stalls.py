"""Idle time by cause: by hand, against a slow walk over the tables, and it always adds up."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_worlds import cost_of, random_case

from moesim.errors import InputError
from moesim.lowering.graph import Resource, TaskGraph
from moesim.simulate.execution import Execution, execution_of
from moesim.simulate.result import DONE, SimulationResult
from moesim.simulate.run import dep_table, simulate
from moesim.simulate.simpy_executor import run_simpy
from moesim.simulate.stalls import stall_times, stall_times_ns

GPU, CPU, FLASH, PCIE = range(4)
RESOURCES = tuple(Resource(name, "box", name) for name in ("gpu", "cpu", "nvme.in", "pcie.in"))
Row = tuple[str, int, tuple[int, ...], int, int, dict[str, int]]


def executed(rows: list[Row]) -> Execution:
    """A run by hand: kind, resource, deps, start, end, labels."""
    graph = TaskGraph(RESOURCES)
    for kind, resource, deps, start, end, labels in rows:
        graph.add(kind, resource, end - start, list(deps), **labels)
    times = np.array([(start, start, end) for *_, start, end, _ in rows], np.int64)
    frame = pd.DataFrame(times, columns=["ready_ns", "start_ns", "end_ns"])
    return execution_of(graph, frame.assign(priority=0, state=np.int8(DONE)))


def copy(start: int, end: int, resource: int = PCIE, deps: tuple[int, ...] = (0,), kind: str = "load", **labels: int) -> Row:
    """A copy of expert 1 into slot 0."""
    return kind, resource, deps, start, end, {"layer": 0, "expert": 1, "chunk": 0, "slot": 0} | labels


ROUTER: Row = ("router", GPU, (), 0, 10, {})


@pytest.mark.parametrize(("rows", "expected"), [
    # the expert waits for its load
    ([ROUTER, copy(10, 30), ("expert", GPU, (1,), 30, 35, {})], {"load": 20}),
    # the load itself waited for a prefetch on the wire: each its own part, from the router's end on
    ([ROUTER, copy(4, 18, kind="prefetch", expert=2), copy(18, 30), ("expert", GPU, (2,), 30, 35, {})],
     {"load": 12, "prefetch": 8}),
    # from flash: the hop before the last link is far
    ([ROUTER, copy(10, 30, FLASH), copy(30, 36, deps=(1,)), ("expert", GPU, (2,), 36, 40, {})],
     {"far link": 20, "load": 6}),
    # a copy into a memory on the way has no slot; the CPU waited for it
    ([ROUTER, copy(10, 30, FLASH, slot=-1), ("cpu_expert", CPU, (1,), 30, 50, {}), ("barrier", -1, (2,), 50, 50, {}),
      ("head", GPU, (3,), 50, 60, {})], {"far link": 20, "cpu expert": 20}),
    # the device works on while the CPU does: only the rest is idle
    ([ROUTER, ("cpu_expert", CPU, (0,), 10, 40, {}), ("expert", GPU, (0,), 10, 25, {}), ("barrier", -1, (1, 2), 40, 40, {}),
      ("head", GPU, (3,), 40, 50, {})], {"cpu expert": 15}),
    # a real run: 3 ns pass between the load's end and the expert's start, and the first task starts late
    ([ROUTER, copy(12, 30), ("expert", GPU, (1,), 33, 35, {})], {"load": 18, "other": 5}),
    # other work on another device is a cause by its kind
    ([ROUTER, ("dense", CPU, (), 0, 25, {}), ("head", GPU, (0, 1), 25, 30, {})], {"dense": 15}),
    # never idle
    ([ROUTER, ("expert", GPU, (0,), 10, 20, {})], {}),
])
def test_by_hand(rows: list[Row], expected: dict[str, int]) -> None:
    """What the device waited for, and how long."""
    assert stall_times_ns(executed(rows), "gpu") == expected
    assert stall_times(executed(rows), "gpu") == {cause: ns / 1e9 for cause, ns in expected.items()}


def test_the_longest_comes_first() -> None:
    """Causes are in order of their time."""
    rows = [ROUTER, copy(10, 12), ("expert", GPU, (1,), 12, 13, {}), ("cpu_expert", CPU, (2,), 13, 20, {}),
            ("head", GPU, (3,), 20, 21, {})]
    assert list(stall_times_ns(executed(rows), "gpu").items()) == [("cpu expert", 7), ("load", 2)]


def slow_walk(tasks: pd.DataFrame, deps: pd.DataFrame, resource: str) -> dict[str, int]:
    """The same, task by task over the tables, for one device that computes one thing at a time."""
    rows = {row.task: row for row in tasks[tasks["state"] == DONE].itertuples()}
    needs: dict[int, list[int]] = {}
    for task, dep in deps.itertuples(index=False):
        needs.setdefault(task, []).append(dep)
    copies, far = ("load", "prefetch", "admit"), set()
    for task, dep in deps.itertuples(index=False):
        if task in rows and dep in rows and rows[task].kind == rows[dep].kind and rows[task].kind in copies:
            far |= {dep} if (rows[task].expert, rows[task].chunk) == (rows[dep].expert, rows[dep].chunk) else set()

    def before(task: int) -> int | None:
        earlier = [row for row in rows.values() if row.task != task and row.resource == rows[task].resource != ""
                   and row.end_ns <= rows[task].start_ns]
        found = [rows[dep] for dep in needs.get(task, [])] + sorted(earlier, key=lambda r: (r.end_ns, r.task))[-1:]
        return max(found, key=lambda r: (r.end_ns, r.task)).task if found else None

    total: Counter[str] = Counter()
    idle_from = min(row.start_ns for row in rows.values())
    for row in sorted((row for row in rows.values() if row.resource == resource), key=lambda r: r.start_ns):
        time, task = row.start_ns, row.task
        while time > idle_from and (task := before(task)) is not None:  # type: ignore[assignment]
            kind = rows[task].kind
            name = "far link" if task in far else {"send": "cpu expert", "receive": "cpu expert",
                                                   "cpu_expert": "cpu expert"}.get(kind, kind)
            total["other"] += max(0, time - max(idle_from, rows[task].end_ns))
            time = min(time, max(idle_from, rows[task].end_ns))
            total[name] += max(0, time - max(idle_from, rows[task].start_ns))
            time = min(time, max(idle_from, rows[task].start_ns))
        total["other"] += max(0, time - idle_from)
        idle_from = row.end_ns
    return {name: time for name, time in total.items() if time}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100_000))
def test_a_slow_walk_finds_the_same_and_it_adds_up(seed: int) -> None:
    """Random offloaded runs: causes as in the tables, an execution and its result alike, parts sum to the idle time."""
    offload, point = random_case(seed)
    offload = dataclasses.replace(offload, steps=offload.steps[:2])
    result = simulate(program := offload.program(point, cost_of(offload, seed)), executor=run_simpy)
    found = stall_times_ns(result, "gpu.compute")
    tasks, deps = result.tasks, result.tables["deps"]
    assert found == slow_walk(tasks, deps, "gpu.compute")
    assert found == stall_times_ns(execution_of(program.graph, tasks), "gpu.compute")
    own = tasks[(tasks["resource"] == "gpu.compute") & (tasks["state"] == DONE)]
    assert sum(found.values()) == own["end_ns"].max() - tasks["start_ns"][tasks["state"] == DONE].min() - own["duration_ns"].sum()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100_000), st.sampled_from(["cpu.experts", "pcie.in", "nvme.in"]))
def test_every_resource_adds_up(seed: int, resource: str) -> None:
    """Links and the CPU wait too, behind whatever."""
    offload, point = random_case(seed)
    program = offload.program(point, cost_of(offload, seed))
    tasks = run_simpy(program)
    own = tasks[(tasks["resource"] == resource) & (tasks["state"] == DONE)]
    execution = execution_of(program.graph, tasks)
    if len(own):
        idle = own["end_ns"].max() - tasks["start_ns"][tasks["state"] == DONE].min() - own["duration_ns"].sum()
        assert sum(stall_times_ns(execution, resource).values()) == idle


def test_lanes_that_overlap_are_idle_together() -> None:
    """A long task that began before a gap covers it."""
    rows: list[Row] = [("attention", GPU, (), 0, 4, {}), ("expert", GPU, (), 2, 20, {}), ("expert", GPU, (), 10, 12, {}),
                       ("cpu_expert", CPU, (), 0, 25, {}), ("head", GPU, (3,), 25, 30, {})]
    assert stall_times_ns(executed(rows), "gpu") == {"cpu expert": 5}


def test_what_cannot_be_told_is_refused() -> None:
    """A resource that is not there or did nothing, and a result without dependencies."""
    run = executed([ROUTER])
    with pytest.raises(InputError, match=r"unknown resource 'gqu'. Did you mean 'gpu'"):
        stall_times_ns(run, "gqu")
    with pytest.raises(InputError, match="resource 'cpu' ran no task"):
        stall_times_ns(run, "cpu")
    with pytest.raises(InputError, match="result 'r': stall times need the table deps"):
        stall_times_ns(SimulationResult("r", {}, {"tasks": run.table()}), "gpu")
    assert stall_times_ns(SimulationResult("r", {}, {"tasks": run.table(), "deps": dep_table(run)}), "gpu") == {}
