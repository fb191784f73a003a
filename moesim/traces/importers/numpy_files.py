"""Numpy files from strangers: sizes are checked against the file before anything is allocated, nothing is unpickled."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from moesim.errors import InputError, did_you_mean

NPY_MAGIC = b"\x93NUMPY"
MAX_EXPANSION = 200  # routing of one value in 8 bytes shrinks by 20 or so; a bomb by 1000
ALWAYS_ALLOWED_BYTES = 64 << 20
_ZIP_ERRORS = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError,
               KeyError)
_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def npy_header(data: bytes) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """Return (dtype, Fortran order, shape, offset of the values) of a .npy file that starts with `data`.

    Raises:
        ValueError: not such a header, or one of Python objects or records.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # a hostile header meets numpy's parser: syntax, tokens, recursion, ...
        raise ValueError(f"bad header: {(str(error).splitlines() or ['?'])[0]}") from None
    if dtype.kind not in "iufb":
        raise ValueError(f"holds {'Python objects' if dtype.hasobject else dtype}, expected numbers")
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"shape {shape} is not one")
    return dtype, fortran, shape, stream.tell()


def npy_array(data: bytes) -> np.ndarray:
    """Return the array in the bytes of a .npy file, in native byte order.

    Raises:
        ValueError: a bad header, or values that do not fill exactly what it announces.
    """
    dtype, fortran, shape, offset = npy_header(data)
    announced = prod(shape) * dtype.itemsize
    if announced != len(data) - offset:
        raise ValueError(f"announces {announced} bytes of values, holds {len(data) - offset}")
    array = np.frombuffer(data, dtype, offset=offset).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def read_npy_file(path: Path) -> np.ndarray:
    """Return the array of a .npy file; raises InputError."""
    try:
        return npy_array(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as a single numpy array (.npy): {error}") from None


def peek_npy(path: Path) -> tuple[np.dtype, tuple[int, ...]] | None:
    """Return dtype and shape of a .npy file, or None if it is not one (no values are read)."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    if not head.startswith(NPY_MAGIC):
        return None
    try:
        dtype, _, shape, _ = npy_header(head)
    except ValueError:
        return None
    return dtype, shape


def zip_names(path: Path) -> list[str]:
    """Return the names in a zip archive, or none if it is not one."""
    try:
        if not zipfile.is_zipfile(path):
            return []
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except _ZIP_ERRORS:
        return []


class Npz:
    """A numpy archive whose arrays are read one at a time, each checked before it is expanded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        names = zip_names(path)
        if not names or not all(name.endswith(".npy") for name in names):
            raise InputError(f"{path}: expected a numpy archive (.npz)")
        self.names = [name.removesuffix(".npy") for name in names]
        self.file_bytes = path.stat().st_size

    def find(self, key: str | None, known: Sequence[str]) -> np.ndarray | None:
        """Return the array called `key`, else the first of `known` in the archive, else None; raises InputError."""
        if key is not None and key not in self.names:
            raise InputError(f"{self.path}: no array {key!r}.{did_you_mean(key, self.names)}")
        name = key or next((candidate for candidate in known if candidate in self.names), None)
        return None if name is None else self.array(name)

    def array(self, name: str) -> np.ndarray:
        """Return one array; raises InputError."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                info = archive.getinfo(f"{name}.npy")
                if info.compress_type not in _PLAIN:
                    raise ValueError("compressed in a way that numpy does not write")
                if info.file_size > max(ALWAYS_ALLOWED_BYTES, MAX_EXPANSION * self.file_bytes):
                    raise ValueError(f"announces {info.file_size} bytes in a file of {self.file_bytes}")
                with archive.open(info) as stream:
                    data = stream.read(info.file_size + 1)
            return npy_array(data)
        except _ZIP_ERRORS as error:
            raise InputError(f"{self.path}: array {name!r} cannot be read: {error}") from None
