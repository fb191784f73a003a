"""vLLM's variant of EPLB: the same plan, with copies that stay on their rank kept in their slots."""

from __future__ import annotations

import time

import numpy as np

from moesim.placement.balance_result import balance_result
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult
from moesim.placement.solvers.eplb import eplb


def eplb_vllm(problem: PlacementProblem, *, seed: int, time_limit_s: float, policy: str = "auto") -> SolveResult:
    """Place as vLLM's default policy does (vllm, ``distributed/eplb/policy/default.py``; Apache-2.0).

    EPLB (`solvers.eplb`), then on every rank: a copy whose expert that rank already holds in `problem.current` takes
    the slot it has there, slot by slot, each copy used once; the others fill the free slots in order. So experts that
    stay on a rank are not copied inside it. Ranks and rank loads are EPLB's. Without `current` it is EPLB.

    Raises:
        InputError: as `eplb`.
    """
    started_s = time.perf_counter()
    plan = eplb(problem, seed=seed, time_limit_s=time_limit_s, policy=policy).plan
    assert plan is not None
    slots = np.array(plan.physical_to_logical)
    if problem.current is not None:
        slots = preserve_slots(slots, problem.current.physical_to_logical, problem.num_ranks)
    return balance_result(problem, slots, solver="eplb-vllm", seed=seed, started_s=started_s)


def preserve_slots(new: np.ndarray, old: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return int32[layer, slot]: `new` with the slots of each rank reordered so that what stays keeps its slot in `old`.

    Args:
        new, old: int[layer, slot], experts, of one shape.
        num_ranks: ranks; each owns an equal run of slots.
    """
    kept = np.empty_like(new)
    size = new.shape[1] // num_ranks
    for layer in range(len(new)):
        for first in range(0, new.shape[1], size):
            left: list[int | None] = new[layer, first:first + size].tolist()
            placed: list[int | None] = []
            for expert in old[layer, first:first + size].tolist():
                placed.append(expert if expert in left else None)
                if expert in left:
                    left[left.index(expert)] = None
            rest = iter([expert for expert in left if expert is not None])
            kept[layer, first:first + size] = [next(rest) if expert is None else expert for expert in placed]
    return kept
