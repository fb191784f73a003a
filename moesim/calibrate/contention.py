"""How much slower copies are beside compute, and compute beside copies: out of a profile's `contention` tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moesim.hardware.profile import CONTENTION, GROUPED_FFN, CalibrationProfile, MeasuredTable
from moesim.hardware.tables import TableFit


@dataclass(frozen=True)
class Contention:
    """Seconds of one size alone and beside the other side; `source` says whether the former was measured there."""

    what: str
    dtype: str
    axes: tuple[str, ...]
    size: tuple[float, ...]
    alone_s: float
    beside_s: float
    source: str

    @property
    def ratio(self) -> float:
        """Return beside over alone."""
        return self.beside_s / self.alone_s


def contentions(profile: CalibrationProfile) -> Iterator[Contention]:
    """Yield every size of every `contention` table whose table alone is in the profile too."""
    for table in profile.tables:
        alone = _alone(profile, table) if table.op == CONTENTION else None
        if alone is None:
            continue
        fit, measured = TableFit(alone), dict(zip(alone.sizes, alone.seconds, strict=True))
        what = f"{table.device} {table.shape}" if table.axes == ("bytes",) else table.shape
        for size, seconds in zip(table.sizes, table.seconds, strict=True):
            cost = fit.lookup(size)
            # as measured, not as the fit smooths it
            yield Contention(what, table.dtype, table.axes, size, measured.get(size, cost.seconds), seconds, cost.source)


def _alone(profile: CalibrationProfile, table: MeasuredTable) -> MeasuredTable | None:
    """Return the table of the same thing alone; compute is the eager loop, whatever form costs are taken from."""
    if table.axes == ("bytes",):
        return next((one for one in profile.tables if (one.op, one.device) == ("copy", table.device)), None)
    loop = GROUPED_FFN if profile.fingerprint.get("expert_form", "loop") == "loop" else f"{GROUPED_FFN}.loop"
    return profile.find(loop, table.device, table.shape.split()[1], table.dtype)
