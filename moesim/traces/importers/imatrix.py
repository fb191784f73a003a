"""llama.cpp's importance matrix (GGUF): how often each expert was selected, from ``<tensor>.counts``."""

from __future__ import annotations

import re
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.arrays import whole_counts
from moesim.traces.importers.base import Importer, RawCounts

GGUF_MAGIC = b"GGUF"
_F32 = 0
_EXACT_F32 = 1 << 24
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_DIMS = 4
_EXPERT = re.compile(r"blk\.(\d{1,6})\.ffn_(gate_up|gate|up|down)_exps\.weight\.counts$")


class _Reader:
    """Little-endian values from bytes, every read checked against the end."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.place = path, data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.place:
            raise InputError(f"{self.path}: byte {self.place}: {size} bytes announced, {len(self.data) - self.place} "
                             f"left: the file is cut short or damaged")
        self.place += size
        return self.data[self.place - size:self.place]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY or depth > 2:
            raise InputError(f"{self.path}: byte {self.place}: unknown kind of value {kind}")
        inner, length = self.number("<I"), self.number("<Q")
        if length > len(self.data) - self.place:  # every element takes a byte at least
            raise InputError(f"{self.path}: byte {self.place}: an array of {length} values is longer than the file")
        return [self.value(inner, depth + 1) for _ in range(length)]


def read_imatrix(path: Path) -> RawCounts:
    """Read an importance matrix in GGUF; the counts of a layer's expert tensors are its selections per expert.

    Raises:
        InputError: the old .dat form (it keeps no counts per expert), another GGUF file, no expert tensors, or tensors
            of one layer that disagree.
    """
    reader = _Reader(path, path.read_bytes())
    if reader.data[:4] != GGUF_MAGIC:
        raise InputError(f"{path}: not GGUF; the old .dat form of an imatrix keeps no counts per expert, so record it "
                         f"again (llama-imatrix -o imatrix.gguf)")
    facts, tensors = _contents(reader)
    if facts.get("general.type") != "imatrix":
        raise InputError(f"{path}: a GGUF file of type {facts.get('general.type')!r}, expected 'imatrix'")
    found: dict[int, tuple[str, np.ndarray]] = {}
    for name, counts in tensors.items():
        match = _EXPERT.match(name)
        if match is None:
            continue
        layer, values = int(match[1]), whole_counts(counts, f"{path}: {name}")
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


def _contents(reader: _Reader) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the metadata and the F32 tensors called ``*.counts``, [column] each."""
    reader.take(4)
    version = reader.number("<I")
    if version not in (2, 3):
        raise InputError(f"{reader.path}: GGUF version {version}; 2 and 3 are known")
    num_tensors, num_facts = reader.number("<Q"), reader.number("<Q")
    facts: dict[str, Any] = {}
    for _ in range(min(num_facts, len(reader.data))):
        key = reader.text()
        facts[key] = reader.value(reader.number("<I"))
    infos = [_tensor_info(reader) for _ in range(min(num_tensors, len(reader.data)))]
    alignment = facts.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise InputError(f"{reader.path}: general.alignment {alignment!r} is not one")
    if len({info[0] for info in infos}) < len(infos):
        raise InputError(f"{reader.path}: a tensor is there twice")
    start = -(-reader.place // alignment) * alignment
    return facts, {name: _counts(reader, name, shape, kind, start + offset)
                   for name, shape, kind, offset in infos if name.endswith(".counts")}


def _tensor_info(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    name, dims = reader.text(), reader.number("<I")
    if not 1 <= dims <= _MAX_DIMS:
        raise InputError(f"{reader.path}: tensor {name[:60]!r} has {dims} axes")
    shape = tuple(reader.number("<Q") for _ in range(dims))
    return name, shape, reader.number("<I"), reader.number("<Q")


def _counts(reader: _Reader, name: str, shape: tuple[int, ...], kind: int, begin: int) -> np.ndarray:
    size = prod(shape)
    if kind != _F32 or not size or begin + 4 * size > len(reader.data):
        raise InputError(f"{reader.path}: tensor {name[:60]!r} of type {kind} and shape {shape} does not lie within the "
                         f"file's {len(reader.data)} bytes as 32-bit floats")
    return np.frombuffer(reader.data, "<f4", count=size, offset=begin)


def _is_imatrix(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if head[:4] == GGUF_MAGIC:
        return b"imatrix" in head
    return b"ffn_" in head and b"_exps.weight" in head and b"blk." in head[:64] and b"\0" in head[:8]


IMATRIX = {"imatrix": Importer(_is_imatrix, read_imatrix, "llama.cpp importance matrix (GGUF): counts per expert")}
