"""What the parts of the scenario's schema share: types of keys, names that registries know, lists that are crossed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from moesim.errors import InputError

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


def as_value_error(check: Callable[[str], object]) -> Callable[[str], str]:
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


def _find_miss(name: str) -> object:
    from moesim.errors import unknown
    from moesim.lowering.misses.registry import MISS_RULES
    from moesim.lowering.offload_policy import MISSES

    known = [*MISSES, *(rule for rule in MISS_RULES.names() if rule not in MISSES)]
    if name not in known:
        raise unknown("way to handle a miss", name, known)
    return name


PolicyName = Annotated[str, AfterValidator(as_value_error(_find_policy))]
PrefetcherName = Annotated[str, AfterValidator(as_value_error(_find_prefetcher))]
SolverName = Annotated[str, AfterValidator(as_value_error(_find_solver))]
MissName = Annotated[str, AfterValidator(as_value_error(_find_miss))]


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def grid(schema: dict[str, Any]) -> tuple[object, ...]:
    """Annotations of a key that takes one value or a list of them (`schema`: the JSON Schema of one)."""
    many = {"type": "array", "items": schema, "minItems": 1}
    return BeforeValidator(_listed), WithJsonSchema({"anyOf": [schema, many]})


TEXT, SIZE = {"type": "string"}, {"type": "integer", "minimum": 1}
SHARE = {"type": "number", "minimum": 0, "maximum": 1}


class Part(BaseModel):
    """A mapping of the file: no unknown keys, no silent conversions, no changes after."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class HardwareChoice(Part):
    """A machine of the catalog or a YAML file, as `num_nodes` nodes of `gpus_per_node` (None: its own)."""

    name: Text
    num_nodes: Count = 1
    gpus_per_node: Count | None = None


class Workload(Part):
    """Closed loop: `batch_size` requests stay active; `warmup_steps` steps do not count in the rates.

    With `waiting` requests more, a `batcher` chooses which tokens share a pass (`moesim.traces.batching`).
    """

    batch_size: Count
    max_steps: Count | None = None
    include_prefill: bool = False
    warmup_steps: Natural = 0
    batcher: Literal["fifo", "read-me", "expertflow"] = "fifo"
    waiting: Natural = 0

    @model_validator(mode="after")
    def _check_warmup(self) -> Workload:
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves none of max_steps {self.max_steps}")
        if self.batcher != "fifo" and not self.waiting:
            raise ValueError(f"batcher: {self.batcher} needs 'waiting': how many requests there are beside a pass")
        return self


class StudyBase(Part):
    """What every study has: a name, and a title for its readers."""

    name: Name
    title: str = ""

    @property
    def heading(self) -> str:
        """The title, or the name where there is none."""
        return self.title or self.name
