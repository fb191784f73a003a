"""run_scenario: the whole pipeline, study by study; every file appears whole, and is named at the end."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from moesim.errors import InputError, MissingDependencyError
from moesim.export.perfetto import write_timeline
from moesim.lowering.refresh_rows import OFFLINE
from moesim.report.advice import advice, deployable
from moesim.report.html import report_folder
from moesim.scenario.diffusion import DiffusionStudySetup, point_label
from moesim.scenario.expert_parallel import ExpertParallelSetup
from moesim.scenario.inputs import Inputs, load_inputs
from moesim.scenario.offload import OffloadSetup
from moesim.scenario.reporter import Reporter
from moesim.scenario.schema import DiffusionStudy, ExpertParallelStudy, OffloadStudy, Scenario, ValidationStudy
from moesim.scenario.schema_diffusion import RefreshPoint
from moesim.scenario.validation import run_validation
from moesim.simulate.executors import AUTO, executor_of
from moesim.simulate.study import StudyResult

VERSIONED = ("moesim", "simpy", "numpy", "pandas", "pyarrow", "ortools", "scipy", "torch")


@dataclass(frozen=True)
class RunOutcome:
    """The studies' tables and the files that were written."""

    studies: list[StudyResult]
    files: list[Path]


@dataclass
class _Run:
    """One run under way: its inputs, its output folder, who listens, and what has been written."""

    inputs: Inputs
    output: Path
    reporter: Reporter
    files: list[Path]
    executor: str = AUTO

    def finish(self, study: StudyResult) -> StudyResult:
        """Write a study's table and show it."""
        self.files.append(study.write(self.output / f"{study.name}.study.json"))
        self.reporter.study_done(study)
        return study


def run_scenario(scenario: Scenario, output: Path, reporter: Reporter, only: str | None = None,
                 executor: str = AUTO) -> RunOutcome:
    """Run every study of a scenario (or the one named `only`) and write tables, results, timelines and a report.

    A validation study is left out, with a message, where torch is not installed.
    """
    chosen = [scenario.study(only)] if only else list(scenario.studies)
    run = _Run(load_inputs(scenario), output, reporter, [], executor)
    studies = []
    for study in chosen:
        try:
            studies.append(_RUNNERS[study.kind](run, study))
        except MissingDependencyError as error:
            if only:
                raise
            reporter.message(f"study {study.name!r} left out: {error}")
    run.files.append(report_folder(output))
    return RunOutcome(studies, run.files)


def _run_expert_parallel(run: _Run, study: ExpertParallelStudy) -> StudyResult:
    run.reporter.study_started(study.name, study.heading, len(study.placement.plans))
    setup = ExpertParallelSetup(run.inputs, study, run.executor)
    rows, best, sources = [], None, Counter[str]()
    for point in setup.points(lambda row: run.reporter.point_done(study.name, row)):
        rows.append(point.row)
        sources.update(point.result.summary["cost_sources"])
        redundant = f"-r{point.row['redundant_experts']}" if point.row["redundant_experts"] else ""
        run.files.append(point.plan.write(run.output / f"{study.name}.{point.label}{redundant}.plan.json"))
        if best is None or point.row["step_time_s"] < best.row["step_time_s"]:
            best = point
    assert best is not None
    _write_best(run, f"{study.name}.{best.label}", best.result)
    notes = setup.notes(dict(sources))
    return run.finish(_study(run, study, rows, notes))


def _run_offload(run: _Run, study: OffloadStudy) -> StudyResult:
    run.reporter.study_started(study.name, study.heading, len(study.expand()))
    setup = OffloadSetup(run.inputs, study, run.executor)
    rows, best, sources = [], None, Counter[str]()
    for point in setup.points():
        rows.append(point.row)
        sources.update(point.result.summary["cost_sources"])
        run.reporter.point_done(study.name, point.row)
        usable = not point.row["sees_future"] and point.row["precision"] is None
        if usable and (best is None or point.row["tokens_per_s"] > best.row["tokens_per_s"]):
            best = point
    if best is not None:
        _write_best(run, f"{study.name}.{best.label}", best.result)
    notes = (*_advice(rows), *setup.notes(dict(sources)))
    return run.finish(_study(run, study, rows, notes))


def _advice(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return what to do and why; nothing where no row can be deployed as it is."""
    usable = [row for row in rows if row["precision"] is None]
    try:
        found = advice(usable, usable=deployable)
    except InputError:
        return ()
    return (f"Advice: {found.sentence}", *found.reasons)


def _run_diffusion(run: _Run, study: DiffusionStudy) -> StudyResult:
    run.reporter.study_started(study.name, study.heading, len(study.expand()))
    setup = DiffusionStudySetup(run.inputs, study)
    rows, best, most = [], None, 0.0
    for point, row in setup.points():
        rows.append(row)
        run.reporter.point_done(study.name, row)
        if isinstance(point, RefreshPoint) and row["knows"] != OFFLINE and row["tokens_per_s"] > most:
            best, most = point, row["tokens_per_s"]
    if best is not None:
        _write_best(run, f"{study.name}.{point_label(best)}", setup.simulate(best, executor_of(run.executor)))
    return run.finish(_study(run, study, rows, setup.notes(), setup.provenance))


def _run_validation(run: _Run, study: ValidationStudy) -> StudyResult:
    run.reporter.study_started(study.name, study.heading, 1)
    done = run_validation(run.inputs, study, run.reporter.progress)
    run.files.append(done.run.report.write(run.output / f"{study.name}.validation.json"))
    run.files.append(done.run.profile.write(run.output / f"{study.name}.profile.json"))
    for name, result in (("predicted", done.predicted), ("measured", done.measured)):
        run.files.append(result.write(run.output / f"{study.name}.{name}.result"))
    timeline = run.output / f"{study.name}.perfetto.json"
    run.files.append(write_timeline(done.predicted, timeline, overlay=done.measured))
    rows = done.run.report.kinds.to_dict(orient="records")
    run.reporter.point_done(study.name, rows[-1])
    return run.finish(_study(run, study, rows, done.notes))


def _write_best(run: _Run, name: str, result: Any) -> None:
    run.files.append(result.write(run.output / f"{name}.result"))
    run.files.append(write_timeline(result, run.output / f"{name}.perfetto.json"))


def _study(run: _Run, study: Any, rows: list[dict[str, Any]], notes: tuple[str, ...],
           more: dict[str, Any] | None = None) -> StudyResult:
    provenance = run.inputs.provenance | (more or {}) | {"versions": versions()}
    return StudyResult(study.name, study.kind, study.heading, pd.DataFrame(rows), notes, provenance)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


_RUNNERS: dict[str, Callable[..., StudyResult]] = {
    "expert_parallel": _run_expert_parallel,
    "offload": _run_offload,
    "diffusion": _run_diffusion,
    "validation": _run_validation,
}
