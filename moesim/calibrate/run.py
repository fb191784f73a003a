"""calibrate: time every case in random order, pass after pass, until the time is up; fit; report residuals."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime

import numpy as np

from moesim.calibrate.bench import Case, Operands, ReadFile, Timer, copy_cases, dense_cases, empty_table, expert_cases
from moesim.calibrate.fingerprint import fingerprint
from moesim.calibrate.kernels import SPEC_DTYPES, spec_for_dtype, torch_device
from moesim.calibrate.shapes import expert_shape
from moesim.errors import InputError
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.tables import TableFit
from moesim.model.spec import ModelSpec

Progress = Callable[[str, float, float], None]
MIN_PASSES = 3
MAX_SECONDS = 180.0


def calibrate(
    model: ModelSpec,
    *,
    device: str = "auto",
    seconds: float = MAX_SECONDS,
    seed: int = 0,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> CalibrationProfile:
    """Measure this machine with a model's shapes and return a profile with held-out residuals.

    One thread per device, as the torch executor uses. Every case runs once per pass, in a new random order
    each time, so that a drift of the machine touches all sizes alike; the first pass warms up and is dropped.

    Raises:
        InputError: a device that is not there, an unknown dtype, too little time for three passes.
        MissingDependencyError: torch is not installed.
    """
    if not seconds > 0:
        raise InputError(f"calibrate: seconds must be positive, got {seconds}")
    device = torch_device(device)
    import torch

    tell = progress or (lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    read_file = ReadFile()
    try:
        with torch.no_grad():
            cases = _cases(spec_for_dtype(model, dtype), device, dtype, seed, read_file)
            samples = _measure(cases, Timer(device), seconds, seed, tell)
    finally:
        read_file.close()
        torch.set_num_threads(threads)
    tables = tuple(with_residuals(table) for table in _tables(cases, samples))
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return CalibrationProfile(f"{model.name} {dtype} {device}", tables, fingerprint(device), when, seed)


def _cases(model: ModelSpec, device: str, dtype: str, seed: int, read_file: ReadFile) -> list[Case]:
    kind = "gpu" if device == "cuda" else "cpu"
    operands = Operands(model, device, dtype, seed)
    name = SPEC_DTYPES[dtype]
    cases = list(expert_cases(operands, kind, expert_shape(model), name))
    if model.attention.kind == "gqa":
        cases += dense_cases(operands, kind, name)
    return cases + list(copy_cases(device)) + list(read_file.cases())


def _measure(cases: list[Case], timer: Timer, seconds: float, seed: int, tell: Progress) -> dict[int, list[float]]:
    """Return seconds by case; pass after pass until `seconds` are spent."""
    order, shuffle = list(range(len(cases))), random.Random(seed)
    samples: dict[int, list[float]] = defaultdict(list)
    start, passes = time.perf_counter(), 0
    while passes <= MIN_PASSES or time.perf_counter() - start < seconds:
        shuffle.shuffle(order)
        for done, place in enumerate(order):
            samples[place].append(timer.seconds(cases[place]))
            spent = time.perf_counter() - start
            tell("calibrating", min(spent, seconds), seconds)
            if spent > seconds and passes > MIN_PASSES:
                break
            if spent > 2 * seconds and passes <= 1:
                raise InputError(
                    f"calibrate: {seconds:g} s are too few: one pass over {len(cases)} cases had done "
                    f"{done} after {spent:.3g} s; give more seconds or a smaller model"
                )
        passes += 1
    tell("calibrating", seconds, seconds)
    return {place: values[1:] for place, values in samples.items()}


def _tables(cases: list[Case], samples: dict[int, list[float]]) -> list[MeasuredTable]:
    grouped: dict[tuple, list] = defaultdict(list)
    for place, case in enumerate(cases):
        values = np.asarray(samples[place])
        low, middle, high = np.percentile(values, [25, 50, 75])
        size = tuple(float(part) for part in case.size)
        grouped[case.table].append((size, float(middle), float((high - low) / middle), len(values)))
    return [empty_table(table, rows) for table, rows in grouped.items()]


def with_residuals(table: MeasuredTable) -> MeasuredTable:
    """Fit on every second size, look up the others, and note the median and largest relative error.

    The first and last sizes are kept in the fit, so that nothing is extrapolated. Tables of fewer than four sizes
    stay without a residual.
    """
    count = len(table.sizes)
    held = [place for place in range(1, count - 1) if place % 2]
    if count < 4:
        return table
    kept = [place for place in range(count) if place not in held]
    fit = TableFit(
        dataclasses.replace(
            table,
            sizes=tuple(table.sizes[p] for p in kept),
            seconds=tuple(table.seconds[p] for p in kept),
            spread=(),
            samples=(),
        )
    )
    errors = [abs(fit.lookup(table.sizes[p]).seconds - table.seconds[p]) / table.seconds[p] for p in held]
    return dataclasses.replace(table, residual=float(np.median(errors)), residual_max=float(np.max(errors)))
