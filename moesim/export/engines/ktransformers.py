"""KTransformers: an activation file that yields a wanted mask (current path), and optimise rules (archived path)."""

from __future__ import annotations

import dataclasses
import io
import shlex
from pathlib import Path

import numpy as np

from moesim.errors import CheckError, require
from moesim.export.check.offload import ktransformers_mask, rule_layers
from moesim.export.engines.target import Content, Refusal, Target, known, one_file, refuse_shared_pool
from moesim.export.residency import Residency
from moesim.model.spec import ModelSpec
from moesim.units import format_bytes

TAKES_WORDS = "a list of experts (CSV layer,expert), or a trace with --gpu-experts or --gpu-bytes"


class KTransformers(Target[Residency]):
    """A torch file ``{"logical_count": int32[1, model layer, expert]}``: 1 for experts on the GPU, else 0.

    sglang-kt (0.7.2) keeps the ``int(ratio * experts)`` most used experts of all layers on the GPU, so these counts and
    the ratio of the command give exactly the wanted ones. Rows of dense layers are 0.
    """

    name, suffixes = "ktransformers", (".pt",)
    takes, takes_words = Residency, TAKES_WORDS
    suffix_reason = "sglang-kt reads counts from a .pt only"
    what = "activation file that makes sglang-kt keep the wanted experts on the GPU"

    def refusal(self, subject: Residency, model: ModelSpec | None) -> Refusal[Residency] | None:
        """Refuse models whose MoE layers the engine would count wrongly."""
        model = known(model)
        if model.moe_layers != tuple(range(model.num_dense_layers, model.num_layers)):
            return Refusal(f"ktransformers: counts layers from the first MoE layer to the last, but {model.name!r} has "
                           "dense layers between or after its MoE layers")
        return refuse_shared_pool("KTransformers", model)

    def encode(self, subject: Residency, model: ModelSpec | None, path: Path) -> Content:
        """Return the torch file."""
        require("torch", "torch", "writing a .pt file")
        import torch

        counts = np.zeros((1, known(model).num_layers, subject.num_experts), np.int32)
        counts[0, list(known(model).moe_layers)] = subject.on_gpu
        file = io.BytesIO()
        torch.save({"logical_count": torch.from_numpy(counts)}, file)
        return file.getvalue()

    def check(self, content: Content, subject: Residency, model: ModelSpec | None) -> None:
        """Build the mask as the engine does."""
        model = known(model)
        mask = ktransformers_mask(one_file(content), ratio=float(_ratio(subject)), moe_layers=model.moe_layers,
                                  num_layers=model.num_layers, num_experts=model.num_experts)
        dense = np.delete(mask, list(model.moe_layers), axis=0)
        if not np.array_equal(mask[list(model.moe_layers)], subject.on_gpu) or not dense.all():
            raise CheckError("ktransformers: the engine's mask is not the wanted one")

    def command(self, subject: Residency, model: ModelSpec | None, path: Path) -> str:
        """Return a server's command line."""
        return (f"python -m sglang.launch_server --model-path {shlex.quote(known(model).name)} --kt-weight-path CPU_WEIGHTS "
                f"--kt-method AMXINT4 --kt-cpuinfer 32 --kt-threadpool-count 1 --kt-expert-placement-strategy frequency "
                f"--kt-gpu-experts-ratio {_ratio(subject)} --init-expert-location {shlex.quote(str(path))}")

    def notes(self, subject: Residency, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what is kept and what to set."""
        return (_kept(subject, known(model)),
                "Needs sglang-kt and kt-kernel. Put the checkpoint's path after --model-path, the CPU weights' path after "
                "--kt-weight-path and their format after --kt-method; --kt-cpuinfer is cores, --kt-threadpool-count NUMA "
                "nodes.",
                "Mainline SGLang's wrapper ignores the file and keeps experts 0 ... n - 1 of every layer.")


class KTransformersRules(Target[Residency]):
    """YAML of optimise rules: layers whose experts all stay on the GPU, then every other layer on the CPU."""

    name, suffixes = "ktransformers-rules", (".yaml", ".yml")
    takes, takes_words = Residency, TAKES_WORDS
    suffix_reason = "KTransformers reads rules as YAML"
    what = "optimise rules of archived KTransformers, whole layers only"

    def refusal(self, subject: Residency, model: ModelSpec | None) -> Refusal[Residency] | None:
        """Refuse layers of which a part stays on the GPU."""
        return refuse_part_layers(self.name, subject)

    def encode(self, subject: Residency, model: ModelSpec | None, path: Path) -> Content:
        """Return the YAML document, written as the engine's own rule files are."""
        layers = [layer for layer, kept in zip(known(model).moe_layers, subject.whole_layers(), strict=True) if kept]
        rules = [_rule("|".join(map(str, layers)), "cuda:0", "KExpertsMarlin")] if layers else []
        return "\n".join([*rules, _rule("[0-9]+", "cpu", "KExpertsCPU")]).encode()

    def check(self, content: Content, subject: Residency, model: ModelSpec | None) -> None:
        """Match every layer's experts against the rules as the engine does."""
        found = rule_layers(one_file(content), moe_layers=known(model).moe_layers)
        if found.tolist() != subject.whole_layers():
            raise CheckError("ktransformers-rules: the rules put other layers on the GPU than wanted")

    def command(self, subject: Residency, model: ModelSpec | None, path: Path) -> str:
        """Return the archived program's command line."""
        return (f"python -m ktransformers.local_chat --model_path {shlex.quote(known(model).name)} "
                f"--gguf_path GGUF_FOLDER --optimize_config_path {shlex.quote(str(path))}")

    def notes(self, subject: Residency, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what the rules cover."""
        return (_kept(subject, known(model)),
                "The project keeps this path under archive/. The rules cover routed experts only: append "
                "the model's own rules for attention, rotary embeddings and linear layers.")


def refuse_part_layers(name: str, subject: Residency) -> Refusal[Residency] | None:
    """Refuse layers of which a part stays on the GPU; the nearest has whole layers and no more bytes."""
    held = subject.on_gpu.sum(axis=1)
    if np.all((held == 0) | (held == subject.num_experts)):
        return None
    part = int(np.flatnonzero((held > 0) & (held < subject.num_experts))[0])
    room = subject.num_on_gpu // subject.num_experts
    order = np.lexsort((-np.arange(subject.num_layers), -held))  # most listed experts first, then the later layer
    mask = np.zeros(subject.on_gpu.shape, bool)
    mask[order[:room]] = True
    near = dataclasses.replace(subject, on_gpu=mask)
    return Refusal(f"{name}: the experts of a layer stay together there, but {held[part]} of {subject.num_experts} of "
                   f"MoE layer {part} are on the GPU", near,
                   f"all experts of {room} layer{'' if room == 1 else 's'} ({near.num_on_gpu} experts instead of {subject.num_on_gpu})")


def _ratio(subject: Residency) -> str:
    """Return the share of all experts as text; half an expert more, so that truncation gives the exact number."""
    return repr((subject.num_on_gpu + 0.5) / (subject.num_layers * subject.num_experts))


def _rule(layers: str, device: str, op: str) -> str:
    prefill = "cuda:0"
    return (f'- match:\n    name: "^model\\\\.layers\\\\.({layers})\\\\.mlp\\\\.experts$"\n  replace:\n'
            f"    class: ktransformers.operators.experts.KTransformersExperts\n    kwargs:\n"
            f'      generate_device: "{device}"\n      generate_op: "{op}"\n      prefill_device: "{prefill}"\n'
            f'      prefill_op: "KExpertsTorch"\n      out_device: "{prefill}"\n  recursive: False\n')


def _kept(subject: Residency, model: ModelSpec) -> str:
    return (f"{subject.num_on_gpu} of {subject.on_gpu.size} experts stay on the GPU ({subject.source}): "
            f"{format_bytes(subject.gpu_bytes(model))} at {model.weight_bytes:g} bytes per weight.")
