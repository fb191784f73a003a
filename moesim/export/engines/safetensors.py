"""A writer of the safetensors format (a length, a JSON header, tensors back to back), which needs no package."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

DTYPES = {"int32": "I32", "int64": "I64", "float32": "F32"}
ALIGNMENT = 8


def safetensors_bytes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a file of int32, int64 and float32 tensors; the same arrays give the same bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, end = [], 0
    for name, array in tensors.items():
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape),
                        "data_offsets": [end, end + little.nbytes]}
        parts.append(little.tobytes())
        end += little.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)
