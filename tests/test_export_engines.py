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
from export_worlds import MODEL, PLAN, SINGLE, SLOTS, tiny_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import CheckError
from moesim.export.check.plans import ascend_rows, deepspeed_rows, vllm_rows
from moesim.export.engines import (
    check_eplb,
    check_exflow,
    check_sglang,
    check_tensorrt_llm,
    export,
    export_plan,
)
from moesim.placement.plan import PlacementPlan

SUFFIX = {"eplb": "npz", "exflow": "csv"}


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
        assert arrays["logcnt"].tolist() == [[2, 2, 1, 1], [1, 1, 2, 2], [1, 2, 2, 1]]
        assert arrays["log2phy"][2].tolist() == [[2, -1], [0, 5], [1, 3], [4, -1]]


def test_eplb_comes_as_npy_and_safetensors_too(tmp_path: Path) -> None:
    """A .npy holds phy2log alone; the safetensors library finds the same arrays as numpy in the .npz."""
    load_file = pytest.importorskip("safetensors.numpy").load_file
    one = np.load(export_plan(PLAN, None, "eplb", tmp_path / "p.npy").path)
    assert (one.dtype, one.tolist()) == (np.int64, SLOTS)
    tensors = load_file(export_plan(PLAN, None, "eplb", tmp_path / "p.safetensors").path)
    with np.load(export_plan(PLAN, None, "eplb", tmp_path / "p.npz").path) as arrays:
        assert sorted(tensors) == sorted(arrays)
        assert all(np.array_equal(tensors[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("suffix", ["safetensors", "npy", "npz"])
def test_eplb_weight_counts_the_trace(suffix: str, tmp_path: Path) -> None:
    """weight[layer, expert] is the number of tokens that used the expert, counted here one by one."""
    trace = tiny_trace()
    path = export(trace, None, "eplb-weight", tmp_path / f"w.{suffix}").path
    if suffix == "safetensors":
        weight = pytest.importorskip("safetensors.numpy").load_file(path)["weight"]
    else:
        loaded = np.load(path)
        weight = loaded if suffix == "npy" else loaded["weight"]
    expected = np.zeros((3, 4), int)
    for token in trace.expert_ids:
        for layer, experts in enumerate(token):
            expected[layer, experts] += 1
    assert np.array_equal(weight, expected)


def test_vllm_plan_has_moe_layers_only(tmp_path: Path) -> None:
    """Rows are the MoE layers' in order; the redundant experts and ranks of the command are the plan's."""
    report = export_plan(PLAN, MODEL, "vllm", tmp_path / "plan.json")
    document = json.loads(report.path.read_text())
    assert document == {"schema": "moesim.vllm-eplb/1", "num_experts": 4, "num_ranks": 2, "model_layers": [1, 2, 4],
                        "physical_to_logical_map": SLOTS}
    assert json.loads(flag(report.start_command, "--eplb-config"))["num_redundant_experts"] == 2
    assert flag(report.start_command, "--data-parallel-size") == "2"


def test_vllm_routing_is_the_trace(tmp_path: Path) -> None:
    """The safetensors library finds every id, weights that it recorded or equal ones, and what the ids mean."""
    safe_open = pytest.importorskip("safetensors").safe_open
    trace = tiny_trace()
    quarter = np.full(trace.expert_ids.shape, 0.25, np.float32)
    for one in (dataclasses.replace(trace, gate_weights=None), dataclasses.replace(trace, gate_weights=quarter)):
        with safe_open(export(one, None, "vllm-routing", tmp_path / "r.safetensors").path, "np") as file:
            assert np.array_equal(file.get_tensor("expert_ids"), trace.expert_ids)
            assert np.unique(file.get_tensor("weights")).tolist() == [0.5 if one.gate_weights is None else 0.25]
            assert file.metadata() == {"schema": "moesim.vllm-routing/1", "num_experts": "4"}


def test_ascend_map_lists_devices_in_slot_order(tmp_path: Path) -> None:
    """The document by hand: layers from 0, devices from 0, each with its slots in order."""
    document = json.loads(export_plan(PLAN, MODEL, "vllm-ascend", tmp_path / "map.json").path.read_text())
    assert document["moe_layer_count"] == 3
    assert document["layer_list"][1] == {"layer_id": 1, "device_count": 2, "device_list": [
        {"device_id": 0, "device_expert": [3, 2, 1]}, {"device_id": 1, "device_expert": [0, 3, 2]}]}


def test_deepspeed_layout_renumbers_experts(tmp_path: Path) -> None:
    """New id i of a layer is the expert in slot i; rank r then holds the ids r * E / ep_size and on."""
    document = json.loads(export_plan(SINGLE, MODEL, "deepspeed", tmp_path / "d.json").path.read_text())
    assert document == {"inference_config": {"moe": {"enabled": True, "ep_size": 2, "moe_experts": [4]}},
                        "model_layers": [1, 2, 4],
                        "old_expert_of_new_id": [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]}


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


ASCEND = {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": [
    {"device_id": 0, "device_expert": [0, 1, 2]}, {"device_id": 1, "device_expert": [3, 0, 1]}]}]}


@pytest.mark.parametrize(("old", "new", "text"), [
    ('"moe_layer_count": 1', '"moe_layer_count": 2', "moe_layer_count 2, 1 layers follow"),
    ('"layer_id": 0', '"layer_id": 3', "entry 0 has layer_id 3"),  # the model's own number is a common mistake
    ('"device_count": 2', '"device_count": 3', r"the devices \[0, 1\]"),
    ("[3, 0, 1]", "[3, 0]", r"hold \[2, 3\] experts; they must be equal"),
    ("[3, 0, 1]", "[3, 0, 0]", "device 1 of layer 0 holds an expert twice"),  # the loader would lose a slot
    ("[3, 0, 1]", "[2, 0, 1]", "expert 3 of layer 0 has no slot"),
])
def test_ascend_rules_are_enforced(old: str, new: str, text: str) -> None:
    """Each rule of the loader rejects the file that breaks it."""
    good = json.dumps(ASCEND)
    assert ascend_rows(good.encode(), num_experts=4) == [[0, 1, 2, 3, 0, 1]]
    with pytest.raises(CheckError, match=text):
        ascend_rows(good.replace(old, new).encode(), num_experts=4)


def test_vllm_and_deepspeed_rules_are_enforced() -> None:
    """Another schema, a missing expert and a layout that is no permutation are each found."""
    facts = {"num_experts": 2, "num_slots": 2, "num_ranks": 2}
    good = {"schema": "moesim.vllm-eplb/1", "num_experts": 2, "num_ranks": 2, "physical_to_logical_map": [[1, 0]]}
    assert vllm_rows(json.dumps(good).encode(), **facts) == [[1, 0]]
    for changes, text in (({"schema": "moesim.vllm-eplb/2"}, "vllm: expected"),
                          ({"physical_to_logical_map": [[1, 1]]}, "expert 0 of layer 0 has no slot")):
        with pytest.raises(CheckError, match=text):
            vllm_rows(json.dumps(good | changes).encode(), **facts)
    layout = {"inference_config": {"moe": {"enabled": True, "ep_size": 2, "moe_experts": [2]}},
              "old_expert_of_new_id": [[1, 1]]}
    with pytest.raises(CheckError, match=r"expected 1 permutations of 0 \.\.\. 1"):
        deepspeed_rows(json.dumps(layout).encode(), num_layers=1, num_experts=2, ep_size=2)
