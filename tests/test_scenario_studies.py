"""Studies end to end on tiny scenarios: the files they name, the rows they give, and what does not fit together."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moesim.artifacts import write_text
from moesim.errors import InputError
from moesim.placement.plan import read_plan
from moesim.report.headline import best_row
from moesim.scenario.expert_parallel import ExpertParallelSetup
from moesim.scenario.inputs import load_inputs
from moesim.scenario.load import load_scenario
from moesim.scenario.offload import OffloadSetup
from moesim.scenario.reporter import QuietReporter
from moesim.scenario.run import RunOutcome, run_scenario
from moesim.scenario.schema import ExpertParallelStudy, Point
from moesim.simulate.result import DONE, read_result
from moesim.simulate.study import read_study
from moesim.traces.store import read_trace, write_trace
from moesim.traces.synth import synthetic_trace

OFFLOAD_POINTS = "      - {policy: [lru, static], slots_per_layer: [2, 4]}"
VALIDATION = """
  - kind: validation
    name: here
    model: {hidden_size: 64, expert_intermediate_size: 64, num_layers: 2}
    slots_per_layer: 2
    steps: 4
    repeats: 2
    slow_tier_bytes_per_s: 2.0e+8
    calibration_seconds: 0.5
    device: cpu
"""


def changed(folder: Path, *replacements: tuple[str, str], extra: str = "") -> Path:
    """Write the tiny scenario with pieces of text replaced."""
    text = (folder / "tiny.yaml").read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / "changed.yaml").write_text(text + extra)
    return folder / "changed.yaml"


def run(path: Path, output: str = "out", only: str | None = None) -> RunOutcome:
    """Run a scenario file."""
    return run_scenario(load_scenario(path), path.parent / output, QuietReporter(), only)


def rows(path: Path, name: str) -> pd.DataFrame:
    """The rows of one study, without its files and report."""
    scenario = load_scenario(path)
    study = scenario.study(name)
    setup = (ExpertParallelSetup if isinstance(study, ExpertParallelStudy) else OffloadSetup)(
        load_inputs(scenario), study)  # type: ignore[arg-type]
    return pd.DataFrame([point.row for point in setup.points()])


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds and has tests of its own: here the report is an empty file."""
    monkeypatch.setattr("moesim.scenario.run.report_folder", lambda folder: write_text(folder / "report.html", ""))


class Listener(QuietReporter):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, object]] = []

    def study_started(self, name: str, title: str, num_points: int) -> None:
        """Keep the announced number of points."""
        self.heard.append((name, num_points))

    def point_done(self, study_name: str, row: dict[str, object]) -> None:
        """Keep the study's name."""
        self.heard.append((study_name, "point"))


def test_a_run_writes_every_file_it_names(tiny_folder: Path) -> None:
    """Plans, tables, the best point's result and timeline, and one report; nothing else is left behind."""
    outcome = run(tiny_folder / "tiny.yaml")
    output = tiny_folder / "out"
    assert all(path.exists() for path in outcome.files)
    assert {path.resolve() for path in output.iterdir()} == {path.resolve() for path in outcome.files}
    names = {path.name for path in outcome.files}
    assert names >= {"four-gpus.contiguous.plan.json", "four-gpus.eplb-r4.plan.json", "four-gpus.study.json",
                     "one-gpu.study.json"}
    assert len([name for name in names if name.endswith(".result")]) == 2
    for study in outcome.studies:
        again = read_study(output / f"{study.name}.study.json")
        assert again.table.columns.tolist() == study.table.columns.tolist()
        assert len(again.table) == len(study.table)
    assert read_plan(output / "four-gpus.eplb-r4.plan.json").num_slots == 12
    for path in outcome.files:
        if path.suffix == ".result":
            assert len(read_result(path).tasks) > 10


def test_the_same_seed_gives_the_same_rows(tiny_folder: Path) -> None:
    """Two runs agree in every cell; another seed deals other requests."""
    other = changed(tiny_folder, ("seed: 3", "seed: 4"))
    for name in ("four-gpus", "one-gpu"):
        first = rows(tiny_folder / "tiny.yaml", name)
        pd.testing.assert_frame_equal(first, rows(tiny_folder / "tiny.yaml", name))
        assert not first.equals(rows(other, name))


def test_expert_parallel_rows_are_consistent(tiny_folder: Path) -> None:
    """Bounds lie below what was found, gaps follow from both, and replicas are counted."""
    table = rows(tiny_folder / "tiny.yaml", "four-gpus")
    assert table["placement"].tolist() == ["contiguous", "eplb"]
    assert table["redundant_experts"].tolist() == [0, 4]
    for row in table.itertuples():
        assert 1 <= row.imbalance_bound <= row.imbalance + 1e-12
        assert 0 < row.step_time_bound_s <= row.step_time_s
        assert row.step_time_gap == pytest.approx(1 - row.step_time_bound_s / row.step_time_s)
        assert row.tokens_per_s == pytest.approx(8 / row.step_time_s)
        assert row.tokens_per_s_bound == pytest.approx(8 / row.step_time_bound_s)
        assert 0 <= row.cross_node_fraction <= row.cross_rank_fraction <= 1
        assert row.cross_node_fraction == 0  # one node


def test_crossings_are_those_of_the_tokens(tiny_folder: Path) -> None:
    """Fractions and bytes of the contiguous plan, counted token by token: two experts per rank of eight on four."""
    setup = ExpertParallelSetup(load_inputs(load_scenario(tiny_folder / "tiny.yaml")), load_scenario(
        tiny_folder / "tiny.yaml").studies[0])
    row = setup.point(setup.study.placement.plans[0]).row
    order = list(dict.fromkeys(setup.test.request_id.tolist()))
    stayed = moved = 0
    for step in setup.steps:
        for token in step.rows.tolist():
            home = order.index(setup.test.request_id[token]) % 4
            for experts in setup.test.expert_ids[token].tolist():
                ranks = {expert // 2 for expert in experts}
                stayed, moved = stayed + (home in ranks), moved + len(ranks - {home})
    assert row["cross_rank_fraction"] == pytest.approx(moved / (moved + stayed))
    assert row["cross_rank_bytes_per_step"] == pytest.approx(moved * 64 * (2 + 2) / len(setup.steps))


def test_offload_rows_are_consistent(tiny_folder: Path) -> None:
    """Bounds below the times, more slots no fewer hits, and bytes that follow from the misses."""
    table = rows(tiny_folder / "tiny.yaml", "one-gpu")
    assert list(zip(table["policy"], table["slots_per_layer"], strict=True)) == [
        ("lru", 2), ("lru", 4), ("static", 2), ("static", 4)]
    expert_bytes, uses_per_token = 3 * 64 * 96 * 2, 3 * 2
    for row in table.itertuples():
        assert 0 < row.tpot_bound_s <= row.tpot_s
        assert 0 <= row.tpot_gap < 1
        assert 0 <= row.stall_fraction < 1
        assert row.htod_bytes_per_token == pytest.approx((1 - row.hit_rate) * uses_per_token * expert_bytes)
        assert row.tokens_per_s == pytest.approx(1 / row.tpot_s)
    assert (table["hit_rate"].to_numpy()[1::2] >= table["hit_rate"].to_numpy()[::2]).all()


def test_what_sees_the_future_is_never_the_answer(tiny_folder: Path) -> None:
    """Belady in both forms, and an oracle with a width in its label, are references: not kept, not the headline."""
    points = ("      - {policy: [lru, belady, belady-bypass], slots_per_layer: 4}\n"
              "      - {policy: lru, slots_per_layer: 4, prefetch: [oracle, transition]}")
    path = changed(tiny_folder, (OFFLOAD_POINTS, points))
    outcome = run_scenario(load_scenario(path), tiny_folder / "seen", QuietReporter(), only="one-gpu")
    assert outcome.studies[0].table["sees_future"].tolist() == [False, True, True, True, False]
    assert not best_row(outcome.studies[0])["sees_future"]
    (kept,) = [file.name for file in outcome.files if file.name.endswith(".result")]
    assert "belady" not in kept
    assert "oracle" not in kept


@pytest.mark.parametrize("workload", [
    "warmup_steps: 3", "include_prefill: true", "include_prefill: true, warmup_steps: 2"])
def test_a_bound_beside_a_time_is_a_bound_on_that_time(tiny_folder: Path, workload: str) -> None:
    """The bound is on the whole run: where warm-up or prefill steps are part of it, none stands beside TPOT."""
    path = changed(tiny_folder, ("workload: {batch_size: 1, max_steps: 4}",
                                 f"workload: {{batch_size: 1, max_steps: 4, {workload}}}"),
                   ("    points:", "    cache: {preload: none}\n    points:"),
                   (OFFLOAD_POINTS, "      - {policy: [lru, belady], slots_per_layer: [4, 8]}"))
    table = rows(path, "one-gpu")
    assert table["tpot_bound_s"].isna().all()
    assert ((table["tpot_gap"] >= 0) & (table["tpot_gap"] < 1)).all()


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfu-resident", "belady", "belady-bypass", "static"])
def test_shared_slots_can_be_preloaded_for_every_policy(tiny_folder: Path, policy: str) -> None:
    """With one pool over all layers the popular experts of the whole model fill it, which a static set admits."""
    path = changed(tiny_folder, ("    points:", "    cache: {shared: true}\n    points:"),
                   (OFFLOAD_POINTS, f"      - {{policy: {policy}, slots_per_layer: 2}}"))
    table = rows(path, "one-gpu")
    assert 0 <= table["hit_rate"][0] <= 1


@pytest.mark.parametrize("points", ["{policy: [belady, lru, belady-bypass], slots_per_layer: 2}",
                                    "{policy: lru, slots_per_layer: 2, prefetch: [oracle, none]}"])
@pytest.mark.usefixtures("no_report")
def test_the_best_point_is_one_that_can_be_deployed(tiny_folder: Path, points: str) -> None:
    """A policy or prefetcher that knows the future is a reference: its run is not written as the best one."""
    outcome = run(changed(tiny_folder, (OFFLOAD_POINTS, f"      - {points}")), only="one-gpu")
    written = [path.name for path in outcome.files if path.suffix == ".result"]
    assert written == ["one-gpu.lru-2slots-none-load.result"]


@pytest.mark.usefixtures("no_report")
def test_points_are_announced_and_heard(tiny_folder: Path) -> None:
    """As many points as were announced, study by study."""
    listener = Listener()
    run_scenario(load_scenario(tiny_folder / "tiny.yaml"), tiny_folder / "out", listener)
    assert listener.heard == [
        ("four-gpus", 2), *[("four-gpus", "point")] * 2, ("one-gpu", 4), *[("one-gpu", "point")] * 4]


def test_plans_are_judged_on_requests_they_have_not_seen(tiny_folder: Path) -> None:
    """Train and test share no request, and together are the trace."""
    scenario = load_scenario(tiny_folder / "tiny.yaml")
    inputs = load_inputs(scenario)
    offload = OffloadSetup(inputs, scenario.studies[1]).offload
    train, test = set(offload.train.requests().tolist()), set(offload.test.requests().tolist())
    assert not train & test
    assert train | test == set(inputs.trace.requests().tolist())
    used = {int(offload.test.request_id[row]) for step in offload.steps for row in step.rows}
    assert used <= test


def test_preloaded_experts_are_the_popular_ones_of_training(tiny_folder: Path) -> None:
    """Counted by hand from the training requests, layer by layer."""
    scenario = load_scenario(tiny_folder / "tiny.yaml")
    offload = OffloadSetup(load_inputs(scenario), scenario.studies[1]).offload
    counts = np.stack([np.bincount(offload.train.expert_ids[:, layer].ravel(), minlength=8) for layer in range(3)])
    chosen = np.zeros((3, 8), bool)
    chosen.ravel()[offload.preloaded(2)] = True
    assert chosen.sum(axis=1).tolist() == [2, 2, 2]
    for layer in range(3):
        assert counts[layer][chosen[layer]].min() >= counts[layer][~chosen[layer]].max()
    assert dataclasses.replace(offload, preload="none").preloaded(2) == []


def test_a_full_cache_is_bounded_by_its_own_time(tiny_folder: Path) -> None:
    """Every expert resident: the bound is the time but for rounding, and no byte moves."""
    scenario = load_scenario(tiny_folder / "tiny.yaml")
    row = OffloadSetup(load_inputs(scenario), scenario.studies[1]).point(Point("lru", 8)).row
    assert (row["hit_rate"], row["htod_bytes_per_token"]) == (1.0, 0.0)
    assert row["tpot_gap"] == pytest.approx(0, abs=1e-4)


@pytest.mark.usefixtures("no_report")
def test_validation_runs_the_scenario_s_graph_for_real(tiny_folder: Path) -> None:
    """Tiny sizes, a few steps: prediction and measurement of one graph, finite errors, no figure from a data sheet."""
    pytest.importorskip("torch")
    outcome = run(changed(tiny_folder, extra=VALIDATION), only="here")
    names = sorted(path.name for path in outcome.files)
    assert names == sorted(["here.measured.result", "here.perfetto.json", "here.predicted.result", "here.profile.json",
                            "here.study.json", "here.validation.json", "report.html"])
    assert all(path.exists() for path in outcome.files)
    predicted, measured = (
        read_result(tiny_folder / "out" / f"here.{name}.result") for name in ("predicted", "measured"))
    assert len(predicted.tables["steps"]) == len(measured.tables["steps"]) == 4
    sources = set(predicted.tasks.loc[predicted.tasks["resource"] != "", "source"])
    assert sources
    assert "nameplate" not in sources
    done = [result.tasks[result.tasks["state"] == DONE]["kind"].value_counts() for result in (predicted, measured)]
    assert done[0].to_dict() == done[1].to_dict()
    total = outcome.studies[0].table.set_index("kind").loc["end to end"]
    assert math.isfinite(total["error"])
    assert total["measured_s"] > 0


# ---------------------------------------------------------------- what does not fit together


@pytest.mark.usefixtures("no_report")
def test_a_trace_of_another_model_must_be_meant(tiny_folder: Path) -> None:
    """Without trace_stands_in a trace that names another model is refused; with it a note says so."""
    trace = dataclasses.replace(read_trace(tiny_folder / "tiny.trace.parquet"), model="someone/else-8x7b")
    write_trace(trace, tiny_folder / "tiny.trace.parquet")
    path = changed(tiny_folder, ("trace_stands_in: true", "trace_stands_in: false"))
    with pytest.raises(InputError, match=r"the trace is of 'someone/else-8x7b', not of .*trace_stands_in: true"):
        run(path)
    assert not (tiny_folder / "out").exists()
    notes = run(tiny_folder / "tiny.yaml", only="one-gpu").studies[0].notes
    assert any("someone/else-8x7b" in note and "stands in" in note for note in notes)


def test_a_trace_of_another_shape_is_refused(tiny_folder: Path) -> None:
    """Seven experts are not eight, stand-in or not."""
    write_trace(synthetic_trace(40, 3, 7, 2, 4), tiny_folder / "tiny.trace.parquet")
    with pytest.raises(InputError, match=r"3 MoE layers x 7 experts, top-2, but model .* x 8 experts, top-2"):
        run(tiny_folder / "tiny.yaml")


@pytest.mark.parametrize(("replacement", "message"), [
    (("gpus_per_node: 4", "gpus_per_node: 1"), "study 'four-gpus': expert parallelism needs at least 2 GPUs"),
    (("{name: rtx-4090}", "{name: rtx-4091}"), "rtx-4091.*Did you mean 'rtx-4090'"),
    (("slots_per_layer: [2, 4]}", "slots_per_layer: 2, miss: cpu}\n    system: {slow_memory: node0.dran}"),
     "hardware 'rtx-4090' has no memory 'node0.dran'. Did you mean 'node0.dram'"),
    (("{name: rtx-4090}", "{name: rtx-4090}\n    profile: none.profile.json"), "none.profile.json"),
])
def test_parts_that_are_not_there_are_named(tiny_folder: Path, replacement: tuple[str, str], message: str) -> None:
    """Hardware, its parts, and profiles."""
    with pytest.raises(InputError, match=message):
        run(changed(tiny_folder, replacement))


def test_a_validation_deeper_than_the_trace_is_refused(tiny_folder: Path) -> None:
    """The trace has three MoE layers; four cannot be validated on it."""
    pytest.importorskip("torch")
    path = changed(tiny_folder, extra=VALIDATION.replace("num_layers: 2", "num_layers: 4"))
    with pytest.raises(InputError, match=r"model.num_layers 4 exceeds the trace's 3 MoE layers"):
        run(path, only="here")


def test_a_study_that_is_not_there_is_named(tiny_folder: Path) -> None:
    """`only` names a study of the file."""
    with pytest.raises(InputError, match=r"has no study 'four-gpu'. Did you mean 'four-gpus'"):
        run(tiny_folder / "tiny.yaml", only="four-gpu")
