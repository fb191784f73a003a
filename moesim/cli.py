"""The command line: one verb per stage, each a thin adapter over one function of the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim import __version__
from moesim.cli_calibrate import calibrate_app
from moesim.cli_catalog import hardware_app, model_app
from moesim.cli_common import (
    ExecutorOption,
    JsonFlag,
    OneLineErrors,
    PluginOption,
    console,
    emit_json,
    load_plugins,
    output_folder,
    plain,
    show_files,
)
from moesim.cli_export import export
from moesim.cli_measure import validate
from moesim.cli_place import place_app
from moesim.cli_simulate import simulate
from moesim.cli_sweep import compile_, sweep
from moesim.cli_trace import trace_app

if TYPE_CHECKING:
    from moesim.scenario.run import RunOutcome
    from moesim.simulate.study import StudyResult

app = typer.Typer(
    name="moesim", cls=OneLineErrors, pretty_exceptions_enable=False, add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]})


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moesim {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and stop.")] = False,
    debug: Annotated[bool, typer.Option(help="Show a traceback instead of a one-line error.")] = False,
) -> None:
    """Where should each expert of an MoE model live, what should stay cached, and how fast will it be?"""
    del version, debug  # the first acts in its callback, the second in OneLineErrors
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    scenario: Annotated[Path, typer.Argument(help="A scenario file (YAML).")],
    output: Annotated[Path | None, typer.Option(help="Folder to write to (default: the scenario's).")] = None,
    only: Annotated[str | None, typer.Option(metavar="STUDY", help="Run only this study.")] = None,
    executor: ExecutorOption = "auto",
    plugin: PluginOption = [],  # noqa: B006
    json: JsonFlag = False,
) -> None:
    """Run the studies of a scenario and write tables, results and a report."""
    from moesim.scenario.load import load_scenario
    from moesim.scenario.reporter import QuietReporter, RichReporter
    from moesim.scenario.run import run_scenario

    load_plugins(plugin)
    loaded = load_scenario(scenario)
    folder = output_folder(output, loaded.output_folder)
    if json:
        emit_json(_outcome(loaded.name, run_scenario(loaded, folder, QuietReporter(), only, executor)))
        return
    with RichReporter(console(), console(stderr=True)) as reporter:
        outcome = run_scenario(loaded, folder, reporter, only, executor)
    show_files(outcome.files)


def _outcome(name: str, outcome: RunOutcome) -> dict[str, Any]:
    return {"scenario": name, "studies": [study_json(study) for study in outcome.studies],
            "files": [str(file) for file in outcome.files]}


def study_json(study: StudyResult) -> dict[str, Any]:
    """Return a study as plain JSON values."""
    return {"name": study.name, "kind": study.kind, "title": study.title, "notes": list(study.notes),
            "rows": plain(study.table.to_dict(orient="records"))}


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder with *.study.json files.")],
    json: JsonFlag = False,
) -> None:
    """Write the HTML report of a run folder again, from the files in it."""
    from moesim.report.html import report_folder

    path = report_folder(folder)
    if json:
        emit_json({"file": path})
    else:
        show_files([path])


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write (default: stdout).")] = None,
) -> None:
    """Print the JSON Schema of scenario files, for an editor that checks and completes them."""
    import json

    from moesim.artifacts import write_text
    from moesim.scenario.load import scenario_schema

    text = json.dumps(scenario_schema(), indent=1)
    if out is None:
        typer.echo(text)
    else:
        write_text(out, text + "\n")
        typer.echo(f"wrote {out}", err=True)


app.add_typer(trace_app, name="trace")
app.add_typer(place_app, name="place")
app.add_typer(hardware_app, name="hardware")
app.add_typer(model_app, name="model")
app.add_typer(calibrate_app, name="calibrate")
app.command()(simulate)
app.command()(sweep)
app.command("compile")(compile_)
app.command()(validate)
app.command()(export)


def main() -> None:
    """Entry point of the ``moesim`` command."""
    app()


if __name__ == "__main__":
    main()
