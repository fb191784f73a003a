"""Re-check the proofs of the exact solver: potentials of a shortest path, and duals of assignments."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np

from moesim.errors import CheckError
from moesim.placement.certificate import Certificate
from moesim.placement.problem import PlacementProblem

_SAFE = 2.0**-40  # relative rounding of sums of up to 2**10 numbers in float64, with room to spare
_BLOCK_VALUES = 2**22


def check_potentials(problem: PlacementProblem, certificate: Certificate) -> float:
    """Return the bound that potentials prove; arrays ``states`` int[S, expert], ``potential`` float64[layer, S].

    ``states`` must hold one placement of every orbit: rows are brought into a normal form, must differ, and be as
    many as there are orbits, ``E! / (c!^R m!^N N!)`` (relabelling ranks never keeps a placement). For potentials V and
    the least cost d of joining two orbits, every plan costs at least ``min V[-1]`` less the amounts by which
    ``V[0] <= own``, ``V[l + 1][q] <= V[l][p] + d(p, q) + own[q]`` are broken; here those are taken off.

    Raises:
        CheckError: arrays missing, of a wrong shape, not finite, or states that leave placements out.
    """
    width, near, far, worst, weight = _rates(problem, certificate)
    states, potential = _array(certificate, "states"), _array(certificate, "potential")
    layers, experts, ranks = problem.num_layers, problem.num_experts, problem.num_ranks
    _check_states(states, experts, ranks, width)
    if potential.shape != (layers, len(states)):
        raise CheckError(f"certificate: potential must be {(layers, len(states))}, got {potential.shape}")
    held = np.eye(ranks)[states.astype(np.int64)]
    own = weight * np.einsum("le,ser->lsr", problem.expert_load, held).max(axis=2)
    excess = max(0.0, float(np.max(potential[0] - own[0])))
    for pair in range(layers - 1):
        reach = np.full(len(states), math.inf)
        for start in range(0, len(states), size := max(1, _BLOCK_VALUES // (len(states) * ranks * ranks))):
            here = slice(start, start + size)
            cost = _least_joins(problem, pair, held[here], held, (width, near, far, worst))
            reach = np.minimum(reach, np.min(potential[pair, here][:, None] + cost, axis=0))
        excess += max(0.0, float(np.max(potential[pair + 1] - reach - own[pair + 1])))
    return _as_objective(problem, certificate, float(potential[-1].min()) - excess)


def check_duals(problem: PlacementProblem, certificate: Certificate) -> float:
    """Return the bound that assignment duals prove, where every rank holds one expert and there is one node.

    Totals: ``row_dual``, ``column_dual`` float64[pair, expert]; a pair costs at least their sum once the rows are
    lowered to ``u + v <= cost``. Maxima: ``threshold`` float64[pair] and ``rows`` [pair, expert] (0 or 1); where the
    entries below the threshold leave the marked rows fewer columns than rows, every assignment has an entry at or
    above it; where they do not, the pair counts with its smallest entry.

    Raises:
        CheckError: arrays missing, of a wrong shape, or not finite; more than one expert per rank, or several nodes.
    """
    width, near, _, worst, weight = _rates(problem, certificate)
    if not problem.num_experts == problem.num_slots == problem.num_ranks == width:
        raise CheckError("certificate: assignment duals need one expert per rank, and one node")
    shape = (problem.num_layers - 1, problem.num_experts)
    total = float(weight * problem.expert_load.max(axis=1).sum())
    first, second = ("threshold", "rows") if worst else ("row_dual", "column_dual")
    one, other = _array(certificate, first), _array(certificate, second)
    if other.shape != shape or one.shape != (shape[:1] if worst and shape[0] else shape):
        raise CheckError(f"certificate: {second} must be {shape}, got {other.shape}; {first} is {one.shape}")
    for pair in range(shape[0]):
        assert problem.transitions is not None
        counts = np.asarray(problem.transitions[pair], np.float64)
        out, into = counts.sum(axis=1)[:, None] - counts, counts.sum(axis=0)[None, :] - counts
        if worst:
            total += _hall_value(near * np.maximum(out, into), float(one[pair]), other[pair] != 0)
        else:
            total += float((near * out - other[pair]).min(axis=1).sum() + other[pair].sum())
    return _as_objective(problem, certificate, total)


def _hall_value(cost: np.ndarray, threshold: float, rows: np.ndarray) -> float:
    lower = threshold * (1 - _SAFE)
    columns = (cost[rows] < lower).any(axis=0).sum() if rows.any() else 0
    return lower if columns < rows.sum() else float(cost.min())


def _rates(problem: PlacementProblem, certificate: Certificate) -> tuple[int, float, float, bool, float]:
    """Return ranks per node, cost per token within and beyond it, whether ports count by their largest, row cost."""
    name = certificate.objective
    if problem.num_slots != problem.num_experts:
        raise CheckError("certificate: it holds for one slot per expert only")
    if name != "balance" and problem.transitions is None:
        raise CheckError(f"certificate: {name} needs transitions")
    if name == "bottleneck" and problem.rates is not None:
        rates = problem.rates
        return (problem.ranks_per_node, rates.pair_weight * rates.node_s, rates.pair_weight * rates.cluster_s, True,
                rates.row_s)
    known = {"balance": (problem.num_ranks, 0.0, 0.0, False, 1.0), "affinity": (problem.num_ranks, 1.0, 1.0, False, 0.0),
             "hops": (problem.ranks_per_node, 1.0, 2.0, False, 0.0)}
    if name not in known:
        raise CheckError(f"certificate: objective {name!r} cannot be checked (rates missing, or unknown here)")
    return known[name]


def _as_objective(problem: PlacementProblem, certificate: Certificate, cost: float) -> float:
    cost -= _SAFE * abs(cost)
    if certificate.objective in ("affinity", "hops"):
        assert problem.transitions is not None
        total = float(np.sum(problem.transitions, dtype=np.float64))
        if total <= 0:
            raise CheckError("certificate: no transition was counted")
        return 1.0 - cost / total if certificate.objective == "affinity" else cost / total
    return cost


def _array(certificate: Certificate, name: str) -> np.ndarray:
    if name not in certificate.arrays:
        raise CheckError(f"certificate: array {name!r} is missing")
    values = np.asarray(certificate.arrays[name], np.float64)
    if not np.all(np.isfinite(values)):
        raise CheckError(f"certificate: array {name!r} is not finite")
    return values


def _check_states(states: np.ndarray, experts: int, ranks: int, width: int) -> None:
    nodes = ranks // width
    expected = math.factorial(experts) // (math.factorial(experts // ranks) ** ranks
                                           * math.factorial(width) ** nodes * math.factorial(nodes))
    if states.shape != (expected, experts):
        raise CheckError(f"certificate: states must be {(expected, experts)}, got {states.shape}")
    whole = states.astype(np.int64)
    if np.any(whole != states) or whole.min() < 0 or whole.max() >= ranks:
        raise CheckError(f"certificate: states must be ranks 0 ... {ranks - 1}")
    forms = set()
    for home in whole:
        if np.any(np.bincount(home, minlength=ranks) != experts // ranks):
            raise CheckError("certificate: a state does not fill every rank alike")
        forms.add(tuple(sorted(tuple(sorted(tuple(np.flatnonzero(home == rank).tolist())
                                            for rank in range(node * width, (node + 1) * width)))
                               for node in range(nodes))))
    if len(forms) != expected:
        raise CheckError("certificate: states repeat a placement, so another is left out")


def _least_joins(problem: PlacementProblem, pair: int, here: np.ndarray, there: np.ndarray,
                 rates: tuple[int, float, float, bool]) -> np.ndarray:
    """Return float64[p, q], the least cost of joining states float64[p, expert, rank] and [q, expert, rank]."""
    width, near, far, worst = rates
    if not (near or far):
        return np.zeros((len(here), len(there)))
    assert problem.transitions is not None
    flow = np.einsum("pja,qjb->pqab", np.einsum("ij,pia->pja", problem.transitions[pair].astype(np.float64), here),
                     there, optimize=True)
    least = np.full(flow.shape[:2], math.inf)
    nodes = flow.shape[2] // width
    for order in permutations(range(nodes)):
        total = np.zeros_like(least)
        for node, other in enumerate(order):
            rows, columns = slice(node * width, (node + 1) * width), slice(other * width, (other + 1) * width)
            part = flow[:, :, rows, columns]
            out = far * flow[:, :, rows].sum(axis=3) - (far - near) * part.sum(axis=3)
            into = far * flow[:, :, :, columns].sum(axis=2) - (far - near) * part.sum(axis=2)
            both = np.maximum(out[..., None], into[..., None, :]) if worst else out[..., None]
            value = _least_assignment(both - near * part, worst)
            total = np.maximum(total, value) if worst else total + value
        least = np.minimum(least, total)
    return least


def _least_assignment(cost: np.ndarray, worst: bool) -> np.ndarray:
    """Return the least total (least maximum) of assignments in float64[..., m, m], rows one by one."""
    width = cost.shape[-1]
    done = {0: np.zeros(cost.shape[:-2])}
    for row in range(width):
        following: dict[int, np.ndarray] = {}
        for used, value in done.items():
            for column in range(width):
                if not used >> column & 1:
                    entry = cost[..., row, column]
                    new = np.maximum(value, entry) if worst else value + entry
                    after = used | 1 << column
                    following[after] = new if after not in following else np.minimum(following[after], new)
        done = following
    return done[2**width - 1]


CHECKS = {"dp-potentials": check_potentials, "assignment-duals": check_duals}
