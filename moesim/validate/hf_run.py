"""Validate an offloaded Hugging Face model: the same outputs, the same counts, and the time that was predicted for it.

Outputs are held against the plain model's, bit for bit; counts against replay of the plain model's routing; the time
against the simulator's, priced by micro-benchmarks on the run's own modules between the runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moesim.calibrate.kernels import torch_device
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import OffloadProgram
from moesim.model.spec import ModelSpec
from moesim.simulate.result import SimulationResult
from moesim.simulate.run import simulate
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.capture_generate import Request
from moesim.traces.capture_hooks import RouterRecorder
from moesim.traces.trace import RoutingTrace
from moesim.units import ns_from_s, s_from_ns
from moesim.validate.hf_check import check_counts, prefetched_counts, replayed_counts
from moesim.validate.hf_generate import Generated, check_equal, generate, largest_difference
from moesim.validate.hf_loader import Loader
from moesim.validate.hf_model import OffloadedModel, eager
from moesim.validate.hf_plan import HfCase, HfPlan, InlineMachine, stand_in_model
from moesim.validate.hf_probe import HfBlock, HfProbe
from moesim.validate.hf_result import LOAD_KINDS, HfRun, measured_result, measured_tasks
from moesim.validate.hf_runtime import ExpertRuntime
from moesim.validate.hf_weights import SlotPool, SlowTier, expert_modules
from moesim.validate.local import local_machine
from moesim.validate.overhead import LEAST_S, typical
from moesim.validate.probe import measured_tables, overlap_shares
from moesim.validate.report import ValidationReport, compare

OVERLAP_ROUNDS = 3
PROBE_ROUNDS = 12
SWITCH_S = 2e-4
Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Given:
    """A described machine to predict with, in place of micro-benchmarks, and the model as it sees it."""

    model: ModelSpec
    machine: OffloadMachine
    cost: Callable[[], CostModel]


@dataclass(frozen=True)
class HfValidation:
    """What came out: the report, plain facts, the last run predicted and measured, and the routing."""

    report: ValidationReport
    facts: dict[str, Any]
    predicted: SimulationResult
    measured: SimulationResult
    profile: CalibrationProfile | None
    trace: RoutingTrace


def validate_hf(model: Any, requests: Sequence[Request], plan: HfPlan, *, new_tokens: int, repeats: int = 3,
                probe_rounds: int = PROBE_ROUNDS, checkpoint: Path | None = None, given: Given | None = None, seed: int = 0,
                progress: Progress | None = None) -> HfValidation:
    """Generate with the plain model, then `repeats` times with its experts offloaded, and compare.

    Args:
        model: a transformers model in eval mode on the plan's device; it is left as it was.
        checkpoint: the folder that it was loaded from: with tier ``file`` its tensors are mapped where they fit.
        given: predict with this machine instead of micro-benchmarks.

    Raises:
        InputError: a family that cannot be offloaded so, or a plan that cannot work.
        CheckError: outputs, counts or slots of an offloaded run are not what they must be.
    """
    if repeats < 1 or new_tokens < 1:
        raise InputError(f"repeats and new_tokens must be at least 1, got {repeats} and {new_tokens}")
    torch_device(plan.device)
    tell = progress or (lambda *_: None)
    tell("plain model", 0, 1)
    with _one_thread(), _eagerly(model) as usual:
        recorder = RouterRecorder(model)
        layers = expert_modules(model, recorder)
        plain = generate(model, recorder, requests, new_tokens)
        fused = _fused(model, recorder, requests, new_tokens, plain, usual)
        tier = SlowTier(layers, plan.device)
        try:
            if plan.tier == "file":
                tier.to_files(layers, checkpoint)
            session = _Session(model, requests, new_tokens, plain, HfCase(plan, plain.trace, plain.steps), tier,
                               OffloadedModel(model, layers, recorder))
            return session.validate(repeats, probe_rounds, given, seed, fused, tell)
        finally:
            tier.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread computes, another one copies and soon gets its turn; sums are cut the same way in every run."""
    import torch

    threads, interval_s = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval_s)


@contextmanager
def _eagerly(model: Any) -> Iterator[str]:
    """Compute experts one by one; yields the implementation that the model has otherwise."""
    usual = str(getattr(model.config.get_text_config(), "_experts_implementation", None))
    eager(model)
    try:
        yield usual
    finally:
        if usual not in ("None", "eager"):
            model.set_experts_implementation(usual)


def _fused(model: Any, recorder: RouterRecorder, requests: Sequence[Request], new_tokens: int, plain: Generated,
           usual: str) -> dict[str, Any]:
    """Return how the model's usual computation, all experts in one call, differs from the one-by-one that is offloaded."""
    if usual in ("None", "eager"):
        return {"implementation": "eager"}
    model.set_experts_implementation(usual)
    other = generate(model, recorder, requests, new_tokens)
    eager(model)
    return {"implementation": usual, "same_tokens": other.tokens == plain.tokens,
            "largest_logit_difference": largest_difference(plain, other)}


@dataclass(frozen=True)
class _Prediction:
    """A simulated run; `overheads_ns` is the executor's own time in each task, by kind."""

    program: OffloadProgram
    tasks: pd.DataFrame
    profile: CalibrationProfile | None
    overheads_ns: dict[str, int]


@dataclass
class _Session:
    """Everything that the runs of one validation share."""

    model: Any
    requests: Sequence[Request]
    new_tokens: int
    plain: Generated
    case: HfCase
    tier: SlowTier
    offloaded: OffloadedModel

    def __post_init__(self) -> None:
        plan, trace = self.case.plan, self.case.trace
        self.pool = SlotPool(self.tier, self.case.slots_per_layer * trace.num_layers, plan.device)
        local = local_machine(plan.device, plan.bytes_per_s)
        kind = InlineMachine if plan.miss == "cpu" else OffloadMachine
        self.machine = kind(local.hardware, local.device, local.slow_memory, local.cpu)
        hidden = int(self.model.config.get_text_config().hidden_size)
        self.spec = stand_in_model(trace, hidden, self.tier.expert_bytes)

    def validate(self, repeats: int, rounds: int, given: Given | None, seed: int, fused: dict[str, Any],
                 tell: Progress) -> HfValidation:
        """Alternate blocks of micro-benchmarks with real runs; each run is predicted from the blocks at its two sides."""
        probe = None if given else HfProbe(self.offloaded, self.case, self.tier, self.pool, self.spec.expert_bytes)
        tell("warming up", 0, repeats)
        self.run()
        if probe:
            probe.block(max(2, rounds // 4), seed)
        before = probe.block(rounds, seed + 1) if probe else None
        runs, predictions = [], []
        for number in range(repeats):
            runs.append(self.run())
            after = probe.block(rounds, seed + 2 + number) if probe else None
            predictions.append(self._predict(before.merged(after) if before and after else None, given))
            before = after
            tell("offloaded runs", number + 1, repeats)
        return self._outcome(runs, predictions, fused)

    def run(self) -> HfRun:
        """Run once, offloaded, and check it."""
        plan, case = self.case.plan, self.case
        with Loader(self.tier, self.pool, plan.device, plan.bytes_per_s) as loader:
            runtime = ExpertRuntime(self.tier, self.pool, loader, case.cache(), miss=plan.miss,
                                    prefetcher=case.prefetcher(), device=plan.device)
            self.offloaded.runtime = runtime
            generated = generate(self.model, self.offloaded, self.requests, self.new_tokens)
            runtime.check()
        check_equal(self.plain, generated)
        check_counts(runtime.counts, self._expected())
        return HfRun(generated, tuple(runtime.spans), tuple(loader.finished), runtime.counts, runtime.most_resident)

    def _expected(self) -> dict[str, Any]:
        stream, prefetcher = self.case.context.future, self.case.prefetcher()
        assert stream is not None
        if prefetcher is None:
            return replayed_counts(stream, self.case.cache())
        return prefetched_counts(stream, self.case.cache(), prefetcher, self.case.access_tokens)

    def _predict(self, found: HfBlock | None, given: Given | None) -> _Prediction:
        if found is None:
            assert given is not None
            program = self.case.program(given.model, given.machine, given.cost())
            return _Prediction(program, run_simpy(program), None, {})
        overhead = max(LEAST_S, typical(found.load_overhead_s))
        overlap: dict[str, float] = {}
        for _ in range(OVERLAP_ROUNDS):  # how much copies and compute overlap comes from the schedule itself
            profile = self._profile(found, overlap, overhead)
            program = self.case.program(self.spec, self.machine, CostModel(self.machine.hardware, profile))
            tasks = run_simpy(program)
            overlap = overlap_shares(tasks)
        return _Prediction(program, tasks, profile, dict.fromkeys(LOAD_KINDS, ns_from_s(overhead)))

    def _profile(self, found: HfBlock, overlap: dict[str, float], overhead: float) -> CalibrationProfile:
        kind = self.machine.hardware.device(self.machine.device).kind
        tables = measured_tables(found.block, overlap, self.spec, kind, self.machine.route[-1].kind)
        load = MeasuredTable("task_overhead", "", "load", "", ("tasks",), ((1.0,),), (overhead,), (0.0,),
                             (len(found.load_overhead_s),))
        return CalibrationProfile("interleaved", (*tables, load))

    def _outcome(self, runs: list[HfRun], predictions: list[_Prediction], fused: dict[str, Any]) -> HfValidation:
        tables = [measured_tasks(run, self.machine, self.tier.expert_bytes) for run in runs]
        report = compare([one.tasks for one in predictions], tables, provenance=self._provenance(),
                         overheads_ns=[one.overheads_ns for one in predictions],
                         executor_s=[run.executor_s for run in runs])
        last = predictions[-1]
        measured = measured_result(runs[-1], tables[-1], "measured", report.provenance)
        predicted = simulate(last.program, name="predicted", executor=lambda _: last.tasks, provenance=report.provenance)
        facts = self._facts(measured.summary, predicted.summary, fused) | {"median_error": report.median_error}
        return HfValidation(report, facts, predicted, measured, last.profile, self.plain.trace)

    def _provenance(self) -> dict[str, Any]:
        return {"model": type(self.model).__name__, **asdict(self.case.plan), "new_tokens": self.new_tokens,
                "requests": len(self.requests), "trace_digest": self.plain.trace.digest()}

    def _facts(self, measured: dict[str, Any], predicted: dict[str, Any], fused: dict[str, Any]) -> dict[str, Any]:
        plain_s = s_from_ns(self.plain.end_ns - self.plain.start_ns)
        return {
            "outputs": "tokens and logits are bit for bit those of the plain model computing experts one by one",
            "usual_computation": fused,
            "generated_tokens": self.plain.num_tokens,
            "slow_tier": self.tier.origin,
            "expert_bytes": self.tier.expert_bytes,
            "slots": self.pool.num_slots,
            "slot_bytes": self.pool.num_bytes,
            "plain_tokens_per_s": self.plain.num_tokens / plain_s,
            "measured": measured,
            "simulated": {name: predicted[name] for name in ("makespan_s", "hit_rate", "htod_bytes", "cost_sources", "cache")},
        }
