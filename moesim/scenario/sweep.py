"""Thousands of what-ifs of one study: shared reductions, compiled once, rows streamed to Parquet, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd

from moesim.errors import InputError
from moesim.scenario.inputs import load_inputs
from moesim.scenario.schema import ExpertParallelStudy, OffloadStudy, Scenario
from moesim.scenario.sweep_axes import POINT_KEYS, Axis, check_axes, machine_values, swept_points
from moesim.scenario.sweep_store import SweepFolder, open_sweep

MACHINES_PER_PART = 1024
Machines = Sequence[dict[str, float]]


class Sweeper(Protocol):
    """One kind of study: rows of one choice (a point, a plan) over many machines."""

    def check(self, choices: Sequence[Any], machines: Machines) -> None:
        """Raise the error of whatever cannot work, before anything is timed."""

    def rows(self, choice: Any, machines: Machines) -> pd.DataFrame:
        """Return one row per machine."""


@dataclass(frozen=True)
class Sweep:
    """What is swept: every choice on every machine, in parts of one choice and up to 1,024 machines."""

    study: OffloadStudy | ExpertParallelStudy
    axes: tuple[Axis, ...]
    choices: tuple[Any, ...]
    machines: tuple[dict[str, float], ...]
    sweeper: Sweeper
    provenance: dict[str, Any]

    @property
    def num_rows(self) -> int:
        """Number of rows when it is done."""
        return len(self.choices) * len(self.machines)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(choice, first machine) of each part."""
        return [(choice, first) for choice in range(len(self.choices))
                for first in range(0, len(self.machines), MACHINES_PER_PART)]

    def describe(self) -> dict[str, Any]:
        """Return what makes this sweep itself, as JSON values; a change of any of it is another sweep."""
        return {"study": self.study.model_dump(mode="json"), "provenance": self.provenance,
                "axes": {axis.key: list(axis.values) for axis in self.axes}}


def make_sweep(scenario: Scenario, study_name: str, axes: Sequence[Axis]) -> Sweep:
    """Load a study and check every axis, choice and machine.

    Raises:
        InputError: a study that cannot be swept, an axis that it does not have, a value that does not work.
    """
    study = scenario.study(study_name)
    inputs = load_inputs(scenario)
    sweeper: Sweeper
    choices: Any
    if isinstance(study, OffloadStudy):
        from moesim.scenario.offload import OffloadSetup
        from moesim.scenario.sweep_offload import OffloadSweep

        setup = OffloadSetup(inputs, study)
        check_axes(axes, setup.hardware, points=True, measured=study.profile is not None)
        sweeper, choices = OffloadSweep(setup), swept_points(study, axes)
    elif isinstance(study, ExpertParallelStudy):
        from moesim.scenario.expert_parallel import ExpertParallelSetup
        from moesim.scenario.sweep_expert_parallel import ExpertParallelSweep

        planned = ExpertParallelSetup(inputs, study)
        check_axes(axes, planned.hardware, points=False, measured=study.profile is not None)
        sweeper, choices = ExpertParallelSweep(planned), study.placement.plans
    else:
        raise InputError(f"study {study_name!r} is of kind {study.kind!r}; a sweep needs 'offload' or 'expert_parallel'")
    machines = machine_values(axes)
    sweeper.check(choices, machines)
    return Sweep(study, tuple(axes), tuple(choices), tuple(machines), sweeper, inputs.provenance)


def run_sweep(sweep: Sweep, path: str | os.PathLike[str],
              progress: Callable[[str, float, float], None] = lambda text, done, total: None) -> SweepFolder:
    """Make the parts that are missing, one file each; what an earlier run finished is kept."""
    folder = open_sweep(path, sweep.describe(), len(sweep.parts))
    for done, (index, rows) in enumerate(_missing_rows(sweep, folder), start=1):
        folder.write(index, rows)
        progress("sweep", done, len(sweep.parts))
    return folder


def _missing_rows(sweep: Sweep, folder: SweepFolder) -> Iterator[tuple[int, pd.DataFrame]]:
    parts = sweep.parts
    for index in folder.missing():
        choice, first = parts[index]
        yield index, sweep.sweeper.rows(sweep.choices[choice], sweep.machines[first:first + MACHINES_PER_PART])


def best_rows(rows: pd.DataFrame, axes: Sequence[Axis]) -> pd.DataFrame:
    """Return, for each machine, the row of most tokens per second among choices that do not see the future."""
    keys = [axis.key for axis in axes if axis.key not in POINT_KEYS]
    real = rows[~rows["sees_future"]] if "sees_future" in rows else rows
    ordered = real.sort_values("tokens_per_s", ascending=False, kind="stable")
    best = ordered.drop_duplicates(keys) if keys else ordered
    return best.sort_values(keys, kind="stable", ignore_index=True) if keys else best.reset_index(drop=True)
