"""Arrivals: when requests came and how long they were; what a serving scenario is driven with."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moesim.errors import InputError
from moesim.traces.tables import read_header, read_table, write_table

SCHEMA = "moesim.arrivals/1"
SUFFIX = ".arrivals.parquet"
_COLUMNS = {"arrival_s": pa.float64(), "prompt_tokens": pa.int32(), "output_tokens": pa.int32()}


@dataclass(frozen=True)
class Arrivals:
    """Requests in order of arrival; read-only arrays.

    Attributes:
        arrival_s: float64[request], seconds from the first moment of the recording; finite, >= 0, never falling.
        prompt_tokens, output_tokens: int32[request], at least 1.
        source: where they came from.
        metadata: further facts (what was left out, the first moment).

    Raises:
        InputError: shapes that disagree, no request, times that fall or are not finite, tokens below 1.
    """

    arrival_s: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        times = np.array(self.arrival_s, dtype=np.float64)
        if times.ndim != 1 or not times.size:
            raise InputError(f"arrivals: arrival_s must be [request], not empty, got shape {times.shape}")
        if not np.isfinite(times).all() or times.min() < 0:
            raise InputError("arrivals: arrival_s must be finite and not negative")
        falls = np.flatnonzero(np.diff(times) < 0)
        if len(falls):
            raise InputError(f"arrivals: request {falls[0] + 1} arrives before request {falls[0]}; sort them by time")
        times.setflags(write=False)
        object.__setattr__(self, "arrival_s", times)
        for name in ("prompt_tokens", "output_tokens"):
            object.__setattr__(self, name, _lengths(getattr(self, name), name, len(times)))

    @property
    def num_requests(self) -> int:
        """Number of requests."""
        return len(self.arrival_s)

    def digest(self) -> str:
        """Return ``sha256:<hex>`` over times and lengths."""
        hasher = hashlib.sha256(f"arrivals {self.num_requests}".encode())
        for name in _COLUMNS:
            hasher.update(getattr(self, name).tobytes())
        return f"sha256:{hasher.hexdigest()}"

    def summary(self) -> dict[str, Any]:
        """Return the number of requests, their rate and their mean lengths."""
        duration = float(self.arrival_s[-1] - self.arrival_s[0])
        gaps = np.diff(self.arrival_s)
        return {
            "num_requests": self.num_requests, "duration_s": duration,
            "requests_per_s": (self.num_requests - 1) / duration if duration > 0 else None,
            "gap_coefficient_of_variation": float(gaps.std() / gaps.mean()) if duration > 0 else None,
            "mean_prompt_tokens": float(self.prompt_tokens.mean()), "max_prompt_tokens": int(self.prompt_tokens.max()),
            "mean_output_tokens": float(self.output_tokens.mean()), "max_output_tokens": int(self.output_tokens.max())}


def _lengths(value: Any, name: str, num_requests: int) -> np.ndarray:
    array = np.asarray(value)
    if array.shape != (num_requests,) or not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"arrivals: {name} must be {num_requests} whole numbers, got {array.dtype}{array.shape}")
    if array.min() < 1 or array.max() > np.iinfo(np.int32).max:
        row = int(np.flatnonzero((array < 1) | (array > np.iinfo(np.int32).max))[0])
        raise InputError(f"arrivals: {name} of request {row} is {array[row]}, expected 1 ... 2^31 - 1")
    array = np.array(array, dtype=np.int32)
    array.setflags(write=False)
    return array


def write_arrivals(arrivals: Arrivals, path: str | os.PathLike[str]) -> Path:
    """Write `arrivals` as one Parquet file (a row per request), whole or not at all.

    Raises:
        InputError: metadata that is not JSON.
    """
    table = pa.table({name: pa.array(getattr(arrivals, name), kind) for name, kind in _COLUMNS.items()})
    body = {"source": arrivals.source, "metadata": arrivals.metadata, "digest": arrivals.digest()}
    return write_table(path, table, SCHEMA, body)


def read_arrivals(path: str | os.PathLike[str]) -> Arrivals:
    """Read a ``*.arrivals.parquet`` file and verify its digest.

    Raises:
        InputError: no such file, damaged, another schema, or rows that differ from the header.
    """
    table, head = read_table(path, SCHEMA, _COLUMNS)
    if not isinstance(head.get("source"), str) or not isinstance(head.get("metadata"), dict):
        raise InputError(f"{path}: its header is damaged")
    times, prompt, output = (table.column(name).to_numpy() for name in _COLUMNS)
    try:
        arrivals = Arrivals(times, prompt, output, head["source"], head["metadata"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if arrivals.digest() != head.get("digest"):
        raise InputError(f"{path}: the rows do not match the header's digest: the file was changed")
    return arrivals


def arrivals_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return an arrivals file's header without its rows; raises InputError if it is another file."""
    head = read_header(path)
    if head["schema"] != SCHEMA:
        raise InputError(f"{path}: expected a {SCHEMA!r} file, found schema {head['schema']!r}")
    return head


def is_arrivals(path: str | os.PathLike[str]) -> bool:
    """Say whether a file is Arrivals, by its content."""
    try:
        return read_header(path)["schema"] == SCHEMA
    except InputError:
        return False
