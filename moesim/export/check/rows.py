"""Rules that every map from slots to experts has to keep."""

from __future__ import annotations

from collections.abc import Sequence

from moesim.errors import CheckError

Rows = Sequence[Sequence[int]]


def check_row(engine: str, layer: int, row: Sequence[int], num_slots: int, num_experts: int, num_ranks: int) -> None:
    """Raise CheckError unless one layer has the right width, ids in range, and a slot for every expert."""
    if len(row) != num_slots or num_slots % num_ranks:
        raise CheckError(f"{engine}: layer {layer} has {len(row)} slots; expected {num_slots}, "
                         f"a multiple of ep_size {num_ranks}")
    if any(type(expert) is not int or not 0 <= expert < num_experts for expert in row):
        raise CheckError(f"{engine}: layer {layer} holds an id outside 0 ... {num_experts - 1}")
    if missing := set(range(num_experts)) - set(row):
        raise CheckError(f"{engine}: expert {min(missing)} of layer {layer} has no slot")


def check_same(engine: str, found: Rows, planned: Rows) -> None:
    """Raise CheckError unless the rows that the engine would load are the plan's, slot by slot."""
    if len(found) != len(planned):
        raise CheckError(f"{engine}: {len(found)} MoE layers were written, the plan has {len(planned)}")
    for layer, (row, plan_row) in enumerate(zip(found, planned, strict=True)):
        if list(row) != list(plan_row):
            slot = next((slot for slot, pair in enumerate(zip(row, plan_row, strict=False)) if pair[0] != pair[1]),
                        min(len(row), len(plan_row)))
            raise CheckError(f"{engine}: slot {slot} of MoE layer {layer} is not the plan's")
