"""When to refresh: at fixed intervals (TIDE), always (Mixtral-offloading), never (Fiddler), or when waiting has cost enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moesim.errors import InputError
from moesim.lowering.refresh import RefreshProblem, RefreshResult, run_schedule


class RefreshPolicy(Protocol):
    """Decides at which passes each layer refreshes."""

    def schedule(self, problem: RefreshProblem) -> np.ndarray:
        """Return bool[step, layer]."""


@dataclass(frozen=True)
class FixedInterval:
    """Refresh all layers every `tau` passes (TIDE, arXiv 2605.20179).

    `reset_at_block` starts to count anew in every block, so that its first pass always refreshes (the released code);
    without it one counter runs on. `every_step_of_first_block` is the released code's warm-up: every pass of a request's
    first block. With `tau` 1 this is the baseline that TIDE calls Mixtral-offload.

    Raises:
        InputError: an interval below 1.
    """

    tau: int
    reset_at_block: bool = True
    every_step_of_first_block: bool = False

    def __post_init__(self) -> None:
        if self.tau < 1:
            raise InputError(f"refresh interval tau must be at least 1, got {self.tau}")

    def schedule(self, problem: RefreshProblem) -> np.ndarray:
        """Return bool[step, layer]."""
        passes = problem.passes
        step = passes.step_in_block if self.reset_at_block else np.arange(passes.num_steps)
        refresh = step % self.tau == 0
        if self.every_step_of_first_block:
            refresh |= passes.block == 0
        return np.repeat(refresh[:, None], problem.num_layers, axis=1)


@dataclass(frozen=True)
class Never:
    """Keep the initial set: with the popular experts of training requests there, Fiddler's placement (arXiv 2402.07033).

    Fiddler's other choice for a miss, to copy the weights for one use, is not taken.
    """

    def schedule(self, problem: RefreshProblem) -> np.ndarray:
        """Return bool[step, layer]."""
        return np.zeros((problem.num_steps, problem.num_layers), bool)


@dataclass(frozen=True)
class SkiRental:
    """Refresh a layer once waiting has cost as much as the refresh would (rent until that equals the price).

    The rent of a pass is what the layer takes longer under the present set than it would under the pass's own, if that is
    positive; it adds up since the last refresh. The price is the move to the pass's own set, times `factor`. Both are known
    when the router of the pass is done, so the policy is online.

    Raises:
        InputError: a factor that is not positive.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.factor < np.inf:
            raise InputError(f"ski-rental factor must be positive and finite, got {self.factor}")

    def schedule(self, problem: RefreshProblem) -> np.ndarray:
        """Return bool[step, layer]."""
        refresh = np.zeros((problem.num_steps, problem.num_layers), bool)
        rent, resident = np.zeros(problem.num_layers, np.int64), problem.initial
        for step in range(problem.num_steps):
            target = problem.targets[step]
            rent += np.maximum(problem.experts_ns(step, resident) - problem.experts_ns(step, target), 0)
            price = problem.moves_ns(resident, target) * self.factor
            refresh[step] = (rent > 0) & (rent >= price)
            resident = np.where(refresh[step][:, None], target, resident)
            rent[refresh[step]] = 0
        return refresh


@dataclass(frozen=True)
class BestInterval:
    """The interval that costs least on some passes, and what each one costs: int64[tau - 1] ns."""

    tau: int
    schedule_ns: np.ndarray


def best_fixed_interval(problem: RefreshProblem, *, reset_at_block: bool = True, contents: str = "counts",
                        largest: int | None = None) -> BestInterval:
    """Return the best `tau` of 1 ... `largest` (default the longest block, or all passes where the counter runs on).

    Every interval is run; of equal ones the shortest is taken.

    Raises:
        InputError: `largest` below 1.
    """
    passes = problem.passes
    most = largest or (int(passes.steps_per_block().max()) if reset_at_block else passes.num_steps)
    costs = [run_policy(problem, FixedInterval(tau, reset_at_block), contents=contents).schedule_ns
             for tau in range(1, most + 1)]
    if not costs:
        raise InputError(f"largest interval must be at least 1, got {largest}")
    return BestInterval(int(np.argmin(costs)) + 1, np.array(costs))


def run_policy(problem: RefreshProblem, policy: RefreshPolicy, *, contents: str = "counts") -> RefreshResult:
    """Return `run_schedule` of a policy's schedule."""
    return run_schedule(problem, policy.schedule(problem), contents=contents)
