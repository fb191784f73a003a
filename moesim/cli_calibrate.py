"""``moesim calibrate``: measure this machine, take over what others measured, lay two profiles side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli_calibrate_show import profile_facts, show_breaks, show_contention, show_notes, show_profile
from moesim.cli_common import (
    EXIT_INTERRUPTED,
    JsonFlag,
    OptionList,
    SeedOption,
    add_row,
    console,
    emit_json,
    new_table,
    parse_options,
    progress_bar,
    show_files,
)
from moesim.cli_measure import resized
from moesim.errors import InputError, unknown

if TYPE_CHECKING:
    from moesim.calibrate.compare import ProfileComparison
    from moesim.calibrate.transfer import TransferError
    from moesim.hardware.profile import CalibrationProfile
    from moesim.model.spec import ModelSpec

calibrate_app = typer.Typer(
    no_args_is_help=False, help="Measure this machine, or take over what others measured.")
_VERSION_KEYS = ("version", "nccl_version", "exchange_version")


@calibrate_app.callback(invoke_without_command=True)
def calibrate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The *.profile.json file to write; OUT.partial keeps an interrupted run.")] = Path("local.profile.json"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seconds: Annotated[float | None, typer.Option(help="How long to measure, at most 300 (default: 120; with --full 300).")] = None,
    full: Annotated[bool, typer.Option("--full", help="Every dtype that torch has here, and weights of 8 and 4 bits.")] = False,
    parts: Annotated[str, typer.Option(help="What to measure, separated by commas.")] = "kernels,copies,files,collectives",
    model: Annotated[str, typer.Option(help="Whose kernels: a catalog name or config.json.")] = "olmoe-1b-7b",
    hidden: Annotated[int | None, typer.Option(min=1, help="Another hidden size.")] = None,
    expert_intermediate: Annotated[int | None, typer.Option(min=1, help="Another expert width.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    disk: Annotated[Path | None, typer.Option(help="A folder on the disk to read from (default: that of --out).")] = None,
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Measure this machine's kernels, copies, files and collectives, and write a calibration profile."""
    if context.invoked_subcommand is not None:
        _refuse_stray_options(context)
        return
    from moesim.calibrate.run import DEFAULT_SECONDS, MAX_SECONDS
    from moesim.model.catalog import load_model

    if seconds is None:
        seconds = MAX_SECONDS if full else DEFAULT_SECONDS
    if not 0 < seconds < float("inf"):
        raise InputError(f"--seconds must be positive, got {seconds}")
    if seconds > MAX_SECONDS:
        raise InputError(f"--seconds must be at most {MAX_SECONDS:g}, got {seconds:g}")
    spec = resized(load_model(model), hidden, expert_intermediate)
    options = {"device": device, "seconds": seconds, "seed": seed, "dtype": dtype, "full": full,
               "parts": tuple(part.strip() for part in parts.split(",")), "disk": disk or out.absolute().parent}
    _refuse_bad_output(out)
    profile, path = _measure(spec, out, options, quiet=json)
    if json:
        emit_json(profile_facts(profile, path))
        return
    show_profile(profile)
    show_breaks(profile)
    show_contention(profile)
    show_notes(profile)
    show_files([path])


def _refuse_bad_output(out: Path) -> None:
    """Raise InputError, before any work, for a file to write that is a folder; make its folder."""
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder, not a file")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)


def _measure(spec: ModelSpec, out: Path, options: dict[str, Any], *, quiet: bool) -> tuple[CalibrationProfile, Path]:
    """Measure and write; an interrupted run leaves `out`.partial, from which the same command goes on."""
    from moesim.calibrate import run

    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        typer.echo(f"going on from {partial}", err=True)
    try:
        with progress_bar(quiet=quiet) as bar:
            profile = run.calibrate(spec, **options, partial=partial, progress=bar)
    except KeyboardInterrupt:
        typer.echo(f"error: interrupted; what was measured is in {partial}, and the same command goes on from there", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    path = profile.write(out)
    partial.unlink(missing_ok=True)
    return profile, path


def _refuse_stray_options(context: typer.Context) -> None:
    """Raise InputError for an option of the measurement that stands before another verb, where it would do nothing."""
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
    if given:
        verb = f"calibrate {context.invoked_subcommand}"
        raise InputError(f"--{given[0].replace('_', '-')} belongs to a measurement; put options of '{verb}' after it")


@calibrate_app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="aiconfigurator, torch-profiler, llama-bench or nvbandwidth.")],
    names: Annotated[list[str], typer.Option("--from", metavar="NAME", help=(
        "A file of the source, may be repeated; for aiconfigurator a GPU (h200_sxm) or its folder."))],
    out: Annotated[Path, typer.Option("--out", "-o", help="The *.profile.json file to write.")],
    model: Annotated[str | None, typer.Option(help="aiconfigurator: whose kernels (catalog name or config.json).")] = None,
    option: OptionList = [],  # noqa: B006
    held_out: Annotated[str | None, typer.Option(metavar="MODEL", help=(
        "aiconfigurator: another model whose expert times to predict from these; prints the error."))] = None,
    hardware: Annotated[str | None, typer.Option(help="The nameplate for --held-out: a catalog name or file.")] = None,
    json: JsonFlag = False,
) -> None:
    """Take over measurements of another tool: nothing that it does not say is filled in."""
    from moesim.calibrate.imports import import_profile

    options = _options(option, model)
    if (held_out is None) != (hardware is None) or (held_out is not None and model is None):
        raise InputError("--held-out needs --model and --hardware, and --hardware stands with --held-out only")
    profile = import_profile(source, names, **options)
    error = None
    if held_out is not None and hardware is not None and model is not None:
        other = import_profile(source, names, **{**options, "model": held_out})
        error = _held_out_error(profile, model, other, held_out, hardware)
    path = profile.write(out)
    if json:
        emit_json(profile_facts(profile, path) | ({"held_out": vars(error) | {"model": held_out}} if error else {}))
        return
    show_profile(profile)
    show_notes(profile)
    if error is not None:
        _show_held_out(error, str(model), str(held_out))
    show_files([path])


def _options(pairs: list[str], model: str | None) -> dict[str, Any]:
    options = parse_options(pairs)
    # a version such as 0.10 is a name, not a number
    options |= {key: value for key, _, value in (pair.partition("=") for pair in pairs) if key in _VERSION_KEYS}
    return options if model is None else {**options, "model": model}


def _held_out_error(profile: CalibrationProfile, model: str, other: CalibrationProfile, held_out: str, hardware: str) -> TransferError:
    from functools import partial

    from moesim.calibrate.imports.aic_moe import as_measured
    from moesim.calibrate.transfer import expert_table, transfer_error
    from moesim.hardware.cost import CostModel
    from moesim.hardware.load import load_hardware
    from moesim.lowering.work import experts_work
    from moesim.model.catalog import load_model

    spec, pairs = load_hardware(hardware), ((profile, model), (other, held_out))
    device = next((device.name for device in spec.devices.values() if device.kind == "gpu"), None)
    if device is None:
        raise InputError(f"hardware {hardware!r} has no device of kind 'gpu'; devices: {', '.join(spec.devices)}")
    tables = [expert_table(one) for one, _ in pairs]
    works = [partial(experts_work, as_measured(load_model(name), one.fingerprint["moe_dtype"], one.fingerprint["moe_tp"]))
             for one, name in pairs]
    return transfer_error(tables[0], works[0], tables[1], works[1], CostModel(spec), device)


@calibrate_app.command()
def form(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE", help="A *.profile.json that holds several forms.")],
    name: Annotated[str, typer.Argument(metavar="FORM", help="loop, grouped_mm or bmm.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The *.profile.json file to write.")],
    json: JsonFlag = False,
) -> None:
    """Choose the form of expert kernels that costs are taken from: the eager loop, grouped GEMM or padded batches."""
    from moesim.hardware.profile import choose_form, read_profile

    chosen = choose_form(read_profile(profile), name)
    path = chosen.write(out)
    if json:
        emit_json(profile_facts(chosen, path))
        return
    show_profile(chosen)
    show_files([path])


@calibrate_app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A *.profile.json.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    op: Annotated[str | None, typer.Option(help="Only this operation.")] = None,
    figure: Annotated[Path | None, typer.Option(help="A PNG to draw the ratios in.")] = None,
    json: JsonFlag = False,
) -> None:
    """Lay two profiles side by side: the ratio by size, where they cross, what only one has."""
    from moesim.calibrate.compare import compare_profiles
    from moesim.hardware.profile import read_profile

    profiles = [_only(read_profile(path), op) for path in (a, b)]
    comparison = compare_profiles(*profiles)
    if figure is not None:
        _draw(comparison, figure)
    if json:
        emit_json(_comparison_facts(comparison) | ({"file": figure} if figure else {}))
        return
    _show_comparison(comparison)
    if figure is not None:
        show_files([figure])


def _only(profile: CalibrationProfile, op: str | None) -> CalibrationProfile:
    import dataclasses

    if op is None:
        return profile
    tables = tuple(table for table in profile.tables if table.op == op)
    if not tables:
        raise unknown(f"operation of profile {profile.name!r}", op, {table.op for table in profile.tables})
    return dataclasses.replace(profile, tables=tables)


def _draw(comparison: ProfileComparison, figure: Path) -> None:
    from moesim.artifacts import atomic_path
    from moesim.report.calibration import comparison_figure

    data = comparison_figure(comparison)
    with atomic_path(figure) as temporary:
        temporary.write_bytes(data)


def _comparison_facts(comparison: ProfileComparison) -> dict[str, Any]:
    import dataclasses

    tables = [dataclasses.asdict(table) | {"ratios": table.ratios, "num_measured": table.num_measured}
              for table in comparison.tables]
    return {"a": comparison.name_a, "b": comparison.name_b, "tables": tables,
            "only_a": comparison.only_a, "only_b": comparison.only_b}


def _show_held_out(error: TransferError, model: str, held_out: str) -> None:
    from moesim.units import format_percent as percent

    inside = "none" if error.inside is None else f"median {percent(error.inside[0])}, largest {percent(error.inside[1])}"
    typer.echo(f"\nheld out: experts of {held_out} from those of {model}: median error {percent(error.median)}, largest "
               f"{percent(error.largest)} at {error.num_sizes} sizes; within the measured range ({error.num_inside}): {inside}; "
               f"nameplate alone: median {percent(error.nameplate_median)}")


def _show_comparison(comparison: ProfileComparison) -> None:
    table = new_table(f"b = {comparison.name_b} over a = {comparison.name_a}", "operation", "shape", "dtype", "both>",
                      "looked\nup>", "lowest>", "median>", "highest>", "crosses>", "first at>", "only\na>", "only\nb>")
    for row in comparison.tables:
        ratios = [f"{ratio:.3g}" for ratio in row.ratios] if row.ratios else [None] * 3
        first = f"{row.crossings[0].axis} {row.crossings[0].at:.4g}" if row.crossings else None
        add_row(table, row.op, row.shape or row.device, row.dtype, row.num_measured, len(row.pairs) - row.num_measured,
                *ratios, len(row.crossings), first, len(row.only_a), len(row.only_b))
    console().print(table)
    for name, keys in (("a", comparison.only_a), ("b", comparison.only_b)):
        if keys:
            words = "; ".join(" ".join(part for part in key[:4] if part) for key in keys)
            console().print(f"only {name}: {words}", soft_wrap=True, markup=False)

