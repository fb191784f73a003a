"""The offload side of a sweep: decisions once per policy where they do not look at the clock, then every machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moesim.hardware.cost import CostModel
from moesim.hardware.vary import vary
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_works import cpu_choice, work_ns
from moesim.scenario.offload import Offload, OffloadSetup
from moesim.scenario.offload_row import sees_future
from moesim.scenario.schema import NO_PREFETCH, Point
from moesim.scenario.sweep_axes import EFFICIENCY
from moesim.simulate.executors import execute, offload_predictions, offload_times
from moesim.simulate.what_if import WhatIf, what_if
from moesim.traces.trace import PHASES, PREFILL
from moesim.units import NS_PER_S


@dataclass(frozen=True)
class Machine:
    """One machine of a sweep: its varied numbers, its parts, its costs."""

    values: dict[str, float]
    parts: OffloadMachine
    cost: CostModel


@dataclass(frozen=True)
class Decisions:
    """One clock-blind run: what it does, and what its cache counted."""

    run: WhatIf
    cache_counts: dict[str, np.ndarray]


class OffloadSweep:
    """Times the points of an offload study on many machines."""

    def __init__(self, setup: OffloadSetup) -> None:
        self.setup, self.offload = setup, setup.offload
        self._decided: tuple[Point, dict[tuple[bool, ...], Decisions]] = (Point("", 0), {})
        self._sizes = _distinct_counts(self.offload)

    def machine(self, values: dict[str, float]) -> Machine:
        """Return the study's machine with other numbers."""
        own = {key: value for key, value in values.items() if key != EFFICIENCY}
        hardware = vary(self.setup.hardware, own) if own else self.setup.hardware
        cost = CostModel(hardware, self.setup.cost.profile,
                         route_efficiency=values.get(EFFICIENCY, self.setup.cost.route_efficiency))
        return Machine(values, dataclasses.replace(self.offload.machine, hardware=hardware), cost)

    def check(self, points: Sequence[Point], machines: Sequence[dict[str, float]]) -> None:
        """Raise the error of a point that cannot work (too many slots, no CPU ...) before the first is timed."""
        every = any(key.endswith(".num_bytes") for values in machines[:1] for key in values)
        for values in machines:
            machine = self.machine(values)
            for point in points if every or values is machines[0] else ():
                self._program(point, machine)

    def rows(self, point: Point, machines: Sequence[dict[str, float]]) -> pd.DataFrame:
        """Return one row per machine: its varied numbers, the point's keys, and what came out."""
        built = [self.machine(values) for values in machines]
        if not is_clock_blind(point, self.offload):
            named = offload_predictions(self._program(point, built[0]))
            return pd.DataFrame([self._engine_row(point, machine, named) for machine in built])
        choices = [self._choice(point, machine) for machine in built]
        rows: list[dict[str, Any]] = [{} for _ in built]
        for choice in dict.fromkeys(choices):
            places = [place for place, other in enumerate(choices) if other == choice]
            group = [built[place] for place in places]
            for place, row in zip(places, self._blind_rows(point, choice, group), strict=True):
                rows[place] = row
        return pd.DataFrame(rows)

    def _program(self, point: Point, machine: Machine) -> OffloadProgram:
        return dataclasses.replace(self.offload, machine=machine.parts).program(point, machine.cost)

    def _choice(self, point: Point, machine: Machine) -> tuple[bool, ...]:
        """Which sizes of experts the CPU takes; it decides what the cache holds, and may differ between machines."""
        return cpu_choice(self._program(point, machine), self._sizes) if point.miss == "faster" else ()

    def _blind_rows(self, point: Point, choice: tuple[bool, ...], machines: list[Machine]) -> list[dict[str, Any]]:
        decisions = self._decisions(point, choice, machines[0])
        durations = np.stack([work_ns(decisions.run.works, self.offload.model, m.parts, m.cost) for m in machines])
        step_ns = decisions.run.step_ns(durations)
        busy_ns = decisions.run.busy_ns(durations)
        return [self._row(point, machine, step_ns[place], int(busy_ns[place, machine.parts.compute_index]),
                          decisions.cache_counts) for place, machine in enumerate(machines)]

    def _decisions(self, point: Point, choice: tuple[bool, ...], machine: Machine) -> Decisions:
        if self._decided[0] != point:
            self._decided = (point, {})
        known = self._decided[1]
        if choice not in known:
            program = self._program(point, machine)
            run = what_if(execute(program).arrays, program.steps)
            known[choice] = Decisions(run, program.cache_counts)
        return known[choice]

    def _engine_row(self, point: Point, machine: Machine, named: np.ndarray | None) -> dict[str, Any]:
        times = offload_times(self._program(point, machine), named)
        busy = times.busy_ns(machine.parts.resources()[machine.parts.compute_index].name)
        step_ns = np.diff(times.step_end_ns, prepend=0)
        return self._row(point, machine, step_ns, busy, times.cache_counts)

    def _row(self, point: Point, machine: Machine, step_ns: np.ndarray, busy_ns: int,
             counts: dict[str, np.ndarray]) -> dict[str, Any]:
        steps, warmup = self.offload.steps, self.setup.study.workload.warmup_steps
        tokens = np.array([step.num_tokens for step in steps])
        decode = np.array([step.phase != PHASES[PREFILL] for step in steps])
        decode[:warmup] = False
        elapsed_s = int(step_ns[warmup:].sum()) / NS_PER_S
        fetched = sum(int(counts[name].sum()) for name in ("loads", "admits", "prefetches"))
        return {
            **machine.values,
            "policy": point.policy, "prefetch": point.prefetch, "prefetch_width": point.prefetch_width,
            "prefetch_recall": point.prefetch_recall, "miss": point.miss, "slots_per_layer": point.slots_per_layer,
            "sees_future": sees_future(point),
            "hit_rate": float(counts["hits"].sum() / max(1, counts["accesses"].sum())),
            "fetches_per_token": fetched / int(tokens.sum()),
            "stall_fraction": 1.0 - busy_ns / int(step_ns.sum()),
            "tpot_s": int(step_ns[decode].sum()) / NS_PER_S / int(decode.sum()) if decode.any() else None,
            "tokens_per_s": int(tokens[warmup:].sum()) / elapsed_s,
        }


def is_clock_blind(point: Point, offload: Offload) -> bool:
    """Return whether a point's decisions never ask what time it is: no prefetch, and no copy in the background."""
    keeps_out = point.policy == "static" and offload.preload == "popular"
    return point.prefetch == NO_PREFETCH and (point.miss == "load" or not offload.admit or keeps_out)


def _distinct_counts(offload: Offload) -> tuple[int, ...]:
    """Tokens per expert that occur in any layer of any step."""
    found: set[int] = set()
    for step in offload.steps:
        ids = offload.test.expert_ids[step.rows]
        layers = np.arange(ids.shape[1])[None, :, None] * offload.model.num_experts
        cells = (ids + layers)[ids >= 0]
        found.update(np.unique(np.bincount(cells.ravel())).tolist())
    return tuple(sorted(found - {0}))
