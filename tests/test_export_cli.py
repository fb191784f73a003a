"""`moesim export`: what the first argument is, which numbers belong to which target, and what is printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from command_line import call, call_json
from export_worlds import result_of, two_rank_graph
from typer.testing import CliRunner

from moesim.cli import app
from moesim.model.catalog import load_model
from moesim.placement.plan import PlacementPlan
from moesim.simulate import result
from moesim.traces.store import read_trace

TINY = ("--model", "tiny/config.json")  # 3 MoE layers of 8 experts, top-2, 36,864 bytes an expert


@pytest.fixture
def plan(folder: Path) -> Path:
    """A plan of 3 layers with replicas, in the working directory."""
    rows = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 3)
    return PlacementPlan(rows, 2, 8).write(folder / "a.plan.json")


def test_a_person_sees_the_command_unbroken(plan: Path) -> None:
    """The command line stands by itself on the last line, ready to be copied."""
    text = call("export", "a.plan.json", "--to", "sglang", "-o", "map.json", *TINY)
    assert shlex.split(text.splitlines()[-1])[-1] == "map.json"
    facts = call_json("export", "a.plan.json", "--to", "sglang", "-o", "map.json", *TINY)
    assert text.splitlines()[-1] == facts["start_command"]
    assert facts["file"] == "map.json"


def test_nearest_is_written_when_asked_for(plan: Path) -> None:
    """Without --nearest a refusal is one line that names it; with it the first note says what was changed."""
    done = CliRunner().invoke(app, ["export", "a.plan.json", "--to", "exflow", "-o", "x.csv"])
    assert done.exit_code == 2
    assert "(--nearest writes that)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    facts = call_json("export", "a.plan.json", "--to", "exflow", "-o", "x.csv", "--nearest")
    assert facts["notes"][0].startswith("Written is not what was given")
    assert len(Path("x.csv").read_text().splitlines()) == 1 + 3 * 8


def test_a_trace_becomes_weights_and_routing(folder: Path) -> None:
    """Both take the trace as it is; neither needs a model."""
    trace = read_trace(folder / "tiny.trace.parquet")
    call("export", "tiny.trace.parquet", "--to", "eplb-weight", "-o", "w.npy")
    assert int(np.load("w.npy").sum()) == trace.num_tokens * 3 * 2
    facts = call_json("export", "tiny.trace.parquet", "--to", "vllm-routing", "-o", "r.safetensors")
    assert "VLLM_MOE_ROUTING_SIMULATION_STRATEGY=moesim" in facts["start_command"]


def test_the_most_used_experts_of_a_trace_stay(folder: Path) -> None:
    """--gpu-experts keeps as many of every layer, --gpu-bytes as many of all as fit."""
    torch = pytest.importorskip("torch")
    size = load_model("tiny/config.json").expert_bytes
    for words, layers in ((("--gpu-experts", "3"), [3, 3, 3]), (("--gpu-bytes", str(7.9 * size)), None)):
        call("export", "tiny.trace.parquet", "--to", "ktransformers", "-o", "x.pt", *TINY, *words)
        counts = torch.load("x.pt", weights_only=True)["logical_count"][0]
        assert counts.sum(dim=1).tolist() == layers if layers else int(counts.sum()) == 7


def test_llama_cpp_takes_a_model_and_bytes(folder: Path) -> None:
    """As many of the last layers as fit; nothing else decides, since every layer uses as many experts per token."""
    layer = load_model("tiny/config.json").expert_bytes * 8
    for room, off in ((2.5 * layer, r"blk\.(0)\."), (0, r"blk\.(0|1|2)\."), (1e12, None)):
        call("export", "tiny/config.json", "--to", "llama.cpp", "--gpu-bytes", str(room), "-o", "x.sh")
        text = Path("x.sh").read_text()
        assert (off in text) if off else ("-ot" not in text)


def test_llama_cpp_takes_a_list(folder: Path) -> None:
    """Whole layers pass; a part of one is refused with the nearest."""
    lines = ["layer,expert", *(f"1,{expert}" for expert in range(8))]
    Path("x.csv").write_text("\n".join(lines))
    assert r"blk\.(0|2)\." in call_json("export", "x.csv", "--to", "llama.cpp", "-o", "x.sh", *TINY)["notes"][1]
    Path("x.csv").write_text("\n".join([*lines, "2,0"]))
    done = CliRunner().invoke(app, ["export", "x.csv", "--to", "llama.cpp", "-o", "y.sh", *TINY])
    assert "1 of 8 of MoE layer 2 are on the GPU; the nearest that it can: all experts of 1 layer (8 experts instead of 9)" in done.stderr
    call("export", "x.csv", "--to", "llama.cpp", "-o", "y.sh", *TINY, "--nearest")
    assert Path("y.sh").read_text().splitlines()[-1] == Path("x.sh").read_text().splitlines()[-1]


def test_a_run_becomes_traces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result folder with dependencies gives one trace per rank; one without is refused with what to do."""
    monkeypatch.setattr(result, "TABLES", tuple(dict.fromkeys((*result.TABLES, "deps"))))
    result_of(two_rank_graph()).write("with.result")
    result_of(two_rank_graph(), deps=False).write("without.result")
    assert call_json("export", "with.result", "--to", "chakra", "-o", "et")["file"] == "et"
    assert sorted(file.name for file in Path("et").iterdir()) == ["npu.0.et", "npu.1.et"]
    done = CliRunner().invoke(app, ["export", "without.result", "--to", "chakra", "-o", "et2"])
    assert done.exit_code == 2
    assert "no table of dependencies" in done.stderr


@pytest.mark.parametrize(("words", "text"), [
    ("a.plan.json --to eplb -o x.npz --gpu-experts 2", "belong to offloading engines, not to eplb"),
    ("tiny.trace.parquet --to sglang -o x.json", "takes a plan (*.plan.json), and tiny.trace.parquet is a trace"),
    ("a.plan.json --to ktransformers -o x.pt --gpu-experts 2", "takes a trace (*.trace.parquet) or a list of experts"),
    ("tiny.trace.parquet --to ktransformers -o x.pt --gpu-experts 2", "--model is needed"),
    ("tiny.trace.parquet --to ktransformers -o x.pt --model tiny/config.json", "say how many experts stay on the GPU"),
    ("tiny.trace.parquet --to llama.cpp -o x.sh --gpu-experts 2 --gpu-bytes 5", "--gpu-experts or --gpu-bytes, not both"),
    ("none.csv --to llama.cpp -o x.sh --gpu-experts 2 --model tiny/config.json", "have no place beside it"),
    ("none.csv --to llama.cpp -o x.sh --model tiny/config.json", "none.csv: no such file"),
    ("nomodel --to llama.cpp -o x.sh --gpu-bytes 5", "unknown model 'nomodel'"),
    ("a.plan.json --to chakra -o et", "no such result folder"),
    ("a.plan.json --to sglang -o x.json --model deepseek-v3", "the plan is for 3 MoE layers"),
])
def test_what_does_not_fit_together_is_one_line(words: str, text: str, plan: Path) -> None:
    """Each mistake is told in one line and writes nothing."""
    before = sorted(Path().iterdir())
    done = CliRunner().invoke(app, ["export", *words.split()])
    assert done.exit_code == 2
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(Path().iterdir()) == before


def test_every_target_is_in_the_help() -> None:
    """The help of --to names what can be exported to."""
    from moesim.export.engines import EXPORTERS

    shown = json.dumps(CliRunner().invoke(app, ["export", "--help"], terminal_width=400).stdout)
    assert all(name in shown for name in EXPORTERS.names())
