"""MoETuner's second program as an integer program: clusters to ranks by the slowest pair, through CP-SAT or CBC."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.placement.solvers._moetuner_mapping import MappingTask

if TYPE_CHECKING:
    import pulp
    from ortools.sat.python import cp_model

_TOTAL_MAX = 2**40
# implications that a backend is given at most: beyond, writing them down takes longer than a search that finds nothing
MOST_IMPLICATIONS = {"cpsat": 2**18, "pulp": 2**14}
_LEAST_S = 0.01


@dataclass(frozen=True)
class Scaled:
    """The task in whole numbers.

    Attributes:
        values: int64[layer - 1, cluster, cluster, rank, rank], scaled cost of each pair, rounded down.
        floors: int64[layer - 1], lower bounds. ceilings: int64[layer - 1]: a pair that costs more cannot be in a
            mapping that is better than the start.
        memory: scaled cost of an expert above the share; scale: scaled cost per cost.
    """

    values: np.ndarray
    floors: np.ndarray
    ceilings: np.ndarray
    memory: int
    scale: float


def num_implications(task: MappingTask) -> int:
    """Return ``pairs of layers x ranks^4``."""
    return len(task.counts) * len(task.link) ** 4


def solve_program(task: MappingTask, start: np.ndarray, *, backend: str, limit_s: float, seed: int,
                  tolerance: float) -> tuple[np.ndarray | None, float]:
    """Solve the program; return int64[layer, cluster] ranks (None: nothing better than the start) and a proven bound.

    With y[l, c, g] = 1 where cluster c of layer l is on rank g, and C[l, c1, c2] its tokens (Go and Mahajan, arXiv
    2502.06643, equations 8-15; the maximum, which has no index in print, is over pairs of ranks):

        minimise ``sum_l t[l] + w sum_g excess[g]``  subject to
        ``t[l] >= C[l, c1, c2] link[g1, g2]`` wherever ``y[l, c1, g1]`` and ``y[l + 1, c2, g2]``,
        ``sum_g y[l, c, g] = 1``, ``sum_c y[l, c, g] = 1``,
        ``excess[g] >= sum_(l, c) size[l, c] y[l, c, g] - ceil(experts / ranks)``

    Implications, not products. The last line is the paper's equality of memory over the whole depth, made soft: the
    cluster sizes of the first program may not allow it. Cluster 0 of layer 0 is on rank 0 (all ranks are alike).
    """
    known = task.value(start)
    scaled = _scaled(task, known)
    until_s = time.perf_counter() + limit_s
    run = _cpsat if backend == "cpsat" else _pulp
    ranks, bound = run(task, scaled, start, until_s, seed, tolerance)
    # each pair of layers was rounded down by less than one; so was the memory's cost
    floor = float(task.floors().sum())
    proven = max(floor, min(bound / scaled.scale, known))
    if ranks is None or task.value(ranks) >= known:
        return None, proven
    return ranks, min(proven, task.value(ranks))


def _scaled(task: MappingTask, known: float) -> Scaled:
    costs = task.counts[:, :, :, None, None] * task.link
    total = float(costs.max(axis=(1, 2, 3, 4)).sum()) + task.memory_weight * float(task.sizes.sum())
    whole = total < _TOTAL_MAX and all(np.all(part == np.floor(part)) for part in (costs, task.memory_weight))
    scale = 1.0 if whole else _TOTAL_MAX / max(total, np.finfo(float).tiny)
    floors = np.floor(task.floors() * scale).astype(np.int64)
    room = int(np.ceil(known * scale)) - int(floors.sum()) + 1
    return Scaled(np.floor(costs * scale).astype(np.int64), floors, floors + room,
                  int(task.memory_weight * scale) if task.has_memory else 0, scale)


def _implications(scaled: Scaled) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Yield (pair, cluster, cluster, rank, rank, value) of every implication above the pair's floor."""
    for pair, floor in enumerate(scaled.floors.tolist()):
        for c1, c2, g1, g2 in np.argwhere(scaled.values[pair] > floor).tolist():
            yield pair, c1, c2, g1, g2, int(scaled.values[pair, c1, c2, g1, g2])


def _cpsat(task: MappingTask, scaled: Scaled, start: np.ndarray, until_s: float, seed: int,
           tolerance: float) -> tuple[np.ndarray | None, float]:
    from ortools.sat.python import cp_model

    model, y = _cpsat_ranks(start)
    slowest = [model.new_int_var(int(low), int(high), f"t_{pair}")
               for pair, (low, high) in enumerate(zip(scaled.floors, scaled.ceilings, strict=True))]
    for pair, c1, c2, g1, g2, value in _implications(scaled):
        first, second = y[pair, c1, g1], y[pair + 1, c2, g2]
        if value > scaled.ceilings[pair]:
            model.add_bool_or(~first, ~second)
        else:
            model.add(slowest[pair] >= value).only_enforce_if(first, second)
        if time.perf_counter() > until_s:
            return None, 0.0
    goal = cp_model.LinearExpr.sum(slowest)
    if scaled.memory:
        over = [model.new_int_var(0, int(task.sizes.sum()), f"over_{g}") for g in range(len(task.link))]
        for g, excess in enumerate(over):
            model.add(cp_model.LinearExpr.weighted_sum(y[:, :, g].ravel().tolist(), task.sizes.ravel().tolist())
                      - task.share <= excess)
        goal = goal + scaled.memory * cp_model.LinearExpr.sum(over)
    model.minimize(goal)
    solver = cp_model.CpSolver()
    solver.parameters.random_seed, solver.parameters.num_workers = seed % 2**31, 1
    solver.parameters.relative_gap_limit = tolerance
    solver.parameters.max_time_in_seconds = max(_LEAST_S, until_s - time.perf_counter())
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, 0.0
    chosen = np.array([solver.value(one) for one in y.ravel()]).reshape(y.shape)
    return np.argmax(chosen, axis=2), max(0.0, solver.best_objective_bound)


def _cpsat_ranks(start: np.ndarray) -> tuple[cp_model.CpModel, np.ndarray]:
    """Return a model with permutations y[layer, cluster, rank], hinted with `start` (where that has cluster 0 on rank 0)."""
    from ortools.sat.python import cp_model

    model, (num_layers, num_ranks) = cp_model.CpModel(), start.shape
    y = np.empty((num_layers, num_ranks, num_ranks), object)
    for index in np.ndindex(*y.shape):
        y[index] = one = model.new_bool_var("")
        if start[0, 0] == 0:
            model.add_hint(one, bool(start[index[:2]] == index[2]))
    for layer in y:
        for number in range(num_ranks):
            model.add_exactly_one(layer[number])
            model.add_exactly_one(layer[:, number])
    model.add(y[0, 0, 0] == 1)
    return model, y


def _pulp(task: MappingTask, scaled: Scaled, start: np.ndarray, until_s: float, seed: int,
          tolerance: float) -> tuple[np.ndarray | None, float]:
    import pulp

    with warnings.catch_warnings():
        # PuLP 3 announces that PuLP 4 renames these calls and moves CBC out; 2 knows only these
        warnings.simplefilter("ignore", DeprecationWarning)
        model, y = _pulp_model(task, scaled, start.shape)
        left_s = max(_LEAST_S, until_s - time.perf_counter())
        model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=left_s, threads=1, gapRel=tolerance))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None, 0.0
    chosen = np.array([one.value() or 0.0 for one in y.ravel()]).reshape(y.shape)
    # PuLP hands over no bound: CBC stops when it is within the tolerance of the larger of bound and value
    optimal = model.sol_status == pulp.LpSolutionOptimal
    bound = float(pulp.value(model.objective)) * (1.0 - tolerance) if optimal else 0.0
    return np.argmax(chosen, axis=2), bound


def _pulp_model(task: MappingTask, scaled: Scaled, shape: tuple[int, ...]) -> tuple[pulp.LpProblem, np.ndarray]:
    import pulp

    model, (num_layers, num_ranks) = pulp.LpProblem("mapping", pulp.LpMinimize), shape
    y = np.array([[[pulp.LpVariable(f"y_{layer}_{c}_{g}", cat="Binary") for g in range(num_ranks)]
                   for c in range(num_ranks)] for layer in range(num_layers)], object)
    slowest = [pulp.LpVariable(f"t_{pair}", int(low), int(high))
               for pair, (low, high) in enumerate(zip(scaled.floors, scaled.ceilings, strict=True))]
    over = [pulp.LpVariable(f"over_{g}", 0) for g in range(num_ranks)] if scaled.memory else []
    model += pulp.lpSum(slowest) + scaled.memory * pulp.lpSum(over)
    for layer in y:
        for number in range(num_ranks):
            model += pulp.lpSum(layer[number]) == 1
            model += pulp.lpSum(layer[:, number]) == 1
    model += y[0, 0, 0] == 1
    for pair, c1, c2, g1, g2, value in _implications(scaled):
        both = y[pair, c1, g1] + y[pair + 1, c2, g2]
        if value > scaled.ceilings[pair]:
            model += both <= 1
        else:
            low = int(scaled.floors[pair])
            model += slowest[pair] >= low + (value - low) * (both - 1)
    for g, excess in enumerate(over):
        model += pulp.lpDot(task.sizes.ravel().tolist(), y[:, :, g].ravel().tolist()) - task.share <= excess
    return model, y
