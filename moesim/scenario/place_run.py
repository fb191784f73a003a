"""`run_place`: solve, prove, judge beside the plans that one would load otherwise, and write plan and certificate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.artifacts import digest_file
from moesim.errors import InputError
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.place import place
from moesim.placement.plan import PlacementPlan
from moesim.placement.progress import Progress, Report
from moesim.placement.result import SolveResult
from moesim.scenario.placing import PlaceRequest, PlaceSetup, contiguous_plan
from moesim.traces.counts import is_counts

PLAN_SUFFIX, BOUND_SUFFIX = ".plan.json", ".bound.npz"


@dataclass(frozen=True)
class PlaceOutcome:
    """A plan's facts, its row beside the others' (`rows`), what to warn of, and the files written."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    warnings: list[str]
    files: list[Path]
    judged_on: str

    def shown_facts(self) -> list[tuple[str, str]]:
        """Return the facts as people read them."""
        from moesim.report.tables import format_value

        unit = "_ns" if self.facts["objective_name"] == OBJECTIVES["step_time"].unit else ""
        names = {"objective": f"objective{unit}", "objective_bound": f"objective_bound{unit}"}
        return [(key, format_value(names.get(key, key), value)) for key, value in self.facts.items()
                if value is not None]


def run_place(request: PlaceRequest, *, solver: str, objective: str | None, time_limit_s: float, prove_s: float,
              options: dict[str, Any], out: Path, listener: Callable[[Report], None] | None = None) -> PlaceOutcome:
    """Make a plan for `request`, write it to `out` (and its certificate beside it), and judge it.

    The rows compare it with the contiguous plan that engines start with and with the plan that is loaded now.
    """
    if out.suffix != ".json":
        raise InputError(f"--out {out}: a plan's file ends in {PLAN_SUFFIX}")
    if is_counts(request.trace):
        from moesim.scenario.place_counts import run_place_counts

        return run_place_counts(request, solver=solver, objective=objective, time_limit_s=time_limit_s, prove_s=prove_s,
                                options=options, out=out, listener=listener)
    setup = PlaceSetup(request)
    goal = setup.goal_text(objective)
    progress = Progress(listener)
    result = place(setup.problem, solver, seed=request.seed, time_limit_s=time_limit_s, objective=goal,
                   prove_s=prove_s, progress=progress, **options)
    assert result.plan is not None  # place() raises otherwise
    plan, files = _write(setup, result, goal, out)
    plans = {"contiguous": contiguous_plan(setup.problem)}
    if request.current is not None:
        plans["current"] = request.current
    goal = goal or objective_of(result)
    rows = [{"plan": name, **setup.judge(one, goal)} for name, one in (*plans.items(), (result.solver, plan))]
    return PlaceOutcome(_facts(result), rows, _warnings(setup, plan, rows[-1], goal), files, judged_on(setup))


def objective_of(result: SolveResult) -> str | None:
    """Return the registry's name of the objective that a solver chose by itself, if it is one of them."""
    return next((name for name in OBJECTIVES.names() if OBJECTIVES[name].unit == result.objective_name), None)


def judged_on(setup: PlaceSetup) -> str:
    """Return in words what plans are judged on."""
    steps = f"{len(setup.judge_steps)} simulated steps of {len(setup.judge_steps[0].rows)} tokens"
    if setup.test is None:
        return f"the tokens that the plan was made from (nothing is held out); {steps}"
    return f"{setup.test.num_tokens:,} held-out tokens; {steps}"


def _warnings(setup: PlaceSetup, plan: PlacementPlan, row: dict[str, Any], goal: str | None) -> list[str]:
    found = setup.warnings(row, goal)
    for key, text in (("fallback", ""), ("interrupted", "the search was interrupted; this is its best plan so far")):
        if plan.provenance.get(key):
            found.append(text or str(plan.provenance[key]))
    return found + [f"not used: {text}" for text in plan.provenance.get("passed_over", [])]


def _facts(result: SolveResult) -> dict[str, Any]:
    return {"solver": result.solver, "status": result.status.value, "objective_name": result.objective_name,
            "objective": result.objective, "objective_bound": result.objective_bound,
            "bound_method": result.bound_method or None, "gap": result.gap, "time_s": result.time_s,
            "seed": result.seed}


def _write(setup: PlaceSetup, result: SolveResult, goal: str | None, out: Path) -> tuple[PlacementPlan, list[Path]]:
    """Write the certificate, then the plan that names it."""
    assert result.plan is not None
    request, files = setup.request, [out]
    facts: dict[str, Any] = {
        "model": setup.model.name, "trace": request.trace, "trace_digest": setup.trace.digest(),
        "hardware": request.hardware, "num_nodes": setup.hardware.num_nodes,
        "gpus_per_node": setup.hardware.ranks_per_node, "profile": request.profile, "holdout": request.holdout,
        "execution": request.execution, "batch_size": request.batch_size,
        "redundant_experts": request.redundant_experts, "goal": goal,
        "constraints": [str(one) for one in request.constraints]}
    if result.certificate is not None:
        bound = out.with_name(out.name.removesuffix(".json").removesuffix(".plan") + BOUND_SUFFIX)
        result.certificate.write(bound)
        files.append(bound)
        facts["certificate"] = {"file": bound.name, "digest": digest_file(bound),
                                "method": result.certificate.method, "bound": result.certificate.bound}
    plan = dataclasses.replace(result.plan, provenance=result.plan.provenance | facts)
    plan.write(out)
    return plan, files
