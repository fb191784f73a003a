"""``moesim sweep``: thousands of what-ifs of one study; ``moesim compile``: the fast engines, now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli_common import (
    JsonFlag,
    PluginOption,
    add_row,
    console,
    emit_json,
    load_plugins,
    new_table,
    progress_bar,
    show_files,
)

if TYPE_CHECKING:
    import pandas as pd

    from moesim.scenario.sweep import Sweep

SHOWN = 12


def sweep(
    scenario: Annotated[Path, typer.Argument(help="A scenario file (YAML).")],
    study: Annotated[str, typer.Option(help="The study whose points or plans are swept.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The *.sweep folder to write; it resumes what it finds there.")],
    vary: Annotated[list[str], typer.Option(
        metavar="KEY=VALUES", help="e.g. pcie.bytes_per_s=log(8e9,64e9,16) or slots_per_layer=8,16,32; may be repeated.")] = [],  # noqa: B006
    plugin: PluginOption = [],  # noqa: B006
    json: JsonFlag = False,
) -> None:
    """Cross the points of a study with other machines: every combination, streamed to Parquet."""
    from moesim.scenario.load import load_scenario
    from moesim.scenario.sweep import best_rows, make_sweep, run_sweep
    from moesim.scenario.sweep_axes import parse_axis
    from moesim.scenario.sweep_store import read_sweep

    load_plugins(plugin)
    made = make_sweep(load_scenario(scenario), study, [parse_axis(text) for text in vary])
    with progress_bar(quiet=json) as progress:
        folder = run_sweep(made, out, progress)
    rows = read_sweep(folder.path)
    best = best_rows(rows, made.axes)
    files = [folder.path, *_picture(made, rows, folder.path)]
    if json:
        emit_json({"rows": made.num_rows, "files": files, "best": best.to_dict(orient="records")})
        return
    _show(made, best)
    show_files(files)


def _picture(made: Sweep, rows: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw the sweep beside its parts, where there is an axis to draw over."""
    from moesim.artifacts import atomic_path
    from moesim.errors import InputError
    from moesim.report.plots import png_bytes
    from moesim.report.sweep import sweep_figure

    try:
        figure = sweep_figure(rows, [(axis.key, axis.values) for axis in made.axes])
    except InputError:
        return []
    path = folder / "sweep.png"
    with atomic_path(path) as temporary:
        temporary.write_bytes(png_bytes(figure))
    return [path]


def _show(made: Sweep, best: pd.DataFrame) -> None:
    from moesim.report.sweep import CHOICE_KEYS, axis_text
    from moesim.report.tables import format_value

    axes = {axis.key for axis in made.axes}
    keys = [name for name in best if name in axes or (name in CHOICE_KEYS and best[name].astype(str).nunique() > 1)]
    shown = [*keys, *(name for name in ("hit_rate", "tpot_s", "step_time_s", "tokens_per_s") if name in best)]
    table = new_table(f"{made.study.name}: {made.num_rows:,} points; the best choice that sees no future, by machine",
                      *(f"{name}>" for name in shown))
    for row in best.head(SHOWN).to_dict(orient="records"):
        add_row(table, *(axis_text(name)(row[name]) if "." in name else format_value(name, row[name]) for name in shown))
    console().print(table)
    if len(best) > SHOWN:
        console().print(f"... and {len(best) - SHOWN} more; all rows are in the Parquet files")


def compile_(json: JsonFlag = False) -> None:
    """Compile the fast engines now; otherwise it happens in the background while the first run uses SimPy."""
    from moesim.simulate.compile_ahead import compile_now

    path = compile_now()
    if json:
        emit_json({"marker": path})
    else:
        typer.echo("the compiled engines are ready")
