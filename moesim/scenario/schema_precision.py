"""The key ``precision`` of an offload point: experts in several widths."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from moesim.scenario.schema_base import Count, Part, Positive, Rows, Share, Text


class PrecisionChoice(Part):
    """Experts in several widths: HOBBIT, EdgeMoE or D2MoE (docs/precision.md).

    hobbit: `t1`, `t2`, `high_bits`, `low_bits`, `low_slots_per_layer` (None: as many as high ones), `prefetch_bits`. edgemoe:
    `widths`, `tolerable_loss`, `loss` (a file; None: the gate-weight proxy). d2moe: `widths`, `capacity`, `by`, `order`. All:
    `group_size`, `dequantize_share` (None: the method's own).
    """

    method: Literal["hobbit", "edgemoe", "d2moe"]
    t1: Share = 0.6
    t2: Share = 0.9
    high_bits: Count = 16
    low_bits: Count = 4
    low_slots_per_layer: Count | None = None
    prefetch_bits: Literal["mixed", "high", "low"] = "mixed"
    widths: Rows[Count] | None = None
    tolerable_loss: Positive = 0.02
    loss: Text | None = None
    capacity: Rows[Share] = (0.3, 0.4, 0.3)
    by: Literal["rank", "draw"] = "rank"
    order: Literal["hebf", "id"] = "hebf"
    group_size: Count | None = 128
    dequantize_share: Share | None = None

    @model_validator(mode="after")
    def _check_keys(self) -> PrecisionChoice:
        own = {"hobbit": {"t1", "t2", "high_bits", "low_bits", "low_slots_per_layer", "prefetch_bits"},
               "edgemoe": {"widths", "tolerable_loss", "loss"}, "d2moe": {"widths", "capacity", "by", "order"}}[self.method]
        foreign = sorted(self.model_fields_set - own - {"method", "group_size", "dequantize_share"})
        if foreign:
            raise ValueError(f"{foreign[0]!r} does nothing with method: {self.method}")
        return self

    @property
    def label(self) -> str:
        """A short name."""
        said = ", ".join(f"{name} {getattr(self, name)}" for name in sorted(self.model_fields_set - {"method"}))
        return f"{self.method} ({said})" if said else self.method
