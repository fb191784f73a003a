"""`run_compare`: every solver on one trace, its quality over time, and the bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.artifacts import atomic_path, write_json
from moesim.errors import MoesimError
from moesim.placement.goal import parse_goal
from moesim.placement.place import PROVING, place
from moesim.placement.progress import Progress, Report
from moesim.placement.prove import PROVERS, prove
from moesim.placement.result import relative_gap
from moesim.placement.solvers import SOLVERS
from moesim.scenario.place_run import judged_on
from moesim.scenario.placing import PlaceRequest, PlaceSetup

SCHEMA = "moesim.place_compare/1"


@dataclass
class Comparison:
    """Rows best first, the bound and what it bounds, notes, files."""

    title: str
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def run_compare(request: PlaceRequest, solvers: list[str] | None, *, objective: str, time_limit_s: float,
                prove_s: float, folder: Path, listener: Callable[[Report], None] | None = None) -> Comparison:
    """Run `solvers` (None: all) for `time_limit_s` each, prove a bound, judge all, and write table and picture.

    A solver that cannot take the problem becomes a note. Raises InputError for an unknown solver or objective.
    """
    names = SOLVERS.names() if solvers is None else solvers
    for name in names:
        SOLVERS[name]
    setup = PlaceSetup(request)
    goal_text = setup.goal_text(objective) or "step_time"
    goal = parse_goal(goal_text)
    found = Comparison(f"{request.trace} on {setup.hardware.num_ranks} GPUs, judged on {judged_on(setup)}",
                       {"objective": goal_text, "bound": None}, [])
    for name in names:
        try:
            found.rows.append(_row(setup, name, goal_text, time_limit_s, listener))
        except MoesimError as error:
            found.notes.append(f"{name}: {error}")
    one = goal.single
    sense = "min" if one is None else one.sense
    found.rows.sort(key=lambda row: row["objective"], reverse=sense == "max")
    if one is not None and one.name in PROVERS and found.rows:
        bound = prove(setup.problem, one.name, seed=request.seed, time_limit_s=prove_s,
                      incumbent=found.rows[0]["made"])
        found.facts |= {"bound": bound.bound, "bound_method": bound.method}
    best = [row["bound"] for row in found.rows if row["bound"] is not None]
    if best:
        every = [*best, *([found.facts["bound"]] if found.facts["bound"] is not None else [])]
        found.facts["bound"] = max(every) if sense == "min" else min(every)
    for row in found.rows:
        row.pop("made")
        row["gap"] = None if found.facts["bound"] is None else relative_gap(row["objective"], found.facts["bound"], sense)
    found.facts |= {"sense": sense, "unit": goal.name if one is None else one.unit}
    _write(found, folder)
    return found


def _row(setup: PlaceSetup, solver: str, objective: str, time_limit_s: float,
         listener: Callable[[Report], None] | None) -> dict[str, Any]:
    """Return a solver's figures; `curve` are (seconds, objective) while it searched."""
    curve: list[tuple[float, float]] = []

    def listen(report: Report) -> None:
        if report.objective is not None and report.stage != PROVING:
            curve.append((report.seconds, report.objective))
        if listener is not None:
            listener(report)

    progress = Progress(listen)
    progress.at(solver)
    started_s = time.perf_counter()
    result = place(setup.problem, solver, seed=setup.request.seed, time_limit_s=time_limit_s, objective=objective,
                   progress=progress)
    seconds = time.perf_counter() - started_s
    assert result.plan is not None  # place() raises otherwise
    assert result.objective is not None
    if not result.plan.provenance["searched_for_it"]:
        curve = []  # of another objective
    return {"solver": solver, "status": result.status.value, "time_s": result.time_s, "wall_s": seconds,
            "objective": result.objective, "bound": result.objective_bound, "made": result.plan,
            "curve": [*curve, (max(result.time_s, 1.0 / 1024), result.objective)],
            **setup.judge(result.plan, objective)}


def _write(found: Comparison, folder: Path) -> None:
    from moesim.report.placement import compare_figure
    from moesim.report.plots import png_bytes

    body = {"title": found.title, **found.facts, "notes": found.notes, "rows": found.rows}
    found.files.append(write_json(folder / "compare.json", SCHEMA, body))
    if found.rows:
        with atomic_path(folder / "compare.png") as temporary:
            temporary.write_bytes(png_bytes(compare_figure(found.rows, found.facts)))
        found.files.append(folder / "compare.png")
