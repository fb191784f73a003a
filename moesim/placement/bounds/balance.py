"""Bounds on the largest rank load: counting arguments, exact for the copies that redundant slots allow."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from moesim.placement.problem import PlacementProblem


def copies_by_load(load: Sequence[float] | np.ndarray, num_slots: int) -> tuple[np.ndarray, list[int]]:
    """Give each expert a slot and every further slot to the largest load per copy (ties: the lower id).

    This greedy minimises ``m = max_e load[e] / copies[e]``: m never rises while copies are given, so every
    expert f had a share of at least the final m before its last copy. A smaller maximum thus needs as many
    copies of every f, and one more of the expert that attains m: more slots than there are.

    Returns:
        int64[expert] copies, and the expert of each further slot in the order given.
    """
    copies = np.ones(len(load), np.int64)
    heap = [(-float(value), expert) for expert, value in enumerate(load)]
    heapq.heapify(heap)
    given = []
    for _ in range(num_slots - len(load)):
        expert = heap[0][1]
        given.append(expert)
        copies[expert] += 1
        heapq.heapreplace(heap, (-float(load[expert]) / int(copies[expert]), expert))
    return copies, given


def balance_bound(problem: PlacementProblem) -> np.ndarray:
    """Return float64[layer], proven lower bounds on the largest rank load of any plan with these slots.

    The largest of

    - the mean rank load;
    - with redundant slots: the smallest possible ``max_e load[e] / copies[e]`` over all ways to fill the
      slots, since the rank with that copy carries at least it (exact, by `copies_by_load`);
    - with exactly one slot per expert (S per rank, R ranks), for j = 0 ... S - 1: one rank holds at least
      j + 1 of the j R + 1 heaviest experts (pigeonhole), and S experts in all, so at least the j + 1
      lightest of those and the S - j - 1 lightest of the layer (j = 0: the heaviest expert). Whole
      loads have a whole largest rank load, so the mean is then rounded up.

    Complexity: O(E log E) per layer, and O(log E) per redundant slot.
    """
    return np.array([_layer_bound(load, problem) for load in problem.expert_load])


def _layer_bound(load: np.ndarray, problem: PlacementProblem) -> float:
    mean = float(load.sum()) / problem.num_ranks
    if problem.num_slots > problem.num_experts:
        copies, _ = copies_by_load(load, problem.num_slots)
        return max(mean, float(np.max(load / copies)))
    if np.all(load == np.floor(load)) and load.sum() < 2**53:
        mean = float(-(-int(load.sum()) // problem.num_ranks))
    return max(mean, _pigeonhole_bound(load, problem.num_ranks, problem.slots_per_rank))


def _pigeonhole_bound(load: np.ndarray, num_ranks: int, slots_per_rank: int) -> float:
    falling = np.sort(load)[::-1]
    rising = np.concatenate([[0.0], np.cumsum(falling[::-1])])
    return max(float(falling[j * num_ranks - j : j * num_ranks + 1].sum() + rising[slots_per_rank - j - 1])
               for j in range(slots_per_rank))
