"""The offload study: cache policies, prefetchers and CPU help on one device, on requests not seen in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moesim.lowering.machine import offload_machine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_bound import OffloadBound
from moesim.scenario.inputs import Inputs, load_machine, make_steps, source_note
from moesim.scenario.offload_build import Offload
from moesim.scenario.offload_row import against_bound, cache_columns, point_label, times, what_it_is
from moesim.scenario.schema import OffloadStudy, Point
from moesim.simulate.executors import AUTO, executor_of
from moesim.simulate.result import SimulationResult
from moesim.simulate.run import simulate
from moesim.traces.split import split_requests
from moesim.units import format_bytes

BOUND_NOTE = (
    "Bound: under the same costs no eviction, admission or prefetch policy with these slots can be faster (a minimum-cost flow of slots "
    "through time). Policies that fetch only what a router has named have a bound of their own, which no other policy of that kind beats."
)
PRECISION_NOTE = "Rows with a precision change the model's result: read their debit beside the time. They have no bound."
FORESIGHT_NOTE = (
    "Policies and prefetchers that know the future (belady, oracle ...), and predictors of a stated recall, are references: what they "
    "would give, not what you can deploy."
)


@dataclass(frozen=True)
class OffloadPoint:
    """One simulated point and its row."""

    label: str
    row: dict[str, Any]
    result: SimulationResult


class OffloadSetup:
    """Everything that the points of a study share."""

    def __init__(self, inputs: Inputs, study: OffloadStudy, executor: str = AUTO) -> None:
        self.inputs, self.study, self.execute = inputs, study, executor_of(executor)
        self._bounds: dict[object, OffloadBound] = {}
        self.hardware, self.cost = load_machine(study.hardware, study.profile)
        seed = inputs.scenario.seed
        train, test = split_requests(inputs.trace, study.cache.train_fraction, seed)
        machine = offload_machine(
            self.hardware, device=study.system.device, slow_memory=study.system.slow_memory
        )
        steps = make_steps(test, study.workload, seed)
        self.offload = Offload(
            inputs.model,
            train,
            test,
            steps,
            machine,
            seed,
            study.cache.preload,
            study.cache.shared,
            study.system.chunks,
            study.system.admit,
            study.system.write_back,
            study.system.host_slots_per_layer,
            study.system.host_policy,
        )

    def point(self, point: Point) -> OffloadPoint:
        """Simulate one point."""
        label = point_label(point)
        program = self.offload.program(point, self.cost)
        provenance = self.inputs.provenance | {"study": self.study.name, "point": label}
        warmup = self.study.workload.warmup_steps
        result = simulate(
            program, name=f"{self.study.name}/{label}", warmup_steps=warmup, executor=self.execute,
            provenance=provenance,
        )
        return OffloadPoint(label, self._row(point, program, result), result)

    def _row(self, point: Point, program: OffloadProgram, result: SimulationResult) -> dict[str, Any]:
        on_demand = self.offload.is_on_demand(point)
        return {
            **what_it_is(point, self.inputs.model.num_experts),
            "requests_at_once": self.study.workload.batch_size,
            **times(result, self.offload.machine),
            **against_bound(result, self._bound(point), on_demand, self._only_decode),
            **cache_columns(result),
            **self.offload.debit(program),
        }

    def _bound(self, point: Point) -> OffloadBound | None:
        """Return the bound of a point; points that differ in policy only share it."""
        key = self.offload.bound_key(point)
        if key is not None and key not in self._bounds:
            self._bounds[key] = self.offload.bound(point, self.cost)
        return None if key is None else self._bounds[key]

    @property
    def _only_decode(self) -> bool:
        """Whether the mean step is a decode step, so that the bound on the whole run is one on TPOT."""
        return not (self.study.workload.include_prefill or self.study.workload.warmup_steps)

    def notes(self, sources: dict[str, int]) -> tuple[str, ...]:
        """Return what a reader must know."""
        machine, model, study = self.offload.machine, self.inputs.model, self.study
        link = min(machine.route, key=lambda part: part.bytes_per_s)
        most = int(machine.free_bytes(model, 0) // model.expert_bytes) // model.num_moe_layers
        most = min(most, model.num_experts)
        return (
            f"{model.name} on {self.hardware.name}: experts of {format_bytes(model.expert_bytes)} in {machine.slow_memory}, over "
            f"{link.name} at {format_bytes(link.bytes_per_s)}/s; {len(self.offload.steps)} steps, {study.workload.batch_size} at once; "
            f"{most} of {model.num_experts} experts per layer would fit.",
            f"A cache starts {'with the popular experts of' if study.cache.preload == 'popular' else 'empty; popularity is of'} "
            f"{study.cache.train_fraction:.0%} of the requests; the others are run. Hits are counted with set semantics, cold misses too.",
            *self.inputs.notes(),
            BOUND_NOTE,
            *([PRECISION_NOTE] if any(point.precision for point in study.expand()) else []),
            FORESIGHT_NOTE,
            source_note(sources),
        )

    def points(self) -> Iterator[OffloadPoint]:
        """Yield every point of the study in order; a point that cannot work is an error before the first is run."""
        for point in self.study.expand():
            self.offload.program(point, self.cost)
        for point in self.study.expand():
            yield self.point(point)

