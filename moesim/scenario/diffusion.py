"""The diffusion study: refresh policies on requests that none was fitted to, and coresets where all experts fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import HardwareSpec
from moesim.lowering.graph import Program
from moesim.lowering.machine import OffloadMachine, offload_machine
from moesim.lowering.refresh_hbm import check_resident
from moesim.lowering.refresh_program import RefreshProgram
from moesim.lowering.refresh_rows import Denoised, DiffusionSetup, diffusion_setup, policy_row, run_named
from moesim.scenario.coreset_rows import first_pass, resident_row, rewrite
from moesim.scenario.inputs import Inputs, load_machine, source_note
from moesim.scenario.schema_diffusion import CoresetPoint, DiffusionStudy, RefreshPoint
from moesim.simulate.execution import Execution
from moesim.simulate.result import SimulationResult
from moesim.simulate.run import simulate
from moesim.traces.denoise import denoise_scored, denoise_trace
from moesim.traces.denoise_passes import denoise_passes, distinct_experts
from moesim.traces.split import split_requests
from moesim.traces.trace import RoutingTrace
from moesim.units import format_bytes

MAX_TASKS = 200_000

GENERATED_NOTE = (
    "Routing is made up (moesim.traces.denoise, seed {seed}), fitted to published similarity and distinct experts of "
    "LLaDA2.0-mini: compare policies with it, do not read absolute rates out of it.")
REFRESH_NOTE = (
    "Popular experts and whatever a policy with knows: trained has learned come from {share:.0%} of the requests; the others are "
    "run. offline: chosen knowing the run, a reference. Over optimal: experts and moves over those of the best schedule of each "
    "layer, which is exact among schedules whose refresh leaves the most used experts of its own pass.")
CORESET_NOTE = (
    "Coresets: every expert is in {memory}, one grouped call per layer. They change what the model computes. Accuracy is the "
    "published one, relative to the unchanged model, of exactly this method, setting and model, and never estimated (dMoE's and "
    "expert choice's with weights trained further); weight lost is the share of gate weight on experts that are no longer used.")
UNSCORED_NOTE = "The trace has no router scores: tokens keep those of their own experts that are in the coreset, loads are too low."


class DiffusionStudySetup:
    """Everything that the points of a study share; `test` is what is run, `scores` its router scores where they are known."""

    def __init__(self, inputs: Inputs, study: DiffusionStudy) -> None:
        self.inputs, self.study = inputs, study
        self.hardware: HardwareSpec
        self.cost: CostModel
        self.hardware, self.cost = load_machine(study.hardware, study.profile)
        trace, scores = _trace_of(inputs, study)
        self.digest = trace.digest()
        self.machine = self._machine()
        self.device = self.machine.device if self.machine else _computing_device(self.hardware, study.system.device)
        self.train, test = self._split(trace)
        self.test = self._denoised(test)
        self.scores = None if scores is None else scores[np.isin(trace.request_id, test.requests())]
        self._setups: dict[int, DiffusionSetup] = {}

    def _machine(self) -> OffloadMachine | None:
        system = self.study.system
        if self.study.refresh is None:
            return None
        return offload_machine(self.hardware, device=system.device, slow_memory=system.slow_memory)

    def _split(self, trace: RoutingTrace) -> tuple[Denoised | None, RoutingTrace]:
        """Return (what is trained on, what is run): coresets alone train nothing."""
        if self.study.refresh is None:
            return None, trace
        train, test = split_requests(trace, self.study.refresh.train_fraction, self.inputs.scenario.seed)
        return self._denoised(train), test

    def _denoised(self, trace: RoutingTrace) -> Denoised:
        try:
            return Denoised(trace, denoise_passes(trace))
        except InputError as error:
            raise InputError(f"study {self.study.name!r}: {error} (or make passes up, denoise: {{generate: ...}})") from None

    @property
    def provenance(self) -> dict[str, Any]:
        """What the study adds to the scenario's: its name, and the digest of a trace that it made up."""
        made = {"trace": "generated", "trace_digest": self.digest} if self.study.makes_its_own_trace else {}
        return {"study": self.study.name, **made}

    def setup(self, slots: int) -> DiffusionSetup:
        """Return what the policies with so many experts per layer on the GPU share."""
        if slots not in self._setups:
            system = self.study.system
            assert self.train is not None
            assert self.machine is not None
            self._setups[slots] = diffusion_setup(self.inputs.model, self.train, self.test, self.machine, self.cost, slots,
                                                  write_back=system.write_back, overlap=system.overlap)
        return self._setups[slots]

    def check(self) -> None:
        """Raise the error of any point that cannot work, before the first is run."""
        for point in self.study.expand():
            if isinstance(point, RefreshPoint):
                self.setup(point.slots_per_layer)
            else:
                rewrite(point, *first_pass(self.test.trace, self.test.passes, self.scores))
        if self.study.coresets is not None:
            try:
                check_resident(self.inputs.model, self.hardware, self.device, int(self.test.passes.block_end.max()))
            except InputError as error:
                raise InputError(f"study {self.study.name!r}, coresets: {error}; put coresets into a study on a larger machine") from None

    def row(self, point: RefreshPoint | CoresetPoint) -> dict[str, Any]:
        """Run one point."""
        if isinstance(point, CoresetPoint):
            return resident_row(self.inputs.model, point, self.test, self.scores, self.cost, self.device)
        return self._refresh_row(point)

    def _knobs(self, point: RefreshPoint) -> DiffusionSetup:
        assert self.study.refresh is not None
        shared = self.setup(point.slots_per_layer)
        return dataclasses.replace(shared, tau=point.tau or shared.tau, factor=point.factor or shared.factor,
                                   reset_at_block=self.study.refresh.reset_at_block)

    def simulate(self, point: RefreshPoint, execute: Callable[[Program], Execution]) -> SimulationResult:
        """Return the run of a refresh point task by task; of a long one the first passes (as many as its provenance says)."""
        assert self.machine is not None
        model, setup, label = self.inputs.model, self._knobs(point), point_label(point)
        steps = min(self.test.passes.num_steps, max(1, MAX_TASKS // (8 * model.num_moe_layers)))
        program = RefreshProgram(model, self.test.trace, self.machine, self.cost, setup.test,
                                 run_named(point.policy, setup).result, steps)
        provenance = self.inputs.provenance | self.provenance | {"point": label, "passes": steps}
        return simulate(program, name=f"{self.study.name}/{label}", executor=execute, provenance=provenance)

    def _refresh_row(self, point: RefreshPoint) -> dict[str, Any]:
        row, steps = policy_row(point.policy, self._knobs(point)), self.test.passes.num_steps
        return {
            "policy": point.policy, "knows": row["knows"], "tau": row["tau"], "factor": point.factor,
            "slots_per_layer": point.slots_per_layer,
            "resident_fraction": point.slots_per_layer / self.inputs.model.num_experts,
            "refreshes_per_block": row["refreshes_per_block"], "promotions_per_step": row["promotions_per_step"],
            "miss_rate": row["miss_rate"], "unique_experts": float(distinct_experts(self.test.passes).mean()),
            "experts_step_s": row["experts_s"] / steps, "moves_step_s": row["moves_s"] / steps,
            "other_step_s": row["other_s"] / steps, "step_time_s": row["step_s"], "tokens_per_s": row["tokens_per_s"],
            "over_optimal_fraction": row["over_optimal"],
        }

    def points(self) -> Iterator[tuple[RefreshPoint | CoresetPoint, dict[str, Any]]]:
        """Yield every point and its row in order; a point that cannot work is an error before the first is run."""
        self.check()
        for point in self.study.expand():
            yield point, self.row(point)

    def notes(self) -> tuple[str, ...]:
        """Return what a reader must know."""
        study, passes = self.study, self.test.passes
        requests = len(np.unique(passes.request))
        own = study.makes_its_own_trace
        notes = [f"{self.inputs.model.name} on {self.hardware.name}: {passes.num_steps} passes over {passes.num_blocks} blocks of "
                 f"{requests} {'request' if requests == 1 else 'requests, one at a time'}.",
                 *((GENERATED_NOTE.format(seed=self.inputs.scenario.seed),) if own else self.inputs.notes())]
        if study.refresh is not None:
            notes += [self._machine_note(), REFRESH_NOTE.format(share=study.refresh.train_fraction)]
        if study.coresets is not None:
            notes += [CORESET_NOTE.format(memory=self.hardware.memory_of(self.device).name),
                      *((UNSCORED_NOTE,) if self.scores is None else ())]
        return (*notes, source_note(self.cost.source_counts()))

    def _machine_note(self) -> str:
        assert self.machine is not None
        link, system = min(self.machine.route, key=lambda part: part.bytes_per_s), self.study.system
        return (f"Experts of {format_bytes(self.inputs.model.expert_bytes)} in {self.machine.slow_memory}, over {link.name} at "
                f"{format_bytes(link.bytes_per_s)}/s; evicted experts are "
                f"{'copied back' if system.write_back else 'dropped, the host keeps a copy'}; CPU and GPU compute "
                f"{'at the same time' if system.overlap else 'one after the other'}.")


def point_label(point: RefreshPoint) -> str:
    """Return a short name for a refresh point, fit for a file name."""
    given = [f"{name}{value:g}" for name, value in (("tau", point.tau), ("factor", point.factor)) if value is not None]
    return "-".join([point.policy, f"{point.slots_per_layer}slots", *given])


def _trace_of(inputs: Inputs, study: DiffusionStudy) -> tuple[RoutingTrace, np.ndarray | None]:
    """Return the trace and, where coresets need them and they are known, float32[token, layer, expert] router scores."""
    choice, model, seed = study.denoise, inputs.model, inputs.scenario.seed
    if choice.generate is not None:
        settings = choice.settings(model.num_moe_layers, model.num_experts, model.top_k)
        return (denoise_trace(settings, seed=seed), None) if study.coresets is None else denoise_scored(settings, seed=seed)
    noted, given = inputs.trace.metadata.get("denoise", {}), choice.model_dump(exclude_none=True)
    about = (noted if isinstance(noted, dict) else {}) | given
    return dataclasses.replace(inputs.trace, metadata=inputs.trace.metadata | {"denoise": about}), None


def _computing_device(hardware: HardwareSpec, name: str | None) -> str:
    """Return the named device, or the first of the kinds that `offload_machine` would take."""
    if name is not None:
        return hardware.device(name).name
    return next(device.name for kind in ("gpu", "npu", "soc", "cpu") for device in hardware.devices_of_kind(kind))
