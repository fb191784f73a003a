"""calibrate: measure this machine's kernels, copies, files and collectives into a profile; goes on where it stopped."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moesim.calibrate.bench import Bench, Offer, Timer
from moesim.calibrate.collective_worker import MESSAGE_BYTES
from moesim.calibrate.collectives import collective_keys, measure_collectives
from moesim.calibrate.copies import contention_benches, copy_benches, overhead_benches, routes
from moesim.calibrate.dense import dense_benches
from moesim.calibrate.experts import expert_benches, quantised_benches
from moesim.calibrate.files import ReadFile
from moesim.calibrate.fingerprint import fingerprint
from moesim.calibrate.journal import Journal
from moesim.calibrate.kernels import DTYPE_BYTES, spec_for_dtype, torch_device
from moesim.calibrate.measure import MIN_PASSES, Budget, Measurement, Progress, finished_tables, sizes_left_out
from moesim.calibrate.medians import with_residuals
from moesim.calibrate.operands import POOL_BYTES, SMALL_POOL_BYTES, Operands
from moesim.calibrate.processes import ProcessError
from moesim.calibrate.shapes import attention_shape, dense_shape, expert_shape, head_shape, router_shape, shared_shape
from moesim.errors import InputError, unknown
from moesim.hardware.profile import CalibrationProfile, TableKey
from moesim.model.spec import ModelSpec
from moesim.units import format_percent

__all__ = ["DEFAULT_SECONDS", "MAX_SECONDS", "PARTS", "calibrate", "with_residuals"]

DEFAULT_SECONDS = 120.0
MAX_SECONDS = 300.0
PARTS = ("kernels", "copies", "files", "collectives")
COLLECTIVE_SHARE = 0.25
QUIET_SHARE = 0.9
WORK_SHARE = 0.95  # the rest is for fits and files
TABLE_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    model: ModelSpec
    device: str
    dtype: str
    full: bool
    parts: tuple[str, ...]
    seed: int
    disk: Path | None

    @property
    def kind(self) -> str:
        """Return the device's kind, as hardware files name it."""
        return "gpu" if self.device == "cuda" else "cpu"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Return the dtypes in order, the main one first; float16 as the main one takes bfloat16's name, and its place."""
        others = ("float32",) if self.dtype == "float16" else tuple(DTYPE_BYTES)
        return (self.dtype, *(other for other in others if self.full and other != self.dtype))

    def table_dtype(self, dtype: str) -> str:
        """Return the name that tables have: the simulator asks for two-byte kernels as bf16."""
        return "bf16" if dtype == self.dtype == "float16" else TABLE_DTYPES[dtype]

    def header(self) -> dict[str, Any]:
        """Return what a run must share with the one that it goes on from."""
        model = spec_for_dtype(self.model, self.dtype)
        shapes = {"experts": expert_shape(model), "router": router_shape(model), "attention": attention_shape(model),
                  "shared experts": shared_shape(model), "dense": dense_shape(model), "head": head_shape(model)}
        return {"model": self.model.name, "shapes": shapes, "dtype": self.dtype, "full": self.full, "parts": list(self.parts),
                "seed": self.seed, "machine": fingerprint(self.device)}


@dataclass
class Rig:
    """Benchmarks that are set up, what could not be, and what must be closed at the end."""

    benches: list[Bench] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, offer: Offer) -> None:
        """Take a part's benchmarks."""
        self.benches += offer.benches
        self.notes += offer.notes


def calibrate(
    model: ModelSpec,
    *,
    device: str = "auto",
    seconds: float = DEFAULT_SECONDS,
    seed: int = 0,
    dtype: str = "float32",
    full: bool = False,
    parts: Sequence[str] = PARTS,
    partial: Path | None = None,
    disk: Path | None = None,
    progress: Progress | None = None,
) -> CalibrationProfile:
    """Measure this machine with a model's shapes and return a profile with held-out residuals.

    One thread per device, as the torch executor uses. Every case runs once per pass, in a new random order each time;
    the first pass warms up and is dropped; sizes are added around regime breaks. `seconds` count from the call on,
    with setting up, and over all runs that went on from one another. Tables have no size of fewer than three runs.

    Args:
        full: also the other dtypes, and weights of 8 and 4 bits, where torch has them here.
        parts: of `PARTS`; copies beside compute need both kernels and copies.
        partial: a file that keeps every run; if it exists, its runs are taken up. The caller deletes it.
        disk: the folder whose disk is read (None: the system's temporary folder).

    Raises:
        InputError: a device that is not there, an unknown dtype or part, too little time, more than five minutes, or a
            partial file of another machine, model or command.
        MissingDependencyError: torch is not installed.
    """
    if not 0 < seconds < math.inf:
        raise InputError(f"calibrate: seconds must be positive, got {seconds}")
    if seconds > MAX_SECONDS:
        raise InputError(f"calibrate: at most {MAX_SECONDS:g} s, got {seconds:g}")
    plan = Plan(model, torch_device(device), dtype, full, _checked(parts), seed, disk)
    spec_for_dtype(model, dtype)
    start = time.perf_counter()
    rig, tell = Rig(), progress or (lambda *_: None)
    with _one_thread(), Journal(partial, plan.header()) as journal:
        together, spent_s = "collectives" in plan.parts, journal.spent_s
        alone_s = seconds * (1.0 - COLLECTIVE_SHARE * together)
        if plan.parts != ("collectives",):
            with _set_up(plan, rig):
                budget = Budget(seconds, alone_s, start + WORK_SHARE * (alone_s - spent_s))
                timer = Timer(plan.device)
                Measurement(timer, journal, budget, seed, tell).run(rig.benches)
                _note_busy(timer, rig)
        if together:
            _collectives(plan, journal, start + WORK_SHARE * (seconds - spent_s), rig, tell)
            journal.spend(seconds)
    return _profile(plan, journal, rig)


def _checked(parts: Sequence[str]) -> tuple[str, ...]:
    for part in parts:
        if part not in PARTS:
            raise unknown("part of a calibration", part, PARTS)
    if not parts:
        raise InputError(f"calibrate: no part to measure; parts: {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in parts)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _collectives(plan: Plan, journal: Journal, until: float, rig: Rig, tell: Progress) -> None:
    """Measure each group of ranks that the journal does not have yet; a group that fails is noted, and the rest goes on."""
    groups = collective_keys(plan.device)
    if not groups:
        rig.notes.append("collectives are left out: they need more than one GPU")
    wanted = {group: keys for group, keys in groups.items() if not all(_has_collective(journal, key) for key in keys)}
    for done, (backend, ranks) in enumerate(wanted):
        tell("collectives", done, len(wanted))
        try:
            left_s = (until - time.perf_counter()) / (len(wanted) - done)
            for run in measure_collectives(backend, ranks, left_s, plan.seed):
                journal.add(*run)
        except ProcessError as error:
            rig.notes.append(f"collectives of {ranks} ranks did not end well, and may lack sizes: {error}")
        journal.flush()
    tell("collectives", max(1, len(wanted)), max(1, len(wanted)))


def _note_busy(timer: Timer, rig: Rig) -> None:
    if timer.core_share < QUIET_SHARE:
        rig.notes.append(f"this machine was busy: kernels had {format_percent(timer.core_share)} of a core while they were timed, so "
                         "times are too long and breaks may be false; measure again when it is quiet")


def _has_collective(journal: Journal, key: TableKey) -> bool:
    return journal.num_runs(key, (float(MESSAGE_BYTES[-1]),)) >= MIN_PASSES


@contextlib.contextmanager
def _set_up(plan: Plan, rig: Rig) -> Iterator[None]:
    """Fill the rig with the benchmarks of this process."""
    main = _kernels(plan, rig) if "kernels" in plan.parts else None
    if "copies" in plan.parts:
        ways = routes(plan.device)
        rig.benches += copy_benches(plan.device, ways)
        if main is None:
            rig.notes.append("copies beside compute are left out: they need the part 'kernels'")
        else:
            rig.benches += contention_benches(main, plan.kind, plan.table_dtype(plan.dtype), ways)
    if "files" not in plan.parts:
        yield
        return
    with contextlib.closing(ReadFile(plan.disk)) as file:
        rig.add(file.offer())
        yield


def _kernels(plan: Plan, rig: Rig) -> Operands:
    """Add the kernels of every dtype; returns the main dtype's operands."""
    if plan.dtype == "float16":
        rig.notes.append("float16 times are called bf16, as the simulator asks for two-byte kernels")
    found = {}
    for dtype in plan.dtypes:
        main, name = dtype == plan.dtype, plan.table_dtype(dtype)
        ops = found[dtype] = Operands(plan.model, plan.device, dtype, plan.seed, POOL_BYTES if main else SMALL_POOL_BYTES)
        rig.add(expert_benches(ops, plan.kind, name, main=main))
        rig.add(dense_benches(ops, plan.kind, name))
        if plan.full and name == "bf16":
            rig.add(quantised_benches(ops, plan.kind, name))
    rig.benches += overhead_benches(plan.device, plan.kind)
    return found[plan.dtype]


def _profile(plan: Plan, journal: Journal, rig: Rig) -> CalibrationProfile:
    tables = finished_tables(journal)
    if not tables:
        reasons = "; ".join(rig.notes) or "nothing was run three times"
        raise InputError(f"calibrate: nothing was measured: {reasons}")
    facts = {"expert_form": "loop", "dtypes": list(plan.dtypes), "parts": list(plan.parts), "notes": rig.notes,
             "left_out": sizes_left_out(journal, rig.benches)}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return CalibrationProfile(f"{plan.model.name} {plan.dtype} {plan.device}", tables, fingerprint(plan.device) | facts, when,
                              plan.seed)
