"""The header of a GGUF file: metadata and the table of tensors with their exact bytes; no weight is read.

GGUF versions 2 and 3, little-endian, as in llama.cpp's ``gguf.h`` and ``docs/gguf.md`` of ggml. A file from a
stranger may claim anything: every length and offset is held against the size of the file before it is used.
"""

from __future__ import annotations

import os
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from moesim.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
_ALIGNMENT = 32
_KEPT_NUMBERS, _KEPT_TEXTS = 65_536, 64  # of longer arrays (vocabularies) only the length is kept
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")

# id: name, weights per block, bytes per block (enum ggml_type and its blocks in ggml-common.h)
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18)}

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table.

    Attributes:
        shape: sizes as the file has them, the contiguous one first (a matrix is [inputs, outputs]).
        type: name of the storage type, as Q4_K. num_bytes: exact bytes of its data.
        offset: bytes from the start of the data.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    num_bytes: int
    offset: int

    @property
    def num_weights(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class GgufArray:
    """An array of metadata that was not kept: how many elements it has."""

    length: int


@dataclass(frozen=True)
class Gguf:
    """What the header of a GGUF file says (of all its parts, where it is split).

    Attributes:
        metadata: numbers, texts, flags, tuples of them, or GgufArray.
        tensors: by name, in the order of the file.
        data_start: byte at which the data begins, from which offsets count (of a split model: in its first part).
    """

    path: str
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor] = field(repr=False)
    data_start: int = 0

    def error(self, text: str) -> InputError:
        """Return an error that names the file."""
        return InputError(f"{self.path}: {text}")


def read_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Read the header of a GGUF file; of a split model, give any part: the others must lie beside it.

    Raises:
        InputError: no such file, not GGUF, an unknown version or tensor type, a header that is cut short or
            claims more than the file holds, or a part that is missing.
    """
    first = _read_part(Path(path))
    count = first.metadata.get("split.count", 1)
    if count == 1 or not isinstance(count, int):
        return first
    name = _SPLIT.search(os.fspath(path))
    if name is None or int(name[2]) != count:
        raise first.error(f"it is one of {count} parts, but its name does not end in -NNNNN-of-{count:05d}.gguf")
    stem = os.fspath(path)[: name.start()]
    parts = [_read_part(Path(f"{stem}-{part:05d}-of-{count:05d}.gguf")) for part in range(1, count + 1)]
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for tensor in part.tensors.values():
            if tensor.name in tensors:
                raise part.error(f"tensor {tensor.name!r} is in two parts")
            tensors[tensor.name] = tensor
    return Gguf(os.fspath(path), first.version, parts[0].metadata, tensors, parts[0].data_start)


def _read_part(path: Path) -> Gguf:
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}")
    with path.open("rb") as file:
        reader = _HeaderReader(path, file)
        version, num_tensors, num_keys = reader.head()
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = reader.text()
            if key in metadata:
                raise reader.error(f"key {key!r} is there twice")
            metadata[key] = reader.value(key)
        tensors = [reader.tensor() for _ in range(num_tensors)]
        start = _check_places(reader, tensors, metadata.get("general.alignment", _ALIGNMENT))
        return Gguf(str(path), version, metadata, {tensor.name: tensor for tensor in tensors}, start)


class _HeaderReader:
    """Reads a header front to back; every read is held against the size of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.position = 0

    def error(self, text: str) -> InputError:
        return InputError(f"{self.path}: byte {self.position}: {text}")

    def need(self, count: int, what: str) -> None:
        """Raise unless `count` more bytes are there."""
        if count > self.size - self.position:
            raise self.error(f"the file ends within {what} ({count} bytes expected, {self.size - self.position} left)")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        data = self.file.read(count)
        self.position += count
        return data

    def numbers(self, codes: str, what: str) -> tuple[Any, ...]:
        form = struct.Struct("<" + codes)
        return form.unpack(self.take(form.size, what))

    def head(self) -> tuple[int, int, int]:
        """Return (version, tensors, keys)."""
        if self.take(min(4, self.size), "the magic") != MAGIC:
            self.position = 0
            raise self.error("not a GGUF file")
        (version,) = self.numbers("I", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            hint = "; it is big-endian" if swapped else ""
            raise self.error(f"GGUF version {version}, expected 2 or 3{hint}")
        tensors, keys = self.numbers("QQ", "the counts")
        self.need(tensors * 32 + keys * 13, f"a table of {tensors} tensors and {keys} keys")
        return version, tensors, keys

    def text(self, what: str = "a text") -> str:
        (length,) = self.numbers("Q", what)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None

    def value(self, key: str) -> Any:
        (kind,) = self.numbers("I", f"the type of {key!r}")
        if kind == _TEXT:
            return self.text(f"the text of {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        return self.numbers(self._code(kind, key), f"the value of {key!r}")[0]

    def _code(self, kind: int, key: str) -> str:
        if kind not in _NUMBERS:
            raise self.error(f"key {key!r} has the unknown type {kind}")
        return _NUMBERS[kind]

    def _array(self, key: str) -> Any:
        kind, length = self.numbers("IQ", f"the array {key!r}")
        what = f"the array {key!r} of {length} elements"
        if kind == _TEXT:
            self.need(8 * length, what)
            texts = [self._skipped_text(what) if length > _KEPT_TEXTS else self.text(what) for _ in range(length)]
            return tuple(texts) if length <= _KEPT_TEXTS else GgufArray(length)
        code = self._code(kind, key)
        total = struct.calcsize(code) * length
        self.need(total, what)
        if length <= _KEPT_NUMBERS:
            return self.numbers(f"{length}{code}", what)
        self._skip(total)
        return GgufArray(length)

    def _skipped_text(self, what: str) -> str:
        (length,) = self.numbers("Q", what)
        self.need(length, what)
        self._skip(length)
        return ""

    def _skip(self, count: int) -> None:
        self.file.seek(count, os.SEEK_CUR)
        self.position += count

    def tensor(self) -> GgufTensor:
        """Read one row of the tensor table."""
        name = self.text("the name of a tensor")
        (dims,) = self.numbers("I", f"tensor {name!r}")
        if not 1 <= dims <= MAX_DIMS:
            raise self.error(f"tensor {name!r} has {dims} dimensions, expected 1 ... {MAX_DIMS}")
        *shape, kind, offset = self.numbers(f"{dims}QIQ", f"tensor {name!r}")
        if kind not in TENSOR_TYPES:
            raise self.error(f"tensor {name!r} has the unknown type {kind}")
        label, block, block_bytes = TENSOR_TYPES[kind]
        if min(shape) < 1 or shape[0] % block:
            raise self.error(f"tensor {name!r} of shape {tuple(shape)} has no rows of {label} blocks of {block}")
        return GgufTensor(name, tuple(shape), label, prod(shape) // block * block_bytes, offset)


def _check_places(reader: _HeaderReader, tensors: list[GgufTensor], alignment: object) -> int:
    """Check that the tensors lie one after another within the file, each under its own name; return where data begins."""
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise reader.error(f"general.alignment must be a multiple of 8, got {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    end, names = 0, set()
    for tensor in sorted(tensors, key=lambda one: one.offset):
        if tensor.name in names:
            raise reader.error(f"tensor {tensor.name!r} is there twice")
        names.add(tensor.name)
        if tensor.offset % alignment or tensor.offset < end:
            raise reader.error(f"tensor {tensor.name!r} at offset {tensor.offset} is not aligned to {alignment} bytes "
                               f"or overlaps the tensor before it")
        end = tensor.offset + tensor.num_bytes
        if start + end > reader.size:
            raise reader.error(f"tensor {tensor.name!r} ends at byte {start + end}, but the file has {reader.size}")
    return start
