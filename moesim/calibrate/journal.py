"""What a calibration has measured so far, in a file that a killed run leaves behind and the next one takes up.

JSON lines: the header (whose run it is), then ``{"table": [...], "size": [...], "seconds": s}`` per run and
``{"spent_s": s}`` now and then. Lines are only ever appended; a last line that was cut off is dropped.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from moesim.artifacts import read_bytes
from moesim.calibrate.bench import Size
from moesim.errors import InputError
from moesim.hardware.profile import TableKey

SCHEMA = "moesim.calibration-partial/1"
FLUSH_S = 1.0
Runs = dict[TableKey, dict[Size, list[float]]]


class Journal:
    """Runs by table and size, in memory and (with a path) on disk. Use it as a context manager.

    Args:
        path: the file; None keeps nothing. If it exists, its runs are taken up.
        header: whose run it is: machine, model, options; plain JSON values.

    Raises:
        InputError: the file is of another run (the first key that differs is named), or is not such a file.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self.runs: Runs = {}
        self.spent_s = 0.0
        self.resumed = False
        self._file: IO[str] | None = None
        self._flushed = time.monotonic()
        if path is None:
            return
        header = json.loads(json.dumps({"schema": SCHEMA, **header}))
        if path.exists():
            self._take_up(path, header)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        if not self.resumed:
            self._file.write(f"{json.dumps(header)}\n")
            self._file.flush()

    def _take_up(self, path: Path, header: dict[str, Any]) -> None:
        data = read_bytes(path)
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:  # not even the header was written out
            path.unlink()
            return
        lines = whole.decode("utf-8", errors="replace").split("\n")[:-1]
        _check_header(path, _parsed(path, 1, lines[0]), header)
        for number, line in enumerate(lines[1:], start=2):
            self._take_line(f"{path}:{number}", _parsed(path, number, line))
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        self.resumed = True

    def _take_line(self, where: str, line: dict[str, Any]) -> None:
        try:
            if "spent_s" in line:
                self.spent_s = max(self.spent_s, _number(line["spent_s"]))
                return
            op, device, shape, dtype, axes = line["table"]
            key = TableKey(_text(op), _text(device), _text(shape), _text(dtype), tuple(map(_text, axes)))
            size, seconds = tuple(map(_number, line["size"])), _number(line["seconds"])
            if len(size) != len(key.axes) or seconds == 0:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{where}: expected a run ('table', 'size', 'seconds') or 'spent_s'; delete the file to start anew") from None
        self._remember(key, size, seconds)

    def _remember(self, key: TableKey, size: Size, seconds: float) -> None:
        self.runs.setdefault(key, {}).setdefault(size, []).append(seconds)

    def add(self, key: TableKey, size: Size, seconds: float) -> None:
        """Note one run."""
        self._remember(key, size, seconds)
        if self._file is not None:
            table = [key.op, key.device, key.shape, key.dtype, list(key.axes)]
            self._file.write(f"{json.dumps({'table': table, 'size': list(size), 'seconds': seconds})}\n")

    def spend(self, spent_s: float) -> None:
        """Note the seconds that all runs so far took together; written out once a second."""
        self.spent_s = spent_s
        if self._file is not None and time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write everything out."""
        if self._file is not None:
            self._file.write(f"{json.dumps({'spent_s': self.spent_s})}\n")
            self._file.flush()
            self._flushed = time.monotonic()

    def num_runs(self, key: TableKey, size: Size) -> int:
        """Return how many runs of a size there are."""
        return len(self.runs.get(key, {}).get(size, ()))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}:{number}: not a line of an interrupted calibration; delete the file to start anew")
    return found


def _check_header(path: Path, found: dict[str, Any], header: dict[str, Any]) -> None:
    if found.get("schema") != SCHEMA:
        raise InputError(f"{path}:1: expected the header of an interrupted calibration ({SCHEMA!r}), found schema {found.get('schema')!r}")
    for name, old, new in _differences("", found, header):
        raise InputError(f"{path}: this interrupted calibration is of another run: {name} was {old!r} and is {new!r}; "
                         "repeat its command to go on, or delete the file to start anew")


def _differences(prefix: str, old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    found = []
    for key in dict.fromkeys((*new, *old)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(f"{prefix}{key}.", a, b)
        elif a != b:
            found.append((prefix + key, a, b))
    return found


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
