"""The thread that copies experts into slots: demanded ones first, then those fetched in the background."""

from __future__ import annotations

import heapq
import threading
import time
from dataclasses import dataclass
from typing import Any

from moesim.calibrate.kernels import wait_until
from moesim.lowering.graph import PRIORITY_DEMAND
from moesim.validate.hf_weights import SlotPool, SlowTier


@dataclass
class Load:
    """One expert on its way to a slot; `resumed_ns` is when somebody who waited for it went on (0: nobody waited)."""

    kind: str
    step: int
    layer: int
    expert: int
    slot: int
    asked_ns: int = 0
    taken: bool = False
    done: bool = False
    start_ns: int = 0
    end_ns: int = 0
    resumed_ns: int = 0


class Loader:
    """Copies one expert at a time, by (priority, order of asking); `bytes_per_s` paces the slow tier (None: unpaced).

    An expert whose slot was given away before its copy began is never copied.
    """

    def __init__(self, tier: SlowTier, pool: SlotPool, device: str, bytes_per_s: float | None = None) -> None:
        self._tier, self._pool, self._device, self._rate = tier, pool, device, bytes_per_s
        self._changed = threading.Condition()
        self._queue: list[tuple[int, int, Load]] = []
        self._latest: dict[int, Load] = {}
        self._count, self._closing = 0, False
        self._error: BaseException | None = None
        self.finished: list[Load] = []
        self._thread = threading.Thread(target=self._run, daemon=True, name="expert loader")

    def __enter__(self) -> Loader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def ask(self, load: Load, priority: int) -> None:
        """Queue a copy; whatever was queued for its slot and has not begun is dropped."""
        with self._changed:
            before = self._latest.get(load.slot)
            if before is not None:
                before.taken = True
            self._latest[load.slot], load.asked_ns = load, time.perf_counter_ns()
            self._push(load, priority)

    def _push(self, load: Load, priority: int) -> None:
        self._count += 1
        heapq.heappush(self._queue, (priority, self._count, load))
        self._changed.notify_all()

    def promote(self, load: Load) -> None:
        """Let a queued copy overtake the background."""
        with self._changed:
            if not load.taken:
                self._push(load, PRIORITY_DEMAND)

    def wait(self, load: Load) -> None:
        """Return when the expert is in its slot; raises what went wrong in the thread."""
        with self._changed:
            if not load.done:
                self._await(load)
                load.resumed_ns = time.perf_counter_ns()

    def drain(self) -> None:
        """Wait until nothing is queued or under way."""
        with self._changed:
            for load in self._latest.values():
                self._await(load)

    def _await(self, load: Load) -> None:
        while not load.done and self._error is None:
            self._changed.wait()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        import torch

        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                while (load := self._next()) is not None:
                    self._copy(load)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> Load | None:
        with self._changed:
            while True:
                while self._queue:
                    load = heapq.heappop(self._queue)[2]
                    if not load.taken:
                        load.taken, load.start_ns = True, time.perf_counter_ns()
                        return load
                if self._closing:
                    return None
                self._changed.wait()

    def _copy(self, load: Load) -> None:
        start_s = time.perf_counter()
        self._pool.fill(load.slot, self._tier.of(load.layer, load.expert))
        if self._rate:
            wait_until(start_s + self._tier.expert_bytes / self._rate)
        synchronize(self._device)
        with self._changed:
            load.end_ns, load.done = max(time.perf_counter_ns(), load.start_ns + 1), True
            self.finished.append(load)
            self._changed.notify_all()


def synchronize(device: Any) -> None:
    """Wait for the GPU, so that a clock read next includes its work; nothing to do on a CPU."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize()
