"""PyTorch profiler traces: copies by bytes, collectives by bytes, and what annotated ranges say of themselves.

A kernel's name says what it does, never on how many tokens. So tables come from what states its size:

- copies (``gpu_memcpy`` with ``bytes``): HtoD and DtoH of pinned memory are the copies between ``dram`` and ``hbm``;
- collectives with communication metadata (``Collective name``, ``In msg nelems``, ``dtype``, ``Group size``);
- ranges that the user names: ``record_function("moesim grouped_ffn h2048.ff768.m3.w2 bf16 tokens=64 groups=8
  largest_group=12")`` is one run of that table's size. Its time is how long the GPU was busy with what it launched; in
  a trace without GPU work it is the range's own time, on ``cpu``.

All else is a share of the GPU's time by name patterns, and what matches none is reported as such.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from moesim.calibrate.imports.base import Findings, Importer, TableKey, brief, number, seconds_from_us
from moesim.calibrate.imports.kineto_events import Event, Trace, busy_us, launched_in, read_trace
from moesim.calibrate.imports.kineto_patterns import UNMATCHED, Patterns, load_patterns, share_of
from moesim.errors import InputError, unknown
from moesim.hardware.cost import GROUPED_AXES
from moesim.units import format_percent

OP_AXES = {"grouped_ffn": GROUPED_AXES, "attention": ("tokens", "context"), "router": ("tokens",), "dense": ("tokens",),
           "shared_expert": ("tokens",), "head": ("tokens",)}
_MARK = "moesim "
_RANGE = re.compile(r"moesim (\S+) (\S+) (\S+)((?: \w+=\d{1,15})+)")
_EXAMPLE = "'moesim grouped_ffn h2048.ff768.m3.w2 bf16 tokens=64 groups=8 largest_group=12'"
_COPY = re.compile(r"Memcpy (HtoD|DtoH|DtoD|PtoP) \((\w+) -> (\w+)\)")
_ROUTES = {"HtoD": "dram_to_hbm", "DtoH": "hbm_to_dram", "DtoD": "inside_hbm", "PtoP": "hbm_to_hbm"}
_PINNED = ("Pinned", "Device")
_ELEMENT_BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Double": 8, "Int": 4, "Long": 8, "Byte": 1, "Char": 1, "Bool": 1,
                  "Float8_e4m3fn": 1, "Float8_e5m2": 1, "float": 4, "half": 2, "bfloat16": 2}


def read_kineto(names: Sequence[str], patterns: str | None = None) -> Findings:
    """Read traces of one machine into one profile.

    Args:
        names: JSON files, plain or gzip.
        patterns: a JSON file with patterns of kernel names of your own; see `load_patterns`.

    Raises:
        InputError: not such a trace, a ``moesim`` range that is misspelt, copies or collectives without their sizes' form.
    """
    found, shares, matched = Findings("torch profiler"), defaultdict[str, float](float), load_patterns(patterns)
    for name in names:
        trace = read_trace(Path(name))
        for key, value in trace.facts.items():
            found.facts.setdefault(key, value)
        _add_ranges(found, trace, shares)
        for event in trace.gpu:
            _add_gpu_event(found, event, matched, shares)
        found.files.append(trace.path)
    _drop_single_sizes(found)
    _note_shares(found, shares)
    return found


def _add_gpu_event(found: Findings, event: Event, patterns: Patterns, shares: dict[str, float]) -> None:
    if event.category == "gpu_memcpy":
        shares["copies"] += event.duration_us
        _add_copy(found, event)
    elif event.category == "gpu_memset":
        shares["memset"] += event.duration_us
    else:
        shares[share_of(event.name, patterns)] += event.duration_us
        _add_collective(found, event)


def _add_copy(found: Findings, event: Event) -> None:
    match, num_bytes = _COPY.match(event.name), event.args.get("bytes")
    if match is None or num_bytes is None:
        found.left_out["copy whose name or bytes do not say what it copied"] += 1
        return
    size = number(event.args, "bytes", event.where)
    if size <= 0 or event.duration_us <= 0:
        found.left_out["copy of no bytes or no time"] += 1
        return
    direction, *ends = match.groups()
    memory = next((end for end in ends if end not in _PINNED), "Pinned").lower()
    # the simulator takes any table of a route: only pinned copies may carry the route's own name
    device = _ROUTES[direction] + ("" if memory == "pinned" else f"_{memory}")
    found.add(TableKey("copy", device, memory, "", ("bytes",)), (size,), seconds_from_us(event.duration_us), event.where)


def _add_collective(found: Findings, event: Event) -> None:
    name = event.args.get("Collective name")
    if name is None:
        return
    element = _ELEMENT_BYTES.get(str(event.args.get("dtype")))
    if element is None or "In msg nelems" not in event.args or "Group size" not in event.args or event.duration_us <= 0:
        found.left_out["collective without its size, dtype or group"] += 1
        return
    ranks = number(event.args, "Group size", event.where)
    op = "all_to_all" if str(name).lower().replace("_", "").startswith("alltoall") else brief(name).strip("'")
    key = TableKey(op, "nccl", f"ranks{ranks:g}", str(event.args["dtype"]), ("bytes",))
    found.add(key, (number(event.args, "In msg nelems", event.where) * element,), seconds_from_us(event.duration_us), event.where)


def _add_ranges(found: Findings, trace: Trace, shares: dict[str, float]) -> None:
    """Add the ranges that carry moesim's names; they count into the share of annotated time."""
    ranges = [event for event in trace.ranges if event.name.startswith(_MARK)]
    work = launched_in(trace, ranges)
    for place, event in enumerate(ranges):
        op, shape, dtype, size = _parsed(event)
        if trace.gpu:
            busy, device = busy_us(work.get(place, [])), "gpu"
        else:
            busy, device = event.duration_us, "cpu"
        if busy <= 0:
            found.left_out["range that launched no GPU work (its launches are not in the trace?)"] += 1
            continue
        shares[_MARK] += busy
        found.add(TableKey(op, device, shape, dtype, OP_AXES[op]), size, seconds_from_us(busy), event.where)


def _parsed(event: Event) -> tuple[str, str, str, tuple[float, ...]]:
    """Return (op, shape, dtype, size) of a range's name."""
    match = _RANGE.fullmatch(event.name)
    if match is None:
        raise InputError(f"{event.where}: range {brief(event.name)}: expected e.g. {_EXAMPLE}")
    op, shape, dtype, rest = match.groups()
    if op not in OP_AXES:
        raise unknown(f"operation of a range ({event.where})", op, OP_AXES)
    given = dict(part.split("=") for part in rest.split())
    if set(given) != set(OP_AXES[op]):
        raise InputError(f"{event.where}: range {brief(event.name)}: {op} needs {', '.join(OP_AXES[op])}, got {', '.join(given)}")
    return op, shape, dtype, tuple(float(given[axis]) for axis in OP_AXES[op])


def _drop_single_sizes(found: Findings) -> None:
    """Leave out copies of one size only: their table would be the same time for every size."""
    for key in [key for key, runs in found.samples.items() if key.op == "copy" and len(runs) < 2]:
        found.left_out[f"copy {key.device} of one size only: says nothing of other sizes"] += sum(
            map(len, found.samples.pop(key).values()))


def _note_shares(found: Findings, shares: dict[str, float]) -> None:
    """Write the shares of GPU time by kernel name, the unmatched one always, and the share of annotated ranges."""
    annotated = shares.pop(_MARK, 0.0)
    total = sum(shares.values())
    if not total:
        return
    found.facts["gpu_time_shares"] = {name: value / total for name, value in sorted(shares.items(), key=lambda share: (-share[1], share[0]))}
    found.notes.append(f"{format_percent(shares.get(UNMATCHED, 0.0) / total)} of the GPU's time matched no pattern of kernel names; "
                       f"{format_percent(min(1.0, annotated / total))} lies in moesim ranges. Kernels outside of them have no "
                       f"sizes, so no table is made of them")
    found.notes.append("copies that ran beside kernels, and collectives that waited for other ranks, are longer than alone")


KINETO = {"torch-profiler": Importer(
    read_kineto, "PyTorch profiler trace (Chrome JSON): copies, collectives, ranges named by moesim's rule")}
