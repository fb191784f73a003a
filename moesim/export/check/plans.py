"""Readers and rules for placement files that are text: SGLang, TensorRT-LLM, vLLM, vllm-ascend, ExFlow, DeepSpeed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.errors import CheckError
from moesim.export.check.rows import Rows, check_row

TENSORRT_KEYS = {"num_slots", "layer_updates_per_iter", "initial_global_assignments"}
ASCEND_LAYER_KEYS, ASCEND_DEVICE_KEYS = {"layer_id", "device_count", "device_list"}, {"device_id", "device_expert"}


def check_sglang(document: dict[str, Any], *, num_layers: int, num_experts: int, num_redundant: int,
                 ep_size: int) -> None:
    """Raise CheckError unless SGLang's loader (0.5.23, ``init_by_mapping``) would take `document`.

    The loader hands the dict's keys to a function, so there may be one key only; every model layer has a row.
    """
    if list(document) != ["physical_to_logical_map"]:
        raise CheckError(f"sglang: physical_to_logical_map must be the only key, found {list(document)}")
    rows = document["physical_to_logical_map"]
    if len(rows) != num_layers:
        raise CheckError(f"sglang: {len(rows)} rows, the model has {num_layers} layers (dense ones count)")
    for layer, row in enumerate(rows):
        check_row("sglang", layer, row, num_experts + num_redundant, num_experts, ep_size)


def sglang_rows(data: bytes, *, num_layers: int, moe_layers: Sequence[int], num_experts: int, num_redundant: int,
                ep_size: int) -> Rows:
    """Return the rows of the MoE layers in a file for ``--init-expert-location``; raises CheckError."""
    document = _json(data, "sglang")
    check_sglang(document, num_layers=num_layers, num_experts=num_experts, num_redundant=num_redundant,
                 ep_size=ep_size)
    return [document["physical_to_logical_map"][layer] for layer in moe_layers]


def check_tensorrt_llm(document: dict[str, Any], *, moe_layers: Sequence[int], num_experts: int,
                       ep_size: int) -> None:
    """Raise CheckError unless TensorRT-LLM's strict load-balancer configuration would take `document`."""
    if set(document) != TENSORRT_KEYS:
        raise CheckError(f"tensorrt-llm: the keys must be {sorted(TENSORRT_KEYS)}, found {list(document)}")
    if document["layer_updates_per_iter"] != 0:
        raise CheckError("tensorrt-llm: layer_updates_per_iter must be 0 for a static plan, "
                         f"found {document['layer_updates_per_iter']!r}")
    assignments = document["initial_global_assignments"]
    if any(type(layer) is not int for layer in assignments) or sorted(assignments) != sorted(moe_layers):
        raise CheckError(f"tensorrt-llm: assignments for the layers {list(assignments)}, the model's MoE "
                         f"layers are {list(moe_layers)}")
    for layer, row in assignments.items():
        check_row("tensorrt-llm", layer, row, document["num_slots"], num_experts, ep_size)


def tensorrt_rows(data: bytes, *, moe_layers: Sequence[int], num_experts: int, ep_size: int) -> Rows:
    """Return the rows of a load-balancer YAML by MoE layer; raises CheckError."""
    from ruamel.yaml import YAML

    document = YAML(typ="safe", pure=True).load(data.decode())
    check_tensorrt_llm(document, moe_layers=moe_layers, num_experts=num_experts, ep_size=ep_size)
    return [document["initial_global_assignments"][layer] for layer in moe_layers]


def vllm_rows(data: bytes, *, num_experts: int, num_slots: int, num_ranks: int) -> Rows:
    """Return the rows of a file for the vLLM plug-in (MoE layers only, in order); raises CheckError."""
    document = _json(data, "vllm")
    facts = {"schema": "moesim.vllm-eplb/1", "num_experts": num_experts, "num_ranks": num_ranks}
    if any(document.get(key) != value for key, value in facts.items()):
        raise CheckError(f"vllm: expected {facts}, found { {key: document.get(key) for key in facts} }")
    rows = document["physical_to_logical_map"]
    for layer, row in enumerate(rows):
        check_row("vllm", layer, row, num_slots, num_experts, num_ranks)
    return rows


def ascend_rows(data: bytes, *, num_experts: int) -> Rows:
    """Return the rows of a vllm-ascend expert map; raises CheckError.

    Layers and devices are numbered from 0; every device has as many experts; its loader keeps one local slot per
    expert, so an expert twice on one device would lose a slot.
    """
    document = _json(data, "vllm-ascend")
    layers = document["layer_list"]
    if document["moe_layer_count"] != len(layers):
        raise CheckError(f"vllm-ascend: moe_layer_count {document['moe_layer_count']}, {len(layers)} layers follow")
    return [_ascend_row(place, layer, num_experts) for place, layer in enumerate(layers)]


def _ascend_row(place: int, layer: dict[str, Any], num_experts: int) -> list[int]:
    devices = layer["device_list"]
    ids = [device["device_id"] for device in devices]
    if set(layer) != ASCEND_LAYER_KEYS or layer["layer_id"] != place or ids != list(range(layer["device_count"])):
        raise CheckError(f"vllm-ascend: entry {place} has layer_id {layer.get('layer_id')} and the devices {ids}")
    widths = {len(device["device_expert"]) for device in devices}
    if len(widths) != 1 or any(set(device) != ASCEND_DEVICE_KEYS for device in devices):
        raise CheckError(f"vllm-ascend: the devices of layer {place} hold {sorted(widths)} experts; they must be equal")
    for device in devices:
        if len(set(device["device_expert"])) != len(device["device_expert"]):
            raise CheckError(f"vllm-ascend: device {device['device_id']} of layer {place} holds an expert twice")
    row = [expert for device in devices for expert in device["device_expert"]]
    check_row("vllm-ascend", place, row, len(row), num_experts, len(devices))
    return row


def check_exflow(rows: Sequence[tuple[int, int]], *, num_layers: int, num_experts: int, num_gpus: int) -> None:
    """Raise CheckError unless every expert appears once and every GPU has as many of each layer."""
    total = num_layers * num_experts
    if [expert for expert, _ in rows] != list(range(total)):
        raise CheckError(f"exflow: experts must be 0 ... {total - 1}, each once and in order")
    homes = np.array([node for _, node in rows]).reshape(num_layers, num_experts)
    counts = np.stack([np.bincount(row, minlength=num_gpus) for row in homes])
    if counts.shape[1] != num_gpus or (counts != num_experts // num_gpus).any():
        raise CheckError(f"exflow: every GPU must hold {num_experts // num_gpus} experts of every layer")


def exflow_homes(data: bytes, *, num_layers: int, num_experts: int, num_gpus: int) -> Rows:
    """Return the GPU of every expert, layer by layer, from ExFlow's CSV; raises CheckError."""
    lines = list(csv.DictReader(io.StringIO(data.decode())))
    rows = [(int(line["Expert"]), int(line["Node"])) for line in lines]
    check_exflow(rows, num_layers=num_layers, num_experts=num_experts, num_gpus=num_gpus)
    return np.array([node for _, node in rows]).reshape(num_layers, num_experts).tolist()


def deepspeed_rows(data: bytes, *, num_layers: int, num_experts: int, ep_size: int) -> Rows:
    """Return the old expert at each new id of a DeepSpeed layout, layer by layer; raises CheckError.

    DeepSpeed gives rank r the ids ``r * E / ep_size ...``; a layout is a permutation of the ids, and its inference
    section must say the same sizes.
    """
    document = _json(data, "deepspeed")
    section = document["inference_config"]["moe"]
    if section != {"enabled": True, "ep_size": ep_size, "moe_experts": [num_experts]}:
        raise CheckError(f"deepspeed: the section moe says {section}")
    rows = document["old_expert_of_new_id"]
    if len(rows) != num_layers or any(sorted(row) != list(range(num_experts)) for row in rows):
        raise CheckError(f"deepspeed: expected {num_layers} permutations of 0 ... {num_experts - 1}")
    if num_experts % ep_size:
        raise CheckError(f"deepspeed: {num_experts} experts do not divide by ep_size {ep_size}")
    return rows


def _json(data: bytes, engine: str) -> dict[str, Any]:
    document = json.loads(data)
    if not isinstance(document, dict):
        raise CheckError(f"{engine}: expected a JSON object, found {type(document).__name__}")
    return document
