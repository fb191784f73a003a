"""The events of a PyTorch profiler trace (Kineto's Chrome Trace JSON), checked, and which range launched what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.calibrate.imports.base import brief, number, parse_json, read_text
from moesim.errors import InputError

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
RANGES = "user_annotation"


@dataclass(frozen=True)
class Event:
    """One complete event: microseconds, the thread it ran on, and its arguments."""

    name: str
    category: str
    thread: tuple[str, str]
    start_us: float
    duration_us: float
    args: dict[str, Any]
    where: str

    @property
    def end_us(self) -> float:
        """Return the end in microseconds."""
        return self.start_us + self.duration_us

    @property
    def correlation(self) -> str | None:
        """Return what links a launch and its GPU work."""
        value = self.args.get("correlation")
        return None if value is None or isinstance(value, (dict, list)) else str(value)


@dataclass
class Trace:
    """The events of interest of one file."""

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    gpu: list[Event] = field(default_factory=list)
    launches: list[Event] = field(default_factory=list)
    ranges: list[Event] = field(default_factory=list)


def read_trace(path: Path) -> Trace:
    """Read a trace, plain or gzip.

    Raises:
        InputError: not JSON, not a trace, an event without a time, no event of the profiler at all.
    """
    document = parse_json(read_text(path), str(path))
    listed = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(listed, list):
        raise InputError(f"{path}: expected a Chrome trace of the PyTorch profiler: a list, or an object with 'traceEvents'")
    trace = Trace(path, _facts(document) if isinstance(document, dict) else {})
    places = {**dict.fromkeys(GPU_WORK, trace.gpu), **dict.fromkeys(LAUNCHES, trace.launches), RANGES: trace.ranges}
    for place, entry in enumerate(listed):
        if isinstance(entry, dict) and entry.get("ph") == "X" and isinstance(entry.get("cat"), str):
            target = places.get(entry["cat"].lower())
            if target is not None:
                target.append(_event(entry, f"{path}: traceEvents[{place}]"))
    if not (trace.gpu or trace.ranges):
        raise InputError(f"{path}: no GPU work (cat kernel, gpu_memcpy) and no annotated range in it; is it a trace of "
                         f"torch.profiler (export_chrome_trace)?")
    return trace


def _event(entry: dict[str, Any], where: str) -> Event:
    name = entry.get("name")
    if not isinstance(name, str):
        raise InputError(f"{where}: 'name' must be text, got {brief(name)}")
    start, duration = number(entry, "ts", where), number(entry, "dur", where)
    if duration < 0:
        raise InputError(f"{where}: 'dur' must not be negative, got {duration}")
    args = entry.get("args")
    thread = (brief(entry.get("pid")), brief(entry.get("tid")))
    return Event(name, entry["cat"].lower(), thread, start, duration, args if isinstance(args, dict) else {}, where)


def _facts(document: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    devices = document.get("deviceProperties")
    if isinstance(devices, list):
        facts["gpus"] = [str(device.get("name")) for device in devices if isinstance(device, dict)]
    for key in ("schemaVersion", "cuda_runtime_version", "cuda_driver_version", "trace_id"):
        if isinstance(document.get(key), (str, int)):
            facts[key] = document[key]
    return facts


def launched_in(trace: Trace, ranges: list[Event]) -> dict[int, list[Event]]:
    """Return the GPU work that the innermost of `ranges` launched, by the range's place in the list.

    A launch (cuda_runtime, cuda_driver) belongs to the innermost range of its thread that is open at its start; its GPU
    work has the same correlation.
    """
    launcher: dict[str, int] = {}
    for thread, launches in _by_thread(trace.launches).items():
        own = [(event, place) for place, event in enumerate(ranges) if event.thread == thread]
        for launch, place in _innermost(launches, own):
            if launch.correlation is not None:
                launcher[launch.correlation] = place
    work: dict[int, list[Event]] = defaultdict(list)
    for event in trace.gpu:
        range_place = launcher.get(event.correlation or "")
        if range_place is not None:
            work[range_place].append(event)
    return work


def _by_thread(events: list[Event]) -> dict[tuple[str, str], list[Event]]:
    threads: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        threads[event.thread].append(event)
    return threads


def _innermost(launches: list[Event], ranges: list[tuple[Event, int]]) -> Iterator[tuple[Event, int]]:
    """Yield (launch, place of the innermost range open at its start); launches in no range are left out."""
    waiting = sorted(ranges, key=lambda pair: (pair[0].start_us, -pair[0].duration_us), reverse=True)
    open_ranges: list[tuple[Event, int]] = []
    for launch in sorted(launches, key=lambda event: event.start_us):
        while waiting and waiting[-1][0].start_us <= launch.start_us:
            open_ranges.append(waiting.pop())
        while open_ranges and open_ranges[-1][0].end_us < launch.start_us:
            open_ranges.pop()
        if open_ranges:
            yield launch, open_ranges[-1][1]


def busy_us(events: list[Event]) -> float:
    """Return how long at least one of the events ran: the length of the union of their intervals."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda one: one.start_us):
        total += max(0.0, event.end_us - max(reached, event.start_us))
        reached = max(reached, event.end_us)
    return total
