"""MoETuner: clusters of even load by one integer program per layer, clusters to ranks by another over all layers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from moesim.errors import InputError, unknown
from moesim.placement.balance_result import balance_result
from moesim.placement.bounds import balance_bound, counted_transitions
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult
from moesim.placement.solvers._homes import slots_from_homes
from moesim.placement.solvers._moetuner_balance import Clusters, ClusterTask, solve_clusters
from moesim.placement.solvers._moetuner_mapping import (
    VITERBI_RANKS,
    MappingTask,
    relative_mapping,
    searched_mapping,
    viterbi_mapping,
)
from moesim.placement.solvers._moetuner_program import MOST_IMPLICATIONS, num_implications, solve_program

CLUSTER_SIZES = ("fixed", "free")
VARIANTS = ("l1", "minmax")
BACKENDS = ("cpsat", "pulp")
MAPPINGS = ("auto", "program")
_BALANCE_SHARE = 0.5  # of the time, for the programs of the first kind
_SEARCH_SHARE = 0.2  # of what is left, for the start of the second


def moetuner(problem: PlacementProblem, *, seed: int, time_limit_s: float, cluster_size: str = "fixed",
             variant: str = "l1", backend: str = "cpsat", mapping: str = "auto", tolerance: float = 0.025,
             memory_weight: float = 1.0) -> SolveResult:
    """Place as MoETuner does (Go and Mahajan, arXiv 2502.06643): balance each layer, then shorten the slowest exchange.

    1. Per layer, cluster the experts, one cluster per rank (`_moetuner_balance.solve_clusters`): least sum of absolute
       deviations from the mean load (`variant` ``l1``, the paper's), or least largest load (``minmax``: the deviation
       is not the tail). `cluster_size` ``fixed``: E / R experts each; ``free`` (the paper's): 1 ... slots per rank.
    2. Over all layers, map clusters to ranks one to one (`_moetuner_program.solve_program`): least sum over neighbouring
       layers of the slowest ordered pair of ranks. Seconds per token of a pair are the problem's `rates`, or 1 without
       them. Every pair of experts counts, so a token counts k^2 times (with rates: times `pair_weight`); what stays on
       its rank is free. With free sizes an expert above the depth's even share of a rank costs `memory_weight` times
       the mean count of a pair over the slowest link (the paper's equality may be infeasible).

    `mapping` ``auto`` takes an exact method where there is one: a chain of assignments where all links and sizes are
    equal, the shortest path over permutations for up to 6 ranks; else, or with ``program``, the integer program from a
    greedy pass with sweeps. Above 2**18 implications (pairs of layers x ranks^4; 2**14 for ``pulp``) the sweeps' answer
    stands. Programs stop at the relative gap `tolerance`; half the time goes to the first kind.

    A plan has equally many slots on every rank: a rank whose cluster is smaller repeats its own experts, which changes
    neither loads nor traffic (there is no replication here); ``free`` thus needs redundant slots, which are its room.

    The result's objective is what both variants are after and every balance solver reports, ``sum_l max_r load[l, r]``
    (the mapping does not change it); provenance has the objective and the proven bound of both programs.
    No placement without replicas gets below the heaviest expert: ``heaviest_over_mean`` says so. Exponential time.

    Raises:
        InputError: no transitions; experts that do not divide over the ranks (fixed), or no slot beyond one per expert
            (free); an option out of range.
    """
    started_s = time.perf_counter()
    _check(problem, cluster_size, variant, backend, mapping, tolerance, memory_weight)
    solved = []
    for layer, load in enumerate(problem.expert_load):
        left_s = started_s + _BALANCE_SHARE * time_limit_s - time.perf_counter()
        task = _cluster_task(problem, load, cluster_size, variant)
        solved.append(solve_clusters(task, backend=backend, limit_s=left_s / (problem.num_layers - layer), seed=seed,
                                     tolerance=tolerance))
    clusters = np.stack([one.cluster for one in solved])
    facts = _balance_facts(problem, solved)
    ranks = np.zeros((1, problem.num_ranks), np.int64) + np.arange(problem.num_ranks)
    if problem.num_layers > 1:
        mapped = _mapping_task(problem, clusters, memory_weight)
        ranks, more = _map(mapped, mapping, backend, started_s + time_limit_s, seed, tolerance)
        facts |= more
    homes = np.take_along_axis(ranks, clusters, axis=1)
    slots = slots_from_homes(homes, problem.num_ranks, problem.slots_per_rank)
    if problem.rates is not None and problem.num_layers > 1:
        plan = PlacementPlan(slots, problem.num_ranks, problem.num_experts)
        facts["bottleneck_s"] = OBJECTIVES["bottleneck"].value(problem, plan)
    closed = variant == "minmax" and problem.num_slots == problem.num_experts
    bound = np.maximum(balance_bound(problem), [one.bound for one in solved]) if closed else None
    return balance_result(problem, slots, solver="moetuner", seed=seed, started_s=started_s, layer_bound=bound,
                          provenance=facts)


def _check(problem: PlacementProblem, cluster_size: str, variant: str, backend: str, mapping: str, tolerance: float,
           memory_weight: float) -> None:
    choices = (("cluster_size", cluster_size, CLUSTER_SIZES), ("variant", variant, VARIANTS),
               ("backend", backend, BACKENDS), ("mapping", mapping, MAPPINGS))
    for name, value, options in choices:
        if value not in options:
            raise unknown(f"moetuner {name}", value, options)
    if not 0 <= tolerance < 1 or not 0 <= memory_weight < float("inf"):
        raise InputError(f"moetuner: needs tolerance in 0 ... 1 and memory_weight >= 0, got {tolerance} and "
                         f"{memory_weight}")
    if problem.num_layers > 1:
        counted_transitions(problem)
    experts, ranks = problem.num_experts, problem.num_ranks
    if cluster_size == "fixed" and experts % ranks:
        raise InputError(f"moetuner: clusters of fixed size need experts that divide over the ranks, got {experts} and "
                         f"{ranks}; use cluster_size 'free' with redundant slots")
    if cluster_size == "free" and (problem.num_slots == experts or experts < ranks):
        raise InputError(f"moetuner: clusters of free size need slots beyond one per expert on some rank and an expert for "
                         f"each, got {problem.num_slots} slots for {experts} experts on {ranks} ranks; add "
                         "redundant experts or use cluster_size 'fixed'")


def _cluster_task(problem: PlacementProblem, load: np.ndarray, cluster_size: str, variant: str) -> ClusterTask:
    even = problem.num_experts // problem.num_ranks
    least, most = (even, even) if cluster_size == "fixed" else (1, problem.slots_per_rank)
    return ClusterTask(load, problem.num_ranks, least, most, variant)


def _balance_facts(problem: PlacementProblem, solved: list[Clusters]) -> dict[str, Any]:
    mean = np.maximum(problem.expert_load.sum(axis=1) / problem.num_ranks, np.finfo(float).tiny)
    return {"balance_objective": sum(one.objective for one in solved),
            "balance_bound": sum(one.bound for one in solved),
            "heaviest_over_mean": float((problem.expert_load.max(axis=1) / mean).max())}


def _mapping_task(problem: PlacementProblem, clusters: np.ndarray, memory_weight: float) -> MappingTask:
    member = np.eye(problem.num_ranks)[clusters]  # [layer, expert, cluster]
    counts = np.einsum("lic,lij,ljd->lcd", member[:-1], counted_transitions(problem), member[1:], optimize=True)
    if problem.rates is None:
        link = 1.0 - np.eye(problem.num_ranks)
    else:
        rates = problem.rates
        link = rates.pair_weight * rates.link_s(problem.num_ranks, problem.ranks_per_node)
    penalty = memory_weight * float(counts.mean()) * float(link.max())
    return MappingTask(counts, link, member.sum(axis=1).astype(np.int64), penalty)


def _map(task: MappingTask, mapping: str, backend: str, until_s: float, seed: int,
         tolerance: float) -> tuple[np.ndarray, dict[str, Any]]:
    """Return int64[layer, cluster] ranks, and what provenance says of the second program."""
    ranks, bound, method = None, float(task.floors().sum()), "sweeps"
    if mapping == "auto" and not task.has_memory:
        if task.uniform:
            ranks, method = relative_mapping(task), "assignments"
        elif len(task.link) <= VITERBI_RANKS:
            ranks, method = viterbi_mapping(task, until_s), "shortest path"
        if ranks is not None:
            bound = task.value(ranks)
    if ranks is None:
        now_s = time.perf_counter()
        ranks = searched_mapping(task, now_s + _SEARCH_SHARE * (until_s - now_s))
        method = "sweeps"
        if num_implications(task) <= MOST_IMPLICATIONS[backend]:
            better, proven = solve_program(task, ranks, backend=backend, seed=seed, tolerance=tolerance,
                                           limit_s=max(0.0, until_s - time.perf_counter()))
            ranks, bound, method = (ranks if better is None else better), max(bound, proven), "program"
    return ranks, {"mapping_method": method, "mapping_objective": task.value(ranks), "mapping_bound": bound,
                   "experts_above_share": task.excess(ranks)}
