"""``moesim export``: hand a plan to a serving engine, or a run to a timeline viewer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli_common import JsonFlag, emit_json, show_pairs
from moesim.errors import InputError

PERFETTO = "perfetto"


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
