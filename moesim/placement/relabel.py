"""Relabel the ranks of a plan so that as few experts as possible move from the plan that is loaded."""

from __future__ import annotations

import dataclasses

import numpy as np

from moesim.placement.plan import PlacementPlan


def relabelled(plan: PlacementPlan, current: PlacementPlan, ranks_per_node: int, *,
               per_layer: bool) -> PlacementPlan:
    """Return `plan` with its nodes, and the ranks inside them, renamed to keep most experts of `current` in place.

    Exact over all renamings that keep ranks of a node together: an assignment of ranks inside every pair of nodes,
    then one of nodes. With `per_layer` every layer gets its own renaming (harmless where tokens return home after
    each layer), else all layers share one (where tokens move on from layer to layer, ranks of neighbouring layers
    must keep their names together).
    """
    kept = np.stack([_overlap(plan, current, layer) for layer in range(plan.num_layers)])
    if not per_layer:
        kept = np.repeat(kept.sum(axis=0, keepdims=True), plan.num_layers, axis=0)
    rows, shares = np.array(plan.physical_to_logical), None if plan.slot_share is None else np.array(plan.slot_share)
    width = plan.slots_per_rank
    for layer, table in enumerate(kept):
        new = _renaming(table, ranks_per_node)
        for values in (rows, shares):
            if values is not None:
                by_rank = values[layer].reshape(-1, width).copy()
                moved = np.empty_like(by_rank)
                moved[new] = by_rank
                values[layer] = moved.ravel()
    return dataclasses.replace(plan, physical_to_logical=rows, slot_share=shares)


def _overlap(plan: PlacementPlan, current: PlacementPlan, layer: int) -> np.ndarray:
    """int64[new rank, old rank]: experts that both hold."""
    held = []
    for one in (plan, current):
        flags = np.zeros((one.num_ranks, one.num_experts), np.int64)
        flags[one.slot_rank, one.physical_to_logical[layer]] = 1
        held.append(flags)
    return held[0] @ held[1].T


def _renaming(kept: np.ndarray, ranks_per_node: int) -> np.ndarray:
    """int64[rank], the new name of each rank."""
    from scipy.optimize import linear_sum_assignment

    num_nodes = len(kept) // ranks_per_node
    inside = np.empty((num_nodes, num_nodes, ranks_per_node), np.int64)
    value = np.empty((num_nodes, num_nodes))
    blocks = kept.reshape(num_nodes, ranks_per_node, num_nodes, ranks_per_node)
    for new in range(num_nodes):
        for old in range(num_nodes):
            block = blocks[new, :, old]
            _, chosen = linear_sum_assignment(block, maximize=True)
            inside[new, old] = chosen
            value[new, old] = block[np.arange(ranks_per_node), chosen].sum()
    _, node = linear_sum_assignment(value, maximize=True)
    return np.concatenate([old * ranks_per_node + inside[new, old] for new, old in enumerate(node)])
