"""SGLang's step-wise variant of EPLB (`deepseek_vec`): copies that lower the sum over steps of the maximum."""

from __future__ import annotations

import time

import numpy as np

from moesim.errors import InputError
from moesim.placement.balance_result import balance_result, step_loads
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult
from moesim.placement.solvers.eplb import levels
from moesim.placement.solvers.lpt import pack

_TIE = 1e-4  # tokens per expert id: SGLang keeps loads apart by them


def eplb_sglang(problem: PlacementProblem, *, seed: int, time_limit_s: float, policy: str = "auto") -> SolveResult:
    """Place as SGLang's ``deepseek_vec`` does (sglang, ``srt/eplb/eplb_algorithms/deepseek_vec.py``; Apache-2.0).

    On loads [step, layer, expert] of `problem.steps` (without them: the loads as one step):

    1. each redundant slot goes to the expert e that minimises ``sum_t max_f load[t, f] / copies[f]`` with one copy
       more of e (ties: the lower id);
    2. copies, heaviest first by their load over all steps, are dealt to the ranks in snake order: 0 ... R - 1, then
       R - 1 ... 0, and so on. There is no packing by load.

    `policy` as in `eplb`: ``hierarchical`` packs groups to nodes first and does both per node. The result states the
    objective `balance` on `problem.expert_load`, to compare. Deterministic. O(redundant * steps * experts) per layer.

    Raises:
        InputError: an unknown policy, groups that do not divide, redundant slots that nodes cannot share equally.
    """
    started_s = time.perf_counter()
    slots = sglang_slots(problem, step_loads(problem), policy)
    return balance_result(problem, slots, solver="eplb-sglang", seed=seed, started_s=started_s)


def sglang_slots(problem: PlacementProblem, loads: np.ndarray, policy: str = "auto") -> np.ndarray:
    """Return int64[layer, slot] of `eplb_sglang` for float64[layer, step, expert] loads."""
    num_groups, num_nodes = levels(problem, policy)
    if problem.num_slots % num_nodes or problem.num_ranks % num_nodes:
        raise InputError(f"eplb-sglang: {problem.num_slots} slots do not divide over {num_nodes} nodes")
    return np.stack([_layer(steps, problem, num_groups, num_nodes) for steps in loads])


def _layer(steps: np.ndarray, problem: PlacementProblem, num_groups: int, num_nodes: int) -> np.ndarray:
    groups = np.arange(problem.num_experts).reshape(num_groups, -1)
    order = pack(steps.sum(axis=0)[groups].sum(axis=1), num_nodes)
    ranks = problem.num_ranks // num_nodes
    rows = []
    for chosen in order.reshape(num_nodes, -1):
        experts = groups[chosen].ravel()
        items = step_copies(steps[:, experts], problem.num_slots // num_nodes)
        share = steps[:, experts].sum(axis=0)[items] / np.bincount(items, minlength=len(experts))[items]
        rows.append(experts[items[snake(share, ranks)]])
    return np.concatenate(rows)


def step_copies(steps: np.ndarray, num_slots: int) -> np.ndarray:
    """Return int64[slot], the expert of each slot: every expert once, then the redundant ones in the order given.

    Args:
        steps: float64[step, expert], tokens.
        num_slots: slots to fill.
    """
    num_experts = steps.shape[1]
    copies, rows = np.ones(num_experts), np.arange(len(steps))
    apart = steps + np.arange(num_experts) * _TIE
    items = list(range(num_experts))
    for _ in range(num_slots - num_experts):
        share = apart / copies
        top = share.argmax(axis=1)
        largest = share[rows, top]
        # one copy more changes a step's maximum only for the expert that has it
        share[rows, top] = steps[rows, top] / (copies[top] + 1)
        value = np.full(num_experts, largest.sum())
        np.add.at(value, top, share.max(axis=1) - largest)
        chosen = int(value.argmin())
        items.append(chosen)
        copies[chosen] += 1
    return np.array(items, np.int64)


def snake(share: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return int64[position], item ids rank by rank: heaviest first, dealt 0 ... R - 1, R - 1 ... 0 and so on."""
    if len(share) == num_ranks:
        return np.arange(num_ranks)
    deals = np.argsort(-share, kind="stable").reshape(-1, num_ranks)
    deals[1::2] = deals[1::2, ::-1]
    return deals.T.ravel()
