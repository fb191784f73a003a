"""Validate offloaded decode: predict with interleaved micro-benchmarks, run the same graph for real, compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moesim.cache.cache import ExpertCache
from moesim.errors import CheckError
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile
from moesim.lowering.batch import expert_counts
from moesim.lowering.graph import TaskGraph
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import OffloadProgram
from moesim.model.spec import ModelSpec
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.units import ns_from_s
from moesim.validate.overhead import executor_seconds, overhead_tables
from moesim.validate.probe import Block, ProbePlan, measured_tables, overlap_shares, probe
from moesim.validate.report import ValidationReport, compare
from moesim.validate.torch_executor import run_torch
from moesim.validate.world import OffloadWorld

Progress = Callable[[str, float, float], None]
CONTEXT_POINTS = 3
OVERLAP_ROUNDS = 3


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
    plan, few = probe_plan(case), max(2, probe_rounds // 4)
    tell("warming up", 0, repeats)
    _calibrate(case, plan, few, seed)
    before = _calibrate(case, plan, probe_rounds, seed + 1)
    outcomes, overheads = [], []
    for repetition in range(repeats):
        program, measured = _real_run(case, case.build, _profile(case, before, {}))
        after = _calibrate(case, plan, probe_rounds, seed + 2 + repetition)
        predicted, profile = _predict(case, before.merged(after))
        outcomes.append((program, measured, predicted, profile))
        overheads.append({t.shape: ns_from_s(t.seconds[0]) for t in profile.tables if t.op == "task_overhead"})
        before = after
        tell("real runs", repetition + 1, repeats)
    report = compare(
        [row[2] for row in outcomes],
        [row[1] for row in outcomes],
        overheads_ns=overheads,
        executor_s=[executor_seconds(row[0].graph, row[1]) for row in outcomes],
    )
    program, measured, predicted, profile = outcomes[-1]
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


@dataclass(frozen=True)
class _Calibration:
    """Micro-benchmarks of kernels and copies, and short real runs on other routing (for the executor's own time)."""

    block: Block
    dry: tuple[tuple[TaskGraph, pd.DataFrame], ...]

    def merged(self, other: _Calibration) -> _Calibration:
        return _Calibration(self.block.merged(other.block), self.dry + other.dry)


def _calibrate(case: OffloadValidation, plan: ProbePlan, rounds: int, seed: int) -> _Calibration:
    block = probe(
        case.world,
        case.model,
        case.machine,
        plan,
        num_slots=case.num_slots,
        rounds=rounds,
        seed=seed,
        device=case.device,
    )
    program, tasks = _real_run(case, case.dry, _profile(case, _Calibration(block, ()), {}))
    return _Calibration(block, ((program.graph, tasks),))


def _profile(case: OffloadValidation, found: _Calibration, overlap: dict[str, float]) -> CalibrationProfile:
    kind = case.machine.hardware.device(case.machine.device).kind
    tables = measured_tables(found.block, overlap, case.model, kind, case.machine.route[-1].kind)
    return CalibrationProfile("interleaved", tables + (overhead_tables(found.dry) if found.dry else ()))


def _predict(case: OffloadValidation, found: _Calibration) -> tuple[pd.DataFrame, CalibrationProfile]:
    """Simulate; how much copies and compute overlap comes from the schedule itself, so go round until it settles."""
    overlap: dict[str, float] = {}
    for _ in range(OVERLAP_ROUNDS):
        profile = _profile(case, found, overlap)
        predicted = run_simpy(case.build(_cost(case, profile)))
        overlap = overlap_shares(predicted)
    return predicted, profile


def _cost(case: OffloadValidation, profile: CalibrationProfile | None) -> CostModel:
    return CostModel(case.machine.hardware, profile)


def _real_run(
    case: OffloadValidation, build: Callable[[CostModel], OffloadProgram], profile: CalibrationProfile
) -> tuple[OffloadProgram, pd.DataFrame]:
    program = build(_cost(case, profile))
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
