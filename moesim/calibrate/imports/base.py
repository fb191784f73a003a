"""What a reader of foreign measurements hands over, and how a reader is registered."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.artifacts import read_bytes
from moesim.calibrate.medians import table_of_runs
from moesim.errors import InputError
from moesim.hardware.profile import MeasuredTable, TableKey
from moesim.model.spec import ModelSpec
from moesim.units import GIB, NS_PER_S, NS_PER_US

Size = tuple[float, ...]
MAX_TEXT_BYTES = 4 * GIB
_GZIP = b"\x1f\x8b"
_TEXT_LENGTH = 200


@dataclass
class Findings:
    """What a reader found: seconds by table and size, and what it could not use.

    Attributes:
        samples: seconds of every run, by table and size.
        left_out: how many rows (events, tests) were not used, by reason.
        facts: what the source says of its machine and versions, for the profile's fingerprint.
        notes: how numbers were read, for people.
        spreads: interquartile range over median by table and size, where the source gives it instead of its runs.
    """

    name: str
    samples: dict[TableKey, dict[Size, list[float]]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    date: str = ""

    def add(self, key: TableKey, size: Iterable[float], seconds: float, where: str) -> None:
        """Note one run; raises InputError for a time or size that cannot be."""
        if not (math.isfinite(seconds) and seconds > 0):
            raise InputError(f"{where}: a time must be positive and finite, got {seconds!r} s")
        point = tuple(float(value) for value in size)
        if not all(0 <= value < math.inf for value in point):
            raise InputError(f"{where}: sizes must be finite and not negative, got {point}")
        self.samples.setdefault(key, {}).setdefault(point, []).append(seconds)

    def tables(self) -> list[MeasuredTable]:
        """Return one table per key, in order: medians, interquartile range over median, runs."""
        return [table_of_runs(key, self.samples[key]) for key in sorted(self.samples)]


@dataclass(frozen=True)
class Importer:
    """A source: `read(names, ...)` takes what ``--from`` names; its keywords are the options."""

    read: Callable[..., Findings]
    description: str


def seconds_from_us(microseconds: float) -> float:
    """Return microseconds as seconds."""
    return microseconds * NS_PER_US / NS_PER_S


def seconds_from_ms(milliseconds: float) -> float:
    """Return milliseconds as seconds."""
    return seconds_from_us(1000 * milliseconds)


def work_dtype(model: ModelSpec) -> str:
    """Return the dtype by which the simulator looks kernels of this model up: that of its activations."""
    return {1.0: "fp8", 2.0: "bf16", 4.0: "fp32"}.get(model.activation_bytes, "bf16")


def read_text(path: Path) -> str:
    """Return a file's text, unpacked if it is gzip.

    Raises:
        InputError: no such file, a pickle, damaged gzip, or more than 4 GiB of text.
    """
    data = read_bytes(path)
    if data.startswith(_GZIP):
        try:
            with gzip.open(path) as file:
                data = file.read(MAX_TEXT_BYTES + 1)
        except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
            raise InputError(f"{path}: damaged gzip: {error}") from None
    if len(data) > MAX_TEXT_BYTES:
        raise InputError(f"{path}: more than {MAX_TEXT_BYTES // GIB} GiB of text; record a shorter run")
    return data.decode("utf-8", errors="replace")


def parse_json(text: str, where: str) -> Any:
    """Return a JSON document; raises InputError that names the place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {type(error).__name__}") from None


def number(entry: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """Return a finite number of a mapping; raises InputError for one that is not there (without a default) or not one."""
    value = entry.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        found = "is missing" if value is None else f"must be a number, got {brief(value)}"
        raise InputError(f"{where}: {key!r} {found}")
    try:
        plain = float(value)
    except OverflowError:
        plain = math.inf
    if not math.isfinite(plain):
        raise InputError(f"{where}: {key!r} must be finite, got {brief(value)}")
    return plain


def brief(value: object) -> str:
    """Return a value as text of a bounded length, on one line."""
    text = repr(value)
    return text if len(text) <= _TEXT_LENGTH else text[:_TEXT_LENGTH] + "..."


def slug(text: object) -> str:
    """Return text as one word of a shape's name: spaces and separators become ``-``."""
    return "-".join(str(text).replace("|", " ").split())[:_TEXT_LENGTH] or "unknown"
