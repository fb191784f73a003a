"""Validation of a real Hugging Face model under an offload plan: from options to files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.calibrate.kernels import torch_device
from moesim.errors import InputError
from moesim.export.perfetto import write_timeline
from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.hardware.profile import read_profile
from moesim.lowering.machine import offload_machine
from moesim.model.config import spec_from_config
from moesim.traces.store import write_trace
from moesim.units import format_bytes, format_percent, format_seconds
from moesim.validate.hf_load import load_hf_model, read_requests
from moesim.validate.hf_plan import HfPlan
from moesim.validate.hf_run import Given, HfValidation, validate_hf

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class HfOptions:
    """What to run and how; see `HfPlan`, `read_requests` and `validate_hf`. `hardware` None: predict from micro-benchmarks."""

    hf: Path
    slots: int | None = None
    policy: str = "lru"
    prefetch: str = "none"
    prefetch_width: int = 2
    miss: str = "load"
    tier: str = "memory"
    tier_bytes_per_s: float | None = None
    device: str = "cpu"
    random_weights: bool = False
    prompt: str | None = None
    prompts: Path | None = None
    random_tokens: int | None = None
    new_tokens: int = 32
    repeats: int = 3
    hardware: str | None = None
    profile: Path | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The model's name, from its folder."""
        path = self.hf.resolve()
        return path.parent.name if path.is_file() else path.name

    @property
    def plan(self) -> HfPlan:
        """How it is offloaded; raises InputError without `slots`."""
        if self.slots is None:
            raise InputError("--hf needs --slots N: expert slots per MoE layer")
        return HfPlan(self.slots, self.policy, self.prefetch, self.prefetch_width, self.miss, self.tier,
                      self.tier_bytes_per_s, torch_device(self.device))


def run_hf_validation(options: HfOptions, folder: Path, progress: Progress | None = None) -> tuple[HfValidation, list[Path]]:
    """Run, and write report, trace, results and timeline to a folder; return what came out and the files.

    Raises:
        InputError, CheckError: as `validate_hf`.
    """
    plan = options.plan
    if options.profile is not None and options.hardware is None:
        raise InputError("--profile needs --hardware NAME: the machine that it was measured on")
    model = load_hf_model(options.hf, plan.device, random_weights=options.random_weights, seed=options.seed)
    requests = read_requests(model, options.hf, text=options.prompt, prompts=options.prompts,
                             random_tokens=options.random_tokens, seed=options.seed)
    checkpoint = None if options.random_weights else options.hf
    found = validate_hf(model, requests, plan, new_tokens=options.new_tokens, repeats=options.repeats, checkpoint=checkpoint,
                        given=_given(options, model), seed=options.seed, progress=progress)
    return found, write_files(found, folder, options.name)


def write_files(found: HfValidation, folder: Path, name: str) -> list[Path]:
    """Write the report, the routing, both runs, their timeline and the measured tables."""
    report = dataclasses.replace(found.report, provenance=found.report.provenance | found.facts)
    files = [report.write(folder / f"{name}.validation.json"), write_trace(found.trace, folder / f"{name}.trace.parquet"),
             found.predicted.write(folder / f"{name}.predicted.result"),
             found.measured.write(folder / f"{name}.measured.result"),
             write_timeline(found.predicted, folder / f"{name}.perfetto.json", overlay=found.measured)]
    return files if found.profile is None else [*files, found.profile.write(folder / f"{name}.profile.json")]


def _given(options: HfOptions, model: Any) -> Given | None:
    if options.hardware is None:
        return None
    hardware = load_hardware(options.hardware)
    profile = read_profile(options.profile) if options.profile else None
    spec = spec_from_config(model.config.to_dict(), options.name)
    return Given(spec, offload_machine(hardware), lambda: CostModel(hardware, profile))


def fact_lines(found: HfValidation) -> list[tuple[str, str]]:
    """Return names and values to print."""
    facts, measured, simulated = found.facts, found.facts["measured"], found.facts["simulated"]
    counts, usual = measured["cache"], facts["usual_computation"]
    rows = [
        ("outputs", facts["outputs"]),
        ("slots", f"{facts['slots']}, {format_bytes(facts['slot_bytes'])} with those that experts pass through"),
        ("slow tier", facts["slow_tier"]),
        ("hits, misses, copies", f"{counts['hits']:,}, {counts['misses']:,}, {measured['num_copies']:,}: as replay counts them"),
        ("hit rate", f"{format_percent(measured['hit_rate'])} (simulated {format_percent(simulated['hit_rate'])})"),
        ("bytes copied", format_bytes(measured["htod_bytes"])),
        ("tokens/s", f"{measured['tokens_per_s']:.1f} (plain model {facts['plain_tokens_per_s']:.1f})"),
        ("time", f"{format_seconds(measured['makespan_s'])}: experts {format_seconds(measured['expert_s'])}, the rest "
                 f"{format_seconds(measured['rest_s'])}, waiting {format_seconds(measured['wait_s'])}; copies "
                 f"{format_seconds(measured['load_s'])}"),
        ("simulated time", f"{format_seconds(simulated['makespan_s'])}; median error over {len(found.report.runs)} runs "
                           f"{format_percent(found.report.median_error)}"),
    ]
    if "same_tokens" in usual:
        words = "the same tokens" if usual["same_tokens"] else "other tokens"
        rows.append((f"plain model with {usual['implementation']}",
                     f"{words}, logits differ by up to {usual['largest_logit_difference']:.2g}"))
    return rows
