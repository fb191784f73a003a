"""``moesim place``: make a plan, compare solvers, replan as the load moves, verify what a plan claims."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli_common import (
    GpusPerNode,
    JsonFlag,
    NumNodes,
    OptionList,
    SeedOption,
    add_row,
    console,
    emit_json,
    new_table,
    show_files,
    show_pairs,
)
from moesim.cli_place_options import (
    ApartOption,
    BatchOption,
    ExecutionOption,
    FromOption,
    HardwareOption,
    HoldoutOption,
    ModelOption,
    NodeCapacityOption,
    ObjectiveOption,
    PinOption,
    ProfileOption,
    RankCapacityOption,
    RedundantOption,
    TimeOption,
    TraceOption,
    check_seconds,
    place_request,
    read_constraints,
    solver_options,
)
from moesim.errors import CheckError, InputError

if TYPE_CHECKING:
    from moesim.scenario.place_compare import Comparison
    from moesim.scenario.placing import PlaceRequest

place_app = typer.Typer(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})


@place_app.callback()
def place(
    context: typer.Context,
    trace: TraceOption = None,
    hardware: HardwareOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The *.plan.json file to write.")] = None,
    model: ModelOption = None,
    profile: ProfileOption = None,
    num_nodes: NumNodes = 1,
    gpus_per_node: GpusPerNode = None,
    solver: Annotated[str, typer.Option(help="auto, or one solver; `moesim place compare` tries all.")] = "auto",
    objective: ObjectiveOption = None,
    redundant_experts: RedundantOption = 0,
    time_limit: TimeOption = 10.0,
    prove: Annotated[float, typer.Option(help="Further seconds to spend on the bound.")] = 0.0,
    holdout: HoldoutOption = 0.5,
    execution: ExecutionOption = "home",
    batch_size: BatchOption = None,
    current: FromOption = None,
    pin: PinOption = [],  # noqa: B006
    apart: ApartOption = [],  # noqa: B006
    rank_capacity: RankCapacityOption = [],  # noqa: B006
    node_capacity: NodeCapacityOption = [],  # noqa: B006
    option: OptionList = [],  # noqa: B006
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Decide which GPU holds which expert, prove how good that is, and judge it on requests it has not seen."""
    if context.invoked_subcommand is not None:
        return
    if out is None:
        raise InputError("missing option --out (-o). Try 'moesim place --help'.")
    check_seconds("--time-limit", time_limit)
    check_seconds("--prove", prove, zero=True)
    request = place_request(
        trace=trace, hardware=hardware, current=current, model=model, profile=profile, num_nodes=num_nodes,
        gpus_per_node=gpus_per_node, redundant_experts=redundant_experts, holdout=holdout, execution=execution,
        batch_size=batch_size, seed=seed, constraints=read_constraints(pin, apart, rank_capacity, node_capacity))
    goal = "auto" if solver == "auto" and objective is None else objective
    search = {"solver": solver, "objective": goal, "time_limit_s": time_limit, "prove_s": prove,
              "options": solver_options(option)}
    _place(request, search, out, json)


def _place(request: PlaceRequest, search: dict[str, Any], out: Path, json: bool) -> None:
    from moesim.scenario.place_run import run_place

    with _progress(quiet=json) as listener:
        outcome = run_place(request, out=out, listener=listener, **search)
    if json:
        emit_json({**outcome.facts, "plans": outcome.rows, "warnings": outcome.warnings,
                   "file": outcome.files[0], "files": outcome.files})
        return
    from moesim.report.placement import PLAN_COLUMNS, plan_row

    show_pairs("Placement", outcome.shown_facts())
    table = new_table(f"Judged on {outcome.judged_on}", *PLAN_COLUMNS)
    for row in outcome.rows:
        add_row(table, *plan_row(row))
    console().print()
    console().print(table)
    for text in outcome.warnings:
        typer.echo(f"warning: {text}", err=True)
    show_files(outcome.files)


def _progress(*, quiet: bool) -> Any:
    from moesim.scenario.search_line import search_line

    return search_line(console(stderr=True), quiet=quiet)


@place_app.command()
def compare(
    trace: TraceOption = None,
    hardware: HardwareOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write to.")] = Path("results/place-compare"),
    model: ModelOption = None,
    profile: ProfileOption = None,
    num_nodes: NumNodes = 1,
    gpus_per_node: GpusPerNode = None,
    solvers: Annotated[str | None, typer.Option(help="Names with commas between (default: all).")] = None,
    objective: ObjectiveOption = "auto",
    redundant_experts: RedundantOption = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds for each solver.")] = 10.0,
    prove: Annotated[float, typer.Option(help="Seconds to spend on the bound.")] = 5.0,
    holdout: HoldoutOption = 0.5,
    execution: ExecutionOption = "home",
    batch_size: BatchOption = None,
    current: FromOption = None,
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Run every solver on one trace; table and picture of quality against time, the bound as a line."""
    from moesim.scenario.place_compare import run_compare

    check_seconds("--time-limit", time_limit)
    check_seconds("--prove", prove, zero=True)
    request = place_request(
        trace=trace, hardware=hardware, current=current, model=model, profile=profile, num_nodes=num_nodes,
        gpus_per_node=gpus_per_node, redundant_experts=redundant_experts, holdout=holdout, execution=execution,
        batch_size=batch_size, seed=seed)
    names = None if solvers is None else [name.strip() for name in solvers.split(",")]
    with _progress(quiet=json) as listener:
        outcome = run_compare(request, names, objective=objective or "auto", time_limit_s=time_limit, prove_s=prove,
                              folder=out, listener=listener)
    if json:
        emit_json({**outcome.facts, "rows": outcome.rows, "files": outcome.files})
    else:
        _show_comparison(outcome)


def _show_comparison(outcome: Comparison) -> None:
    from moesim.report.placement import COMPARE_COLUMNS, compare_row

    table = new_table(outcome.title, *COMPARE_COLUMNS)
    for row in outcome.rows:
        add_row(table, *compare_row(row, outcome.facts))
    console().print(table)
    for text in outcome.notes:
        console().print(text, soft_wrap=True)
    show_files(outcome.files)


@place_app.command()
def rolling(
    trace: TraceOption = None,
    hardware: HardwareOption = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between two plans.")] = 32,
    window: Annotated[int, typer.Option(min=1, help="The last steps that a plan is made from.")] = 32,
    max_steps: Annotated[int, typer.Option(min=2, help="Steps to run.")] = 128,
    model: ModelOption = None,
    profile: ProfileOption = None,
    num_nodes: NumNodes = 1,
    gpus_per_node: GpusPerNode = None,
    solver: Annotated[str, typer.Option(help="Solver of the static plan and of every new one.")] = "eplb",
    objective: ObjectiveOption = None,
    redundant_experts: RedundantOption = 0,
    time_limit: TimeOption = 2.0,
    holdout: HoldoutOption = 0.5,
    execution: ExecutionOption = "home",
    batch_size: BatchOption = None,
    option: OptionList = [],  # noqa: B006
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Plan again every N steps, pay for the moved experts, and compare with one plan that stays."""
    from moesim.scenario.placing import PlaceSetup
    from moesim.scenario.replanning import Replanner, Rolling, static_plan, summary

    check_seconds("--time-limit", time_limit)
    request = place_request(
        trace=trace, hardware=hardware, current=None, model=model, profile=profile, num_nodes=num_nodes,
        gpus_per_node=gpus_per_node, redundant_experts=redundant_experts, holdout=holdout, execution=execution,
        batch_size=batch_size, seed=seed)
    setup = PlaceSetup(request)
    plans = Rolling(every, window, solver, setup.goal_text(objective), time_limit, solver_options(option))
    rows = list(Replanner(setup, plans, max_steps).rows(static_plan(setup, plans)))
    if json:
        emit_json({"rows": rows, **summary(rows)})
    else:
        _show_rolling(f"A new plan by {solver} every {every} steps, from the last {window}", rows, summary(rows))


def _show_rolling(title: str, rows: list[dict[str, Any]], means: dict[str, float]) -> None:
    from moesim.report.placement import ROLLING_COLUMNS, rolling_row
    from moesim.report.tables import format_value

    table = new_table(title, *ROLLING_COLUMNS)
    for row in rows:
        add_row(table, *rolling_row(row))
    console().print(table)
    show_pairs("Per step, over the run", [(key, format_value(key, value)) for key, value in means.items()])


@place_app.command()
def verify(
    plan: Annotated[Path, typer.Argument(help="A *.plan.json; its *.bound.npz lies beside it.")],
    trace: TraceOption = None,
    model: ModelOption = None,
    json: JsonFlag = False,
) -> None:
    """Count the trace again and re-check a plan, its objective and its bound, with code apart from the solvers."""
    from moesim.scenario.place_verify import verify_plan_file

    verdict = verify_plan_file(plan, trace=trace, model=model)
    if json:
        emit_json({"holds": verdict.holds, **dataclasses.asdict(verdict)})
    else:
        table = new_table(f"Verification of {plan}", "claim", "holds")
        for text, good in verdict.claims:
            add_row(table, text, "yes" if good else "NO")
        console().print(table)
    if not verdict.holds:
        raise CheckError(f"{plan}: {sum(not good for _, good in verdict.claims)} claims do not hold")


@place_app.command("import")
def import_plan(
    source: Annotated[Path, typer.Argument(help="A placement file of an engine, or ExFlow's CSV Expert,Node.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The *.plan.json file to write.")],
    source_format: Annotated[str | None, typer.Option(
        "--format", help="sglang, tensorrt-llm, vllm, vllm-ascend, eplb or exflow (default: told from the file).")] = None,
    model: ModelOption = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="Experts per layer.")] = None,
    num_layers: Annotated[int | None, typer.Option(min=1, help="MoE layers.")] = None,
    num_ranks: Annotated[int | None, typer.Option(min=1, help="Ranks, where the file does not say them.")] = None,
    json: JsonFlag = False,
) -> None:
    """Read a plan from an engine's file, to judge it with --from or to run it in a scenario."""
    from moesim.model.catalog import load_model
    from moesim.placement.engine_files import PlanFacts, read_engine_plan

    spec = load_model(model) if model else None
    plan = read_engine_plan(source, source_format, PlanFacts(spec, num_experts, num_layers, num_ranks))
    facts = {"layers": plan.num_layers, "experts": plan.num_experts, "ranks": plan.num_ranks, "file": plan.write(out)}
    if json:
        emit_json(facts)
    else:
        show_pairs("Imported plan", facts.items())
