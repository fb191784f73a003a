"""``moesim place`` and ``moesim export``: make a plan, and hand it to a serving engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli_common import (
    GpusPerNode,
    JsonFlag,
    NumNodes,
    OptionList,
    SeedOption,
    emit_json,
    parse_options,
    show_files,
    show_pairs,
)
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.hardware.spec import HardwareSpec
    from moesim.model.spec import ModelSpec
    from moesim.placement.plan import PlacementPlan
    from moesim.placement.result import SolveResult
    from moesim.traces.trace import RoutingTrace

PERFETTO = "perfetto"


def place(
    trace: Annotated[str, typer.Option(help="A *.trace.parquet file or builtin:NAME.")],
    model: Annotated[str, typer.Option(help="A catalog name, a config.json or its folder.")],
    hardware: Annotated[str, typer.Option(help="A catalog name or a YAML file.")],
    out: Annotated[Path, typer.Option(help="The *.plan.json file to write.")],
    num_nodes: NumNodes = 1,
    gpus_per_node: GpusPerNode = None,
    solver: Annotated[str, typer.Option(help="contiguous, random, lpt, eplb, affinity, ilp ...")] = "lpt",
    redundant_experts: Annotated[int, typer.Option(min=0, help="Further slots per layer, on all GPUs.")] = 0,
    time_limit: Annotated[float, typer.Option(help="Seconds for the search.")] = 10.0,
    train_fraction: Annotated[float, typer.Option(
        help="Share of the requests to plan from, the others judge; 1: all, none judge.")] = 0.5,
    option: OptionList = [],  # noqa: B006
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Decide which GPU holds which expert, and judge the plan on requests it has not seen."""
    from moesim.hardware.load import load_hardware
    from moesim.model.catalog import load_model
    from moesim.placement.place import place as solve
    from moesim.traces.store import read_trace, resolve_trace

    spec = load_model(model)
    machine = load_hardware(hardware, num_nodes=num_nodes, gpus_per_node=gpus_per_node)
    _check_seconds(time_limit)
    whole = read_trace(resolve_trace(trace))
    whole.check_model(spec)
    train, judge = _split(whole, train_fraction, seed)
    problem = _problem(train, spec, machine, redundant_experts)
    result = solve(problem, solver, seed=seed, time_limit_s=time_limit, **_solver_options(option))
    facts = {"model": spec.name, "trace": trace, "trace_digest": whole.digest(), "hardware": machine.name,
             "num_nodes": machine.num_nodes, "train_fraction": train_fraction}
    plan = _with_provenance(result, facts)
    _tell(result, _judge(plan, judge, machine.ranks_per_node), plan.write(out), json)


def _check_seconds(value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"--time-limit must be a positive number of seconds, got {value}")


def _split(trace: RoutingTrace, fraction: float, seed: int) -> tuple[RoutingTrace, RoutingTrace | None]:
    from moesim.traces.split import split_requests

    return (trace, None) if fraction == 1 else split_requests(trace, fraction, seed)


def _problem(trace: RoutingTrace, model: ModelSpec, machine: HardwareSpec, redundant_experts: int) -> Any:
    """Return the placement problem, with the memory that the rest of the model leaves on a rank."""
    from moesim.placement.place import problem_from_trace

    if not machine.num_ranks:
        raise InputError(f"hardware {machine.name!r} has no GPUs to place experts on")
    free = min(machine.memory_of(rank).num_bytes for rank in machine.ranks) - model.non_expert_bytes
    return problem_from_trace(
        trace, num_ranks=machine.num_ranks, ranks_per_node=machine.ranks_per_node,
        redundant_experts=redundant_experts, expert_bytes=model.expert_bytes, memory_bytes_per_rank=free,
        num_groups=model.num_groups)


def _solver_options(pairs: list[str]) -> dict[str, Any]:
    options = parse_options(pairs)
    for key, flag in (("seed", "--seed"), ("time_limit_s", "--time-limit")):
        if key in options:
            raise InputError(f"--option {key}: give it as {flag}")
    for key in ("problem", "solver"):
        if key in options:
            raise InputError(f"--option {key}: no solver has an option of this name")
    return options


def _with_provenance(result: SolveResult, facts: dict[str, Any]) -> PlacementPlan:
    import dataclasses

    assert result.plan is not None  # place() raises otherwise
    return dataclasses.replace(result.plan, provenance=result.plan.provenance | facts)


def _judge(plan: PlacementPlan, trace: RoutingTrace | None, ranks_per_node: int) -> dict[str, Any]:
    """Return the plan's figures on held-out requests (none without any)."""
    from moesim.placement.metrics import imbalance, kept_transitions, rank_load
    from moesim.traces.stats import load_counts, transition_counts

    if trace is None:
        return {}
    load = load_counts(trace)
    ranks = rank_load(plan, load)
    facts = {"imbalance_held_out": float(ranks.max(axis=1).sum() / ranks.mean(axis=1).sum()),
             "imbalance_held_out_worst_layer": float(imbalance(plan, load).max())}
    if trace.num_layers > 1:
        kept = kept_transitions(plan, transition_counts(trace), ranks_per_node)
        facts |= {f"kept_on_{scope}_fraction": value for scope, value in kept.items()}
    return facts


def _tell(result: SolveResult, judged: dict[str, Any], out: Path, json: bool) -> None:
    facts = {"solver": result.solver, "status": result.status.value, "objective_name": result.objective_name,
             "objective": result.objective, "objective_bound": result.objective_bound, "gap": result.gap,
             "time_s": result.time_s, "seed": result.seed, **judged}
    if json:
        emit_json({**facts, "file": out})
        return
    from moesim.report.tables import format_value

    show_pairs("Placement", [(key, format_value(key, value)) for key, value in facts.items()])
    show_files([out])


def export(
    source: Annotated[Path, typer.Argument(help="A *.plan.json, or a *.result folder for perfetto.")],
    to: Annotated[str, typer.Option(help="perfetto, sglang, tensorrt-llm, eplb or exflow.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    model: Annotated[str | None, typer.Option(help="The plan's model (default: as the plan says).")] = None,
    overlay: Annotated[Path | None, typer.Option(
        help="A second *.result, of a real run, to lay over the first (perfetto).")] = None,
    json: JsonFlag = False,
) -> None:
    """Write a plan as a file that a serving engine loads, or a run as a timeline."""
    if to == PERFETTO:
        _export_timeline(source, out, overlay, json)
        return
    if overlay is not None:
        raise InputError(f"--overlay belongs to --to {PERFETTO}")
    _export_plan(source, to, out, model, json)


def _export_timeline(source: Path, out: Path, overlay: Path | None, json: bool) -> None:
    from moesim.export.perfetto import write_timeline
    from moesim.simulate.result import read_result

    second = read_result(overlay) if overlay else None
    path = write_timeline(read_result(source), out, second)
    if json:
        emit_json({"file": path})
    else:
        show_pairs("Timeline", [("file", path), ("how to look at it", "open it at ui.perfetto.dev")])


def _export_plan(source: Path, to: str, out: Path, model: str | None, json: bool) -> None:
    from moesim.errors import unknown
    from moesim.export.engines import EXPORTERS, export_plan
    from moesim.model.catalog import load_model
    from moesim.placement.plan import read_plan

    if to not in EXPORTERS.names():
        raise unknown("export target", to, [PERFETTO, *EXPORTERS.names()])
    plan = read_plan(source)
    name = model or plan.provenance.get("model")
    written = export_plan(plan, load_model(name) if name else None, to, out)
    facts = {"file": written.path, "start_command": written.start_command, "notes": written.notes}
    if json:
        emit_json(facts)
    else:
        notes = [("note", note) for note in written.notes]
        show_pairs(f"Exported for {to}", [*list(facts.items())[:2], *notes])
