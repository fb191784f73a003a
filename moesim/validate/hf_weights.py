"""A Hugging Face model's expert weights out of their modules: a slow tier that holds all, slots that hold a few.

In transformers 5 a MoE block's `experts` module keeps one tensor per weight, experts first, and its eager forward takes
``weight[expert]`` for one chosen expert after the other, in rising order. So the forward can stay the model's own: the
parameters are replaced by objects whose ``[expert]`` gives the weights from wherever they are.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import InputError, require
from moesim.traces.capture_hooks import RouterRecorder

PASSING_SLOTS = 2
TIERS = ("memory", "file")
FLAT, AT_ONCE = "DbrxExperts", "Llama4TextExperts"
FAMILIES = (
    "Mixtral, Qwen2-MoE, Qwen3-MoE, Qwen3-Next, Qwen3.5-MoE, OLMoE, Phi-3.5-MoE, GPT-OSS, DeepSeek-V2 and V3, GLM-4.5, Jamba, "
    "Hunyuan, Granite-MoE, MiniMax-M2, Llama-4, DBRX, ERNIE-4.5, LongCat-Flash"
)

Parts = dict[str, Any]


@dataclass(frozen=True)
class ExpertModule:
    """One layer's `experts` module.

    Attributes:
        name: its name in the model. module: it.
        parts: by parameter name, torch[expert, ...], a view of the parameter; ``parts[name][e]`` is expert e's.
    """

    name: str
    module: Any
    parts: Parts

    @property
    def at_once(self) -> bool:
        """Whether its forward computes all experts in one call and is not told the choice (Llama-4)."""
        return type(self.module).__name__ == AT_ONCE


def expert_modules(model: Any, recorder: RouterRecorder) -> list[ExpertModule]:
    """Return the expert modules of a model, by layer.

    Raises:
        InputError: experts that are not kept as one tensor [expert, ...] per weight, or layers that differ in size.
    """
    found = [ExpertModule(name, module, _parts(model, module, recorder.num_experts)) for name, module in recorder.modules]
    first = _sizes(found[0].parts)
    for layer in found:
        if _sizes(layer.parts) != first:
            raise InputError(f"module {layer.name!r}: its experts have other sizes than those of {found[0].name!r}; "
                             "one pool of slots cannot hold both")
    return found


def _sizes(parts: Parts) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(value.shape[1:]), value.dtype) for name, value in parts.items()}


def _parts(model: Any, module: Any, num_experts: int) -> Parts:
    flat = type(module).__name__ == FLAT
    parts: Parts = {}
    for name, value in module.named_parameters():
        if flat:  # one matrix [expert * width, hidden] per weight
            parts[name] = value.data.view(num_experts, -1, value.shape[-1])
        elif "." not in name and value.ndim >= 2 and value.shape[0] >= num_experts:
            parts[name] = value.data[:num_experts]  # LongCat-Flash has rows for its zero experts too
        else:
            raise _unsupported(model, module)
    if not parts:
        raise _unsupported(model, module)
    return parts


def _unsupported(model: Any, module: Any) -> InputError:
    family = getattr(model.config, "model_type", type(model).__name__)
    return InputError(f"an offloaded run of {family!r} is not supported: its {type(module).__name__} does not keep one tensor "
                      f"[expert, ...] per weight, as these families do: {FAMILIES}")


class SlowTier:
    """All experts of all layers, in host memory (pinned where a GPU loads from it) or in memory-mapped safetensors.

    `parts[layer][name]` is torch[expert, ...]; `origin` says where each came from.
    """

    def __init__(self, layers: Sequence[ExpertModule], device: str) -> None:
        self.origin = "pinned host memory" if device == "cuda" else "host memory"
        pinned = device == "cuda"
        self.parts = [{name: value.cpu().pin_memory() if pinned else value for name, value in layer.parts.items()}
                      for layer in layers]
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def to_files(self, layers: Sequence[ExpertModule], checkpoint: Path | None) -> None:
        """Go over to memory-mapped files: the checkpoint's own tensors where it has them as the model does, else a copy."""
        require("safetensors", "hf", "a slow tier in files")
        stored = _stored_tensors(checkpoint)
        self._folder = tempfile.TemporaryDirectory(prefix="moesim-experts-")
        spilled = 0
        for place, layer in enumerate(layers):
            own = {name: _mapped(stored, f"{layer.name}.{name}", value) for name, value in layer.parts.items()}
            missing = {name: layer.parts[name] for name, value in own.items() if value is None}
            spilled += len(missing)
            self.parts[place] = own | (_spill(missing, Path(self._folder.name) / f"{place}.safetensors") if missing else {})
        total = sum(len(parts) for parts in self.parts)
        self.origin = f"memory-mapped safetensors ({total - spilled} of {total} tensors are the checkpoint's own)"

    def of(self, layer: int, expert: int) -> Parts:
        """Return one expert's weights, by name, where they lie."""
        return {name: value[expert] for name, value in self.parts[layer].items()}

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(value[0].numel() * value.element_size() for value in self.parts[0].values())

    def close(self) -> None:
        """Delete the files that were written for this run."""
        self.parts = []
        if self._folder is not None:
            self._folder.cleanup()


def _stored_tensors(checkpoint: Path | None) -> dict[str, Path]:
    """Return tensor name -> file of a checkpoint folder's safetensors."""
    if checkpoint is None:
        return {}
    index, single = checkpoint / "model.safetensors.index.json", checkpoint / "model.safetensors"
    if index.is_file():
        try:
            names = json.loads(index.read_bytes())["weight_map"]
            return {str(name): checkpoint / os.path.basename(file) for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: expected a JSON object with a weight_map") from None
    if not single.is_file():
        return {}
    from safetensors import safe_open

    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _mapped(stored: dict[str, Path], name: str, value: Any) -> Any:
    """Return the checkpoint's tensor as torch[expert, ...] like `value`, mapped and not read; None if it has none such."""
    if name not in stored:
        return None
    from safetensors import safe_open

    with safe_open(stored[name], "pt") as file:
        found = file.get_tensor(name)
    if found.dtype != value.dtype or found.numel() < value.numel() or found.shape[-1] != value.shape[-1]:
        return None
    return found.view(-1, *value.shape[1:])[: len(value)]


def _spill(parts: Parts, path: Path) -> Parts:
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({name: value.cpu().contiguous().clone() for name, value in parts.items()}, path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in parts}


class SlotPool:
    """`num_slots` slots and `PASSING_SLOTS` more, each for one expert, in the computing device's memory.

    Every page is written before anything is timed.
    """

    def __init__(self, tier: SlowTier, num_slots: int, device: str) -> None:
        import torch

        self.num_slots = num_slots
        self._buffers = {name: torch.zeros((num_slots + PASSING_SLOTS, *value.shape[1:]), dtype=value.dtype, device=device)
                         for name, value in tier.parts[0].items()}

    def of(self, slot: int) -> Parts:
        """Return a slot's weights, by name."""
        return {name: buffer[slot] for name, buffer in self._buffers.items()}

    def fill(self, slot: int, parts: Parts) -> None:
        """Copy an expert into a slot."""
        for name, buffer in self._buffers.items():
            buffer[slot].copy_(parts[name])

    def holds(self, slot: int, parts: Parts) -> bool:
        """Whether a slot's bytes are exactly those of an expert (a check after a run)."""
        import torch

        return all(torch.equal(buffer[slot].cpu(), parts[name]) for name, buffer in self._buffers.items())

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())


class SlotWeights:
    """Stands where a module's parameter stood; ``[expert]`` is the expert's weight, from a slot or the slow tier."""

    def __init__(self, find: Callable[[int], Any]) -> None:
        self._find = find

    def __getitem__(self, expert: Any) -> Any:
        return self._find(int(expert))

    def view(self, _: Any) -> SlotWeights:
        """Return itself: DBRX splits its matrices into experts before it takes one."""
        return self


@contextmanager
def moved_out(layers: Sequence[ExpertModule], find: Callable[[int, str, int], Any]) -> Iterator[None]:
    """Replace the parameters of expert modules by ``find(layer, name, expert)``; they come back at the end."""
    taken: list[tuple[Any, str, Any]] = []
    try:
        for place, layer in enumerate(layers):
            for name in layer.parts:
                owner, _, leaf = ("." + name).rpartition(".")
                module = layer.module.get_submodule(owner[1:])
                taken.append((module, leaf, module._parameters.pop(leaf)))
                setattr(module, leaf, SlotWeights(_finder(find, place, name)))
        yield
    finally:
        for module, leaf, value in taken:
            module.__dict__.pop(leaf, None)
            module._parameters[leaf] = value


def _finder(find: Callable[[int, str, int], Any], layer: int, name: str) -> Callable[[int], Any]:
    return lambda expert: find(layer, name, expert)
