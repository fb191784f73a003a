"""The diffusion study: its keys, its rows against Python calls and by hand, every wrong key, interruption, its report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from moesim.artifacts import write_text
from moesim.errors import InputError
from moesim.lowering.refresh_rows import POLICIES, diffusion_rows
from moesim.model.catalog import load_model
from moesim.report.figures import study_figures
from moesim.report.headline import best_row, study_headline
from moesim.report.html import report_folder
from moesim.report.plots import png_bytes
from moesim.report.tables import study_text
from moesim.scenario.diffusion import DiffusionStudySetup
from moesim.scenario.inputs import load_inputs
from moesim.scenario.load import load_scenario, scenario_schema
from moesim.scenario.reporter import QuietReporter, point_line
from moesim.scenario.run import run_scenario
from moesim.scenario.schema import DiffusionStudy
from moesim.scenario.schema_diffusion import CoresetBlock, CoresetPoint, DenoiseChoice, RefreshChoice, RefreshPoint
from moesim.simulate.executors import executor_of
from moesim.simulate.result import read_result
from moesim.simulate.study import read_study
from moesim.traces.coresets import expert_choice
from moesim.traces.denoise import DenoiseSettings, denoise_scored
from moesim.traces.denoise_passes import denoise_passes
from moesim.traces.expert_choice import expert_choice_trace, lost_weight_share
from moesim.traces.split import split_requests
from moesim.traces.store import write_trace
from moesim.traces.trace import DENOISE, PAD, PREFILL, RoutingTrace
from moesim.units import ns_from_s

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "scenarios" / "diffusion-llada2-mini.yaml"
DIFFUSION_MD = ROOT / "docs" / "diffusion.md"
TEXT = """\
schema: moesim.scenario/1
name: tiny
seed: 3
model: tiny/config.json
trace: generated
studies:
  - kind: diffusion
    name: refresh
    title: When?
    hardware: {name: rtx-4090}
    denoise:
      block_size: 4
      prompt_tokens: 3
      generate: {num_requests: 4, blocks_per_request: 2, accept: 0.4}
    refresh:
      slots_per_layer: [2, 4]
      policy: [static, interval, ski-rental, pattern-trained, optimal]
      tau: [1, 2]
    system: {overlap: true}
    coresets:
      - {method: des-seq, k: 1}
      - {method: expert-choice, schedule: [linear-reverse, static], k_min: 1, k_max: 3}
"""


class Listener(QuietReporter):
    """Keeps what it hears; interrupts the run at its `stop_at`-th point."""

    def __init__(self, stop_at: int = -1) -> None:
        self.heard: list[Any] = []
        self.stop_at = stop_at

    def study_started(self, name: str, title: str, num_points: int) -> None:
        """Keep the announced number of points."""
        self.heard.append((name, num_points))

    def point_done(self, study_name: str, row: dict[str, Any]) -> None:
        """Keep the row."""
        self.heard.append(row)
        if len([one for one in self.heard if isinstance(one, dict)]) == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def place(tiny_folder: Path) -> Path:
    """The tiny folder with diffusion.yaml beside the tiny model."""
    (tiny_folder / "diffusion.yaml").write_text(TEXT)
    return tiny_folder


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds: here the report is an empty file."""
    monkeypatch.setattr("moesim.scenario.run.report_folder", lambda folder: write_text(folder / "report.html", ""))


def edited(place: Path, *replacements: tuple[str, str]) -> Path:
    """Write diffusion.yaml with pieces of text replaced."""
    text = TEXT
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (place / "edited.yaml").write_text(text)
    return place / "edited.yaml"


def setup_of(path: Path) -> DiffusionStudySetup:
    """The first study of a file, loaded."""
    scenario = load_scenario(path)
    study = scenario.studies[0]
    assert isinstance(study, DiffusionStudy)
    return DiffusionStudySetup(load_inputs(scenario), study)


def rows_of(setup: DiffusionStudySetup) -> list[dict[str, Any]]:
    """The rows of all points."""
    return [row for _, row in setup.points()]


def recorded_trace() -> RoutingTrace:
    """Four requests of two blocks of three tokens and up to four passes, routed by a fixed integer rule; no token ids."""
    rows = []
    for request, block in itertools.product(range(4), range(2)):
        for step, token in itertools.product(range(3 + (request + block) % 2), range(3)):
            experts = [[(5 * request + 3 * block + token * (layer + 1) + step * (token == 2) + 3 * k) % 8 for k in range(2)]
                       for layer in range(3)]
            rows.append((request, 3 * block + token, experts, (request, block, step)))
    passes = list(dict.fromkeys(row[3] for row in rows))
    ids = np.array([row[2] for row in rows], np.int16)
    return RoutingTrace(
        ids, np.array([row[0] for row in rows]), np.array([row[1] for row in rows]), np.full(len(rows), DENOISE),
        np.array([passes.index(row[3]) for row in rows]), 8, np.arange(3),
        np.broadcast_to(np.array([0.75, 0.25], np.float32), ids.shape).copy(), model="tiny")


def recorded(place: Path, *replacements: tuple[str, str]) -> Path:
    """diffusion.yaml on a trace of the scenario's own instead of made-up passes."""
    write_trace(recorded_trace(), place / "own.trace.parquet")
    return edited(place, ("trace: generated", "trace: own.trace.parquet\ntrace_stands_in: true"),
                  ("      block_size: 4\n      prompt_tokens: 3\n", "      block_size: 3\n      prompt_tokens: 0\n"),
                  ("      generate: {num_requests: 4, blocks_per_request: 2, accept: 0.4}\n", ""),
                  ("[linear-reverse, static]", "static"), *replacements)


# ---------------------------------------------------------------- keys


def test_points_are_crossed_and_each_comes_once(place: Path) -> None:
    """For each number of slots all policies; tau only multiplies intervals; coresets begin with the routing as it is."""
    study = load_scenario(place / "diffusion.yaml").studies[0]
    of_two = [RefreshPoint(2, "static"), RefreshPoint(2, "interval", 1), RefreshPoint(2, "interval", 2),
              RefreshPoint(2, "ski-rental", None, 1.0), RefreshPoint(2, "pattern-trained"), RefreshPoint(2, "optimal")]
    assert study.expand() == [
        *of_two, *(point._replace(slots_per_layer=4) for point in of_two), CoresetPoint("none"), CoresetPoint("des-seq", 1.0),
        CoresetPoint("expert-choice", 2.0, "linear-reverse", 1.0, 3.0), CoresetPoint("expert-choice", 2.0, "static", 1.0, 3.0)]
    assert [point.label for point in study.expand()[12:]] == [
        "none", "des-seq 1", "ec linear-reverse 1-3", "ec static 1-3"]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(sorted(POLICIES)), min_size=1, max_size=4), st.lists(st.integers(1, 9), min_size=1, max_size=3),
       st.lists(st.integers(1, 64), min_size=1, max_size=3))
def test_a_refresh_grid_is_the_crossed_lists(policy: list[str], tau: list[int], slots: list[int]) -> None:
    """Each combination once, whatever repeats in the lists."""
    uses_tau = {"interval", "interval-released"} & set(policy)
    keys: dict[str, Any] = {"policy": policy, "slots_per_layer": slots} | ({"tau": tau} if uses_tau else {})
    found = RefreshChoice.model_validate(keys).expand()
    expected = {(s, p, t if p in uses_tau else None, 1.0 if p == "ski-rental" else None)
                for s, p, t in itertools.product(slots, policy, tau)}
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_what_is_not_given_is_the_generator_s_default() -> None:
    """The schema repeats none of the generator's numbers."""
    choice = DenoiseChoice.model_validate({"generate": {}})
    assert choice.settings(3, 8, 2) == DenoiseSettings(4, 3, 8, 2)
    some = DenoiseChoice.model_validate({"block_size": 5, "prompt_tokens": 0, "generate": {"num_requests": 2, "drift": 0.0}})
    assert some.settings(3, 8, 2) == DenoiseSettings(2, 3, 8, 2, block_size=5, prompt_tokens=0, drift=0.0)


def test_a_scalar_is_a_list_of_one() -> None:
    """A grid key may be written without brackets."""
    assert CoresetBlock.model_validate({"method": "dmoe", "p": 0.5}).expand() == [CoresetPoint("dmoe", 0.5)]
    assert RefreshChoice.model_validate({"slots_per_layer": 3, "policy": "interval"}).expand() == [
        RefreshPoint(3, "interval", 4)]


# every row: what is replaced, by what, the end of the message
MISTAKES = [
    ("      slots_per_layer: [2, 4]\n", "", "studies[0].refresh: missing key 'slots_per_layer'"),
    ("slots_per_layer: [2, 4]", "slots: [2, 4]", "studies[0].refresh: unknown key 'slots'"),
    ("slots_per_layer: [2, 4]", "slots_per_layer: [2, 0]",
     "studies[0].refresh.slots_per_layer[1]: must be greater than or equal to 1, got 0"),
    ("slots_per_layer: [2, 4]", "slots_per_layer: []", "studies[0].refresh.slots_per_layer: must not be empty"),
    ("slots_per_layer: [2, 4]", "slots_per_layer: [2, '4']", "slots_per_layer[1]: must be a whole number, got '4'"),
    ("[static, interval,", "[statik, interval,",
     "studies[0].refresh.policy[0]: unknown refresh policy 'statik'. Did you mean 'static'?"),
    ("tau: [1, 2]", "tau: 0", "studies[0].refresh.tau: must be greater than or equal to 1, got 0"),
    ("tau: [1, 2]", "factor: 0.0", "studies[0].refresh.factor: must be greater than 0, got 0.0"),
    ("tau: [1, 2]", "factor: .inf", "studies[0].refresh.factor: must be a finite number, got inf"),
    ("tau: [1, 2]", "train_fraction: 1.0", "studies[0].refresh.train_fraction: must be less than 1, got 1.0"),
    ("tau: [1, 2]", "reset_at_block: 1", "studies[0].refresh.reset_at_block: must be true or false, got 1"),
    ("policy: [static, interval, ski-rental, pattern-trained, optimal]", "policy: static",
     "studies[0].refresh: 'tau' belongs to policy interval or interval-released, which is not among them"),
    ("policy: [static, interval, ski-rental, pattern-trained, optimal]\n      tau: [1, 2]", "policy: static\n      factor: 2.0",
     "studies[0].refresh: 'factor' belongs to policy ski-rental, which is not among them"),
    ("policy: [static, interval, ski-rental, pattern-trained, optimal]\n      tau: [1, 2]",
     "policy: static\n      reset_at_block: false",
     "studies[0].refresh: 'reset_at_block' belongs to policy interval, which is not among them"),
    ("system: {overlap: true}", "system: {overlaps: true}", "studies[0].system: unknown key 'overlaps'. Did you mean 'overlap'?"),
    ("system: {overlap: true}", "system: {write_back: 'no'}", "studies[0].system.write_back: must be true or false, got 'no'"),
    ("num_requests: 4", "requests: 4", "studies[0].denoise.generate: unknown key 'requests'. Did you mean 'num_requests'?"),
    ("num_requests: 4", "num_requests: 0", "generate.num_requests: must be greater than or equal to 1, got 0"),
    ("accept: 0.4", "accept: 1.5", "generate.accept: must be less than or equal to 1, got 1.5"),
    ("accept: 0.4", "routed: blocks", "generate.routed: must be 'block', 'masked' or 'prefix', got 'blocks'. Did you mean 'block'?"),
    ("accept: 0.4", "popularity_share: 0.5, block_share: 0.6",
     "studies[0].denoise: denoise: the shares of popularity, request and block must not be negative and their sum must stay "
     "below 1, got (0.5, 0.12, 0.6)"),
    ("accept: 0.4", "drift_power: 2.5", "drift_power in (0, 1.9], got 0.0145 and 2.5"),
    ("      block_size: 4", "      block_size: 0", "studies[0].denoise.block_size: must be greater than or equal to 1, got 0"),
    ("      block_size: 4", "      mask_token_id: 4",
     "studies[0].denoise: 'mask_token_id' belongs to a recorded trace; 'generate' has its own"),
    ("method: des-seq, k: 1", "method: des-sec, k: 1", "coresets[0].method: must be 'des-seq', 'des-vote', 'dmoe' or "
     "'expert-choice', got 'des-sec'. Did you mean 'des-seq'?"),
    ("method: des-seq, k: 1", "k: 1", "studies[0].coresets[0]: missing key 'method'"),
    ("method: des-seq, k: 1", "method: des-seq", "studies[0].coresets[0]: method: des-seq needs 'k'"),
    ("method: des-seq, k: 1", "method: des-seq, k: 1, beta: 0.5",
     "studies[0].coresets[0]: 'beta' belongs to method des-vote, not to des-seq"),
    ("method: des-seq, k: 1", "method: dmoe, p: 0.6, k_max: 3.0", "'k_max' belongs to method expert-choice, not to dmoe"),
    ("method: des-seq, k: 1", "method: des-vote, beta: 1.5", "coresets[0].beta: must be less than or equal to 1, got 1.5"),
    ("method: des-seq, k: 1", "method: dmoe, p: 0.0", "coresets[0].p: must be greater than 0, got 0.0"),
    ("method: des-seq, k: 1", "method: des-seq, k: 1.5", "coresets[0].k: must be a whole number, got 1.5"),
    ("schedule: [linear-reverse, static]", "schedule: cosine",
     "coresets[1].schedule: must be 'static', 'linear-reverse' or 'linear', got 'cosine'"),
    ("k_min: 1, k_max: 3", "k_min: 4, k_max: 3", "studies[0].coresets[1]: k_min 4 must not exceed k_max 3"),
    ("{name: rtx-4090}", "{name: rtx-4091}", "studies[0].hardware.name: unknown hardware 'rtx-4091'. Did you mean 'rtx-4090'?"),
    ("{name: rtx-4090}", "{name: rtx-4090}\n    profile: no.profile.json", "profile: no such file: "),
    ("    title: When?\n", "    workload: {batch_size: 1}\n", "studies[0]: unknown key 'workload'."),
    ("kind: diffusion", "kind: difusion", "studies[0].kind: unknown kind 'difusion'. Did you mean 'diffusion'?"),
    ("trace: generated", "trace: generate", "trace: unknown trace 'generate'. Did you mean 'generated'?"),
    ("trace: generated", "trace: generated\ntrace_stands_in: true", "trace_stands_in does nothing with trace: generated"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_place(place: Path, old: str, new: str, message: str) -> None:
    """One line: file, line, column, path of the key, what is wrong and what was meant."""
    path = edited(place, (old, new))
    with pytest.raises(InputError) as error:
        load_scenario(path)
    lines = str(error.value).splitlines()
    assert all(re.match(rf"{re.escape(str(path))}:\d+:\d+: ", line) for line in lines)
    assert any(message in line for line in lines)


REFRESH_KEYS = ("      slots_per_layer: [2, 4]\n      policy: [static, interval, ski-rental, pattern-trained, optimal]\n"
                "      tau: [1, 2]\n")


def test_a_study_has_a_question(place: Path) -> None:
    """Neither refresh nor coresets is an error, and so is a key of refreshing without it."""
    coresets = TEXT[TEXT.index("    coresets:"):]
    without = ("    refresh:\n" + REFRESH_KEYS, "")
    with pytest.raises(InputError, match=r"studies\[0\]: give 'refresh' or 'coresets', or both"):
        load_scenario(edited(place, without, (coresets, "")))
    with pytest.raises(InputError, match=r"studies\[0\]: system: 'overlap' belongs to 'refresh', which is not there"):
        load_scenario(edited(place, without))


def test_generated_is_for_studies_that_make_their_own(place: Path) -> None:
    """Another kind, or a diffusion study without a generator, needs a trace, and is named."""
    offload = ("    coresets:", "  - kind: offload\n    name: other\n    hardware: {name: rtx-4090}\n"
               "    workload: {batch_size: 1}\n    points: [{policy: lru, slots_per_layer: 2}]\n  - kind: diffusion\n"
               "    name: last\n    hardware: {name: rtx-4090}\n    denoise: {generate: {}}\n    coresets:")
    with pytest.raises(InputError, match="study 'other' of kind offload needs a trace, or 'synthetic' to make one"):
        load_scenario(edited(place, offload))
    bare = ("      generate: {num_requests: 4, blocks_per_request: 2, accept: 0.4}\n", "")
    with pytest.raises(InputError, match=r"study 'refresh' of kind diffusion needs denoise: \{generate: \.\.\.\}"):
        load_scenario(edited(place, bare))
    scenario = load_scenario(place / "diffusion.yaml")
    with pytest.raises(InputError, match=r"scenario 'tiny' has no trace of its own \(trace: generated\)"):
        _ = load_inputs(scenario).trace


@pytest.mark.parametrize(("old", "new"), [
    ("tau: [1, 2]", "tau: [0]"), ("method: des-seq, k: 1", "method: des-seq, kk: 1"), ("slots_per_layer: [2, 4]", "slots: 2"),
    ("num_requests: 4", "num_requests: 4.5"), ("schedule: [linear-reverse, static]", "schedule: cosine"),
    ("p", "p"),  # the file as it is
])
def test_the_json_schema_judges_like_the_loader(place: Path, old: str, new: str) -> None:
    """An independent validator refuses and takes the same files."""
    path = edited(place, (old, new))
    wrong = list(jsonschema.Draft202012Validator(scenario_schema()).iter_errors(YAML(typ="safe", pure=True).load(path)))
    if old == new:
        assert not wrong
        load_scenario(path)
        return
    assert wrong
    with pytest.raises(InputError):
        load_scenario(path)


# ---------------------------------------------------------------- rows


def whole_ns(setup: DiffusionStudySetup, rows: list[dict[str, Any]], key: str) -> list[int]:
    """A column of seconds per pass as whole nanoseconds over the run."""
    return [ns_from_s(row[key] * setup.test.passes.num_steps) for row in rows]


def test_rows_of_a_recorded_trace_are_exact(place: Path) -> None:
    """Golden: integer routing and nameplate prices give these nanoseconds, and nothing else does."""
    setup = setup_of(recorded(place))
    rows = rows_of(setup)
    assert (setup.test.passes.num_steps, setup.test.passes.num_blocks) == (14, 4)
    assert [(row["policy"], row["slots_per_layer"], row.get("tau")) for row in rows[:7]] == [
        ("static", 2, None), ("interval", 2, 1), ("interval", 2, 2), ("ski-rental", 2, None), ("pattern-trained", 2, None),
        ("optimal", 2, None), ("static", 4, None)]
    assert whole_ns(setup, rows, "step_time_s") == [
        4565403, 4044233, 4040742, 3753993, 4194892, 3720468, 3129081, 2318525, 2551936, 2265784, 2297656, 2187981, 709133,
        706003, 713951]
    copy_ns = 10_000 + 1_170  # the link's latency, and 36,864 bytes at 31.5 GB/s
    copies = [0, 40, 26, 14, 17, 11, 0, 48, 31, 40, 42, 29]
    assert [round(row["promotions_per_step"] * 14 * 3) for row in rows[:12]] == copies
    assert whole_ns(setup, rows[:12], "moves_step_s") == [copy_ns * count for count in copies]


def test_every_row_is_that_of_the_python_function(place: Path) -> None:
    """The same trace, seed and machine through `diffusion_rows`: all policies, in every column that both have."""
    names = ", ".join(POLICIES)
    path = recorded(place, ("policy: [static, interval, ski-rental, pattern-trained, optimal]", f"policy: [{names}]"),
                    ("tau: [1, 2]", "tau: 2\n      factor: 0.5"), ("overlap: true", "overlap: false, write_back: true"))
    setup = setup_of(path)
    rows = [row for row in rows_of(setup) if "coreset" not in row]
    trace = dataclasses.replace(recorded_trace(), metadata={"denoise": {"block_size": 3, "prompt_tokens": 0}})
    for slots in (2, 4):
        assert setup.machine is not None
        expected = diffusion_rows(setup.inputs.model, trace, setup.machine, setup.cost, budget=slots, tau=2, factor=0.5,
                                  write_back=True, overlap=False, seed=3)
        own = [row for row in rows if row["slots_per_layer"] == slots]
        for one, other in zip(own, expected, strict=True):
            for key, name in (("policy", "policy"), ("knows", "knows"), ("tau", "tau"), ("miss_rate", "miss_rate"),
                              ("tokens_per_s", "tokens_per_s"), ("over_optimal_fraction", "over_optimal"),
                              ("refreshes_per_block", "refreshes_per_block"), ("step_time_s", "step_s")):
                assert one[key] == other[name]
            parts = one["experts_step_s"] + one["moves_step_s"] + one["other_step_s"]
            assert parts == pytest.approx(one["step_time_s"])
        assert min(row["over_optimal_fraction"] for row in own) == 0 == own[-1]["over_optimal_fraction"]


def test_a_counter_that_runs_on_is_another_policy(place: Path) -> None:
    """`reset_at_block: false` refreshes at every second pass of the run, by hand: 7 of 14, in 4 blocks."""
    path = recorded(place, ("tau: [1, 2]", "tau: 2\n      reset_at_block: false"))
    row = next(row for row in rows_of(setup_of(path)) if row["policy"] == "interval")
    assert row["refreshes_per_block"] == 7 / 4
    anew = next(row for row in rows_of(setup_of(recorded(place))) if row["policy"] == "interval" and row["tau"] == 2)
    assert anew["refreshes_per_block"] == 2  # passes 0 and 2 of each block


def test_rows_of_coresets_by_hand(place: Path) -> None:
    """Distinct experts, the weight that is lost and tokens per second, counted token by token."""
    setup = setup_of(recorded(place))
    none, seq, choice = (row for row in rows_of(setup) if "coreset" in row)
    trace, passes = setup.test.trace, setup.test.passes
    used, kept, lost = [], [], 0.0
    for rows, layer in itertools.product(passes.rows, range(3)):
        ids = trace.expert_ids[rows, layer]
        first = set(ids[:, 0].tolist())
        used.append(len(set(ids.ravel().tolist())))
        kept.append(len(first))
        lost += sum(0.25 for row in ids.tolist() if row[1] not in first)
    assert (none["unique_experts"], seq["unique_experts"]) == (pytest.approx(np.mean(used)), pytest.approx(np.mean(kept)))
    assert seq["unique_experts"] < none["unique_experts"]
    assert seq["lost_weight_share"] == pytest.approx(lost / sum(3 * len(rows) for rows in passes.rows))
    assert none["lost_weight_share"] == 0
    assert choice["unique_experts"] == 8  # every expert takes at least one token
    assert choice["lost_weight_share"] is None  # no router scores were recorded
    assert seq["published_accuracy_fraction"] is None
    for row in (none, seq, choice):
        assert row["tokens_per_s"] == pytest.approx(4 * 3 / (14 * row["step_time_s"]))
        assert row["expert_bytes_per_layer"] == pytest.approx(row["unique_experts"] * 3 * 64 * 96 * 2)
    assert seq["experts_step_s"] < none["experts_step_s"] < choice["experts_step_s"]


def test_generated_passes_are_the_generator_s(place: Path) -> None:
    """Same seed, same rows, as `denoise_scored` draws them; another seed draws others; train and test share no request."""
    setup = setup_of(place / "diffusion.yaml")
    own = DenoiseSettings(4, 3, 8, 2, blocks_per_request=2, block_size=4, prompt_tokens=3, accept=0.4)
    trace, scores = denoise_scored(own, seed=3)
    train, test = split_requests(trace, 0.5, 3)
    assert setup.train is not None
    assert setup.test.trace.digest() == test.digest()
    assert setup.train.trace.digest() == train.digest()
    assert setup.scores is not None
    assert np.array_equal(setup.scores, scores[np.isin(trace.request_id, test.requests())])
    rows = pd.DataFrame(rows_of(setup))
    pd.testing.assert_frame_equal(rows, pd.DataFrame(rows_of(setup_of(place / "diffusion.yaml"))))
    assert not rows.equals(pd.DataFrame(rows_of(setup_of(edited(place, ("seed: 3", "seed: 4"))))))
    assert rows["lost_weight_share"].notna().sum() == 4
    assert setup.provenance == {"study": "refresh", "trace": "generated", "trace_digest": trace.digest()}


def test_coresets_alone_train_nothing(place: Path) -> None:
    """Without `refresh` all requests are run, one is enough, and no second memory is asked for."""
    path = edited(place, ("    refresh:\n" + REFRESH_KEYS + "    system: {overlap: true}\n", ""),
                  ("num_requests: 4", "num_requests: 1"))
    setup = setup_of(path)
    assert len(np.unique(setup.test.passes.request)) == 1
    assert [row["coreset"] for row in rows_of(setup)] == [
        "none", "des-seq 1", "ec linear-reverse 1-3", "ec static 1-3"]
    assert any("1 request." in note for note in setup.notes())


def test_published_accuracy_is_looked_up() -> None:
    """LLaDA2.0-mini's printed settings have one, others none; each row also says what share of gate weight is lost."""
    scenario = load_scenario(SHIPPED)
    study = scenario.study("coresets")
    assert isinstance(study, DiffusionStudy)
    small = study.model_copy(update={"denoise": DenoiseChoice.model_validate(
        {"block_size": 32, "generate": {"num_requests": 1, "blocks_per_request": 1, "accept": 0.9}})})
    table = pd.DataFrame(rows_of(DiffusionStudySetup(load_inputs(scenario), small))).set_index("coreset")
    accuracy = table["published_accuracy_fraction"].to_dict()
    assert [accuracy[name] for name in ("none", "des-seq 3", "des-vote 0.15", "dmoe 0.6")] == [1.0, 0.972, 0.995, 0.9955]
    assert np.isnan(accuracy["ec linear-reverse 2-14"])  # published for LLaDA-MoE only
    assert table["lost_weight_share"].between(0, 1).all()
    assert table.loc["none", "lost_weight_share"] == 0
    assert table.loc["dmoe 0.6", "lost_weight_share"] < 0.4 + 1e-3  # by definition at least a share p is kept


# ---------------------------------------------------------------- task by task


@pytest.mark.parametrize("system", ["overlap: true", "overlap: false", "overlap: true, write_back: true",
                                    "overlap: false, write_back: true"])
def test_simpy_takes_as_long_as_the_rows_say(place: Path, system: str) -> None:
    """Every policy as tasks on resources, run by the reference executor: pass by pass the same nanoseconds and rates."""
    setup = setup_of(recorded(place, ("overlap: true", system)))
    for point, row in setup.points():
        if isinstance(point, RefreshPoint):
            result = setup.simulate(point, executor_of("simpy"))
            assert result.summary["makespan_s"] == pytest.approx(row["step_time_s"] * 14, rel=1e-12)
            assert result.summary["tokens_per_s"] == pytest.approx(row["tokens_per_s"], rel=1e-12)
            tasks = result.tasks
            moved = tasks[tasks["kind"] == "load"]["num_bytes"].sum() / (3 * 64 * 96 * 2)
            assert moved == pytest.approx(row["promotions_per_step"] * 14 * 3)
            assert (tasks["kind"] == "write_back").any() == ("write_back" in system and moved > 0)
            side = tasks[tasks["kind"].isin(["expert", "cpu_expert"])].groupby(["step", "layer"])["start_ns"].nunique()
            assert ((side == 1).all()) == ("overlap: true" in system or not (tasks["kind"] == "cpu_expert").any())


def test_a_pass_with_dense_and_shared_parts_is_as_long() -> None:
    """LLaDA2.0-mini has a dense first layer and a shared expert; a long run is cut, and says so."""
    scenario = load_scenario(SHIPPED)
    study = scenario.study("refresh")
    assert isinstance(study, DiffusionStudy)
    small = study.model_copy(update={"denoise": DenoiseChoice.model_validate(
        {"block_size": 32, "generate": {"num_requests": 2, "blocks_per_request": 1, "accept": 0.6}})})
    setup = DiffusionStudySetup(load_inputs(scenario), small)
    point = RefreshPoint(64, "interval", 2)
    row, result = setup.row(point), setup.simulate(point, executor_of("simpy"))
    assert result.summary["makespan_s"] == pytest.approx(row["step_time_s"] * setup.test.passes.num_steps, rel=1e-12)
    kinds = result.tasks["kind"].value_counts().to_dict()
    steps = setup.test.passes.num_steps
    assert (kinds["dense"], kinds["shared_expert"], kinds["attention"], kinds["head"]) == (steps, 19 * steps, 20 * steps, steps)
    assert set(result.summary["cost_sources"]) == {"nameplate"}
    assert result.provenance["passes"] == steps


def test_a_long_run_is_shown_from_its_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more tasks than a timeline can hold: the first passes, as many as the provenance says."""
    setup = setup_of(recorded(place))
    whole = setup.simulate(RefreshPoint(2, "interval", 2), executor_of("simpy"))
    monkeypatch.setattr("moesim.scenario.diffusion.MAX_TASKS", 3 * 8 * 5)
    part = setup.simulate(RefreshPoint(2, "interval", 2), executor_of("simpy"))
    assert part.provenance["passes"] == len(part.tables["steps"]) == 5
    pd.testing.assert_frame_equal(part.tables["steps"], whole.tables["steps"].head(5))


# ---------------------------------------------------------------- expert choice


SMALL = DenoiseSettings(1, 2, num_experts=9, top_k=3, blocks_per_request=2, block_size=5, prompt_tokens=3)


@settings(max_examples=25)
@given(st.integers(0, 200), st.floats(0.5, 12.0))
def test_expert_choice_as_a_trace(seed: int, mean: float) -> None:
    """Every expert has its load in every layer, its tokens are its best ones, and the prompt stays as it was."""
    trace, scores = denoise_scored(SMALL, seed=seed)
    passes = denoise_passes(trace)
    load = expert_choice(passes, np.full(passes.num_steps, mean), num_experts=9).load
    found = expert_choice_trace(trace, passes, load, scores)
    counts = denoise_passes(found).counts
    assert (counts == load[:, None, None]).all()  # 9 * load slots in each layer of each pass
    for (step, rows), layer in itertools.product(enumerate(passes.rows), range(2)):
        for expert in range(9):
            best = sorted(rows.tolist(), key=lambda row, e=expert, at=layer: (-scores[row, at, e], row))[:load[step]]
            mine = [row for row in rows.tolist() if expert in found.expert_ids[row, layer]]
            assert sorted(best) == mine
    assert found.gate_weights is not None
    covered = (found.expert_ids != PAD).any(axis=2)
    assert np.allclose(found.gate_weights.sum(axis=2), covered, atol=1e-3)  # recorded weights are rounded to float16
    assert (np.diff((found.expert_ids == PAD).astype(int), axis=2) >= 0).all()
    prompt = trace.phase == PREFILL
    assert np.array_equal(found.expert_ids[prompt][..., :3], trace.expert_ids[prompt])
    assert (found.expert_ids[prompt][..., 3:] == PAD).all()


@settings(max_examples=25)
@given(st.integers(0, 200), st.floats(0.5, 6.0))
def test_lost_weight_by_the_definition(seed: int, mean: float) -> None:
    """Token by token: the recorded weight of experts that no longer serve it, over all recorded weight of the passes."""
    trace, scores = denoise_scored(SMALL, seed=seed)
    passes = denoise_passes(trace)
    load = expert_choice(passes, np.full(passes.num_steps, mean), num_experts=9).load
    after = expert_choice_trace(trace, passes, load, scores)
    lost = total = 0.0
    assert trace.gate_weights is not None
    for row in np.flatnonzero(trace.phase == DENOISE):
        for layer, k in itertools.product(range(2), range(3)):
            weight = float(trace.gate_weights[row, layer, k])
            total += weight
            lost += weight * (trace.expert_ids[row, layer, k] not in after.expert_ids[row, layer])
    assert lost_weight_share(trace, after) == pytest.approx(lost / total)
    assert lost_weight_share(trace, trace) == 0
    assert lost_weight_share(dataclasses.replace(trace, gate_weights=None), after) is None


def test_expert_choice_refuses_what_does_not_fit() -> None:
    """Wrong scores, loads, and traces of other sizes."""
    trace, scores = denoise_scored(SMALL, seed=1)
    passes = denoise_passes(trace)
    load = np.ones(passes.num_steps, np.int64)
    for call, message in (
            (lambda: expert_choice_trace(trace, passes, load, scores[:, :1]), r"scores must be \[token, layer, expert\]"),
            (lambda: expert_choice_trace(trace, passes, load, scores - 1), "not negative"),
            (lambda: expert_choice_trace(trace, passes, load[1:], scores), "a load per pass"),
            (lambda: expert_choice_trace(trace, passes, load * 6, scores), "1 ... its tokens"),
            (lambda: lost_weight_share(trace, trace.take(np.arange(4))), "cannot be compared")):
        with pytest.raises(InputError, match=message):
            call()


# ---------------------------------------------------------------- runs


@pytest.mark.usefixtures("no_report")
def test_a_run_streams_its_rows_and_writes_its_files(place: Path) -> None:
    """As many points as announced, each with a line, a table with all of them, provenance, and no file besides."""
    listener = Listener()
    outcome = run_scenario(load_scenario(place / "diffusion.yaml"), place / "out", listener)
    assert listener.heard[0] == ("refresh", 16)
    assert len(listener.heard) == 17
    assert point_line(listener.heard[2]).startswith("interval, tau 1, 2 slots/layer, ")
    assert point_line(listener.heard[14]).startswith("des-seq 1, 8 slots/layer, ")
    best = max((row for row in listener.heard[1:13] if row["knows"] != "offline"), key=lambda row: row["tokens_per_s"])
    assert (best["policy"], best["slots_per_layer"]) == ("ski-rental", 4)
    assert {path.name for path in outcome.files} == {path.name for path in (place / "out").iterdir()} == {
        "refresh.study.json", "report.html", "refresh.ski-rental-4slots-factor1.result", "refresh.ski-rental-4slots-factor1.perfetto.json"}
    result = read_result(place / "out" / "refresh.ski-rental-4slots-factor1.result")
    assert result.summary["tokens_per_s"] == pytest.approx(best["tokens_per_s"])
    assert result.provenance["point"] == "ski-rental-4slots-factor1"
    study = read_study(place / "out" / "refresh.study.json")
    assert study.kind == "diffusion"
    assert len(study.table) == 16
    assert study.provenance["trace_digest"].startswith("sha256:")
    assert study.provenance["seed"] == 3
    assert sum("made up" in note for note in study.notes) == 1
    assert "nameplate" in study.notes[-1]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("stop_at", [1, 7, 20])
def test_an_interrupted_run_leaves_whole_files_only(place: Path, stop_at: int) -> None:
    """Stopped inside the first study nothing is there, inside the second the first one's table is, and it can be read."""
    second = TEXT[TEXT.index("  - kind:"):].replace("name: refresh", "name: again")
    (place / "two.yaml").write_text(TEXT + second)
    scenario = load_scenario(place / "two.yaml")
    with pytest.raises(KeyboardInterrupt):
        run_scenario(scenario, place / "out", Listener(stop_at))
    left = sorted(path.name for path in (place / "out").iterdir()) if (place / "out").exists() else []
    assert [name for name in left if "study" in name] == (["refresh.study.json"] if stop_at > 16 else [])
    assert len(left) == (3 if stop_at > 16 else 0)  # the best run and its timeline too, and no temporary file
    if left:
        assert len(read_study(place / "out" / "refresh.study.json").table) == 16
        assert report_folder(place / "out").exists()
    outcome = run_scenario(scenario, place / "out", QuietReporter())
    assert [len(study.table) for study in outcome.studies] == [16, 16]


def test_only_one_study_is_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`only` names it, with a suggestion where there is none."""
    monkeypatch.setattr("moesim.scenario.run.report_folder", lambda folder: write_text(folder / "report.html", ""))
    scenario = load_scenario(place / "diffusion.yaml")
    assert [study.name for study in run_scenario(scenario, place / "out", QuietReporter(), only="refresh").studies] == ["refresh"]
    with pytest.raises(InputError, match="Did you mean 'refresh'"):
        run_scenario(scenario, place / "out", QuietReporter(), only="refreshes")


# every row: replacements, what the message says; nothing is run or written before it
UNFIT = [
    ((("slots_per_layer: [2, 4]", "slots_per_layer: [2, 9]"),), "budget must be 1 ... 8 experts per layer, got 9"),
    ((("method: des-seq, k: 1", "method: des-seq, k: 3"),), "DES-Seq: keep must be in 1 ... 2"),
    ((("method: des-seq, k: 1", "method: des-vote, beta: 0.1"),), "must leave at least top-k 2"),
    ((("num_requests: 4", "num_requests: 1"),), "a trace of one request cannot be split"),
    ((("system: {overlap: true}", "system: {slow_memory: node0.dran}"),), "Did you mean 'node0.dram'"),
    ((("system: {overlap: true}", "system: {device: node0.gpu9}"),), "node0.gpu9"),
]


@pytest.mark.parametrize(("replacements", "message"), UNFIT)
def test_what_does_not_fit_is_refused_before_the_first_row(
        place: Path, replacements: tuple[tuple[str, str], ...], message: str) -> None:
    """The model's and the machine's limits."""
    listener = Listener()
    with pytest.raises(InputError, match=re.escape(message)):
        run_scenario(load_scenario(edited(place, *replacements)), place / "out", listener)
    assert not [row for row in listener.heard if isinstance(row, dict)]
    assert not (place / "out").exists()


def test_a_trace_without_passes_says_what_to_do(place: Path) -> None:
    """A trace of ordinary decoding, or one that does not say where blocks begin."""
    path = edited(place, ("trace: generated", "trace: tiny.trace.parquet\ntrace_stands_in: true"),
                  ("      generate: {num_requests: 4, blocks_per_request: 2, accept: 0.4}\n", ""))
    with pytest.raises(InputError, match=r"study 'refresh': the trace has no denoise rows \(or make passes up"):
        setup_of(path)
    unsized = recorded(place, ("      block_size: 3\n      prompt_tokens: 0\n", "      prompt_tokens: 0\n"))
    with pytest.raises(InputError, match="block_size must be a whole number"):
        setup_of(unsized)
    masked = recorded(place, ("schedule: static", "schedule: linear"))
    with pytest.raises(InputError, match="no token ids"):
        rows_of(setup_of(masked))


def test_coresets_need_a_machine_that_holds_all_experts() -> None:
    """30.6 GB do not fit into 24 GB, and the message says what to do."""
    scenario = load_scenario(SHIPPED)
    study = scenario.study("coresets")
    assert isinstance(study, DiffusionStudy)
    small = study.model_copy(update={"hardware": scenario.study("refresh").hardware, "denoise": DenoiseChoice.model_validate(
        {"generate": {"num_requests": 1, "blocks_per_request": 1, "accept": 1.0}})})
    with pytest.raises(InputError, match=r"study 'coresets', coresets: with all experts .* put coresets into a study on a larger"):
        next(DiffusionStudySetup(load_inputs(scenario), small).points())


# ---------------------------------------------------------------- report


def test_the_report_has_a_section(place: Path) -> None:
    """Headline with the accuracy debit, figure, table with the wide columns, notes."""
    outcome = run_scenario(load_scenario(place / "diffusion.yaml"), place / "out", QuietReporter())
    (study,) = outcome.studies
    row = best_row(study)
    assert row["knows"] != "offline"
    assert row["slots_per_layer"] < 8
    headline = study_headline(study)
    assert headline.startswith("Most tokens per second without knowing the run: ")
    assert "best schedule of each layer." in headline
    assert headline.endswith("of the gate weight is lost, the accuracy is not published.")
    page = (place / "out" / "report.html").read_text()
    assert headline.replace("'", "&#x27;") in page
    for text in ("over optimal", "weight lost", "ec linear-reverse 1-3", "data:image/png;base64,", "made up"):
        assert text in page
    assert max(map(len, study_text(study).splitlines())) <= 110


@pytest.mark.parametrize("rows", ["refresh", "one interval", "coresets", "optimal"])
def test_the_figure_leaves_out_panels_without_rows(place: Path, rows: str) -> None:
    """Refresh alone, a single interval (no curve), coresets alone, the best schedule alone."""
    table = pd.DataFrame(rows_of(setup_of(place / "diffusion.yaml")))
    resident = table["coreset"].notna()
    part = {"refresh": table[~resident], "one interval": table[~resident & (table["tau"].fillna(1) == 1)],
            "coresets": table[resident].dropna(axis=1, how="all"), "optimal": table[table["policy"] == "optimal"]}[rows]
    outcome = read_study(_written(place, part))
    figure = study_figures(outcome)["diffusion"]
    assert len(figure.axes) == {"refresh": 2, "one interval": 1, "coresets": 1, "optimal": 1}[rows]
    assert png_bytes(figure).startswith(b"\x89PNG")
    expected = "tokens per second with all experts on the GPU" if rows == "coresets" else "without knowing the run"
    if rows != "optimal":
        assert expected in study_headline(outcome)


def _written(place: Path, table: pd.DataFrame) -> Path:
    from moesim.simulate.study import StudyResult

    return StudyResult("part", "diffusion", "", table).write(place / "part.study.json")


# ---------------------------------------------------------------- what ships


@pytest.mark.usefixtures("no_report")
def test_the_scenario_that_ships_prints_what_the_page_shows(tmp_path: Path) -> None:
    """scenarios/diffusion-llada2-mini.yaml, run here, gives the tables of docs/diffusion.md."""
    outcome = run_scenario(load_scenario(SHIPPED), tmp_path, QuietReporter())
    shown = DIFFUSION_MD.read_text()
    for study in outcome.studies:
        table, _, _ = study_text(study).partition("* best of its column")
        assert "\n".join(table.splitlines()) in shown


def test_it_names_a_model_of_the_catalog() -> None:
    """The scenario is named after the system, and its comment on sizes holds."""
    model = load_model(load_scenario(SHIPPED).model)
    assert (model.num_moe_layers, model.num_experts) == (19, 256)
    assert round(64 * 19 * model.expert_bytes / 1e9, 1) == 7.7
    assert json.dumps(scenario_schema()).count("RefreshChoice") > 1
