"""Bounds on the largest rank load: counting arguments, exact for the copies that redundant slots allow."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np

from moesim.placement.certificate import Certificate
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress

COUNTING = "counting"
_SAFE = 1 - 2.0**-40  # what rounding of sums and quotients of float64 can take off a bound


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


def prove_balance(problem: PlacementProblem, *, seed: int, time_limit_s: float,
                  incumbent: PlacementPlan | None = None, progress: Progress | None = None) -> Certificate:
    """Return the certificate of the counting bound on the objective `balance`, at once.

    ``layer_bound`` float64[layer]: each can be checked alone, by counting the copies that a lower largest share
    would take, by the mean, or by the pigeonhole argument (see `balance_bound`). They are lowered by 2^-40 of
    themselves so that float64 rounding cannot make one invalid. `seed`, `time_limit_s` and `incumbent` change nothing.
    """
    certificate = counting_certificate(balance_bound(problem))
    if progress is not None:
        progress.proved(certificate.bound)
    return certificate


def counting_certificate(layer_bound: np.ndarray) -> Certificate:
    """Return the certificate of float64[layer] bounds of `balance_bound`, see `prove_balance`."""
    safe = layer_bound * _SAFE
    return Certificate("balance", COUNTING, float(safe.sum()) * _SAFE, {}, {"layer_bound": safe})


def step_balance_bound(problem: PlacementProblem, loads: np.ndarray) -> np.ndarray:
    """Return float64[layer], bounds on the sum over steps of the largest rank load, loads float64[layer, step, expert].

    The plan is the same in all steps, so both hold: the sum of the steps' own bounds, and the bound of the summed load
    (the sum of maxima is at least the maximum of the sums).
    """
    bound = np.empty(len(loads))
    for layer, steps in enumerate(loads):
        one = dataclasses.replace(problem, expert_load=steps[:1], transitions=None, expert_bytes=np.zeros(0, np.int64),
                                  steps=None, current=None)
        bound[layer] = max(sum(_layer_bound(load, one) for load in steps), _layer_bound(steps.sum(axis=0), one))
    return bound


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
