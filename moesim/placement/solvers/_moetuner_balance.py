"""MoETuner's first program: the experts of one layer into clusters of even load."""

from __future__ import annotations

import heapq
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pulp
    from ortools.sat.python import cp_model

_TOTAL_MAX = 2**30
_LEAST_S = 0.01


@dataclass(frozen=True)
class ClusterTask:
    """One layer's program.

    Attributes:
        load: float64[expert], tokens.
        num_clusters: one per rank.
        least, most: experts that a cluster may have (equal: clusters of fixed size).
        variant: ``l1`` (sum of absolute deviations from the mean, as printed) or ``minmax`` (the largest load).
    """

    load: np.ndarray
    num_clusters: int
    least: int
    most: int
    variant: str

    def value(self, cluster: np.ndarray) -> float:
        """Return the objective of int64[expert] clusters, in tokens."""
        totals = np.bincount(cluster, weights=self.load, minlength=self.num_clusters)
        if self.variant == "minmax":
            return float(totals.max())
        return float(np.abs(totals - self.load.sum() / self.num_clusters).sum())

    @property
    def order(self) -> np.ndarray:
        """int64[expert], the experts by falling load."""
        return np.argsort(-self.load, kind="stable")

    def greedy(self) -> np.ndarray:
        """Return int64[expert] clusters: heaviest first, to the lightest cluster with room (LPT)."""
        heap = [(0.0, 0, number) for number in range(self.num_clusters)]
        cluster = np.empty(len(self.load), np.int64)
        for expert in self.order.tolist():
            total, size, number = heapq.heappop(heap)
            cluster[expert] = number
            if size + 1 < self.most:
                heapq.heappush(heap, (total + float(self.load[expert]), size + 1, number))
        return cluster


@dataclass(frozen=True)
class Clusters:
    """One layer's answer: int64[expert] clusters, their objective and a proven bound of it, in tokens."""

    cluster: np.ndarray
    objective: float
    bound: float


def solve_clusters(task: ClusterTask, *, backend: str, limit_s: float, seed: int, tolerance: float) -> Clusters:
    """Solve one layer (Go and Mahajan, arXiv 2502.06643, equations 1-7), starting from LPT and never worse.

    With x[c, e] = 1 where expert e is in cluster c, T[c] its load:
    minimise ``sum_c |T[c] - mean|`` (or ``max_c T[c]``) subject to ``least <= sum_e x[c, e] <= most`` and
    ``sum_c x[c, e] = 1``. The last is not in print; without it the optimum puts a few experts into several clusters and
    leaves the others out. Clusters are interchangeable: the i-th heaviest expert may only be in cluster 0 ... i.
    """
    start = task.greedy()
    known = task.value(start)
    whole = bool(np.all(task.load == np.floor(task.load))) and task.load.sum() < _TOTAL_MAX
    scale = 1.0 if whole else _TOTAL_MAX / max(float(task.load.sum()), np.finfo(float).tiny)
    weight = np.floor(task.load * scale).astype(np.int64)
    run = _cpsat if backend == "cpsat" else _pulp
    found, bound = run(task, weight, start, limit_s, seed, tolerance)
    # deviations count G times a token; loads that were rounded down move each of them by at most one per expert
    unit = scale * (task.num_clusters if task.variant == "l1" else 1)
    slack = 0.0 if whole or task.variant == "minmax" else 2.0 * len(weight) * task.num_clusters
    proven = max(0.0, (bound - slack) / unit)
    if found is None or task.value(found) >= known:
        return Clusters(start, known, min(known, proven))
    return Clusters(found, task.value(found), min(task.value(found), proven))


def _cpsat(task: ClusterTask, weight: np.ndarray, start: np.ndarray, limit_s: float, seed: int,
           tolerance: float) -> tuple[np.ndarray | None, float]:
    """Return int64[expert] clusters or None, and a proven bound of the scaled objective."""
    from ortools.sat.python import cp_model

    until_s = time.perf_counter() + limit_s
    model, x = _cpsat_model(task, weight, start)
    solver = cp_model.CpSolver()
    solver.parameters.random_seed, solver.parameters.num_workers = seed % 2**31, 1
    solver.parameters.relative_gap_limit = tolerance
    solver.parameters.max_time_in_seconds = max(_LEAST_S, until_s - time.perf_counter())
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, 0.0
    chosen = np.array([solver.value(one) for one in x.ravel()]).reshape(x.shape)
    return np.argmax(chosen, axis=0), max(0.0, solver.best_objective_bound)


def _cpsat_model(task: ClusterTask, weight: np.ndarray, start: np.ndarray) -> tuple[cp_model.CpModel, np.ndarray]:
    from ortools.sat.python import cp_model

    model, total, count = cp_model.CpModel(), int(weight.sum()), task.num_clusters
    x = np.array([[model.new_bool_var(f"x_{c}_{e}") for e in range(len(weight))] for c in range(count)], object)
    hint = _numbered(task, start)
    for place, expert in enumerate(task.order.tolist()):
        model.add_exactly_one(x[:, expert])
        for c in range(count):
            model.add_hint(x[c, expert], bool(hint[expert] == c))
            if c > place:
                model.add(x[c, expert] == 0)
    loads = [sum(int(w) * one for w, one in zip(weight, row, strict=True)) for row in x]
    for row in x:
        model.add_linear_constraint(sum(row), task.least, task.most)
    if task.variant == "minmax":
        largest = model.new_int_var(0, total, "largest")
        for load in loads:
            model.add(load <= largest)
        model.minimize(largest)
        return model, x
    off = [model.new_int_var(0, count * total, f"off_{c}") for c in range(count)]
    for c, load in enumerate(loads):
        model.add(count * load - total <= off[c])
        model.add(total - count * load <= off[c])
    model.minimize(sum(off))
    return model, x


def _numbered(task: ClusterTask, cluster: np.ndarray) -> np.ndarray:
    """Return the same clusters numbered by their heaviest expert."""
    seen: dict[int, int] = {}
    for number in cluster[task.order].tolist():
        seen.setdefault(number, len(seen))
    return np.array([seen[number] for number in cluster.tolist()])


def _pulp(task: ClusterTask, weight: np.ndarray, start: np.ndarray, limit_s: float, seed: int,
          tolerance: float) -> tuple[np.ndarray | None, float]:
    """The same through PuLP and CBC, without the start."""
    import pulp

    with warnings.catch_warnings():
        # PuLP 3 announces that PuLP 4 renames these calls and moves CBC out; 2 knows only these
        warnings.simplefilter("ignore", DeprecationWarning)
        model, x = _pulp_model(task, weight)
        model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=max(_LEAST_S, limit_s), threads=1, gapRel=tolerance))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None, 0.0
    chosen = np.array([one.value() or 0.0 for one in x.ravel()]).reshape(x.shape)
    # PuLP hands over no bound: CBC stops when it is within the tolerance of the larger of bound and value
    optimal = model.sol_status == pulp.LpSolutionOptimal
    bound = float(pulp.value(model.objective)) * (1.0 - tolerance) if optimal else 0.0
    return np.argmax(chosen, axis=0), bound


def _pulp_model(task: ClusterTask, weight: np.ndarray) -> tuple[pulp.LpProblem, np.ndarray]:
    import pulp

    model, total, count = pulp.LpProblem("clusters", pulp.LpMinimize), int(weight.sum()), task.num_clusters
    x = np.array([[pulp.LpVariable(f"x_{c}_{e}", cat="Binary") for e in range(len(weight))] for c in range(count)],
                 object)
    off = [pulp.LpVariable(f"off_{c}", 0) for c in range(1 if task.variant == "minmax" else count)]
    model += pulp.lpSum(off)
    for place, expert in enumerate(task.order.tolist()):
        model += pulp.lpSum(x[: place + 1, expert]) == 1
        for one in x[place + 1:, expert]:
            model += one == 0
    for c, row in enumerate(x):
        load = pulp.lpDot(weight.tolist(), row.tolist())
        model += pulp.lpSum(row) >= task.least
        model += pulp.lpSum(row) <= task.most
        if task.variant == "minmax":
            model += load <= off[0]
        else:
            model += count * load - total <= off[c]
            model += total - count * load <= off[c]
    return model, x
