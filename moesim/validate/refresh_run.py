"""Refresh intervals for real: how far `lowering/refresh.py` is off, and whether it ranks the intervals as they are.

Every run is priced with micro-benchmarks on both sides of it: one expert's call on each thread, alone and while the other
thread computes; one expert's copy each way; and handing work to the other thread. None looks at the run.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from moesim.errors import CheckError, InputError
from moesim.lowering.refresh import RefreshCosts, RefreshProblem, RefreshResult, run_schedule, target_sets, top_sets
from moesim.lowering.refresh_policies import FixedInterval
from moesim.traces.denoise_passes import DenoisePasses
from moesim.units import ns_from_s, s_from_ns
from moesim.validate.overhead import typical
from moesim.validate.refresh_world import (
    HostThread,
    LayerWork,
    RefreshSizes,
    RefreshWorld,
    compute,
    initial_slots,
    planned_work,
    run_layer,
)

MAX_SIZES, OVERLAP_ROUNDS, SWITCH_S = 8, 3, 2e-4
ROUNDS = 12
Times = dict[tuple[str, int], list[float]]
Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class RefreshValidation:
    """Predicted against measured, interval by interval.

    Attributes:
        rows: frame of tau, refreshes, promotions, misses, predicted_s, measured_s, spread, error, pass_error: all passes of a
            run, medians over repetitions; `spread` is (max - min) / median of the measured, `error` (predicted - measured) /
            measured; `pass_error` is the median absolute error of single passes.
        kendall_tau: of the intervals' ranking, predicted against measured: 1 the same, -1 reversed.
        weights, overlap, write_back: what was run.
    """

    rows: pd.DataFrame
    kendall_tau: float
    weights: str
    overlap: bool
    write_back: bool


def validate_refresh(passes: DenoisePasses, sizes: RefreshSizes, budget: int, *, intervals: Sequence[int] = (1, 2, 4, 8),
                     overlap: bool = True, write_back: bool = False, bytes_per_s: float | None = None, repeats: int = 3,
                     rounds: int = ROUNDS, seed: int = 0, progress: Progress | None = None) -> RefreshValidation:
    """Run denoising passes under fixed refresh intervals for real, in random order, and predict each run.

    Args:
        passes: their counts decide what is computed; layers and experts must be those of `sizes`.
        budget: experts per layer in slots. bytes_per_s: paces the refresh's copies.

    Raises:
        InputError: counts of another shape, a budget out of range, fewer than two intervals.
        CheckError: after a run a slot does not hold the expert that the schedule left there.
    """
    import torch

    _check(passes, sizes, budget, intervals, repeats)
    tell = progress or (lambda *_: None)
    random = np.random.default_rng(seed)
    world = RefreshWorld(sizes, budget, int(passes.counts.max()), bytes_per_s=bytes_per_s, seed=seed)
    session = _Session(world, passes, budget, overlap, write_back)
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    with _turns(), torch.inference_mode(), HostThread() as host:
        session.run(host, intervals[0])
        before = session.probe(host, rounds, random)
        for number in range(repeats):
            for tau in random.permutation(intervals).tolist():
                measured = session.run(host, tau)
                after = session.probe(host, rounds, random)
                found[tau].append((session.predict(tau, before.merged(after)), measured))
                before = after
            tell("refresh intervals", number + 1, repeats)
    return _validation(session, {tau: found[tau] for tau in intervals})


def _check(passes: DenoisePasses, sizes: RefreshSizes, budget: int, intervals: Sequence[int], repeats: int) -> None:
    if passes.counts.shape[1:] != (sizes.num_layers, sizes.num_experts):
        raise InputError(f"refresh: the passes have {passes.counts.shape[1]} layers of {passes.counts.shape[2]} experts, the sizes "
                         f"{sizes.num_layers} of {sizes.num_experts}")
    if not 1 <= budget <= sizes.num_experts:
        raise InputError(f"refresh: budget must be 1 ... {sizes.num_experts} experts per layer, got {budget}")
    if len(set(intervals)) != len(intervals) or len(intervals) < 2 or min(intervals) < 1:
        raise InputError(f"refresh: expected two or more different intervals from 1 up, got {list(intervals)}")
    if repeats < 1:
        raise InputError(f"refresh: repeats must be at least 1, got {repeats}")


@contextmanager
def _turns() -> Iterator[None]:
    """Two threads compute, one core each, and soon get their turns in Python."""
    import torch

    threads, interval_s = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval_s)


@dataclass
class RefreshTimes:
    """Seconds by (``gpu``, ``cpu``, ``in``, ``out`` or ``hand``, tokens): alone, and while the other thread computes."""

    alone: Times = field(default_factory=lambda: defaultdict(list))
    beside: Times = field(default_factory=lambda: defaultdict(list))

    def merged(self, other: RefreshTimes) -> RefreshTimes:
        """Return the samples of both."""
        both = RefreshTimes()
        for mine, name in ((both.alone, "alone"), (both.beside, "beside")):
            for part in (self, other):
                for key, values in getattr(part, name).items():
                    mine[key] += values
        return both


@dataclass
class _Session:
    """One world and the passes that run in it."""

    world: RefreshWorld
    passes: DenoisePasses
    budget: int
    overlap: bool
    write_back: bool

    def __post_init__(self) -> None:
        counts = np.unique(self.passes.counts[self.passes.counts > 0])
        places = np.linspace(0, len(counts) - 1, min(MAX_SIZES, len(counts))).round().astype(int)
        self.token_sizes = [int(counts[place]) for place in dict.fromkeys(places.tolist())]
        self.most = int(counts.max())
        self._initial = self.world.pool.clone() if self.write_back else None

    def problem(self, costs: RefreshCosts) -> RefreshProblem:
        """Return the problem at these costs; nothing but experts is computed."""
        prior = np.zeros(self.passes.counts.shape[1:], np.int64)
        return RefreshProblem(self.passes, costs, self.budget, top_sets(prior, self.budget),
                              target_sets(self.passes.counts, self.budget, prior), np.zeros(self.passes.num_steps, np.int64))

    def _free(self) -> RefreshCosts:
        nothing = np.zeros(self.most + 1, np.int64)
        return RefreshCosts(nothing, nothing.copy(), 0)

    def run(self, host: HostThread, tau: int) -> np.ndarray:
        """Run all passes for real; return float64[step], seconds. Checks the slots afterwards."""
        problem = self.problem(self._free())
        work = planned_work(problem, FixedInterval(tau).schedule(problem))
        slot_of = initial_slots(problem)
        for key, slot in slot_of.items():
            self.world.slots[slot].copy_(self.world.pool[key])
        seconds = []
        for layers in work:
            start = time.perf_counter()
            for one in layers:
                run_layer(self.world, host, one, write_back=self.write_back, overlap=self.overlap)
            seconds.append(time.perf_counter() - start)
        self._check_slots(slot_of, work)
        return np.array(seconds)

    def _check_slots(self, slot_of: dict[int, int], work: list[list[LayerWork]]) -> None:
        """Raise CheckError unless each slot holds its last expert, and the slow tier what it held before."""
        import torch

        for layers in work:
            for one in layers:
                for key, slot, old in one.moves:
                    del slot_of[old]
                    slot_of[key] = slot
        for key, slot in slot_of.items():
            if not torch.equal(self.world.slots[slot], self.world.pool[key]):
                raise CheckError(f"refresh: after the run slot {slot} does not hold expert {divmod(key, self.world.sizes.num_experts)}")
        if self._initial is not None and not torch.equal(self.world.pool, self._initial):
            raise CheckError("refresh: writing back changed an expert")

    def probe(self, host: HostThread, rounds: int, random: np.random.Generator) -> RefreshTimes:
        """Run one block of micro-benchmarks: single calls in random order on random experts."""
        times = RefreshTimes()
        kinds = [(kind, tokens) for kind in ("gpu", "cpu") for tokens in self.token_sizes]
        calls = [*kinds, ("in", 0), ("out", 0), ("hand", 0)] * rounds
        for place in random.permutation(len(calls)).tolist():
            kind, tokens = calls[place]
            times.alone[kind, tokens].append(self._timed(host, kind, tokens, random))
        self._both(host, rounds, random, times.beside)
        return times

    def _timed(self, host: HostThread, kind: str, tokens: int, random: np.random.Generator) -> float:
        key, slot = int(random.integers(len(self.world.pool))), int(random.integers(len(self.world.slots)))
        if kind in ("cpu", "hand"):
            took: list[float] = []
            start = time.perf_counter()
            host.start(lambda: took.append(_call_s(self.world, tokens, key, self.world.pool) if tokens else 0.0))
            host.wait()
            return took[0] if tokens else time.perf_counter() - start
        if kind == "gpu":
            return _call_s(self.world, tokens, slot, self.world.slots)
        if kind == "out":
            self.world.slots[slot].copy_(self.world.pool[key])  # so that nothing changes
        start = time.perf_counter()
        (self.world.copy_in if kind == "in" else self.world.copy_out)(key, slot)
        return time.perf_counter() - start

    def _both(self, host: HostThread, rounds: int, random: np.random.Generator, times: Times) -> None:
        """Both threads compute at once; calls count while the other side still had calls to make."""
        order = {kind: random.permutation(self.token_sizes * rounds).tolist() for kind in ("gpu", "cpu")}
        seen: dict[str, list[tuple[float, float, int]]] = {"gpu": [], "cpu": []}
        blobs = {"gpu": self.world.slots, "cpu": self.world.pool}
        places = {kind: random.integers(len(blobs[kind]), size=len(order[kind])).tolist() for kind in order}

        def chain(kind: str) -> None:
            for tokens, place in zip(order[kind], places[kind], strict=True):
                start = time.perf_counter()
                compute(self.world, [(place, tokens)], blobs[kind])
                seen[kind].append((start, time.perf_counter(), tokens))

        host.start(lambda: chain("cpu"))
        chain("gpu")
        host.wait()
        begin, end = max(own[0][0] for own in seen.values()), min(own[-1][1] for own in seen.values())
        for kind, own in seen.items():
            for start, stop, tokens in own:
                if start >= begin and stop <= end:
                    times[kind, tokens].append(stop - start)

    def predict(self, tau: int, times: RefreshTimes) -> np.ndarray:
        """Return float64[step], the predicted seconds of each pass; how much the sides overlap comes from the schedule."""
        shares = {"gpu": 0.0, "cpu": 0.0}
        for _ in range(OVERLAP_ROUNDS):
            problem = self.problem(self._costs(times, shares))
            result = run_schedule(problem, FixedInterval(tau).schedule(problem))
            both = float(np.minimum(result.gpu_ns, result.cpu_ns).sum()) * self.overlap
            shares = {kind: both / max(1.0, float(own.sum())) for kind, own in (("gpu", result.gpu_ns), ("cpu", result.cpu_ns))}
        handed = (result.misses > 0).sum(axis=1) * ns_from_s(typical(times.alone["hand", 0]))
        total = (result.experts_ns + result.move_ns).sum(axis=1) + handed
        return np.array([s_from_ns(int(value)) for value in total])

    def _costs(self, times: RefreshTimes, shares: dict[str, float]) -> RefreshCosts:
        tables = {kind: self._table(kind, times, share) for kind, share in shares.items()}
        in_ns, out_ns = (ns_from_s(typical(times.alone[kind, 0])) for kind in ("in", "out"))
        return RefreshCosts(tables["gpu"], tables["cpu"], in_ns, out_ns * self.write_back, self.overlap)

    def _table(self, kind: str, times: RefreshTimes, share: float) -> np.ndarray:
        """Return int64[tokens], linear between the measured sizes."""
        blend = [(1 - share) * typical(times.alone[kind, size]) + share * typical(times.beside[kind, size] or
                                                                                  times.alone[kind, size])
                 for size in self.token_sizes]
        seconds = np.interp(np.arange(self.most + 1), self.token_sizes, blend)
        return np.array([0, *(ns_from_s(value) for value in seconds[1:].tolist())], np.int64)

    def result(self, tau: int) -> RefreshResult:
        """Return the schedule's counts."""
        problem = self.problem(self._free())
        return run_schedule(problem, FixedInterval(tau).schedule(problem))


def _call_s(world: RefreshWorld, tokens: int, place: int, blobs: Any) -> float:
    start = time.perf_counter()
    compute(world, [(place, tokens)], blobs)
    return time.perf_counter() - start


def _validation(session: _Session, found: dict[int, list[tuple[np.ndarray, np.ndarray]]]) -> RefreshValidation:
    from scipy.stats import kendalltau

    rows = pd.DataFrame([_row(session, tau, pairs) for tau, pairs in found.items()])
    rank = float(kendalltau(rows["predicted_s"], rows["measured_s"]).statistic)
    return RefreshValidation(rows, rank, session.world.sizes.weights, session.overlap, session.write_back)


def _row(session: _Session, tau: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    counts = session.result(tau)
    predicted, measured = (np.array([pair[side].sum() for pair in pairs]) for side in (0, 1))
    passes = np.median(np.abs([(one - other) / other for one, other in pairs]))
    middle = float(np.median(measured))
    return {"tau": tau, "refreshes": int(counts.refreshed.sum()), "promotions": int(counts.promotions.sum()),
            "misses": int(counts.misses.sum()), "predicted_s": float(np.median(predicted)), "measured_s": middle,
            "spread": float(np.ptp(measured)) / middle, "error": float(np.median((predicted - measured) / measured)),
            "pass_error": float(passes)}
