"""The options that the verbs of ``moesim place`` share, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli_common import parse_options
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.placement.constraints import Constraints
    from moesim.scenario.placing import PlaceRequest

TraceOption = Annotated[str | None, typer.Option(help="A *.trace.parquet file or builtin:NAME.")]
HardwareOption = Annotated[str | None, typer.Option(
    help="A catalog name, a YAML file, or NAMExGPUSxNODES: h200x8x2 is two nodes of eight H200.")]
ModelOption = Annotated[str | None, typer.Option(
    help="A catalog name, a config.json or its folder (default: the trace's own).")]
ProfileOption = Annotated[str | None, typer.Option(help="A *.profile.json of `moesim calibrate`.")]
RedundantOption = Annotated[int, typer.Option(min=0, help="Further slots per layer, on all GPUs.")]
HoldoutOption = Annotated[float, typer.Option(
    help="Share of the requests kept for judging; the plan is made from the others. 0: none.")]
ExecutionOption = Annotated[str, typer.Option(
    help="home: tokens return home after each layer (DeepEP); coherent: they move on from layer to layer (ExFlow).")]
BatchOption = Annotated[int | None, typer.Option(
    "--batch-size", help="Requests active at once in the steps that are sampled and judged (default: 8 per GPU).")]
FromOption = Annotated[Path | None, typer.Option("--from", help="The plan that is loaded now: what moving costs.")]
PinOption = Annotated[list[str], typer.Option(
    "--pin", metavar="EXPERT@RANK[:LAYER]", help="Keep a copy of the expert on the rank. May be repeated.")]
ApartOption = Annotated[list[str], typer.Option(
    "--apart", metavar="A,B[:LAYER]", help="Never put both experts on one rank. May be repeated.")]
RankCapacityOption = Annotated[list[str], typer.Option(
    "--rank-capacity", metavar="RANK=N", help="At most N experts of a layer on the rank. May be repeated.")]
NodeCapacityOption = Annotated[list[str], typer.Option(
    "--node-capacity", metavar="NODE=N", help="At most N experts of a layer on the node. May be repeated.")]
ObjectiveOption = Annotated[str | None, typer.Option(
    help="balance, affinity, hops, bottleneck, fanout, step_time, migration; A,B in order of importance; "
         "2*A+B weighted; auto: by --execution (default: auto with the solver auto, else the solver's own).")]
TimeOption = Annotated[float, typer.Option("--time-limit", help="Seconds for the search.")]


def read_constraints(pins: list[str], apart: list[str], ranks: list[str], nodes: list[str]) -> Constraints:
    """Return the constraints of the command line; raises InputError with the form that was expected."""
    from moesim.placement.constraints import parse_constraints

    kinds = {"pin": pins, "apart": apart, "rank-capacity": ranks, "node-capacity": nodes}
    return parse_constraints(f"{kind} {text}" for kind, texts in kinds.items() for text in texts)


def place_request(*, trace: str | None, hardware: str | None, current: Path | None, **more: Any) -> PlaceRequest:
    """Return the request of the command line; raises InputError where the trace or the hardware is missing."""
    from moesim.placement.plan import read_plan
    from moesim.scenario.placing import PlaceRequest

    for flag, value in (("--trace", trace), ("--hardware", hardware)):
        if value is None:
            raise InputError(f"missing option {flag}. Try 'moesim place --help'.")
    plan = None if current is None else read_plan(current)
    return PlaceRequest(trace=str(trace), hardware=str(hardware), current=plan, **more)


def solver_options(pairs: list[str]) -> dict[str, Any]:
    """Return the solver's own options; raises InputError for one that has a flag."""
    options = parse_options(pairs)
    for key, flag in (("seed", "--seed"), ("time_limit_s", "--time-limit")):
        if key in options:
            raise InputError(f"--option {key}: give it as {flag}")
    for key in ("problem", "solver", "starts", "progress"):
        if key in options:
            raise InputError(f"--option {key}: no solver has an option of this name")
    return options


def check_seconds(flag: str, value: float, *, zero: bool = False) -> None:
    """Raise InputError unless a number of seconds is finite and positive (or 0, where that is allowed)."""
    if not (0 <= value < float("inf")) or (value == 0 and not zero):
        raise InputError(f"{flag} must be a positive number of seconds, got {value}")
