"""Placement plans as files that serving engines load, each checked against the engine's own rules.

The rules were read from the engines' sources; the ``check_*`` functions restate them. Row numbers are
the most likely silent mistake: SGLang's map has a row for every layer of the model, dense ones included;
TensorRT-LLM's keys are the model's own layer numbers; EPLB and ExFlow count MoE layers from 0.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.artifacts import atomic_path, write_text
from moesim.errors import CheckError, InputError
from moesim.model.spec import ModelSpec
from moesim.placement.plan import PlacementPlan
from moesim.registry import Registry

SGLANG_KEY = "physical_to_logical_map"
TENSORRT_KEYS = ("num_slots", "layer_updates_per_iter", "initial_global_assignments")


@dataclass(frozen=True)
class ExportReport:
    """The file that was written, the command line that loads it, and what the reader must know."""

    path: Path
    start_command: str
    notes: tuple[str, ...] = ()


Exporter = Callable[[PlacementPlan, ModelSpec | None, Path], ExportReport]


def export_plan(plan: PlacementPlan, model: ModelSpec | None, target: str,
                path: str | os.PathLike[str]) -> ExportReport:
    """Write `plan` for the engine `target` (one of `EXPORTERS`) to `path`, whole or not at all.

    `model` may be None for the targets that count MoE layers only (``eplb``, ``exflow``).

    Raises:
        InputError: an unknown target, a plan made for another model, or one that the target cannot express.
    """
    exporter = EXPORTERS[target]
    if model is not None:
        _check_same_model(plan, model)
    return exporter(plan, model, Path(path))


def export_sglang(plan: PlacementPlan, model: ModelSpec | None, path: Path) -> ExportReport:
    """SGLang's ``--init-expert-location`` file (0.5.23): JSON with the one key ``physical_to_logical_map``.

    int[model layer, slot]: the rows of dense layers, which the engine reads but never uses, hold slot
    mod num_experts. GPU g owns slots ``g * slots / ep_size ...``, as in the plan.
    """
    model = _required(model, "sglang")
    _refuse_shared_pool(model, "SGLang")
    _refuse_suffix(path, (".json",), "SGLang tells the format of --init-expert-location by its suffix")
    rows = np.tile(np.arange(plan.num_slots) % plan.num_experts, (model.num_layers, 1))
    rows[list(model.moe_layers)] = plan.physical_to_logical
    document = {SGLANG_KEY: rows.tolist()}
    redundant = plan.num_slots - plan.num_experts
    check_sglang(document, num_layers=model.num_layers, num_experts=plan.num_experts,
                 num_redundant=redundant, ep_size=plan.num_ranks)
    write_text(path, json.dumps(document) + "\n")
    ranks = plan.num_ranks
    exchange = (f"--dp-size {ranks} --enable-dp-attention --moe-a2a-backend deepep "
                "--ep-dispatch-algorithm static ") if ranks > 1 else ""
    command = (f"python -m sglang.launch_server --model-path {shlex.quote(model.name)} --tp-size {ranks} "
               f"--ep-size {ranks} {exchange}--ep-num-redundant-experts {redundant} "
               f"--init-expert-location {shlex.quote(str(path))}")
    return ExportReport(path, command, (
        "Put the checkpoint's path after --model-path; on several servers add --nnodes, --node-rank and "
        "--dist-init-addr.",
        "SGLang accepts a map of the wrong width and fails later: keep --ep-num-redundant-experts and "
        "--ep-size as given here.",
        "moesim splits an expert's tokens evenly over its replicas; SGLang's static dispatch prefers a "
        "replica on the sender's own GPU, then on its node.",
        "Only model classes that define get_model_config_for_expert_location use the map (DeepSeek, Qwen, "
        "GLM, GPT-OSS, LLaDA2, ...; not Mixtral, OLMoE, Phi, DBRX or Jamba)."))


def export_tensorrt_llm(plan: PlacementPlan, model: ModelSpec | None, path: Path) -> ExportReport:
    """TensorRT-LLM's load-balancer YAML, a static plan: slots of each MoE layer by its own number."""
    model = _required(model, "tensorrt-llm")
    _refuse_shared_pool(model, "TensorRT-LLM")
    _refuse_suffix(path, (".yaml", ".yml"), "TensorRT-LLM reads this file as YAML")
    if plan.num_ranks == 1:
        raise InputError("tensorrt-llm: the load balancer needs expert parallelism over several ranks, "
                         "but the plan has 1 rank")
    assignments = dict(zip(model.moe_layers, plan.physical_to_logical.tolist(), strict=True))
    document = dict(zip(TENSORRT_KEYS, (plan.num_slots, 0, assignments), strict=True))
    check_tensorrt_llm(document, moe_layers=model.moe_layers, num_experts=plan.num_experts,
                       ep_size=plan.num_ranks)
    _write_yaml(document, path)
    extra = path.with_name(f"{path.stem}.llm_args.yaml")
    lines = ("enable_attention_dp: true", "moe_config:", "  backend: WIDEEP",
             f"  load_balancer: {json.dumps(str(path))}")
    command = (f"printf '%s\\n' {' '.join(map(shlex.quote, lines))} > {shlex.quote(str(extra))} && "
               f"trtllm-serve {shlex.quote(model.name)} --tp_size {plan.num_ranks} "
               f"--ep_size {plan.num_ranks} --extra_llm_api_options {shlex.quote(str(extra))}")
    return ExportReport(path, command, (
        "Put the checkpoint's path after trtllm-serve.",
        "Older versions take the file as a top-level moe_load_balancer, or under pytorch_backend_config.",
        "Every MoE layer that the engine builds must be in the file: a multi-token-prediction layer, which "
        "the plan does not hold, would be refused.",
        "Load balancing is known for DeepSeek-V3, Mixtral, Llama 4, Qwen2-MoE and Qwen3-MoE."))


def export_eplb(plan: PlacementPlan, model: ModelSpec | None, path: Path) -> ExportReport:
    """What DeepSeek's ``rebalance_experts`` returns, as a .npz of int64 arrays.

    ``phy2log[layer, slot]``, ``log2phy[layer, expert, replica]`` (-1 padded), ``logcnt[layer, expert]``;
    layers are MoE layers from 0. Anything that takes EPLB's answer takes these.
    """
    _refuse_suffix(path, (".npz",), "numpy names its archives so")
    arrays = {"phy2log": plan.physical_to_logical, "log2phy": plan.logical_to_physical,
              "logcnt": plan.replica_count}
    arrays = {name: array.astype(np.int64) for name, array in arrays.items()}
    check_eplb(**arrays)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    load = f"import numpy; plan = numpy.load({str(path)!r}); print(plan['phy2log'].shape)"
    return ExportReport(path, f"python -c {shlex.quote(load)}", (
        "No engine loads this file by a flag: it is for code that calls rebalance_experts.",
        "vLLM has no option for an initial map; a plug-in that replaces its EPLB policy may return phy2log."))


def export_exflow(plan: PlacementPlan, model: ModelSpec | None, path: Path) -> ExportReport:
    """ExFlow's solution CSV ``Expert,Node``: expert ``layer * num_experts + e`` and its GPU."""
    _refuse_suffix(path, (".csv",), "ExFlow's tools look for a CSV")
    if plan.num_slots != plan.num_experts:
        raise InputError(f"exflow: an expert has one home there, but the plan has {plan.num_slots} slots for "
                         f"{plan.num_experts} experts in each layer; solve again without redundant experts")
    homes = plan.slot_rank[plan.logical_to_physical[:, :, 0]].ravel().tolist()
    rows = list(enumerate(homes))
    check_exflow(rows, num_layers=plan.num_layers, num_experts=plan.num_experts, num_gpus=plan.num_ranks)
    write_text(path, "Expert,Node\n" + "".join(f"{expert},{node}\n" for expert, node in rows))
    load = f"import pandas; print(pandas.read_csv({str(path)!r}).groupby('Node').size())"
    return ExportReport(path, f"python -c {shlex.quote(load)}", (
        "Experts are numbered over all MoE layers; Node is the GPU (rank), as in ExFlow's published plans.",))


def check_sglang(document: dict[str, Any], *, num_layers: int, num_experts: int, num_redundant: int,
                 ep_size: int) -> None:
    """Raise CheckError unless SGLang's loader and its expert map would take `document`."""
    if list(document) != [SGLANG_KEY]:
        raise CheckError(f"sglang: {SGLANG_KEY} must be the only key, found {list(document)}")
    rows = document[SGLANG_KEY]
    if len(rows) != num_layers:
        raise CheckError(f"sglang: {len(rows)} rows, the model has {num_layers} layers (dense ones count)")
    for layer, row in enumerate(rows):
        _check_row("sglang", layer, row, num_experts + num_redundant, num_experts, ep_size)


def check_tensorrt_llm(document: dict[str, Any], *, moe_layers: Sequence[int], num_experts: int,
                       ep_size: int) -> None:
    """Raise CheckError unless TensorRT-LLM's strict load-balancer configuration would take `document`."""
    if set(document) != set(TENSORRT_KEYS):
        raise CheckError(f"tensorrt-llm: the keys must be {list(TENSORRT_KEYS)}, found {list(document)}")
    if document["layer_updates_per_iter"] != 0:
        raise CheckError("tensorrt-llm: layer_updates_per_iter must be 0 for a static plan, "
                         f"found {document['layer_updates_per_iter']!r}")
    assignments = document["initial_global_assignments"]
    if any(type(layer) is not int for layer in assignments) or sorted(assignments) != sorted(moe_layers):
        raise CheckError(f"tensorrt-llm: assignments for the layers {list(assignments)}, the model's MoE "
                         f"layers are {list(moe_layers)}")
    for layer, row in assignments.items():
        _check_row("tensorrt-llm", layer, row, document["num_slots"], num_experts, ep_size)


def check_eplb(phy2log: np.ndarray, log2phy: np.ndarray, logcnt: np.ndarray) -> None:
    """Raise CheckError unless the three arrays are of the kinds EPLB returns and agree with each other."""
    layers, slots = phy2log.shape
    counts = np.stack([np.bincount(row, minlength=logcnt.shape[1]) for row in phy2log])
    if not np.array_equal(counts, logcnt) or logcnt.min() < 1:
        raise CheckError("eplb: logcnt is not the number of slots of each expert in phy2log, each at least 1")
    filled = log2phy >= 0
    if not np.array_equal(filled.sum(axis=2), logcnt) or int(filled.sum()) != layers * slots:
        raise CheckError("eplb: log2phy does not list every slot once")
    layer, expert, replica = np.nonzero(filled)
    if not np.array_equal(phy2log[layer, log2phy[layer, expert, replica]], expert):
        raise CheckError("eplb: log2phy and phy2log disagree")


def check_exflow(rows: Sequence[tuple[int, int]], *, num_layers: int, num_experts: int,
                 num_gpus: int) -> None:
    """Raise CheckError unless every expert appears once and every GPU has as many of each layer."""
    total = num_layers * num_experts
    if [expert for expert, _ in rows] != list(range(total)):
        raise CheckError(f"exflow: experts must be 0 ... {total - 1}, each once and in order")
    homes = np.array([node for _, node in rows]).reshape(num_layers, num_experts)
    counts = np.stack([np.bincount(row, minlength=num_gpus) for row in homes])
    if counts.shape[1] != num_gpus or (counts != num_experts // num_gpus).any():
        raise CheckError(f"exflow: every GPU must hold {num_experts // num_gpus} experts of every layer")


def _check_row(engine: str, layer: int, row: Sequence[int], num_slots: int, num_experts: int,
               ep_size: int) -> None:
    """The rules that both engines share, for one layer's slots."""
    if len(row) != num_slots or num_slots % ep_size:
        raise CheckError(f"{engine}: layer {layer} has {len(row)} slots; expected {num_slots}, "
                         f"a multiple of ep_size {ep_size}")
    if any(type(expert) is not int or not 0 <= expert < num_experts for expert in row):
        raise CheckError(f"{engine}: layer {layer} holds an id outside 0 ... {num_experts - 1}")
    if missing := set(range(num_experts)) - set(row):
        raise CheckError(f"{engine}: expert {min(missing)} of layer {layer} has no slot")


def _check_same_model(plan: PlacementPlan, model: ModelSpec) -> None:
    for what, planned, has in (("MoE layers", plan.num_layers, model.num_moe_layers),
                               ("experts", plan.num_experts, model.num_experts)):
        if planned != has:
            raise InputError(f"export: the plan is for {planned} {what}, the model {model.name!r} has {has}")


def _required(model: ModelSpec | None, target: str) -> ModelSpec:
    if model is None:
        raise InputError(f"{target}: the model is needed, to know which of its layers are MoE layers")
    return model


def _refuse_shared_pool(model: ModelSpec, engine: str) -> None:
    if model.num_pool_experts != model.num_moe_layers * model.num_experts:
        raise InputError(f"{engine} loads separate experts for every layer, but {model.name!r} shares "
                         f"{model.num_pool_experts} experts between layers")


def _refuse_suffix(path: Path, suffixes: Sequence[str], reason: str) -> None:
    if path.suffix not in suffixes:
        raise InputError(f"{path}: the file must end in {' or '.join(suffixes)}: {reason}")


def _write_yaml(document: dict[str, Any], path: Path) -> None:
    """YAML with one line per layer."""
    from ruamel.yaml import YAML

    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = None, 2**20, False
    with atomic_path(path) as temporary:
        yaml.dump(document, temporary)


EXPORTERS: Registry[Exporter] = Registry("export target", "moesim.exporters", {
    "sglang": export_sglang, "tensorrt-llm": export_tensorrt_llm,
    "eplb": export_eplb, "exflow": export_exflow})
