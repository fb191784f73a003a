"""Micro-benchmarks of a campaign: every kind of task beside every set of busy other sides.

A side is what runs at once with others: the computing thread, the CPU's experts, the copies. `probe.py` knows two of them; here
the third matters, since two threads that compute and one that copies meet on the same cores and memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moesim.hardware.profile import MeasuredTable
from moesim.lowering.graph import ExecutorView
from moesim.lowering.machine import OffloadMachine
from moesim.model.spec import ModelSpec
from moesim.simulate.result import DONE
from moesim.units import s_from_ns
from moesim.validate.overhead import typical
from moesim.validate.probe import Block, ProbePlan, ProbeProgram, Samples, measured_tables
from moesim.validate.torch_executor import World, run_torch

COMPUTE, CPU, COPIES = SIDES = ("compute", "cpu", "copies")
SIDE_OF = {"cpu_expert": CPU, "send": CPU, "receive": CPU, "load": COPIES}
FEW_TASKS = 100
COPY_KINDS = ("load", "prefetch", "admit", "send", "receive")
State = frozenset[str]
ALONE: State = frozenset()


def two_sided(machine: OffloadMachine) -> OffloadMachine:
    """Return the machine with a computing device of kind ``gpu``, whatever it is.

    Tables are found by the kind of device: so an expert in a slot and one in the slow memory have their own times.
    """
    hardware, name = machine.hardware, machine.device
    device = dataclasses.replace(hardware.devices[name], kind="gpu")
    devices = {**hardware.devices, name: device}
    return dataclasses.replace(machine, hardware=dataclasses.replace(hardware, devices=devices))


@dataclass(frozen=True)
class SideBlock:
    """One block of micro-benchmarks: the samples by the set of other sides that were busy."""

    samples: Mapping[State, Samples]

    def merged(self, other: SideBlock) -> SideBlock:
        """Return the samples of both blocks."""
        both = dict(self.samples)
        for state, more in other.samples.items():
            both[state] = both[state].merged(more) if state in both else more
        return SideBlock(both)


class SidesProgram(ProbeProgram):
    """One chain of single tasks for each side, all at once; `rounds_of` says how often each repeats its tasks."""

    def __init__(self, model: ModelSpec, machine: OffloadMachine, plan: ProbePlan, num_slots: int, seed: int,
                 rounds_of: Mapping[str, int]) -> None:
        super().__init__(model, machine, plan, num_slots, 1, seed)
        self._rounds_of = rounds_of

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Hand over all chains."""
        tasks = self._round()
        ends: list[int] = []
        for side, rounds in self._rounds_of.items():
            ends += self._chain([task for task in tasks if SIDE_OF.get(task[0], COMPUTE) == side] * rounds)
        yield self.graph.barrier(ends)


def probe_sides(world: World, model: ModelSpec, machine: OffloadMachine, plan: ProbePlan, *, num_slots: int, rounds: int,
                seed: int, device: str) -> SideBlock:
    """Run one block: all kinds one after the other, then each set of two or more sides at once."""
    samples: dict[State, Samples] = defaultdict(Samples)
    tasks = run_torch(ProbeProgram(model, machine, plan, num_slots, rounds, seed), world, device=device)
    samples[ALONE].add(tasks)
    side = _sides(tasks)
    busy_ns = tasks["duration_ns"].to_numpy()
    total_ns = {name: int(busy_ns[side == name].sum()) for name in SIDES if (side == name).any()}
    for size in range(2, len(total_ns) + 1):
        for both in itertools.combinations(total_ns, size):
            longest = max(total_ns[name] for name in both)
            rounds_of = {name: max(1, round(rounds * longest / total_ns[name])) for name in both}
            program = SidesProgram(model, machine, plan, num_slots, seed, rounds_of)
            _add_beside(samples, run_torch(program, world, device=device), both)
    return SideBlock(dict(samples))


def _sides(tasks: pd.DataFrame) -> np.ndarray:
    """Return str[task], the side of each task of a probe; nothing for a barrier."""
    return np.array(["" if kind == "barrier" else SIDE_OF.get(kind, COMPUTE) for kind in tasks["kind"]])


def _add_beside(samples: dict[State, Samples], tasks: pd.DataFrame, both: tuple[str, ...]) -> None:
    """Take what ended while every side still had tasks."""
    side, end = _sides(tasks), tasks["end_ns"].to_numpy()
    until = min(int(end[side == name].max()) for name in both)
    for name in both:
        samples[frozenset(both) - {name}].add(tasks[(side == name) & (end <= until)])


# ---------------------------------------------------------------- shares of a schedule, and tables at these shares


def side_shares(tasks: pd.DataFrame, machine: OffloadMachine) -> dict[str, dict[State, float]]:
    """Return kind -> the share of its time in which exactly these other sides of the schedule were busy.

    Copies of all kinds are one kind, ``copy``. The shares of a kind sum to 1.
    """
    done = tasks[(tasks["state"] == DONE) & (tasks["resource"] != "") & (tasks["duration_ns"] > 0)]
    names = [resource.name for resource in machine.resources()]
    side_of = dict.fromkeys(names, COPIES)
    side_of |= {names[machine.compute_index]: COMPUTE, names[machine.cpu_index]: CPU}
    side = done["resource"].map(side_of).to_numpy()
    kind = done["kind"].where(~done["kind"].isin(COPY_KINDS), "copy").to_numpy()
    start, end = done["start_ns"].to_numpy(), done["end_ns"].to_numpy()
    cuts = np.unique(np.concatenate([start, end]))
    busy = {name: _busy(start[side == name], end[side == name], cuts) for name in SIDES}
    shares: dict[str, dict[State, float]] = {}
    for own_kind, own_side in dict.fromkeys(zip(kind.tolist(), side.tolist(), strict=True)):
        rows = (kind == own_kind) & (side == own_side)
        spans = np.searchsorted(cuts, start[rows]), np.searchsorted(cuts, end[rows])
        shares[own_kind] = _shares_of(spans, cuts, {name: flags for name, flags in busy.items() if name != own_side})
    return shares


def _busy(start: np.ndarray, end: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Return bool[span between cuts], whether any of the tasks runs in it."""
    change = np.zeros(len(cuts), np.int64)
    np.add.at(change, np.searchsorted(cuts, start), 1)
    np.add.at(change, np.searchsorted(cuts, end), -1)
    return np.cumsum(change)[:-1] > 0


def _shares_of(spans: tuple[np.ndarray, np.ndarray], cuts: np.ndarray, others: dict[str, np.ndarray]) -> dict[State, float]:
    """Return state -> its share of the time that tasks take, from cut `spans[0]` to cut `spans[1]` each."""
    length = np.diff(cuts)
    first, last = spans
    found: dict[State, float] = {}
    for flags in itertools.product((False, True), repeat=len(others)):
        inside = np.logical_and.reduce([own == flag for own, flag in zip(others.values(), flags, strict=True)])
        before = np.concatenate([[0], np.cumsum(length * inside)])
        state = frozenset(name for name, flag in zip(others, flags, strict=True) if flag)
        found[state] = float((before[last] - before[first]).sum())
    total = sum(found.values())
    return {state: time_ns / total for state, time_ns in found.items() if time_ns}


def run_factors(pairs: Sequence[tuple[pd.DataFrame, pd.DataFrame]], towards: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return kind -> how much longer its tasks take in real runs than in simulations of the same at the same shares.

    A task of a run ends when the executor has noted it, and its thread has slept before it: a chain of single tasks shows neither.

    Args:
        pairs: (measured, simulated) tables of runs.
        towards: factors of more runs. Of a kind with few tasks, most is taken from there: the logarithms are weighted, these by
            `FEW_TASKS`, the own by the number of tasks.
    """
    sides = [pd.concat([_durations(tables[side]) for tables in pairs]) for side in (0, 1)]
    real, guess = ({kind: own["seconds"].tolist() for kind, own in side.groupby("kind")} for side in sides)
    found = dict(towards or {})
    for kind in real.keys() & guess.keys():
        own, weight = math.log(typical(real[kind]) / typical(guess[kind])), FEW_TASKS if kind in found else 0
        found[kind] = math.exp((len(real[kind]) * own + weight * math.log(found.get(kind, 1.0))) / (len(real[kind]) + weight))
    return found


def _durations(tasks: pd.DataFrame) -> pd.DataFrame:
    """Return kind and seconds of tasks that ran; copies of experts are ``copy``, those of activations are left out."""
    done = tasks[(tasks["state"] == DONE) & (tasks["resource"] != "") & ~tasks["kind"].isin(("send", "receive"))]
    return pd.DataFrame({"kind": done["kind"].where(~done["kind"].isin(COPY_KINDS), "copy"),
                         "seconds": done["duration_ns"].map(s_from_ns)})


def side_tables(block: SideBlock, shares: Mapping[str, Mapping[State, float]], model: ModelSpec, machine: OffloadMachine,
                factors: Mapping[str, float] | None = None) -> tuple[MeasuredTable, ...]:
    """Return calibration tables: each time is the mean over what was busy beside it, weighted by the shares.

    A kind without shares is timed alone; what was not measured beside some sides counts as alone. `factors` of kinds
    (`run_factors`) multiply their times.
    """
    alone, blended = block.samples[ALONE], Samples()
    for (kind, size), values in alone.seconds.items():
        parts = shares.get(kind, {}) or {ALONE: 1.0}
        seconds = 0.0
        for state, share in parts.items():
            beside = block.samples.get(state)
            found = beside.seconds.get((kind, size)) if beside is not None else None
            seconds += share * typical(found or values)
        blended.seconds[kind, size].append(seconds * (factors or {}).get(kind, 1.0))
    device_kind = machine.hardware.device(machine.device).kind
    return measured_tables(Block(blended, Samples()), {}, model, device_kind, machine.route[-1].kind)
