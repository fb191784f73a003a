"""CalibrationProfile: measured tables with their spread and residuals, and the machine they belong to."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moesim.artifacts import read_json, write_json
from moesim.errors import InputError, unknown

SCHEMA = "moesim.profile/1"
GROUPED_FFN = "grouped_ffn"
CONTENTION = "contention"
# what `CostModel` looks up; other operations are for people and for `moesim calibrate compare`
UNPRICED_ROUTES = ("_both_ways", "_pageable")  # endings of routes that no link has
PRICED_OPS = frozenset((GROUPED_FFN, "attention", "router", "shared_expert", "dense", "head", "copy", "task_overhead"))


@dataclass(frozen=True, order=True)
class TableKey:
    """What a table holds: the first fields of `MeasuredTable`."""

    op: str
    device: str
    shape: str
    dtype: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class MeasuredTable:
    """One operation's measured seconds at rising sizes.

    `op` is what was run (``grouped_ffn``, ``attention``, ``router``, ``copy``, ``file_read``,
    ``contention``, ``task_overhead``), `device` where (a device's kind: ``cpu``, ``gpu``; for a copy the route
    ``slow_to_fast``), `shape` and `dtype` of what.

    `axes` names the columns of `sizes`: ``("tokens",)``, ``("bytes",)``, ``("tokens", "groups",
    "largest_group")``. `seconds` are medians, `spread` the interquartile range over the median,
    `samples` how many runs each. `residual` is the median relative error of the fit on sizes that were
    held out, `residual_max` the largest one.

    Raises:
        InputError: lengths that differ, sizes that do not rise (lexicographically), times not positive.
    """

    op: str
    device: str
    shape: str
    dtype: str
    axes: tuple[str, ...]
    sizes: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]
    spread: tuple[float, ...] = ()
    samples: tuple[int, ...] = ()
    residual: float | None = None
    residual_max: float | None = None

    def __post_init__(self) -> None:
        where = f"table {self.op!r} ({self.device}, {self.shape}, {self.dtype})"
        if not self.sizes or len(self.sizes) != len(self.seconds):
            raise InputError(f"{where}: {len(self.sizes)} sizes but {len(self.seconds)} times")
        if any(len(row) != len(self.axes) for row in self.sizes):
            raise InputError(f"{where}: every size needs {len(self.axes)} numbers ({', '.join(self.axes)})")
        if any(later <= earlier for earlier, later in zip(self.sizes, self.sizes[1:], strict=False)):
            raise InputError(f"{where}: sizes must rise")
        if any(not value > 0 for value in self.seconds):
            raise InputError(f"{where}: times must be positive")

    @property
    def key(self) -> TableKey:
        """Return what the table holds."""
        return TableKey(self.op, self.device, self.shape, self.dtype, self.axes)

    @property
    def report_only(self) -> bool:
        """Return whether no cost is ever taken from this table."""
        return self.op not in PRICED_OPS or (self.op == "copy" and self.device.endswith(UNPRICED_ROUTES))


@dataclass(frozen=True)
class CalibrationProfile:
    """Measured tables of one machine. `fingerprint` names device, driver, torch, threads, clocks."""

    name: str
    tables: tuple[MeasuredTable, ...]
    fingerprint: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    seed: int = 0

    def find(self, op: str, device: str, shape: str, dtype: str) -> MeasuredTable | None:
        """Return the table of exactly this operation, or None."""
        key = (op, device, shape, dtype)
        return next((t for t in self.tables if (t.op, t.device, t.shape, t.dtype) == key), None)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write ``*.profile.json``."""
        return write_json(path, SCHEMA, asdict(self))


def choose_form(profile: CalibrationProfile, form: str) -> CalibrationProfile:
    """Return the profile with another form of the expert kernels as the one that costs are taken from.

    The table in use is called ``grouped_ffn``, the others ``grouped_ffn.<form>``; the fingerprint's ``expert_form``
    names the one in use. Every table of the form that was in use is renamed, also of dtypes that the new form lacks.

    Raises:
        InputError: a form that the profile has no table of.
    """
    now = str(profile.fingerprint.get("expert_form", "loop"))
    prefix = f"{GROUPED_FFN}."
    others = {table.op.removeprefix(prefix) for table in profile.tables if table.op.startswith(prefix)}
    if form == now:
        return profile
    if form not in others:
        raise unknown(f"expert form of profile {profile.name!r}", form, {now, *others})
    names = {GROUPED_FFN: prefix + now, prefix + form: GROUPED_FFN}
    tables = tuple(replace(table, op=names.get(table.op, table.op)) for table in profile.tables)
    return replace(profile, tables=tables, fingerprint={**profile.fingerprint, "expert_form": form})


def read_profile(path: str | os.PathLike[str]) -> CalibrationProfile:
    """Read a profile; raises InputError for a file that is not one."""
    body = read_json(path, SCHEMA)
    try:
        tables = tuple(_table(row) for row in body["tables"])
        return CalibrationProfile(body["name"], tables, body["fingerprint"], body["date"], body["seed"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a calibration profile: {error}") from None


def _table(row: dict[str, Any]) -> MeasuredTable:
    tuples = {"axes": tuple(row["axes"]), "sizes": tuple(map(tuple, row["sizes"]))}
    tuples |= {key: tuple(row[key]) for key in ("seconds", "spread", "samples")}
    return MeasuredTable(**{**row, **tuples})
