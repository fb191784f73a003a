"""The torch executor: the same task graph, run for real, each task timed.

Every resource is a thread with its own queue (on CUDA also its own stream). A thread that ends a task
does the bookkeeping itself and goes straight on to its next task, so a chain on one resource costs no hand-over.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Protocol

import pandas as pd

from moesim.lowering.graph import Program, TaskGraph
from moesim.simulate.scheduler import Scheduler


class World(Protocol):
    """What executes a task."""

    def run(self, graph: TaskGraph, task: int) -> None:
        """Run one task; returns when it is done (or enqueued on the current CUDA stream)."""


class TorchExecutor:
    """Runs one program once, in real time.

    Raises (from `run`): the first error of any task or decision, after all threads have stopped; CheckError for
    tasks that can never run.
    """

    def __init__(self, program: Program, world: World, *, device: str = "cpu") -> None:
        self.graph, self.world, self.device = program.graph, world, device
        self._origin = 0
        self._scheduler = Scheduler(program, lambda: time.perf_counter_ns() - self._origin)
        self._lock = threading.Lock()
        self._wake = [threading.Condition(self._lock) for _ in self.graph.resources]
        self._idle = [True] * len(self.graph.resources)
        self._running = 0
        self._over = False
        self._error: BaseException | None = None

    def run(self) -> pd.DataFrame:
        """Run to the end and return the ``tasks`` table (ns since the start of the run)."""
        threads = [threading.Thread(target=self._lane, args=(place,), daemon=True) for place in range(len(self._wake))]
        with self._lock:
            for thread in threads:
                thread.start()
            self._origin = time.perf_counter_ns()
            try:
                self._go_on(-1)
            except BaseException as error:
                self._error = error
                self._stop()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return self._scheduler.table()

    def _lane(self, resource: int) -> None:
        """The loop of one resource's thread."""
        import torch

        torch.set_num_threads(1)
        stream = torch.cuda.Stream() if self.device == "cuda" else None
        try:
            with torch.no_grad(), self._lock:
                while (task := self._next(resource)) is not None:
                    self._lock.release()
                    try:
                        self._execute(task, stream)
                    finally:
                        self._lock.acquire()
                    self._end(resource, task)
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
                self._stop()

    def _next(self, resource: int) -> int | None:
        """Wait (lock held) for this resource's next task; None when the run is over."""
        while not self._over:
            task = self._scheduler.pop(resource)
            if task is not None:
                self._idle[resource] = False
                self._running += 1
                return task
            self._idle[resource] = True
            self._wake[resource].wait()
        return None

    def _execute(self, task: int, stream: Any) -> None:
        if stream is None:
            self.world.run(self.graph, task)
            return
        import torch

        with torch.cuda.stream(stream):
            self.world.run(self.graph, task)
            done = torch.cuda.Event()
            done.record()
        done.synchronize()

    def _end(self, resource: int, task: int) -> None:
        self._running -= 1
        self._scheduler.complete(task)
        self._go_on(resource)

    def _go_on(self, resource: int) -> None:
        """Let the program decide, wake who has work; the run is over when nothing runs and nothing can."""
        self._scheduler.advance()
        self._notify(resource)
        if self._running == 0 and not any(self._scheduler.has_ready(place) for place in range(len(self._wake))):
            self._stop()

    def _notify(self, resource: int) -> None:
        """Wake idle lanes that have work; the caller's own lane goes on by itself."""
        for place, condition in enumerate(self._wake):
            if place != resource and self._idle[place] and self._scheduler.has_ready(place):
                condition.notify()

    def _stop(self) -> None:
        self._over = True
        for condition in self._wake:
            condition.notify_all()


def run_torch(program: Program, world: World, *, device: str = "cpu") -> pd.DataFrame:
    """Run a program for real and return its ``tasks`` table."""
    return TorchExecutor(program, world, device=device).run()
