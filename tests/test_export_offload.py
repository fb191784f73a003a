"""Which experts stay on the GPU: lists and traces as masks, and the files that KTransformers and llama.cpp load."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from export_worlds import KEPT, MODEL, TAIL_MODEL, WHOLE, tiny_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import CheckError, InputError
from moesim.export.check.offload import ktransformers_mask, llama_layers, rule_layers
from moesim.export.engines import EXPORTERS, export
from moesim.export.residency import Residency, last_layers, most_used, read_residency


def write_list(path: Path, text: str) -> Path:
    """A list file with this text."""
    path.write_text(text)
    return path


def test_list_file_names_experts(tmp_path: Path) -> None:
    """Every line puts one expert on the GPU; blank lines and a byte-order mark do not matter."""
    path = write_list(tmp_path / "x.csv", "\ufefflayer, expert\n0,1\n\n2,3\n0,0\n")
    kept = read_residency(path, MODEL)
    assert np.argwhere(kept.on_gpu).tolist() == [[0, 0], [0, 1], [2, 3]]
    assert (kept.num_on_gpu, kept.gpu_bytes(MODEL)) == (3, 3 * 3 * 16 * 8 * 2)


@pytest.mark.parametrize(("text", "message"), [
    ("", r"x\.csv:1: expected the header 'layer,expert', found ''"),
    ("expert,layer\n", r"x\.csv:1: expected the header"),  # the order matters
    ("layer,expert\n0\n", r"x\.csv:2: expected two whole numbers"),
    ("layer,expert\n0,1\n1,one\n", r"x\.csv:3: expected two whole numbers"),
    ("layer,expert\n3,0\n", r"x\.csv:2: layer 3, expert 0 is outside 3 MoE layers of 4"),  # the model's own number
    ("layer,expert\n0,-1\n", r"x\.csv:2: layer 0, expert -1 is outside"),
    ("layer,expert\n0,1\n0,1\n", r"x\.csv:3: layer 0, expert 1 came before"),
])
def test_bad_lists_are_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    """The message names the file, the line and what was expected."""
    with pytest.raises(InputError, match=message):
        read_residency(write_list(tmp_path / "x.csv", text), MODEL)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(0, 4))
def test_most_used_of_each_layer(seed: int, per_layer: int) -> None:
    """As many of every layer, and none that stays is used less than one that goes (counted here token by token)."""
    trace = tiny_trace(seed)
    kept = most_used(trace, per_layer=per_layer).on_gpu
    assert kept.sum(axis=1).tolist() == [per_layer] * 3
    for layer in range(3):
        used = [sum(expert in token[layer] for token in trace.expert_ids) for expert in range(4)]
        stay = [used[expert] for expert in range(4) if kept[layer, expert]]
        go = [used[expert] for expert in range(4) if not kept[layer, expert]]
        assert min(stay, default=99) >= max(go, default=-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(0, 14))
def test_most_used_of_all_layers(seed: int, total: int) -> None:
    """No other choice of as many experts is used more: the sum is that of the largest counts."""
    trace = tiny_trace(seed)
    kept = most_used(trace, total=total).on_gpu
    used = np.array([[sum(expert in token[layer] for token in trace.expert_ids) for expert in range(4)]
                     for layer in range(3)])
    assert int(kept.sum()) == min(total, 12)
    assert int(used[kept].sum()) == sum(sorted(used.ravel().tolist(), reverse=True)[:total])


def test_how_many_must_be_said_once() -> None:
    """Neither a number per layer nor bytes, both, or more than there are: each is an error."""
    for numbers in ({}, {"per_layer": 1, "total": 2}):
        with pytest.raises(InputError, match="say how many experts stay"):
            most_used(tiny_trace(), **numbers)
    with pytest.raises(InputError, match=r"must be 0 \.\.\. 4, got 5"):
        most_used(tiny_trace(), per_layer=5)
    with pytest.raises(InputError, match=r"must be 0 \.\.\. 3, got 4"):
        last_layers(MODEL, 4)
    with pytest.raises(CheckError, match=r"must be \[layer, expert\]"):
        Residency(np.ones(4, bool))


# ---- KTransformers


def test_ktransformers_counts_are_the_mask(tmp_path: Path) -> None:
    """int32[1, model layer, expert]: 1 where the expert stays, 0 elsewhere and in dense layers; loadable without code."""
    torch = pytest.importorskip("torch")
    report = export(KEPT, TAIL_MODEL, "ktransformers", tmp_path / "x.pt")
    counts = torch.load(report.path, weights_only=True)
    assert list(counts) == ["logical_count"]
    assert (counts["logical_count"].dtype, tuple(counts["logical_count"].shape)) == (torch.int32, (1, 5, 4))
    assert counts["logical_count"][0].tolist() == [[0] * 4, [0] * 4, *KEPT.on_gpu.astype(int).tolist()]
    words = shlex.split(report.start_command)
    ratio = float(words[words.index("--kt-gpu-experts-ratio") + 1])
    assert int(12 * ratio) == 6  # the engine truncates
    assert "6 of 12 experts stay on the GPU (by hand): 4.61 kB" in report.notes[0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=12, max_size=12))
def test_any_mask_reaches_ktransformers(bits: list[bool]) -> None:
    """Whatever the mask, none and all included, the engine's rule gives it back."""
    pytest.importorskip("torch")
    target, kept = EXPORTERS["ktransformers"], Residency(np.array(bits).reshape(3, 4))
    target.check(target.encode(kept, TAIL_MODEL, Path("x.pt")), kept, TAIL_MODEL)


def test_ktransformers_needs_moe_layers_in_one_run(tmp_path: Path) -> None:
    """The engine counts MoE layers from the first on; a dense layer among them would shift everything."""
    with pytest.raises(InputError, match="dense layers between or after its MoE layers"):
        export(KEPT, MODEL, "ktransformers", tmp_path / "x.pt")


def test_ktransformers_rules_are_enforced(tmp_path: Path) -> None:
    """Counts of another model and counts that leave the choice open are found."""
    pytest.importorskip("torch")
    data = export(KEPT, TAIL_MODEL, "ktransformers", tmp_path / "x.pt").path.read_bytes()
    facts = {"moe_layers": (2, 3, 4), "num_layers": 5, "num_experts": 4}
    with pytest.raises(CheckError, match=r"counts \(1, 5, 4\), expected \[pass, 6, 4\]"):
        ktransformers_mask(data, ratio=0.5, **(facts | {"num_layers": 6}))
    with pytest.raises(CheckError, match="which 5 experts are the most used is not decided"):
        ktransformers_mask(data, ratio=0.42, **facts)


def test_rules_in_the_engines_own_form(tmp_path: Path) -> None:
    """Another YAML reader finds two rules, the GPU's layers first; expressions match these layers and no others."""
    yaml = pytest.importorskip("yaml")
    rules = yaml.safe_load(export(WHOLE, MODEL, "ktransformers-rules", tmp_path / "x.yaml").path.read_text())
    gpu, cpu = rules
    assert gpu["match"]["name"] == r"^model\.layers\.(1|4)\.mlp\.experts$"
    assert gpu["replace"]["class"] == "ktransformers.operators.experts.KTransformersExperts"
    assert gpu["replace"]["kwargs"] == {"generate_device": "cuda:0", "generate_op": "KExpertsMarlin",
                                        "prefill_device": "cuda:0", "prefill_op": "KExpertsTorch", "out_device": "cuda:0"}
    assert cpu["replace"]["kwargs"]["generate_op"] == "KExpertsCPU"
    assert [rule["recursive"] for rule in rules] == [False, False]
    assert [bool(re.match(gpu["match"]["name"], f"model.layers.{layer}.mlp.experts")) for layer in (1, 4, 2, 14, 41)] \
        == [True, True, False, False, False]


def test_rule_files_without_a_rule_or_with_the_wrong_device_are_found() -> None:
    """A layer that no rule names, and a GPU kernel on the CPU, are errors."""
    rule = ('- match: {name: "^model.layers.1.mlp.experts$"}\n'
            '  replace: {kwargs: {generate_device: "cuda:0", generate_op: "KExpertsMarlin"}}\n')
    assert rule_layers(rule.encode(), moe_layers=[1]).tolist() == [True]
    with pytest.raises(CheckError, match=r"no rule for model\.layers\.2\.mlp\.experts"):
        rule_layers(rule.encode(), moe_layers=[1, 2])
    with pytest.raises(CheckError, match="KExpertsMarlin cannot run on cpu"):
        rule_layers(rule.replace("cuda:0", "cpu").encode(), moe_layers=[1])


# ---- llama.cpp


def test_llama_script_passes_the_arguments_on(tmp_path: Path) -> None:
    """Run by a shell, the script starts the server it is told with the overrides and whatever is added."""
    report = export(WHOLE, MODEL, "llama.cpp", tmp_path / "a plan.sh")
    server = write_list(tmp_path / "server", '#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    server.chmod(0o755)
    words = shlex.split(report.start_command.replace("MODEL.gguf", "m.gguf"))
    done = subprocess.run(words, check=True, capture_output=True, text=True, env={"LLAMA_SERVER": str(server)})
    assert done.stdout.splitlines() == [
        "-ngl", "999", "-ot", r"blk\.(2)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU", "-m", "m.gguf"]


def test_llama_notes_give_bytes_and_the_short_form(tmp_path: Path) -> None:
    """768 bytes per expert, 4 experts per layer; where the first layers stay off, --n-cpu-moe says the same."""
    first_off = Residency(np.array([[0] * 4, [0] * 4, [1] * 4], bool), "by hand")
    report = export(first_off, MODEL, "llama.cpp", tmp_path / "x.sh")
    assert "experts of 1 of 3 MoE layers on the GPU (by hand): 3072 bytes (3.07 kB), 6144 bytes in main memory" \
        in report.notes[0]
    assert any("--n-cpu-moe 3" in note for note in report.notes)  # blk.0 is dense, blk.1 and blk.2 are not
    assert not any("--n-cpu-moe" in note for note in export(WHOLE, MODEL, "llama.cpp", tmp_path / "y.sh").notes)
    everything = export(last_layers(MODEL, 3), MODEL, "llama.cpp", tmp_path / "z.sh")
    assert "-ot" not in everything.path.read_text()


@pytest.mark.parametrize(("words", "text"), [
    (r"-ngl 40 -ot 'blk\.(2)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU'", "-ngl must put every layer on the GPU"),
    (r"-ngl 999 -ot 'blk\.(2)\.ffn_(up|down)_exps=CPU'", "split the tensors of layer 2"),  # gate stays behind
    (r"-ngl 999 -ot 'blk\.2\.ffn_.*=CPU'", "split the tensors of layer 2"),  # the router goes along
    (r"-ngl 999 -ot 'blk\.2\.ffn_(up,down)_exps=CPU'", "overrides must read EXPRESSION=CPU"),  # a comma ends a pair
])
def test_llama_rules_are_enforced(words: str, text: str) -> None:
    """Arguments that would not do what the plan says are found."""
    with pytest.raises(CheckError, match=text):
        llama_layers(f"#!/bin/sh\nexec llama-server {words}\n".encode(), num_layers=5)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 119)))
def test_llama_expressions_hit_their_layers_only(layers: set[int]) -> None:
    """Layer 1 is not layer 11 or 21: for any set of 120 layers the engine's search finds exactly these."""
    import dataclasses

    model = dataclasses.replace(MODEL, num_layers=120, moe_layers=tuple(range(120)))
    mask = np.zeros((120, 4), bool)
    mask[sorted(layers)] = True
    target, kept = EXPORTERS["llama.cpp"], Residency(mask)
    content = target.encode(kept, model, Path("x.sh"))
    assert isinstance(content, bytes)
    assert set(np.flatnonzero(llama_layers(content, num_layers=120)).tolist()) == layers


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_nearest_whole_layers_take_no_more_bytes(held: list[int]) -> None:
    """The nearest list has whole layers, no more experts than asked for, and the fullest layers first."""
    mask = np.array([[expert < number for expert in range(4)] for number in held])
    refusal = EXPORTERS["llama.cpp"].refusal(Residency(mask), MODEL)
    assert (refusal is None) == all(number in (0, 4) for number in held)
    if refusal is not None:
        near = refusal.nearest.on_gpu
        assert near.sum() == sum(held) // 4 * 4
        assert all(row.all() or not row.any() for row in near)
        assert sum(number for number, row in zip(held, near, strict=True) if row.all()) \
            == sum(sorted(held, reverse=True)[:sum(held) // 4])
