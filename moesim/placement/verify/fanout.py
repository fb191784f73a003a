"""Re-check fan-out bounds: own counting, eigenvalues by scipy, rounded to the safe side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np

from moesim.errors import CheckError
from moesim.placement.certificate import Certificate
from moesim.placement.problem import PlacementProblem
from moesim.placement.verify.colocation import most_together


def _array(certificate: Certificate, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in certificate.arrays:
        raise CheckError(f"certificate: array {name!r} is missing")
    array = np.asarray(certificate.arrays[name], np.float64)
    if array.shape != shape or not np.all(np.isfinite(array)):
        raise CheckError(f"certificate: {name!r} must be {shape} and finite, got shape {array.shape}")
    return array


def check_coactivation(problem: PlacementProblem, certificate: Certificate) -> float:
    """Return a lower bound on mean distinct ranks that follows from ``slope`` (and ``pairs``, ``diagonal``).

    Per token with n experts in ranks of at most c: saved ranks <= slope x pairs on common ranks + the best split's
    rest, listed over all splits. Pairs over all tokens: the eigenvalue and counting bound at the given multipliers, or
    copies times c - 1 with replicas. See `bounds.fanout.prove_fanout` for the argument.
    """
    if problem.steps is None:
        raise CheckError("certificate: the problem has no steps")
    layers, size = problem.num_layers, problem.num_experts
    slope = _array(certificate, "slope", (layers,))
    if slope.min() < 0:
        raise CheckError("certificate: a slope is negative")
    single = problem.num_slots == size
    pairs = _array(certificate, "pairs", (layers, size, size)) if single else None
    diagonal = _array(certificate, "diagonal", (layers, size)) if single else None
    total = 0.0
    for layer in range(layers):
        tokens = [frozenset(row[row >= 0].tolist()) for row in problem.steps.expert_ids[:, layer]]
        weight = np.zeros((size, size))
        for token, times in Counter(tokens).items():
            for one, two in combinations(sorted(token), 2):
                weight[one, two] += times
                weight[two, one] += times
        if pairs is not None and diagonal is not None:
            shared = most_together(weight, pairs[layer], diagonal[layer], problem) / 2
        else:
            shared = _copies(weight, problem) / 2
        total += _layer(Counter(map(len, tokens)), shared, float(slope[layer]), problem.slots_per_rank)
    return total / (layers * len(problem.steps.expert_ids)) * (1 - 2.0**-40)


def _layer(sizes: Counter[int], shared: float, slope: float, per_rank: int) -> float:
    rest = {size: max(sum(m - 1 - slope * m * (m - 1) / 2 for m in split) for split in _splits(size, per_rank))
            for size in sizes}
    saved = slope * shared + sum(times * rest[size] for size, times in sizes.items())
    uses = sum(size * times for size, times in sizes.items())
    return max(uses - saved, float(sum(times * -(-size // per_rank) for size, times in sizes.items())))


def _splits(size: int, largest: int) -> list[tuple[int, ...]]:
    """Return every way to write `size` as a falling sum of parts up to `largest`."""
    if size == 0:
        return [()]
    return [(part, *rest) for part in range(min(size, largest), 0, -1) for rest in _splits(size - part, part)]


def _copies(weight: np.ndarray, problem: PlacementProblem) -> float:
    """Return the most pair weight that copies allow: slots one by one to the expert that gains most."""
    reach, falling = problem.slots_per_rank - 1, -np.sort(-weight, axis=1)
    copies = np.ones(len(weight), np.int64)
    total = float(falling[:, :reach].sum())
    for _ in range(problem.num_slots - problem.num_experts):
        gain = [float(row[n * reach:(n + 1) * reach].sum()) for row, n in zip(falling, copies, strict=True)]
        best = int(np.argmax(gain))
        total += gain[best]
        copies[best] += 1
    return total


CHECKS: dict[str, Callable[[PlacementProblem, Certificate], float]] = {"co-activation": check_coactivation}
