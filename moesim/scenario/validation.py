"""The validation study: the offload scenario's task graph, small enough for this machine, predicted and run for real."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.calibrate.kernels import spec_for_dtype, torch_device
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.offload import OffloadProgram
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.scenario.inputs import Inputs
from moesim.scenario.offload import Offload
from moesim.scenario.schema import ValidationModel, ValidationStudy
from moesim.simulate.result import SimulationResult
from moesim.simulate.run import simulate
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps
from moesim.traces.trace import RoutingTrace
from moesim.units import format_bytes, format_percent
from moesim.validate.local import local_machine
from moesim.validate.offload import OffloadValidation, ValidationRun, validate_offload
from moesim.validate.world import OffloadWorld, WorldConfig

HEAD_DIM = 64
VOCABULARY = 8192
ROUND_SECONDS = 0.05
MIN_DRY_STEPS = 4

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class ValidatedStudy:
    """The run, with the last prediction and the last real run as results of one schema."""

    run: ValidationRun
    predicted: SimulationResult
    measured: SimulationResult
    notes: tuple[str, ...]


def small_model(sizes: ValidationModel, trace: RoutingTrace) -> ModelSpec:
    """Return a model of the study's sizes with the trace's experts and top-k in its first layers."""
    if sizes.num_layers > trace.num_layers:
        raise InputError(
            f"validation: model.num_layers {sizes.num_layers} exceeds the trace's {trace.num_layers} MoE layers"
        )
    heads = max(1, sizes.hidden_size // HEAD_DIM)
    model = ModelSpec(
        name="validation",
        num_layers=sizes.num_layers,
        moe_layers=tuple(range(sizes.num_layers)),
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        hidden_size=sizes.hidden_size,
        expert_intermediate_size=sizes.expert_intermediate_size,
        attention=AttentionSpec(heads, heads, HEAD_DIM),
        vocab_size=VOCABULARY,
    )
    return spec_for_dtype(model, sizes.dtype)


def first_layers(trace: RoutingTrace, num_layers: int) -> RoutingTrace:
    """Return the trace of the first MoE layers."""
    weights = None if trace.gate_weights is None else trace.gate_weights[:, :num_layers]
    return dataclasses.replace(
        trace,
        expert_ids=trace.expert_ids[:, :num_layers],
        gate_weights=weights,
        layer_ids=trace.layer_ids[:num_layers],
    )


def run_validation(
    inputs: Inputs, study: ValidationStudy, progress: Progress | None = None
) -> ValidatedStudy:
    """Predict and run for real; raises MissingDependencyError without torch."""
    tell = progress or (lambda *_: None)
    tell("filling the expert pool", 0, 1)
    device, seed = torch_device(study.device), inputs.scenario.seed
    model = small_model(study.model, inputs.trace)
    train, test = split_requests(
        first_layers(inputs.trace, model.num_moe_layers), study.train_fraction, seed
    )
    machine = local_machine(device, study.slow_tier_bytes_per_s)
    offload = _offload(model, train, test, machine, study, study.steps, seed)
    dry = _offload(model, train, train, machine, study, max(MIN_DRY_STEPS, study.steps // 4), seed)
    slots = min(study.slots_per_layer, model.num_experts) * model.num_moe_layers
    config = WorldConfig(
        device, study.model.dtype, study.slow_tier_bytes_per_s, max(map(_max_context, (offload, dry))), study.chunks, seed
    )
    case = OffloadValidation(
        model=model,
        trace=test,
        steps=offload.steps,
        machine=machine,
        world=OffloadWorld(model, slots, config),
        build=lambda cost: offload.program(study.point, cost),
        dry=lambda cost: dry.program(study.point, cost),
        device=device,
        num_slots=slots,
        chunk_bytes=tuple(offload.program(study.point, CostModel(machine.hardware)).transfers.chunk_bytes),
        with_cpu=study.miss != "load",
    )
    tell("filling the expert pool", 1, 1)
    rounds = max(8, round(study.calibration_seconds / (study.repeats + 2) / ROUND_SECONDS))
    run = validate_offload(case, repeats=study.repeats, probe_rounds=rounds, seed=seed, progress=progress)
    provenance = inputs.provenance | {"study": study.name, "device": device}
    predicted, measured = (
        _as_result(run.program, table, f"{study.name}/{name}", provenance)
        for name, table in (("predicted", run.predicted), ("measured", run.measured))
    )
    return ValidatedStudy(run, predicted, measured, _notes(study, model, run, device))


def _offload(
    model: ModelSpec, train: RoutingTrace, part: RoutingTrace, machine: Any, study: ValidationStudy, max_steps: int, seed: int
) -> Offload:
    steps = closed_loop_steps(part, batch_size=1, max_steps=max_steps, include_prefill=False, repeat=True, seed=seed)
    return Offload(model, train, part, steps, machine, seed, chunks=study.chunks)


def _max_context(offload: Offload) -> int:
    return int(max(np.max(offload.test.position[step.rows]) for step in offload.steps)) + 1


def _as_result(
    program: OffloadProgram, tasks: Any, name: str, provenance: dict[str, Any]
) -> SimulationResult:
    """Derive the usual tables from a task table that is already there."""
    return simulate(program, name=name, executor=lambda _: tasks, provenance=provenance)


def _notes(study: ValidationStudy, model: ModelSpec, run: ValidationRun, device: str) -> tuple[str, ...]:
    report = run.report
    return (
        f"{study.steps} decode steps over {model.num_moe_layers} layers of {model.num_experts} experts of "
        f"{format_bytes(model.expert_bytes)} ({study.model.dtype}, {device}); the slow tier is paced to "
        f"{format_bytes(study.slow_tier_bytes_per_s)}/s.",
        f"End to end over {len(report.runs)} repetitions: median error {format_percent(report.median_error)}, largest "
        f"{format_percent(report.max_error)}.",
        "Each run is predicted from micro-benchmarks before and after it (single tasks in random order, random experts) and "
        "from the executor's own overhead on other routing; nothing is fitted to the run.",
        *report.notes,
    )
