"""The offload study: cache policies, prefetchers and CPU help on one device, on requests not seen in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.cache.policy import POLICIES, information_level
from moesim.cache.prefetch import PREFETCHERS, SEES_FUTURE
from moesim.lowering.machine import offload_machine
from moesim.scenario.inputs import Inputs, load_machine, make_steps, source_note
from moesim.scenario.offload_build import Offload
from moesim.scenario.schema import NO_PREFETCH, OffloadStudy, Point
from moesim.simulate.critical_path import bounded_by
from moesim.simulate.executors import AUTO, executor_of
from moesim.simulate.result import SimulationResult
from moesim.simulate.run import simulate
from moesim.traces.split import split_requests
from moesim.units import format_bytes, s_from_ns

BOUND_NOTE = (
    "Bound: no eviction, admission or prefetch policy with these slots can be faster under the same costs: the fewest possible "
    "misses (offline optimum with bypass), shared between link and CPU at best, and the device's own work."
)
FORESIGHT_NOTE = "Policies and prefetchers that know the future (belady, oracle ...) are references, not to be deployed."


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
        return OffloadPoint(label, self._row(point, result), result)

    def _row(self, point: Point, result: SimulationResult) -> dict[str, Any]:
        steps, summary = result.tables["steps"], result.summary
        bound = self.offload.bound(point, self.cost)
        elapsed_s = s_from_ns(int(steps["end_ns"].iloc[-1]))
        batch = self.study.workload.batch_size
        return {
            "policy": point.policy,
            "prefetch": _prefetch_label(point),
            "miss": point.miss,
            "slots_per_layer": point.slots_per_layer,
            "resident_fraction": min(1.0, point.slots_per_layer / self.inputs.model.num_experts),
            "hit_rate": summary["hit_rate"],
            "htod_bytes_per_token": summary["htod_bytes"] / int(steps["tokens"].sum()),
            "stall_fraction": self._stall(result, elapsed_s),
            "tpot_s": summary["decode_step_time_s"],
            "tpot_bound_s": bound.total_s / len(steps) if self._only_decode else None,
            "tpot_gap": (elapsed_s - bound.total_s) / elapsed_s,
            "tokens_per_s": summary["tokens_per_s"],
            "requests_at_once": batch,
            "sees_future": sees_future(point),
            "bound_by": bounded_by(result.tables["critical_path"]),
        }

    @property
    def _only_decode(self) -> bool:
        """Whether the mean step is a decode step, so that the bound on the whole run is one on TPOT."""
        return not (self.study.workload.include_prefill or self.study.workload.warmup_steps)

    def _stall(self, result: SimulationResult, elapsed_s: float) -> float:
        """Share of the time in which the device computes nothing."""
        tasks = result.tasks
        compute = self.offload.machine.resources()[self.offload.machine.compute_index].name
        return 1.0 - s_from_ns(int(tasks.loc[tasks["resource"] == compute, "duration_ns"].sum())) / elapsed_s

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
            FORESIGHT_NOTE,
            source_note(sources),
        )

    def points(self) -> Iterator[OffloadPoint]:
        """Yield every point of the study in order; a point that cannot work is an error before the first is run."""
        for point in self.study.expand():
            self.offload.program(point, self.cost)
        for point in self.study.expand():
            yield self.point(point)


def sees_future(point: Point) -> bool:
    """Return whether a point's policy or prefetcher is built from the future (by the level that it declares)."""
    plugins: list[object] = [POLICIES[point.policy]]
    if point.prefetch != NO_PREFETCH:
        plugins.append(PREFETCHERS[point.prefetch])
    return any(information_level(plugin, "a plug-in") in SEES_FUTURE for plugin in plugins)


def point_label(point: Point) -> str:
    """Return a short name for a point, fit for a file name."""
    parts: Sequence[str] = (
        point.policy,
        f"{point.slots_per_layer}slots",
        _prefetch_label(point).replace(" ", ""),
        point.miss,
    )
    return "-".join(parts)


def _prefetch_label(point: Point) -> str:
    if point.prefetch == NO_PREFETCH:
        return NO_PREFETCH
    recall = "" if point.prefetch_recall is None else f" r{point.prefetch_recall:g}"
    return f"{point.prefetch} {point.prefetch_width}{recall}"
