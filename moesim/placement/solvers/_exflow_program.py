"""ExFlow's integer program for one split: experts of all layers into equal parts, fewest tokens that change the part."""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pulp
    from ortools.sat.python import cp_model

_TOTAL_MAX = 2**40
# rows that a backend is given at most: CBC's relaxation at the root ignores its time limit and grows with them; CP-SAT
# would find nothing in the minute after it has read so many
_MOST_ROWS = {"cpsat": 2**20, "pulp": 2**14}


@dataclass(frozen=True)
class Split:
    """One split and what is known of it.

    Attributes:
        parts: int64[layer, member], the part of each expert.
        crossing: transitions that change the part.
        bound: proven: no balanced split has fewer (0 without a proof).
        improved: whether the program found a better split than the one that it started from.
    """

    parts: np.ndarray
    crossing: float
    bound: float
    improved: bool


class _OutOfTimeError(Exception):
    """The clock ran out while a program was still being written down."""


def crossing(transitions: np.ndarray, parts: np.ndarray) -> float:
    """Return the transitions float[layer - 1, member, member] whose two ends are in different parts."""
    differs = parts[:-1, :, None] != parts[1:, None, :]
    return float(np.sum(transitions, where=differs))


def forward_split(transitions: np.ndarray, num_parts: int) -> np.ndarray:
    """Return int64[layer, member] parts: the first layer in blocks, each next one exact given the one before."""
    from scipy.optimize import linear_sum_assignment

    members = transitions.shape[1]
    room = members // num_parts
    parts = np.tile(np.arange(members) // room, (len(transitions) + 1, 1))
    for layer, counts in enumerate(transitions):
        gain = counts.T @ np.eye(num_parts)[parts[layer]]
        parts[layer + 1] = linear_sum_assignment(np.repeat(gain, room, axis=1), maximize=True)[1] // room
    return parts


def relabelled(parts: np.ndarray) -> np.ndarray:
    """Return the same split with its parts numbered by first appearance in the first layer."""
    _, first = np.unique(parts[0], return_index=True)
    number = np.empty(len(first), np.int64)
    number[parts[0][np.sort(first)]] = np.arange(len(first))
    return number[parts]


def solve_split(transitions: np.ndarray, start: np.ndarray, *, backend: str, limit_s: float, seed: int,
                hint: bool) -> Split:
    """Minimise the transitions that change the part, equal parts in every layer (Yao et al., arXiv 2401.08383).

    With x[l, i, p] = 1 where expert i of layer l is in part p, and w[l, i, j] its transitions:

        minimise ``sum w[l, i, j] r[l, i, j]``  subject to ``r[l, i, j] >= x[l, i, p] - x[l + 1, j, p]`` for all p,
        ``sum_p x[l, i, p] = 1``, ``sum_i x[l, i, p] = members / parts``

    The published program has one r per token; tokens with the same pair have the same r, so the optimum is the same.
    Symmetry is broken in the first layer: expert i may only be in part 0 ... i.

    Args:
        transitions: float[layer - 1, member, member].
        start: int64[layer, member], a balanced split: the answer unless a better one is found.
        backend: ``cpsat``, or ``pulp`` (CBC). Programs of more than 2**20 (2**14) rows keep the start.
        limit_s: seconds.
        seed: of the search (``cpsat``).
        hint: whether the search is told of `start` (``cpsat``; CBC spends its time on checking one).
    """
    start = relabelled(start)
    weight, scale = _whole(transitions)
    known = crossing(transitions, start)
    until_s = time.perf_counter() + limit_s
    parts, bound = None, 0.0
    if np.count_nonzero(weight) * (int(start.max()) + 1) <= _MOST_ROWS[backend]:
        run = _cpsat if backend == "cpsat" else _pulp
        with contextlib.suppress(_OutOfTimeError):
            parts, bound = run(weight, start, until_s, seed, hint)
    found = known if parts is None else crossing(transitions, parts)
    if parts is None or found >= known:
        return Split(start, known, min(known, bound / scale), False)
    return Split(parts, found, min(found, bound / scale), True)


def _whole(transitions: np.ndarray) -> tuple[np.ndarray, float]:
    """Return int64 weights and their scale; weights that are not whole are rounded down (bounds stay valid)."""
    if np.all(transitions == np.floor(transitions)) and transitions.sum() < _TOTAL_MAX:
        return transitions.astype(np.int64), 1.0
    scale = _TOTAL_MAX / max(float(transitions.sum()), np.finfo(float).tiny)
    return np.floor(transitions * scale).astype(np.int64), scale


def _cpsat(weight: np.ndarray, start: np.ndarray, until_s: float, seed: int,
           hint: bool) -> tuple[np.ndarray | None, float]:
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    x = _cpsat_parts(model, start, hint)
    terms, values = [], []
    for pair, i, j in np.argwhere(weight > 0).tolist():
        if time.perf_counter() > until_s:
            raise _OutOfTimeError
        crosses = model.new_bool_var("")
        for part in range(x.shape[2]):
            model.add_bool_or(crosses, ~x[pair, i, part], x[pair + 1, j, part])
        terms.append(crosses)
        values.append(int(weight[pair, i, j]))
    model.minimize(cp_model.LinearExpr.weighted_sum(terms, values))
    return _cpsat_answer(model, x, until_s, seed)


def _cpsat_parts(model: cp_model.CpModel, start: np.ndarray, hint: bool) -> np.ndarray:
    """Return the variables x[layer, member, part], balanced and without symmetry."""
    num_parts = int(start.max()) + 1
    x = np.empty((*start.shape, num_parts), object)
    for index in np.ndindex(*start.shape):
        for part in range(num_parts):
            x[*index, part] = model.new_bool_var("")
            if hint:
                model.add_hint(x[*index, part], bool(start[index] == part))
        model.add_exactly_one(x[index])
        if index[0] == 0:
            for part in range(index[1] + 1, num_parts):
                model.add(x[*index, part] == 0)
    for layer in x:
        for part in range(num_parts):
            model.add(sum(layer[:, part]) == start.shape[1] // num_parts)
    return x


def _cpsat_answer(model: cp_model.CpModel, x: np.ndarray, until_s: float, seed: int) -> tuple[np.ndarray | None, float]:
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    solver.parameters.random_seed, solver.parameters.num_workers = seed % 2**31, 1
    solver.parameters.max_time_in_seconds = max(0.01, until_s - time.perf_counter())
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, 0.0
    chosen = np.array([solver.value(one) for one in x.ravel()]).reshape(x.shape)
    return np.argmax(chosen, axis=2), max(0.0, solver.best_objective_bound)


def _pulp(weight: np.ndarray, start: np.ndarray, until_s: float, seed: int,
          hint: bool) -> tuple[np.ndarray | None, float]:
    import pulp

    with warnings.catch_warnings():
        # PuLP 3 announces that PuLP 4 renames these calls and moves CBC out; 2 knows only these
        warnings.simplefilter("ignore", DeprecationWarning)
        model, x = _pulp_model(weight, start, until_s)
        left_s = max(0.01, until_s - time.perf_counter())
        model.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=left_s, threads=1))
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None, 0.0
    chosen = np.array([one.value() or 0.0 for one in x.ravel()]).reshape(x.shape)
    proved = model.sol_status == pulp.LpSolutionOptimal and model.status == pulp.LpStatusOptimal
    parts = np.argmax(chosen, axis=2)
    return parts, crossing(weight.astype(float), parts) if proved else 0.0


def _pulp_model(weight: np.ndarray, start: np.ndarray, until_s: float) -> tuple[pulp.LpProblem, np.ndarray]:
    import pulp

    model, num_parts = pulp.LpProblem("exflow", pulp.LpMinimize), int(start.max()) + 1
    x = np.empty((*start.shape, num_parts), object)
    for layer, i, part in np.ndindex(*x.shape):
        allowed = layer > 0 or part <= i
        x[layer, i, part] = pulp.LpVariable(f"x_{layer}_{i}_{part}", 0, int(allowed), "Integer")
    cost = []
    for pair, i, j in np.argwhere(weight > 0).tolist():
        if time.perf_counter() > until_s:
            raise _OutOfTimeError
        crosses = pulp.LpVariable(f"r_{pair}_{i}_{j}", 0, 1)
        cost.append((crosses, int(weight[pair, i, j])))
        for part in range(num_parts):
            model += crosses >= x[pair, i, part] - x[pair + 1, j, part]
    model += pulp.LpAffineExpression(cost)
    for layer, row in enumerate(x):
        for i in range(row.shape[0]):
            model += pulp.lpSum(x[layer, i]) == 1
        for part in range(num_parts):
            model += pulp.lpSum(row[:, part]) == start.shape[1] // num_parts
    return model, x
