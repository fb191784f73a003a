"""``moesim calibrate`` and ``moesim validate``: what this machine takes, and how far predictions are off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.cli_common import (
    JsonFlag,
    SeedOption,
    add_row,
    console,
    emit_json,
    new_table,
    output_folder,
    progress_bar,
    show_files,
)
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.hardware.profile import CalibrationProfile
    from moesim.model.spec import ModelSpec
    from moesim.scenario.schema import Scenario


def calibrate(
    out: Annotated[Path, typer.Option(help="The *.profile.json file to write.")] = Path("local.profile.json"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[float, typer.Option(help="How long to measure.")] = 180.0,
    model: Annotated[str, typer.Option(help="Whose kernels: a catalog name or config.json.")] = "olmoe-1b-7b",
    hidden: Annotated[int | None, typer.Option(min=1, help="Another hidden size.")] = None,
    expert_intermediate: Annotated[int | None, typer.Option(min=1, help="Another expert width.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Measure this machine's kernels and copies with torch, and write a calibration profile."""
    from moesim.calibrate.run import calibrate as measure
    from moesim.model.catalog import load_model

    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds must be positive, got {seconds}")
    spec = resized(load_model(model), hidden, expert_intermediate)
    with progress_bar(quiet=json) as bar:
        profile = measure(spec, device=device, seconds=seconds, seed=seed, dtype=dtype, progress=bar)
    path = profile.write(out)
    if json:
        emit_json({"file": path, "name": profile.name, "fingerprint": profile.fingerprint,
                   "tables": [_facts(table) for table in profile.tables]})
        return
    _show(profile)
    show_files([path])


def resized(model: ModelSpec, hidden: int | None, expert_intermediate: int | None) -> ModelSpec:
    """Return `model` with other sizes; heads keep their width, so that their number follows the hidden size.

    Raises:
        InputError: a hidden size that the head width does not divide, or of a model with latent attention.
    """
    import dataclasses

    if expert_intermediate is not None:
        model = model.replace(expert_intermediate_size=expert_intermediate)
    if hidden is None or hidden == model.hidden_size:
        return model
    attention = model.attention
    if attention.kind != "gqa" or model.mixer_params or hidden % attention.head_dim:
        raise InputError(f"--hidden {hidden}: the attention of {model.name!r} ({attention.kind}, heads of "
                         f"{attention.head_dim}) cannot be made for this hidden size")
    heads = hidden // attention.head_dim
    small = dataclasses.replace(attention, num_heads=heads, num_kv_heads=min(attention.num_kv_heads, heads))
    return model.replace(hidden_size=hidden, attention=small)


def _facts(table: object) -> dict[str, object]:
    keys = ("op", "device", "shape", "dtype", "residual", "residual_max")
    sizes = len(table.sizes)  # type: ignore[attr-defined]
    return {key: getattr(table, key) for key in keys} | {"num_sizes": sizes}


def _show(profile: CalibrationProfile) -> None:
    from moesim.units import format_percent

    table = new_table(f"{profile.name} ({profile.date})", "operation", "device", "shape", "dtype", "sizes>",
                      "fit error>", "largest>", "spread>")
    for row in profile.tables:
        figures = (row.residual, row.residual_max, max(row.spread, default=None))
        add_row(table, row.op, row.device, row.shape, row.dtype, len(row.sizes),
                *(None if value is None else format_percent(value) for value in figures))
    console().print(table)


def validate(
    scenario: Annotated[Path, typer.Argument(help="A scenario with a validation study.")],
    study: Annotated[str | None, typer.Option(help="Which one, if there are several.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to (default: the scenario's).")] = None,
    json: JsonFlag = False,
) -> None:
    """Run a scenario's validation study: simulate, run the same tasks for real, compare."""
    from moesim.scenario.load import load_scenario
    from moesim.scenario.reporter import QuietReporter, RichReporter
    from moesim.scenario.run import run_scenario

    loaded = load_scenario(scenario)
    name = _validation_study(loaded, study)
    folder = output_folder(output, loaded.output_folder)
    if json:
        outcome = run_scenario(loaded, folder, QuietReporter(), name)
        rows = outcome.studies[0].table.to_dict(orient="records")
        emit_json({"study": name, "rows": rows, "notes": outcome.studies[0].notes, "files": outcome.files})
        return
    with RichReporter(console(), console(stderr=True)) as reporter:
        outcome = run_scenario(loaded, folder, reporter, name)
    show_files(outcome.files)


def _validation_study(scenario: Scenario, name: str | None) -> str:
    """Return the name of the study to run; raises InputError if there is none, or no telling which."""
    names = [study.name for study in scenario.studies if study.kind == "validation"]
    if name is not None:
        if scenario.study(name).kind != "validation":
            raise InputError(f"study {name!r} is of kind {scenario.study(name).kind!r}, not 'validation'")
        return name
    if len(names) != 1:
        found = f"several ({', '.join(names)}): choose with --study" if names else "none"
        raise InputError(f"scenario {scenario.name!r}: expected one validation study, found {found}")
    return names[0]
