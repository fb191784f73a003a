"""The command line: what each verb prints and writes, and that a mistake is one line and exit status 2."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, call_json
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import moesim
from moesim.artifacts import digest_file
from moesim.cli import app
from moesim.cli_common import describe_file, parse_options, plain
from moesim.cli_measure import resized
from moesim.errors import InputError
from moesim.model.catalog import load_model, model_names
from moesim.placement.plan import read_plan
from moesim.simulate.result import read_result
from moesim.traces.store import read_trace

PLACE = ("place", "--trace", "tiny.trace.parquet", "--model", "tiny/config.json", "--hardware", "h100-sxm",
         "--gpus-per-node", "4", "--solver", "lpt")


def test_version_and_help() -> None:
    """`--version` prints the package's version; help names every verb."""
    assert call("--version").strip() == f"moesim {moesim.__version__}"
    text = call("--help")
    for verb in ("run", "trace", "hardware", "model", "calibrate", "place", "simulate", "validate", "export",
                 "report", "schema"):
        assert re.search(rf"\b{verb}\b", text)
    assert call() == text  # without a verb: the same page


def test_every_verb_has_help() -> None:
    """Each verb and sub-verb explains itself in a sentence."""
    for words in ("run", "report", "schema", "calibrate", "place", "simulate", "validate", "export",
                  "trace info", "trace stats", "trace import", "trace synth", "trace capture",
                  "hardware list", "hardware show", "model list", "model show"):
        assert "Usage" in call(*words.split(), "--help")


# every row: the arguments, and what the one line on stderr must hold
BAD_INPUT = [
    ("fun", "No such command 'fun'. Did you mean 'run'? Try 'moesim --help'."),
    ("--verbose", "No such option: --verbose"),
    ("trace inof", "Did you mean 'info'?"),
    ("run", "Missing argument"),
    ("run nope.yaml", "nope.yaml: no such file"),
    ("run tiny", "tiny: is a folder, not a file"),
    ("run tiny.trace.parquet", "tiny.trace.parquet"),  # not YAML at all
    ("run tiny.yaml --only one-gp", "has no study 'one-gp'. Did you mean 'one-gpu'?"),
    ("run tiny.yaml --output tiny.yaml", "--output tiny.yaml: is a file, not a folder"),
    ("report .", "nothing to report"),
    ("report nowhere", "nowhere"),
    ("trace info nope.trace.parquet", "nope.trace.parquet: no such file"),
    ("trace info tiny/config.json", "tiny/config.json: "),  # not Parquet
    ("trace info builtin:nope", "unknown built-in trace 'nope'"),
    ("trace stats tiny.trace.parquet --phase decod", "unknown phase 'decod'. Did you mean 'decode'?"),
    ("trace stats tiny.trace.parquet --max-tokens 0", "--max-tokens"),
    ("trace synth --out x.trace.parquet --top-k 99", "top_k must be at most num_experts (64), got 99"),
    ("trace synth --out x.trace.parquet --num-layers many", "Invalid value for '--num-layers'"),
    ("trace import nope.npz --out x.trace.parquet", "nope.npz: no such file"),
    ("trace import tiny/config.json --out x.trace.parquet --option phase=decode", "give it as --phase"),
    ("trace import tiny/config.json --out x.trace.parquet --option axes", "expected KEY=VALUE"),
    ("trace capture tiny prompts.jsonl --out x.trace.parquet", "prompts.jsonl"),
    ("hardware show h100-smx", "unknown hardware 'h100-smx'. Did you mean 'h100-sxm'?"),
    ("hardware show rtx-4090 --gpus-per-node 9", "9"),
    ("model show mixtral-8x7", "unknown model 'mixtral-8x7'. Did you mean 'mixtral-8x7b'?"),
    ("calibrate --seconds 0", "--seconds must be positive, got 0.0"),
    ("calibrate --seconds inf", "--seconds must be positive, got inf"),
    ("calibrate --hidden 1000 --seconds 1", "--hidden 1000"),
    ("validate tiny.yaml", "expected one validation study, found none"),
    ("validate tiny.yaml --study one-gpu", "is of kind 'offload', not 'validation'"),
    ("simulate --scenario tiny.yaml --study one-gpu --point 4 --out x.result", "has points 0 ... 3"),
    ("simulate --scenario tiny.yaml --study four-gpus --plan no.plan.json --out x.result",
     "no.plan.json: no such file"),
    ("simulate --scenario tiny.yaml --study one-gpu --plan no.plan.json --out x.result",
     "--plan needs a study of kind 'expert_parallel'"),
    ("simulate --scenario tiny.yaml --study four-gpus --plan a --point 0 --out x.result", "not both"),
    ("simulate --scenario tiny.yaml --study one-gpu --out tiny", "is left as it is"),
    ("export nope.plan.json --to eplb --out x.npz", "nope.plan.json: no such file"),
    ("export nope.plan.json --to sglan --out x.json", "'sglan'. Did you mean 'sglang'?"),
    ("export nope.result --to perfetto --out x.json", "nope.result: no such result folder"),
    ("export nope.plan.json --to eplb --out x.npz --overlay a", "--overlay belongs to --to perfetto"),
]


def assert_one_line(arguments: list[str], message: str) -> None:
    """A mistake: exit status 2, nothing on stdout, one line on stderr, no traceback, no file."""
    before = sorted(Path.cwd().iterdir())
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("line", "message"), BAD_INPUT)
def test_a_mistake_is_one_line(line: str, message: str) -> None:
    """Whatever is wrong, the user reads one line that says what, and nothing is written."""
    assert_one_line(line.split(), message)


def test_several_problems_are_several_lines(folder: Path) -> None:
    """Each problem of a scenario file has its own `error:` line."""
    text = (folder / "tiny.yaml").read_text()
    (folder / "bad.yaml").write_text(text.replace("seed: 3", "seed: x").replace("kind: offload", "kind: off"))
    done = CliRunner().invoke(app, ["run", "bad.yaml"])
    assert done.exit_code == 2
    assert [line.split(": ")[:2] for line in done.stderr.splitlines()] == [
        ["error", "bad.yaml:3:1"], ["error", "bad.yaml:18:5"]]


def test_debug_shows_the_traceback(folder: Path) -> None:
    """With --debug the error itself comes through."""
    done = CliRunner().invoke(app, ["--debug", "run", "nope.yaml"])
    assert isinstance(done.exception, InputError)


@pytest.mark.parametrize(("error", "status", "message"), [
    (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("two\nlines"), 1, "a bug in moesim: RuntimeError: two lines (--debug"),
    (PermissionError(13, "Permission denied", "x.json"), 2, "x.json: Permission denied"),
])
def test_other_ends_are_one_line_too(
    error: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt, a bug and an error of the system have their own exit status and no traceback."""

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("moesim.model.catalog.load_model", fail)
    done = CliRunner().invoke(app, ["model", "show", "olmoe-1b-7b"])
    assert done.exit_code == status
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_model_verbs_show_the_catalog() -> None:
    """`model list` and `model show` give the spec's own numbers."""
    listed = call_json("model", "list")
    assert list(listed) == model_names()
    spec = load_model("mixtral-8x7b")
    shown = call_json("model", "show", "mixtral-8x7b")
    assert shown["expert_bytes"] == listed["mixtral-8x7b"]["expert_bytes"] == spec.expert_bytes == 336 * 2**20
    assert "352 MB" in call("model", "show", "mixtral-8x7b")


def test_hardware_verbs_show_the_catalog() -> None:
    """`hardware show` expands the machine to the size asked for."""
    assert {"h100-sxm", "rtx-4090"} <= {row["name"] for row in call_json("hardware", "list")}
    shown = call_json("hardware", "show", "h100-sxm", "--num-nodes", "2", "--gpus-per-node", "3")
    assert shown["ranks"] == [f"node{node}.gpu{gpu}" for node in range(2) for gpu in range(3)]
    assert "node0.gpu0.pcie" in call("hardware", "show", "rtx-4090")


def test_synth_writes_the_same_trace_for_the_same_seed(folder: Path) -> None:
    """A made-up trace has the sizes asked for, and its bytes follow from the seed."""
    sizes = ("--num-tokens", "50", "--num-layers", "2", "--num-experts", "6", "--top-k", "3",
             "--num-requests", "4")
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        facts = call_json("trace", "synth", "--out", f"{name}.trace.parquet", *sizes, "--seed", seed)
        assert (facts["num_tokens"], facts["num_requests"], facts["top_k"]) == (50, 4, 3)
    digests = [digest_file(folder / f"{name}.trace.parquet") for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_info_and_stats_agree_with_the_trace(folder: Path) -> None:
    """`info` reads the header, `stats` counts the load: both as numpy counts them."""
    trace = read_trace(folder / "tiny.trace.parquet")
    facts = call_json("trace", "info", "tiny.trace.parquet")
    assert (facts["num_tokens"], facts["num_experts"], facts["digest"]) == (160, 8, trace.digest())
    found = call_json("trace", "stats", "tiny.trace.parquet")
    load = [np.bincount(trace.expert_ids[:, layer].ravel(), minlength=8).tolist() for layer in range(3)]
    assert found["expert_load"] == load
    assert "lru_hit_rate" in call("trace", "stats", "tiny.trace.parquet")
    assert "synthetic" in call("trace", "info", "tiny.trace.parquet")


def test_import_reads_a_foreign_file(folder: Path) -> None:
    """`trace import` keeps every id of an array that another tool saved."""
    ids = np.argsort(np.random.default_rng(0).random((30, 4, 9)), axis=2)[..., :2].astype(np.int16)
    np.save(folder / "other.npy", ids)
    facts = call_json("trace", "import", "other.npy", "--out", "other.trace.parquet", "--num-experts", "9")
    assert (facts["num_layers"], facts["num_experts"], facts["top_k"]) == (4, 9, 2)
    assert np.array_equal(read_trace(folder / "other.trace.parquet").expert_ids, ids)


def test_export_writes_what_the_engines_load(folder: Path) -> None:
    """The exported arrays are the plan's; the model is the one that the plan was made for."""
    call(*PLACE, "--out", "a.plan.json")
    slots = read_plan(folder / "a.plan.json").physical_to_logical
    facts = call_json("export", "a.plan.json", "--to", "eplb", "--out", "a.npz", "--model", "tiny/config.json")
    with np.load(folder / "a.npz", allow_pickle=False) as found:
        assert np.array_equal(found["phy2log"], slots)
    assert facts["file"] == "a.npz"
    text = call("export", "a.plan.json", "--to", "sglang", "--out", "a.json", "--model", "tiny/config.json")
    assert json.loads((folder / "a.json").read_text())["physical_to_logical_map"] == slots.tolist()
    assert "--init-expert-location" in text


@pytest.fixture
def ran(folder: Path) -> dict[str, Any]:
    """What `run --json` printed for the offload study."""
    return call_json("run", "tiny.yaml", "--only", "one-gpu", "--output", "out")


def test_run_names_files_that_exist(folder: Path, ran: dict[str, Any]) -> None:
    """Every file that `run` names is there, a report among them, and `simulate` gives a row's numbers again."""
    assert all((folder / file).exists() for file in ran["files"])
    assert any(file.endswith("report.html") for file in ran["files"])
    rows = ran["studies"][0]["rows"]
    assert [(row["policy"], row["slots_per_layer"]) for row in rows] == [
        ("lru", 2), ("lru", 4), ("static", 2), ("static", 4)]
    one = call_json("simulate", "--scenario", "tiny.yaml", "--study", "one-gpu", "--point", "3", "--out", "x.result")
    assert one["summary"]["tokens_per_s"] == rows[3]["tokens_per_s"]
    assert read_result(folder / "x.result").summary == one["summary"]
    (folder / "out" / "report.html").unlink()
    assert call_json("report", "out")["file"] == "out/report.html"
    assert (folder / "out" / "report.html").is_file()


def test_run_talks_to_people(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come on stderr as points finish; the table and the list of files on stdout."""
    monkeypatch.setattr("moesim.scenario.run.report_folder", lambda output: Path(output) / "report.html")
    done = CliRunner().invoke(app, ["run", "tiny.yaml"])
    assert done.exit_code == 0
    assert done.stderr.index("contiguous, imbalance") < done.stderr.index("eplb, +4 slots, imbalance")
    assert "lru, miss: load, 2 slots/layer, hit rate" in done.stderr
    assert "Four GPUs" in done.stdout
    written = done.stdout[done.stdout.index("Written"):]
    assert "results/tiny/one-gpu.study.json" in written
    assert "the report: open it in a browser" in written


def test_simulate_takes_a_plan_and_export_its_timeline(folder: Path) -> None:
    """A plan from `place` runs in the study's set-up; the timeline has a slice per task that took time."""
    call(*PLACE, "--out", "a.plan.json")
    call("simulate", "--scenario", "tiny.yaml", "--study", "four-gpus", "--plan", "a.plan.json", "--out", "a.result")
    call("export", "a.result", "--to", "perfetto", "--out", "a.json.gz")
    tasks = read_result(folder / "a.result").tasks
    events = json.loads(gzip.decompress((folder / "a.json.gz").read_bytes()))["traceEvents"]
    shown = tasks[(tasks["state"] == 0) & (tasks["resource"] != "") & (tasks["duration_ns"] > 0)]
    assert sorted(event["args"]["task"] for event in events if event["ph"] == "X" and event["cat"] != "step") \
        == sorted(shown["task"])


def test_simulate_twice_gives_the_same_tables(folder: Path) -> None:
    """The same scenario and point give the same tasks, to the nanosecond."""
    for name in ("a.result", "b.result"):
        call("simulate", "--scenario", "tiny.yaml", "--study", "four-gpus", "--point", "1", "--out", name)
    assert read_result(folder / "a.result").tasks.equals(read_result(folder / "b.result").tasks)


def test_schema_goes_to_stdout_or_a_file(folder: Path) -> None:
    """Both ways give the same JSON Schema."""
    printed = json.loads(call("schema"))
    call("schema", "--out", "scenario.schema.json")
    assert json.loads((folder / "scenario.schema.json").read_text()) == printed
    assert printed["additionalProperties"] is False


def test_resized_models_keep_the_width_of_a_head() -> None:
    """Another hidden size changes the number of heads; what cannot be resized says so."""
    model = load_model("olmoe-1b-7b")
    small = resized(model, 512, 256)
    assert (small.hidden_size, small.expert_intermediate_size) == (512, 256)
    assert small.attention.num_heads * small.attention.head_dim == 512
    assert resized(model, None, None) == model
    with pytest.raises(InputError, match=r"--hidden 512: the attention of 'deepseek-v3' \(mla"):
        resized(load_model("deepseek-v3"), 512, None)


values = st.one_of(st.integers(-10**6, 10**6), st.booleans(), st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=50, deadline=None)
@given(options=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), values, max_size=4))
def test_options_come_through_as_they_were(options: dict[str, Any]) -> None:
    """Numbers and booleans written as KEY=VALUE are read back as the same values and types."""
    pairs = [f"{key}={json.dumps(value)}" for key, value in options.items()]
    found = parse_options(pairs)
    assert found == options
    assert [type(value) for value in found.values()] == [type(value) for value in options.values()]


def test_options_that_are_no_number_stay_text() -> None:
    """Only JSON numbers and booleans are converted; a value may hold `=`; nothing is evaluated."""
    assert parse_options(["a=global", "b=x=y", "c=[1]", "d=", "e=__import__('os')"]) == {
        "a": "global", "b": "x=y", "c": "[1]", "d": "", "e": "__import__('os')"}


@pytest.mark.parametrize(("value", "expected"), [
    (np.array([[1, 2]]), [[1, 2]]),
    (np.float64("nan"), None),
    (math.inf, None),
    ({"a": (Path("b"), np.int64(3), True, None)}, {"a": ["b", 3, True, None]}),
])
def test_json_output_is_plain(value: object, expected: object) -> None:
    """Arrays, paths and numbers that JSON lacks become what it has."""
    assert plain(value) == expected
    json.dumps(plain(value), allow_nan=False)


@pytest.mark.parametrize(("name", "words"), [
    ("a.plan.json", "a placement plan"), ("run.result", "one run"), ("report.html", "the report"),
    ("x.perfetto.json", "a timeline"), ("x.unknown", ""),
])
def test_files_are_described_by_their_ending(name: str, words: str) -> None:
    """The longest ending that fits decides; an unknown file has no description."""
    assert describe_file(Path(name)).startswith(words)
    assert bool(describe_file(Path(name))) == bool(words)


def fake_profile(**settings: Any) -> Callable[..., Any]:
    """A stand-in for the measurement: records how it was called, reports progress, returns one table."""
    from moesim.hardware.profile import CalibrationProfile, MeasuredTable

    def measure(model: Any, *, progress: Callable[[str, float, float], None], **given: Any) -> Any:
        settings["seen"].update(given, hidden=model.hidden_size)
        progress("kernels", 1.0, 2.0)
        progress("kernels", 2.0, 2.0)
        table = MeasuredTable("copy", "slow_to_fast", "", "", ("bytes",), ((1.0,), (2.0,)), (1.0, 2.0),
                              (0.1, 0.2), (3, 3), 0.05, 0.125)
        return CalibrationProfile("fake", (table,), {"device": "cpu"}, "2026-01-01", given["seed"])

    return measure


def test_calibrate_passes_its_options_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb hands over device, seconds, seed, dtype and sizes, and writes the profile it gets."""
    from moesim.calibrate import run
    seen: dict[str, Any] = {}
    monkeypatch.setattr(run, "calibrate", fake_profile(seen=seen))
    text = call("calibrate", "--out", "a.profile.json", "--device", "cpu", "--seconds", "3", "--seed", "4",
                "--hidden", "256")
    assert {key: seen[key] for key in ("device", "seconds", "seed", "dtype", "hidden")} == {
        "device": "cpu", "seconds": 3.0, "seed": 4, "dtype": "float32", "hidden": 256}
    assert (seen["full"], seen["parts"]) == (False, ("kernels", "copies", "files", "collectives"))
    assert (seen["partial"].name, seen["disk"]) == ("a.profile.json.partial", folder)
    assert "12.5 %" in text
    facts = call_json("calibrate", "--out", "a.profile.json", "--seconds", "3")
    assert facts["tables"][0]["num_sizes"] == 2
    assert json.loads((folder / "a.profile.json").read_text())["name"] == "fake"
