"""One micro-benchmark: what is run at which sizes, and how one run of it is timed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from moesim.hardware.profile import TableKey

Size = tuple[float, ...]
Run = Callable[[], object]
STOP_S = 60.0


@dataclass(frozen=True)
class Call:
    """One size of a benchmark: `reset` before the clock starts, `run` while it runs, `beside` meanwhile, over and over."""

    run: Run
    reset: Run | None = None
    beside: Run | None = None


@dataclass(frozen=True)
class Bench:
    """One table to be measured.

    `sizes` rise in cost, so that a run that is short of time leaves the costliest ones out; `prepare` makes a size
    (of the grid, or between two of its sizes) ready to run. Of the time, a table gets a share by its `weight`.
    `waits` is False where the wait for the device is not part of what is timed.
    """

    key: TableKey
    sizes: tuple[Size, ...]
    prepare: Callable[[Size], Call]
    weight: float = 1.0
    waits: bool = True


class Case(NamedTuple):
    """One size of one benchmark, ready to run."""

    bench: Bench
    size: Size
    call: Call


@dataclass
class Offer:
    """Benchmarks of one part of the machine, and what it cannot run, in words."""

    benches: list[Bench] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def case_of(bench: Bench, size: Size) -> Case:
    """Make a size of a benchmark ready."""
    return Case(bench, size, bench.prepare(size))


class Timer:
    """Times a call by the clock; on CUDA the current stream is empty before, and after unless the benchmark says not."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._wall_s = self._own_s = 0.0

    @property
    def core_share(self) -> float:
        """Return which share of its time a kernel on the CPU had its core (1 where none was timed): less on a busy machine."""
        return self._own_s / self._wall_s if self._wall_s else 1.0

    def seconds(self, case: Case) -> float:
        """Run a case once and return its seconds."""
        call = case.call
        if call.reset is not None:
            call.reset()
        if call.beside is None:
            own_s = time.thread_time()
            taken = self._clock(call.run, case.bench.waits)
            if case.bench.key.dtype and not self._cuda:
                self._wall_s, self._own_s = self._wall_s + taken, self._own_s + time.thread_time() - own_s
            return taken
        with Beside(call.beside):
            return self._clock(call.run, case.bench.waits)

    def _clock(self, run: Run, waits: bool) -> float:
        self._synchronise()
        start = time.perf_counter()
        run()
        if waits:
            self._synchronise()
        return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.current_stream().synchronize()


class Beside:
    """Runs a call over and over on a second thread, from the first completion of it until the block is left.

    Raises:
        Exception: whatever the call raised.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._error: BaseException | None = None
        self._busy, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        import torch

        try:
            torch.set_num_threads(1)
            with torch.no_grad():
                while not self._stop.is_set():
                    self._run()
                    self._busy.set()
        except BaseException as error:
            self._error = error
        finally:
            self._busy.set()

    def __enter__(self) -> None:
        self._thread.start()
        self._busy.wait(STOP_S)

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(STOP_S)
        if self._error is not None:
            raise self._error


def turns(run: Callable[[int], object], count: int) -> Run:
    """Return a call that hands `run` the numbers 0 ... count - 1 in turn."""
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % count
        return run(turn)

    return call
