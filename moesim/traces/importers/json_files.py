"""JSON from strangers: lines or one document, every error with its file and line."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.base import INT32_MAX

_FIRST_LINE_BYTES = 1 << 26
_KEY_DEPTH = 4


def parse(text: str, where: str) -> Any:
    """Return a JSON value; raises InputError that names the place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {type(error).__name__}") from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) of every line that is not empty; raises InputError for what is not an object."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                entry = parse(line, where)
                if not isinstance(entry, dict):
                    raise InputError(f"{where}: expected a JSON object, found {type(entry).__name__}")
                yield where, entry


def documents(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, object) from one JSON object, a list of objects, or a line for each.

    Raises:
        InputError: something that is not an object.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        yield from json_lines(path)
        return
    listed = isinstance(whole, list)
    for number, entry in enumerate(whole if listed else [whole]):
        where = f"{path}[{number}]" if listed else str(path)
        if not isinstance(entry, dict):
            raise InputError(f"{where}: expected a JSON object, found {type(entry).__name__}")
        yield where, entry


def document(path: Path) -> dict[str, Any]:
    """Return the one JSON object of a file; raises InputError."""
    value = parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def first_keys(path: Path) -> frozenset[str]:
    """Return the dotted keys of the first JSON object of a file ("choices.routed_experts"); lists are looked through.

    Empty if the file does not start with JSON.
    """
    stat = path.stat()
    return _first_keys(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _first_keys(path: Path, size: int, changed_ns: int) -> frozenset[str]:
    with open(path, "rb") as file:
        line = file.readline(_FIRST_LINE_BYTES).strip()
        if line[:1] not in (b"{", b"["):
            return frozenset()
        for text in (line, line + b"\n" + file.read()):
            try:
                value = json.loads(text)
            except (ValueError, RecursionError):
                continue
            return frozenset(_keys(value, "", _KEY_DEPTH))
    return frozenset()


def _keys(value: Any, prefix: str, depth: int) -> Iterator[str]:
    while isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield prefix + str(key)
            yield from _keys(inner, f"{prefix}{key}.", depth - 1)


def whole(entry: dict[str, Any], key: str, where: str, minimum: int = 0) -> int:
    """Return a whole number of an object; raises InputError if it is missing, of another kind or out of range."""
    value = entry.get(key)
    if type(value) is not int or not minimum <= value <= INT32_MAX:
        raise InputError(f"{where}: {key} must be a whole number from {minimum}, found {short(value)}")
    return value


def whole_or_none(entry: Any, key: str) -> int | None:
    """Return a whole number of an object if it is there and not negative, else None."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if type(value) is int and 0 <= value <= INT32_MAX else None


def short(value: Any, width: int = 60) -> str:
    """Return a value as text of bounded length."""
    text = repr(value)
    return text if len(text) <= width else text[:width] + "..."


def count_array(value: Any, where: str) -> np.ndarray:
    """Return nested lists of whole numbers as an int64 array; raises InputError for anything else."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError):
        raise InputError(f"{where}: rows of different lengths") from None
    if array.dtype.kind not in "iu" or not array.size:
        raise InputError(f"{where}: expected lists of whole numbers, found {short(value)}")
    if array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{where}: a count of {array.max()} is too large")
    return array.astype(np.int64)
