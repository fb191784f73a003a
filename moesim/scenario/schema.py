"""The scenario file as frozen pydantic models: which model, which trace, and the studies to run on them.

Everything is strict: an unknown key, a number as text or a name that no registry knows is an error. Units
are the last word of a key. `moesim.scenario.load` reads a file and says where in it a problem stands.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from moesim.errors import InputError, did_you_mean
from moesim.scenario.balancer import Balancer, BalancerChoice

SCHEMA = "moesim.scenario/1"
NO_PREFETCH = "none"
STATED_RECALL = "stated_recall"
DEFAULT_PREFETCH_WIDTH = 8

Item = TypeVar("Item")
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
Text = Annotated[str, Field(min_length=1)]
Miss = Literal["load", "cpu", "faster"]
Rows = Annotated[tuple[Item, ...], Field(min_length=1, strict=False)]


def _as_value_error(check: Callable[[str], object]) -> Callable[[str], str]:
    """Wrap a look-up so that pydantic reports its InputError at the key."""

    def checked(name: str) -> str:
        try:
            check(name)
        except InputError as error:
            raise ValueError(str(error)) from None
        return name

    return checked


def _find_policy(name: str) -> object:
    from moesim.cache.policy import POLICIES

    return POLICIES[name]


def _find_prefetcher(name: str) -> object:
    from moesim.cache.prefetch import PREFETCHERS

    return PREFETCHERS[name]


def _find_solver(name: str) -> object:
    from moesim.placement.solvers import SOLVERS

    return SOLVERS[name]


PolicyName = Annotated[str, AfterValidator(_as_value_error(_find_policy))]
PrefetcherName = Annotated[str, AfterValidator(_as_value_error(_find_prefetcher))]
SolverName = Annotated[str, AfterValidator(_as_value_error(_find_solver))]


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def _grid(schema: dict[str, Any]) -> tuple[object, ...]:
    """Annotations of a key that takes one value or a list of them (`schema`: the JSON Schema of one)."""
    many = {"type": "array", "items": schema, "minItems": 1}
    return BeforeValidator(_listed), WithJsonSchema({"anyOf": [schema, many]})


_TEXT, _SIZE, _MISS = {"type": "string"}, {"type": "integer", "minimum": 1}, {"enum": list(get_args(Miss))}
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}


class _Part(BaseModel):
    """A mapping of the file: no unknown keys, no silent conversions, no changes after."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class HardwareChoice(_Part):
    """A machine of the catalog or a YAML file, as `num_nodes` nodes of `gpus_per_node` (None: its own)."""

    name: Text
    num_nodes: Count = 1
    gpus_per_node: Count | None = None


class Workload(_Part):
    """Closed loop: `batch_size` requests stay active; `warmup_steps` steps do not count in the rates."""

    batch_size: Count
    max_steps: Count | None = None
    include_prefill: bool = False
    warmup_steps: Natural = 0

    @model_validator(mode="after")
    def _check_warmup(self) -> Workload:
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves none of max_steps {self.max_steps}")
        return self


class PlanChoice(_Part):
    """A plan to make with a solver and its options, or one to read from a ``*.plan.json``."""

    solver: SolverName | None = None
    plan: Text | None = None
    redundant_experts: Natural = 0
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            if not isinstance(value, (str, int, float, bool)):
                raise ValueError(f"option {key!r} must be text, a number, true or false, got {value!r}")
        return options

    @model_validator(mode="after")
    def _check_one_source(self) -> PlanChoice:
        if (self.solver is None) == (self.plan is None):
            raise ValueError("give either 'solver' or 'plan'")
        if self.plan is not None and (self.redundant_experts or self.options):
            raise ValueError("'redundant_experts' and 'options' belong to a solver; a plan has its own")
        if self.solver is not None:
            _check_solver_options(self.solver, self.options)
        return self

    @property
    def label(self) -> str:
        """The solver's name, or the plan file's name without its endings."""
        return self.solver or Path(str(self.plan)).name.removesuffix(".json").removesuffix(".plan")


def _check_solver_options(solver: str, options: Iterable[str]) -> None:
    import inspect

    from moesim.placement.solvers import SOLVERS

    parameters = inspect.signature(SOLVERS[solver]).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"seed", "time_limit_s", "starts", "progress"}
    for name in options:
        if name not in known:
            raise ValueError(f"solver {solver!r} has no option {name!r}."
                             f"{did_you_mean(name, known) or ' It takes none.'}")


class PlacementChoice(_Part):
    """Plans to compare: made from `train_fraction` of the requests, judged on the others."""

    train_fraction: Fraction = 0.5
    time_limit_s: Positive = 10.0
    plans: Rows[PlanChoice]


class ExpertParallelSystem(_Part):
    """`collective`: one task per all-to-all, or one per transfer. `balancer`: see `moesim.scenario.balancer`.

    `dispatch_bytes`: bytes per hidden value sent out (None: the activations'). `execution`: tokens return ``home``
    after each layer, or move on (``coherent``: context on every rank); then `gather` is what ends each step.
    """

    collective: Literal["closed_form", "per_link"] = "closed_form"
    dispatch_bytes: Positive | None = None
    execution: Literal["home", "coherent"] = "home"
    gather: Literal["kv", "activations", "ids"] = "kv"
    balancer: Balancer = BalancerChoice()

    @model_validator(mode="after")
    def _check_execution(self) -> ExpertParallelSystem:
        self.balancer.check(self.execution)
        if self.execution == "coherent" and self.collective != "closed_form":
            raise ValueError(f"execution: coherent knows collective: closed_form only, not {self.collective}")
        if self.execution == "home" and "gather" in self.model_fields_set:
            raise ValueError("'gather' belongs to execution: coherent")
        return self


class CacheChoice(_Part):
    """`preload`: fill the slots with the popular experts first. `shared`: one pool over all layers.

    Popularity and transitions are learned on `train_fraction` of the requests; the others are run.
    """

    preload: Literal["popular", "none"] = "popular"
    shared: bool = False
    train_fraction: Fraction = 0.5


class OffloadSystem(_Part):
    """Names of the computing device and of the experts' memory (None: chosen), and how misses are handled.

    `chunks`: pieces of one expert's copy. `admit`: also fetch what the CPU computes.
    """

    device: Text | None = None
    slow_memory: Text | None = None
    chunks: Count = 3
    admit: bool = True


@dataclass(frozen=True)
class Point:
    """One simulation of an offload study. `prefetch_width` is 0 without a prefetcher."""

    policy: str
    slots_per_layer: int
    prefetch: str = NO_PREFETCH
    prefetch_width: int = 0
    prefetch_recall: float | None = None
    miss: str = "load"


class PointBlock(_Part):
    """A small grid: every key takes one value or a list; lists are crossed."""

    policy: Annotated[Rows[PolicyName], *_grid(_TEXT)]
    slots_per_layer: Annotated[Rows[Count], *_grid(_SIZE)]
    prefetch: Annotated[Rows[PrefetcherName], *_grid(_TEXT)] = (NO_PREFETCH,)
    prefetch_width: Annotated[Rows[Count], *_grid(_SIZE)] = (DEFAULT_PREFETCH_WIDTH,)
    prefetch_recall: Annotated[Rows[Share], *_grid(_SHARE)] | None = None
    miss: Annotated[Rows[Miss], *_grid(_MISS)] = ("load",)

    @model_validator(mode="after")
    def _check_prefetch(self) -> PointBlock:
        for prefetch in self.prefetch:
            _check_recall(prefetch, self.prefetch_recall is not None, several=len(self.prefetch) > 1)
        if set(self.prefetch) == {NO_PREFETCH} and "prefetch_width" in self.model_fields_set:
            raise ValueError("'prefetch_width' does nothing with prefetch: none")
        return self

    def expand(self) -> list[Point]:
        """Return the points of the grid, each once; the last key named changes fastest.

        The width and the recall only multiply the points of a prefetcher that uses them.
        """
        points = [
            point
            for policy, prefetch, miss in itertools.product(self.policy, self.prefetch, self.miss)
            for point in self._of(Point(policy, 0, prefetch, miss=miss))
        ]
        return list(dict.fromkeys(points))

    def _of(self, base: Point) -> list[Point]:
        widths = (0,) if base.prefetch == NO_PREFETCH else self.prefetch_width
        recalls = (self.prefetch_recall or (None,)) if base.prefetch == STATED_RECALL else (None,)
        return [
            dataclasses.replace(base, slots_per_layer=slots, prefetch_width=width, prefetch_recall=recall)
            for width, recall, slots in itertools.product(widths, recalls, self.slots_per_layer)
        ]


def _check_recall(prefetch: str, given: bool, *, several: bool = False) -> None:
    if prefetch == STATED_RECALL and not given:
        raise ValueError(f"prefetch: {STATED_RECALL} needs 'prefetch_recall' (0 ... 1)")
    if prefetch != STATED_RECALL and given and not several:
        raise ValueError(f"'prefetch_recall' belongs to prefetch: {STATED_RECALL}, not to {prefetch}")


class _Study(_Part):
    name: Name
    title: str = ""

    @property
    def heading(self) -> str:
        """The title, or the name where there is none."""
        return self.title or self.name


class ExpertParallelStudy(_Study):
    """Which rank should hold which expert?"""

    kind: Literal["expert_parallel"]
    hardware: HardwareChoice
    profile: Text | None = None
    workload: Workload
    placement: PlacementChoice
    system: ExpertParallelSystem = ExpertParallelSystem()


class OffloadStudy(_Study):
    """What should stay on one small device, and what should be fetched?"""

    kind: Literal["offload"]
    hardware: HardwareChoice
    profile: Text | None = None
    workload: Workload
    cache: CacheChoice = CacheChoice()
    system: OffloadSystem = OffloadSystem()
    points: Rows[PointBlock]

    def expand(self) -> list[Point]:
        """Return the points of all blocks in order, each once."""
        return list(dict.fromkeys(point for block in self.points for point in block.expand()))


class ValidationModel(_Part):
    """Sizes small enough to run here; experts and top-k come from the trace, layers are its first ones."""

    hidden_size: Count = 512
    expert_intermediate_size: Count = 1024
    num_layers: Count = 4
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class ValidationStudy(_Study):
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
        _check_recall(self.prefetch, self.prefetch_recall is not None)
        return self

    @property
    def point(self) -> Point:
        """The policy as a point."""
        width = 0 if self.prefetch == NO_PREFETCH else self.prefetch_width
        return Point(self.policy, self.slots_per_layer, self.prefetch, width, self.prefetch_recall, self.miss)


STUDIES: dict[str, type[_Study]] = {
    "expert_parallel": ExpertParallelStudy, "offload": OffloadStudy, "validation": ValidationStudy}

Study = Annotated[ExpertParallelStudy | OffloadStudy | ValidationStudy, Field(discriminator="kind")]


class Scenario(_Part):
    """One file: a model, a trace of it (or one that stands in for it), and at least one study."""

    schema_: Literal["moesim.scenario/1"] = Field(alias="schema")
    name: Name
    description: str = ""
    seed: Natural = 0
    model: Text
    trace: Text
    trace_stands_in: bool = False
    output: Text | None = None
    studies: Rows[Study]

    @model_validator(mode="after")
    def _check_names(self) -> Scenario:
        names = [study.name for study in self.studies]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"study names must differ; used more than once: {', '.join(repeated)}")
        return self

    @property
    def output_folder(self) -> Path:
        """Where `run` writes, relative to the working directory (default ``results/<name>``)."""
        return Path(self.output or f"results/{self.name}")

    def study(self, name: str) -> ExpertParallelStudy | OffloadStudy | ValidationStudy:
        """Return the study called `name`; raises InputError with a suggestion."""
        for study in self.studies:
            if study.name == name:
                return study
        hint = did_you_mean(name, [study.name for study in self.studies])
        raise InputError(f"scenario {self.name!r} has no study {name!r}.{hint}")
