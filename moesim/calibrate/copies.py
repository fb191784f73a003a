"""Copies by size, alone and both ways at once; copies beside compute and compute beside copies; launches and hand-overs.

On a CPU the device is memory: one route, from DRAM to DRAM. On CUDA the host's memory is pinned, and pageable under a
name of its own, which no hardware file has.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from moesim.calibrate.bench import Bench, Call, Run, Size
from moesim.calibrate.experts import loop_call
from moesim.calibrate.operands import Operands
from moesim.calibrate.shapes import expert_shape
from moesim.hardware.cost import GROUPED_AXES
from moesim.hardware.profile import CONTENTION, GROUPED_FFN, TableKey
from moesim.units import KIB, MIB

COPY_BYTES: tuple[Size, ...] = tuple((float(16 * KIB * 4**power),) for power in range(7))
BUFFER_BYTES = 256 * MIB
BOTH_WAYS_BYTES = MIB
BUSY_COPY_BYTES = 16.0 * MIB
BUSY_COMPUTE: Size = (16.0, 1.0, 16.0)
BESIDE_COPY: tuple[Size, ...] = ((1, 1, 1), (4, 1, 4), (4, 4, 1), (16, 1, 16), (16, 4, 4), (64, 1, 64), (64, 4, 16))
CALLS = ((1.0,), (4.0,), (16.0,), (64.0,))
CONTIGUOUS = "contiguous"


@dataclass(frozen=True)
class Route:
    """A direction of copies between two buffers; `back` is the name of the opposite one."""

    name: str
    target: Any
    source: Any
    back: str

    def copies(self, num_bytes: float) -> Run:
        """Return a call that copies this much, from place to place of the buffers."""
        size, places = int(num_bytes), max(1, len(self.source) // int(num_bytes))
        turn = 0

        def run() -> None:
            nonlocal turn
            start = (turn % places) * size
            turn += 1
            self.target[start : start + size].copy_(self.source[start : start + size], non_blocking=True)

        return run


def routes(device: str) -> dict[str, Route]:
    """Return the routes of a device, by name; every byte of their buffers has been written."""
    import torch

    def buffer(place: str, *, pinned: bool = False) -> Any:
        return torch.ones(BUFFER_BYTES, dtype=torch.uint8, device=place, pin_memory=pinned)

    if device == "cpu":
        return {"dram_to_dram": Route("dram_to_dram", buffer("cpu"), buffer("cpu"), "dram_to_dram")}
    fast = buffer("cuda"), buffer("cuda")
    found = {}
    for name, slow in (("", buffer("cpu", pinned=True)), ("_pageable", buffer("cpu"))):
        there, back = f"dram_to_hbm{name}", f"hbm_to_dram{name}"
        found[there] = Route(there, fast[0], slow, back)
        found[back] = Route(back, slow, fast[1], there)
    return found


def own_stream(device: str, run: Run) -> Run:
    """Return a call that, on CUDA, runs on a stream of its own and waits for it."""
    if device == "cpu":
        return run
    import torch

    stream = torch.cuda.Stream()

    def call() -> None:
        with torch.cuda.stream(stream):
            run()
        stream.synchronize()

    return call


def copy_benches(device: str, ways: dict[str, Route]) -> list[Bench]:
    """Return every route alone, and beside a stream of copies the opposite way (on a CPU, a second one)."""
    found = []
    for name, route in ways.items():
        found.append(Bench(_copy_key(name), COPY_BYTES, partial(_alone, route)))
        found.append(Bench(_copy_key(f"{name}_both_ways"), COPY_BYTES, partial(_both_ways, device, route, _opposite(device, ways, route))))
    return found


def _copy_key(device: str) -> TableKey:
    return TableKey("copy", device, CONTIGUOUS, "", ("bytes",))


def _opposite(device: str, ways: dict[str, Route], route: Route) -> Route:
    """Return the way back; on a CPU a second route with buffers of its own."""
    return next(iter(routes(device).values())) if device == "cpu" else ways[route.back]


def _alone(route: Route, size: Size) -> Call:
    return Call(route.copies(size[0]))


def _both_ways(device: str, route: Route, other: Route, size: Size) -> Call:
    """The other side copies as much at a time, at least 1 MiB: smaller ones would measure Python."""
    return Call(route.copies(size[0]), beside=own_stream(device, other.copies(max(BOTH_WAYS_BYTES, size[0]))))


def contention_benches(ops: Operands, kind: str, dtype: str, ways: dict[str, Route]) -> list[Bench]:
    """Return copies by size while experts are computed, and experts while 16 MiB copies go on, for each priced route."""
    shape, found = expert_shape(ops.model), []
    most = [size for size in BESIDE_COPY if size[1] <= ops.model.num_experts]
    for name, route in ways.items():
        if name.endswith("_pageable"):
            continue
        copied = TableKey(CONTENTION, name, f"copy beside {GROUPED_FFN} {shape}", dtype, ("bytes",))
        found.append(Bench(copied, COPY_BYTES, partial(_copy_beside, ops, route)))
        computed = TableKey(CONTENTION, kind, f"{GROUPED_FFN} {shape} beside {name}", dtype, GROUPED_AXES)
        found.append(Bench(computed, tuple(most), partial(_compute_beside, ops, route)))
    return found


def _copy_beside(ops: Operands, route: Route, size: Size) -> Call:
    return Call(route.copies(size[0]), beside=own_stream(ops.device, loop_call(ops, BUSY_COMPUTE).run))


def _compute_beside(ops: Operands, route: Route, size: Size) -> Call:
    return Call(loop_call(ops, size).run, beside=own_stream(ops.device, route.copies(BUSY_COPY_BYTES)))


def overhead_benches(device: str, kind: str) -> list[Bench]:
    """Return launches (the smallest kernel, so many times) and hand-overs (a task given to a thread and waited for)."""
    import torch

    number, thread = torch.ones(1, device=device), ThreadPoolExecutor(1)
    parts: tuple[tuple[str, str, Run, bool], ...] = (
        ("launch", "smallest_kernel", lambda: number.mul_(1.0), False),
        ("hand_over", "thread", lambda: thread.submit(int).result(), True))
    found = [Bench(TableKey(op, kind, shape, "", ("calls",)), CALLS, partial(_repeated, run), 0.5, waits)
             for op, shape, run, waits in parts]
    if device == "cuda":
        key = TableKey("synchronise", kind, "empty_stream", "", ("calls",))
        found.append(Bench(key, CALLS, partial(_repeated, lambda: torch.cuda.current_stream().synchronize()), 0.5))
    return found


def _repeated(run: Run, size: Size) -> Call:
    count = int(size[0])

    def call() -> None:
        for _ in range(count):
            run()

    return Call(call)
