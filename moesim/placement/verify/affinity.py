"""Re-check bounds on affinity and hops from their certificates alone.

Levels: ``rank`` (c = slots of a rank) and ``node`` (c = slots of a node's ranks). A level's arrays prove that no plan
keeps more than some number of transitions on one rank (node); the bound is their sum, weighted by the parameter
``node_weight``, over all transitions. Every inequality used is stated where it is used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moesim.errors import CheckError
from moesim.placement.certificate import Certificate
from moesim.placement.problem import PlacementProblem

_EPS = float(np.finfo(np.float64).eps)
_MEMBERS = 4


def check_affinity(problem: PlacementProblem, certificate: Certificate) -> float:
    """Return the bound that the certificate's arrays prove, in the objective's unit, rounded to the safe side.

    Raises:
        CheckError: arrays that are missing, of another shape or type, or not finite; another objective.
    """
    if certificate.objective not in ("affinity", "hops"):
        raise CheckError(f"certificate: {certificate.method!r} proves affinity or hops, not {certificate.objective!r}")
    weight = 0.5 if certificate.objective == "hops" else _number(certificate, "node_weight")
    if not 0.0 <= weight <= 1.0:
        raise CheckError(f"certificate: node_weight must be in 0 ... 1, got {weight}")
    counts = _counts(problem)
    levels = certificate.parameters.get("levels")
    if not isinstance(levels, dict):
        raise CheckError("certificate: parameters lack 'levels'")
    kept = 0.0
    for level, part in (("rank", 1.0 - weight), ("node", weight)):
        if part:
            method = levels.get(level)
            if method not in _LEVELS:
                raise CheckError(f"certificate: level {level!r} has no known method ({method!r})")
            kept += part * min(1.0, _LEVELS[method](problem, counts, _Arrays(certificate, level)) / float(counts.sum()))
    kept = min(1.0, kept * (1 + 8 * _EPS))
    return kept if certificate.objective == "affinity" else 2.0 - 2.0 * kept


def _number(certificate: Certificate, name: str) -> float:
    value = certificate.parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckError(f"certificate: parameters lack the number {name!r}")
    return float(value)


def _counts(problem: PlacementProblem) -> np.ndarray:
    if problem.transitions is None or not np.sum(problem.transitions) > 0:
        raise CheckError("certificate: the problem has no transitions")
    return np.asarray(problem.transitions, np.float64)


class _Arrays:
    """The arrays of one level, each checked when it is read."""

    def __init__(self, certificate: Certificate, level: str) -> None:
        self.arrays, self.level = certificate.arrays, level

    def read(self, name: str, shape: tuple[int | None, ...], kind: str = "f") -> np.ndarray:
        """Return an array as float64 (kind f) or int64 (kind i); raises CheckError unless it is what was expected."""
        label = f"{self.level}.{name}"
        if label not in self.arrays:
            raise CheckError(f"certificate: array {label!r} is missing")
        array = np.asarray(self.arrays[label])
        fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
        if not fits:
            raise CheckError(f"certificate: array {label!r} has shape {array.shape}, expected {shape}")
        if array.dtype.kind not in ("i" if kind == "i" else "if"):
            raise CheckError(f"certificate: array {label!r} has type {array.dtype}")
        if not np.all(np.isfinite(array)):
            raise CheckError(f"certificate: array {label!r} is not finite")
        return array.astype(np.int64 if kind == "i" else np.float64)


def _places(problem: PlacementProblem, level: str) -> int:
    """Return c, the slots of a rank (a node)."""
    return problem.slots_per_rank * (1 if level == "rank" else problem.ranks_per_node)


def _matching(problem: PlacementProblem, counts: np.ndarray, arrays: _Arrays) -> float:
    """Weak duality of b-matchings: with rows and columns of X that sum to c, entries in 0 ... 1,

    ``<counts, X> <= c (sum u + sum v) + sum max(0, counts - u_i - v_j)``; where they sum to at most c (redundant
    slots: rows sum to at most c because an expert's shares sum to 1 and a place holds c slots), for u, v >= 0.
    """
    pairs, size = counts.shape[:2]
    capacity = min(size, _places(problem, arrays.level))
    u, v = arrays.read("rows", (pairs, size)), arrays.read("columns", (pairs, size))
    if problem.num_slots != problem.num_experts and min(u.min(), v.min()) < 0:
        raise CheckError("certificate: potentials must not be negative where slots are redundant")
    return sum(_across(counts[pair], u[pair], v[pair], capacity) for pair in range(pairs))


def _across(wanted: np.ndarray, u: np.ndarray, v: np.ndarray, capacity: int) -> float:
    over = np.maximum(wanted - u[:, None] - v[None, :], 0.0)
    size = float(np.abs(wanted).sum() + len(u) * (np.abs(u).sum() + np.abs(v).sum()))
    return capacity * float(u.sum() + v.sum()) + float(over.sum()) + 2 * len(u) * _EPS * size


def _chain(problem: PlacementProblem, counts: np.ndarray, arrays: _Arrays) -> float:
    """The chain SDP's Lagrangian bound, for plans with one slot per expert.

    Let Z_l = [[U_l, Y_l], [Y_l', U_(l+1)]] be the 0/1 "same place" matrix of layers l and l + 1. For any symmetric
    G_l (from ``first``, ``cross``, ``second``, ``scale``) and any t >= 0 (``cut_weight``) on valid inequalities
    ``<K, Z> <= 1`` (``cuts``), with H_l = sum t K:

        sum <T_l, Y_l> <= sum t + sum_l <G_l, Z_l> + sum_l (<T_l, Y_l> - <G_l + H_l, Z_l>)

    and each part is bounded on its own: `_spectral`, `_across` for the Y, `_within` for the U.
    """
    if problem.num_slots != problem.num_experts:
        raise CheckError("certificate: the chain SDP holds for one slot per expert only")
    pairs, size = counts.shape[:2]
    capacity = _places(problem, arrays.level)
    joints = _multipliers(arrays, pairs, size)
    total = sum(_spectral(joint, capacity) for joint in joints)
    total += _subtract_cuts(arrays, joints)
    u, v = arrays.read("rows", (pairs, size)), arrays.read("columns", (pairs, size))
    w = arrays.read("within", (pairs + 1, size))
    for pair in range(pairs):
        total += _across(counts[pair] - 2 * joints[pair, :size, size:], u[pair], v[pair], capacity)
    for layer in range(pairs + 1):
        left = np.zeros((size, size))
        if layer < pairs:
            left -= joints[layer, :size, :size]
        if layer > 0:
            left -= joints[layer - 1, size:, size:]
        total += _within(left, w[layer], capacity)
    return total


def _multipliers(arrays: _Arrays, pairs: int, size: int) -> np.ndarray:
    """Return float64[pair, 2 E, 2 E], G_l."""
    half = size * (size + 1) // 2
    scale = arrays.read("scale", (pairs,))
    joints = np.empty((pairs, 2 * size, 2 * size))
    i, j = np.triu_indices(size)
    for name, start in (("first", 0), ("second", size)):
        values = arrays.read(name, (pairs, half), "i") * scale[:, None]
        joints[:, start + i, start + j] = values
        joints[:, start + j, start + i] = values
    cross = arrays.read("cross", (pairs, size, size), "i") * scale[:, None, None]
    joints[:, :size, size:] = cross
    joints[:, size:, :size] = cross.transpose(0, 2, 1)
    return joints


def _spectral(joint: np.ndarray, capacity: int) -> float:
    """Bound <G, Z> for the Z of plans.

    Z is 2 c times a projector of rank R = E / c, and Z (a, b) = c (a + b) (1, 1) for block-constant vectors (a, b):
    each block has row sums c. So with G' = G less the row and column means of its blocks, <G, Z> = <G', Z'> +
    (c / E) sum G, where Z' is 2 c times a projector of rank R - 1 that is orthogonal to block-constant vectors. With
    J the block-constant projector and any k, <G', Z'> = <G' - k J, Z'>: at most 2 c times the sum of the R - 1 largest
    eigenvalues of G' - k J (Ky Fan 1949). Computed eigenvalues are those of a matrix within n eps times its norm,
    and a sum of R - 1 largest ones changes by at most R - 1 times that.
    """
    size = len(joint) // 2
    places = size // capacity
    centred = joint.copy()
    for a in (0, size):
        for b in (0, size):
            block = centred[a:a + size, b:b + size]
            block -= block.mean(axis=1)[:, None]
            block -= block.mean(axis=0)[None, :]
    norm = float(np.linalg.norm(joint))  # Frobenius: covers the rounding of the centring too
    sink = np.kron(np.eye(2), np.full((size, size), 2.0 * norm / size))
    values = np.linalg.eigvalsh(0.5 * (centred + centred.T) - sink)
    largest = float(values[::-1][:places - 1].sum())
    slack = 2 * capacity * (places - 1) * 8 * size * _EPS * norm
    return 2 * capacity * largest + slack + capacity / size * float(joint.sum()) + size * _EPS * float(np.abs(joint).sum())


def _subtract_cuts(arrays: _Arrays, joints: np.ndarray) -> float:
    """Add every cut's weighted left side to the multipliers that are taken off the entries; return the sum of weights.

    A cut (i, t1, t2[, t3]) says ``sum_a Z[i, t_a] - sum_(a < b) Z[t_a, t_b] <= 1``: if m of the others share i's place,
    the left side is at most m - m (m - 1) / 2 <= 1.
    """
    pairs, width = len(joints), joints.shape[1]
    cuts = arrays.read("cuts", (None, _MEMBERS), "i")
    weight = arrays.read("cut_weight", (len(cuts),))
    pair = arrays.read("cut_pair", (len(cuts),), "i")
    if len(cuts) == 0:
        return 0.0
    if weight.min() < 0 or pair.min() < 0 or pair.max() >= pairs or cuts[:, :3].min() < 0 or cuts.max() >= width:
        raise CheckError("certificate: a cut has a negative weight, or names a pair or an expert that does not exist")
    ordered = np.sort(cuts, axis=1)
    if np.any((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)):
        raise CheckError("certificate: a cut names an expert twice")
    for a in range(_MEMBERS):
        for b in range(a + 1, _MEMBERS):
            there = (cuts[:, a] >= 0) & (cuts[:, b] >= 0)
            half = (0.5 if a == 0 else -0.5) * weight[there]
            np.add.at(joints, (pair[there], cuts[there, a], cuts[there, b]), half)
            np.add.at(joints, (pair[there], cuts[there, b], cuts[there, a]), half)
    return float(weight.sum())


def _within(left: np.ndarray, w: np.ndarray, capacity: int) -> float:
    """Bound <left, U>: U is symmetric, its diagonal 1, its other entries in 0 ... 1 and c - 1 in a row.

    So ``<left, U> <= trace + 2 (c - 1) sum w + sum_(i != j) max(0, left_ij - w_i - w_j)`` for any w.
    """
    over = np.maximum(left - w[:, None] - w[None, :], 0.0)
    np.fill_diagonal(over, 0.0)
    size = float(np.abs(left).sum() + 2 * len(w) * np.abs(w).sum())
    return float(np.trace(left)) + 2 * (capacity - 1) * float(w.sum()) + float(over.sum()) + 2 * len(w) * _EPS * size


_LEVELS: dict[str, Callable[[PlacementProblem, np.ndarray, _Arrays], float]] = {
    "b-matching": _matching, "chain SDP": _chain}
CHECKS: dict[str, Callable[[PlacementProblem, Certificate], float]] = {
    "b-matching": check_affinity, "chain SDP": check_affinity}
