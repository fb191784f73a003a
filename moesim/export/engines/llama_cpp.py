"""llama.cpp: which layers' stacked expert tensors stay off the GPU, as a script around ``-ngl`` and ``-ot``."""

from __future__ import annotations

import shlex
from pathlib import Path

from moesim.errors import CheckError
from moesim.export.check.offload import llama_layers
from moesim.export.engines.ktransformers import refuse_part_layers
from moesim.export.engines.target import Content, Refusal, Target, known, one_file, refuse_shared_pool
from moesim.export.residency import Residency
from moesim.model.spec import ModelSpec
from moesim.units import format_bytes


class LlamaCpp(Target[Residency]):
    """A shell script: ``sh FILE -m model.gguf`` starts llama-server with the experts of the other layers in main memory.

    All experts of a layer share one stacked tensor per projection, so whole layers are what can be chosen.
    """

    name, suffixes = "llama.cpp", (".sh",)
    takes = Residency
    takes_words = ("a list of experts (CSV layer,expert), a trace with --gpu-experts or --gpu-bytes, or a model with "
                   "--gpu-bytes")
    suffix_reason = "it is a shell script"
    what = "script with -ngl and -ot: whole layers' experts on the GPU or off it"

    def refusal(self, subject: Residency, model: ModelSpec | None) -> Refusal[Residency] | None:
        """Refuse layers of which a part stays on the GPU."""
        return refuse_shared_pool("llama.cpp", known(model)) or refuse_part_layers(self.name, subject)

    def encode(self, subject: Residency, model: ModelSpec | None, path: Path) -> Content:
        """Return the script."""
        words = " ".join(map(shlex.quote, arguments(subject, known(model))))
        return (f"#!/bin/sh\n# {cpu_bytes_line(subject, known(model))}\n"
                f'exec "${{LLAMA_SERVER:-llama-server}}" {words} "$@"\n').encode()

    def check(self, content: Content, subject: Residency, model: ModelSpec | None) -> None:
        """Apply the script's overrides to every tensor name as the engine does."""
        model = known(model)
        found = llama_layers(one_file(content), num_layers=model.num_layers)[list(model.moe_layers)]
        if found.tolist() != subject.whole_layers():
            raise CheckError("llama.cpp: the overrides put other layers on the GPU than wanted")

    def command(self, subject: Residency, model: ModelSpec | None, path: Path) -> str:
        """Return the script's command line."""
        return f"sh {shlex.quote(str(path))} -m MODEL.gguf"

    def notes(self, subject: Residency, model: ModelSpec | None) -> tuple[str, ...]:
        """Return the plain arguments, the shorthand if there is one, and the bytes."""
        model = known(model)
        off = cpu_layers(subject, model)
        plain = f"The same on a command line: llama-server -m MODEL.gguf {shlex.join(arguments(subject, model))}"
        first = off[-1] + 1 if off else 0
        short = ([f"The same in short: -ngl 999 --n-cpu-moe {first}."]
                 if off == [layer for layer in model.moe_layers if layer < first] else [])
        return (cpu_bytes_line(subject, model), plain, *short,
                "In llama-bench the overrides are separated by ; instead of a comma. Bytes hold for the model's "
                f"{model.weight_bytes:g} bytes per expert weight; a quantised GGUF has its own.")


def cpu_layers(subject: Residency, model: ModelSpec) -> list[int]:
    """Return the model's own numbers of the MoE layers whose experts stay off the GPU."""
    return [layer for layer, on_gpu in zip(model.moe_layers, subject.whole_layers(), strict=True) if not on_gpu]


def arguments(subject: Residency, model: ModelSpec) -> list[str]:
    """Return ``-ngl 999`` and, if any layer's experts stay off the GPU, the ``-ot`` that keeps them off."""
    off = cpu_layers(subject, model)
    if not off:
        return ["-ngl", "999"]
    return ["-ngl", "999", "-ot", rf"blk\.({'|'.join(map(str, off))})\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"]


def cpu_bytes_line(subject: Residency, model: ModelSpec) -> str:
    """Return how many bytes of experts lie where."""
    on_gpu = subject.gpu_bytes(model)
    all_bytes = subject.on_gpu.size * model.expert_bytes
    return (f"experts of {subject.num_layers - len(cpu_layers(subject, model))} of {subject.num_layers} MoE layers on the "
            f"GPU ({subject.source}): {on_gpu} bytes ({format_bytes(on_gpu)}), {all_bytes - on_gpu} bytes in main memory")
