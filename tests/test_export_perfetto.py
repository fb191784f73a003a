"""Timelines: the Trace Event format, its nesting rule, and that every task of the result is in it."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.export.perfetto import lane_slices, natural_key, timeline, write_timeline
from moesim.lowering.graph import ExecutorView, Resource, TaskGraph
from moesim.simulate.result import CANCELLED, DONE, SimulationResult, task_table
from moesim.simulate.simpy_executor import run_simpy

RESOURCES = (Resource("gpu0.compute", "gpu0", "compute"), Resource("pcie0", "gpu0", "HtoD"),
             Resource("cpu0", "node0", "cpu experts", capacity=3))
FIELDS = {  # what each phase must carry, by the Trace Event format
    "X": {"name", "cat", "ph", "pid", "tid", "ts", "dur", "args"},
    "M": {"name", "ph", "pid", "tid", "args"},
    "C": {"name", "ph", "pid", "tid", "ts", "args"},
    "s": {"name", "cat", "ph", "pid", "tid", "ts", "id"},
    "f": {"name", "cat", "ph", "pid", "tid", "ts", "id", "bp"},
}


def validate(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Check a Trace Event document by the format's rules; return its events by phase."""
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["displayTimeUnit"] in ("ms", "ns")
    events: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in document["traceEvents"]:
        assert set(event) == FIELDS[event["ph"]], event
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        for key in ("ts", "dur"):
            if key in event:
                assert isinstance(event[key], float)
                assert event[key] >= 0
        events[event["ph"]].append(event)
    _check_metadata(events)
    _check_nesting(events["X"])
    _check_arrows(events)
    return events


def _check_metadata(events: dict[str, list[dict[str, Any]]]) -> None:
    named = defaultdict(list)
    for event in events["M"]:
        value = event["args"]["sort_index" if event["name"].endswith("sort_index") else "name"]
        assert isinstance(value, int if event["name"].endswith("sort_index") else str)
        named[event["name"]].append((event["pid"], event["tid"]))
    assert len(set(named["thread_name"])) == len(named["thread_name"])
    assert len({pid for pid, _ in named["process_name"]}) == len(named["process_name"])
    for event in events["X"]:
        assert (event["pid"], event["tid"]) in named["thread_name"]
        assert (event["pid"], event["tid"]) in named["thread_sort_index"]
        assert (event["pid"], 0) in named["process_name"]
        assert (event["pid"], 0) in named["process_sort_index"]


def _check_nesting(slices: list[dict[str, Any]]) -> None:
    threads = defaultdict(list)
    for event in slices:
        threads[event["pid"], event["tid"]].append((round(event["ts"] * 1000), -round(event["dur"] * 1000)))
    for spans in threads.values():
        open_ends: list[int] = []
        for start, negative in sorted(spans):
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or start - negative <= open_ends[-1], "slices overlap in part"
            open_ends.append(start - negative)


def _check_arrows(events: dict[str, list[dict[str, Any]]]) -> None:
    starts = {event["id"]: event for event in events["s"]}
    ends = {event["id"]: event for event in events["f"]}
    assert starts.keys() == ends.keys()
    assert len(starts) == len(events["s"]) == len(events["f"])
    for name, start in starts.items():
        assert start["ts"] <= ends[name]["ts"]
        for end in (start, ends[name]):
            assert any(one["pid"] == end["pid"] and one["tid"] == end["tid"]
                       and one["ts"] <= end["ts"] < one["ts"] + one["dur"] for one in events["X"])


def hand_made(offset_ns: int = 0) -> SimulationResult:
    """Seven tasks by hand: a barrier, a cancelled prefetch, a load, two experts, two on the host."""
    graph = TaskGraph(RESOURCES)
    graph.add("attention", 0, 1500, step=0, layer=2, tokens=4, source="measured")
    graph.barrier([0], step=0, layer=2)
    graph.add("load", 1, 3000, (0,), step=0, layer=2, expert=17, num_bytes=88_080_384, source="nameplate")
    graph.add("prefetch", 1, 3000, (0,), step=0, layer=3, expert=5)
    graph.add("expert", 0, 700, (2,), step=0, layer=2, expert=17, tokens=3)
    graph.add("cpu_expert", 2, 2000, (0,), step=0, layer=2, expert=1)
    graph.add("cpu_expert", 2, 2500, (0,), step=0, layer=2, expert=9)
    ready = np.array([0, 1500, 1500, 1500, 4500, 1500, 1500])
    start = np.array([0, 1500, 1500, -1, 4600, 1500, 2000])
    end = np.array([1500, 1500, 4500, -1, 5300, 3500, 4500])
    state = np.array([DONE, DONE, DONE, CANCELLED, DONE, DONE, DONE])
    done = state == DONE
    times = (np.where(done, column + offset_ns, column) for column in (ready, start, end))
    tasks = task_table(graph, *times, np.zeros(7, np.int64), state)
    steps = pd.DataFrame({"step": [0], "phase": ["decode"], "tokens": [4],
                          "start_ns": [offset_ns], "end_ns": [5300 + offset_ns]})
    return SimulationResult("by hand", {}, {"tasks": tasks, "steps": steps})


class RandomProgram:
    """Loads, experts on the device and on a host of three lanes, in random sizes."""

    def __init__(self, seed: int, num_layers: int) -> None:
        self.graph = TaskGraph(RESOURCES)
        self._rng, self._num_layers = np.random.default_rng(seed), num_layers

    def _ns(self) -> int:
        return int(self._rng.integers(1, 5000))

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Layer after layer; prefetches that have not started when the router is done are cancelled."""
        graph, last = self.graph, ()
        for layer in range(self._num_layers):
            router = graph.add("router", 0, self._ns(), last, step=0, layer=layer)
            prefetches = [graph.add("prefetch", 1, self._ns(), last, priority=2, step=0, layer=layer,
                                    expert=expert) for expert in (0, 7, 8)]
            yield router
            for prefetch in prefetches:
                if not view.is_started(prefetch):
                    view.cancel(prefetch)
            ends = [self._expert(router, layer, expert) for expert in range(6)]
            last = (graph.barrier(ends, step=0, layer=layer),)
            yield last[0]

    def _expert(self, router: int, layer: int, expert: int) -> int:
        label = {"step": 0, "layer": layer, "expert": expert}
        if self._rng.random() < 0.5:
            return self.graph.add("cpu_expert", 2, self._ns(), (router,), **label)
        load = self.graph.add("load", 1, self._ns(), (router,), num_bytes=100, **label)
        return self.graph.add("expert", 0, self._ns(), (load,), tokens=1, **label)


def generated(seed: int, num_layers: int = 4) -> SimulationResult:
    """A result of the reference executor."""
    return SimulationResult(f"generated-{seed}", {}, {"tasks": run_simpy(RandomProgram(seed, num_layers))})


def test_hand_made_timeline_has_every_slice_with_its_time_and_labels() -> None:
    """The five tasks that took time are slices in microseconds; barrier and cancelled prefetch are not."""
    events = validate(timeline(hand_made()))
    tasks = {event["name"]: event for event in events["X"] if event["cat"] != "step"}
    assert sorted(tasks) == ["attention L2", "cpu_expert L2 E1", "cpu_expert L2 E9", "expert L2 E17",
                             "load L2 E17"]
    load = tasks["load L2 E17"]
    assert (load["ts"], load["dur"], load["cat"]) == (1.5, 3.0, "load")
    assert load["args"] == {"task": 2, "step": 0, "layer": 2, "expert": 17, "bytes": 88_080_384,
                            "source": "nameplate"}
    assert tasks["attention L2"]["args"]["tokens"] == 4
    assert [event["dur"] for event in events["X"] if event["cat"] == "step"] == [5.3]


def test_two_tasks_at_once_on_one_resource_get_two_threads() -> None:
    """A resource of several lanes becomes threads '#1' and '#2'; the others keep their lane's name."""
    events = validate(timeline(hand_made()))
    names = [event["args"]["name"] for event in events["M"] if event["name"] == "thread_name"]
    assert names == ["forward passes", "HtoD", "compute", "cpu experts #1", "cpu experts #2"]


def test_load_points_to_its_expert() -> None:
    """The arrow starts on the load's thread and ends on the first slice of the same expert."""
    events = validate(timeline(hand_made()))
    assert [(event["ts"]) for event in events["s"]] == [1.5]
    assert [(event["ts"], event["bp"]) for event in events["f"]] == [(4.6, "e")]


def test_counter_of_waiting_tasks() -> None:
    """The expert waits from 4.5 to 4.6 us on gpu0, a host expert from 1.5 to 2.0 us on node0."""
    counts = [(event["ts"], event["args"]["tasks"]) for event in validate(timeline(hand_made()))["C"]]
    assert sorted(counts) == [(1.5, 1), (2.0, 0), (4.5, 1), (4.6, 0)]


def test_overlay_is_named_measured_and_starts_with_the_run() -> None:
    """A real run with another clock lies under 'measured: ...', beside 'predicted: ...', and starts at the same time."""
    document = timeline(hand_made(), overlay=hand_made(offset_ns=987_654_321))
    events = validate(document)
    names = {event["pid"]: event["args"]["name"] for event in events["M"] if event["name"] == "process_name"}
    groups = ["gpu0", "node0", "steps"]
    assert sorted(names.values()) == [f"{run}: {group}" for run in ("measured", "predicted") for group in groups]
    spans = defaultdict(set)
    for event in events["X"]:
        spans[names[event["pid"]].partition(": ")[2]].add((event["name"], event["ts"], event["dur"]))
    assert len(events["X"]) == 12
    assert sum(map(len, spans.values())) == 6
    assert document["otherData"]["overlay_makespan_ns"] == 5300


def slower(result: SimulationResult, factor: int) -> SimulationResult:
    """The same tasks, each `factor` times as long and as late, with ids of their own in reverse order."""
    tasks = result.tasks.copy()
    for column in ("ready_ns", "start_ns", "end_ns", "duration_ns"):
        tasks[column] = tasks[column].where(tasks["state"] == CANCELLED, tasks[column] * factor)
    return SimulationResult("slower", {}, {"tasks": tasks.assign(task=tasks["task"].max() - tasks["task"])})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_slice_tells_its_partner_and_the_sums_are_those_of_the_tables(seed: int) -> None:
    """Of a run and the same run three times slower, every slice has its partner: a third of the time, an error of -2/3."""
    run = generated(seed)
    real = slower(run, 3)
    document = timeline(run, overlay=real)
    events = validate(document)
    names = {event["pid"]: event["args"]["name"] for event in events["M"] if event["name"] == "process_name"}
    lanes = {(names[event["pid"]], event["args"]["name"]) for event in events["M"] if event["name"] == "thread_name"}
    assert {(name.partition(": ")[2], lane) for name, lane in lanes if name.startswith("predicted")} \
        == {(name.partition(": ")[2], lane) for name, lane in lanes if name.startswith("measured")}
    for event in events["X"]:
        seen, told = ("measured_us", 3) if names[event["pid"]].startswith("predicted") else ("predicted_us", 1 / 3)
        assert event["args"][seen] == pytest.approx(event["dur"] * told)
        assert event["args"]["error"] == pytest.approx(-2 / 3)
    done = run.tasks[(run.tasks["state"] == DONE) & (run.tasks["resource"] != "")]
    other = document["otherData"]
    assert (other["paired"], other["only_predicted"], other["only_measured"]) == (len(done), 0, 0)
    by_kind = done.groupby("kind")["duration_ns"].sum()
    assert other["paired_ns_by_kind"] == {kind: [ns, 3 * ns] for kind, ns in by_kind.items()}


def test_a_slice_without_a_partner_tells_none() -> None:
    """A load that only the prediction has, and two tasks of one key, of which the real run did one: the first."""
    predicted = hand_made()
    tasks = predicted.tasks
    same = tasks.assign(expert=tasks["expert"].where(tasks["kind"] != "cpu_expert", 1))
    real = same[(same["kind"] != "load") & (same["task"] != 6)].assign(duration_ns=lambda frame: frame["duration_ns"])
    document = timeline(SimulationResult("p", {}, {"tasks": same}), overlay=SimulationResult("m", {}, {"tasks": real}))
    events = validate(document)
    assert (document["otherData"]["paired"], document["otherData"]["only_predicted"]) == (3, 2)
    assert document["otherData"]["only_measured"] == 0
    alone = [event["args"]["task"] for event in events["X"] if "error" not in event["args"]]
    assert sorted(alone) == [2, 6]


@pytest.mark.parametrize("seed", [0, 1])
def test_generated_timeline_is_valid_and_whole(seed: int) -> None:
    """Every task of a simulated run that took time is there, and the slices' times add up to the tasks'."""
    result = generated(seed, num_layers=12)
    events = validate(timeline(result, overlay=generated(seed + 10)))
    tasks = result.tasks[(result.tasks["state"] == DONE) & (result.tasks["resource"] != "")]
    assert (result.tasks["state"] == CANCELLED).any()
    names = {event["pid"]: event["args"]["name"] for event in events["M"] if event["name"] == "process_name"}
    mine = [event for event in events["X"] if names[event["pid"]].startswith("predicted")]
    assert sorted(event["args"]["task"] for event in mine) == sorted(tasks["task"])
    assert sum(round(event["dur"] * 1000) for event in mine) == tasks["duration_ns"].sum()
    assert events["s"], "the run has loads that landed before their expert"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), min_size=1, max_size=25))
def test_rows_are_as_few_as_tasks_at_once_and_never_overlap(spans: list[tuple[int, int]]) -> None:
    """For any intervals on one resource there are as many rows as run at one instant (counted by force)."""
    graph = TaskGraph(RESOURCES)
    for _, length in spans:
        graph.add("cpu_expert", 2, length)
    start = np.array([begin for begin, _ in spans])
    end = np.array([begin + length for begin, length in spans])
    zero = np.zeros(len(spans), np.int64)
    tasks = task_table(graph, start, start, end, zero, zero)
    slices = lane_slices(SimulationResult("x", {}, {"tasks": tasks}))
    most = max(int(((start <= now) & (now < end)).sum()) for now in range(100))
    assert slices["row"].max() + 1 == most
    for _, row in slices.groupby("row"):
        assert (row["start_ns"].to_numpy()[1:] >= row["end_ns"].to_numpy()[:-1]).all()


def test_lanes_of_one_name_are_told_apart_by_resource() -> None:
    """Two resources that share a lane's name in a group are threads under their own names."""
    result = hand_made()
    tasks = result.tasks.assign(lane="engine")
    names = set(lane_slices(SimulationResult("x", {}, {"tasks": tasks}))["label"])
    assert names == {"gpu0.compute", "pcie0", "engine #1", "engine #2"}


def test_groups_are_in_natural_order() -> None:
    """gpu2 comes before gpu10, and names that start with a digit or a letter compare."""
    names = ["gpu10", "gpu2", "10gpu", "node0", "", "gpu"]
    assert sorted(names, key=natural_key) == ["", "10gpu", "gpu", "gpu2", "gpu10", "node0"]


def test_file_and_compressed_file_hold_the_same_and_repeat_exactly(tmp_path: Path) -> None:
    """Both forms decode to the timeline, and writing twice gives the same bytes."""
    result = generated(3)
    plain = write_timeline(result, tmp_path / "a.json", hand_made())
    packed = [write_timeline(result, tmp_path / name, hand_made()) for name in ("b.json.gz", "c.json.gz")]
    assert json.loads(plain.read_text()) == timeline(result, overlay=hand_made())
    assert gzip.decompress(packed[0].read_bytes()) == plain.read_bytes()
    assert packed[0].read_bytes() == packed[1].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json.gz", "c.json.gz"]


def test_the_result_is_left_as_it_was() -> None:
    """Making a timeline changes nothing in the result's tables."""
    result = hand_made()
    before = result.tasks.copy(deep=True)
    timeline(result, overlay=result)
    pd.testing.assert_frame_equal(result.tasks, before)


def test_wrong_suffix_is_refused(tmp_path: Path) -> None:
    """A file that Perfetto would not take for JSON is an error that names the suffixes."""
    with pytest.raises(InputError, match=r"trace.txt.*ends in \.json or \.json\.gz"):
        write_timeline(hand_made(), tmp_path / "trace.txt")
    assert not list(tmp_path.iterdir())


def test_missing_column_is_named_with_a_suggestion() -> None:
    """A task table without start_ns says so and points to the nearest column."""
    tasks = hand_made().tasks.rename(columns={"start_ns": "start"})
    with pytest.raises(InputError, match=r"'by hand'.*lacks the column 'start_ns'. Did you mean 'start'"):
        timeline(SimulationResult("by hand", {}, {"tasks": tasks}))


def test_nothing_to_draw_is_an_error() -> None:
    """A result in which all tasks were cancelled has no timeline."""
    tasks = hand_made().tasks.assign(state=CANCELLED)
    with pytest.raises(InputError, match="no task took time on a resource"):
        timeline(SimulationResult("x", {}, {"tasks": tasks}))
