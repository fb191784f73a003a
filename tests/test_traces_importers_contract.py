"""One contract over every importer: a hand-written file is recognised, read exactly, and survives being written."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, call_json
from foreign_files import (
    COUNTS,
    LENGTHS,
    NUM_EXPERTS,
    POSITION,
    PROMPT,
    REQUEST,
    ROUTING,
    SAMPLES,
    TOKENS,
    WEIGHTS,
    Sample,
    npz,
    policylang,
)

import moesim
from moesim.errors import InputError
from moesim.traces import read_trace
from moesim.traces.arrivals import Arrivals, read_arrivals
from moesim.traces.counts import CountTrace, read_counts
from moesim.traces.importers import IMPORTERS, detect_format, import_any, import_trace
from moesim.traces.trace import DECODE, PREFILL, RoutingTrace

PHASES_SAID = {"sglang-per-token", "sglang-requests", "vllm", "mblt", "expert-log", "moe-policylang",
               "moe-policylang-parquet"}
WEIGHTS_KEPT = {"npz", "jsonl", "rtrace", "moe-policylang", "moe-policylang-parquet", "moe-atlas"}
FIRST_LAYER = {"sglang-stat": 1, "tensorrt-llm": 3, "tensorrt-llm-raw": 3, "imatrix": 1}


@pytest.fixture(params=SAMPLES, ids=lambda sample: sample.name)
def sample(request: pytest.FixtureRequest) -> Sample:
    """One sample of each format; those of torch only where torch is."""
    if request.param.needs_torch:
        pytest.importorskip("torch")
    return request.param


def test_every_importer_has_a_sample() -> None:
    """A new importer cannot be forgotten here."""
    assert [sample.name for sample in SAMPLES] == list(IMPORTERS._entries)


def test_content_is_recognised(sample: Sample, tmp_path: Path) -> None:
    """Each sample is taken by its own importer and no other; ExFlow's array is like any array of ids."""
    path = sample.write(tmp_path)
    assert detect_format(path) == (sample.name if sample.detected else "npy")
    if path.is_file():
        renamed = path.rename(tmp_path / "renamed.bin")
        assert detect_format(renamed) == (sample.name if sample.detected else "npy")


def test_content_is_read_exactly(sample: Sample, tmp_path: Path) -> None:
    """Ids, requests, positions, phases, weights and layers are those that were written."""
    found = import_any(sample.write(tmp_path), source_format=sample.name, **sample.options)
    assert f"({sample.name})" in found.source
    if sample.holds == "arrivals":
        assert_arrivals(found)
    elif sample.holds == "counts":
        assert_counts(found, sample.name)
    else:
        assert_routing(found, sample)


def assert_routing(found: Any, sample: Sample) -> None:
    """The trace is ROUTING."""
    assert isinstance(found, RoutingTrace)
    ids = ROUTING[:, :, :1] if sample.holds == "first choice" else ROUTING
    assert np.array_equal(found.expert_ids, ids)
    assert found.num_experts == NUM_EXPERTS
    assert found.layer_ids.tolist() == [FIRST_LAYER.get(sample.name, 0) + layer for layer in range(ROUTING.shape[1])]
    if sample.holds == "anonymous":
        assert (found.request_id.tolist(), set(found.position.tolist())) == (list(range(TOKENS)), {0})
        assert found.step.tolist() == [50] * LENGTHS[0] + [51] * LENGTHS[1]
        return
    assert (found.request_id.tolist(), found.position.tolist()) == (REQUEST.tolist(), POSITION.tolist())
    expected = np.where(POSITION < PROMPT, PREFILL, DECODE) if sample.name in PHASES_SAID else np.full(TOKENS, DECODE)
    if sample.name == "moe-beyond":
        expected = np.full(TOKENS, PREFILL)
    assert found.phase.tolist() == expected.tolist()
    if sample.name in WEIGHTS_KEPT:
        assert found.gate_weights is not None
        assert np.array_equal(found.gate_weights, WEIGHTS)
    else:
        assert found.gate_weights is None


def assert_counts(found: Any, name: str) -> None:
    """The counts add up to COUNTS; windows are those of the file."""
    assert isinstance(found, CountTrace)
    assert np.array_equal(found.expert_load(), COUNTS)
    assert found.layer_ids.tolist() == [FIRST_LAYER.get(name, 0) + layer for layer in range(len(COUNTS))]
    assert (found.num_windows, found.window) == {
        "moe-infinity": (2, "sequence"), "sglang-stat": (1, "forward pass"), "sglang-per-pass": (1, "forward pass"),
        "tensorrt-llm": (2, "iteration"),
    }.get(name, (1, "whole recording"))


def assert_arrivals(found: Any) -> None:
    """Four requests, a second apart."""
    assert isinstance(found, Arrivals)
    assert found.arrival_s.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert (found.prompt_tokens.tolist(), found.output_tokens.tolist()) == ([10, 11, 12, 13], [5, 5, 5, 5])


def test_the_command_writes_it(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`moesim trace import` writes what `import_any` returns, and the file reads back the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    path = sample.write(tmp_path / "in")
    found = import_any(path, source_format=sample.name, **sample.options)
    reader = {RoutingTrace: read_trace, CountTrace: read_counts, Arrivals: read_arrivals}[type(found)]
    arguments = ["--from", sample.name, "-o", "out.parquet"]
    for key, value in sample.options.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        arguments += [f"--{key}", text] if key == "axes" else ["--option", f"{key}={text}"]
    facts = call_json("trace", "import", str(path), *arguments)
    assert facts["file"] == "out.parquet"
    assert reader("out.parquet").digest() == found.digest()  # type: ignore[attr-defined]
    assert "out.parquet" in call("trace", "import", str(path), *arguments)


def test_counts_and_arrivals_are_not_routing(tmp_path: Path) -> None:
    """Whoever needs tokens is told why a file of counts or arrivals has none."""
    for sample, words in ((SAMPLES[3], "expert counts without tokens"), (SAMPLES[-1], "request arrivals, not routing")):
        with pytest.raises(InputError, match=words):
            import_trace(sample.write(tmp_path))


@pytest.mark.parametrize(("number", "out", "words"), [
    (0, "x.counts.parquet", "holds routing; name it x.trace.parquet"),
    (3, "x.trace.parquet", "holds expert counts without tokens; name it x.counts.parquet"),
    (-1, "x.trace.parquet", "holds request arrivals without routing; name it x.arrivals.parquet"),
])
def test_an_ending_that_says_something_else_is_refused(tmp_path: Path, number: int, out: str, words: str) -> None:
    """A file of counts never gets a trace's name."""
    from typer.testing import CliRunner

    from moesim.cli import app

    path = SAMPLES[number].write(tmp_path)
    done = CliRunner().invoke(app, ["trace", "import", str(path), "-o", str(tmp_path / out)])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize(("option", "words"), [
    ("source_format=npz", "give it as --from"), ("axes=token", "give it as --axes"),
    ("model_config=x", "give it as --model-config"), ("top_k=2", "importer 'npz' has no option 'top_k'")])
def test_options_have_one_name(tmp_path: Path, option: str, words: str) -> None:
    """What has an option of its own is not taken as --option; what a reader does not know is named."""
    from typer.testing import CliRunner

    from moesim.cli import app

    done = CliRunner().invoke(app, ["trace", "import", str(npz(tmp_path)), "-o", str(tmp_path / "o"), "--option", option])
    assert done.exit_code == 2
    assert words in done.stderr


def test_the_old_name_of_from_still_works(tmp_path: Path) -> None:
    """--format is --from."""
    out = str(tmp_path / "o.trace.parquet")
    facts = call_json("trace", "import", str(policylang(tmp_path)), "--format", "moe-policylang", "--out", out)
    assert (facts["num_tokens"], facts["model"]) == (TOKENS, "m")


def test_a_recording_is_checked_against_its_model(tmp_path: Path) -> None:
    """--model-config names the MoE layers; sizes that are not the model's are refused."""
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64,
              "intermediate_size": 96, "num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = npz(tmp_path)
    trace = import_trace(path, model_config=tmp_path / "config.json")
    assert (trace.num_experts, trace.layer_ids.tolist()) == (8, [0, 1, 2])
    assert not any("inferred" in note for note in trace.metadata["notes"])
    for key, value, words in (("num_hidden_layers", 4, "the file has 3 layers, but model"),
                              ("num_local_experts", 4, "outside 0 ... 3"),
                              ("num_experts_per_tok", 1, "top-2")):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(InputError) as error:
            import_trace(path, model_config=tmp_path / "config.json")
        assert words in str(error.value)


def test_every_source_is_in_the_manual() -> None:
    """docs/traces.md has a command for each importer, and no other name after --from."""
    text = (Path(moesim.__file__).parents[1] / "docs" / "traces.md").read_text()
    named = set(re.findall(r"moesim trace import \S+ --from ([\w-]+)", text))
    assert named == set(IMPORTERS._entries) - {"npz", "npy", "imatrix"}
    for plain in ("ids.npz", "ids.npy", "imatrix.gguf"):
        assert f"moesim trace import {plain}" in text
    for option in re.findall(r"--option ([a-z_]+)=", text):
        readers = [inspect.signature(IMPORTERS[name].read).parameters for name in IMPORTERS._entries]
        assert option == "id_base" or any(option in parameters for parameters in readers), option
