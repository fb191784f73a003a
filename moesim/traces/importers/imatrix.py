"""llama.cpp's importance matrix (GGUF): how often each expert was selected, from ``<tensor>.counts``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.model.gguf import Gguf, GgufTensor, read_gguf
from moesim.traces.importers.arrays import whole_counts
from moesim.traces.importers.base import Importer, RawCounts

GGUF_MAGIC = b"GGUF"
_EXACT_F32 = 1 << 24
_EXPERT = re.compile(r"blk\.(\d{1,6})\.ffn_(gate_up|gate|up|down)_exps\.weight\.counts$")


def read_imatrix(path: Path) -> RawCounts:
    """Read an importance matrix in GGUF; the counts of a layer's expert tensors are its selections per expert.

    Raises:
        InputError: the old .dat form (it keeps no counts per expert), another GGUF file, no expert tensors, or tensors
            of one layer that disagree.
    """
    with open(path, "rb") as start:
        magic = start.read(4)
    if magic != GGUF_MAGIC:
        raise InputError(f"{path}: not GGUF; the old .dat form of an imatrix keeps no counts per expert, so record it "
                         f"again (llama-imatrix -o imatrix.gguf)")
    file = read_gguf(path)
    facts = file.metadata
    if facts.get("general.type") != "imatrix":
        raise InputError(f"{path}: a GGUF file of type {facts.get('general.type')!r}, expected 'imatrix'")
    found: dict[int, tuple[str, np.ndarray]] = {}
    for name, tensor in file.tensors.items():
        match = _EXPERT.match(name)
        if match is None:
            continue
        layer, values = int(match[1]), whole_counts(_counts(path, file, tensor), f"{path}: {name}")
        if layer in found and not np.array_equal(found[layer][1], values):
            raise InputError(f"{path}: {name} and {found[layer][0]} of one layer have different counts")
        found.setdefault(layer, (name, values))
    if not found:
        raise InputError(f"{path}: no counts of expert tensors (blk.N.ffn_*_exps.weight.counts): not a "
                         f"Mixture-of-Experts model?")
    layers = sorted(found)
    if len({found[layer][1].shape for layer in layers}) > 1:
        raise InputError(f"{path}: layers with different numbers of experts")
    counts = np.stack([found[layer][1] for layer in layers])[None]
    return RawCounts(counts, np.array(layers), "whole recording", notes=_token_notes(facts, counts), layers_named=True)


def _token_notes(facts: dict[str, Any], counts: np.ndarray) -> tuple[str, ...]:
    """Return what the number of tokens, and the width of a 32-bit float, say about the counts."""
    notes = []
    if counts.max() >= _EXACT_F32:
        notes.append(f"counts from {_EXACT_F32} on are rounded: the file holds them as 32-bit floats")
    chunks, size = facts.get("imatrix.chunk_count"), facts.get("imatrix.chunk_size")
    per_layer = counts.sum(axis=2)[0]
    if type(chunks) is not int or type(size) is not int or chunks * size < 1:
        return tuple(notes)
    if per_layer.min() == per_layer.max() and not per_layer[0] % (chunks * size):
        notes.append(f"{chunks * size} tokens, {per_layer[0] // (chunks * size)} experts each")
    else:
        notes.append(f"{chunks * size} tokens, but {per_layer.min()} ... {per_layer.max()} selections per layer: layers "
                     f"differ, or the file was merged")
    return tuple(notes)


def _counts(path: Path, file: Gguf, tensor: GgufTensor) -> np.ndarray:
    """float32[column]: the data of one tensor."""
    if tensor.type != "F32":
        raise InputError(f"{path}: tensor {tensor.name[:60]!r} is of type {tensor.type}, expected F32")
    return np.fromfile(path, "<f4", count=tensor.num_weights, offset=file.data_start + tensor.offset)


def _is_imatrix(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if head[:4] == GGUF_MAGIC:
        return b"imatrix" in head
    return b"ffn_" in head and b"_exps.weight" in head and b"blk." in head[:64] and b"\0" in head[:8]


IMATRIX = {"imatrix": Importer(_is_imatrix, read_imatrix, "llama.cpp importance matrix (GGUF): counts per expert")}
