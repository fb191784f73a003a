"""Safetensors files from strangers: an 8-byte length, a JSON table of tensors, their bytes; offsets are checked first."""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.json_files import parse, short

_MAX_HEADER_BYTES = 100 << 20
DTYPES = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
          "F32": "<f4", "F64": "<f8"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file, read-only; tensors of other dtypes than whole numbers and F32, F64 are refused.

    Raises:
        InputError: no such file, a header that is not one, or offsets beyond the file.
    """
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, len(data) - 8):
        raise InputError(f"{path}: not a safetensors file, or cut short (its header would be {length} bytes)")
    header = parse(data[8:8 + length].decode("utf-8", errors="replace"), f"{path}: header")
    if not isinstance(header, dict):
        raise InputError(f"{path}: header: expected a JSON object")
    body = memoryview(data)[8 + length:]
    return {name: _tensor(f"{path}: tensor {short(name)}", entry, body) for name, entry in header.items()
            if name != "__metadata__"}


def _tensor(where: str, entry: Any, body: memoryview) -> np.ndarray:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        raise InputError(f"{where}: expected dtype {', '.join(DTYPES)}, found {short(entry)}")
    shape, ends = entry.get("shape"), entry.get("data_offsets")
    if not _wholes(shape) or not _wholes(ends) or len(ends) != 2:
        raise InputError(f"{where}: shape and data_offsets must be lists of whole numbers")
    dtype = np.dtype(DTYPES[entry["dtype"]])
    begin, end = ends
    if not begin <= end <= len(body) or end - begin != prod(shape) * dtype.itemsize:
        raise InputError(f"{where}: {entry['dtype']}{shape} does not lie at bytes {begin} ... {end} of {len(body)}")
    return np.frombuffer(body[begin:end], dtype).reshape(shape)


def _wholes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 32 and all(type(item) is int and item >= 0 for item in value)
