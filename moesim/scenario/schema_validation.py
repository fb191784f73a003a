"""The study kind ``validation``: the sizes and the policy of a run that is predicted and measured on this machine."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from moesim.scenario.schema_base import (
    DEFAULT_PREFETCH_WIDTH,
    NO_PREFETCH,
    Count,
    Fraction,
    Miss,
    Part,
    PolicyName,
    Positive,
    PrefetcherName,
    Share,
    StudyBase,
)
from moesim.scenario.schema_offload import Point, check_recall


class ValidationModel(Part):
    """Sizes small enough to run here; experts and top-k come from the trace, layers are its first ones."""

    hidden_size: Count = 512
    expert_intermediate_size: Count = 1024
    num_layers: Count = 4
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class ValidationStudy(StudyBase):
    """The same task graph simulated, and run for real in torch on this machine."""

    kind: Literal["validation"]
    model: ValidationModel = ValidationModel()
    policy: PolicyName = "lru"
    slots_per_layer: Count
    prefetch: PrefetcherName = NO_PREFETCH
    prefetch_width: Count = DEFAULT_PREFETCH_WIDTH
    prefetch_recall: Share | None = None
    miss: Miss = "load"
    steps: Count = 48
    repeats: Count = 5
    slow_tier_bytes_per_s: Positive
    device: Literal["auto", "cpu", "cuda"] = "auto"
    calibration_seconds: Positive = 20.0
    train_fraction: Fraction = 0.5
    chunks: Count = 3

    @model_validator(mode="after")
    def _check_prefetch(self) -> ValidationStudy:
        check_recall(self.prefetch, self.prefetch_recall is not None)
        return self

    @property
    def point(self) -> Point:
        """The policy as a point."""
        width = 0 if self.prefetch == NO_PREFETCH else self.prefetch_width
        return Point(self.policy, self.slots_per_layer, self.prefetch, width, self.prefetch_recall, self.miss)
