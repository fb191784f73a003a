"""Which sizes to measure next: the middle of every gap that holds a regime break, until it is as narrow as it can be."""

from __future__ import annotations

import math

from moesim.calibrate.breaks import Size, breaks_by_line
from moesim.hardware.profile import MeasuredTable
from moesim.units import KIB

NARROW_BYTES = 1.1
STEP_BYTES = 4 * KIB


def refined_sizes(table: MeasuredTable) -> list[tuple[Size, tuple[Size, Size]]]:
    """Return new sizes, each with the two measured ones around it; the largest breaks first, each size once."""
    found: dict[Size, tuple[float, tuple[Size, Size]]] = {}
    for line, broken in breaks_by_line(table):
        axis = table.axes.index(line.name.partition(",")[0])
        value = middle(table.axes[axis], broken.low[axis], broken.high[axis])
        if value is not None:
            found.setdefault(line.at(value), (abs(math.log(broken.factor)), (broken.low, broken.high)))
    ordered = sorted(found.items(), key=lambda item: (-item[1][0], item[0]))
    return [(size, around) for size, (_, around) in ordered if size not in table.sizes]


def middle(axis: str, low: float, high: float) -> int | None:
    """Return a whole number between two (their geometric mean; for bytes whole pages), or None where they are close."""
    value = round(math.sqrt(low * high))
    if axis == "bytes":
        value = round(value / STEP_BYTES) * STEP_BYTES
        if high / low < NARROW_BYTES:
            return None
    return value if low < value < high else _inside(low, high, axis)


def _inside(low: float, high: float, axis: str) -> int | None:
    """Return the next whole number above `low` if it lies below `high`; never for bytes."""
    return int(low) + 1 if axis != "bytes" and low + 1 < high else None
