"""Kernels at sizes that were held out: calibrate on every second size of the grid, predict the others."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

from moesim.calibrate.bench import Bench, Size, Timer
from moesim.calibrate.dense import dense_benches
from moesim.calibrate.experts import expert_benches
from moesim.calibrate.journal import Journal
from moesim.calibrate.kernels import torch_device
from moesim.calibrate.measure import Budget, Measurement, finished_tables
from moesim.calibrate.operands import SMALL_POOL_BYTES, Operands
from moesim.calibrate.run import TABLE_DTYPES
from moesim.errors import InputError
from moesim.hardware.profile import GROUPED_FFN, MeasuredTable
from moesim.hardware.tables import TableFit
from moesim.model.spec import ModelSpec
from moesim.validate.campaign import check_apart
from moesim.validate.campaign_report import Outcome

HELD_OUT = ".held_out"
NAMES = {GROUPED_FFN: "expert layer", "attention": "attention"}


def kernel_outcomes(model: ModelSpec, *, dtype: str, seconds: float, number: int, seed: int, device: str = "auto") -> list[Outcome]:
    """Measure the eager expert loop and attention anew; every second size of the grid is predicted from the others.

    Both halves are measured in the same passes, in random order, as two tables; sizes that are added around regime breaks are found
    from the fitted half alone. A size beyond those that there was time to fit is not judged.

    Args:
        seconds: for all. number: of the round.

    Raises:
        InputError: no size could be judged in this time.
    """
    where = torch_device(device)
    kind, name = ("gpu" if where == "cuda" else "cpu"), TABLE_DTYPES[dtype]
    start = time.perf_counter()
    with _one_thread(), Journal(None, {}) as journal:
        ops = Operands(model, where, dtype, seed, SMALL_POOL_BYTES)
        benches = [*expert_benches(ops, kind, name, main=True).benches, *dense_benches(ops, kind, name).benches]
        halves = [split_bench(bench) for bench in benches if bench.key.op in NAMES]
        budget = Budget(seconds, seconds, start + seconds)
        Measurement(Timer(where), journal, budget, seed + number, lambda *_: None).run([half for both in halves for half in both])
        tables = {table.key: table for table in finished_tables(journal)}
    found = [outcome for fitted, judged in halves if fitted.key in tables and judged.key in tables
             for outcome in table_outcomes(tables[fitted.key], tables[judged.key],
                                           sorted({*judged.sizes} - {*tables[fitted.key].sizes}),  # a break was looked for there
                                           f"kernels: {NAMES[fitted.key.op]} {dtype}", number)]
    if not found:
        raise InputError(f"kernels: {seconds:g} s are too few to judge a size of {dtype}; give more")
    return found


def split_bench(bench: Bench) -> tuple[Bench, Bench]:
    """Return the benchmark of every second size of the grid (`held_out_sizes` are not in it), and that of the others."""
    held = held_out_sizes(bench.sizes)
    key = dataclasses.replace(bench.key, shape=bench.key.shape + HELD_OUT)
    return (dataclasses.replace(bench, sizes=tuple(size for size in bench.sizes if size not in held)),
            dataclasses.replace(bench, key=key, sizes=tuple(size for size in bench.sizes if size in held)))


def held_out_sizes(sizes: Sequence[Size]) -> set[Size]:
    """Return every second size among those of one first number, starting with the second for one and the first for the next.

    So no column of a grid is held out whole. The first and the last size of all are never held out.
    """
    ordered, held = sorted(sizes), set()
    for row, first in enumerate(sorted({size[0] for size in sizes})):
        own = [size for size in ordered if size[0] == first]
        held |= {size for place, size in enumerate(own) if (place + row) % 2}
    return held - {ordered[0], ordered[-1]}


def table_outcomes(fitted: MeasuredTable, judged: MeasuredTable, sizes: Sequence[Size], family: str, number: int) -> list[Outcome]:
    """Return predictions from one table of the sizes that another one measured; those outside its range are left out.

    Raises:
        CheckError: a size is in both.
    """
    wanted = {size: size_name(judged, size) for size in sizes}
    found = [(size, seconds) for size, seconds in zip(judged.sizes, judged.seconds, strict=True) if size in wanted]
    check_apart(judged={wanted[size]: wanted[size] for size, _ in found},
                calibrated={size_name(fitted, size): "" for size in fitted.sizes}, what="sizes")
    fit = TableFit(fitted)
    costs = [(wanted[size], fit.lookup(size), seconds) for size, seconds in found]
    return [Outcome(family, name, number, cost.seconds, seconds) for name, cost, seconds in costs if cost.source != "extrapolated"]


def size_name(table: MeasuredTable, size: Size) -> str:
    """Return a size in words."""
    return ", ".join(f"{axis} {value:g}" for axis, value in zip(table.axes, size, strict=True))


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
