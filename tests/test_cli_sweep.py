"""``moesim sweep`` and ``moesim compile``: rows equal single runs, an interrupted sweep goes on, errors name their key."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import call, call_json
from typer.testing import CliRunner

import moesim.scenario.sweep as sweep_module
from moesim.cli import app
from moesim.hardware.cost import CostModel
from moesim.hardware.vary import vary
from moesim.scenario.expert_parallel import ExpertParallelSetup
from moesim.scenario.inputs import load_inputs
from moesim.scenario.load import load_scenario
from moesim.scenario.offload import OffloadSetup
from moesim.scenario.schema import ExpertParallelStudy, OffloadStudy
from moesim.scenario.sweep import make_sweep, run_sweep
from moesim.scenario.sweep_axes import parse_axis
from moesim.scenario.sweep_store import read_sweep
from moesim.simulate.run import simulate
from moesim.simulate.simpy_executor import execute_simpy

POINTS = "      - {policy: [lru, static], slots_per_layer: [2, 4]}\n"
MORE_POINTS = POINTS + """\
      - {policy: [lru, lfu], slots_per_layer: 3, prefetch: [popularity, oracle], prefetch_width: 2}
      - {policy: [lru, static, belady], slots_per_layer: 3, miss: [cpu, faster]}
"""


@pytest.fixture
def scenario(folder: Path) -> Path:
    """The tiny scenario with points that look at the clock and points that do not."""
    text = (folder / "tiny.yaml").read_text()
    assert POINTS in text
    path = folder / "sweep.yaml"
    path.write_text(text.replace(POINTS, MORE_POINTS))
    return path


def test_rows_are_what_single_simulations_give(scenario: Path) -> None:
    """Every point on every machine, against SimPy one at a time on hardware with the same numbers."""
    loaded = load_scenario(scenario)
    study = loaded.study("one-gpu")
    assert isinstance(study, OffloadStudy)
    axes = [parse_axis("pcie.bytes_per_s=1e9,2e10"), parse_axis("gpu.kernel_overhead_s=0,1e-5")]
    rows = read_sweep(run_sweep(make_sweep(loaded, "one-gpu", axes), "a.sweep").path)
    setup = OffloadSetup(load_inputs(loaded), study)
    assert len(rows) == len(study.expand()) * 4
    expected = []
    for point in study.expand():
        for rate in (1e9, 2e10):
            for overhead in (0.0, 1e-5):
                hardware = vary(setup.hardware, {"pcie.bytes_per_s": rate, "gpu.kernel_overhead_s": overhead})
                machine = dataclasses.replace(setup.offload.machine, hardware=hardware)
                offload = dataclasses.replace(setup.offload, machine=machine)
                result = simulate(offload.program(point, CostModel(hardware)), executor=execute_simpy)
                expected.append((result.summary["tokens_per_s"], result.summary["decode_step_time_s"], result.summary["hit_rate"]))
    found = rows[["tokens_per_s", "tpot_s", "hit_rate"]].to_numpy(np.float64)
    assert np.allclose(found, np.array(expected), rtol=1e-12, atol=0)
    assert rows["sees_future"].any()
    assert not rows["sees_future"].all()


def test_plans_on_other_machines(scenario: Path) -> None:
    """Expert parallelism: each plan on each machine equals SimPy's step time there."""
    loaded = load_scenario(scenario)
    study = loaded.study("four-gpus")
    assert isinstance(study, ExpertParallelStudy)
    rates = (1e9, 1e11)
    rows = read_sweep(run_sweep(make_sweep(loaded, "four-gpus", [parse_axis("nvlink.bytes_per_s=1e9,1e11")]), "b.sweep").path)
    setup = ExpertParallelSetup(load_inputs(loaded), study)
    expected = []
    for choice in study.placement.plans:
        plan = setup.make_plan(choice)
        for rate in rates:
            cost = CostModel(vary(setup.hardware, {"nvlink.bytes_per_s": rate}))
            expected.append(simulate(setup.program(plan, cost), executor=execute_simpy).summary["step_time_s"])
    assert np.allclose(rows["step_time_s"], expected, rtol=1e-12, atol=0)
    assert rows["placement"].tolist() == ["contiguous"] * 2 + ["eplb"] * 2


def test_an_interrupted_sweep_goes_on(scenario: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that were finished are not made again; the rows are those of a sweep that was never interrupted."""
    monkeypatch.setattr(sweep_module, "MACHINES_PER_PART", 1)
    axes = [parse_axis("pcie.bytes_per_s=1e9,2e9,4e9")]
    whole = read_sweep(run_sweep(make_sweep(load_scenario(scenario), "one-gpu", axes), "whole.sweep").path)
    made: list[int] = []

    def stop(text: str, done: float, total: float) -> None:
        made.append(1)
        if len(made) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(make_sweep(load_scenario(scenario), "one-gpu", axes), "cut.sweep", stop)
    before = {file.name: file.stat().st_mtime_ns for file in Path("cut.sweep").glob("*.parquet")}
    assert len(before) == 4
    again = make_sweep(load_scenario(scenario), "one-gpu", axes)
    folder = run_sweep(again, "cut.sweep")
    assert {name: (folder.path / name).stat().st_mtime_ns for name in before} == before
    assert read_sweep(folder.path).equals(whole)


def test_the_command_writes_rows_a_table_and_a_picture(scenario: Path) -> None:
    """What a user sees: the best choice per machine, the files; the same sweep again only reads."""
    arguments = ("sweep", str(scenario), "--study", "one-gpu", "--vary", "pcie.bytes_per_s=log(1e9,1.6e10,3)", "-o", "c.sweep")
    text = call(*arguments)
    assert "42 points" in text.replace(",", "")
    assert "1 GB/s" in text
    assert Path("c.sweep/sweep.png").read_bytes().startswith(b"\x89PNG")
    found = call_json(*arguments)
    assert found["rows"] == 42
    assert [row["pcie.bytes_per_s"] for row in found["best"]] == [1e9, pytest.approx(4e9), 1.6e10]
    assert not any(row["sees_future"] for row in found["best"])
    assert json.loads(Path("c.sweep/sweep.json").read_text())["schema"] == "moesim.sweep/1"


@pytest.mark.parametrize(("arguments", "message"), [
    (("--study", "one-gpu", "--vary", "pcie.bytes=1,2"), "--vary pcie.bytes: neither"),
    (("--study", "one-gpuu"), "no study 'one-gpuu'"),
    (("--study", "one-gpu", "--vary", "slots_per_layer=0"), "--vary slots_per_layer:"),
    (("--study", "one-gpu", "--vary", "gddr.num_bytes=1e3,24e9"), "expert slots need"),
    (("--study", "one-gpu", "--vary", "pcie.bytes_per_s=-1"), "bytes_per_s must be positive"),
])
def test_wrong_sweeps_are_one_line(scenario: Path, arguments: tuple[str, ...], message: str) -> None:
    """Whatever cannot work ends before anything runs, with exit status 2 and no folder."""
    done = CliRunner().invoke(app, ["sweep", str(scenario), *arguments, "-o", "d.sweep"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not Path("d.sweep").exists()


def test_run_on_either_executor_gives_the_same_tables(scenario: Path) -> None:
    """The command line's choice of an executor changes no row."""
    one, other = (call_json("run", str(scenario), "--only", "one-gpu", "--executor", name, "--output", name)
                  for name in ("simpy", "compiled"))
    assert one["studies"] == other["studies"]
    done = CliRunner().invoke(app, ["run", str(scenario), "--executor", "fast"])
    assert (done.exit_code, "unknown executor 'fast'" in done.stderr) == (2, True)
