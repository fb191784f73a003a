"""``moesim validate``: how far predictions are off; and the models of other sizes that are calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim import cli_validate_hf as hf_options
from moesim.cli_common import JsonFlag, SeedOption, console, emit_json, output_folder, show_files
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.model.spec import ModelSpec
    from moesim.scenario.schema import Scenario


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


def validate(
    context: typer.Context,
    scenario: Annotated[Path | None, typer.Argument(help="A scenario with a validation study.")] = None,
    study: Annotated[str | None, typer.Option(help="Which one, if there are several.")] = None,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Folder to write to (default: the scenario's, or results/NAME).")] = None,
    hf: hf_options.Hf = None,
    slots: hf_options.Slots = None,
    policy: hf_options.Policy = "lru",
    prefetch: hf_options.Prefetch = "none",
    prefetch_width: hf_options.PrefetchWidth = 2,
    miss: hf_options.Miss = "load",
    tier: hf_options.Tier = "memory",
    tier_bytes_per_s: hf_options.TierRate = None,
    device: hf_options.Device = "cpu",
    random_weights: hf_options.RandomWeights = False,
    prompt: hf_options.Prompt = None,
    prompts: hf_options.Prompts = None,
    random_tokens: hf_options.RandomTokens = None,
    new_tokens: hf_options.NewTokens = 32,
    repeats: hf_options.Repeats = 3,
    hardware: hf_options.Hardware = None,
    profile: hf_options.Profile = None,
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Predict and run for real: a scenario's validation study, or with --hf a real model whose experts are offloaded."""
    if hf is not None:
        hf_options.validate_model(context, scenario, study, output, json)
        return
    if scenario is None:
        raise InputError("expected a scenario, or --hf PATH for a Hugging Face model")
    hf_options.refuse_without_model(context)
    _validate_study(scenario, study, output, json)


def _validate_study(scenario: Path, study: str | None, output: Path | None, json: bool) -> None:
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
