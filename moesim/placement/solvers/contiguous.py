"""Contiguous blocks: what serving engines load when nobody has planned anything."""

from __future__ import annotations

import time

import numpy as np

from moesim.placement.balance_result import balance_result
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult


def contiguous(problem: PlacementProblem, *, seed: int, time_limit_s: float) -> SolveResult:
    """Place experts 0 ... E - 1 in blocks; slot i holds expert ``i mod E``.

    This is vLLM's initial map (identity, then the redundant slots from expert 0 on) and Megatron-LM's
    layout. It looks at no load; the reported objective is the one that it does not optimise,
    ``sum_l max_r load[l, r]``. Complexity O(L slots). Exact only by luck.
    """
    started_s = time.perf_counter()
    row = np.arange(problem.num_slots) % problem.num_experts
    slots = np.tile(row, (problem.num_layers, 1))
    return balance_result(problem, slots, solver="contiguous", seed=seed, started_s=started_s)
