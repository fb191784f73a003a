"""Which experts stay on the GPU of an offloading engine: a list file, or the most used ones of a trace."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from moesim.artifacts import read_bytes
from moesim.errors import CheckError, InputError
from moesim.model.spec import ModelSpec
from moesim.traces.stats import load_counts
from moesim.traces.trace import RoutingTrace

HEADER = "layer,expert"


@dataclass(frozen=True)
class Residency:
    """The routed experts that stay on the GPU; all others stay in main memory.

    Attributes:
        on_gpu: bool[layer, expert], MoE layers from 0.
        source: where the choice comes from.

    Raises:
        CheckError: not a table of layers and experts.
    """

    on_gpu: np.ndarray
    source: str = ""

    def __post_init__(self) -> None:
        mask = np.array(self.on_gpu, dtype=bool)
        if mask.ndim != 2 or mask.size == 0:
            raise CheckError(f"residency: on_gpu must be [layer, expert], got shape {mask.shape}")
        mask.setflags(write=False)
        object.__setattr__(self, "on_gpu", mask)

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return self.on_gpu.shape[0]

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return self.on_gpu.shape[1]

    @property
    def num_on_gpu(self) -> int:
        """Experts on the GPU, over all layers."""
        return int(self.on_gpu.sum())

    def whole_layers(self) -> list[bool]:
        """Return for each MoE layer whether all of its experts are on the GPU."""
        return [bool(row.all()) for row in self.on_gpu]

    def gpu_bytes(self, model: ModelSpec) -> int:
        """Return the bytes of the routed experts on the GPU."""
        return self.num_on_gpu * model.expert_bytes


def most_used(trace: RoutingTrace, *, per_layer: int | None = None, total: int | None = None) -> Residency:
    """Return the experts of a trace that were used most; equal counts go by expert, then by layer.

    Args:
        trace: counts are over all of its tokens.
        per_layer: as many of every layer.
        total: or as many of all layers together.

    Raises:
        InputError: neither or both given, or a negative number.
    """
    if (per_layer is None) == (total is None):
        raise InputError("say how many experts stay on the GPU: a number per layer, or bytes")
    load = load_counts(trace)
    mask = np.zeros(load.shape, bool)
    if per_layer is not None:
        if not 0 <= per_layer <= trace.num_experts:
            raise InputError(f"experts on the GPU per layer must be 0 ... {trace.num_experts}, got {per_layer}")
        np.put_along_axis(mask, np.argsort(-load, axis=1, kind="stable")[:, :per_layer], True, axis=1)
    else:
        mask.ravel()[np.argsort(-load.ravel(), kind="stable")[:max(0, total or 0)]] = True
    return Residency(mask, f"most used in a trace of {trace.model or 'an unnamed model'}")


def last_layers(model: ModelSpec, num_layers: int) -> Residency:
    """Return the experts of the last `num_layers` MoE layers (llama.cpp's ``--n-cpu-moe`` keeps the first ones off).

    Raises:
        InputError: more layers than there are, or a negative number.
    """
    if not 0 <= num_layers <= model.num_moe_layers:
        raise InputError(f"layers on the GPU must be 0 ... {model.num_moe_layers}, got {num_layers}")
    mask = np.zeros((model.num_moe_layers, model.num_experts), bool)
    mask[model.num_moe_layers - num_layers:] = True
    return Residency(mask, f"the last {num_layers} MoE layers")


def read_residency(path: str | os.PathLike[str], model: ModelSpec) -> Residency:
    """Read a list of experts: a CSV with the header ``layer,expert``, MoE layers from 0, one expert per line.

    Raises:
        InputError: no such file, another header, a line that is not two whole numbers in range, an expert twice.
    """
    lines = read_bytes(path).decode("utf-8", errors="replace").removeprefix("\ufeff").splitlines()
    if not lines or lines[0].replace(" ", "").lower() != HEADER:
        raise InputError(f"{path}:1: expected the header {HEADER!r}, found {(lines or [''])[0][:40]!r}")
    mask = np.zeros((model.num_moe_layers, model.num_experts), bool)
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            _mark(mask, line, f"{path}:{number}")
    return Residency(mask, os.path.basename(path))


def _mark(mask: np.ndarray, line: str, where: str) -> None:
    try:
        layer, expert = map(int, line.split(","))
    except ValueError:
        raise InputError(f"{where}: expected two whole numbers 'layer,expert', found {line[:40]!r}") from None
    if not (0 <= layer < mask.shape[0] and 0 <= expert < mask.shape[1]):
        raise InputError(f"{where}: layer {layer}, expert {expert} is outside {mask.shape[0]} MoE layers of "
                         f"{mask.shape[1]} experts (both count from 0)")
    if mask[layer, expert]:
        raise InputError(f"{where}: layer {layer}, expert {expert} came before")
    mask[layer, expert] = True
