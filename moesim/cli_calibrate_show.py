"""What ``moesim calibrate`` prints: tables, regime breaks, contention, what was left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli_common import add_row, console, new_table

if TYPE_CHECKING:
    from moesim.calibrate.breaks import Break
    from moesim.hardware.profile import CalibrationProfile, MeasuredTable

MAX_BREAKS = 12


def profile_facts(profile: CalibrationProfile, path: Path) -> dict[str, Any]:
    """Return what a program wants to know of a profile: its tables in short, breaks and contention."""
    import dataclasses

    from moesim.calibrate.contention import contentions

    keys = ("op", "device", "shape", "dtype", "residual", "residual_max", "report_only")
    tables = [{key: getattr(table, key) for key in keys} | {"num_sizes": len(table.sizes)} for table in profile.tables]
    breaks = [{"op": table.op, "device": table.device, "shape": table.shape, "dtype": table.dtype, **dataclasses.asdict(found)}
              for table, found in _breaks(profile)]
    beside = [dataclasses.asdict(one) | {"ratio": one.ratio} for one in contentions(profile)]
    return {"file": path, "name": profile.name, "fingerprint": profile.fingerprint, "tables": tables, "breaks": breaks,
            "contention": beside}


def show_profile(profile: CalibrationProfile) -> None:
    """Print the tables: how many sizes, errors at held-out sizes, the largest spread, and whether costs are taken from them."""
    from moesim.hardware.profile import CONTENTION
    from moesim.units import format_percent

    table = new_table(f"{profile.name} ({profile.date})" if profile.date else profile.name, "operation", "device", "shape",
                      "dtype", "sizes>", "fit error>", "largest>", "spread>", "costs")
    for row in profile.tables:
        if row.op == CONTENTION:
            continue
        figures = (row.residual, row.residual_max, max(row.spread, default=None))
        add_row(table, row.op, row.device, row.shape, row.dtype, len(row.sizes),
                *(None if value is None else format_percent(value) for value in figures),
                "report only" if row.report_only else "yes")
    console().print(table)


def _breaks(profile: CalibrationProfile) -> list[tuple[MeasuredTable, Break]]:
    """Return the breaks of every table that this machine's sizes were chosen for, the largest first."""
    from moesim.calibrate.breaks import find_breaks
    from moesim.calibrate.measure import NOT_REFINED

    found = [(table, one) for table in profile.tables if table.op not in NOT_REFINED for one in find_breaks(table)]
    return sorted(found, key=lambda pair: -abs(math.log(pair[1].factor)))


def show_breaks(profile: CalibrationProfile) -> None:
    """Print where times jump, and by what factor."""
    found = _breaks(profile)
    if not found:
        console().print("\nno regime breaks found", markup=False)
        return
    table = new_table("\nRegime breaks", "operation", "shape", "dtype", "along", "between>", "factor>")
    for row, one in found[:MAX_BREAKS]:
        axis = row.axes.index(one.line.partition(",")[0])
        what = row.device if row.axes == ("bytes",) else row.shape
        low, high = (_number(row.axes[axis], size[axis]) for size in (one.low, one.high))
        add_row(table, row.op, what, row.dtype, one.line, f"{low} and {high}", f"{one.factor:.2f}")
    console().print(table)
    if len(found) > MAX_BREAKS:
        console().print(f"and {len(found) - MAX_BREAKS} smaller ones (--json lists all)", markup=False)


def show_contention(profile: CalibrationProfile) -> None:
    """Print copies beside compute and compute beside copies, by size."""
    from moesim.calibrate.contention import contentions
    from moesim.units import format_seconds

    rows = list(contentions(profile))
    if not rows:
        return
    table = new_table("\nContention (beside the other side, over alone)", "what", "bytes, or tokens, groups, largest>", "alone>", "beside>", "ratio>")
    for row in rows:
        size = ", ".join(_number(axis, value) for axis, value in zip(row.axes, row.size, strict=True))
        add_row(table, f"{row.what} {row.dtype}", size, format_seconds(row.alone_s), format_seconds(row.beside_s), f"{row.ratio:.2f}")
    console().print(table)


def _number(axis: str, value: float) -> str:
    from moesim.units import format_bytes

    return format_bytes(value) if axis == "bytes" else f"{value:g}"


def show_notes(profile: CalibrationProfile) -> None:
    """Print how the numbers were come by, and what was left out."""
    out = console()
    for note in profile.fingerprint.get("notes", ()):
        out.print(f"note: {note}", soft_wrap=True, markup=False)
    left_out = profile.fingerprint.get("left_out")
    if left_out:
        table = new_table("\nLeft out", "rows>", "why")
        for reason, count in left_out.items():
            add_row(table, count, reason)
        out.print(table)
