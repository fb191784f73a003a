"""Lower bounds on fan-out: what top-k forces, and how many experts of one token can share a rank at all."""

from __future__ import annotations

import time

import numpy as np

from moesim.errors import InputError
from moesim.placement.bounds.colocation import colocation_multipliers
from moesim.placement.certificate import Certificate
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress

METHOD = "co-activation"
_SLOPES = 12  # prices of a shared pair that are tried: 0, 1/12 ... 1
_ITERATIONS = 60


def prove_fanout(problem: PlacementProblem, *, seed: int, time_limit_s: float,
                 incumbent: PlacementPlan | None = None, progress: Progress | None = None) -> Certificate:
    """Return a proven lower bound on the mean number of distinct ranks per token and layer.

    A token with n experts on d ranks saves ``n - d``. Split into ranks of m_1, m_2 ... experts (each at most the c
    slots), it saves ``sum (m - 1)`` and has ``p = sum m (m - 1) / 2`` pairs on common ranks. So for any slope a

        n - d <= a p + b(n, a),   b(n, a) = max over splits of sum (m - 1) - a m (m - 1) / 2,

    and summed over tokens the pairs are at most what `colocation` proves for the co-activation counts of the layer
    (one slot per expert), or what the experts' copies allow: n_i copies meet n_i (c - 1) others (replicas). The
    certificate has ``slope`` float64[layer] and, without replicas, ``pairs`` float32[layer, E, E] and ``diagonal``
    float64[layer, E]. Anytime: without time the counting bounds alone.
    """
    until_s = time.perf_counter() + time_limit_s
    if problem.steps is None:
        raise InputError("the fan-out bound needs token sets step by step (a trace, not counts)")
    num_layers, single = problem.num_layers, problem.num_slots == problem.num_experts
    slope, bounds, pairs, diagonal = np.ones(num_layers), np.zeros(num_layers), [], []
    for layer in range(num_layers):
        sizes, weight = coactivation(problem, layer)
        if single:
            budget_s = time.perf_counter() + (until_s - time.perf_counter()) / (num_layers - layer)
            found = colocation_multipliers(weight, problem.slots_per_rank, budget_s, _ITERATIONS)
            pairs.append(found[0])
            diagonal.append(found[1])
            shared = found[2] / 2
        else:
            shared = replica_pairs(weight, problem.num_slots, problem.slots_per_rank) / 2
        slope[layer], bounds[layer] = best_slope(sizes, shared, problem.slots_per_rank)
    tokens = len(problem.steps.expert_ids) * num_layers
    bound = float(bounds.sum()) / tokens * (1 - 2.0**-40)
    if progress is not None:
        progress.proved(bound)
    arrays = {"slope": slope}
    if single:
        arrays |= {"pairs": np.stack(pairs), "diagonal": np.stack(diagonal)}
    return Certificate("fanout", METHOD, bound, {"layers": num_layers}, arrays)


def coactivation(problem: PlacementProblem, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int64[n], tokens with n distinct experts, and float64[E, E], tokens that use both (diagonal 0)."""
    assert problem.steps is not None
    ids = problem.steps.expert_ids[:, layer]
    used = np.zeros((len(ids), problem.num_experts + 1), np.float32)
    np.put_along_axis(used, ids.astype(np.int64), 1.0, axis=1)  # pads fall on the last column
    used = used[:, : problem.num_experts]
    weight = (used.T @ used).astype(np.float64)
    np.fill_diagonal(weight, 0.0)
    return np.bincount(used.sum(axis=1).astype(np.int64), minlength=ids.shape[1] + 1), weight


def replica_pairs(weight: np.ndarray, num_slots: int, per_rank: int) -> float:
    """Return an upper bound on ``sum_(i != j) weight z``, z = 1 where some rank holds both, over all replications.

    An expert with n copies meets at most n (c - 1) others, at best its heaviest; what a further copy adds never
    rises, so giving slots greedily is the best division of them.
    """
    falling = -np.sort(-weight, axis=1)
    width = max(1, per_rank - 1)
    most = -(-len(weight) // width)
    padded = np.zeros((len(weight), most * width))
    padded[:, : len(weight)] = falling
    gains = padded.reshape(len(weight), most, width).sum(axis=2) if per_rank > 1 else np.zeros((len(weight), most))
    extra = np.sort(gains[:, 1:].ravel())[::-1][: num_slots - len(weight)]
    return float(gains[:, 0].sum() + extra.sum())


def best_slope(sizes: np.ndarray, shared: float, per_rank: int) -> tuple[float, float]:
    """Return the slope with the largest bound, and that bound on the layer's sum of distinct ranks."""
    uses = float(sizes @ np.arange(len(sizes)))
    found = []
    for step in range(_SLOPES + 1):
        slope = step / _SLOPES
        saved = slope * shared + float(sizes @ split_gain(len(sizes) - 1, slope, per_rank))
        found.append((uses - saved, slope))
    bound, slope = max(found)
    forced = float(sizes @ -(-np.arange(len(sizes)) // per_rank))
    return slope, max(bound, forced)


def split_gain(top: int, slope: float, per_rank: int) -> np.ndarray:
    """Return float64[n] for n = 0 ... `top`: the most that a token of n experts saves beyond `slope` per pair."""
    gain = np.zeros(top + 1)
    for size in range(1, top + 1):
        gain[size] = max(gain[size - part] + (part - 1) - slope * part * (part - 1) / 2
                         for part in range(1, min(size, per_rank) + 1))
    return gain
