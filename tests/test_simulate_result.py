"""Results on disk, and the tables and rates that are derived from a task table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moesim.errors import CheckError, InputError
from moesim.lowering.batch import StepRecord
from moesim.lowering.graph import ExecutorView, Resource, TaskGraph
from moesim.simulate.result import SimulationResult, read_result
from moesim.simulate.run import simulate
from moesim.simulate.simpy_executor import execute_simpy, run_simpy
from moesim.simulate.study import StudyResult, read_study
from moesim.traces.steps import Step
from moesim.traces.trace import DECODE, PREFILL, RoutingTrace


@dataclasses.dataclass
class Stepped:
    """A program of one kernel per step, of given lengths, with a copy beside the first."""

    trace: RoutingTrace
    steps: list[StepRecord]
    lengths_ns: list[int]
    graph: TaskGraph

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """One kernel after the other."""
        before: list[int] = []
        for record, length in zip(self.steps, self.lengths_ns, strict=True):
            record.last_task = self.graph.add("attention", 0, length, before, step=record.step.index, source="measured")
            before = [record.last_task]
        self.graph.add("load", 1, 7, num_bytes=70, source="nameplate")
        self.graph.add("load", 1, 5, num_bytes=50, source="nameplate")
        yield before[0]


def closed_loop() -> Stepped:
    """Prefill of 1, 2 (10 ns), a decode step of both (20), prefill of 3 (5), two decode steps (30, 40) of 1, 3."""
    requests = [[1, 1, 2], [1, 2], [3], [1, 3], [1, 3]]
    phases = ["prefill", "decode", "prefill", "decode", "decode"]
    steps = [StepRecord(Step(n, phase, np.arange(len(ids)), np.array(ids, dtype=np.int32)), len(ids))
             for n, (ids, phase) in enumerate(zip(requests, phases, strict=True))]
    trace = RoutingTrace(
        expert_ids=np.zeros((2, 1, 1), int), request_id=np.zeros(2, int), position=np.arange(2),
        phase=np.array([PREFILL, DECODE]), step=np.arange(2), num_experts=1, layer_ids=np.arange(1))
    resources = (Resource("gpu.compute", "gpu", "compute"), Resource("pcie.in", "gpu", "pcie in"))
    return Stepped(trace, steps, [10, 20, 5, 30, 40], TaskGraph(resources))


def test_the_request_table_of_a_small_loop_is_as_by_hand() -> None:
    """First token at the end of the prefill, then one per decode step; waiting while another prompt runs counts."""
    table = simulate(closed_loop()).tables["requests"].set_index("request_id")
    assert table["ttft_ns"].to_dict() == {1: 10, 2: 10, 3: 5}
    assert table["e2e_ns"].to_dict() == {1: 105, 2: 30, 3: 75}
    assert table["output_tokens"].to_dict() == {1: 4, 2: 2, 3: 3}
    assert table["tpot_ns"].to_dict() == {1: 95 / 3, 2: 20.0, 3: 35.0}


def test_a_request_that_enters_at_its_first_decode_has_that_step_as_first_token() -> None:
    """Without prefill rows, TTFT is the first decode step; a single token has no time per further token."""
    program = closed_loop()
    program.steps, program.lengths_ns = program.steps[1:2], [20]
    table = simulate(program).tables["requests"]
    assert table["ttft_ns"].tolist() == table["e2e_ns"].tolist() == [20, 20]
    assert table["output_tokens"].tolist() == [1, 1]
    assert table["tpot_ns"].isna().all()


def test_steps_and_rates_are_sums_over_the_steps_after_the_warm_up() -> None:
    """105 ns and 10 tokens in 5 steps; after two steps of warm-up 75 ns and 5 tokens in 3 steps, 2 of them decode."""
    result = simulate(closed_loop())
    assert result.tables["steps"]["start_ns"].tolist() == [0, 10, 30, 35, 65]
    assert result.tables["steps"]["requests"].tolist() == [2, 2, 1, 2, 2]
    assert result.summary["tokens_per_s"] == pytest.approx(10 / 105e-9)
    assert result.summary["step_time_s"] == pytest.approx(21e-9)
    late = simulate(closed_loop(), warmup_steps=2).summary
    assert late["tokens_per_s"] == pytest.approx(5 / 75e-9)
    assert (late["num_steps"], late["decode_step_time_s"]) == (3, pytest.approx(35e-9))
    assert late["makespan_s"] == result.makespan_ns / 1e9 == pytest.approx(105e-9)


def test_a_warm_up_of_every_step_leaves_nothing_to_report() -> None:
    """Rates over no step are an error with both numbers, not a division by zero."""
    with pytest.raises(InputError, match="warmup_steps 5 leaves none of the 5 steps"):
        simulate(closed_loop(), warmup_steps=5)


def test_transfers_sources_and_bounds_are_counted() -> None:
    """Two copies of 120 bytes in 12 ns; five measured kernels and two nameplate copies; compute bounds everything."""
    result = simulate(closed_loop())
    assert result.tables["transfers"].to_dict("records") == [
        {"resource": "pcie.in", "kind": "load", "num_transfers": 2, "num_bytes": 120, "busy_ns": 12}]
    assert result.summary["cost_sources"] == {"measured": 5, "nameplate": 2}
    assert result.summary["bound_by"] == {"gpu.compute": 1.0}
    assert (result.summary["num_tasks"], result.summary["num_cancelled"]) == (7, 0)


def requests_one_by_one(program: Stepped, steps: pd.DataFrame) -> list[tuple[int, int, int, float, int]]:
    """The request table in plain Python, one step and request at a time."""
    seen: dict[int, list[int]] = {}
    for record, start, end in zip(program.steps, steps["start_ns"], steps["end_ns"], strict=True):
        for request in sorted(set(record.step.requests.tolist())):
            entry = seen.setdefault(request, [int(start), int(end), int(end), 0])
            if record.step.phase == "prefill":
                entry[1], entry[3] = int(end), 1
            else:
                entry[3] += 1
            entry[2] = int(end)
    return [(request, output, first - start, (last - first) / (output - 1) if output > 1 else np.nan, last - start)
            for request, (start, first, last, output) in seen.items()]


def test_requests_of_random_loops_are_counted_as_one_by_one() -> None:
    """Prompts in pieces, prompts after decoding, requests that come and go, in order of admission."""
    for seed in range(30):
        rng, program = np.random.default_rng(seed), closed_loop()
        program.lengths_ns = rng.integers(1, 1000, 12).tolist()
        program.steps = [
            StepRecord(Step(n, ("prefill", "decode")[rng.integers(2)], np.arange(len(ids)), ids.astype(np.int32)), len(ids))
            for n, ids in enumerate(rng.integers(5, 9, rng.integers(1, 6)) for _ in range(12))]
        result = simulate(program)
        expected = pd.DataFrame(requests_one_by_one(program, result.tables["steps"]),
                                columns=["request_id", "output_tokens", "ttft_ns", "tpot_ns", "e2e_ns"])
        pd.testing.assert_frame_equal(result.tables["requests"], expected, check_exact=True)


def test_everything_is_derived_from_the_execution_and_not_from_the_graph() -> None:
    """An engine of its own may leave the program's graph empty; the result is that of SimPy."""
    expected, program = simulate(closed_loop()), closed_loop()
    whole = execute_simpy(program)
    program.graph = TaskGraph(program.graph.resources)
    result = simulate(program, executor=lambda _: whole)
    assert len(program.graph) == 0
    assert result.summary == expected.summary
    for name, table in expected.tables.items():
        pd.testing.assert_frame_equal(result.tables[name], table)


def test_an_executor_may_make_the_task_table_itself() -> None:
    """A table beside the program's graph gives the same result, and is the very table of the result."""
    expected, made = simulate(closed_loop()), []
    result = simulate(closed_loop(), executor=lambda program: made.append(run_simpy(program)) or made[0])
    assert result.tasks is made[0]
    assert result.summary == expected.summary
    for name, table in expected.tables.items():
        pd.testing.assert_frame_equal(result.tables[name], table)


def test_the_task_table_says_what_the_graph_says() -> None:
    """Column by column: names of kinds, resources, lanes, groups and sources; a barrier has none of the last four."""
    program = closed_loop()
    program.graph.barrier([], step=4)
    program.graph.add("other", 1, 3, source="guess", flops=2.5, tokens=7)
    execution = execute_simpy(program)
    table, graph = execution.table(), program.graph
    resources = [graph.resources[place] if place >= 0 else Resource("", "", "") for place in graph.resource]
    assert table["kind"].tolist() == graph.kind
    assert table["source"].tolist() == graph.source
    assert table["flops"].tolist() == graph.flops
    for column, attribute in (("resource", "name"), ("lane", "lane"), ("group", "group")):
        assert table[column].tolist() == [getattr(resource, attribute) for resource in resources]
        assert table[column].dtype == pd.Series(["text"]).dtype
    for name, values in graph.labels.items():
        assert table[name].tolist() == values
    assert table["task"].tolist() == list(range(len(graph)))
    assert table["duration_ns"].tolist() == graph.duration_ns
    assert (table["state"].dtype, table["start_ns"].dtype) == (np.int8, np.int64)


def test_an_execution_checks_and_guards_its_columns() -> None:
    """A column of another length is named; what is handed out cannot be written."""
    execution = execute_simpy(closed_loop())
    with pytest.raises(CheckError, match=r"state has shape \(3,\) for 7 tasks"):
        dataclasses.replace(execution, state=execution.state[:3])
    with pytest.raises(ValueError, match="read-only"):
        execution.start_ns[0] = 1


# ---------------------------------------------------------------- on disk


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """Every table with its types, summary, name and provenance; writing again replaces the whole."""
    result = simulate(closed_loop(), name="loop", provenance={"seed": 3})
    path = result.write(tmp_path / "a.result")
    again = read_result(path)
    assert (again.name, again.summary, again.provenance) == ("loop", result.summary, {"seed": 3})
    assert set(again.tables) == set(result.tables)
    for name, table in result.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], table, check_dtype=name != "tasks")
    assert (again.tasks["start_ns"].dtype, again.makespan_ns) == (np.int64, 105)
    dataclasses.replace(result, tables={"tasks": result.tasks}).write(path)
    assert set(read_result(path).tables) == {"tasks"}


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    """A table that cannot be written: the old result stays whole, and nothing else is left in the folder."""
    result = simulate(closed_loop(), name="old")
    path = result.write(tmp_path / "a.result")
    broken = dataclasses.replace(result, name="new", tables=result.tables | {"layers": pd.DataFrame({"x": [object()]})})
    with pytest.raises(Exception, match="object"):
        broken.write(path)
    with pytest.raises(Exception, match="object"):
        broken.write(tmp_path / "b.result")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.result"]
    assert read_result(path).name == "old"


def test_folders_that_are_no_result_are_named(tmp_path: Path) -> None:
    """Missing, empty, without tasks, or of another schema."""
    path = simulate(closed_loop()).write(tmp_path / "a.result")
    with pytest.raises(InputError, match=r"b.result: no such result folder"):
        read_result(tmp_path / "b.result")
    (tmp_path / "empty.result").mkdir()
    with pytest.raises(InputError, match=r"summary.json"):
        read_result(tmp_path / "empty.result")
    (path / "tasks.parquet").unlink()
    with pytest.raises(InputError, match=r"the table tasks.parquet is missing"):
        read_result(path)
    (path / "summary.json").write_text(json.dumps({"schema": "moesim.plan/1"}))
    with pytest.raises(InputError, match=r"expected a 'moesim.result/1' file, found schema 'moesim.plan/1'"):
        read_result(path)


@pytest.mark.parametrize("body", ["not parquet", ""])
def test_a_damaged_table_is_an_input_error(tmp_path: Path, body: str) -> None:
    """A table that is not Parquet is named, without a traceback."""
    path = simulate(closed_loop()).write(tmp_path / "a.result")
    (path / "tasks.parquet").write_text(body)
    with pytest.raises(InputError, match=r"a.result.*tasks"):
        read_result(path)


@pytest.mark.parametrize("missing", ["name", "summary", "provenance"])
def test_a_result_without_one_of_its_keys_is_an_input_error(tmp_path: Path, missing: str) -> None:
    """The key that is not there is named."""
    path = simulate(closed_loop()).write(tmp_path / "a.result")
    head = json.loads((path / "summary.json").read_text())
    del head[missing]
    (path / "summary.json").write_text(json.dumps(head))
    with pytest.raises(InputError, match=rf"a.result.*{missing}"):
        read_result(path)


def test_a_study_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    """Numbers, text, a missing number, notes and provenance survive; NaN is written as null."""
    table = pd.DataFrame({"policy": ["lru", "lfu"], "tpot_s": [0.25, np.nan], "slots_per_layer": [2, 4]})
    study = StudyResult("s", "offload", "A title", table, ("one", "two"), {"seed": 1})
    again = read_study(study.write(tmp_path / "s.study.json"))
    assert (again.name, again.kind, again.title, again.notes) == ("s", "offload", "A title", ("one", "two"))
    assert again.table.columns.tolist() == table.columns.tolist()
    assert again.table["slots_per_layer"].tolist() == [2, 4]
    assert again.table["tpot_s"][0] == 0.25
    assert pd.isna(again.table["tpot_s"][1])
    assert again.provenance == {"seed": 1}


def test_a_file_that_is_no_study_is_named(tmp_path: Path) -> None:
    """A missing key, and another schema."""
    path = tmp_path / "x.study.json"
    path.write_text(json.dumps({"schema": "moesim.study/1", "rows": []}))
    with pytest.raises(InputError, match=r"x.study.json: not a study: KeyError\('columns'\)"):
        read_study(path)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"expected a 'moesim.study/1' file, found schema None"):
        read_study(path)


def test_an_empty_result_has_no_makespan() -> None:
    """No task, no time."""
    tasks = simulate(closed_loop()).tasks.iloc[:0]
    assert SimulationResult("none", {}, {"tasks": tasks}).makespan_ns == 0
