"""What a sweep varies: ``KEY=VALUES`` axes over the machine's numbers and over the keys of a point."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.errors import InputError, did_you_mean
from moesim.hardware.spec import HardwareSpec
from moesim.hardware.vary import hardware_keys
from moesim.scenario.schema import OffloadStudy, Point, PointBlock

Value = str | int | float
EFFICIENCY = "route_efficiency"
POINT_KEYS = tuple(field.name for field in dataclasses.fields(Point))
_RANGE = re.compile(r"(lin|log)\(([^,()]+),([^,()]+),([^,()]+)\)$")


@dataclass(frozen=True)
class Axis:
    """One key and the values that it takes, in order."""

    key: str
    values: tuple[Value, ...]


def parse_axis(text: str) -> Axis:
    """Return the axis of ``KEY=a,b,c``, ``KEY=lin(first,last,count)`` or ``KEY=log(first,last,count)``.

    Raises:
        InputError: no ``=``, no value, a value twice, or a range that is none.
    """
    key, sign, rest = text.partition("=")
    if not sign or not key.strip() or not rest.strip():
        raise InputError(f"--vary {text!r}: expected KEY=VALUE,VALUE,... or KEY=log(FIRST,LAST,COUNT)")
    found = _RANGE.match(rest.replace(" ", ""))
    values = _range(text, *found.groups()) if found else tuple(_value(part.strip()) for part in rest.split(","))
    if len(set(values)) < len(values) or "" in values:
        raise InputError(f"--vary {text!r}: a value is empty or named twice")
    return Axis(key.strip(), values)


def _value(text: str) -> Value:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else text


def _range(text: str, kind: str, first: str, last: str, count: str) -> tuple[float, ...]:
    low, high, number = _value(first), _value(last), _value(count)
    if isinstance(low, str) or isinstance(high, str) or not isinstance(number, int) or number < 2:
        raise InputError(f"--vary {text!r}: {kind}(first, last, count) needs two numbers and a count of at least 2")
    if kind == "log" and not (low > 0 and high > 0):
        raise InputError(f"--vary {text!r}: log(...) needs positive numbers")
    shares = [place / (number - 1) for place in range(number)]
    if kind == "lin":
        return tuple(low + (high - low) * share for share in shares)
    inner = (math.exp(math.log(low) + (math.log(high) - math.log(low)) * share) for share in shares[1:-1])
    return (float(low), *inner, float(high))


def check_axes(axes: Sequence[Axis], hardware: HardwareSpec, *, points: bool, measured: bool) -> None:
    """Raise InputError for a key that cannot be varied here.

    Args:
        points: whether the study has points, whose keys then are axes too.
        measured: whether measured tables are in use; they, not the varied numbers, would decide.
    """
    machine = [EFFICIENCY, *hardware_keys(hardware)]
    known = [*machine, *(POINT_KEYS if points else ())]
    for place, axis in enumerate(axes):
        if axis.key not in known:
            hint = did_you_mean(axis.key, known) or f" Some that can: {', '.join(known[:6])} ..."
            raise InputError(f"--vary {axis.key}: neither a number of hardware {hardware.name!r} nor a key of a point.{hint}")
        if axis.key in (other.key for other in axes[:place]):
            raise InputError(f"--vary {axis.key} is given twice")
        if axis.key in machine and measured:
            raise InputError(f"--vary {axis.key}: the study's profile has measured times, which this number would not change; "
                             "leave out `profile` for a what-if on the machine")
        wrong = [value for value in axis.values if axis.key in machine and isinstance(value, str)]
        if wrong:
            raise InputError(f"--vary {axis.key}: expected numbers, got {wrong[0]!r}")


def swept_points(study: OffloadStudy, axes: Iterable[Axis]) -> list[Point]:
    """Return the study's points with the point keys among `axes` in place of their own values, each once.

    Raises:
        InputError: a value that a point cannot take.
    """
    from pydantic import ValidationError

    own: dict[str, Any] = {axis.key: list(axis.values) for axis in axes if axis.key in POINT_KEYS}
    if not own:
        return study.expand()
    try:
        blocks = [PointBlock.model_validate(block.model_dump(exclude_unset=True) | own) for block in study.points]
    except ValidationError as error:
        first = error.errors()[0]
        key = next((str(part) for part in first["loc"] if part in own), "/".join(own))
        raise InputError(f"--vary {key}: {first['msg'].removeprefix('Value error, ')}") from None
    return list(dict.fromkeys(point for block in blocks for point in block.expand()))


def machine_values(axes: Iterable[Axis]) -> list[dict[str, float]]:
    """Return every combination of the machine's varied numbers; one empty one where none is varied."""
    own = [axis for axis in axes if axis.key not in POINT_KEYS]
    rows = itertools.product(*(axis.values for axis in own))
    return [{axis.key: float(value) for axis, value in zip(own, row, strict=True)} for row in rows]
