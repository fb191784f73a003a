"""Scenario files: what they hold, how a grid expands, and that every mistake is named with its place."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rich.console import Console
from ruamel.yaml import YAML

from moesim.errors import InputError
from moesim.scenario.load import load_scenario, scenario_schema
from moesim.scenario.reporter import QuietReporter, RichReporter, point_line
from moesim.scenario.schema import Point, PointBlock, Scenario, ValidationStudy
from moesim.simulate.study import StudyResult

QUICKSTART = Path(__file__).parent.parent / "scenarios" / "quickstart.yaml"


def edited(folder: Path, old: str, new: str) -> Path:
    """Write tiny.yaml with one piece of text replaced; returns the new file."""
    text = (folder / "tiny.yaml").read_text()
    assert old in text
    (folder / "edited.yaml").write_text(text.replace(old, new))
    return folder / "edited.yaml"


def place_of(text: str, word: str) -> str:
    """Return ``LINE:COLUMN`` (from 1) of the first place of a word in a text."""
    before = text[: text.index(word)]
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def test_a_whole_file_is_read(tiny_folder: Path) -> None:
    """Values, defaults and order come out as the file has them."""
    scenario = load_scenario(tiny_folder / "tiny.yaml")
    parallel, offload = scenario.studies
    assert (scenario.name, scenario.seed, scenario.trace_stands_in) == ("tiny", 3, True)
    assert (parallel.kind, parallel.heading, parallel.hardware.num_nodes) == ("expert_parallel", "Four GPUs", 1)
    assert [choice.label for choice in parallel.placement.plans] == ["contiguous", "eplb"]
    assert parallel.placement.plans[1].options == {"policy": "global"}
    assert (offload.heading, offload.cache.preload, offload.system.chunks) == ("one-gpu", "popular", 3)
    assert scenario.output_folder == Path("results/tiny")


def test_paths_are_relative_to_the_file(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model, trace, hardware, profile and plan files are found beside the scenario, from any folder."""
    for name in ("box.yaml", "here.profile.json", "mine.plan.json"):
        (tiny_folder / name).write_text("{}")
    path = edited(tiny_folder, "{solver: contiguous}", "{plan: mine.plan.json}")
    path.write_text(path.read_text().replace("{name: rtx-4090}", "{name: box.yaml}\n    profile: here.profile.json"))
    monkeypatch.chdir("/")
    scenario = load_scenario(path)
    plans = scenario.studies[0].placement.plans
    assert (plans[0].plan, plans[0].label) == (str(tiny_folder / "mine.plan.json"), "mine")
    assert scenario.model == str(tiny_folder / "tiny/config.json")
    assert scenario.trace == str(tiny_folder / "tiny.trace.parquet")
    assert scenario.studies[1].hardware.name == str(tiny_folder / "box.yaml")
    assert scenario.studies[1].profile == str(tiny_folder / "here.profile.json")
    assert scenario.studies[0].hardware.name == "h100-sxm"  # a name of the catalog stays


def test_the_schema_accepts_what_the_loader_accepts(tiny_folder: Path) -> None:
    """The JSON Schema, judged by an independent validator, takes the files that moesim takes."""
    schema = scenario_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for file in (tiny_folder / "tiny.yaml", QUICKSTART):
        document = YAML(typ="safe", pure=True).load(file)
        assert list(jsonschema.Draft202012Validator(schema).iter_errors(document)) == []


@pytest.mark.parametrize(("old", "new"), [
    ("gpus_per_node: 4", "gpus_per_nod: 4"),  # unknown key
    ("seed: 3", "seed: -3"),  # out of range
    ("kind: offload", "kind: off"),  # unknown kind
    ("policy: [lru, static]", "policy: []"),  # empty list
    ("model: tiny/config.json\n", ""),  # missing key
])
def test_the_schema_refuses_what_the_loader_refuses(tiny_folder: Path, old: str, new: str) -> None:
    """A mistake is one for the JSON Schema and for the loader alike."""
    path = edited(tiny_folder, old, new)
    document = YAML(typ="safe", pure=True).load(path)
    assert list(jsonschema.Draft202012Validator(scenario_schema()).iter_errors(document))
    with pytest.raises(InputError):
        load_scenario(path)


def test_quickstart_is_valid(tmp_path: Path) -> None:
    """The scenario that ships has three studies, and every name in it is known."""
    (tmp_path / "any.trace.parquet").write_bytes(b"")
    text = QUICKSTART.read_text().replace("builtin:tiny-olmoe", "any.trace.parquet")
    (tmp_path / "q.yaml").write_text(text)
    scenario = load_scenario(tmp_path / "q.yaml")
    assert [study.kind for study in scenario.studies] == ["expert_parallel", "offload", "validation"]
    assert len(scenario.studies[1].expand()) == 18
    assert scenario.study("real-run").point == Point("lru", 24)
    assert scenario.study("real-run").slow_tier_bytes_per_s == 3 * 10**9


def test_yaml_numbers_with_exponents_are_numbers(tiny_folder: Path) -> None:
    """`2e0` is a number and `1e1` no whole number: YAML 1.2, and no silent conversion."""
    path = edited(tiny_folder, "    placement:\n", "    system: {dispatch_bytes: 2e0}\n    placement:\n")
    assert load_scenario(path).studies[0].system.dispatch_bytes == 2.0
    with pytest.raises(InputError, match=r"workload\.batch_size: must be a whole number, got 10\.0$"):
        load_scenario(edited(tiny_folder, "batch_size: 8", "batch_size: 1e1"))


# every row: what is replaced, by what, the word at the reported place, the message after the place
MISTAKES = [
    # an unknown key, with the closest one
    ("gpus_per_node", "gpu_per_node", "gpu_per_node",
     "studies[0].hardware: unknown key 'gpu_per_node'. Did you mean 'gpus_per_node'?"),
    ("seed: 3", "sed: 3", "sed", "unknown key 'sed'. Did you mean 'seed'?"),
    # a missing key, at the mapping that lacks it
    ("batch_size: 8, ", "", "workload", "studies[0].workload: missing key 'batch_size'"),
    ("  - kind: offload\n    name", "  - name", "name: one-gpu",
     "studies[1]: missing key 'kind' (expert_parallel, offload, diffusion, validation)"),
    # wrong types
    ("batch_size: 8", "batch_size: '8'", "batch_size",
     "studies[0].workload.batch_size: must be a whole number, got '8'"),
    ("batch_size: 8", "batch_size: true", "batch_size",
     "studies[0].workload.batch_size: must be a whole number, got true"),
    ("{name: rtx-4090}", "rtx-4090", "hardware: rtx",
     "studies[1].hardware: must be a mapping, got 'rtx-4090'"),
    ("name: tiny\n", "name: 5\n", "name: 5", "name: must be text, got 5"),
    ("name: tiny\n", "name:\n", "name:", "name: must be text, got nothing"),
    ("name: tiny\n", "name: !!python/name:os.system x\n", "name:", "name: must be text, got a TaggedScalar"),
    # out of range
    ("max_steps: 4", "max_steps: 0", "max_steps: 0",
     "studies[1].workload.max_steps: must be greater than or equal to 1, got 0"),
    ("max_steps: 4", "max_steps: 4, warmup_steps: 4", "workload: {batch_size: 1",
     "studies[1].workload: warmup_steps 4 leaves none of max_steps 4"),
    ("    placement:\n", "    placement:\n      train_fraction: 1.0\n", "train_fraction",
     "studies[0].placement.train_fraction: must be less than 1, got 1.0"),
    ("    placement:\n", "    placement:\n      time_limit_s: .inf\n", "time_limit_s",
     "studies[0].placement.time_limit_s: must be a finite number, got inf"),
    ("slots_per_layer: [2, 4]", "slots_per_layer: [2, 0]", "0]}",
     "studies[1].points[0].slots_per_layer[1]: must be greater than or equal to 1, got 0"),
    ("slots_per_layer: [2, 4]", "slots_per_layer: []", "slots_per_layer: []",
     "studies[1].points[0].slots_per_layer: must not be empty"),
    ("name: one-gpu", "name: a/b", "name: a/b",
     "studies[1].name: must be letters, digits, '.', '_' and '-' only, a letter or digit first, got 'a/b'"),
    # names that nothing knows
    ("kind: offload", "kind: offlod", "kind: offlod",
     "studies[1].kind: unknown kind 'offlod'. Did you mean 'offload'?"),
    ("[lru, static]", "[lru, statik]", "statik",
     "studies[1].points[0].policy[1]: unknown cache policy 'statik'. Did you mean 'static'?"),
    ("[lru, static]", "lruu", "policy: lruu",
     "studies[1].points[0].policy: unknown cache policy 'lruu'. Did you mean 'lru'?"),
    ("solver: contiguous", "solver: contigous", "solver: contigous",
     "studies[0].placement.plans[0].solver: unknown placement solver 'contigous'. Did you mean 'contiguous'?"),
    ("policy: global", "polcy: global", "{solver: eplb",
     "studies[0].placement.plans[1]: solver 'eplb' has no option 'polcy'. Did you mean 'policy'?"),
    ("[lru, static]", "lru, miss: cpus", "miss: cpus",
     "studies[1].points[0].miss: unknown way to handle a miss 'cpus'. Did you mean 'cpu'?"),
    ("name: rtx-4090", "name: rtx-4091", "name: rtx-4091",
     "studies[1].hardware.name: unknown hardware 'rtx-4091'. Did you mean 'rtx-4090'?"),
    ("model: tiny/config.json", "model: olmoe-1b-8b", "model: olmoe",
     "model: unknown model 'olmoe-1b-8b'. Did you mean 'olmoe-1b-7b'?"),
    ("moesim.scenario/1", "moesim.scenario/9", "schema",
     "schema: must be 'moesim.scenario/1', got 'moesim.scenario/9'"),
    # two sources, or none, for a plan
    ("{solver: contiguous}", "{}", "{}", "studies[0].placement.plans[0]: give either 'solver' or 'plan'"),
    ("{solver: contiguous}", "{plan: a.plan.json, redundant_experts: 2}", "{plan",
     "studies[0].placement.plans[0]: 'redundant_experts' and 'options' belong to a solver; a plan has its own"),
    ("{policy: global}", "{policy: [1]}", "options",
     "studies[0].placement.plans[1].options: option 'policy' must be text, a number, true or false, got [1]"),
    # prefetch keys that do nothing, or that are missing
    ("[lru, static]", "lru, prefetch_width: 4", "{policy: lru",
     "studies[1].points[0]: 'prefetch_width' does nothing with prefetch: none"),
    ("[lru, static]", "lru, prefetch: stated_recall", "{policy: lru",
     "studies[1].points[0]: prefetch: stated_recall needs 'prefetch_recall' (0 ... 1): "
     "it rests on a predictor whose recall you state"),
    ("[lru, static]", "lru, miss: ktransformers, miss_options: {defr: 2}", "{policy: lru",
     "studies[1].points[0]: miss rule 'ktransformers': unknown option 'defr'. Did you mean 'defer'?"),
    ("[lru, static]", "lru, miss: [load, cpu], miss_options: {defer: 2}", "{policy: lru",
     "studies[1].points[0]: 'miss_options' belong to one rule; name a single 'miss'"),
    ("[lru, static]", "lru, lookahead: 2", "{policy: lru",
     "studies[1].points[0]: 'lookahead' does nothing with prefetch: none"),
    ("[lru, static]", "lru, prefetch: oracle, prefetch_recall: 0.5", "{policy: lru",
     "studies[1].points[0]: 'prefetch_recall' belongs to a prefetcher that rests on a stated recall, not to oracle"),
    # not YAML, or not what YAML means
    ("seed: 3", "seed: 3\nseed: 4", "seed: 4", 'found duplicate key "seed"'),
    ("seed: 3", "seed: [3", "name: one-gpu", None),
    ("seed: 3", "seed: 3\n---\na: 1", "---",
     "expected a single document in the stream, but found another document"),
    # study names
    ("name: one-gpu", "name: four-gpus", "schema",
     "study names must differ; used more than once: four-gpus"),
]


@pytest.mark.parametrize(("old", "new", "word", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_place(
    tiny_folder: Path, old: str, new: str, word: str, message: str | None
) -> None:
    """One line: file, line and column of the key, its path, what is wrong and what was meant."""
    path = edited(tiny_folder, old, new)
    with pytest.raises(InputError) as error:
        load_scenario(path)
    if message is None:  # the parser's own words differ between versions; its place is a line of the file
        assert str(error.value).startswith(f"{path}:")
        return
    assert str(error.value) == f"{path}:{place_of(path.read_text(), word)}: {message}"


def test_all_mistakes_are_listed_in_the_order_of_the_file(tiny_folder: Path) -> None:
    """Several problems give several lines, top to bottom."""
    path = edited(tiny_folder, "gpus_per_node: 4", "gpus: 4, nodes: 2")
    path.write_text(path.read_text().replace("max_steps: 4", "max_steps: -4").replace("seed: 3", "seed: x"))
    with pytest.raises(InputError) as error:
        load_scenario(path)
    keys = [line.split(": ", 2)[1] for line in str(error.value).splitlines()]
    assert keys == ["seed", "studies[0].hardware", "studies[0].hardware", "studies[1].workload.max_steps"]


@pytest.mark.parametrize(("key", "value", "message"), [
    ("trace: tiny.trace.parquet", "trace: other.trace.parquet", "trace: no such file: {folder}/other"),
    ("trace: tiny.trace.parquet", "trace: builtin:nope", "trace: unknown trace 'builtin:nope'"),
    ("model: tiny/config.json", "model: else/config.json", "model: no such file: {folder}/else/config.json"),
    ("{solver: contiguous}", "{plan: no.plan.json}", "plans[0].plan: no such file: {folder}/no.plan.json"),
    ("workload: {batch_size: 1,", "profile: no.profile.json\n    workload: {batch_size: 1,",
     "profile: no such file: {folder}/no.profile.json"),
])
def test_a_file_that_is_not_there_is_named(tiny_folder: Path, key: str, value: str, message: str) -> None:
    """The path that was tried is in the message, before anything runs."""
    path = edited(tiny_folder, key, value)
    with pytest.raises(InputError) as error:
        load_scenario(path)
    assert message.format(folder=tiny_folder) in str(error.value)


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: path.write_text(""), ":1:1: expected a mapping with the keys of a scenario, found nothing"),
    (lambda path: path.write_text("- a\n"), "expected a mapping with the keys of a scenario, found a list"),
    (lambda path: path.write_bytes(b"\x80\x04\x95"), "this is a Python pickle"),
    (lambda path: path.write_bytes(b"a: \xff\xfe"), "not valid YAML"),
    (lambda path: path.write_text(f"a: {'[' * 40}{']' * 40}\n"), "nested too deeply"),
    (lambda path: path.write_text(f"{'[' * 500}{']' * 500}"), "not valid YAML"),
    (lambda path: path.write_text("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in itertools.pairwise("abcdefgh"))),
     "too large for a scenario"),
    (lambda path: path.mkdir(), "is a folder, not a file"),
    (lambda path: None, "no such file"),
])
def test_a_file_that_is_no_scenario(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    """Whatever stands at the path, the answer is an InputError that names it."""
    path = tmp_path / "bad.yaml"
    write(path)
    with pytest.raises(InputError) as error:
        load_scenario(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_scenarios_cannot_be_changed(tiny_folder: Path) -> None:
    """A loaded scenario is frozen."""
    scenario = load_scenario(tiny_folder / "tiny.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        scenario.seed = 4


def test_an_unknown_study_is_an_error(tiny_folder: Path) -> None:
    """`study` suggests the closest name."""
    scenario = load_scenario(tiny_folder / "tiny.yaml")
    with pytest.raises(InputError, match=r"scenario 'tiny' has no study 'one-gp'\. Did you mean 'one-gpu'\?"):
        scenario.study("one-gp")


def test_a_round_trip_through_python_keeps_everything(tiny_folder: Path) -> None:
    """A scenario rebuilt from its own values is equal to it."""
    scenario = load_scenario(tiny_folder / "tiny.yaml")
    assert Scenario.model_validate(scenario.model_dump(by_alias=True, exclude_unset=True)) == scenario


def test_output_has_a_default(tiny_folder: Path) -> None:
    """Without `output` a run goes to results/<name>."""
    assert load_scenario(edited(tiny_folder, "output: results/tiny\n", "")).output_folder == Path("results/tiny")


names = st.sampled_from(["lru", "lfu", "belady", "static"])
prefetchers = st.sampled_from(["none", "transition", "popularity", "stated_recall"])


@settings(max_examples=50, deadline=None)
@given(policy=st.lists(names, min_size=1, max_size=3), prefetch=st.lists(prefetchers, min_size=1, max_size=3),
       slots=st.lists(st.integers(1, 64), min_size=1, max_size=3),
       width=st.lists(st.integers(1, 9), min_size=1, max_size=2))
def test_a_grid_is_the_crossed_lists(
    policy: list[str], prefetch: list[str], slots: list[int], width: list[int]
) -> None:
    """`expand` gives each combination once; width and recall multiply only the prefetchers that use them."""
    keys: dict[str, object] = {"policy": policy, "prefetch": prefetch, "slots_per_layer": slots}
    if set(prefetch) != {"none"}:
        keys["prefetch_width"] = width
    if "stated_recall" in prefetch:
        keys["prefetch_recall"] = [0.5, 0.9]
    found = PointBlock.model_validate(keys).expand()
    expected = {
        Point(p, s, f, 0 if f == "none" else w, r if f == "stated_recall" else None)
        for p, s, f, w, r in itertools.product(policy, slots, prefetch, width, (0.5, 0.9))}
    assert len(found) == len(set(found))
    assert set(found) == expected


def test_a_scalar_is_a_list_of_one() -> None:
    """A grid key may be written without brackets."""
    scalar = PointBlock(policy="lru", slots_per_layer=4, prefetch="oracle", prefetch_width=2)
    assert scalar.expand() == [Point("lru", 4, "oracle", 2)]


def test_blocks_that_overlap_give_each_point_once(tiny_folder: Path) -> None:
    """A point that two blocks name is simulated once."""
    path = edited(tiny_folder, "    points:\n", "    points:\n      - {policy: lru, slots_per_layer: [4, 6]}\n")
    points = load_scenario(path).studies[1].expand()
    assert [(p.policy, p.slots_per_layer) for p in points] == [
        ("lru", 4), ("lru", 6), ("lru", 2), ("static", 2), ("static", 4)]


def test_validation_studies_check_their_prefetcher() -> None:
    """A validation study has one point, with a width only where something is prefetched."""
    keys = {"kind": "validation", "name": "v", "slots_per_layer": 4, "slow_tier_bytes_per_s": 1.5}
    assert ValidationStudy.model_validate(keys).point == Point("lru", 4)
    fetching = ValidationStudy.model_validate({**keys, "prefetch": "transition", "prefetch_width": 3})
    assert fetching.point == Point("lru", 4, "transition", 3)
    with pytest.raises(ValidationError, match="needs 'prefetch_recall'"):
        ValidationStudy.model_validate({**keys, "prefetch": "stated_recall"})


def reporter_texts(tell: Callable[[RichReporter], None]) -> tuple[str, str]:
    """Return what a reporter wrote to its two consoles (tables, log)."""
    out, log = (Console(file=io.StringIO(), width=110, color_system=None) for _ in range(2))
    with RichReporter(out, log) as reporter:
        tell(reporter)
    return out.file.getvalue(), log.file.getvalue()  # type: ignore[attr-defined]


def test_rows_come_in_words() -> None:
    """A row is one line: what was tried, then what came out; what says nothing is left out."""
    row = {"policy": "lru", "prefetch": "none", "miss": "cpu", "slots_per_layer": 16, "hit_rate": 0.5,
           "tpot_s": 0.002, "tokens_per_s": 500.0, "redundant_experts": 0, "error": float("nan")}
    assert point_line(row) == (
        "lru, miss: cpu, 16 slots/layer, hit rate 50.0 %, 2 ms per token, 500 tokens/s")


def test_tables_and_progress_go_to_different_places() -> None:
    """Finished tables are on one console, titles, rows and sentences on the other, brackets and all."""
    table = pd.DataFrame({"placement": ["lpt [x]"], "step_time_s": [0.001]})

    def tell(reporter: RichReporter) -> None:
        reporter.study_started("a", "A [title]", 1)
        reporter.point_done("a", {"placement": "lpt [x]", "step_time_s": 0.001})
        reporter.progress("measuring", 1.5, 3.0)
        reporter.progress("measuring", 3.0, 3.0)
        reporter.message("left [out]: why")
        reporter.study_done(StudyResult("a", "expert_parallel", "A [title]", table))

    out, log = reporter_texts(tell)
    assert "lpt [x]" in out
    assert "left [out]" not in out
    assert [text in log for text in ("A [title]", "lpt [x], 1 ms per step", "left [out]: why")] == [True] * 3


@pytest.mark.parametrize("call", [
    lambda reporter: reporter.point_done("never started", {"placement": "lpt"}),  # a row without a study
    lambda reporter: reporter.progress("empty", 0.0, 0.0),  # work of no size has ended at once
    lambda reporter: [reporter.progress("twice", 1.0, 1.0) for _ in range(2)],  # ended twice
])
def test_a_reporter_takes_calls_in_any_order(call: Callable[[RichReporter], object]) -> None:
    """What is heard out of order is shown or dropped, never an error in the middle of a run."""
    out, _ = reporter_texts(lambda reporter: call(reporter) and None)
    assert out == ""
    call(QuietReporter())
