"""The best assignment of a layer: least makespan of the timing model over all splits and orders, proven."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from moesim.lowering.misses.cpu import CpuMissRule
from moesim.lowering.misses.cpu_order import best_cpu_order
from moesim.lowering.misses.dali import DaliRule
from moesim.lowering.misses.fiddler import FiddlerRule
from moesim.lowering.misses.hybrimoe import HybriMoeRepositoryRule, HybriMoeRule
from moesim.lowering.misses.kinds import Kinds, cpu_bounds, device_ends, kinds_of
from moesim.lowering.misses.load import LoadRule
from moesim.lowering.misses.rule import Assignment, LayerWork

MOST_SPLITS = 2**16


@dataclass(frozen=True)
class BestSplit:
    """How many experts of each kind run on the CPU, in which order of kinds, and what is proven.

    `bound_ns`: no assignment takes less. Equal to `makespan_ns`: the split is proven best.
    """

    on_cpu: tuple[int, ...]
    order: tuple[int, ...]
    makespan_ns: int
    bound_ns: int


@dataclass(frozen=True)
class Solved:
    """An assignment, its makespan, and a proven lower bound on any assignment's; equal: it is the best one."""

    assignment: Assignment
    makespan_ns: int
    bound_ns: int


@dataclass(frozen=True)
class ExactRule:
    """The least makespan over all splits and orders; equal experts are interchangeable.

    All splits are bounded at once where there are at most `MOST_SPLITS` (16 experts with nothing in common have as many), else CP-SAT
    chooses; see `solve`. An oracle to measure rules by: it takes far longer than they do.
    """

    information: ClassVar[str] = "I2"
    source: ClassVar[str] = "least makespan of the timing model"

    def assign(self, work: LayerWork) -> Assignment:
        """Return the best assignment that `solve` finds."""
        return solve(work).assignment


def solve(work: LayerWork) -> Solved:
    """Return the best assignment of a layer.

    `bound_ns` says whether it is proven. The bounds of `kinds` leave no gap where computing on the CPU takes longer than the
    copies of rows; elsewhere the CPU's orders are searched, which is complete up to a dozen experts on the CPU and more.
    """
    kinds, members = kinds_of(work)
    best = enumerated(kinds) if kinds.num_splits <= MOST_SPLITS else _programmed(work, kinds, members)
    return Solved(assignment_of(kinds, members, best), best.makespan_ns, best.bound_ns)


def _programmed(work: LayerWork, kinds: Kinds, members: list[list[int]]) -> BestSplit:
    """Return the best of CP-SAT's split and those of the published rules."""
    from moesim.lowering.misses.exact_program import programmed

    rules = (LoadRule(), CpuMissRule(), FiddlerRule(), DaliRule(), HybriMoeRule(), HybriMoeRepositoryRule())
    on_cpu = [set(rule.assign(work).cpu) for rule in rules]
    return programmed(kinds, [tuple(len(chosen.intersection(kind)) for kind in members) for chosen in on_cpu])


@lru_cache(maxsize=4096)
def enumerated(kinds: Kinds) -> BestSplit:
    """Return the best of all splits: in the order of their bounds, until the next bound is no better than the best."""
    splits = kinds.splits()
    device_end, loads_end = device_ends(kinds, splits)
    bounds = np.maximum(device_end, cpu_bounds(kinds, splits, loads_end))
    best: BestSplit | None = None
    looked_at = []
    for at in np.argsort(bounds, kind="stable").tolist():
        if best is not None and int(bounds[at]) >= best.makespan_ns:
            break
        ends = int(device_end[at]), int(loads_end[at]), int(bounds[at])
        found = finished(kinds, tuple(splits[:, at].tolist()), *ends, None if best is None else best.makespan_ns)
        looked_at.append(found.bound_ns)
        if best is None or found.makespan_ns < best.makespan_ns:
            best = found
    assert best is not None
    return dataclasses.replace(best, bound_ns=min(best.makespan_ns, *looked_at))


def finished(kinds: Kinds, split: tuple[int, ...], device_end: int, loads_end: int, bound: int,
             below: int | None = None) -> BestSplit:
    """Return a split with the best order of the CPU's experts, and a bound on all of its orders.

    An order that does not end before `below` need not be the best.
    """
    if kinds.jobs is None or not any(split):
        return BestSplit(split, (), device_end, max(bound, device_end))
    order = best_cpu_order(kinds.jobs, split, loads_end, bound, below)
    return BestSplit(split, order.kinds, max(device_end, order.end_ns), max(bound, device_end, order.bound_ns))


def assignment_of(kinds: Kinds, members: list[list[int]], best: BestSplit) -> Assignment:
    """Return the experts of a split: of each kind the higher ids run on the CPU."""
    on_gpu = [experts[:len(experts) - number] for experts, number in zip(members, best.on_cpu, strict=True)]
    left = [iter(experts[len(experts) - number:]) for experts, number in zip(members, best.on_cpu, strict=True)]
    there = sorted(expert for kind, experts in enumerate(on_gpu) if kinds.resident[kind] for expert in experts)
    loaded = [expert for kind in kinds.load_order() for expert in on_gpu[kind]]
    return Assignment((*there, *loaded), tuple(next(left[kind]) for kind in best.order))
