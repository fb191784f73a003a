"""Validate expert-parallel plans: run their steps over real ranks, predict each from calibration between the runs, compare.

What is predicted is never calibrated on: calibration runs on other tokens under random placements
(`ranks_schedule.check_disjoint`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from moesim.calibrate.fingerprint import fingerprint
from moesim.errors import CheckError
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile
from moesim.hardware.spec import HardwareSpec
from moesim.lowering.batch import home_ranks
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.placement.plan import PlacementPlan
from moesim.simulate.result import SimulationResult
from moesim.simulate.run import simulate
from moesim.simulate.simpy_executor import run_simpy
from moesim.units import s_from_ns
from moesim.validate.ranks_case import SEQUENTIAL, RanksCase, RanksSettings, num_cores, resolve
from moesim.validate.ranks_predict import Samples, joined, phase_samples, ranks_costs, ranks_machine
from moesim.validate.ranks_reference import check_outputs, reference_outputs
from moesim.validate.ranks_report import RanksReport, plan_report, ranks_report
from moesim.validate.ranks_run import JobRun, run_jobs
from moesim.validate.ranks_schedule import (
    CALIBRATION,
    Unit,
    calibration_placements,
    calibration_units,
    check_disjoint,
    judged_units,
    shuffled,
)
from moesim.validate.ranks_table import lay_out, measured_tasks
from moesim.validate.ranks_turn import run_jobs_in_turn
from moesim.validate.ranks_world import RankWeights, WeightsConfig, check_ranks_memory, payload_bytes

Progress = Callable[[str, float, float], None]
RUNNING = "running steps over ranks"


@dataclass(frozen=True)
class RanksRun:
    """The report, and each plan's last prediction and last real run as results of one schema.

    `profile` holds what the last repetition was predicted from.
    """

    report: RanksReport
    predicted: dict[str, SimulationResult]
    measured: dict[str, SimulationResult]
    profile: CalibrationProfile


def validate_ranks(
    case: RanksCase, settings: RanksSettings = RanksSettings(), progress: Progress | None = None
) -> RanksRun:
    """Run every step under every plan for real, check what was computed, predict each repetition, and compare.

    Every token's result must equal that of the same model in one process, whatever the plan, and the ranks must have sent one
    another exactly the tokens that the lowering counts. A script that calls this with processes must guard its own start
    (``if __name__ == "__main__"``), since each rank starts afresh and imports it.

    Raises:
        CheckError: a wrong result; other tokens sent; a rank that failed; calibration on what is judged.
        InputError: a model too large for the memory, or settings that do not fit this machine.
        MissingDependencyError: torch is not installed.
    """
    tell = progress or (lambda *_: None)
    mode, device = resolve(settings, case.num_ranks)
    units = _units(case, settings)
    config = WeightsConfig(settings.dtype, max_context(units), settings.seed)
    check_ranks_memory(case.model, case.num_ranks if mode != SEQUENTIAL else 1)
    tell(RUNNING, 0, len(units))
    modelled = _modelled(case, settings, device) if mode == SEQUENTIAL else None
    runs = _run(case, settings, units, config, device, modelled, lambda done: tell(RUNNING, done, len(units)))
    tell("checking the results", 0, 1)
    _check_results(case, config, units, runs)
    tell("checking the results", 1, 1)
    return _compared(case, settings, units, runs, device, modelled)


def _units(case: RanksCase, settings: RanksSettings) -> list[Unit]:
    """Return all steps to run in their order; raises CheckError if calibration and judgement overlap."""
    rng = np.random.default_rng(settings.seed)
    per_repetition = max(1, round(settings.calibration_share * len(case.plans) * len(case.steps)))
    placements = calibration_placements(case.plans, per_repetition * settings.repeats, rng)
    check_disjoint(case.trace, case.steps, case.plans, case.calibration_trace, case.calibration_steps, placements)
    units = judged_units(case.trace, case.steps, case.plans, settings.repeats)
    units += calibration_units(case.calibration_trace, case.calibration_steps, placements, settings.repeats, rng)
    return shuffled(units, rng)


def max_context(units: Sequence[Unit]) -> int:
    """Return the longest context that a rank's tokens attend to on average."""
    parts = [part for unit in units for work in unit.job.works for part in work.ranks if len(part.rows)]
    return max(part.context // len(part.rows) for part in parts) + 1


def _modelled(case: RanksCase, settings: RanksSettings, device: str) -> HardwareSpec:
    return ranks_machine(
        case.num_ranks, _device_kind(device), settings.modelled_latency_s, settings.modelled_bytes_per_s
    )


def _device_kind(device: str) -> str:
    return "gpu" if device == "cuda" else "cpu"


def _run(
    case: RanksCase,
    settings: RanksSettings,
    units: Sequence[Unit],
    config: WeightsConfig,
    device: str,
    modelled: HardwareSpec | None,
    on_job: Callable[[int], None],
) -> list[JobRun]:
    jobs = [unit.job for unit in units]
    if modelled is not None:
        return run_jobs_in_turn(case.model, config, jobs, modelled, device=device, on_job=on_job)
    backend = "nccl" if device == "cuda" else "gloo"
    tries = settings.tries if case.num_ranks <= num_cores() else 1
    return run_jobs(case.model, config, jobs, backend=backend, timeout_s=settings.timeout_s, tries=tries, on_job=on_job)


def _check_results(case: RanksCase, config: WeightsConfig, units: Sequence[Unit], runs: Sequence[JobRun]) -> None:
    """Raise CheckError unless every unit sent the right tokens and every judged one computed the right values."""
    home = home_ranks(case.trace, case.num_ranks)
    expected = reference_outputs(RankWeights(case.model, config), case.trace, case.steps, home)
    for unit, run in zip(units, runs, strict=True):
        run.check_traffic(unit.job.works)
        if unit.plan == CALIBRATION:
            continue
        reference = expected[unit.place].float().numpy()
        for rank, found in enumerate(run.outputs[0]):
            where = f"plan {unit.plan!r}, step {unit.place}, rank {rank}"
            check_outputs(reference[unit.job.works[0].home == rank], found, config.dtype, where)


# ---------------------------------------------------------------- prediction against measurement


def _compared(
    case: RanksCase,
    settings: RanksSettings,
    units: Sequence[Unit],
    runs: Sequence[JobRun],
    device: str,
    modelled: HardwareSpec | None,
) -> RanksRun:
    costs = ranks_costs(case.model, _samples(case, settings, units, runs), _device_kind(device), modelled)
    judged = _judged(units, runs)
    predicted, measured = {}, {}
    for name, plan in case.plans.items():
        pairs = [_results(case, name, plan, costs[place], judged[name, place]) for place in range(settings.repeats)]
        predicted[name], measured[name] = ([pair[side] for pair in pairs] for side in (0, 1))
    reports = {name: plan_report(*([result.tables["critical_path"] for result in results[name]]
                                   for results in (predicted, measured))) for name in case.plans}
    disturbed = {name: float(np.mean([run.disturbed.any() for unit, run in zip(units, runs, strict=True) if unit.plan == name]))
                 for name in case.plans}
    provenance = {"settings": asdict(settings), "ranks": case.num_ranks, "machine": fingerprint(device)}
    step_seconds = {name: (_step_seconds(predicted[name]), _step_seconds(measured[name])) for name in case.plans}
    report = ranks_report(reports, step_seconds, disturbed, _notes(case, settings, runs, device, modelled), provenance)
    profile = costs[-1].profile
    if profile is None:
        raise CheckError("a cost model of ranks holds no profile")
    return RanksRun(report, _last(predicted), _last(measured), profile)


def _step_seconds(results: Sequence[SimulationResult]) -> np.ndarray:
    """float64[repetition, step]."""
    return np.stack([result.tables["steps"]["duration_ns"].to_numpy() for result in results]) * s_from_ns(1)


def _last(results: dict[str, list[SimulationResult]]) -> dict[str, SimulationResult]:
    return {name: of_repetition[-1] for name, of_repetition in results.items()}


def _samples(
    case: RanksCase, settings: RanksSettings, units: Sequence[Unit], runs: Sequence[JobRun]
) -> list[Samples]:
    """Return each repetition's phases under random placements."""
    found: list[list[Samples]] = [[] for _ in range(settings.repeats)]
    for unit, run in zip(units, runs, strict=True):
        if unit.plan == CALIBRATION:
            found[unit.repetition].append(phase_samples(case.model, unit.job.works, lay_out(run.marks)))
    return [joined(parts) for parts in found]


def _judged(units: Sequence[Unit], runs: Sequence[JobRun]) -> dict[tuple[str, int], np.ndarray]:
    """Return (plan, repetition) -> marks int64[rank, step, mark] of all its steps."""
    parts: dict[tuple[str, int], dict[int, np.ndarray]] = defaultdict(dict)
    for unit, run in zip(units, runs, strict=True):
        if unit.plan != CALIBRATION:
            parts[unit.plan, unit.repetition][unit.place] = run.marks
    return {key: np.concatenate([of_step[place] for place in sorted(of_step)], axis=1) for key, of_step in parts.items()}


def _results(
    case: RanksCase, name: str, plan: PlacementPlan, cost: CostModel, marks: np.ndarray
) -> tuple[SimulationResult, SimulationResult]:
    """Return the prediction of one repetition of a plan, and its run."""
    width = payload_bytes(case.model) / case.model.hidden_size
    program = ExpertParallelProgram(case.model, case.trace, case.steps, plan, cost, dispatch_bytes=width)
    guess = run_simpy(program)
    real = measured_tasks(program.graph, case.steps, lay_out(marks))
    return _result(program, guess, f"{name}/predicted"), _result(program, real, f"{name}/measured")


def _result(program: ExpertParallelProgram, tasks: pd.DataFrame, name: str) -> SimulationResult:
    """Derive the usual tables from a task table that is already there."""
    return simulate(program, name=name, executor=lambda _: tasks)


def _notes(
    case: RanksCase, settings: RanksSettings, runs: Sequence[JobRun], device: str, modelled: HardwareSpec | None
) -> tuple[str, ...]:
    how = (f"{case.num_ranks} ranks of one thread each, in processes of their own, over {'NCCL' if device == 'cuda' else 'gloo'}"
           if modelled is None else
           f"{case.num_ranks} ranks one after another on one device (sequential): kernels are measured, each rank with the "
           "device to itself; all-to-alls take what was stated, in the run as in the prediction, so the error is of kernels only")
    notes = [
        how + f"; {len(case.steps)} steps, {settings.repeats} times under each of {len(case.plans)} plans.",
        "Every token's result equals the same model's in one process, and the ranks sent each other the tokens that the plan says.",
        "Predicted from steps between the judged ones, under random placements and on other tokens; nothing is fitted to a run "
        "that is judged."]
    if modelled is None and device == "cpu":
        notes += _core_notes(case.num_ranks, runs)
    return tuple(notes)


def _core_notes(num_ranks: int, runs: Sequence[JobRun]) -> list[str]:
    """Say what the cores did to the measurement."""
    if num_ranks > num_cores():
        return [f"{num_ranks} ranks share {num_cores()} cores: a phase lasts about as long as all ranks' work over the cores, not as "
                "long as the busiest rank's, so balance counts for less here than on a machine with a core or a GPU for each rank; "
                "errors and order say little about such a machine."]
    share = float(np.mean([run.disturbed.any() for run in runs]))
    return [f"In {100 * share:.0f} % of the steps a rank was without its core in every try (other programs ran)."] if share else []
