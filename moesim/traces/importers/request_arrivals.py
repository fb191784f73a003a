"""Public request traces: Mooncake, Azure, BurstGPT, ServeGen, and results of vLLM's serving benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.arrivals import Arrivals
from moesim.traces.importers.base import INT32_MAX, Importer
from moesim.traces.importers.community import csv_header, csv_rows
from moesim.traces.importers.json_files import document, first_keys, json_lines, short
from moesim.units import NS_PER_S

_LENGTHS = ("input_length", "output_length")
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)?$")
_MAX_TIME = 2.0**52
_MS_PER_S = 1000
_FIRST_YEAR, _LAST_YEAR = 1970, 2261  # what 64-bit ns reach


@dataclass(frozen=True)
class _Table:
    """A CSV form: the columns it is known by, those that are read, and how its time is written."""

    columns: tuple[str, ...]
    time: str
    prompt: str
    output: str
    moment: Callable[[str, str], float]
    units_per_s: int = 1

    def matches(self, header: Sequence[str]) -> bool:
        """Say whether a header line has these columns."""
        return set(self.columns) <= set(header)


def _stamp_ns(text: str, where: str) -> int:
    """Return the ns since 1970 of a date and time as Azure writes it (up to 9 digits of a second; UTC if unsaid)."""
    found = _STAMP.match(text.strip())
    if found is None:
        raise InputError(f"{where}: expected a time as 2023-11-16 18:17:03.9799600, found {text[:60]!r}")
    try:
        moment = datetime.fromisoformat(found[1] + (found[3] or "").replace("Z", "+00:00"))
    except ValueError as error:
        raise InputError(f"{where}: {text[:60]!r} is not a date and time: {error}") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    if not _FIRST_YEAR <= moment.year <= _LAST_YEAR:
        raise InputError(f"{where}: expected a year from {_FIRST_YEAR} to {_LAST_YEAR}, found {text[:60]!r}")
    return round(moment.timestamp()) * NS_PER_S + int((found[2] or ".")[1:].ljust(9, "0"))


def _plain_seconds(text: str, where: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = np.nan
    return _checked_time(seconds, where)


def _checked_time(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not isfinite(value) or abs(value) > _MAX_TIME:
        raise InputError(f"{where}: expected a time in seconds, found {short(value)}")
    return float(value)


AZURE = _Table(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), "TIMESTAMP", "ContextTokens", "GeneratedTokens",
               _stamp_ns, NS_PER_S)
BURST_GPT = _Table(("Timestamp", "Model", "Request tokens", "Response tokens"), "Timestamp", "Request tokens",
                   "Response tokens", _plain_seconds)
SERVE_GEN = _Table(("request_id", "timestamp", "input_tokens", "output_tokens"), "timestamp", "input_tokens",
                   "output_tokens", _plain_seconds)


def read_mooncake(path: Path) -> Arrivals:
    """Read Mooncake's JSON lines: ``timestamp`` (ms), ``input_length``, ``output_length``; prefix hashes are left out."""
    times: list[float] = []
    lengths: list[list[int]] = []
    for where, entry in json_lines(path):
        times.append(_checked_time(entry.get("timestamp"), f"{where}: timestamp"))
        lengths.append([_length(entry.get(key), key, where) for key in _LENGTHS])
    return _arrivals(path, "mooncake", times, lengths, _MS_PER_S)


def read_azure(path: Path) -> Arrivals:
    """Read Azure's LLM inference traces of 2023 and 2024: TIMESTAMP, ContextTokens, GeneratedTokens."""
    return _read_table(path, "azure-llm", AZURE)


def read_burst_gpt(path: Path, only_model: str | None = None, log_type: str | None = None) -> Arrivals:
    """Read BurstGPT's CSV: Timestamp (s), Model, Request tokens, Response tokens, ..., Log Type.

    Args:
        only_model: keep only rows of this Model ("ChatGPT", "GPT-4").
        log_type: keep only rows of this Log Type ("Conversation log", "API log").
    """
    return _read_table(path, "burstgpt", BURST_GPT, {"Model": only_model, "Log Type": log_type})


def read_serve_gen(path: Path) -> Arrivals:
    """Read ServeGen's generated workload: request_id, timestamp (s), input_tokens, output_tokens."""
    return _read_table(path, "servegen", SERVE_GEN)


def read_vllm_bench(path: Path) -> Arrivals:
    """Read a result of ``vllm bench serve --save-result --save-detailed``: start_times, input_lens, output_lens.

    Failed requests (no output token) are left out.

    Raises:
        InputError: a result without start times (of an older vLLM), or lists of different lengths.
    """
    entry = document(path)
    columns: dict[str, Any] = {key: entry.get(key) for key in ("start_times", "input_lens", "output_lens")}
    for key, values in columns.items():
        if not isinstance(values, list):
            raise InputError(f"{path}: key {key!r} is missing: save the result with --save-detailed, by a vLLM that "
                             f"writes start_times")
    if len({len(values) for values in columns.values()}) > 1:
        raise InputError(f"{path}: start_times, input_lens and output_lens have different lengths")
    times = [_checked_time(value, f"{path}: start_times[{row}]") for row, value in enumerate(columns["start_times"])]
    lengths = [[_length(columns[key][row], key, f"{path}: request {row}") for key in ("input_lens", "output_lens")]
               for row in range(len(times))]
    return _arrivals(path, "vllm-bench", times, lengths)


def _read_table(path: Path, name: str, table: _Table, only: dict[str, str | None] | None = None) -> Arrivals:
    rows = csv_rows(path)
    where, head = next(rows, (str(path), []))
    head = [column.strip().lstrip("\ufeff") for column in head]
    if not table.matches(head):
        raise InputError(f"{where}: expected the columns {', '.join(table.columns)}")
    place = {column: head.index(column) for column in head}
    wanted = {column: value for column, value in (only or {}).items() if value is not None}
    for column in wanted:
        if column not in place:
            raise InputError(f"{where}: the file has no column {column!r}")
    times: list[float] = []
    lengths: list[list[int]] = []
    for where, row in rows:
        if len(row) != len(head):
            raise InputError(f"{where}: expected {len(head)} fields, found {len(row)}")
        if any(row[place[column]] != value for column, value in wanted.items()):
            continue
        times.append(table.moment(row[place[table.time]], f"{where}: {table.time}"))
        lengths.append([_length(_number(row[place[column]]), column, where) for column in (table.prompt, table.output)])
    return _arrivals(path, name, times, lengths, table.units_per_s)


def _number(text: str) -> int | str:
    """Return a field as a whole number (15 or 15.0), or as it is."""
    digits = text.strip().removesuffix(".0")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 18 else text


def _length(value: Any, name: str, where: str) -> int:
    if type(value) is not int or not 0 <= value <= INT32_MAX:
        raise InputError(f"{where}: {name} must be a whole number of tokens from 0, found {short(value)}")
    return value


def _arrivals(path: Path, name: str, times: Sequence[float], lengths: list[list[int]],
              units_per_s: int = 1) -> Arrivals:
    """Return the requests in order of time from their first one on, without those that have no prompt or no output."""
    if not times:
        raise InputError(f"{path}: no requests")
    moment, tokens = np.array(times), np.array(lengths, dtype=np.int64)
    notes = []
    empty = (tokens < 1).any(axis=1)
    if empty.all():
        raise InputError(f"{path}: no request has both prompt and output tokens")
    if empty.any():
        notes.append(f"left out {int(empty.sum())} requests without prompt or without output (failed or cancelled)")
    moment, tokens = moment[~empty], tokens[~empty]
    if (np.diff(moment) < 0).any():
        notes.append("sorted by time: the file is not in order of arrival")
    order = np.argsort(moment, kind="stable")
    moment, tokens = moment[order], tokens[order]
    return Arrivals((moment - moment[0]) / units_per_s, tokens[:, 0], tokens[:, 1], f"imported from {path.name} ({name})",
                    {"first_arrival_s": float(moment[0] / units_per_s), "notes": notes})


def _has_columns(table: _Table) -> Callable[[Path], bool]:
    return lambda path: table.matches(csv_header(path))


def _is_mooncake(path: Path) -> bool:
    return {"timestamp", *_LENGTHS} <= first_keys(path)


def _is_vllm_bench(path: Path) -> bool:
    return {"input_lens", "output_lens"} <= first_keys(path)


ARRIVALS = {
    "mooncake": Importer(_is_mooncake, read_mooncake, "request arrivals: Mooncake's JSON lines"),
    "azure-llm": Importer(_has_columns(AZURE), read_azure, "request arrivals: Azure LLM inference traces (CSV)"),
    "burstgpt": Importer(_has_columns(BURST_GPT), read_burst_gpt, "request arrivals: BurstGPT (CSV)"),
    "servegen": Importer(_has_columns(SERVE_GEN), read_serve_gen, "request arrivals: ServeGen's generated CSV"),
    "vllm-bench": Importer(_is_vllm_bench, read_vllm_bench, "request arrivals: a detailed result of vllm bench serve"),
}
