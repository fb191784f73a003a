"""What a validation of expert-parallel plans is given: the case (model, tokens, plans) and the settings."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from moesim.calibrate.kernels import DTYPE_BYTES, torch_device
from moesim.errors import InputError, unknown
from moesim.model.spec import ModelSpec
from moesim.placement.plan import PlacementPlan
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.validate.ranks_world import check_ranks_model

AUTO, PROCESSES, SEQUENTIAL = MODES = ("auto", "processes", "sequential")


@dataclass(frozen=True)
class RanksSettings:
    """How to validate.

    Attributes:
        mode: ``processes`` (one per rank, real collectives: gloo on the CPU, NCCL with a GPU for each), ``sequential`` (rank
            after rank on one device, collectives modelled), or ``auto``: processes, unless the GPUs are too few.
        device: auto, cpu or cuda. dtype: a torch name.
        repeats: how often every step runs under every plan.
        calibration_share: steps under random placements for each judged step.
        tries: how often a step is run at most in which a rank lost its core.
        timeout_s: the longest that a collective, or the silence of all ranks, may last.
        modelled_latency_s, modelled_bytes_per_s: of an all-to-all in sequential mode.

    Raises:
        InputError: a value out of range.
    """

    mode: str = AUTO
    device: str = AUTO
    dtype: str = "float32"
    repeats: int = 5
    calibration_share: float = 1.0
    tries: int = 3
    timeout_s: float = 120.0
    modelled_latency_s: float = 20e-6
    modelled_bytes_per_s: float = 50e9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode of a ranks validation", self.mode, MODES)
        if self.dtype not in DTYPE_BYTES:
            raise unknown("dtype", self.dtype, DTYPE_BYTES)
        for name in ("repeats", "tries"):
            if getattr(self, name) < 1:
                raise InputError(f"ranks validation: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("calibration_share", "timeout_s", "modelled_bytes_per_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"ranks validation: {name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.modelled_latency_s < math.inf:
            raise InputError(f"ranks validation: modelled_latency_s must not be negative, got {self.modelled_latency_s}")
        if self.seed < 0:
            raise InputError(f"ranks validation: seed must not be negative, got {self.seed}")


@dataclass(frozen=True)
class RanksCase:
    """What to validate: `steps` of `trace` under every plan; steps of `calibration_trace` are calibrated on.

    Raises:
        InputError: parts that do not fit each other, or that the real run has no kernels for.
    """

    model: ModelSpec
    trace: RoutingTrace
    steps: list[Step]
    calibration_trace: RoutingTrace
    calibration_steps: list[Step]
    plans: dict[str, PlacementPlan]

    def __post_init__(self) -> None:
        check_ranks_model(self.model)
        self.trace.check_model(self.model)
        self.calibration_trace.check_model(self.model)
        if not self.plans or not self.steps or not self.calibration_steps:
            raise InputError("ranks validation: it needs a plan, steps to judge it on, and steps to calibrate on")
        sizes = (self.num_ranks, self.model.num_moe_layers, self.model.num_experts)
        for name, plan in self.plans.items():
            if not name:
                raise InputError("ranks validation: a plan needs a name")
            if (plan.num_ranks, plan.num_layers, plan.num_experts) != sizes:
                raise InputError(
                    f"ranks validation: plan {name!r} has {plan.num_ranks} ranks, {plan.num_layers} layers x {plan.num_experts} "
                    f"experts; the first plan and the model have {sizes[0]} ranks, {sizes[1]} x {sizes[2]}")
        if self.num_ranks < 2:
            raise InputError("ranks validation: expert parallelism needs at least 2 ranks")

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return next(iter(self.plans.values())).num_ranks


def resolve(settings: RanksSettings, num_ranks: int) -> tuple[str, str]:
    """Return (mode, device) without ``auto``.

    Raises:
        InputError: processes on cuda with fewer GPUs than ranks, or no such device.
        MissingDependencyError: torch is not installed.
    """
    device = torch_device(settings.device)
    gpus = _num_gpus() if device == "cuda" else num_ranks
    if settings.mode == PROCESSES and gpus < num_ranks:
        raise InputError(f"ranks validation: {num_ranks} ranks need as many GPUs, torch sees {gpus}; "
                         "use mode sequential, or device cpu")
    if settings.mode == AUTO:
        return (PROCESSES if gpus >= num_ranks else SEQUENTIAL), device
    return settings.mode, device


def _num_gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
