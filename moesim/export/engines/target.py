"""What an export target is: what it takes, what it refuses and what would do instead, what it writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from moesim.errors import InputError
from moesim.model.spec import ModelSpec
from moesim.placement.plan import PlacementPlan

S = TypeVar("S")
Content = bytes | Mapping[str, bytes]  # one file, or the files of a folder by name
SHARE_TOLERANCE = 1e-7


@dataclass(frozen=True)
class ExportReport:
    """The file that was written, the command line that loads it, and what the reader must know."""

    path: Path
    start_command: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal(Generic[S]):
    """Why an engine cannot express a subject; the nearest one that it can, if that is known, and what differs."""

    reason: str
    nearest: S | None = None
    difference: str = ""


class Target(Generic[S]):
    """One engine's file. Subclasses are stateless; `export` calls the methods in the order in which they stand.

    Attributes:
        name: the word after ``--to``.
        takes, takes_words: the type that is exported, and what to call it in an error.
        suffixes: file name endings, empty for a folder; `suffix_reason` says why these.
        needs_model: whether the model must be known.
        what: one line for the list of targets.
    """

    name: ClassVar[str]
    takes: ClassVar[type]
    takes_words: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    suffix_reason: ClassVar[str] = "the engine tells the format by it"
    needs_model: ClassVar[bool] = True
    what: ClassVar[str]

    def refusal(self, subject: S, model: ModelSpec | None) -> Refusal[S] | None:
        """Return why the engine cannot express the subject, or None."""
        return None

    def encode(self, subject: S, model: ModelSpec | None, path: Path) -> Content:
        """Return the bytes of the file, or of each file of the folder."""
        raise NotImplementedError

    def check(self, content: Content, subject: S, model: ModelSpec | None) -> None:
        """Read `content` as the engine would; raises CheckError unless it keeps the rules and means the subject."""
        raise NotImplementedError

    def command(self, subject: S, model: ModelSpec | None, path: Path) -> str:
        """Return the command line that starts the engine with the file."""
        raise NotImplementedError

    def notes(self, subject: S, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what the reader must know."""
        return ()


class PlanTarget(Target[PlacementPlan]):
    """A target that takes placement plans; engines split an expert's tokens over its replicas by their own rule."""

    takes: ClassVar[type] = PlacementPlan
    takes_words: ClassVar[str] = "a plan (*.plan.json)"

    def refusal(self, subject: PlacementPlan, model: ModelSpec | None) -> Refusal[PlacementPlan] | None:
        """Refuse experts that layers share, and stated shares that are not even: no engine's file has a place for them."""
        if self.needs_model and (shared := refuse_shared_pool(self.name, known(model))) is not None:
            return shared
        even = dataclasses.replace(subject, slot_share=None)
        if subject.slot_share is None or np.allclose(subject.share, even.share, rtol=0, atol=SHARE_TOLERANCE):
            return None
        return Refusal(f"{self.name}: the plan states how an expert's tokens are shared by its replicas, which the "
                       "file cannot say", even, "the same slots, shares left to the engine")


def known(model: ModelSpec | None) -> ModelSpec:
    """Return the model of a target that has `needs_model` (`export` has seen to it)."""
    assert model is not None
    return model


def refuse_shared_pool(name: str, model: ModelSpec) -> Refusal[Any] | None:
    """Return a refusal where layers share their experts: engines load separate ones for every layer."""
    if model.num_pool_experts == model.num_moe_layers * model.num_experts:
        return None
    return Refusal(f"{name} loads separate experts for every layer, but {model.name!r} shares "
                   f"{model.num_pool_experts} experts between layers")


def one_file(content: Content) -> bytes:
    """Return the bytes of a target that writes one file."""
    assert isinstance(content, bytes)
    return content


def check_same_model(subject: Any, model: ModelSpec) -> None:
    """Raise InputError unless the subject's layers and experts are the model's."""
    for what, planned, has in (("MoE layers", subject.num_layers, model.num_moe_layers),
                               ("experts", subject.num_experts, model.num_experts)):
        if planned != has:
            raise InputError(f"export: the {kind_of(subject)} is for {planned} {what}, the model {model.name!r} has {has}")


def kind_of(subject: object) -> str:
    """Return what to call a subject."""
    words = {"PlacementPlan": "plan", "RoutingTrace": "trace", "Residency": "list of experts",
             "SimulationResult": "result"}
    return words.get(type(subject).__name__, type(subject).__name__)
