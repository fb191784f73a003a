"""TensorRT-LLM's expert load balancer: the two greedies of EPLB on heaps, without groups."""

from __future__ import annotations

import heapq
import time

import numpy as np

from moesim.placement.balance_result import balance_result
from moesim.placement.bounds.balance import copies_by_load
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult


def eplb_tensorrt_llm(problem: PlacementProblem, *, seed: int, time_limit_s: float) -> SolveResult:
    """Place as TensorRT-LLM does (``cpp/tensorrt_llm/runtime/moeLoadBalancer``, doReplication, doPlacement; Apache-2.0).

    1. every expert one slot, each further slot to the largest load per copy (a max-heap); a layer without load gets
       its slots evenly, the first experts one more where they do not divide;
    2. copies, heaviest first, to the least loaded rank (a min-heap), `slots_per_rank` to each, in order of arrival.

    No groups and no anti-affinity; unlike EPLB one slot per rank is packed by load as well. Ties go to the lower
    expert, then the lower rank. Deterministic. O(slots log slots) per layer.
    """
    started_s = time.perf_counter()
    slots = np.stack([_layer(load, problem) for load in problem.expert_load])
    return balance_result(problem, slots, solver="eplb-tensorrt-llm", seed=seed, started_s=started_s)


def _layer(load: np.ndarray, problem: PlacementProblem) -> np.ndarray:
    copies = replicate(load, problem.num_slots)
    experts = np.repeat(np.arange(len(load)), copies)
    weight = load[experts] / copies[experts]
    ranks: list[list[int]] = [[] for _ in range(problem.num_ranks)]
    heap = [(0.0, rank) for rank in range(problem.num_ranks)]
    for item in np.argsort(-weight, kind="stable").tolist():
        total, rank = heapq.heappop(heap)
        ranks[rank].append(int(experts[item]))
        if len(ranks[rank]) < problem.slots_per_rank:
            heapq.heappush(heap, (total + float(weight[item]), rank))
    return np.concatenate([np.array(held, np.int64) for held in ranks])


def replicate(load: np.ndarray, num_slots: int) -> np.ndarray:
    """Return int64[expert], the copies of each expert of float64[expert] loads over `num_slots` slots."""
    if not load.sum() > 0:
        base, more = divmod(num_slots, len(load))
        return base + (np.arange(len(load)) < more).astype(np.int64)
    return copies_by_load(load, num_slots)[0]
