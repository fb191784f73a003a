"""The torch executor and the real world behind it: same graph as SimPy, right bytes, errors that end the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moesim.errors import CheckError, InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.graph import ExecutorView, Resource, TaskGraph
from moesim.lowering.machine import STAGING_SLOTS
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point
from moesim.simulate.result import CANCELLED, DONE
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.validate.local import local_machine
from moesim.validate.offload import OffloadValidation, validate_offload
from moesim.validate.overhead import overhead_tables
from moesim.validate.report import compare
from moesim.validate.torch_executor import run_torch
from moesim.validate.world import OffloadWorld, WorldConfig

torch = pytest.importorskip("torch")

A, B = 0, 1
RESOURCES = (Resource("a", "a", "a"), Resource("b", "b", "b"))
PATIENCE_S = 180.0


def in_time(action: Callable[[], object]) -> object:
    """Run `action` in a thread; fails if it hangs, raises what it raises."""
    outcome: dict[str, object] = {}

    def call() -> None:
        try:
            outcome["value"] = action()
        except BaseException as error:  # handed on below
            outcome["error"] = error

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "the run hangs"
    if isinstance(error := outcome.get("error"), BaseException):
        raise error
    return outcome["value"]


class NullWorld:
    """Executes nothing."""

    def run(self, graph: TaskGraph, task: int) -> None:
        """Do nothing."""


def lanes() -> int:
    """Threads that executors have left behind."""
    return sum("_lane" in thread.name for thread in threading.enumerate())


@dataclass
class Scripted:
    """A program whose decisions are a function in a test."""

    graph: TaskGraph
    script: Callable[[TaskGraph, ExecutorView], Iterator[int]]

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Run the script."""
        return self.script(self.graph, view)


def real(script: Callable[[TaskGraph, ExecutorView], Iterator[int]], world: object = None) -> pd.DataFrame:
    """Run a script for real."""
    program = Scripted(TaskGraph(RESOURCES), script)
    return in_time(lambda: run_torch(program, world or NullWorld()))  # type: ignore[arg-type, return-value]


class SleepWorld:
    """Every task sleeps for as long as the graph says."""

    def run(self, graph: TaskGraph, task: int) -> None:
        """Sleep."""
        time.sleep(graph.duration_ns[task] / 1e9)


# ---------------------------------------------------------------- a small case


def tiny_model() -> ModelSpec:
    """Two layers of six experts of 4608 bytes in float32."""
    return ModelSpec("tiny", 2, (0, 1), 6, 2, 16, 24, AttentionSpec(2, 1, 8), 32, weight_bytes=4.0,
                     other_weight_bytes=4.0, activation_bytes=4.0)


def small_case(*, chunks: int = 3, steps: int = 6, rate: float | None = None) -> Offload:
    """Decode of one request at a time on this machine's two tiers."""
    trace = synthetic_trace(60, 2, 6, 2, 6, seed=1)
    train, test = split_requests(trace, 0.5, 1)
    made = closed_loop_steps(test, batch_size=1, max_steps=steps, include_prefill=False, repeat=True)
    return Offload(tiny_model(), train, test, made, local_machine("cpu", rate), 1, chunks=chunks)


def world_of(offload: Offload, num_slots: int, rate: float | None = None) -> OffloadWorld:
    """The tensors of a case."""
    return OffloadWorld(offload.model, num_slots, WorldConfig("cpu", "float32", rate, 64, offload.chunks))


def contents(program: object) -> dict[int, int]:
    """Slot -> key of the residents."""
    cache = program.cache  # type: ignore[attr-defined]
    return {cache.slot_of(layer, expert): layer * cache.num_experts + expert
            for layer in range(cache.num_layers) for expert in cache.residents(layer)}


# ---------------------------------------------------------------- the executor


@pytest.mark.parametrize("miss", ["load", "cpu"])
def test_it_runs_the_graph_that_simpy_runs(miss: str) -> None:
    """Without prefetch no decision depends on speed: the same tasks, their dependencies and resources respected."""
    offload = small_case()
    point = Point("lru", 2, miss=miss)
    programs = [offload.program(point, CostModel(offload.machine.hardware)) for _ in range(2)]
    simulated = run_simpy(programs[0])
    measured = in_time(lambda: run_torch(programs[1], NullWorld()))
    assert isinstance(measured, pd.DataFrame)
    same = ["kind", "resource", "step", "layer", "expert", "chunk", "tokens", "num_bytes"]
    if miss == "load":
        pd.testing.assert_frame_equal(measured[same], simulated[same])
    assert list(measured.columns) == list(simulated.columns)
    done = measured[measured["state"] == DONE]
    start, end = measured["start_ns"].to_numpy(), measured["end_ns"].to_numpy()
    for task in done["task"]:
        assert all(start[task] >= end[dep] for dep in programs[1].graph.deps[task])
    for _, own in done[done["resource"] != ""].groupby("resource"):
        ordered = own.sort_values(["start_ns", "end_ns"])
        assert (ordered["start_ns"].to_numpy()[1:] >= ordered["end_ns"].to_numpy()[:-1]).all()


def test_queued_tasks_go_by_priority_and_cancelled_ones_never_run() -> None:
    """Behind a task of 50 ms: the urgent one before the other, and one that is withdrawn in time."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        graph.add("load", A, 50_000_000)
        slow, _urgent, doomed = (graph.add("load", A, 1_000, priority=p) for p in (2, 1, 0))
        yield graph.add("router", B, 1_000_000)
        view.cancel(doomed)
        view.set_priority(slow, 3)

    tasks = real(script, SleepWorld())
    assert tasks["state"].tolist() == [DONE, DONE, DONE, CANCELLED, DONE]
    assert tasks["start_ns"][0] < tasks["start_ns"][2] < tasks["start_ns"][1]
    assert tasks["start_ns"][3] == -1


@pytest.mark.parametrize("attempt", [1])
def test_with_kernels_of_known_length_it_takes_as_long_as_simulated(attempt: int) -> None:
    """Sleeps in place of kernels: two resources side by side, within 30 % of SimPy (best of six tries: a shared machine may pause)."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        last: list[int] = []
        for _ in range(6):
            router = graph.add("router", A, 5_000_000, last)
            yield router
            loads = [graph.add("load", B, 6_000_000, [router], chunk=chunk) for chunk in range(3)]
            beside = graph.add("expert", A, 4_000_000, [router])
            last = [graph.add("expert", A, 8_000_000, [*loads, beside])]
        yield last[0]

    expected = run_simpy(Scripted(TaskGraph(RESOURCES), script))["end_ns"].max()
    assert expected == 6 * 31_000_000
    errors = []
    for _ in range(6):
        errors.append(abs(real(script, SleepWorld())["end_ns"].max() / expected - 1))
        if errors[-1] < 0.3:
            break
    assert min(errors) < 0.3


class Failing:
    """A world in which one task fails."""

    def __init__(self, at: int) -> None:
        self.at = at

    def run(self, graph: TaskGraph, task: int) -> None:
        """Fail at one task."""
        if task == self.at:
            raise RuntimeError(f"kernel {task} failed")


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_error_in_a_task_ends_the_run(at: int) -> None:
    """The first error is raised where the run was started, and no thread is left."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        first = [graph.add("load", resource, 1) for resource in (A, B)]
        yield first[0]
        yield graph.add("router", A, 1, [graph.add("load", B, 1, first), graph.add("load", A, 1, first)])

    before = lanes()
    with pytest.raises(RuntimeError, match=f"kernel {at} failed"):
        real(script, Failing(at))
    assert lanes() == before


@pytest.mark.parametrize("turn", [0, 1])
def test_an_error_in_a_decision_ends_the_run(turn: int) -> None:
    """A program that fails at its start or on the way is reported, and no thread is left."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        if turn:
            yield graph.add("router", A, 1)
        raise InputError("cannot decide")

    before = lanes()
    with pytest.raises(InputError, match="cannot decide"):
        real(script)
    assert lanes() == before


def test_tasks_that_can_never_run_end_the_run_with_an_error() -> None:
    """What waits for a cancelled task would wait for ever: the run ends and says so."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        busy, doomed = graph.add("load", A, 20_000_000), graph.add("load", A, 10)
        yield graph.add("router", B, 1)
        view.cancel(doomed)
        graph.add("load", B, 1, [doomed])
        yield busy

    with pytest.raises(CheckError, match=r"1 tasks never ran, the first are \[3\]"):
        real(script, SleepWorld())


def test_a_program_without_kernels_ends_at_once() -> None:
    """Only barriers, or nothing at all."""

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        yield graph.barrier([graph.barrier([])])

    assert real(script)["state"].tolist() == [DONE, DONE]
    assert len(real(lambda graph, view: iter(()))) == 0


# ---------------------------------------------------------------- the real world


class Watched:
    """Runs the real kernels, and looks before each expert what its slot holds."""

    def __init__(self, world: OffloadWorld, num_experts: int) -> None:
        self.world, self.num_experts, self.wrong, self.looks = world, num_experts, [], 0

    def run(self, graph: TaskGraph, task: int) -> None:
        """Look, then run."""
        if graph.kind[task] == "expert":
            layer, expert, slot = (graph.labels[name][task] for name in ("layer", "expert", "slot"))
            self.looks += 1
            if not self.world.slot_holds(slot, layer * self.num_experts + expert):
                self.wrong.append((task, slot, layer, expert))
        self.world.run(graph, task)


@pytest.mark.parametrize("point", [
    Point("lru", 1), Point("lru", 3, "transition", 3), Point("lfu", 2, "oracle", 2),
    Point("belady", 2, "stated_recall", 2, 0.5), Point("lru", 2, "oracle", 2, None, "cpu")], ids=str)
def test_an_expert_is_computed_from_its_own_bytes(point: Point) -> None:
    """In a real run, with real copies: each slot holds the expert's bytes when it is computed, and at the end."""
    offload = small_case(rate=5e7)
    program = offload.program(point, CostModel(offload.machine.hardware))
    world = world_of(offload, point.slots_per_layer * 2, rate=5e7)
    world.preload(contents(program))
    watched = Watched(world, 6)
    in_time(lambda: run_torch(program, watched))
    assert watched.wrong == []
    assert watched.looks > 0
    kept = {slot: key for slot, key in contents(program).items() if program.transfers.has_arrived(key)}
    assert kept
    assert all(world.slot_holds(slot, key) for slot, key in kept.items())


def test_a_slot_with_other_bytes_is_noticed() -> None:
    """The check behind a run sees a single wrong byte."""
    offload = small_case()
    world = world_of(offload, 2)
    world.preload({0: 3})
    assert world.slot_holds(0, 3)
    world.slots[0, 100] += 1
    assert not world.slot_holds(0, 3)


def test_chunks_of_a_copy_cover_the_expert_once() -> None:
    """Any number of pieces copies all bytes, and the world cuts where the lowering says."""
    for chunks in (1, 3, 5, 7):
        offload = small_case(chunks=chunks)
        program = offload.program(Point("lru", 1), CostModel(offload.machine.hardware))
        world = world_of(offload, 2)
        assert np.diff(world._cuts).tolist() == program.transfers.chunk_bytes
        for chunk in range(chunks):
            assert not world.slot_holds(1, 5)
            world._copy(5, 1, chunk)
        assert world.slot_holds(1, 5)


def test_a_pool_beyond_the_memory_is_refused() -> None:
    """The message says how much is needed, how much is free, and what to shrink."""
    model = tiny_model().replace(hidden_size=65536, expert_intermediate_size=65536)
    with pytest.raises(InputError, match=r"the real run needs [0-9]+ GB, but only .* of memory are free; make `model`"):
        OffloadWorld(model, 2, WorldConfig("cpu", "float32", None, 64, 3))


def test_a_task_without_a_kernel_is_refused() -> None:
    """The world says which kind it does not know."""
    offload = small_case()

    def script(graph: TaskGraph, view: ExecutorView) -> Iterator[int]:
        yield graph.add("dispatch", A, 1, layer=0, expert=0)

    with pytest.raises(InputError, match="the real run has no kernel for tasks of kind 'dispatch'"):
        real(script, world_of(offload, 2))


# ---------------------------------------------------------------- prediction


@pytest.fixture(scope="module")
def validated() -> object:
    """A validation of a few steps, once for the tests below."""
    rate = 5e7
    offload, slots = small_case(rate=rate), 2
    point = Point("lru", slots, "transition", 2)
    case = OffloadValidation(
        model=offload.model, trace=offload.test, steps=offload.steps, machine=offload.machine,
        world=world_of(offload, 2 * slots, rate), build=lambda cost: offload.program(point, cost),
        dry=lambda cost: offload.program(point, cost), device="cpu", num_slots=2 * slots,
        chunk_bytes=(1536, 1536, 1536), with_cpu=False)
    return in_time(lambda: validate_offload(case, repeats=2, probe_rounds=6, seed=0))


def test_a_prediction_takes_no_figure_from_a_data_sheet(validated: object) -> None:
    """Every cost of the predicted run comes from a measured table of this machine."""
    predicted = validated.predicted  # type: ignore[attr-defined]
    sources = set(predicted.loc[predicted["resource"] != "", "source"])
    assert sources
    assert sources <= {"measured", "interpolated", "extrapolated"}
    assert {table.op for table in validated.profile.tables} >= {  # type: ignore[attr-defined]
        "grouped_ffn", "attention", "router", "head", "copy", "task_overhead"}


def test_a_validation_compares_every_repetition(validated: object) -> None:
    """Two repetitions with finite errors, end to end and by kind, and a word on how few they are."""
    report = validated.report  # type: ignore[attr-defined]
    assert report.runs["repetition"].tolist() == [0, 1]
    assert np.isfinite(report.runs["error"]).all()
    assert np.isfinite(report.kinds[["predicted_s", "measured_s", "error"]].to_numpy()).all()
    assert report.kinds["kind"].tolist()[-1] == "end to end"
    assert "only 2 repetitions" in report.notes[0]


def test_the_reported_kinds_are_those_of_the_run(validated: object, tmp_path: Path) -> None:
    """The counts are those of the last real run, and the report can be written."""
    run = validated
    measured = run.measured  # type: ignore[attr-defined]
    done = measured[(measured["state"] == DONE) & (measured["resource"] != "")]["kind"].value_counts()
    kinds = run.report.kinds.set_index("kind")["num_tasks"].drop("end to end")  # type: ignore[attr-defined]
    assert {kind: n for kind, n in kinds.items() if n} == done.to_dict()
    assert run.report.write(tmp_path / "a.validation.json").stat().st_size > 500  # type: ignore[attr-defined]


def table(**lengths_ns: list[int]) -> pd.DataFrame:
    """Tasks one after another, kinds in the order given."""
    rows, now = [], 0
    for kind, lengths in lengths_ns.items():
        for length in lengths:
            rows.append((kind, "a", DONE, now, now + length, length))
            now += length
    return pd.DataFrame(rows, columns=["kind", "resource", "state", "start_ns", "end_ns", "duration_ns"])


def test_errors_are_relative_to_the_measured_time() -> None:
    """Predicted 110 against measured 100, 120, 140: median 120 by kind, +10 %, -8.3 %, -21.4 % by run."""
    predicted = [table(router=[10], load=[100])] * 3
    measured = [table(router=[20], load=[80]), table(router=[20], load=[100]), table(router=[20], load=[120])]
    report = compare(predicted, measured)
    kinds = report.kinds.set_index("kind")
    assert kinds["measured_s"].to_dict() == pytest.approx({"router": 20e-9, "load": 100e-9, "end to end": 120e-9})
    assert kinds["error"].to_dict() == pytest.approx({"router": -0.5, "load": 0.0, "end to end": -10 / 120})
    assert kinds["spread"].to_dict() == pytest.approx({"router": 0.0, "load": 0.4, "end to end": 40 / 120})
    assert report.runs["error"].tolist() == pytest.approx([0.1, -10 / 120, -30 / 140])
    assert (report.median_error, report.max_error) == pytest.approx((0.1, 30 / 140))
    assert report.notes == ()


def test_a_kind_that_one_repetition_lacks_is_compared_over_the_others(tmp_path: Path) -> None:
    """Whether a prefetch runs depends on timing: it may be absent from a run, the last one too."""
    with_it, without = table(router=[10], prefetch=[30]), table(router=[10])
    report = compare([with_it, with_it, without], [with_it, with_it, without])
    row = report.kinds.set_index("kind").loc["prefetch"]
    assert (row["num_tasks"], row["measured_s"], row["predicted_s"]) == (0, pytest.approx(30e-9), pytest.approx(30e-9))
    assert row["spread"] == row["error"] == 0
    report.write(tmp_path / "a.validation.json")


def test_overheads_of_a_run_by_hand() -> None:
    """Router waits 10 and its decision takes 7; of two experts one starts 5 after the other ended, one at once."""
    graph = TaskGraph(RESOURCES)
    router = graph.add("router", A, 1)
    graph.add("expert", A, 1, [router])
    graph.add("expert", A, 1, [router])
    tasks = pd.DataFrame({"kind": ["router", "expert", "expert"], "start_ns": [10, 21, 31], "end_ns": [14, 25, 35]})
    found = {each.shape: each.seconds[0] for each in overhead_tables([(graph, tasks)])}
    assert found == pytest.approx({"router": 17e-9, "expert": 3e-9})


def test_the_world_has_room_for_passing_experts() -> None:
    """Beside the cache's slots there are staging slots, one after the other."""
    assert len(world_of(small_case(), 4).slots) == 4 + STAGING_SLOTS


def test_experts_may_lie_in_a_file(tmp_path: Path) -> None:
    """A pool mapped from a file holds the bytes of one in memory, and the run copies them into the same slots."""
    offload = small_case()
    kept: list[dict[int, int]] = []
    for pool_file in (None, str(tmp_path / "experts.bin")):
        config = WorldConfig("cpu", "float32", None, 64, offload.chunks, pool_file=pool_file)
        world = OffloadWorld(offload.model, 4, config)
        program = offload.program(Point("lru", 2), CostModel(offload.machine.hardware))
        world.preload(contents(program))
        in_time(lambda program=program, world=world: run_torch(program, world))
        kept.append(contents(program))
        assert all(world.slot_holds(slot, key) for slot, key in kept[-1].items())
    assert kept[0] == kept[1]
    in_memory = OffloadWorld(offload.model, 4, WorldConfig("cpu", "float32", None, 64, offload.chunks)).pool
    assert (tmp_path / "experts.bin").read_bytes() == in_memory.numpy().tobytes()
    with pytest.raises(InputError, match="cannot keep the experts here"):
        OffloadWorld(offload.model, 4, WorldConfig("cpu", "float32", None, 64, 3, pool_file=str(tmp_path / "no" / "x")))


def test_published_rules_run_for_real() -> None:
    """A layer scheduler's graph has a kernel for every task, and its slots hold what the plan says."""
    offload = small_case()
    for point in (Point("mrs", 2, miss="hybrimoe"), Point("lru", 2, miss="dali"), Point("lru", 2, "hobbit", 2)):
        world = world_of(offload, 4)
        program = offload.program(point, CostModel(offload.machine.hardware))
        world.preload(contents(program))
        measured = in_time(lambda program=program, world=world: run_torch(program, world))
        assert isinstance(measured, pd.DataFrame)
        assert (measured["state"] == DONE).any()
        held = {slot: key for slot, key in contents(program).items() if program.transfers.has_arrived(key)}
        assert all(world.slot_holds(slot, key) for slot, key in held.items())
