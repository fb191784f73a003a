"""Re-check lower bounds on the bottleneck objective: loads, hot experts, b-matching duals, the chain of nodes."""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.linalg import LinAlgError, cholesky, solve_triangular

from moesim.errors import CheckError
from moesim.placement.certificate import Certificate
from moesim.placement.problem import PlacementProblem
from moesim.placement.verify.affinity import CHECKS as AFFINITY_CHECKS

_SAFE = 2.0**-38  # relative: sums of up to 2**12 products in float64, with room to spare
_PIVOT = 2.0**-34  # of the largest multiplier: what every pivot must exceed
_LARGEST_SHIFT = 2.0**20  # of the mean multiplier: beyond it a certificate proves nothing
_DUALS = ("node_row", "node_column", "rank_row", "rank_column")


def check_ports(problem: PlacementProblem, certificate: Certificate) -> float:
    """Return the bound in seconds; arrays (all optional, the duals together, the chain only with them):

    - ``node_row``, ``node_column``, ``rank_row``, ``rank_column`` float64[pair, expert] >= 0: u, v of what stays on a
      node (a rank): at most ``capacity (sum u + sum v) + sum max(0, T - u - v)``;
    - ``chosen`` bool[pair], ``diagonal`` float64[layer, expert]: over the chosen pairs, with T zero elsewhere, at most
      ``sum T / N + (1 - 1 / N) sum d`` stays on a node if ``P (Diag(d) - M) P >= 0``, M holding half of T beside the
      diagonal blocks and P the projection on blocks that sum to zero. Where d is too small, it is raised by a common
      shift until it is not;
    - ``kept.*``, with the parameters ``kept_method`` and ``kept``: a certificate of the affinity objective
      (`verify.affinity`) for the same pairs and the node weight ``(far - near) / far``.

    Raises:
        CheckError: no rates or transitions, arrays missing, of a wrong shape, or not finite.
    """
    if problem.rates is None or problem.transitions is None:
        raise CheckError("certificate: the bottleneck bound needs transitions and rates")
    counts = np.asarray(problem.transitions, np.float64)
    near = problem.rates.pair_weight * problem.rates.node_s
    far = problem.rates.pair_weight * problem.rates.cluster_s
    bound = problem.rates.row_s * sum(_busiest(load, problem) for load in problem.expert_load)
    if not len(counts):
        return bound * (1 - _SAFE)
    hot = np.array([max(_busiest(_dearest(side, problem, near, far), problem) for side in (pair, pair.T))
                    for pair in counts])
    names = [name for name in (*_DUALS, "chosen", "diagonal") if name in certificate.arrays]
    if not names:
        return float(bound + hot.sum()) * (1 - _SAFE)
    total = counts.sum(axis=(1, 2))
    rank = np.minimum(total, _kept(problem, certificate, counts, "rank", problem.slots_per_rank))
    node = np.minimum(total, _kept(problem, certificate, counts, "node", problem.slots_per_rank * problem.ranks_per_node))
    # where the near link is the dearer one, a token that stays on its node but not on its rank saves nothing
    saved = far * rank if far < near else (far - near) * node + near * rank
    ports = np.maximum(hot, (far * total - saved) / problem.num_ranks)
    if "chosen" not in certificate.arrays and "diagonal" not in certificate.arrays:
        return float(bound + ports.sum()) * (1 - _SAFE)
    chosen = _array(certificate, "chosen", (len(counts),)) != 0
    masked = counts * chosen[:, None, None]
    together = float(ports[chosen].sum())
    if "diagonal" in certificate.arrays and far >= near:
        kept = (far - near) * _chain(problem, certificate, masked)
        together = max(together, (float((far * total - near * rank)[chosen].sum()) - kept) / problem.num_ranks)
    if "kept_method" in certificate.parameters and 0 < far >= near and chosen.any():
        kept = _weighted_kept(problem, certificate, masked, (far - near) / far)
        together = max(together, far * float(total[chosen].sum()) * (1 - kept) / problem.num_ranks)
    return float(bound + ports[~chosen].sum() + together) * (1 - _SAFE)


def _weighted_kept(problem: PlacementProblem, certificate: Certificate, counts: np.ndarray, weight: float) -> float:
    """Return the most that any plan keeps, ``weight`` on nodes and the rest on ranks, by the embedded certificate."""
    parameters = certificate.parameters.get("kept")
    if not isinstance(parameters, dict) or abs(float(parameters.get("node_weight", -1.0)) - weight) > _SAFE:
        raise CheckError(f"certificate: parameter 'kept' must hold the node weight {weight:.6g}")
    arrays = {name.removeprefix("kept."): values for name, values in certificate.arrays.items()
              if name.startswith("kept.")}
    method = str(certificate.parameters["kept_method"])
    inner = Certificate("affinity", method, 0.0, {**parameters, "node_weight": weight}, arrays)
    if method not in AFFINITY_CHECKS:
        raise CheckError(f"certificate: no proof method {method!r} of kept transitions")
    return min(1.0, AFFINITY_CHECKS[method](dataclasses.replace(problem, transitions=counts, current=None), inner))


def _array(certificate: Certificate, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in certificate.arrays:
        raise CheckError(f"certificate: array {name!r} is missing")
    values = np.asarray(certificate.arrays[name], np.float64)
    if values.shape != shape:
        raise CheckError(f"certificate: {name} must be {shape}, got {values.shape}")
    if not np.all(np.isfinite(values)):
        raise CheckError(f"certificate: array {name!r} is not finite")
    return values


def _busiest(weight: np.ndarray, problem: PlacementProblem) -> float:
    """Return what the busiest rank carries at least of float64[expert] weights: the mean, or by counting.

    One slot per expert: some rank holds j + 1 of the j R + 1 heaviest, and S experts in all; whole weights have a whole
    sum on the busiest rank. Redundant slots: copies
    that keep every part below t need ``ceil(weight / t)`` slots each; the least t that fits, from its candidates.
    """
    ranks, slots = problem.num_ranks, problem.slots_per_rank
    best = float(weight.sum()) / ranks
    falling = np.sort(weight)[::-1]
    if problem.num_slots == problem.num_experts:
        light = falling[::-1]
        if np.all(weight == np.rint(weight)) and weight.sum() < 2.0**53:
            best = float(np.ceil(weight.sum() / ranks))
        for j in range(slots):
            heavy = falling[j * ranks - j:j * ranks + 1]
            best = max(best, float(heavy.sum() + light[:slots - j - 1].sum()))
        return best
    spare = problem.num_slots - problem.num_experts
    parts = np.unique(weight[:, None] / np.arange(1, spare + 2)[None, :])
    low, high = 0, len(parts) - 1
    while low < high:
        middle = (low + high) // 2
        part = parts[middle] * (1 + _SAFE)
        fits = part > 0 and np.maximum(1, np.ceil(weight / part)).sum() <= problem.num_slots
        low, high = (low, middle) if fits else (middle + 1, high)
    return max(best, float(parts[low]) * (1 - _SAFE))


def _dearest(counts: np.ndarray, problem: PlacementProblem, near: float, far: float) -> np.ndarray:
    """Return float64[expert], the seconds that each row costs a port at least: its largest entries stay close."""
    rising = np.sort(counts, axis=1)
    size = counts.shape[1]
    rank = rising[:, max(0, size - problem.slots_per_rank):].sum(axis=1)
    node = rising[:, max(0, size - problem.slots_per_rank * problem.ranks_per_node):].sum(axis=1)
    total = rising.sum(axis=1)
    return far * (total - rank) if far < near else near * (node - rank) + far * (total - node)


def _kept(problem: PlacementProblem, certificate: Certificate, counts: np.ndarray, scope: str, size: int) -> np.ndarray:
    """Return float64[pair], the most tokens that stay on a node (rank), by the duals of a b-matching."""
    shape = counts.shape[:2]
    row = np.maximum(0.0, _array(certificate, f"{scope}_row", shape))
    column = np.maximum(0.0, _array(certificate, f"{scope}_column", shape))
    capacity = min(size, problem.num_experts)
    return np.array([capacity * float(u.sum() + v.sum()) + float(np.clip(pair - np.add.outer(u, v), 0.0, None).sum())
                     for pair, u, v in zip(counts, row, column, strict=True)])


def _chain(problem: PlacementProblem, certificate: Certificate, counts: np.ndarray) -> float:
    """Return the most tokens that stay on their node over all pairs, by the multipliers of the chain."""
    diagonal = _array(certificate, "diagonal", (problem.num_layers, problem.num_experts))
    if problem.num_slots != problem.num_experts:
        raise CheckError("certificate: the chain of nodes needs one slot per expert")
    passed, nodes = float(counts.sum()), problem.num_nodes
    if problem.num_experts == 1 or nodes == 1:
        return passed
    blocks = [_inner(pair / 2) for pair in counts]
    shift, mean = 0.0, float(np.abs(diagonal).mean()) + float(np.finfo(float).tiny)
    while not _positive(blocks, diagonal + shift):
        shift = max(2 * shift, mean * 2.0**-24)
        if shift > mean * _LARGEST_SHIFT:
            raise CheckError("certificate: no shift makes the chain's multipliers feasible")
    kept = passed / nodes + (1 - 1 / nodes) * float((diagonal + shift).sum())
    return min(passed, kept + _SAFE * float(np.abs(diagonal).sum()))


def _inner(matrix: np.ndarray) -> np.ndarray:
    """Return ``B' matrix B`` for an orthonormal basis B of the vectors that sum to zero: a Householder reflection.

    The reflection that takes the all-ones direction to the first axis; its other columns are the basis.
    """
    size = len(matrix)
    axis = np.full(size, 1 / np.sqrt(size))
    axis[0] += 1.0
    axis /= np.linalg.norm(axis)
    right = matrix - 2 * np.outer(matrix @ axis, axis)
    return (right - 2 * np.outer(axis, axis @ right))[1:, 1:]


def _positive(blocks: list[np.ndarray], diagonal: np.ndarray) -> bool:
    """Return whether the block tridiagonal matrix is positive definite beyond what rounding could feign."""
    margin = _PIVOT * float(np.abs(diagonal).max())
    factor: np.ndarray | None = None
    for layer, own in enumerate(diagonal):
        pivot = _inner(np.diag(own - margin))
        if factor is not None:
            lower = solve_triangular(factor, blocks[layer - 1], lower=True)
            pivot = pivot - lower.T @ lower
        try:
            factor = cholesky((pivot + pivot.T) / 2, lower=True)
        except LinAlgError:
            return False
    return True


CHECKS = {"ports": check_ports}
