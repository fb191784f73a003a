"""``moesim simulate``: one point of a study, as one result folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli_common import ExecutorOption, JsonFlag, PluginOption, console, emit_json, load_plugins, show_files
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.scenario.schema import DiffusionStudy, ExpertParallelStudy, OffloadStudy, Scenario
    from moesim.simulate.result import SimulationResult


def simulate(
    scenario: Annotated[Path, typer.Option(help="A scenario file (YAML).")],
    study: Annotated[str, typer.Option(help="The study that the point belongs to.")],
    out: Annotated[Path, typer.Option(help="The *.result folder to write.")],
    point: Annotated[int | None, typer.Option(min=0, help="Which point of the study (default: 0).")] = None,
    plan: Annotated[Path | None, typer.Option(help="A *.plan.json to simulate instead of a point.")] = None,
    executor: ExecutorOption = "auto",
    plugin: PluginOption = [],  # noqa: B006
    json: JsonFlag = False,
) -> None:
    """Simulate one point of a study and write its whole result: every task, step, transfer."""
    from moesim.scenario.load import load_scenario

    if plan is not None and point is not None:
        raise InputError("give --point or --plan, not both")
    if out.exists() and not (out / "summary.json").is_file():
        raise InputError(f"{out}: exists and is no result folder; it is left as it is")
    load_plugins(plugin)
    result = _one_result(load_scenario(scenario), study, point or 0, plan, executor)
    path = result.write(out)
    if json:
        emit_json({"name": result.name, "summary": result.summary, "file": path})
        return
    from moesim.report.tables import summary_table

    console().print(summary_table(result))
    show_files([path])


def _one_result(scenario: Scenario, name: str, point: int, plan: Path | None, executor: str) -> SimulationResult:
    study = scenario.study(name)
    if study.kind == "expert_parallel":
        return _expert_parallel(scenario, study, point, plan, executor)
    if plan is not None:
        raise InputError(f"--plan needs a study of kind 'expert_parallel'; {name!r} is of kind {study.kind!r}")
    if study.kind == "validation":
        raise InputError(f"study {name!r} runs for real: use moesim validate")
    if study.kind == "diffusion":
        return _diffusion(scenario, study, point, executor)
    return _offload(scenario, study, point, executor)


def _expert_parallel(
    scenario: Scenario, study: ExpertParallelStudy, point: int, plan: Path | None, executor: str
) -> SimulationResult:
    from moesim.scenario.expert_parallel import ExpertParallelSetup
    from moesim.scenario.inputs import load_inputs
    from moesim.scenario.schema import PlanChoice

    choices = study.placement.plans
    choice = PlanChoice(plan=str(plan)) if plan else choices[_checked(point, len(choices), study.name)]
    return ExpertParallelSetup(load_inputs(scenario), study, executor).point(choice).result


def _offload(scenario: Scenario, study: OffloadStudy, point: int, executor: str) -> SimulationResult:
    from moesim.scenario.inputs import load_inputs
    from moesim.scenario.offload import OffloadSetup

    points = study.expand()
    chosen = points[_checked(point, len(points), study.name)]
    return OffloadSetup(load_inputs(scenario), study, executor).point(chosen).result


def _diffusion(scenario: Scenario, study: DiffusionStudy, point: int, executor: str) -> SimulationResult:
    from moesim.scenario.diffusion import DiffusionStudySetup
    from moesim.scenario.inputs import load_inputs
    from moesim.scenario.schema_diffusion import RefreshPoint
    from moesim.simulate.executors import executor_of

    points = [one for one in study.expand() if isinstance(one, RefreshPoint)]
    if not points:
        raise InputError(f"study {study.name!r} has no refresh policies; coresets are not simulated task by task")
    chosen = points[_checked(point, len(points), study.name)]
    return DiffusionStudySetup(load_inputs(scenario), study).simulate(chosen, executor_of(executor))


def _checked(point: int, num_points: int, name: str) -> int:
    if point >= num_points:
        raise InputError(f"--point {point}: study {name!r} has points 0 ... {num_points - 1}")
    return point
