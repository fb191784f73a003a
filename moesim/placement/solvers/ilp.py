"""Exact load balance per layer by integer programming: OR-Tools CP-SAT, or PuLP with CBC."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import InputError, SolverError, unknown
from moesim.placement.balance_result import balance_result
from moesim.placement.bounds import balance_bound, copies_by_load
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult
from moesim.placement.solvers.lpt import lpt_row

if TYPE_CHECKING:
    import pulp
    from ortools.sat.python import cp_model

# (expert, copies, rank): a variable of the program
Key = tuple[int, int, int]

BACKENDS = {"cpsat": "CP-SAT", "pulp": "CBC"}
REPLICAS = ("fixed", "free")
_TOTAL_MAX = 2**40  # scaled load of a layer, far within int64
_LCM_MAX = 2**20
_ROUNDING = 1e-12
# CP-SAT's deterministic seconds per second granted. It did some 0.3 per second on the core it was tried on,
# so this limit bites first, at about a third of the time, and a slower machine still gives the same plan.
_DETERMINISTIC_SHARE = 0.1


def ilp(problem: PlacementProblem, *, seed: int, time_limit_s: float, backend: str = "cpsat",
        replicas: str = "fixed", num_workers: int = 1) -> SolveResult:
    """Minimise ``sum_l max_r sum_e load[l, e] n[e, r] / c[e]``, each layer by itself.

    n[e, r] counts the copies of expert e on rank r, c[e] = ``sum_r n[e, r]`` >= 1, and ``sum_e n[e, r]``
    is the slots of a rank. As a linear program over z[e, m, r] = n[e, r] where c[e] = m, else 0, and
    y[e, m] = [c[e] = m]:

        minimise t  subject to
        ``sum_m y[e, m] = 1``, ``sum_r z[e, m, r] = m y[e, m]``,
        ``sum_(e, m) z[e, m, r] = slots_per_rank``, ``sum_(e, m) (load[e] / m) z[e, m, r] <= t``

    Without redundant slots every m is 1: MoETuner's balance program (Go and Mahajan, arXiv 2502.06643,
    equations 1-7) with clusters of equal size, the assignment equality that its printed form lacks, and
    the largest load in place of the sum of deviations.

    Options: `replicas` ``fixed`` takes c from EPLB's greedy (the proven bound is then `balance_bound`
    alone), ``free`` decides c too (tiny layers only). `backend` ``cpsat`` is hinted with LPT's plan;
    ``pulp`` is CBC in floating point, as a second opinion. `num_workers` searches in parallel (cpsat).

    Every layer gets an even share of the time that is left, and keeps LPT's plan if nothing better was
    found in it (provenance: ``layers_from_lpt``). Exact where the status is OPTIMAL. Loads enter as whole
    numbers: without loss where they are whole, else scaled and rounded down, so that bounds stay valid.
    Exponential time at worst: expect proofs up to some 16 experts per layer. The same seed gives the same
    plan unless the wall clock stops a search before its limit in deterministic time does.

    Raises:
        InputError: an option out of range.
        SolverError: the backend refused the model.
    """
    started_s = time.perf_counter()
    _check_options(backend, replicas, num_workers)
    bounds = balance_bound(problem)
    solved: list[_Solved] = []
    for layer, load in enumerate(problem.expert_load):
        share_s = (started_s + time_limit_s - time.perf_counter()) / (problem.num_layers - layer)
        model = _layer_model(load, problem, float(bounds[layer]), replicas)
        effort = _Effort(seed, share_s, time_limit_s / problem.num_layers * _DETERMINISTIC_SHARE, num_workers)
        solved.append(_solve_layer(model, backend, effort))
    proven = np.array([layer.bound for layer in solved])
    result = balance_result(
        problem, np.stack([layer.row for layer in solved]), solver="ilp", seed=seed, started_s=started_s,
        layer_bound=proven,
        provenance={"layers_from_lpt": [index for index, layer in enumerate(solved) if layer.from_lpt]})
    return dataclasses.replace(result, bound_method=BACKENDS[backend] if np.any(proven > bounds) else "counting")


def _check_options(backend: str, replicas: str, num_workers: int) -> None:
    if backend not in BACKENDS:
        raise unknown("ilp backend", backend, BACKENDS)
    if replicas not in REPLICAS:
        raise unknown("ilp replicas", replicas, REPLICAS)
    if num_workers < 1:
        raise InputError(f"ilp: num_workers must be at least 1, got {num_workers}")


@dataclass(frozen=True)
class _Effort:
    """How hard a backend may try: seconds on the wall clock, and CP-SAT's deterministic seconds."""

    seed: int
    limit_s: float
    deterministic_limit_s: float
    num_workers: int


@dataclass(frozen=True)
class _Solved:
    """One layer's answer: int64[slot] experts, a proven bound in tokens, whether LPT's plan was kept."""

    row: np.ndarray
    bound: float
    from_lpt: bool


@dataclass(frozen=True)
class _Answer:
    """What a backend found: the expert of each slot or None, and a proven bound of the scaled load."""

    row: np.ndarray | None
    bound: float


@dataclass(frozen=True)
class _Layer:
    """One layer in whole numbers.

    `choices[e]` lists ``(copies m, weight)``: the allowed m of expert e, and the scaled load of one of m
    copies, rounded down. `scale` is scaled load per token; `floor` and `ceiling` bound the largest scaled
    load. `bound` is the proven bound in tokens. `closed` says that the choices leave no plan out, so that
    a bound of the model is one of the layer. `hint` is LPT's int64[slot].
    """

    load: np.ndarray
    choices: list[list[tuple[int, int]]]
    scale: float
    floor: int
    ceiling: int
    bound: float
    closed: bool
    hint: np.ndarray
    num_ranks: int
    slots_per_rank: int

    @property
    def terms(self) -> list[tuple[int, int, int]]:
        """``(expert, copies, weight)`` of every choice."""
        return [(e, m, weight) for e, options in enumerate(self.choices) for m, weight in options]

    def largest(self, row: np.ndarray) -> float:
        """Return the largest rank load in tokens of int64[slot] experts."""
        copies = np.bincount(row, minlength=len(self.load))
        return float((self.load[row] / copies[row]).reshape(self.num_ranks, -1).sum(axis=1).max())

    def counts(self, row: np.ndarray) -> np.ndarray:
        """Return int64[expert, rank], copies of each expert on each rank."""
        counts = np.zeros((len(self.load), self.num_ranks), np.int64)
        np.add.at(counts, (row, np.arange(len(row)) // self.slots_per_rank), 1)
        return counts

    def row(self, value: Callable[[Key], int]) -> np.ndarray:
        """Return int64[slot] of a backend's solution: `value` of the variable (expert, copies, rank)."""
        placed = [np.repeat(e, value((e, m, r))) for r in range(self.num_ranks) for e, m, _ in self.terms]
        return np.concatenate(placed)


def _layer_model(load: np.ndarray, problem: PlacementProblem, bound: float, replicas: str) -> _Layer:
    extra = problem.num_slots - problem.num_experts
    copies, _ = copies_by_load(load, problem.num_slots)
    free = replicas == "free" and extra > 0
    choices = [range(1, extra + 2) if free else (int(count),) for count in copies]
    scale, whole = _scale(load, choices)
    # Rounding down loses less than one per slot, so this floor holds for every plan of the rounded model.
    scaled = bound * scale
    floor = math.ceil(scaled * (1 - _ROUNDING)) if whole else math.floor(scaled) - problem.slots_per_rank
    return _Layer(
        load=load, scale=scale, floor=max(0, floor), ceiling=math.ceil(load.sum() * scale), bound=bound,
        choices=[[(m, math.floor(float(value) * scale / m)) for m in options]
                 for value, options in zip(load, choices, strict=True)],
        closed=free or extra == 0, hint=lpt_row(load, problem.num_slots, problem.num_ranks),
        num_ranks=problem.num_ranks, slots_per_rank=problem.slots_per_rank)


def _scale(load: np.ndarray, choices: Sequence[Sequence[int]]) -> tuple[float, bool]:
    """Return scaled load per token, and whether all scaled loads are then whole."""
    total = float(load.sum())
    common = math.lcm(*{m for options in choices for m in options})
    if common <= _LCM_MAX and total * common <= _TOTAL_MAX and np.all(load == np.floor(load)):
        return float(common), True
    return _TOTAL_MAX / total, False


def _solve_layer(layer: _Layer, backend: str, effort: _Effort) -> _Solved:
    largest = layer.largest(layer.hint)
    if largest <= layer.bound * (1 + _ROUNDING) or effort.limit_s <= 0:
        return _Solved(layer.hint, layer.bound, from_lpt=True)
    answer = _cpsat(layer, effort) if backend == "cpsat" else _pulp(layer, effort.limit_s)
    row, from_lpt = layer.hint, True
    if answer.row is not None and layer.largest(answer.row) < largest:
        row, from_lpt = answer.row, False
    bound = max(layer.bound, answer.bound / layer.scale) if layer.closed else layer.bound
    # Float rounding must not lift a bound above the plan that meets it.
    return _Solved(row, min(bound, layer.largest(row)), from_lpt)


def _cpsat(layer: _Layer, effort: _Effort) -> _Answer:
    from ortools.sat.python import cp_model

    model, z = _cpsat_model(layer)
    solver = cp_model.CpSolver()
    solver.parameters.random_seed = effort.seed % 2**31
    solver.parameters.num_workers = effort.num_workers
    solver.parameters.interleave_search = effort.num_workers > 1  # makes the parallel search deterministic
    solver.parameters.max_time_in_seconds = effort.limit_s
    solver.parameters.max_deterministic_time = effort.deterministic_limit_s
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN):
        raise SolverError(f"ilp: CP-SAT ended with status {solver.status_name(status)}: {model.validate()}")
    if status == cp_model.UNKNOWN:
        return _Answer(None, float(layer.floor))
    return _Answer(layer.row(lambda key: solver.value(z[key])), solver.best_objective_bound)


def _cpsat_model(layer: _Layer) -> tuple[cp_model.CpModel, dict[Key, cp_model.IntVar]]:
    """Return the model and its variables z[expert, copies, rank], hinted with LPT's plan."""
    from ortools.sat.python import cp_model

    model, z = cp_model.CpModel(), {}
    hint, ranks = layer.counts(layer.hint), range(layer.num_ranks)
    for e, options in enumerate(layer.choices):
        y = {m: model.new_bool_var(f"y_{e}_{m}") for m, _ in options}
        model.add_exactly_one(y.values())
        for m in y:
            used = bool(hint[e].sum() == m)
            model.add_hint(y[m], used)
            for r in ranks:
                z[e, m, r] = model.new_int_var(0, min(m, layer.slots_per_rank), f"z_{e}_{m}_{r}")
                model.add_hint(z[e, m, r], int(hint[e, r]) if used else 0)
            model.add(sum(z[e, m, r] for r in ranks) == m * y[m])
    largest = model.new_int_var(layer.floor, layer.ceiling, "t")
    weight_of = {(e, m): weight for e, m, weight in layer.terms}
    copy_weight = np.array([weight_of[e, int(n)] for e, n in enumerate(hint.sum(axis=1))])
    model.add_hint(largest, max(layer.floor, int((copy_weight @ hint).max())))
    for r in ranks:
        model.add(sum(z[e, m, r] for e, m, _ in layer.terms) == layer.slots_per_rank)
        model.add(sum(weight * z[e, m, r] for e, m, weight in layer.terms) <= largest)
    model.minimize(largest)
    return model, z


def _pulp(layer: _Layer, limit_s: float) -> _Answer:
    import pulp

    with warnings.catch_warnings():
        # PuLP 3 announces that PuLP 4 renames these calls and moves CBC out; 2 knows only these.
        warnings.simplefilter("ignore", DeprecationWarning)
        model, z = _pulp_model(layer)
        model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=limit_s, threads=1))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return _Answer(None, float(layer.floor))
    row = layer.row(lambda key: round(z[key].value()))
    # PuLP hands over no bound, so only a proven optimum gives one better than the floor.
    optimal = model.sol_status == pulp.LpSolutionOptimal
    return _Answer(row, float(round(pulp.value(model.objective)) if optimal else layer.floor))


def _pulp_model(layer: _Layer) -> tuple[pulp.LpProblem, dict[Key, pulp.LpVariable]]:
    """Return the model of `_cpsat_model` (without the hint) and its variables."""
    import pulp

    model, z = pulp.LpProblem("balance", pulp.LpMinimize), {}
    largest = pulp.LpVariable("t", layer.floor, layer.ceiling)
    model += largest
    ranks = range(layer.num_ranks)
    for e, options in enumerate(layer.choices):
        y = {m: pulp.LpVariable(f"y_{e}_{m}", cat="Binary") for m, _ in options}
        model += pulp.lpSum(y.values()) == 1
        for m in y:
            for r in ranks:
                z[e, m, r] = pulp.LpVariable(f"z_{e}_{m}_{r}", 0, min(m, layer.slots_per_rank), "Integer")
            model += pulp.lpSum(z[e, m, r] for r in ranks) == m * y[m]
    for r in ranks:
        model += pulp.lpSum(z[e, m, r] for e, m, _ in layer.terms) == layer.slots_per_rank
        model += pulp.lpSum(weight * z[e, m, r] for e, m, weight in layer.terms) <= largest
    return model, z
