"""Random placement: the yardstick below which no solver should fall."""

from __future__ import annotations

import time

import numpy as np

from moesim.placement.balance_result import balance_result
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult


def random_(problem: PlacementProblem, *, seed: int, time_limit_s: float) -> SolveResult:
    """Place the experts of each layer in a seeded random order, every expert at least once.

    The copies of any two experts differ by at most one; which experts get the redundant slots is drawn
    too. The reported objective is ``sum_l max_r load[l, r]``. Complexity O(L slots). Exact only by luck.
    """
    started_s = time.perf_counter()
    rng = np.random.default_rng(seed)
    slots = np.stack([_random_row(problem, rng) for _ in range(problem.num_layers)])
    return balance_result(problem, slots, solver="random", seed=seed, started_s=started_s)


def _random_row(problem: PlacementProblem, rng: np.random.Generator) -> np.ndarray:
    experts = rng.permutation(problem.num_experts)
    return rng.permutation(np.resize(experts, problem.num_slots))
