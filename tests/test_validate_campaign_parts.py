"""Parts of a campaign: shares of schedules, tables mixed by them, factors, ends of runs, kernels for real, the resumed command."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import CheckError
from moesim.hardware.cost import CostModel
from moesim.lowering.graph import Resource, TaskGraph
from moesim.lowering.machine import OffloadMachine
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point
from moesim.simulate.result import CANCELLED, DONE
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.units import s_from_ns
from moesim.validate.campaign import path_seconds, until_last_step
from moesim.validate.campaign_kernels import kernel_outcomes
from moesim.validate.campaign_probe import ALONE, FEW_TASKS, SideBlock, run_factors, side_shares, side_tables, two_sided
from moesim.validate.campaign_report import Outcome
from moesim.validate.local import local_machine
from moesim.validate.probe import Samples
from moesim.validate.report import EXECUTOR

MODEL = ModelSpec("tiny", 2, (0, 1), 6, 2, 64, 96, AttentionSpec(2, 1, 32), 128, weight_bytes=4.0, other_weight_bytes=4.0,
                  activation_bytes=4.0)
MACHINE = two_sided(local_machine("cpu", None))
FACTOR = 3.0
COPIES, CPU = frozenset({"copies"}), frozenset({"cpu"})


# ---------------------------------------------------------------- shares of schedules, and tables


def table_of(rows: list[tuple[str, int, int, int]], machine: OffloadMachine = MACHINE) -> pd.DataFrame:
    """A task table of (kind, resource, start, end)."""
    names = [resource.name for resource in machine.resources()]
    kinds, resources, starts, ends = zip(*rows, strict=True)
    return pd.DataFrame({"kind": kinds, "resource": [names[place] for place in resources], "start_ns": starts, "end_ns": ends,
                         "duration_ns": np.subtract(ends, starts), "state": DONE})


spans = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(compute=spans, cpu=spans, copies=spans)
def test_shares_are_those_of_every_nanosecond(compute: list[tuple[int, int]], cpu: list[tuple[int, int]],
                                              copies: list[tuple[int, int]]) -> None:
    """Against counting instant by instant."""
    place = {"expert": MACHINE.compute_index, "cpu_expert": MACHINE.cpu_index, "load": MACHINE.route_indexes[-1]}
    side, of = {"expert": "compute", "cpu_expert": "cpu", "load": "copies"}, {"expert": compute, "cpu_expert": cpu, "load": copies}
    found = side_shares(table_of([(kind, place[kind], a, a + b) for kind, own in of.items() for a, b in own]), MACHINE)
    busy = {side[kind]: {now for a, b in own for now in range(a, a + b)} for kind, own in of.items()}
    for kind, own in of.items():
        seen: dict[frozenset[str], int] = {}
        for now in [now for a, b in own for now in range(a, a + b)]:
            state = frozenset(name for name, instants in busy.items() if name != side[kind] and now in instants)
            seen[state] = seen.get(state, 0) + 1
        total = sum(seen.values())
        assert found["copy" if kind == "load" else kind] == pytest.approx({state: count / total for state, count in seen.items()})


def test_tables_mix_what_was_measured_by_the_shares() -> None:
    """Half beside copies, a quarter beside something that was not measured, which counts as alone; a factor on top."""
    alone, beside = Samples(), Samples()
    for kind in ("expert", "cpu_expert"):
        alone.seconds[kind, (1,)] += [1.0, 1.0]
    beside.seconds["expert", (1,)] += [3.0]
    block = SideBlock({ALONE: alone, COPIES: beside})
    tables = {table.device: table for table in
              side_tables(block, {"expert": {ALONE: 0.25, COPIES: 0.5, CPU: 0.25}}, MODEL, MACHINE, {"cpu_expert": 1.5})}
    assert (tables["gpu"].seconds, tables["cpu"].seconds) == ((2.0,), (1.5,))
    both = block.merged(SideBlock({COPIES: beside, CPU: alone}))
    assert both.samples[COPIES].seconds["expert", (1,)] == [3.0, 3.0]
    assert set(both.samples) == {ALONE, COPIES, CPU}


def test_factors_compare_the_same_kinds() -> None:
    """Real over simulated; copies of experts together, activations not at all; few tasks give way to more runs."""
    real = table_of([("load", 2, 0, 30), ("admit", 2, 30, 60), ("expert", 0, 0, 8), ("send", 3, 0, 100)])
    guess = table_of([("prefetch", 2, 0, 20), ("expert", 0, 0, 10), ("send", 3, 0, 1)])
    assert run_factors([(real, guess)]) == pytest.approx({"copy": 1.5, "expert": 0.8})
    shrunk = run_factors([(real, guess)], {"copy": 3.0, "head": 1.2})
    assert shrunk == pytest.approx({"copy": 3.0 * 0.5 ** (2 / (2 + FEW_TASKS)), "expert": 0.8, "head": 1.2})


# ---------------------------------------------------------------- from the first task to the last step


def test_a_path_adds_up() -> None:
    """Waits, and the executor's part of a task, are one kind; all kinds sum to the end to end."""
    graph = TaskGraph((Resource("a", "a", "a"),))
    graph.add("head", 0, 1, (graph.add("expert", 0, 1),))
    start, end = np.array([0, 150]), np.array([100, 200])
    tasks = pd.DataFrame({"ready_ns": start, "start_ns": start, "end_ns": end, "priority": 0, "state": np.int8(DONE)})
    found = path_seconds(graph, tasks, {"expert": s_from_ns(30)})
    assert found == pytest.approx({"expert": s_from_ns(70), "head": s_from_ns(50), EXECUTOR: s_from_ns(80)})
    assert sum(found.values()) == pytest.approx(s_from_ns(200))


def test_copies_after_the_last_step_are_cut_off() -> None:
    """Nothing that ends later than the last step stays done; everything else does."""
    train, test = split_requests(synthetic_trace(120, 2, 6, 2, 6, seed=1), 0.5, 1)
    steps = closed_loop_steps(test, batch_size=1, max_steps=10, include_prefill=False, repeat=True)
    machine = two_sided(local_machine("cpu", 1e3))
    program = Offload(MODEL, train, test, steps, machine, 1).program(Point("lru", 3, miss="cpu"), CostModel(machine.hardware))
    tasks = run_simpy(program)
    end = tasks["end_ns"].iloc[program.steps[-1].last_task]
    cut = until_last_step(program, tasks)
    assert tasks["end_ns"].max() > end == cut.loc[cut["state"] == DONE, "end_ns"].max()
    assert ((cut["state"] == DONE) == ((tasks["state"] == DONE) & (tasks["end_ns"] <= end))).all()
    assert (cut["state"] == CANCELLED).any()
    program.steps[-1].last_task = -1
    with pytest.raises(CheckError, match="did not end"):
        until_last_step(program, tasks)


def test_kernels_for_real() -> None:
    """Two seconds of tiny kernels: sizes held out are predicted within a wide band."""
    pytest.importorskip("torch")
    found = kernel_outcomes(MODEL, dtype="float32", seconds=2.0, number=0, seed=1, device="cpu")
    assert {one.family for one in found} == {"kernels: expert layer float32", "kernels: attention float32"}
    assert 1 / FACTOR < np.median([one.predicted_s / one.measured_s for one in found]) < FACTOR


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/accuracy.py with a part that runs nothing, and one that is not installed."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    for name in ("accuracy", "_accuracy"):
        sys.modules.pop(name, None)
    module, parts = importlib.import_module("accuracy"), importlib.import_module("_accuracy")
    module.ran, module.stop_at, module.guess = [], -1, 2.0  # type: ignore[attr-defined]

    def run(number: int) -> list[Outcome]:
        if number == module.stop_at:
            raise KeyboardInterrupt
        module.ran.append(number)
        return [Outcome("offload: load", "a", number, 1.0, 1.0), Outcome("offload: load", "b", number, module.guess, 2.0)]

    def units(effort: object, number: int) -> list[object]:
        return [parts.Unit("one", lambda: run(number))]

    monkeypatch.setattr(module, "PARTS", (parts.Part("offload", units, ("offload",)),
                                          parts.Part("kernels", units, absent=lambda: "nothing is installed")))
    monkeypatch.setattr(module, "code_version", lambda: "abc")
    return module


def test_the_command_goes_on_where_it_was_stopped(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Finished rounds are not run again; another run's file is refused; the finished file is shown without running."""
    out, partial = tmp_path / "a.json", tmp_path / "a.json.partial"
    command.stop_at = 2
    assert command.main(["-o", str(out)]) == command.INTERRUPTED
    assert (command.ran, partial.exists(), out.exists()) == ([0, 1], True, False)
    assert command.main(["--quick", "-o", str(out)]) == 2
    assert "quick was False and is True" in capsys.readouterr().err
    command.stop_at = -1
    assert command.main(["--check", "-o", str(out)]) == 0
    assert (command.ran, partial.exists(), out.exists()) == ([0, 1, 2], False, True)
    first = capsys.readouterr().out
    assert "| offload: load | 2 | 6 | **0.0 %** |" in first
    assert "Not run: kernels: nothing is installed." in first
    assert first.endswith("Every target met.\n")
    assert command.main(["--show", str(out)]) == 0
    assert capsys.readouterr().out == first
    assert command.ran == [0, 1, 2]


def test_the_command_says_what_was_missed(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 1 with --check, 0 without; a wrong order is a target, too."""
    command.guess = 0.5
    assert command.main(["-o", str(tmp_path / "a.json")]) == 0
    assert command.main(["--check", "-o", str(tmp_path / "a.json")]) == 1
    assert ("Missed: offload: load: median error; offload: load: 95th percentile; offload: load: Kendall's tau of the order."
            in capsys.readouterr().out)


def test_the_whole_grid_is_there(command: ModuleType) -> None:
    """48 cases and two published systems, 16 and two with --quick; every family has its target."""
    del command
    parts = sys.modules["_accuracy"]
    full, quick = parts.points(parts.FULL), parts.points(parts.QUICK)
    assert (len(full), len(quick)) == (50, 18)
    assert {point.miss for point in full.values()} == {"load", "cpu", "fiddler", "hybrimoe"}
    families = ("offload: load", "offload: cpu", "kernels: attention float32", "diffusion: refresh intervals",
                "expert parallel: 2 ranks", "aiconfigurator: other shape, a from b")
    assert [parts.target_of(family).median for family in families] == [0.02, 0.04, 0.04, 0.04, 0.02, 0.1]
