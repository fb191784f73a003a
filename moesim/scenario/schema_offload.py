"""The study kind ``offload``: one device with slots, and a grid of policies, slots and prefetchers as points."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from moesim.errors import InputError
from moesim.scenario.schema_base import (
    DEFAULT_PREFETCH_WIDTH,
    NO_PREFETCH,
    SHARE,
    SIZE,
    TEXT,
    Count,
    Fraction,
    HardwareChoice,
    MissName,
    Part,
    PolicyName,
    PrefetcherName,
    Rows,
    Share,
    StudyBase,
    Text,
    Workload,
    grid,
)
from moesim.scenario.schema_precision import PrecisionChoice

Allocation = Literal["uniform", "adapmoe", "plec", "measured"]
ALLOCATION = {"enum": list(get_args(Allocation))}


class CacheChoice(Part):
    """`preload`: fill the slots with the popular experts first. `shared`: one pool over all layers.

    Popularity and transitions are learned on `train_fraction` of the requests; the others are run.
    """

    preload: Literal["popular", "none"] = "popular"
    shared: bool = False
    train_fraction: Fraction = 0.5


class OffloadSystem(Part):
    """Names of the computing device and of the experts' memory (None: chosen), and how experts move.

    `chunks`: pieces of one expert's copy. `admit`: also fetch what the CPU computes. `write_back`: an evicted expert is copied
    back. `host_slots_per_layer`: experts lie on flash, and host memory keeps so many times the layers of them, chosen by
    `host_policy` (None: no such tier).
    """

    device: Text | None = None
    slow_memory: Text | None = None
    chunks: Count = 3
    admit: bool = True
    write_back: bool = False
    host_slots_per_layer: Count | None = None
    host_policy: PolicyName = "lru"


Option = int | float | str | bool


@dataclass(frozen=True)
class Point:
    """One simulation of an offload study. `prefetch_width` is 0 without a prefetcher."""

    policy: str
    slots_per_layer: int
    prefetch: str = NO_PREFETCH
    prefetch_width: int = 0
    prefetch_recall: float | None = None
    miss: str = "load"
    lookahead: int | None = None
    miss_options: tuple[tuple[str, Option], ...] = ()
    allocation: Allocation = "uniform"
    precision: PrecisionChoice | None = None
    system: str = ""


class PointBlock(Part):
    """A small grid: every key takes one value or a list; lists are crossed.

    `system` names the rows, such as the published system whose parts these are. `miss_options` go to the rule that `miss`
    names. `allocation`: how the slots of all layers are divided (`moesim.cache.allocation`). `precision`: experts in several
    widths (`moesim.scenario.precision`); it excludes other ways to handle a miss than loading.
    """

    system: str = ""
    policy: Annotated[Rows[PolicyName], *grid(TEXT)]
    slots_per_layer: Annotated[Rows[Count], *grid(SIZE)]
    prefetch: Annotated[Rows[PrefetcherName], *grid(TEXT)] = (NO_PREFETCH,)
    prefetch_width: Annotated[Rows[Count], *grid(SIZE)] = (DEFAULT_PREFETCH_WIDTH,)
    prefetch_recall: Annotated[Rows[Share], *grid(SHARE)] | None = None
    lookahead: Annotated[Rows[Count], *grid(SIZE)] | None = None
    miss: Annotated[Rows[MissName], *grid(TEXT)] = ("load",)
    miss_options: dict[str, Option] = Field(default_factory=dict)
    allocation: Annotated[Rows[Allocation], *grid(ALLOCATION)] = ("uniform",)
    precision: PrecisionChoice | None = None

    @model_validator(mode="after")
    def _check_prefetch(self) -> PointBlock:
        for prefetch in self.prefetch:
            check_recall(prefetch, self.prefetch_recall is not None, several=len(self.prefetch) > 1)
        for key in ("prefetch_width", "lookahead"):
            if set(self.prefetch) == {NO_PREFETCH} and key in self.model_fields_set:
                raise ValueError(f"{key!r} does nothing with prefetch: none")
        return self

    @model_validator(mode="after")
    def _check_parts(self) -> PointBlock:
        if self.miss_options:
            check_miss_options(self.miss, self.miss_options)
        if self.precision is not None:
            check_precision(self)
        return self

    def expand(self) -> list[Point]:
        """Return the points of the grid, each once; the last key named changes fastest.

        The width, the lookahead and the recall only multiply the points of a prefetcher that uses them.
        """
        options = tuple(self.miss_options.items())
        points = [
            point
            for policy, prefetch, miss, allocation in itertools.product(
                self.policy, self.prefetch, self.miss, self.allocation)
            for point in self._of(Point(policy, 0, prefetch, miss=miss, miss_options=options, allocation=allocation,
                                        precision=self.precision, system=self.system))
        ]
        return list(dict.fromkeys(points))

    def _of(self, base: Point) -> list[Point]:
        widths = (0,) if base.prefetch == NO_PREFETCH else self.prefetch_width
        aheads = (None,) if base.prefetch == NO_PREFETCH else self.lookahead or (None,)
        recalls = (self.prefetch_recall or (None,)) if takes_recall(base.prefetch) else (None,)
        return [
            dataclasses.replace(
                base, slots_per_layer=slots, prefetch_width=width, prefetch_recall=recall, lookahead=ahead)
            for width, ahead, recall, slots in itertools.product(widths, aheads, recalls, self.slots_per_layer)
        ]


def takes_recall(prefetch: str) -> bool:
    """Return whether a prefetcher is a what-if of a stated recall."""
    from moesim.cache.prefetch import reads

    return "recall" in reads(prefetch)


def check_recall(prefetch: str, given: bool, *, several: bool = False) -> None:
    """Raise ValueError where a prefetcher's recall is missing, or given to one that has none."""
    from moesim.cache.prefetch import needs_recall

    if needs_recall(prefetch) and not given:
        raise ValueError(f"prefetch: {prefetch} needs 'prefetch_recall' (0 ... 1): it rests on a predictor whose recall you state")
    if given and not takes_recall(prefetch) and not several:
        raise ValueError(f"'prefetch_recall' belongs to a prefetcher that rests on a stated recall, not to {prefetch}")


def check_precision(block: PointBlock) -> None:
    """Raise ValueError where a block's other keys do not go with experts in several widths."""
    assert block.precision is not None
    if set(block.miss) != {"load"}:
        raise ValueError(f"'precision' loads what is missing: it excludes miss: {', '.join(block.miss)}")
    if block.precision.method != "hobbit" and set(block.allocation) != {"uniform"}:
        raise ValueError(f"precision: {block.precision.method} counts bytes, not slots: it excludes 'allocation'")


def check_miss_options(misses: tuple[str, ...], options: dict[str, Option]) -> None:
    """Raise ValueError unless one rule is named and takes these options."""
    from moesim.lowering.misses.registry import make_rule

    if len(misses) != 1:
        raise ValueError("'miss_options' belong to one rule; name a single 'miss'")
    try:
        make_rule(misses[0], **options)
    except InputError as error:
        raise ValueError(str(error)) from None


class OffloadStudy(StudyBase):
    """What should stay on one small device, and what should be fetched?"""

    kind: Literal["offload"]
    hardware: HardwareChoice
    profile: Text | None = None
    workload: Workload
    cache: CacheChoice = CacheChoice()
    system: OffloadSystem = OffloadSystem()
    points: Rows[PointBlock]

    @model_validator(mode="after")
    def _check_tiers(self) -> OffloadStudy:
        if any(block.precision for block in self.points) and (
                self.system.host_slots_per_layer is not None or self.system.write_back):
            raise ValueError("'precision' is not combined with host_slots_per_layer or write_back")
        return self

    def expand(self) -> list[Point]:
        """Return the points of all blocks in order, each once."""
        return list(dict.fromkeys(point for block in self.points for point in block.expand()))
