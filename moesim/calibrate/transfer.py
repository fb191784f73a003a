"""How far one shape's measured table predicts another shape's, on the same machine.

The prediction has nothing to fit: seconds of the known table at the same size, times what the nameplate says that
the new shape costs over what it says of the known one. moesim itself never does this (a shape without a table is
priced by the nameplate alone); it tells how much of a table is the machine's and the engine's, and how much the shape's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError
from moesim.hardware.cost import GROUPED_AXES, CostModel
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.tables import TableFit
from moesim.hardware.work import GroupedWork

Work = Callable[[int, int, int], GroupedWork]
GROUPED = "grouped_ffn"


@dataclass(frozen=True)
class TransferError:
    """Relative errors of a prediction: of all sizes, and of those that lie within the known table's range.

    `inside` are (median, largest) of the latter, None if there is none; `nameplate_median` is that of the nameplate
    alone, at all sizes.
    """

    num_sizes: int
    num_inside: int
    median: float
    largest: float
    inside: tuple[float, float] | None
    nameplate_median: float


def transfer_error(known: MeasuredTable, known_work: Work, held_out: MeasuredTable, held_out_work: Work,
                   hardware: CostModel, device: str) -> TransferError:
    """Predict `held_out` (an expert table over tokens, groups, largest group) from `known`; see the module.

    Args:
        known_work, held_out_work: the work of (tokens, groups, largest_group) for each shape.
        hardware: a cost model without a profile: the nameplate.
        device: the device of it that the tables belong to.

    Raises:
        InputError: tables over other axes, a cost model with a profile, sizes that no routing gives.
    """
    if known.axes != GROUPED_AXES or held_out.axes != GROUPED_AXES or hardware.profile is not None:
        raise InputError("a held-out check needs two tables over tokens, groups and largest group, and the nameplate alone")
    fit, errors, alone, inside = TableFit(known), [], [], []
    for size, measured in zip(held_out.sizes, held_out.seconds, strict=True):
        whole = (int(size[0]), int(size[1]), int(size[2]))
        old, new = (hardware.grouped_ffn(device, work(*whole)).seconds for work in (known_work, held_out_work))
        cost = fit.lookup(size)
        errors.append(abs(cost.seconds * new / old - measured) / measured)
        alone.append(abs(new - measured) / measured)
        if cost.source != "extrapolated":
            inside.append(errors[-1])
    return TransferError(len(errors), len(inside), float(np.median(errors)), float(np.max(errors)),
                         (float(np.median(inside)), float(np.max(inside))) if inside else None, float(np.median(alone)))


def expert_table(profile: CalibrationProfile) -> MeasuredTable:
    """Return a profile's one expert table; raises InputError if there is none, or no telling which."""
    tables = [table for table in profile.tables if table.op == GROUPED]
    if len(tables) != 1:
        raise InputError(f"profile {profile.name!r} has {len(tables)} tables of {GROUPED}, expected one")
    return tables[0]
