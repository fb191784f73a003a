"""``moesim validate --hf``: the options, and what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli_common import (
    add_row,
    console,
    emit_json,
    new_table,
    output_folder,
    progress_bar,
    show_files,
    show_pairs,
)
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.scenario.validation_hf import HfOptions
    from moesim.validate.report import ValidationReport

PANEL = "A real model (--hf)"

Hf = Annotated[Path | None, typer.Option(
    help="A Hugging Face MoE in a local folder: run it with its experts offloaded; outputs do not change.", rich_help_panel=PANEL)]
Slots = Annotated[int | None, typer.Option(min=1, help="Expert slots per MoE layer.", rich_help_panel=PANEL)]
Policy = Annotated[str, typer.Option(help="Cache policy.", rich_help_panel=PANEL)]
Prefetch = Annotated[str, typer.Option(help="Prefetcher that names experts of the next layer.", rich_help_panel=PANEL)]
PrefetchWidth = Annotated[int, typer.Option(min=1, help="Most experts that it names.", rich_help_panel=PANEL)]
Miss = Annotated[str, typer.Option(
    metavar="load|cpu", help="Load a missing expert first, or compute it where it lies.", rich_help_panel=PANEL)]
Tier = Annotated[str, typer.Option(
    metavar="memory|file", help="Where all experts lie: host memory, or memory-mapped safetensors.", rich_help_panel=PANEL)]
TierRate = Annotated[float | None, typer.Option(help="Pace the slow tier (default: as fast as it is).", rich_help_panel=PANEL)]
Device = Annotated[str, typer.Option(metavar="cpu|cuda|auto", help="Where the model runs.", rich_help_panel=PANEL)]
RandomWeights = Annotated[bool, typer.Option(
    "--random-weights", help="Only the config is read; weights are random.", rich_help_panel=PANEL)]
Prompt = Annotated[str | None, typer.Option(help="A text (the folder needs a tokenizer).", rich_help_panel=PANEL)]
Prompts = Annotated[Path | None, typer.Option(
    help='A file of lines {"request_id": 0, "token_ids": [1, 2, 3]}.', rich_help_panel=PANEL)]
RandomTokens = Annotated[int | None, typer.Option(help="One prompt of so many random tokens (default: 32).", rich_help_panel=PANEL)]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate per request, greedily.", rich_help_panel=PANEL)]
Repeats = Annotated[int, typer.Option(min=1, help="Offloaded runs.", rich_help_panel=PANEL)]
Hardware = Annotated[str | None, typer.Option(
    help="Predict with this machine (default: micro-benchmarks between the runs).", rich_help_panel=PANEL)]
Profile = Annotated[Path | None, typer.Option(help="Measured times of that machine (*.profile.json).", rich_help_panel=PANEL)]

OTHERS = {"context", "scenario", "study", "output", "json"}


def validate_model(context: typer.Context, scenario: Path | None, study: str | None, output: Path | None, json: bool) -> None:
    """Validate the model that the options name; raises InputError if a scenario is named too."""
    if scenario is not None or study is not None:
        raise InputError("give a scenario or --hf PATH, not both")
    from moesim.scenario.validation_hf import HfOptions, fact_lines, run_hf_validation

    options = HfOptions(**{name: value for name, value in context.params.items() if name not in OTHERS})
    folder = _folder(options, output)
    with progress_bar(quiet=json) as progress:
        found, files = run_hf_validation(options, folder, progress)
    if json:
        emit_json({"facts": found.facts, "rows": found.report.kinds.to_dict(orient="records"),
                   "runs": found.report.runs.to_dict(orient="records"), "notes": found.report.notes, "files": files})
        return
    show_pairs(f"{options.name}, experts offloaded", fact_lines(found))
    _show_kinds(found.report)
    show_files(files)


def _folder(options: HfOptions, output: Path | None) -> Path:
    return output_folder(output, Path("results") / options.name)


def _show_kinds(report: ValidationReport) -> None:
    from moesim.units import format_percent, format_seconds

    table = new_table("By kind of task", "kind", "tasks>", "predicted>", "measured>", "spread>", "error>")
    for row in report.kinds.to_dict(orient="records"):
        add_row(table, row["kind"], row["num_tasks"], *(format_seconds(row[name]) for name in ("predicted_s", "measured_s")),
                *(format_percent(row[name]) for name in ("spread", "error")))
    console().print(table)


def refuse_without_model(context: typer.Context) -> None:
    """Raise InputError if an option that belongs to --hf was given without it."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name not in OTHERS and source is not None and source.name == "COMMANDLINE":
            raise InputError(f"--{name.replace('_', '-')} belongs to --hf PATH")
