"""nvbandwidth (NVIDIA, Apache-2.0), text or JSON: rates of copies between host and GPUs as copy tables.

It prints GB/s (1e9 bytes) of a copy of one buffer, not the buffer's size: that is given as `buffer_mib`, one number
per file (``nvbandwidth -b``, 512 by default). A matrix has one number per GPU (or pair of GPUs); they are the samples
of one table. In the tests of both ways the rate is that of the named direction while the other one is busy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesim.calibrate.imports.base import Findings, Importer, TableKey, brief, parse_json, read_text
from moesim.errors import InputError
from moesim.units import GB, MIB, format_rate

COPY, ONE_SIZE = "copy", "copy_at_one_size"
_DEVICES = {
    "host_to_device_memcpy_ce": "dram_to_hbm",
    "device_to_host_memcpy_ce": "hbm_to_dram",
    "host_to_device_bidirectional_memcpy_ce": "dram_to_hbm_both_ways",
    "device_to_host_bidirectional_memcpy_ce": "hbm_to_dram_both_ways",
    "device_to_device_memcpy_write_ce": "hbm_to_hbm",
    "device_to_device_memcpy_read_ce": "hbm_to_hbm_read",
}
_OTHER = "nvbandwidth test {name}: not a copy over one link by a copy engine"
_RUNNING = re.compile(r"Running\s+([A-Za-z0-9_]+)\.?\s*$")
_FACTS = re.compile(r"(nvbandwidth Version|CUDA Runtime Version|CUDA Driver Version|Driver Version):\s*(\S.*)$")
_DEVICE = re.compile(r"Device (\d+):\s*(\S.*)$")
_MAX_BUFFER_MIB = 1 << 20
Cells = list[list[str]]


def read_nvbandwidth(names: Sequence[str], buffer_mib: int | float | str | None = None) -> Findings:
    """Read one or several outputs, each of one buffer size.

    Two sizes or more of a direction make a ``copy`` table, which the simulator reads. One size makes a
    ``copy_at_one_size`` table, which it does not: a time at one size says nothing of another.

    Args:
        names: files.
        buffer_mib: the size of the copied buffer in MiB, of each file (``"1,64,512"``).

    Raises:
        InputError: no buffer size, files of neither form, a rate that is not one.
    """
    found = Findings("nvbandwidth")
    rates: dict[str, dict[float, list[float]]] = {}
    for name, buffer in zip(names, _buffers(buffer_mib, len(names)), strict=True):
        path = Path(name)
        for test, cells, where in _tests(path, found):
            if test not in _DEVICES:
                found.left_out[_OTHER.format(name=test)] += 1
                continue
            rates.setdefault(_DEVICES[test], {}).setdefault(buffer, []).extend(_rates(cells, where))
        found.files.append(path)
    for device, by_size in rates.items():
        _add(found, device, by_size)
    return found


def _add(found: Findings, device: str, by_size: dict[float, list[float]]) -> None:
    sizes = {size: values for size, values in by_size.items() if values}
    op = COPY if len(sizes) > 1 else ONE_SIZE
    for size, values in sizes.items():
        for rate in values:
            found.add(TableKey(op, device, "contiguous", "", ("bytes",)), (size,), size / rate, device)
    if op == ONE_SIZE and sizes:
        (rate,) = [sorted(values)[len(values) // 2] for values in sizes.values()]
        found.notes.append(f"{device}: one buffer size, so the simulator does not read this table; run nvbandwidth with "
                           f"other -b too, or state bytes_per_s: {rate:.6g} ({format_rate(rate)}) of the link in a hardware file")


def _buffers(buffer_mib: int | float | str | None, count: int) -> list[float]:
    """Return bytes per file."""
    if buffer_mib is None:
        raise InputError("nvbandwidth prints no buffer size: give buffer_mib, one number per file "
                         "(nvbandwidth copies 512 MiB unless -b says otherwise)")
    try:
        sizes = [float(part) for part in str(buffer_mib).split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != count or not all(0 < size <= _MAX_BUFFER_MIB for size in sizes):
        raise InputError(f"buffer_mib {brief(buffer_mib)}: expected {count} positive number{'s' * (count > 1)} of MiB, "
                         f"one per file, separated by commas")
    return [size * MIB for size in sizes]


def _tests(path: Path, found: Findings) -> Iterator[tuple[str, Cells, str]]:
    """Yield (test, rows of cells, place) of one file."""
    text = read_text(path)
    if text.lstrip().startswith("{"):
        yield from _json_tests(path, parse_json(text, str(path)), found)
    else:
        yield from _text_tests(path, text.splitlines(), found)


def _json_tests(path: Path, document: Any, found: Findings) -> Iterator[tuple[str, Cells, str]]:
    body = document.get("nvbandwidth") if isinstance(document, dict) else None
    tests = body.get("testcases") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(tests, list):
        raise InputError(f"{path}: expected nvbandwidth --json: an object 'nvbandwidth' with a list 'testcases'")
    for key, value in body.items():
        if key != "testcases" and isinstance(value, (str, int, float, list)):
            found.facts.setdefault(key, value)
    for place, test in enumerate(tests):
        where = f"{path}: testcases[{place}]"
        if not isinstance(test, dict) or not isinstance(test.get("name"), str):
            raise InputError(f"{where}: expected an object with a 'name', got {brief(test)}")
        if "bandwidth_matrix" not in test:
            found.left_out[f"nvbandwidth test without a matrix (status {brief(test.get('status'))})"] += 1
            continue
        rows = test["bandwidth_matrix"]
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise InputError(f"{where}: 'bandwidth_matrix' must be a list of rows, got {brief(rows)}")
        yield test["name"], [[str(cell) for cell in row] for row in rows], where


def _text_tests(path: Path, lines: list[str], found: Findings) -> Iterator[tuple[str, Cells, str]]:
    """A test is its name, a line of words, a line of column numbers, then rows that start with theirs."""
    if not any(_RUNNING.match(line) for line in lines):
        raise InputError(f"{path}: expected the output of nvbandwidth (lines 'Running host_to_device_memcpy_ce.'), or its --json")
    for line in lines:
        if match := _FACTS.match(line) or _DEVICE.match(line):
            found.facts.setdefault(match[1] if not match[1].isdigit() else f"Device {match[1]}", match[2])
    for place, line in enumerate(lines):
        if match := _RUNNING.match(line):
            cells = _matrix(path, lines, place + 1)
            if cells is None:
                found.left_out["nvbandwidth test without a matrix of GB/s (waived, failed, cut short, or a latency)"] += 1
            else:
                yield match[1], cells, f"{path}:{place + 1}: {match[1]}"


def _matrix(path: Path, lines: list[str], start: int) -> Cells | None:
    """Return the rows of the matrix at `start`; None where there is none."""
    head = [line.split() for line in lines[start:start + 2]]
    if len(head) < 2 or "(GB/s)" not in head[0] or not head[1] or not all(word.isdigit() for word in head[1]):
        return None
    rows: Cells = []
    for place in range(start + 2, len(lines)):
        words = lines[place].split()
        if not words or not words[0].isdigit():
            break
        if len(words) != len(head[1]) + 1:
            raise InputError(f"{path}:{place + 1}: a row of {len(words) - 1} rates under {len(head[1])} columns: cut short?")
        rows.append(words[1:])
    return rows or None


def _rates(cells: Cells, where: str) -> list[float]:
    """Return bytes per second of every cell that was measured (N/A, and 0 on the diagonal, were not)."""
    rates = []
    for row in cells:
        for cell in row:
            if cell.upper() == "N/A":
                continue
            try:
                rate = float(cell)
            except ValueError:
                rate = -1.0
            if not 0 <= rate < float("inf"):
                raise InputError(f"{where}: a rate must be a number of GB/s or N/A, got {brief(cell)}")
            rates += [rate * GB] if rate > 0 else []
    return rates


NVBANDWIDTH = {"nvbandwidth": Importer(read_nvbandwidth, "nvbandwidth, text or --json: copies between host and GPUs")}
