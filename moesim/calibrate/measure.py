"""The measurement: warm up, then every case in a new random order, pass after pass, with new sizes around regime breaks."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moesim.calibrate.bench import Bench, Case, Size, Timer, case_of
from moesim.calibrate.journal import Journal
from moesim.calibrate.medians import table_of_runs, with_residuals
from moesim.calibrate.refine import refined_sizes
from moesim.errors import InputError
from moesim.hardware.profile import MeasuredTable, TableKey

Progress = Callable[[str, float, float], None]
MIN_PASSES = 3
SPARE_PASSES = 3
WARM_UP_PASSES = 2
REFINE_SHARE = 0.25
REFINE_AT_ONCE = 12
REFINE_COST = 0.01
MIN_SIZES = 2
NOT_REFINED = ("file_read", "contention", "launch", "hand_over", "synchronise")


class Budget(NamedTuple):
    """Seconds that were asked for, those of them for this measurement, and the `time.perf_counter()` at which they are over."""

    asked_s: float
    seconds: float
    until: float


class Measurement:
    """Runs cases until the time is up.

    Each table gets its share of the time: cases are run once, the cheapest of each table first (two of
    every table, then that of the table furthest behind its share), as long as one pass takes a sixth of the time that is left; costlier cases are left out. That
    first run warms up and is dropped. Then all of them run in a new random order each pass, so that a drift of the
    machine touches all sizes alike.

    Args:
        journal: takes every run. tell: hears the progress.
    """

    def __init__(self, timer: Timer, journal: Journal, budget: Budget, seed: int, tell: Progress) -> None:
        self._timer, self._journal, self._budget, self._tell = timer, journal, budget, tell
        self._random = random.Random(seed)
        self._refined_s = 0.0
        self._cases: list[Case] = []

    @property
    def left_s(self) -> float:
        """Return the seconds that are left."""
        return self._budget.until - time.perf_counter()

    def run(self, benches: Sequence[Bench]) -> None:
        """Measure.

        Raises:
            InputError: so little time that a table would have fewer than two sizes.
        """
        self._cases = self._warm_up(benches)
        self._check(benches)
        passes, due = 0, MIN_PASSES
        while self._cases and self._pass(self._cases):
            passes += 1
            if passes >= due:
                self._refine(benches)
                due = 2 * passes
        self._note(self._budget.seconds)

    def _warm_up(self, benches: Sequence[Bench]) -> list[Case]:
        """Return the cases that fit: a pass over them takes a sixth of the time, and to find them at most a third.

        A case is not tried if its table's last two foretell, as a geometric series, that it would not fit.
        """
        allowed, cases, total = self.left_s / (MIN_PASSES + SPARE_PASSES), [], 0.0
        until = time.perf_counter() + WARM_UP_PASSES * allowed
        waiting = [(False, 0.0, place, 0, 0.0, 0.0) for place in range(len(benches))]
        while waiting and time.perf_counter() < until:
            extra, used, place, done, last, foretold = heapq.heappop(waiting)
            bench = benches[place]
            if extra and total + foretold > allowed:
                continue  # the table ends here: what follows costs more
            case = case_of(bench, bench.sizes[done])
            if done == 0:
                self._timer.seconds(case)  # the first run of a kernel sets it up
            taken = self._time(case)
            if extra and total + taken > allowed:
                continue
            cases.append(case)
            total += taken
            if done + 1 < len(bench.sizes):
                foretold = taken * max(1.0, taken / last) if last else taken
                heapq.heappush(waiting, (done + 1 >= MIN_SIZES, used + taken / bench.weight, place, done + 1, taken, foretold))
        return cases

    def _check(self, benches: Sequence[Bench]) -> None:
        kept = {bench.key: set(self._journal.runs.get(bench.key, ())) for bench in benches}
        for case in self._cases:
            kept[case.bench.key].add(case.size)
        if any(len(kept[bench.key]) < min(MIN_SIZES, len(bench.sizes)) for bench in benches):
            count = sum(len(bench.sizes) for bench in benches)
            raise InputError(
                f"calibrate: {self._budget.asked_s:g} s are too few: one pass over {count} cases had done {len(self._cases)} when a "
                "third of the time was gone; give more seconds, fewer --parts or a smaller model")

    def _time(self, case: Case) -> float:
        """Run a case and return how long it took, preparations included."""
        start = time.perf_counter()
        self._timer.seconds(case)
        return time.perf_counter() - start

    def _sample(self, case: Case) -> None:
        self._journal.add(case.bench.key, case.size, self._timer.seconds(case))
        self._note(self._budget.seconds - self.left_s)

    def _note(self, spent_s: float) -> None:
        spent_s = min(spent_s, self._budget.seconds)
        self._journal.spend(spent_s)
        self._tell("calibrating", spent_s, self._budget.seconds)

    def _pass(self, cases: list[Case]) -> bool:
        """Run every case once in a new order; returns False when the time was up before the end."""
        self._random.shuffle(cases)
        for case in cases:
            if self.left_s <= 0:
                return False
            self._sample(case)
        return True

    def _refine(self, benches: Sequence[Bench]) -> None:
        """Measure sizes inside the gaps that hold a break, beside their neighbours, until none is left or a quarter of the time."""
        looked_at = list(benches)
        while looked_at and self._refined_s < REFINE_SHARE * self._budget.seconds and self.left_s > 0:
            start = time.perf_counter()
            found = [(bench, *wanted) for bench in looked_at for wanted in self._wanted(bench)][:REFINE_AT_ONCE]
            fresh = [case for bench, size, _ in found if (case := self._affordable(bench, size))]
            around = {(bench.key, size): bench for bench, _, both in found for size in both}
            known = [case for case in self._cases if (case.bench.key, case.size) in around]
            for _ in range(MIN_PASSES):
                self._pass(fresh + known)
            self._cases += fresh
            looked_at = list({case.bench.key: case.bench for case in fresh}.values())
            self._refined_s += time.perf_counter() - start

    def _wanted(self, bench: Bench) -> list[tuple[Size, tuple[Size, Size]]]:
        table = self.table(bench.key)
        if self.left_s <= 0 or table is None or bench.key.op in NOT_REFINED:
            return []
        known = {case.size for case in self._cases if case.bench.key == bench.key}
        return [wanted for wanted in refined_sizes(table) if wanted[0] not in known]

    def _affordable(self, bench: Bench, size: Size) -> Case | None:
        """Return a new case, warmed up, if its runs take no more than a hundredth of the time that is left."""
        case = case_of(bench, size)
        return case if self._time(case) * MIN_PASSES < REFINE_COST * self.left_s else None

    def table(self, key: TableKey) -> MeasuredTable | None:
        """Return the table of what was run often enough; None if nothing was."""
        return _table(self._journal, key)


def finished_tables(journal: Journal) -> tuple[MeasuredTable, ...]:
    """Return every table of a journal with its held-out residuals, in order."""
    tables = (_table(journal, key) for key in sorted(journal.runs))
    return tuple(with_residuals(table) for table in tables if table is not None)


def _table(journal: Journal, key: TableKey) -> MeasuredTable | None:
    runs = {size: values for size, values in journal.runs.get(key, {}).items() if len(values) >= MIN_PASSES}
    return table_of_runs(key, runs) if runs else None


def sizes_left_out(journal: Journal, benches: Sequence[Bench]) -> dict[str, int]:
    """Return how many sizes of each table there was no time for, by a sentence on it."""
    counts = {bench.key: sum(journal.num_runs(bench.key, size) < MIN_PASSES for size in bench.sizes) for bench in benches}
    return {f"{key.op} {key.device} {key.shape} {key.dtype}".rstrip() + ": sizes that there was no time for": count
            for key, count in counts.items() if count}
