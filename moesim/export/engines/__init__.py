"""Placement plans, traces and runs as files that engines load, each read back and checked against the engine's rules.

The rules were read from the engines' sources; `moesim.export.check` restates them apart from the writers. Row numbers
are the most likely silent mistake: SGLang's map has a row for every layer of the model, dense ones included;
TensorRT-LLM's keys are the model's own layer numbers; vLLM, EPLB and ExFlow count MoE layers from 0.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moesim.artifacts import atomic_folder, atomic_path
from moesim.errors import InputError
from moesim.export.check.arrays import check_eplb
from moesim.export.check.plans import check_exflow, check_sglang, check_tensorrt_llm
from moesim.export.engines.chakra import Chakra
from moesim.export.engines.deepspeed import DeepSpeed
from moesim.export.engines.eplb import EplbPlan, EplbWeight
from moesim.export.engines.exflow import ExFlow
from moesim.export.engines.ktransformers import KTransformers, KTransformersRules
from moesim.export.engines.llama_cpp import LlamaCpp
from moesim.export.engines.sglang import SGLang
from moesim.export.engines.target import (
    Content,
    ExportReport,
    PlanTarget,
    Refusal,
    Target,
    check_same_model,
    kind_of,
)
from moesim.export.engines.tensorrt_llm import TensorRTLLM
from moesim.export.engines.vllm import Vllm, VllmRouting
from moesim.export.engines.vllm_ascend import VllmAscend
from moesim.model.spec import ModelSpec
from moesim.placement.plan import PlacementPlan
from moesim.registry import Registry

__all__ = ["EXPORTERS", "ExportReport", "PlanTarget", "Refusal", "Target", "check_eplb", "check_exflow", "check_sglang",
           "check_tensorrt_llm", "export", "export_plan"]

MAX_REFUSALS = 4  # a nearest subject may be refused for another reason; each engine has fewer reasons than this

EXPORTERS: Registry[Target[Any]] = Registry("export target", "moesim.exporters", {
    target.name: target for target in (
        SGLang(), TensorRTLLM(), Vllm(), VllmAscend(), EplbPlan(), ExFlow(), DeepSpeed(), EplbWeight(), VllmRouting(),
        KTransformers(), KTransformersRules(), LlamaCpp(), Chakra())})


def export(subject: Any, model: ModelSpec | None, target: str, path: str | os.PathLike[str], *,
           nearest: bool = False) -> ExportReport:
    """Write `subject` for the engine `target` (one of `EXPORTERS`) to `path`, whole or not at all.

    Args:
        subject: what the target takes: a plan, a trace, a `Residency` or a result.
        model: may be None for targets without `needs_model`.
        target: the engine's name.
        path: the file (or folder) to write.
        nearest: write the nearest subject that the engine can express, where it cannot express this one.

    Raises:
        InputError: an unknown target, a subject of another kind or made for another model, a wrong ending, or one that
            the target cannot express (the message names the nearest one that it can).
        CheckError: what would have been written breaks the engine's rules (a bug; nothing is written).
    """
    chosen, file = EXPORTERS[target], Path(path)
    _check_fits(chosen, subject, model, file)
    subject, changes = _expressible(chosen, subject, model, nearest)
    content = chosen.encode(subject, model, file)
    chosen.check(content, subject, model)
    _write(content, file)
    return ExportReport(file, chosen.command(subject, model, file), (*changes, *chosen.notes(subject, model)))


def export_plan(plan: PlacementPlan, model: ModelSpec | None, target: str,
                path: str | os.PathLike[str]) -> ExportReport:
    """Write a plan; `export` says how and what it raises."""
    return export(plan, model, target, path)


def _check_fits(target: Target[Any], subject: Any, model: ModelSpec | None, path: Path) -> None:
    if not isinstance(subject, target.takes):
        raise InputError(f"{target.name}: takes {target.takes_words}, not a {kind_of(subject)}")
    if target.needs_model and model is None:
        raise InputError(f"{target.name}: the model is needed, to know which of its layers are MoE layers")
    if model is not None and hasattr(subject, "num_experts"):
        check_same_model(subject, model)
    if target.suffixes and path.suffix not in target.suffixes:
        raise InputError(f"{path}: the file must end in {' or '.join(target.suffixes)}: {target.suffix_reason}")


def _expressible(target: Target[Any], subject: Any, model: ModelSpec | None,
                 nearest: bool) -> tuple[Any, tuple[str, ...]]:
    """Return the subject, or the nearest that the target can express and what was changed."""
    changes: list[str] = []
    for _ in range(MAX_REFUSALS):
        refusal = target.refusal(subject, model)
        if refusal is None:
            return subject, tuple(changes)
        if refusal.nearest is None:
            raise InputError(refusal.reason)
        if not nearest:
            raise InputError(f"{refusal.reason}; the nearest that it can: {refusal.difference} (--nearest writes that)")
        changes.append(f"Written is not what was given but the nearest that the engine can: {refusal.difference}.")
        subject = refusal.nearest
    raise InputError(f"{target.name}: found nothing near that the engine can express")


def _write(content: Content, path: Path) -> None:
    if isinstance(content, bytes):
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        return
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not set(os.listdir(path)) <= set(content)):
        raise InputError(f"{path}: exists and is not a folder that an export wrote; it is left as it is")
    with atomic_folder(path) as folder:
        for name, data in content.items():
            (folder / name).write_bytes(data)
