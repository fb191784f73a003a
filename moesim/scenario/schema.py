"""The scenario file as frozen pydantic models: which model, which trace, and the studies to run on them.

Everything is strict: an unknown key, a number as text or a name that no registry knows is an error. Units
are the last word of a key. Each kind of study has a file of its own (``schema_*.py``). `moesim.scenario.load` reads a
file and says where in it a problem stands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moesim.errors import InputError, did_you_mean
from moesim.scenario.schema_base import (
    NO_PREFETCH,
    Count,
    HardwareChoice,
    Name,
    Natural,
    Part,
    Rows,
    Share,
    StudyBase,
    Text,
    Workload,
)
from moesim.scenario.schema_diffusion import DiffusionStudy
from moesim.scenario.schema_expert_parallel import (
    ExpertParallelStudy,
    ExpertParallelSystem,
    PlacementChoice,
    PlanChoice,
)
from moesim.scenario.schema_offload import CacheChoice, OffloadStudy, OffloadSystem, Point, PointBlock
from moesim.scenario.schema_validation import ValidationModel, ValidationStudy

__all__ = [
    "GENERATED", "NO_PREFETCH", "SCHEMA", "STUDIES", "CacheChoice", "DiffusionStudy", "ExpertParallelStudy", "ExpertParallelSystem",
    "HardwareChoice", "OffloadStudy", "OffloadSystem", "PlacementChoice", "PlanChoice", "Point", "PointBlock", "Scenario", "Study",
    "ValidationModel", "ValidationStudy", "Workload"]

SCHEMA = "moesim.scenario/1"
GENERATED = "generated"

STUDIES: dict[str, type[StudyBase]] = {
    "expert_parallel": ExpertParallelStudy, "offload": OffloadStudy, "diffusion": DiffusionStudy,
    "validation": ValidationStudy}

AnyStudy = ExpertParallelStudy | OffloadStudy | DiffusionStudy | ValidationStudy
Study = Annotated[AnyStudy, Field(discriminator="kind")]


class SyntheticTrace(Part):
    """Routing made up for the model's shape (`moesim.traces.synth.synthetic_trace`): for questions of size and mechanism, not of hits."""

    num_tokens: Count
    num_requests: Count
    zipf: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    affinity: Share = 0.5
    locality: Share = 0.5
    num_topics: Count = 4
    prompt_fraction: Share = 0.25


class Scenario(Part):
    """One file: a model, a trace of it (or one that stands in for it), and at least one study.

    `trace`: a name, a path, or ``generated``: made from `synthetic`, or by each study for itself.
    """

    schema_: Literal["moesim.scenario/1"] = Field(alias="schema")
    name: Name
    description: str = ""
    seed: Natural = 0
    model: Text
    trace: Text
    trace_stands_in: bool = False
    synthetic: SyntheticTrace | None = None
    output: Text | None = None
    studies: Rows[Study]

    @model_validator(mode="after")
    def _check_names(self) -> Scenario:
        names = [study.name for study in self.studies]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"study names must differ; used more than once: {', '.join(repeated)}")
        return self

    @model_validator(mode="after")
    def _check_trace(self) -> Scenario:
        if self.trace != GENERATED:
            if self.synthetic is not None:
                raise ValueError(f"'synthetic' makes the trace of trace: {GENERATED}; here the trace is {self.trace!r}")
            return self
        for study in self.studies:
            if self.synthetic is None and not getattr(study, "makes_its_own_trace", False):
                need = "denoise: {generate: ...}" if study.kind == "diffusion" else "a trace, or 'synthetic' to make one"
                raise ValueError(f"trace: {GENERATED} is for studies that make their own; study {study.name!r} of kind "
                                 f"{study.kind} needs {need}")
        if self.trace_stands_in:
            raise ValueError(f"trace_stands_in does nothing with trace: {GENERATED}")
        return self

    @property
    def output_folder(self) -> Path:
        """Where `run` writes, relative to the working directory (default ``results/<name>``)."""
        return Path(self.output or f"results/{self.name}")

    def study(self, name: str) -> AnyStudy:
        """Return the study called `name`; raises InputError with a suggestion."""
        for study in self.studies:
            if study.name == name:
                return study
        hint = did_you_mean(name, [study.name for study in self.studies])
        raise InputError(f"scenario {self.name!r} has no study {name!r}.{hint}")
