"""How fast traces are counted, in memory and streamed from Parquet, and what streaming a large trace holds.

Functions only: `reduction_rates` and `streaming_peak` give plain rows, for whichever script prints them. Rates are
selections (tokens x layers x k) per CPU second of one core; compilation is done before the clock starts.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesim.traces import reductions_numpy
from moesim.traces.blocks import block_trace
from moesim.traces.reductions import reduce_trace
from moesim.traces.stream import TraceStream
from moesim.traces.trace import RoutingTrace
from moesim.traces.writer import TraceWriter

SEED, REPEATS = 0, 3
NUM_RANKS = 8
NAMES = ("load", "transitions", "co_activation", "distinct", "rank_load_max", "lags", "stack_distances")
BATCH_STEP_TOKENS = 256
_NUMPY: dict[str, Callable[[RoutingTrace], object]] = {
    "load": reductions_numpy.load, "transitions": reductions_numpy.transitions,
    "co_activation": reductions_numpy.co_activation}


@dataclass(frozen=True)
class Rate:
    """Selections per CPU second of one reduction: compiled in memory, streamed from Parquet, and in numpy (or None).

    In memory the clock covers the copies of batches and, as in a file, the index of requests and steps; streamed it
    also covers decoding and every check.
    """

    name: str
    in_memory: float
    streamed: float
    in_numpy: float | None


def sample_trace(num_tokens: int, num_layers: int = 16, num_experts: int = 64, top_k: int = 8) -> RoutingTrace:
    """Return a seeded trace with uneven loads, in passes of `BATCH_STEP_TOKENS` tokens."""
    trace = block_trace(num_tokens, num_layers, num_experts, top_k, seed=SEED)
    return dataclasses.replace(trace, step=np.arange(num_tokens) // BATCH_STEP_TOKENS)


def write_repeated(trace: RoutingTrace, repeats: int, path: Path) -> Path:
    """Write `trace` many times one after another as one file, each time with new requests and steps."""
    num_requests, num_steps = int(trace.request_id.max()) + 1, int(trace.step.max()) + 1
    with TraceWriter(path, num_layers=trace.num_layers, top_k=trace.top_k, num_experts=trace.num_experts,
                     layer_ids=trace.layer_ids.tolist(), model=trace.model, source=trace.source,
                     with_weights=False) as writer:
        for turn in range(repeats):
            writer.append(dataclasses.replace(trace, request_id=trace.request_id + turn * num_requests,
                                              step=trace.step + turn * num_steps))
    return path


def cpu_s(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the least CPU time of a call, in seconds; the first call (which may compile) does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def even_shares(trace: RoutingTrace, num_ranks: int = NUM_RANKS) -> np.ndarray:
    """Return float64[layer, expert, rank]: equal runs of experts on each rank."""
    one = np.eye(num_ranks)[np.arange(trace.num_experts) * num_ranks // trace.num_experts]
    return np.broadcast_to(one, (trace.num_layers, *one.shape))


def reduction_rates(trace: RoutingTrace, path: Path, names: Sequence[str] = NAMES) -> list[Rate]:
    """Return the rates of reductions over a trace and the file of the same trace."""
    size, shares = trace.expert_ids.size, even_shares(trace)
    rates = []
    for name in names:
        memory, file = (cpu_s(lambda source=source, name=name: reduce_trace(source, [name], rank_share=shares))
                        for source in (trace, path))
        plain = cpu_s(lambda name=name: _NUMPY[name](trace), 1) if name in _NUMPY else None
        rates.append(Rate(name, size / memory, size / file, None if plain is None else size / plain))
    return rates


def kernel_rate(trace: RoutingTrace) -> float:
    """Return selections per CPU second of the load loop alone, over one block that is in memory."""
    from moesim.traces.kernels.counting import add_load

    ids = np.array(trace.expert_ids)
    counts = np.zeros((trace.num_layers, trace.num_experts + 1), np.int64)
    return ids.size / cpu_s(lambda: add_load(ids, counts))


def decode_rate(path: Path) -> float:
    """Return selections per CPU second of reading and checking the ids of a file, with nothing counted."""
    stream = TraceStream(path)

    def run() -> None:
        for _ in stream.batches():
            pass

    size = stream.num_rows * stream.header.num_layers * stream.header.top_k
    return size / cpu_s(run, 1)


@dataclass(frozen=True)
class Peak:
    """What streaming a file took: bytes of the trace's ids, and the peak of resident memory.

    ``base_bytes`` is the peak after the same work on a short file, so with everything imported and compiled;
    ``anonymous_bytes`` leaves out mapped files (the scratch file of `stats`), the largest of samples taken every few
    milliseconds. Linux only.
    """

    work: str
    id_bytes: int
    base_bytes: int
    peak_bytes: int
    anonymous_bytes: int
    largest_batch: int
    cpu_s: float


_KIB = 1024


def peak_now(work: str, short: Path, large: Path) -> Peak:
    """Do `work` ("reduce" or "stats") on a short and then on a large file in this process, and return the peak."""
    stream = TraceStream(large)
    sampler = _Sampler()
    _work(work, short)
    base, start = _peak_bytes(), time.process_time()
    with sampler:
        batch = _work(work, large)
    head = stream.header
    return Peak(work, 2 * stream.num_rows * head.num_layers * head.top_k, base, _peak_bytes(), sampler.largest, batch,
                time.process_time() - start)


def streaming_peak(work: str, short: Path, large: Path) -> Peak:
    """Return `peak_now` of a fresh process."""
    done = subprocess.run([sys.executable, __file__, work, str(short), str(large)], check=True, capture_output=True,
                          text=True)
    return Peak(**json.loads(done.stdout))


def _work(work: str, path: Path) -> int:
    if work == "reduce":
        return reduce_trace(path, ["load", "transitions", "lags"]).largest_batch
    from moesim.traces import stats

    stats.IN_MEMORY_SELECTIONS = 0
    stats.file_stats(path, seed=SEED)
    return 0


def _peak_bytes() -> int:
    return _status("VmHWM")  # of this process alone; the peak of `getrusage` starts with that of its parent


def _status(name: str) -> int:
    """Return a number of bytes from this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * _KIB for line in lines if line.startswith(f"{name}:"))


class _Sampler:
    """Reads the anonymous resident memory of this process (Linux) every few milliseconds."""

    INTERVAL_S = 0.005

    def __init__(self) -> None:
        import threading

        self.largest, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(self.INTERVAL_S):
            self.largest = max(self.largest, _status("RssAnon"))

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


if __name__ == "__main__":  # the fresh process of `streaming_peak`
    print(json.dumps(dataclasses.asdict(peak_now(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))))
