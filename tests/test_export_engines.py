"""Plans as engine files: read back by other readers, against the rules that the engines enforce."""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import CheckError, InputError
from moesim.export.engines import (
    EXPORTERS,
    check_eplb,
    check_exflow,
    check_sglang,
    check_tensorrt_llm,
    export_plan,
)
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.placement.plan import PlacementPlan

# 5 layers of which 1, 2 and 4 are MoE layers: a row number and a layer number are never mixed up unseen.
MODEL = ModelSpec("org/tiny", 5, (1, 2, 4), 4, 2, 16, 8, AttentionSpec(2, 2, 8), 100,
                  dense_intermediate_size=32)
SLOTS = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2], [1, 1, 0, 2, 3, 1]]
PLAN = PlacementPlan(np.array(SLOTS), 2, 4)
SINGLE = PlacementPlan(np.array([[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]), 2, 4)
SUFFIX = {"sglang": "json", "tensorrt-llm": "yaml", "eplb": "npz", "exflow": "csv"}


def read_yaml(text: str) -> Any:
    """Read with PyYAML, the library that the engine uses (moesim writes with another)."""
    return pytest.importorskip("yaml").safe_load(text)


def flag(command: str, name: str) -> str:
    """The word after `name` on a command line."""
    words = shlex.split(command)
    return words[words.index(name) + 1]


def test_sglang_map_has_all_layers_and_one_key(tmp_path: Path) -> None:
    """MoE rows are the plan's, dense rows are slot mod experts, and there is no other key."""
    report = export_plan(PLAN, MODEL, "sglang", tmp_path / "plan.json")
    document = json.loads(report.path.read_text())
    dense = [0, 1, 2, 3, 0, 1]
    assert document == {"physical_to_logical_map": [dense, SLOTS[0], SLOTS[1], dense, SLOTS[2]]}


def test_sglang_command_agrees_with_the_map(tmp_path: Path) -> None:
    """The flags give the width of the map: experts plus redundant ones, over ep-size GPUs."""
    path = tmp_path / "a plan.json"
    command = export_plan(PLAN, MODEL, "sglang", path).start_command
    width = len(json.loads(path.read_text())["physical_to_logical_map"][0])
    assert int(flag(command, "--ep-num-redundant-experts")) + MODEL.num_experts == width == 6
    assert int(flag(command, "--ep-size")) == int(flag(command, "--tp-size")) == 2
    assert flag(command, "--init-expert-location") == str(path)


def test_sglang_on_one_gpu_needs_no_exchange(tmp_path: Path) -> None:
    """With one rank the command has no all-to-all back end and no dispatch algorithm that needs one."""
    plan = PlacementPlan(np.array(SLOTS), 1, 4)
    command = export_plan(plan, MODEL, "sglang", tmp_path / "plan.json").start_command
    assert "a2a" not in command
    assert "dispatch" not in command


def test_tensorrt_llm_keys_are_the_models_own_layers(tmp_path: Path) -> None:
    """Another YAML reader finds int keys 1, 2, 4 with the plan's rows, and a static plan."""
    report = export_plan(PLAN, MODEL, "tensorrt-llm", tmp_path / "plan.yaml")
    document = read_yaml(report.path.read_text())
    assert document == {"num_slots": 6, "layer_updates_per_iter": 0,
                        "initial_global_assignments": dict(zip((1, 2, 4), SLOTS, strict=True))}


def test_tensorrt_llm_command_writes_arguments_that_name_the_file(tmp_path: Path) -> None:
    """The first half of the command, run by a shell, writes YAML that points to the exported file."""
    path = tmp_path / "100% of 'it'.yaml"
    command = export_plan(PLAN, MODEL, "tensorrt-llm", path).start_command
    prepare, serve = command.split(" && ")
    subprocess.run(["sh", "-c", prepare], check=True)
    arguments = read_yaml(Path(flag(serve, "--extra_llm_api_options")).read_text())
    assert arguments["moe_config"] == {"backend": "WIDEEP", "load_balancer": str(path)}
    assert flag(serve, "--ep_size") == "2"


def test_eplb_arrays_are_what_rebalance_experts_returns(tmp_path: Path) -> None:
    """int64 arrays in MoE-layer order, replicas counted, slots listed per expert and padded with -1."""
    report = export_plan(PLAN, None, "eplb", tmp_path / "plan.npz")
    with np.load(report.path, allow_pickle=False) as arrays:
        assert sorted(arrays) == ["log2phy", "logcnt", "phy2log"]
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.int64)}
        assert arrays["phy2log"].tolist() == SLOTS
        assert arrays["logcnt"].tolist() == [[2, 2, 1, 1], [1, 1, 2, 2], [1, 3, 1, 1]]
        assert arrays["log2phy"][2].tolist() == [[2, -1, -1], [0, 1, 5], [3, -1, -1], [4, -1, -1]]


def test_exflow_csv_numbers_experts_over_all_layers(tmp_path: Path) -> None:
    """Expert layer * E + e, in order, and the rank whose slots hold it."""
    report = export_plan(SINGLE, MODEL, "exflow", tmp_path / "plan.csv")
    with open(report.path, newline="") as file:
        rows = [(int(row["Expert"]), int(row["Node"])) for row in csv.DictReader(file)]
    # layer 0: 0 1 | 2 3, layer 1: 3 2 | 1 0, layer 2: 2 0 | 3 1
    assert rows == list(enumerate([0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 0, 1]))


@pytest.mark.parametrize(("target", "printed"), [("eplb", "(3, 4)"), ("exflow", "Node\n0    6\n1    6")])
def test_check_command_runs(target: str, printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no engine has a flag for the file, the Python of the command reads it and shows what it holds."""
    report = export_plan(SINGLE, None, target, tmp_path / f"it's.{SUFFIX[target]}")
    words = shlex.split(report.start_command)
    assert words[:2] == ["python", "-c"]
    exec(words[2], {})
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize("target", sorted(SUFFIX))
def test_same_plan_same_bytes_and_nothing_else_written(target: str, tmp_path: Path) -> None:
    """Every exporter writes exactly one file, the same at each call, and has notes for the reader."""
    for folder in ("a", "b"):
        report = export_plan(SINGLE, MODEL, target, tmp_path / folder / f"plan.{SUFFIX[target]}")
        assert report.notes
    files = [next((tmp_path / folder).iterdir()) for folder in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(list(tmp_path.rglob("*.*"))) == 2


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_plan_passes_the_engines_rules_and_comes_back(data: st.DataObject) -> None:
    """For random plans the files hold each layer's slots exactly, at the model's own layer numbers."""
    ranks, per_rank = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    experts = data.draw(st.integers(1, ranks * per_rank))
    layers = sorted(data.draw(st.sets(st.integers(0, 7), min_size=1, max_size=4)))
    extra = ranks * per_rank - experts
    filled = [*range(experts), *(slot % experts for slot in range(extra))]
    rows = [data.draw(st.permutations(filled)) for _ in layers]
    plan = PlacementPlan(np.array(rows), ranks, experts)
    model = dataclasses.replace(MODEL, num_layers=8, moe_layers=tuple(layers), num_experts=experts, top_k=1)
    with tempfile.TemporaryDirectory() as folder:
        sglang = json.loads(export_plan(plan, model, "sglang", f"{folder}/p.json").path.read_text())
        tensorrt = read_yaml(export_plan(plan, model, "tensorrt-llm", f"{folder}/p.yml").path.read_text())
    assert len(sglang["physical_to_logical_map"]) == 8
    for layer, row in zip(layers, rows, strict=True):
        assert sglang["physical_to_logical_map"][layer] == row
        assert tensorrt["initial_global_assignments"][layer] == row


def test_unknown_target_suggests_a_known_one(tmp_path: Path) -> None:
    """A misspelt target names the nearest exporter."""
    with pytest.raises(InputError, match=r"unknown export target 'sglan'. Did you mean 'sglang'"):
        export_plan(PLAN, MODEL, "sglan", tmp_path / "plan.json")
    assert sorted(SUFFIX) == sorted(EXPORTERS.names())


@pytest.mark.parametrize(("changes", "text"), [
    ({"moe_layers": (1, 2)}, "plan is for 3 MoE layers, the model 'org/tiny' has 2"),  # another depth
    ({"num_experts": 8}, "plan is for 4 experts, the model 'org/tiny' has 8"),  # another width
])
@pytest.mark.parametrize("target", sorted(SUFFIX))
def test_plan_of_another_model_is_refused(target: str, changes: dict[str, object], text: str,
                                          tmp_path: Path) -> None:
    """No exporter writes a plan that was made for other layers or experts."""
    with pytest.raises(InputError, match=text):
        export_plan(SINGLE, dataclasses.replace(MODEL, **changes), target, tmp_path / f"p.{SUFFIX[target]}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["sglang", "tensorrt-llm"])
def test_engines_with_absolute_layers_need_the_model(target: str, tmp_path: Path) -> None:
    """Without the model nobody knows which rows are dense; that is an error, not a guess."""
    with pytest.raises(InputError, match=f"{target}: the model is needed"):
        export_plan(PLAN, None, target, tmp_path / f"p.{SUFFIX[target]}")


@pytest.mark.parametrize("target", ["sglang", "tensorrt-llm"])
def test_experts_shared_between_layers_are_refused(target: str, tmp_path: Path) -> None:
    """An engine that loads each layer's own experts cannot express a shared pool; the reason is given."""
    pool = np.tile(np.arange(4), (3, 1))
    model = dataclasses.replace(MODEL, expert_pool=pool)
    with pytest.raises(InputError, match="shares 4 experts between layers"):
        export_plan(PLAN, model, target, tmp_path / f"p.{SUFFIX[target]}")


def test_exflow_refuses_replicas(tmp_path: Path) -> None:
    """A plan with redundant experts has no place in 'one expert, one node'."""
    with pytest.raises(InputError, match="one home there, but the plan has 6 slots for 4 experts"):
        export_plan(PLAN, MODEL, "exflow", tmp_path / "plan.csv")


def test_tensorrt_llm_refuses_one_rank(tmp_path: Path) -> None:
    """Its load balancer exists only under expert parallelism."""
    with pytest.raises(InputError, match="the plan has 1 rank"):
        export_plan(PlacementPlan(np.array(SLOTS), 1, 4), MODEL, "tensorrt-llm", tmp_path / "p.yaml")


@pytest.mark.parametrize("target", sorted(SUFFIX))
def test_wrong_suffix_is_refused_with_the_right_one(target: str, tmp_path: Path) -> None:
    """The engine chooses its reader by the suffix, so another one is an error."""
    with pytest.raises(InputError, match=rf"plan\.bin: the file must end in .*\.{SUFFIX[target]}"):
        export_plan(SINGLE, MODEL, target, tmp_path / "plan.bin")


ROW = [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(("document", "text"), [
    ({"physical_to_logical_map": [ROW], "seed": 1}, "only key"),  # the loader splats the dict
    ({"physical_to_logical_map": [ROW, ROW]}, "2 rows, the model has 1"),  # MoE rows only is a common mistake
    ({"physical_to_logical_map": [[*ROW, 0, 1]]}, "8 slots; expected 6"),  # accepted at load, fails later
    ({"physical_to_logical_map": [[0, 1, 2, 4, 0, 1]]}, r"outside 0 \.\.\. 3"),
    ({"physical_to_logical_map": [[0, 1, 2, 0.0, 0, 1]]}, r"outside 0 \.\.\. 3"),  # not an int
    ({"physical_to_logical_map": [[0, 1, 2, 2, 0, 1]]}, "expert 3 of layer 0 has no slot"),
])
def test_sglang_rules_are_enforced(document: dict[str, object], text: str) -> None:
    """Each rule of the loader rejects the file that breaks it."""
    with pytest.raises(CheckError, match=text):
        check_sglang(document, num_layers=1, num_experts=4, num_redundant=2, ep_size=2)


@pytest.mark.parametrize(("changes", "text"), [
    ({"ep_size": 2}, "keys must be"),  # a key that the strict class rejects
    ({"layer_updates_per_iter": 1}, "must be 0 for a static plan"),
    ({"initial_global_assignments": {3: ROW}}, r"layers \[3\], the model's MoE layers are \[3, 4\]"),
    ({"initial_global_assignments": {"3": ROW, "4": ROW}}, "assignments for the layers"),  # text keys
    ({"num_slots": 8}, "6 slots; expected 8"),
    ({"num_slots": 5, "initial_global_assignments": {3: ROW[:5], 4: ROW[:5]}}, "a multiple of ep_size 2"),
])
def test_tensorrt_llm_rules_are_enforced(changes: dict[str, object], text: str) -> None:
    """Each rule of the configuration class rejects the file that breaks it."""
    good = {"num_slots": 6, "layer_updates_per_iter": 0, "initial_global_assignments": {3: ROW, 4: ROW}}
    check_tensorrt_llm(good, moe_layers=(3, 4), num_experts=4, ep_size=2)
    with pytest.raises(CheckError, match=text):
        check_tensorrt_llm(good | changes, moe_layers=(3, 4), num_experts=4, ep_size=2)


def test_eplb_rules_are_enforced() -> None:
    """A wrong count, a slot listed for another expert and a missing slot are each found."""
    phy2log, log2phy = np.array([[0, 1, 0]]), np.array([[[0, 2], [1, -1]]])
    check_eplb(phy2log, log2phy, np.array([[2, 1]]))
    with pytest.raises(CheckError, match="logcnt is not the number of slots"):
        check_eplb(phy2log, log2phy, np.array([[1, 2]]))
    with pytest.raises(CheckError, match="does not list every slot once"):
        check_eplb(phy2log, np.array([[[0, -1], [1, -1]]]), np.array([[2, 1]]))
    with pytest.raises(CheckError, match="disagree"):
        check_eplb(phy2log, np.array([[[0, 1], [2, -1]]]), np.array([[2, 1]]))


def test_exflow_rules_are_enforced() -> None:
    """An expert left out, and a GPU with more experts of a layer than another, are each found."""
    check_exflow([(0, 1), (1, 0)], num_layers=1, num_experts=2, num_gpus=2)
    with pytest.raises(CheckError, match=r"experts must be 0 \.\.\. 1"):
        check_exflow([(0, 1), (2, 0)], num_layers=1, num_experts=2, num_gpus=2)
    with pytest.raises(CheckError, match="every GPU must hold 1 experts"):
        check_exflow([(0, 1), (1, 1)], num_layers=1, num_experts=2, num_gpus=2)
