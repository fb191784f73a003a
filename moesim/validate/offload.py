"""Validate offloaded decode: predict with interleaved micro-benchmarks, run the same graph for real, compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moesim.cache.cache import ExpertCache
from moesim.errors import CheckError
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.lowering.batch import expert_counts
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import OffloadProgram
from moesim.model.spec import ModelSpec
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.validate.overhead import NullWorld, overhead_tables
from moesim.validate.probe import ProbePlan, Samples, measured_tables, probe
from moesim.validate.report import ValidationReport, compare
from moesim.validate.torch_executor import run_torch
from moesim.validate.world import OffloadWorld

Progress = Callable[[str, float, float], None]
CONTEXT_POINTS = 3


@dataclass(frozen=True)
class OffloadValidation:
    """One validated scenario: how to build its program on a cost model, afresh for every run.

    `build` returns a program with a cache of its own; `world` executes it; `dry` builds one on other routing
    (the overhead of the executor is measured on that, so that no figure of the run itself enters its prediction).
    """

    model: ModelSpec
    trace: RoutingTrace
    steps: list[Step]
    machine: OffloadMachine
    world: OffloadWorld
    build: Callable[[CostModel], OffloadProgram]
    dry: Callable[[CostModel], OffloadProgram]
    device: str
    num_slots: int
    chunk_bytes: tuple[int, ...]
    with_cpu: bool


@dataclass(frozen=True)
class ValidationRun:
    """The report, and the last prediction and real run (task tables of one program)."""

    report: ValidationReport
    program: OffloadProgram
    predicted: pd.DataFrame
    measured: pd.DataFrame
    profile: CalibrationProfile


def validate_offload(
    case: OffloadValidation, *, repeats: int, probe_rounds: int, seed: int, progress: Progress | None = None
) -> ValidationRun:
    """Alternate blocks of micro-benchmarks with real runs; predict each run from the blocks at its two sides.

    Raises:
        CheckError: after a run a slot does not hold the bytes of the expert that the plan put there.
    """
    tell = progress or (lambda *_: None)
    plan = probe_plan(case)
    overheads = _overheads(case, seed)
    tell("warming up", 0, repeats)
    _block(case, plan, max(2, probe_rounds // 4), seed)
    _real_run(case, _profile(case, _block(case, plan, max(2, probe_rounds // 4), seed + 1), overheads))
    before = _block(case, plan, probe_rounds, seed + 2)
    outcomes = []
    for repetition in range(repeats):
        program, measured = _real_run(case, _profile(case, before, overheads))
        after = _block(case, plan, probe_rounds, seed + 3 + repetition)
        profile = _profile(case, before.merged(after), overheads)
        predicted = run_simpy(case.build(_cost(case, profile)))
        outcomes.append((program, predicted, measured, profile))
        before = after
        tell("real runs", repetition + 1, repeats)
    report = compare([row[1] for row in outcomes], [row[2] for row in outcomes])
    program, predicted, measured, profile = outcomes[-1]
    return ValidationRun(report, program, predicted, measured, profile)


def probe_plan(case: OffloadValidation) -> ProbePlan:
    """Return the sizes that occur in the case: expert token counts, step sizes, a few contexts, the chunks."""
    tokens = sorted({len(step.rows) for step in case.steps})
    counts = {
        int(count)
        for step in case.steps
        for layer in range(case.model.num_moe_layers)
        for count in expert_counts(case.trace.expert_ids[step.rows, layer], case.model.num_experts)
        if count
    }
    contexts = np.concatenate([case.trace.position[step.rows] + 1 for step in case.steps])
    points = sorted({int(point) for point in np.linspace(contexts.min(), contexts.max(), CONTEXT_POINTS)})
    return ProbePlan(tuple(sorted(counts)), tuple(tokens), tuple(points), case.chunk_bytes, case.with_cpu)


def _block(case: OffloadValidation, plan: ProbePlan, rounds: int, seed: int) -> Samples:
    return probe(
        case.world,
        case.model,
        case.machine,
        plan,
        num_slots=case.num_slots,
        rounds=rounds,
        seed=seed,
        device=case.device,
    )


def _profile(
    case: OffloadValidation, samples: Samples, overheads: tuple[MeasuredTable, ...]
) -> CalibrationProfile:
    kind = case.machine.hardware.device(case.machine.device).kind
    tables = measured_tables(samples, case.model, kind, case.machine.route[-1].kind)
    return CalibrationProfile("interleaved", tables + overheads)


def _cost(case: OffloadValidation, profile: CalibrationProfile | None) -> CostModel:
    return CostModel(case.machine.hardware, profile)


def _overheads(case: OffloadValidation, seed: int) -> tuple[MeasuredTable, ...]:
    """Run the case's program on other routing with kernels that do nothing."""
    program = case.dry(_cost(case, None))
    return overhead_tables(program.graph, run_torch(program, NullWorld()))


def _real_run(case: OffloadValidation, profile: CalibrationProfile) -> tuple[OffloadProgram, pd.DataFrame]:
    program = case.build(_cost(case, profile))
    case.world.preload(_contents(program.cache))
    measured = run_torch(program, case.world, device=case.device)
    for slot, key in _contents(program.cache).items():
        if program.transfers.has_arrived(key) and not case.world.slot_holds(slot, key):
            raise CheckError(
                f"after the real run slot {slot} does not hold expert {divmod(key, case.model.num_experts)}"
            )
    return program, measured


def _contents(cache: ExpertCache) -> dict[int, int]:
    """Return slot -> key of every resident expert."""
    return {
        cache.slot_of(layer, expert): layer * cache.num_experts + expert
        for layer in range(cache.num_layers)
        for expert in cache.residents(layer)
    }
