"""What a reader of a foreign format hands over, before any checking, and how a reader is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesim.traces.arrivals import Arrivals

INT32_MAX = int(np.iinfo(np.int32).max)
INT16_MAX = int(np.iinfo(np.int16).max)


@dataclass(frozen=True)
class RawRouting:
    """Routing of tokens as a file holds it.

    Attributes:
        expert_ids: int[token, layer, k]; -1 pads.
        request_id, position: int[token].
        layer_ids: int[layer].
        gate_weights: float[token, layer, k] or None.
        model: the model's name, if the file has one.
        notes: what the reader assumed.
        phase, step, token_id: int[token], where the file says them.
        num_experts: experts per layer, where the file says it.
        layers_named: True where `layer_ids` are the model's own indices; else they only count the file's layers.
        physical: True where the ids are slots (physical experts), not logical experts.
        physical_to_logical: int[layer, slot] of the same layers, where the file has it.
    """

    expert_ids: np.ndarray
    request_id: np.ndarray
    position: np.ndarray
    layer_ids: np.ndarray
    gate_weights: np.ndarray | None = None
    model: str = ""
    notes: tuple[str, ...] = ()
    phase: np.ndarray | None = None
    step: np.ndarray | None = None
    token_id: np.ndarray | None = None
    num_experts: int | None = None
    layers_named: bool = False
    physical: bool = False
    physical_to_logical: np.ndarray | None = None


@dataclass(frozen=True)
class RawCounts:
    """Expert counts as a file holds them.

    Attributes:
        counts: int[window, layer, expert] (or slot, where `physical`).
        layer_ids, layers_named, physical, physical_to_logical, model, notes: as in RawRouting.
        window, kind: as in CountTrace.
    """

    counts: np.ndarray
    layer_ids: np.ndarray
    window: str
    kind: str = "selections"
    model: str = ""
    notes: tuple[str, ...] = ()
    layers_named: bool = False
    physical: bool = False
    physical_to_logical: np.ndarray | None = None


Found = RawRouting | RawCounts | Arrivals


@dataclass(frozen=True)
class Importer:
    """A format: `detect` looks at the content, `read` returns it; the keywords of `read` are the options.

    `folders` says whether a folder of files can be given; `detect` is then asked about folders too.
    """

    detect: Callable[[Path], bool]
    read: Callable[..., Found]
    description: str
    folders: bool = False


def never(path: Path) -> bool:
    """Detect nothing: a format whose content another one shares, to be asked for by its name."""
    return False
