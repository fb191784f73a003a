"""The map from slots to experts that an engine had loaded, for recordings of physical ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.base import INT16_MAX
from moesim.traces.importers.json_files import count_array, parse
from moesim.traces.importers.numpy_files import NPY_MAGIC, read_npy_file
from moesim.traces.importers.torch_files import load_torch, tensor_array

_KEYS = ("physical_to_logical_map", "last_physical_to_logical_map", "phy2log")


def read_physical_to_logical(path: str | os.PathLike[str]) -> np.ndarray:
    """Return int64[layer, slot] -> logical expert, from JSON (a list of lists, or SGLang's dict), .npy or .pt.

    Raises:
        InputError: no such file, another content, or ids out of range.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: {'is a folder, not a file' if file.is_dir() else 'no such file'}")
    with open(file, "rb") as opened:
        head = opened.read(8)
    if head.startswith(NPY_MAGIC):
        table = read_npy_file(file)
    elif head.startswith(b"PK\x03\x04"):
        table = tensor_array(_under_key(load_torch(file), str(path)), str(path), 2)
    else:
        content = parse(file.read_text(encoding="utf-8", errors="replace"), str(path))
        table = count_array(_under_key(content, str(path)), str(path))
    if table.ndim != 2 or not table.size or table.dtype.kind not in "iu":
        raise InputError(f"{path}: a physical-to-logical map must be whole numbers [layer, slot], found "
                         f"{table.dtype}{table.shape}")
    if table.min() < 0 or table.max() > INT16_MAX:
        raise InputError(f"{path}: a physical-to-logical map must hold experts 0 ... {INT16_MAX}, found "
                         f"{table.min()} ... {table.max()}")
    return table.astype(np.int64)


def _under_key(content: Any, where: str) -> Any:
    """Return the map itself from a dict that holds it; anything but a dict as it is."""
    if not isinstance(content, dict):
        return content
    name = next((key for key in _KEYS if key in content), None)
    if name is None:
        raise InputError(f"{where}: expected a map under one of {', '.join(_KEYS)}, found "
                         f"{', '.join(str(key)[:40] for key in list(content)[:6]) or 'nothing'}")
    return content[name]
