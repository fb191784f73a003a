"""A campaign: many offloaded runs in one world, each predicted from the micro-benchmarks at its two sides.

All cases share the tensors and the blocks of micro-benchmarks. A round runs every case once, in random order, in groups with a
block between them; the same case in several rounds, minutes apart, tells how well this machine repeats itself, and no
prediction can be expected to be nearer than that.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pandas as pd

from moesim.errors import CheckError, InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile
from moesim.lowering.graph import TaskGraph
from moesim.lowering.offload import OffloadProgram
from moesim.simulate.critical_path import WAIT, critical_path
from moesim.simulate.execution import execution_of
from moesim.simulate.result import CANCELLED, DONE
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.units import s_from_ns
from moesim.validate.campaign_probe import SideBlock, State, probe_sides, run_factors, side_shares, side_tables
from moesim.validate.campaign_report import Outcome
from moesim.validate.offload import OffloadValidation, _real_run, probe_plan
from moesim.validate.overhead import overhead_tables
from moesim.validate.probe import ProbePlan
from moesim.validate.report import EXECUTOR
from moesim.validate.torch_executor import run_torch

Progress = Callable[[str, float, float], None]
Build = Callable[[CostModel], OffloadProgram]
GROUP = 6
OVERLAP_ROUNDS = 3
SWITCH_S = 2e-4
MANY = 3


@dataclass(frozen=True)
class OffloadCase:
    """One run to predict.

    Attributes:
        name, family: of the tables. build: makes its program on a cost model, with a cache of its own.
        mechanism: which dry run tells the executor's own time (a key of `OffloadCampaign.dry`).
    """

    name: str
    family: str
    mechanism: str
    build: Build


@dataclass(frozen=True)
class OffloadCampaign:
    """Cases over one world.

    Attributes:
        shared: trace, steps, machine (`campaign_probe.two_sided`) and world of all cases, the most slots of any; its `build` and
            `dry` are not used.
        dry: mechanism -> how to build a short program on other routing.
        dry_trace, dry_steps: what those programs run.

    Raises:
        InputError: no cases, a name twice, or a mechanism without a dry run.
        CheckError: dry runs on requests that are judged.
    """

    shared: OffloadValidation
    cases: tuple[OffloadCase, ...]
    dry: Mapping[str, Build]
    dry_trace: RoutingTrace
    dry_steps: Sequence[Step]

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if not names or len(set(names)) != len(names):
            raise InputError(f"campaign: expected cases with different names, got {', '.join(names) or 'none'}")
        for case in self.cases:
            if case.mechanism not in self.dry:
                raise InputError(f"campaign: case {case.name!r} has mechanism {case.mechanism!r}, dry runs are of {', '.join(self.dry)}")
        check_apart(judged=requests_of(self.shared.trace, self.shared.steps),
                    calibrated=requests_of(self.dry_trace, self.dry_steps), what="requests")


def requests_of(trace: RoutingTrace, steps: Iterable[Step]) -> dict[str, str]:
    """Return a name by digest of every request in the steps; the digest is of all its routing, whatever its number is."""
    used = np.unique(np.concatenate([trace.request_id[step.rows] for step in steps]))
    return {sha256(np.ascontiguousarray(trace.expert_ids[trace.request_id == request]).tobytes()).hexdigest(): f"request {request}"
            for request in used.tolist()}


def check_apart(*, judged: Mapping[str, str], calibrated: Mapping[str, str], what: str) -> None:
    """Raise CheckError unless nothing that is judged was calibrated on.

    Args:
        judged, calibrated: names by what makes things the same: digests of requests, sizes of tables.
        what: what they are, in the plural.
    """
    shared = [name for key, name in judged.items() if key in calibrated]
    if shared:
        more = f" (and {len(shared) - MANY} more)" if len(shared) > MANY else ""
        raise CheckError(f"{what} are judged and calibrated on: {', '.join(shared[:MANY])}{more}")


# ---------------------------------------------------------------- rounds


@dataclass(frozen=True)
class _Calibration:
    """A block of micro-benchmarks, and real runs on other routing by mechanism."""

    block: SideBlock
    dry: Mapping[str, tuple[tuple[TaskGraph, pd.DataFrame], ...]]

    def merged(self, other: _Calibration) -> _Calibration:
        return _Calibration(self.block.merged(other.block), {name: runs + other.dry[name] for name, runs in self.dry.items()})


def run_round(campaign: OffloadCampaign, number: int, *, probe_rounds: int, seed: int,
              progress: Progress | None = None) -> list[Outcome]:
    """Run every case once, in random order, and predict each run from the blocks before and after its group.

    Args:
        number: of the round; it decides the order. probe_rounds: of every micro-benchmark in a block.

    Raises:
        CheckError: after a run a slot does not hold the bytes of the expert that the plan put there.
    """
    tell = progress or (lambda *_: None)
    random = np.random.default_rng((seed, number))
    order = random.permutation(len(campaign.cases)).tolist()
    plan, groups = probe_plan(campaign.shared), []
    with _quiet():
        _calibrate(campaign, plan, max(1, probe_rounds // 4), random)
        before = _calibrate(campaign, plan, probe_rounds, random)
        for first in range(0, len(order), GROUP):
            group = [campaign.cases[place] for place in order[first:first + GROUP]]
            real = [(case, *_real_run(campaign.shared, case.build, _profile(campaign, before, case.mechanism, {}))) for case in group]
            after = _calibrate(campaign, plan, probe_rounds, random)
            groups.append((real, before.merged(after)))
            before = after
            tell(f"offload, round {number}", first + len(group), len(order))
    return [outcome for real, both in groups for outcome in _outcomes(campaign, number, real, both)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Threads soon get their turns in Python, and no collection of garbage falls into a run."""
    interval_s, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(SWITCH_S)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(interval_s)
        if collects:
            gc.enable()


def _calibrate(campaign: OffloadCampaign, plan: ProbePlan, rounds: int, random: np.random.Generator) -> _Calibration:
    shared = campaign.shared
    block = probe_sides(shared.world, shared.model, shared.machine, plan, num_slots=shared.num_slots, rounds=rounds,
                        seed=int(random.integers(1 << 31)), device=shared.device)
    found = _Calibration(block, {})
    names = [list(campaign.dry)[place] for place in random.permutation(len(campaign.dry)).tolist()]
    dry = {}
    for name in names:
        program = campaign.dry[name](CostModel(shared.machine.hardware, _profile(campaign, found, name, {})))
        dry[name] = ((program.graph, run_torch(program, shared.world, device=shared.device)),)
    gc.collect()
    return _Calibration(block, dry)


def _profile(campaign: OffloadCampaign, found: _Calibration, mechanism: str, shares: Mapping[str, Mapping[State, float]],
             factors: Mapping[str, float] | None = None) -> CalibrationProfile:
    shared = campaign.shared
    tables = side_tables(found.block, shares, shared.model, shared.machine, factors)
    dry = found.dry.get(mechanism, ())
    return CalibrationProfile("campaign", tables + (overhead_tables(dry) if dry else ()))


def _factors(campaign: OffloadCampaign, found: _Calibration, mechanisms: Collection[str]) -> dict[str, dict[str, float]]:
    """Return mechanism -> `run_factors` of its dry runs; of kinds with few tasks in them, more is taken from all these mechanisms."""
    shared = campaign.shared
    pairs: dict[str, list[tuple[pd.DataFrame, pd.DataFrame]]] = defaultdict(list)
    for name in sorted(mechanisms):
        for _, tasks in found.dry[name]:
            tables = side_tables(found.block, side_shares(tasks, shared.machine), shared.model, shared.machine)
            cost = CostModel(shared.machine.hardware, CalibrationProfile("dry", tables))
            pairs[name].append((tasks, run_simpy(campaign.dry[name](cost))))
    pooled = run_factors([pair for own in pairs.values() for pair in own])
    return {name: run_factors(own, pooled) for name, own in pairs.items()}


# ---------------------------------------------------------------- prediction against measurement


_Run = tuple[OffloadCase, OffloadProgram, pd.DataFrame]


def _outcomes(campaign: OffloadCampaign, number: int, runs: Sequence[_Run], found: _Calibration) -> list[Outcome]:
    factors = _factors(campaign, found, {case.mechanism for case, _, _ in runs})
    return [_outcome(campaign, number, run, found, factors[run[0].mechanism]) for run in runs]


def _outcome(campaign: OffloadCampaign, number: int, run: _Run, found: _Calibration, factors: Mapping[str, float]) -> Outcome:
    """Simulate; what runs beside what comes from the schedule itself, so go round until it settles."""
    case, program, measured = run
    machine = campaign.shared.machine
    shares: Mapping[str, Mapping[State, float]] = {}
    for _ in range(OVERLAP_ROUNDS):
        profile = _profile(campaign, found, case.mechanism, shares, factors)
        guess = case.build(CostModel(machine.hardware, profile))
        predicted = run_simpy(guess)
        shares = side_shares(predicted, machine)
    overhead_s = {table.shape: table.seconds[0] for table in profile.tables if table.op == "task_overhead"}
    expected = path_seconds(guess.graph, until_last_step(guess, predicted), overhead_s)
    real = path_seconds(program.graph, until_last_step(program, measured))
    kinds = {kind: expected.get(kind, 0.0) - real.get(kind, 0.0) for kind in sorted({*expected, *real})}
    return Outcome(case.family, case.name, number, sum(expected.values()), sum(real.values()), kinds)


def until_last_step(program: OffloadProgram, tasks: pd.DataFrame) -> pd.DataFrame:
    """Return the tasks that ended no later than the last step; later ones (copies in the background) as cancelled.

    Raises:
        CheckError: the last step did not end.
    """
    last = program.steps[-1].last_task
    if last < 0 or tasks["state"].iloc[last] != DONE:
        raise CheckError("campaign: the last step of a run did not end")
    late = tasks["end_ns"] > tasks["end_ns"].iloc[last]
    return tasks.assign(state=tasks["state"].where(~late, CANCELLED))


def path_seconds(graph: TaskGraph, tasks: pd.DataFrame, overhead_s: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return kind -> seconds of it on the critical path; they sum to the end to end.

    The executor's own time stands under `EXECUTOR`: in a real run what the path waits between tasks; in a prediction
    `overhead_s` (by kind, in every task's duration).
    """
    path = critical_path(execution_of(graph, tasks))
    found: dict[str, float] = defaultdict(float)
    for kind, time_ns, count in zip(path["kind"], path["time_ns"], path["num_tasks"], strict=True):
        seconds = s_from_ns(int(time_ns))
        own = seconds if kind == WAIT else min(seconds, int(count) * (overhead_s or {}).get(kind, 0.0))
        found[EXECUTOR] += own
        if kind != WAIT:
            found[kind] += seconds - own
    return dict(found)
