"""Longest processing time first, with the same number of slots on every rank."""

from __future__ import annotations

import heapq
import time

import numpy as np

from moesim.placement.balance_result import balance_result
from moesim.placement.bounds import copies_by_load
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult


def lpt(problem: PlacementProblem, *, seed: int, time_limit_s: float) -> SolveResult:
    """Balance each layer greedily: min ``sum_l max_r sum_(slot s of r) load[l, e(s)] / copies[l, e(s)]``.

    Redundant slots go one by one to the expert with the largest load per copy; then the slots, heaviest
    first, go to the lightest rank that has room (LPT of Graham, "Bounds on Multiprocessing Timing
    Anomalies", SIAM J. Appl. Math. 17(2), 1969, here with equal cardinality). Deterministic: `seed` changes
    nothing. Complexity O(slots log slots) per layer. Exact with one slot per rank; otherwise where
    the status is OPTIMAL (the plan meets the proven bound).
    """
    started_s = time.perf_counter()
    slots = np.stack([lpt_row(load, problem.num_slots, problem.num_ranks) for load in problem.expert_load])
    return balance_result(problem, slots, solver="lpt", seed=seed, started_s=started_s)


def lpt_row(load: np.ndarray, num_slots: int, num_ranks: int) -> np.ndarray:
    """Return int64[slot], the expert in each slot of one layer of load float64[expert]."""
    copies, _ = copies_by_load(load, num_slots)
    experts = np.repeat(np.arange(len(load)), copies)
    return experts[pack(load[experts] / copies[experts], num_ranks)]


def pack(weight: np.ndarray, num_packs: int) -> np.ndarray:
    """Return int64[position], item ids pack by pack: heaviest first to the lightest pack with room.

    Every pack gets ``len(weight) / num_packs`` items, in order of arrival; ties go to the lower id. One item
    per pack stays in place.
    """
    room = len(weight) // num_packs
    if room == 1:
        return np.arange(num_packs)
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0.0, index) for index in range(num_packs)]
    for item in np.argsort(-weight, kind="stable").tolist():
        total, index = heap[0]
        packs[index].append(item)
        if len(packs[index]) == room:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (total + float(weight[item]), index))
    return np.concatenate([np.array(items, np.int64) for items in packs])
