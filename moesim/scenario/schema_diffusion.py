"""The study kind ``diffusion``: denoising passes, the policies that refresh a GPU's experts, and coresets."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, Field, model_validator

from moesim.errors import InputError
from moesim.scenario.schema_base import (
    SIZE,
    TEXT,
    Count,
    Fraction,
    HardwareChoice,
    Natural,
    Part,
    Positive,
    Rows,
    Share,
    StudyBase,
    Text,
    as_value_error,
    grid,
)

INTERVALS, SKI_RENTAL = ("interval", "interval-released"), "ski-rental"
Schedule = Literal["static", "linear-reverse", "linear"]
EXPERT_CHOICE = "expert-choice"
_PARAMETER = {"des-seq": "k", "des-vote": "beta", "dmoe": "p", EXPERT_CHOICE: "schedule"}
_ONLY = {key: method for method, key in _PARAMETER.items()} | {"k_min": EXPERT_CHOICE, "k_max": EXPERT_CHOICE}
_POSITIVE = {"type": "number", "exclusiveMinimum": 0}
_PART = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


def _find_refresh_policy(name: str) -> object:
    from moesim.lowering.refresh_rows import check_policy

    check_policy(name)
    return name


RefreshPolicyName = Annotated[str, AfterValidator(as_value_error(_find_refresh_policy))]
PositivePart = Annotated[float, Field(gt=0, le=1)]


class DiffusionSystem(Part):
    """The computing device and the experts' memory as in `OffloadSystem`, and what a refresh costs.

    `write_back`: evicted experts are copied back to the host. `overlap`: CPU and GPU compute at the same time.
    """

    device: Text | None = None
    slow_memory: Text | None = None
    write_back: bool = False
    overlap: bool = True


class GeneratedPasses(Part):
    """Denoising passes to make up (`moesim.traces.denoise.DenoiseSettings`); None: the generator's default."""

    num_requests: Count = 4
    blocks_per_request: Count | None = None
    accept: Share | None = None
    routed: Literal["block", "masked", "prefix"] | None = None
    popularity_share: Share | None = None
    request_share: Share | None = None
    block_share: Share | None = None
    drift: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    drift_power: Positive | None = None


class DenoiseChoice(Part):
    """Which denoising passes: `generate` makes them up, without it they are those of the scenario's trace.

    `block_size`, `prompt_tokens` and `mask_token_id` (a recorded trace's only) None: what the generator does by default,
    or what the trace notes about itself.
    """

    block_size: Count | None = None
    prompt_tokens: Natural | None = None
    mask_token_id: int | None = None
    generate: GeneratedPasses | None = None

    @model_validator(mode="after")
    def _check(self) -> DenoiseChoice:
        if self.generate is None:
            return self
        if self.mask_token_id is not None:
            raise ValueError("'mask_token_id' belongs to a recorded trace; 'generate' has its own")
        try:
            self.settings(1, 256, 8)
        except InputError as error:
            raise ValueError(str(error)) from None
        return self

    def settings(self, num_layers: int, num_experts: int, top_k: int) -> Any:
        """Return the `DenoiseSettings` of `generate` for a model of this shape."""
        from moesim.traces.denoise import DenoiseSettings

        assert self.generate is not None
        own = self.generate.model_dump(exclude_none=True) | {"block_size": self.block_size, "prompt_tokens": self.prompt_tokens}
        return DenoiseSettings(num_layers=num_layers, num_experts=num_experts, top_k=top_k,
                               **{key: value for key, value in own.items() if value is not None})


class RefreshPoint(NamedTuple):
    """One run: a policy with so many experts per layer on the GPU; `tau` and `factor` None where it has none."""

    slots_per_layer: int
    policy: str
    tau: int | None = None
    factor: float | None = None


class RefreshChoice(Part):
    """When to refresh a GPU's experts: policies crossed with slots; `tau` and `factor` only multiply policies that have one.

    Popularity, and what a trained policy knows, comes from `train_fraction` of the requests; the others are run.
    `reset_at_block`: whether ``interval`` counts anew in each block.
    """

    slots_per_layer: Annotated[Rows[Count], *grid(SIZE)]
    policy: Annotated[Rows[RefreshPolicyName], *grid(TEXT)] = (
        "static", "every-step", "interval-trained", "pattern-trained", "plan-trained", "optimal")
    tau: Annotated[Rows[Count], *grid(SIZE)] = (4,)
    factor: Annotated[Rows[Positive], *grid(_POSITIVE)] = (1.0,)
    reset_at_block: bool = True
    train_fraction: Fraction = 0.5

    @model_validator(mode="after")
    def _check_used(self) -> RefreshChoice:
        users = {"tau": INTERVALS, "factor": (SKI_RENTAL,), "reset_at_block": INTERVALS[:1]}
        for key, policies in users.items():
            if key in self.model_fields_set and not set(policies) & set(self.policy):
                raise ValueError(f"{key!r} belongs to policy {' or '.join(policies)}, which is not among them")
        return self

    def expand(self) -> list[RefreshPoint]:
        """Return the points, each once: for each number of slots all policies in order."""
        points = [point for slots, policy in itertools.product(self.slots_per_layer, self.policy)
                  for point in self._of(slots, policy)]
        return list(dict.fromkeys(points))

    def _of(self, slots: int, policy: str) -> list[RefreshPoint]:
        if policy in INTERVALS:
            return [RefreshPoint(slots, policy, tau=tau) for tau in self.tau]
        if policy == SKI_RENTAL:
            return [RefreshPoint(slots, policy, factor=factor) for factor in self.factor]
        return [RefreshPoint(slots, policy)]


@dataclass(frozen=True)
class CoresetPoint:
    """One rewrite of the routing; `setting` is k', beta or p. Expert choice has a schedule from `k_min` to `k_max`."""

    method: str
    setting: float = 0.0
    schedule: str = ""
    k_min: float = 0.0
    k_max: float = 0.0

    @property
    def label(self) -> str:
        """``des-vote 0.15``, ``ec linear-reverse 2-14``, ``none``."""
        if self.schedule:
            return f"ec {self.schedule} {self.k_min:g}-{self.k_max:g}"
        return f"{self.method} {self.setting:g}" if self.setting else self.method


class CoresetBlock(Part):
    """A method and its parameter, one value or a list: `k` of DES-Seq, `beta` of DES-Vote, `p` of dMoE, `schedule` of
    expert choice (EC-DLM), whose capacity goes from `k_min` to `k_max` experts per token.
    """

    method: Literal["des-seq", "des-vote", "dmoe", "expert-choice"]
    k: Annotated[Rows[Count], *grid(SIZE)] | None = None
    beta: Annotated[Rows[PositivePart], *grid(_PART)] | None = None
    p: Annotated[Rows[PositivePart], *grid(_PART)] | None = None
    schedule: Annotated[Rows[Schedule], *grid({"enum": list(get_args(Schedule))})] | None = None
    k_min: Positive = 2.0
    k_max: Positive = 14.0

    @model_validator(mode="after")
    def _check_parameter(self) -> CoresetBlock:
        for key in sorted(self.model_fields_set - {"method"}):
            if _ONLY[key] != self.method:
                raise ValueError(f"{key!r} belongs to method {_ONLY[key]}, not to {self.method}")
        own = _PARAMETER[self.method]
        if getattr(self, own) is None:
            raise ValueError(f"method: {self.method} needs {own!r}")
        if self.k_min > self.k_max:
            raise ValueError(f"k_min {self.k_min:g} must not exceed k_max {self.k_max:g}")
        return self

    def expand(self) -> list[CoresetPoint]:
        """Return the points in order."""
        values = getattr(self, _PARAMETER[self.method])
        if self.method == EXPERT_CHOICE:
            mean = (self.k_min + self.k_max) / 2
            return [CoresetPoint(self.method, mean, schedule, self.k_min, self.k_max) for schedule in values]
        return [CoresetPoint(self.method, float(value)) for value in values]


class DiffusionStudy(StudyBase):
    """A block-diffusion model: when should a GPU's experts be refreshed, and what do coresets save where all fit?"""

    kind: Literal["diffusion"]
    hardware: HardwareChoice
    profile: Text | None = None
    system: DiffusionSystem = DiffusionSystem()
    denoise: DenoiseChoice = DenoiseChoice()
    refresh: RefreshChoice | None = None
    coresets: Rows[CoresetBlock] | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> DiffusionStudy:
        if self.refresh is None and self.coresets is None:
            raise ValueError("give 'refresh' or 'coresets', or both")
        unused = sorted(self.system.model_fields_set - {"device"})
        if self.refresh is None and unused:
            raise ValueError(f"system: {unused[0]!r} belongs to 'refresh', which is not there")
        return self

    @property
    def makes_its_own_trace(self) -> bool:
        """Whether the scenario's trace is not needed."""
        return self.denoise.generate is not None

    def expand(self) -> list[RefreshPoint | CoresetPoint]:
        """Return the refresh points, then the coresets after the routing as it is (``none``), each once."""
        points: list[RefreshPoint | CoresetPoint] = list(self.refresh.expand()) if self.refresh else []
        if self.coresets is not None:
            rewrites = [CoresetPoint("none"), *(point for block in self.coresets for point in block.expand())]
            points += dict.fromkeys(rewrites)
        return points
