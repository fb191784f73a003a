"""torch.save files from strangers: only plain containers and tensors, sizes checked before anything is loaded."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError, require

_MAX_PICKLE_BYTES = 1 << 26
_ZIP_ERRORS = (OSError, zipfile.BadZipFile, ValueError, KeyError, NotImplementedError, RuntimeError, EOFError)


def load_torch(path: Path) -> Any:
    """Return what a torch.save file holds, loaded with ``weights_only=True`` (tensors and plain containers, no code).

    Raises:
        MissingDependencyError: torch is not installed.
        InputError: not such a file, damaged, or holding anything else.
    """
    require("torch", "torch", f"{path}: reading a file of torch.save")
    _check_archive(path)
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler met in a damaged file
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: cannot be loaded as plain tensors (weights_only): {text[:200]}") from None


def _check_archive(path: Path) -> None:
    """Refuse what torch does not write: the old format, compressed entries, sizes beyond the file's."""
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path}: not a zip archive as torch.save writes it (files of before torch 1.6 are "
                             f"refused: they are bare pickles)")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except _ZIP_ERRORS as error:
        raise InputError(f"{path}: damaged zip archive: {error}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise InputError(f"{path}: a compressed archive, which torch.save does not write")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path}: its entries announce more bytes than the file has")


def pickle_text(path: Path) -> bytes:
    """Return the bytes of a torch file's ``data.pkl`` to look for names in (nothing is unpickled); empty if none."""
    try:
        if not zipfile.is_zipfile(path):
            return b""
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("/data.pkl") and entry.file_size <= _MAX_PICKLE_BYTES:
                    with archive.open(entry) as file:
                        return file.read(_MAX_PICKLE_BYTES)
    except _ZIP_ERRORS:
        return b""
    return b""


def tensor_array(value: Any, where: str, ndim: int) -> np.ndarray:
    """Return a tensor of whole numbers as int64 of `ndim` axes.

    Raises:
        InputError: not a tensor, of another number of axes or kind, or one whose strides repeat its storage.
    """
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        raise InputError(f"{where}: expected a tensor, found {type(value).__name__}")
    if value.dim() != ndim or not value.numel():
        raise InputError(f"{where}: expected {ndim} axes, not empty, found shape {tuple(value.shape)}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise InputError(f"{where}: expected whole numbers, found {value.dtype}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise InputError(f"{where}: shape {tuple(value.shape)} is larger than the values that the file holds")
    return value.detach().to(torch.int64).contiguous().numpy()
