"""Metrics of a placement plan: rank loads and their imbalance, kept transitions, fan-out, slot choice.

The tokens of a replicated expert are split over its slots by the plan's shares: evenly (the rule of EPLB and
of the engines that load its plans) unless the plan says otherwise. Three projects use three balance figures; each has its own name here.
"""

from __future__ import annotations

import numpy as np

from moesim.errors import InputError
from moesim.placement.plan import PlacementPlan
from moesim.traces.trace import RoutingTrace

_GOLDEN = (5**0.5 - 1) / 2


def slot_load(plan: PlacementPlan, load: np.ndarray) -> np.ndarray:
    """Return float64[layer, slot], tokens per slot of a load float[layer, expert], by the plan's shares.

    Raises:
        InputError: the load is not [layer, expert] of the plan.
    """
    expected = (plan.num_layers, plan.num_experts)
    if np.shape(load) != expected:
        raise InputError(f"metrics: load must be [layer, expert] = {expected}, got {np.shape(load)}")
    return np.take_along_axis(np.asarray(load, np.float64), plan.physical_to_logical.astype(np.intp), axis=1) * plan.share


def rank_load(plan: PlacementPlan, load: np.ndarray) -> np.ndarray:
    """Return float64[layer, rank], tokens that each rank computes."""
    return slot_load(plan, load).reshape(plan.num_layers, plan.num_ranks, plan.slots_per_rank).sum(axis=2)


def node_load(plan: PlacementPlan, load: np.ndarray, ranks_per_node: int) -> np.ndarray:
    """Return float64[layer, node], tokens that each node of `ranks_per_node` ranks computes."""
    num_nodes = _num_nodes(plan, ranks_per_node)
    return rank_load(plan, load).reshape(plan.num_layers, num_nodes, ranks_per_node).sum(axis=2)


def imbalance(plan: PlacementPlan, load: np.ndarray) -> np.ndarray:
    """Return float64[layer], the largest over the mean rank load (>= 1; 1 where a layer has no load)."""
    ranks = rank_load(plan, load)
    mean = ranks.mean(axis=1)
    return np.divide(ranks.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0)


def imbalance_excess(plan: PlacementPlan, load: np.ndarray) -> np.ndarray:
    """Return float64[layer], (max - mean) / mean rank load (>= 0): TensorRT-LLM's figure."""
    return imbalance(plan, load) - 1.0


def balancedness(plan: PlacementPlan, load: np.ndarray) -> np.ndarray:
    """Return float64[layer], mean / max rank load (in 0 ... 1): vLLM's and SGLang's figure."""
    return 1.0 / imbalance(plan, load)


def presence(plan: PlacementPlan, layer: int) -> np.ndarray:
    """Return float64[expert, rank], the part of an expert's tokens that goes to each rank (rows sum to 1)."""
    parts = np.zeros((plan.num_experts, plan.num_ranks))
    np.add.at(parts, (plan.physical_to_logical[layer], plan.slot_rank), plan.share[layer])
    return parts


def kept_transitions(plan: PlacementPlan, transitions: np.ndarray, ranks_per_node: int) -> dict[str, float]:
    """Return the fractions of transitions that stay on their ``rank`` and on their ``node``.

    A replicated expert counts by expectation under the plan's split: with ``a[i, r]`` the part of expert i
    on rank r, the pair (i, j) is kept with ``sum_r a[i, r] a'[j, r]``. With one home each this is 0 or 1.

    Args:
        plan: the plan.
        transitions: float[layer - 1, expert, expert], pairs of experts that one token used.
        ranks_per_node: ranks per node.

    Raises:
        InputError: another shape, or no transition at all (one layer, an empty trace).
    """
    expected = (plan.num_layers - 1, plan.num_experts, plan.num_experts)
    if np.shape(transitions) != expected:
        raise InputError(f"metrics: transitions must be {expected}, got {np.shape(transitions)}")
    total = float(np.sum(transitions))
    if total <= 0:
        raise InputError("metrics: no transition was counted (one MoE layer, or an empty trace)")
    node_of = np.eye(_num_nodes(plan, ranks_per_node)).repeat(ranks_per_node, axis=0)
    kept_rank = kept_node = 0.0
    following = presence(plan, 0)
    for layer, counts in enumerate(transitions):
        current, following = following, presence(plan, layer + 1)
        flow = current.T @ counts @ following
        kept_rank += float(np.trace(flow))
        kept_node += float(np.trace(node_of.T @ flow @ node_of))
    return {"rank": kept_rank / total, "node": kept_node / total}


def slot_of_token(
    plan: PlacementPlan, expert_ids: np.ndarray, token_index: np.ndarray | None = None,
) -> np.ndarray:
    """Return int32[token, layer, k], the slot that computes each (token, layer, expert); -1 where padded.

    Under an even split the n-th use of an expert in a layer goes to its replica ``n mod replicas``, replicas in
    rising slot order. Under stated shares it goes to the replica whose cumulated share passes ``(n phi) mod 1``,
    phi the golden ratio (a low-discrepancy sequence: every prefix is split nearly as stated). Deterministic.

    Args:
        plan: the plan.
        expert_ids: int[token, layer, k], logical experts, -1 padded.
        token_index: int[token], the order in which tokens are counted (rising, ties by row); None: row order.

    Raises:
        InputError: shapes or ids that are not the plan's.
    """
    expert_ids = np.asarray(expert_ids)
    _check_ids(plan, expert_ids, token_index)
    slots = np.empty(expert_ids.shape, np.int32)
    order = None if token_index is None else np.argsort(np.asarray(token_index), kind="stable")
    for layer in range(plan.num_layers):
        ids = expert_ids[:, layer] if order is None else expert_ids[order, layer]
        shares = None if plan.slot_share is None else plan.slot_share[layer]
        chosen = _layer_slots(plan.logical_to_physical[layer], plan.replica_count[layer], ids.ravel(), shares)
        slots[slice(None) if order is None else order, layer] = chosen.reshape(ids.shape)
    return slots


def fanout(
    plan: PlacementPlan, trace: RoutingTrace, home_rank: np.ndarray, ranks_per_node: int,
) -> dict[str, float]:
    """Return the mean number of distinct remote ``ranks`` and ``nodes`` that a token visits in a layer.

    This is what home-based dispatch (the token returns after each layer) pays for; slots as in
    `slot_of_token`. A remote rank is another than the token's home, a remote node likewise.

    Args:
        plan: the plan.
        trace: routing of the tokens.
        home_rank: int[token], the rank that holds each token's context.
        ranks_per_node: ranks per node.

    Raises:
        InputError: a home that is no rank, or another number of tokens.
    """
    home_rank = np.asarray(home_rank)
    if home_rank.shape != (trace.num_tokens,):
        raise InputError(f"metrics: home_rank must have shape ({trace.num_tokens},), got {home_rank.shape}")
    if home_rank.min() < 0 or home_rank.max() >= plan.num_ranks:
        raise InputError(f"metrics: home_rank must be in 0 ... {plan.num_ranks - 1}")
    _num_nodes(plan, ranks_per_node)
    slots = slot_of_token(plan, trace.expert_ids)
    ranks = np.where(slots < 0, -1, slots // plan.slots_per_rank)
    nodes = np.where(slots < 0, -1, ranks // ranks_per_node)
    return {"ranks": _mean_remote(ranks, home_rank),
            "nodes": _mean_remote(nodes, home_rank // ranks_per_node)}


def duplicates_on_rank(plan: PlacementPlan) -> np.ndarray:
    """Return int64[layer, rank], slots that repeat an expert their rank already holds (a wasted copy)."""
    shape = (plan.num_layers, plan.num_ranks, plan.slots_per_rank)
    held = np.sort(plan.physical_to_logical.reshape(shape), axis=2)
    return np.sum(held[..., 1:] == held[..., :-1], axis=2)


def _num_nodes(plan: PlacementPlan, ranks_per_node: int) -> int:
    if ranks_per_node < 1 or plan.num_ranks % ranks_per_node:
        raise InputError(f"metrics: {plan.num_ranks} ranks are not whole nodes of {ranks_per_node}")
    return plan.num_ranks // ranks_per_node


def _check_ids(plan: PlacementPlan, expert_ids: np.ndarray, token_index: np.ndarray | None) -> None:
    if expert_ids.ndim != 3 or expert_ids.shape[1] != plan.num_layers:
        raise InputError(
            f"metrics: expert_ids must be [token, {plan.num_layers} layers, k], got {expert_ids.shape}")
    if expert_ids.size and (expert_ids.min() < -1 or expert_ids.max() >= plan.num_experts):
        raise InputError(f"metrics: expert_ids must be -1 ... {plan.num_experts - 1} for this plan, "
                         f"found {expert_ids.min()} ... {expert_ids.max()}")
    tokens = expert_ids.shape[:1]
    if token_index is not None and np.shape(token_index) != tokens:
        raise InputError(f"metrics: token_index must have shape {tokens}, got {np.shape(token_index)}")


def _layer_slots(table: np.ndarray, replicas: np.ndarray, ids: np.ndarray, shares: np.ndarray | None) -> np.ndarray:
    """Return int32[use], the slot of each use of an expert in one layer, in order of use."""
    slots = np.append(table[:, 0], np.int32(-1))[ids]  # id -1 (padding) takes the last entry
    shared = np.flatnonzero(np.append(replicas > 1, False)[ids])
    ids = ids[shared]
    keys = ids.astype(np.uint16) if len(table) < 2**16 else ids  # 16 bits sort by radix
    order = np.argsort(keys, kind="stable")
    uses = np.bincount(keys, minlength=len(table))
    turn = np.empty(len(ids), np.int64)
    turn[order] = np.arange(len(ids)) - np.repeat(np.cumsum(uses) - uses, uses)
    if shares is None:
        slots[shared] = table[ids, turn % replicas[ids]]
    else:
        upto = np.cumsum(np.where(table >= 0, shares[table], 0.0), axis=1)
        point = (turn + 1) * _GOLDEN % 1.0 * upto[ids, -1]
        slots[shared] = table[ids, (upto[ids] <= point[:, None]).sum(axis=1)]
    return slots


def _mean_remote(places: np.ndarray, home: np.ndarray) -> float:
    """Return the mean over [token, layer] of distinct `places` [token, layer, k] other than `home` and -1."""
    remote = np.sort(np.where(places == home[:, None, None], -1, places), axis=2)
    first = np.concatenate([np.ones_like(remote[..., :1], bool), remote[..., 1:] != remote[..., :-1]], axis=2)
    return float(np.mean(np.sum(first & (remote >= 0), axis=2)))
