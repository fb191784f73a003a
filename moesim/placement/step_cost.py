"""StepCost: what one MoE layer of one step costs on a machine, as plain numbers that a solver can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StepCost:
    """Costs of one MoE layer under home-based dispatch (`lowering.step_cost.step_cost` makes it).

    Attributes:
        kernel_ns: ``(rows, groups, largest_group) -> int``, the expert kernel of one rank, overhead included.
        exchange_ns: ``float64[rank, rank] bytes -> int``, one all-to-all, overhead included.
        dispatch_token_bytes, combine_token_bytes: bytes of one token sent out and sent back.
        source: where the numbers come from (nameplate, measured ...), for the record.
    """

    kernel_ns: Callable[[int, int, int], int]
    exchange_ns: Callable[[np.ndarray], int]
    dispatch_token_bytes: float
    combine_token_bytes: float
    source: str = "nameplate"
