"""Placement files of engines read back as plans: SGLang, TensorRT-LLM, vLLM's plug-in, vllm-ascend, EPLB, ExFlow."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.artifacts import read_bytes
from moesim.errors import CheckError, InputError, unknown
from moesim.model.spec import ModelSpec
from moesim.placement.exflow_files import read_exflow_csv
from moesim.placement.plan import PlacementPlan

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class PlanFacts:
    """What a file may not say itself; None: not known."""

    model: ModelSpec | None = None
    num_experts: int | None = None
    num_layers: int | None = None
    num_ranks: int | None = None

    def ranks(self, path: PathLike) -> int:
        """Return the ranks, or raise InputError that asks for them."""
        if self.num_ranks is None:
            raise InputError(f"{path}: does not say how many ranks there are; give num_ranks")
        return self.num_ranks


def read_engine_plan(path: PathLike, source_format: str | None = None, facts: PlanFacts = PlanFacts()) -> PlacementPlan:
    """Read a placement file of an engine.

    Args:
        path: the file.
        source_format: one of `PLAN_READERS`; None: told by the file's ending and keys.
        facts: what the file may not say (SGLang: the model and the ranks; EPLB: the ranks; ExFlow: experts or layers).

    Raises:
        InputError: no such file, a file of another kind, facts that are missing or do not fit.
        CheckError: a plan that breaks a rule.
    """
    name = source_format or detect_plan_format(path)
    if name not in PLAN_READERS:
        raise unknown("plan format", name, PLAN_READERS)
    try:
        plan = PLAN_READERS[name](path, facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a placement file of {name}: {error!r}") from None
    except CheckError as error:
        raise CheckError(f"{path}: {error}") from None
    _check_sizes(path, plan, facts)
    return plan


def detect_plan_format(path: PathLike) -> str:
    """Return the format of a placement file by its ending and, for JSON, its keys; raises InputError."""
    suffix = Path(path).suffix
    by_suffix = {".csv": "exflow", ".npz": "eplb", ".npy": "eplb", ".yaml": "tensorrt-llm", ".yml": "tensorrt-llm"}
    if suffix in by_suffix:
        return by_suffix[suffix]
    document = _json(path) if suffix == ".json" else {}
    if document.get("schema") == "moesim.vllm-eplb/1":
        return "vllm"
    for key, name in (("layer_list", "vllm-ascend"), ("physical_to_logical_map", "sglang")):
        if key in document:
            return name
    raise InputError(f"{path}: not a placement file that is known; formats: {', '.join(PLAN_READERS)}")


def _json(path: PathLike) -> dict[str, Any]:
    try:
        document = json.loads(read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def _plan(path: PathLike, engine: str, rows: Any, num_ranks: int, num_experts: int | None = None) -> PlacementPlan:
    slots = np.array(rows, dtype=np.int64)
    if slots.ndim != 2 or slots.size == 0:
        raise InputError(f"{path}: the layers hold different numbers of slots, or none")
    experts = int(slots.max()) + 1 if num_experts is None else num_experts
    return PlacementPlan(slots, num_ranks, experts, {"solver": engine, "source": os.path.basename(path)})


def _sglang(path: PathLike, facts: PlanFacts) -> PlacementPlan:
    rows = _json(path)["physical_to_logical_map"]
    if facts.model is None:
        raise InputError(f"{path}: has a row for every layer; the model is needed, to know which are MoE layers")
    if len(rows) != facts.model.num_layers:
        raise InputError(f"{path}: {len(rows)} rows, model {facts.model.name!r} has {facts.model.num_layers} layers")
    moe = [rows[layer] for layer in facts.model.moe_layers]
    return _plan(path, "sglang", moe, facts.ranks(path), facts.model.num_experts)


def _tensorrt(path: PathLike, facts: PlanFacts) -> PlacementPlan:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        document = YAML(typ="safe", pure=True).load(read_bytes(path).decode("utf-8"))
    except YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    rows = document["initial_global_assignments"]
    if facts.model is not None and sorted(rows) != list(facts.model.moe_layers):
        raise InputError(f"{path}: assigns the layers {sorted(rows)}, the MoE layers of {facts.model.name!r} are "
                         f"{list(facts.model.moe_layers)}")
    return _plan(path, "tensorrt-llm", [rows[layer] for layer in sorted(rows)], facts.ranks(path), facts.num_experts)


def _vllm(path: PathLike, facts: PlanFacts) -> PlacementPlan:
    document = _json(path)
    return _plan(path, "vllm", document["physical_to_logical_map"], document["num_ranks"], document["num_experts"])


def _ascend(path: PathLike, facts: PlanFacts) -> PlacementPlan:
    layers = sorted(_json(path)["layer_list"], key=lambda layer: layer["layer_id"])
    rows = [[expert for device in sorted(layer["device_list"], key=lambda one: one["device_id"])
             for expert in device["device_expert"]] for layer in layers]
    return _plan(path, "vllm-ascend", rows, layers[0]["device_count"], facts.num_experts)


def _eplb(path: PathLike, facts: PlanFacts) -> PlacementPlan:
    loaded = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
    rows = loaded if isinstance(loaded, np.ndarray) else loaded["phy2log"]
    return _plan(path, "eplb", rows, facts.ranks(path), facts.num_experts)


def _exflow(path: PathLike, facts: PlanFacts) -> PlacementPlan:
    model = facts.model
    return read_exflow_csv(path, num_experts=facts.num_experts or (model.num_experts if model else None),
                           num_layers=facts.num_layers or (model.num_moe_layers if model else None),
                           num_ranks=facts.num_ranks)


def _check_sizes(path: PathLike, plan: PlacementPlan, facts: PlanFacts) -> None:
    """Whatever was given beside the file must be what the file holds."""
    model = facts.model
    given = ((facts.num_experts or (model.num_experts if model else None), plan.num_experts, "experts per layer"),
             (facts.num_layers or (model.num_moe_layers if model else None), plan.num_layers, "MoE layers"),
             (facts.num_ranks, plan.num_ranks, "ranks"))
    for expected, found, what in given:
        if expected is not None and expected != found:
            raise InputError(f"{path}: holds {found} {what}, expected {expected}")


PLAN_READERS: dict[str, Callable[[PathLike, PlanFacts], PlacementPlan]] = {
    "sglang": _sglang, "tensorrt-llm": _tensorrt, "vllm": _vllm, "vllm-ascend": _ascend, "eplb": _eplb, "exflow": _exflow}
