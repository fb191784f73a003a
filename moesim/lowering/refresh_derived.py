"""Closed forms for the cost of a refresh interval, and the curves of a trace to put into them.

TIDE (arXiv 2605.20179) describes its program in words: a drift rate per step, an expected number of replaced experts after
tau steps, a CPU cost that rises with tau. The geometric forms here are derived from that description, they are not the
paper's formulas. The empirical forms measure the same curves on a trace. Both are means: `run_schedule` is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError
from moesim.lowering.refresh import RefreshProblem


def geometric_swaps(budget: int, drift: float, tau: int) -> float:
    """Return the experts replaced at a refresh after `tau` steps, ``B (1 - (1 - d)^tau)``.

    Args:
        drift: d, the share of a set that is replaced after one step.

    Raises:
        InputError: a drift outside 0 ... 1, or a tau below 1.
    """
    if not 0 <= drift <= 1 or tau < 1:
        raise InputError(f"geometric form: drift must lie in 0 ... 1 and tau be at least 1, got {drift} and {tau}")
    return budget * (1.0 - (1.0 - drift) ** tau)


def geometric_misses(age: int, drift: float, *, at_once: float, routed: float, displaced: float = 1.0) -> float:
    """Return the assignments missed `age` steps after a refresh, ``m0 + (h - m0) phi (1 - (1 - d)^age)``.

    Args:
        at_once: m0, missed by the fresh set. routed: h, all assignments of a step.
        displaced: phi, the share of its hits that a displaced expert carries.

    Raises:
        InputError: shares outside 0 ... 1.
    """
    if not (0 <= drift <= 1 and 0 <= displaced <= 1 and 0 <= at_once <= routed and age >= 0):
        raise InputError("geometric form: drift and displaced must lie in 0 ... 1, at_once in 0 ... routed")
    return at_once + (routed - at_once) * displaced * (1.0 - (1.0 - drift) ** age)


@dataclass(frozen=True)
class IntervalCurves:
    """One layer's curves: what a refresh after tau steps moves, and what a step takes at an age (steps since the refresh).

    Attributes:
        move_ns: tau -> ns of one refresh. gpu_ns, cpu_ns: age -> ns of the two sides.
        overlap: whether the two sides work at the same time.
    """

    move_ns: Callable[[int], float]
    gpu_ns: Callable[[int], float]
    cpu_ns: Callable[[int], float]
    overlap: bool = True

    def block_ns(self, tau: int, num_steps: int, *, start_ns: float | None = None) -> float:
        """Return the time of a block of `num_steps` steps that is refreshed at its steps 0, tau, 2 tau, ...

        Args:
            start_ns: the move at step 0, where it differs (a new block is new routing); default that of the others.
        """
        ages = [step % tau for step in range(num_steps)]
        total = self.move_ns(tau) if start_ns is None else start_ns
        total += (len([age for age in ages if age == 0]) - 1) * self.move_ns(tau)
        for age in ages:
            gpu, cpu = self.gpu_ns(age), self.cpu_ns(age)
            total += max(gpu, cpu) if self.overlap else gpu + cpu
        return total

    def best_tau(self, num_steps: int, *, start_ns: float | None = None) -> int:
        """Return the interval of 1 ... `num_steps` with the least `block_ns`, the shortest of equal ones."""
        costs = [self.block_ns(tau, num_steps, start_ns=start_ns) for tau in range(1, num_steps + 1)]
        return int(np.argmin(costs)) + 1


def empirical_swaps(problem: RefreshProblem, tau: int) -> np.ndarray:
    """Return float64[layer], the mean number of experts by which the sets of two passes `tau` apart in a block differ.

    Raises:
        InputError: no block is that long, or a tau below 1.
    """
    first = _pairs(problem, tau)
    return (problem.targets[first + tau] & ~problem.targets[first]).sum(axis=2).mean(axis=0)


def block_start_swaps(problem: RefreshProblem, age: int) -> np.ndarray:
    """Return float64[layer], experts that change at the first pass of a block if the block before was refreshed `age`
    passes before its end (0: at its last pass); blocks shorter than that are left out.

    Raises:
        InputError: fewer than two blocks, or none before another is long enough.
    """
    starts = np.flatnonzero(problem.passes.block_starts)
    long_enough = np.diff(starts) > age
    if not long_enough.any():
        raise InputError(f"no block with {age + 1} passes comes before another block")
    now, last = starts[1:][long_enough], starts[1:][long_enough] - 1 - age
    return (problem.targets[now] & ~problem.targets[last]).sum(axis=2).mean(axis=0)


def drift_rate(problem: RefreshProblem) -> np.ndarray:
    """Return float64[layer], the share of the set that differs between consecutive passes of a block (TIDE's d)."""
    return empirical_swaps(problem, 1) / problem.budget


def empirical_sides(problem: RefreshProblem, age: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (GPU, CPU) ns, float64[layer] each: the mean of passes computed under the set of `age` passes before.

    Calls are priced one by one from their token counts, so an expert costs what its call does and not so much per token.

    Raises:
        InputError: no block is that long, or a negative age.
    """
    first = np.arange(problem.num_steps) if age == 0 else _pairs(problem, age)
    sets = problem.targets[first]
    gpu = np.where(sets, problem.call_gpu_ns[first + age], 0).sum(axis=2).mean(axis=0)
    cpu = np.where(sets, 0, problem.call_cpu_ns[first + age]).sum(axis=2).mean(axis=0)
    return gpu, cpu


def empirical_curves(problem: RefreshProblem, layer: int) -> IntervalCurves:
    """Return the measured curves of one layer; beyond the longest block they stay at their last value."""
    longest = int(problem.passes.steps_per_block().max()) - 1
    price = problem.costs.in_ns + problem.costs.out_ns
    move = [0.0, *(float(empirical_swaps(problem, tau)[layer]) * price for tau in range(1, longest + 1))]
    gpu, cpu = zip(*(tuple(float(side[layer]) for side in empirical_sides(problem, age))
                     for age in range(longest + 1)), strict=True)
    return IntervalCurves(lambda tau: move[min(tau, longest)], lambda age: gpu[min(age, longest)],
                          lambda age: cpu[min(age, longest)], problem.costs.overlap)


def _pairs(problem: RefreshProblem, lag: int) -> np.ndarray:
    """Return the passes that have another one of their block `lag` passes later."""
    if lag < 1:
        raise InputError(f"a lag must be at least 1, got {lag}")
    block = problem.passes.block_index()
    first = np.flatnonzero(block[lag:] == block[:-lag])
    if not len(first):
        raise InputError(f"no block has {lag + 1} passes")
    return first
