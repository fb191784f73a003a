"""Bounds on the bottleneck objective: the busiest rank by counting, the busiest port by its mean and by hot experts.

The busiest port of a pair of layers is at least

- what the rank that holds a hot expert must send (receive): an expert keeps at most its `c m` largest entries on its
  node and `c` on its rank (c slots per rank, m ranks per node), so that its row costs at least a known number of port
  seconds wherever it lives; these numbers are loads, and `balance_bound` says what the busiest rank has of them;
- the mean over the ports, ``(cluster_s T - (cluster_s - node_s) K - node_s k) / R`` where T tokens pass, and at most K
  stay on their node and k on their rank. They are bounded pair by pair (b-matching duals), or over the whole chain of
  layers: K alone (`bounds.node_chain`), or the weighted sum of both (`bounds.chain_sdp`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from moesim.placement.bounds.balance import balance_bound
from moesim.placement.certificate import Certificate
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress

METHOD = "ports"
_SAFE = 2.0**-36  # relative, far above the rounding of these sums
_ROUNDS = 60  # of the duals' alternation
_STALLS = 2.0**-20
_HOPE = 1.1  # how far a chain may lift a mean port above its b-matching value
_NODE_CHAIN_EXPERTS = 128  # beyond, the chain SDP is the better use of the time
_CHAIN_UNTIL = 0.9  # of the time: the last proof of the chain SDP may overrun


def quick_bottleneck(problem: PlacementProblem) -> Certificate:
    """Return the bound that needs no multipliers: counting of loads, and hot experts' ports."""
    OBJECTIVES["bottleneck"].check(problem)
    return _certificate(problem, _hot_ports(problem), {})


def prove_bottleneck(problem: PlacementProblem, *, seed: int, time_limit_s: float,
                     incumbent: PlacementPlan | None = None, progress: Progress | None = None) -> Certificate:
    """Return a proven lower bound on the bottleneck objective, with its multipliers (checker: method ``ports``).

    Stages, each reported: loads and hot experts; b-matching duals of every pair; then, with one slot per expert and
    the far link the dearer one, what stays close along the whole chain of layers, over the pairs whose mean port may
    exceed the hot one: `node_chain` (few experts only), and `chain_sdp`, whose weighted kept fraction with the weight
    ``(cluster_s - node_s) / cluster_s`` on nodes is exactly what the mean ports save. The best bound is returned.
    Neither `seed` nor `incumbent` is used; the clock alone decides how far the stages get.

    Raises:
        InputError: the problem has no transitions or no rates.
    """
    started_s = time.perf_counter()
    OBJECTIVES["bottleneck"].check(problem)
    hot = _hot_ports(problem)
    best = _certificate(problem, hot, {})
    for proof in _stages(problem, hot, started_s, time_limit_s):
        best = max(best, proof, key=lambda one: one.bound)
        if progress is not None:
            progress.proved(best.bound)
    return best


def _stages(problem: PlacementProblem, hot: np.ndarray, started_s: float,
            time_limit_s: float) -> Iterator[Certificate]:
    """Yield one certificate per stage, each with the multipliers of those before."""
    if problem.num_layers == 1:
        return
    with threadpool_limits(1, user_api="blas"):
        arrays = _pair_duals(problem, started_s + time_limit_s / 4)
    yield _certificate(problem, hot, arrays)
    near, far = _rates(problem)
    chosen = _mean_ports(problem, arrays)[0] * _HOPE >= hot
    if problem.num_slots > problem.num_experts or far < near or not far * chosen.any():
        return
    arrays["chosen"] = chosen
    if problem.num_nodes > 1 and problem.num_experts <= _NODE_CHAIN_EXPERTS:
        arrays["chosen"] = np.ones_like(chosen)
        for _ in range(2):  # once over all pairs, once without those whose hot port is above what the chain gives them
            arrays["diagonal"] = _node_chain(problem, arrays["chosen"], started_s + time_limit_s / 2)
            yield _certificate(problem, hot, arrays)
            arrays["chosen"] = arrays["chosen"] & (_chain_shares(problem, arrays) >= hot)
        arrays["diagonal"] = _node_chain(problem, arrays["chosen"], started_s + time_limit_s / 2)
        yield _certificate(problem, hot, arrays)
        if not arrays["chosen"].any():
            return
    left_s = started_s + _CHAIN_UNTIL * time_limit_s - time.perf_counter()
    if left_s > 0:
        yield _certificate(problem, hot, arrays, _kept_chain(problem, arrays["chosen"], left_s))


def _node_chain(problem: PlacementProblem, chosen: np.ndarray, until_s: float) -> np.ndarray:
    from moesim.placement.bounds.node_chain import chain_multipliers

    assert problem.transitions is not None
    with threadpool_limits(1, user_api="blas"):
        return chain_multipliers(np.asarray(problem.transitions, np.float64) * chosen[:, None, None],
                                 problem.num_nodes, until_s)


def _chain_shares(problem: PlacementProblem, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return float64[pair], the mean port of each pair if the chain's diagonal is dealt out to its chosen pairs."""
    assert problem.transitions is not None
    near, far = _rates(problem)
    chosen = arrays["chosen"].astype(int)
    pairs = 1 / np.maximum(1, np.concatenate([[0], chosen]) + np.concatenate([chosen, [0]]))
    own = arrays["diagonal"].sum(axis=1) * pairs * (1 - 1 / problem.num_nodes)
    kept = problem.transitions.sum(axis=(1, 2)) / problem.num_nodes + own[1:] + own[:-1]
    return _mean_ports(problem, arrays)[1] - (far - near) * kept / problem.num_ranks


def _kept_chain(problem: PlacementProblem, chosen: np.ndarray, time_limit_s: float) -> Certificate:
    """Return the chain SDP's bound on what the chosen pairs keep, nodes weighted as the mean ports see them."""
    from moesim.placement.bounds.chain_sdp import prove_affinity

    assert problem.transitions is not None
    near, far = _rates(problem)
    masked = dataclasses.replace(problem, transitions=problem.transitions * chosen[:, None, None], current=None)
    return prove_affinity(masked, seed=0, time_limit_s=time_limit_s, node_weight=(far - near) / far)


def _rates(problem: PlacementProblem) -> tuple[float, float]:
    """Return seconds of port per counted transition, within a node and beyond."""
    assert problem.rates is not None
    return problem.rates.pair_weight * problem.rates.node_s, problem.rates.pair_weight * problem.rates.cluster_s


def _hot_ports(problem: PlacementProblem) -> np.ndarray:
    """Return float64[pair], seconds of the busiest port by what single experts must send or receive."""
    if problem.num_layers == 1:
        return np.zeros(0)
    assert problem.transitions is not None
    sides = [np.stack([_least_cost(np.asarray(counts, np.float64), problem) for counts in part])
             for part in (problem.transitions, np.swapaxes(problem.transitions, 1, 2))]
    return np.maximum(*(_busiest(problem, cost) for cost in sides))


def _busiest(problem: PlacementProblem, cost: np.ndarray) -> np.ndarray:
    return balance_bound(PlacementProblem(cost, problem.num_ranks, problem.slots_per_rank, problem.ranks_per_node))


def _least_cost(counts: np.ndarray, problem: PlacementProblem) -> np.ndarray:
    """Return float64[expert], the port seconds that each row costs at least, whatever is placed beside it.

    The nearer link may be the dearer one: then nothing is gained by the node, and the rank's entries save it all.
    """
    near, far = _rates(problem)
    falling = np.cumsum(-np.sort(-counts, axis=1), axis=1)
    rank, node = (falling[:, min(size, counts.shape[1]) - 1] for size in
                  (problem.slots_per_rank, problem.slots_per_rank * problem.ranks_per_node))
    total = falling[:, -1]
    if far >= near:
        return np.maximum(0.0, far * total - (far - near) * node - near * rank)
    return far * (total - rank)


def _pair_duals(problem: PlacementProblem, until_s: float) -> dict[str, np.ndarray]:
    """Return duals of the b-matching of every pair, for nodes and for ranks."""
    assert problem.transitions is not None
    arrays = {}
    experts, slots = problem.num_experts, problem.slots_per_rank
    for scope, size in (("node", slots * problem.ranks_per_node), ("rank", slots)):
        row, column = matching_duals(np.asarray(problem.transitions, np.float64), min(size, experts), until_s)
        arrays[f"{scope}_row"], arrays[f"{scope}_column"] = row, column
    return arrays


def matching_duals(counts: np.ndarray, capacity: int, until_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Return u, v float64[pair, expert] >= 0 with a small ``capacity (sum u + sum v) + sum max(0, counts - u - v)``.

    That value bounds the best b-matching from above, whatever u and v. Rows and columns take turns: given the other,
    the best u[i] is the capacity-th or next largest entry of the row less v, and the middle of the two is taken, since
    the ends lead into corners where no single multiplier can move.
    """
    size = counts.shape[1]
    row, column = np.zeros(counts.shape[:2]), np.zeros(counts.shape[:2])
    best, kept = np.full(len(counts), np.inf), (row.copy(), column.copy())
    if capacity >= size:
        return kept
    before = np.inf
    for _ in range(_ROUNDS):
        row = _middle(counts - column[:, None, :], capacity)
        column = _middle(np.swapaxes(counts - row[:, :, None], 1, 2), capacity)
        value = matching_value(counts, capacity, row, column)
        better = value < best
        best = np.minimum(best, value)
        kept[0][better], kept[1][better] = row[better], column[better]
        if best.sum() > before * (1 - _STALLS) or time.perf_counter() > until_s:
            break
        before = best.sum()
    return kept


def matching_value(counts: np.ndarray, capacity: int, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return float64[pair], the bound that duals u, v >= 0 give on the transitions kept."""
    rest = np.maximum(0.0, counts - row[:, :, None] - column[:, None, :]).sum(axis=(1, 2))
    return capacity * (row.sum(axis=1) + column.sum(axis=1)) + rest


def _middle(values: np.ndarray, capacity: int) -> np.ndarray:
    parts = np.partition(-values, (capacity - 1, capacity), axis=2)
    return np.maximum(0.0, -(parts[:, :, capacity - 1] + parts[:, :, capacity]) / 2)


def _mean_ports(problem: PlacementProblem, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return float64[pair] mean port seconds by b-matching duals, and with no token kept on a node alone."""
    assert problem.transitions is not None
    near, far = _rates(problem)
    counts = np.asarray(problem.transitions, np.float64)
    total = counts.sum(axis=(1, 2))
    experts, slots = problem.num_experts, problem.slots_per_rank
    rank = matching_value(counts, min(experts, slots), arrays["rank_row"], arrays["rank_column"])
    node = matching_value(counts, min(experts, slots * problem.ranks_per_node), arrays["node_row"],
                          arrays["node_column"])
    rank, node = np.minimum(rank, total), np.minimum(node, total)
    if far < near:
        return far * (total - rank) / problem.num_ranks, np.zeros_like(total)
    open_ended = (far * total - near * rank) / problem.num_ranks
    return open_ended - (far - near) * node / problem.num_ranks, open_ended


def _certificate(problem: PlacementProblem, hot: np.ndarray, arrays: dict[str, np.ndarray],
                 kept: Certificate | None = None) -> Certificate:
    """Return the bound that these multipliers prove, with them (those of `kept` under ``kept.<name>``)."""
    assert problem.rates is not None
    bound, stage = problem.rates.row_s * float(balance_bound(problem).sum()), "hot experts"
    parameters: dict[str, Any] = {}
    if not arrays:
        return Certificate("bottleneck", METHOD, max(0.0, (bound + float(hot.sum())) * (1 - _SAFE)), {"stage": stage})
    mean, open_ended = _mean_ports(problem, arrays)
    ports, stage = np.maximum(hot, mean), "b-matching"
    if "chosen" in arrays:
        chosen = arrays["chosen"]
        together = float(ports[chosen].sum())
        if "diagonal" in arrays:
            together, stage = max(together, _node_chain_ports(problem, arrays, open_ended)), "chain of nodes"
        if kept is not None:
            _, far = _rates(problem)
            assert problem.transitions is not None
            passed = float(problem.transitions[chosen].sum())
            together = max(together, far * passed * (1 - kept.bound) / problem.num_ranks)
            arrays = {**arrays, **{f"kept.{name}": values for name, values in kept.arrays.items()}}
            parameters, stage = {"kept_method": kept.method, "kept": kept.parameters}, "chain SDP"
        bound += float(ports[~chosen].sum()) + together
    else:
        bound += float(ports.sum())
    return Certificate("bottleneck", METHOD, max(0.0, bound * (1 - _SAFE)), {"stage": stage, **parameters},
                       dict(arrays))


def _node_chain_ports(problem: PlacementProblem, arrays: dict[str, np.ndarray], open_ended: np.ndarray) -> float:
    """Return the mean port seconds of the chosen pairs by the multipliers of the chain of nodes."""
    assert problem.transitions is not None
    near, far = _rates(problem)
    passed = float(problem.transitions[arrays["chosen"]].sum())
    kept = passed / problem.num_nodes + float(arrays["diagonal"].sum()) * (1 - 1 / problem.num_nodes)
    return float(open_ended[arrays["chosen"]].sum()) - (far - near) * kept / problem.num_ranks
