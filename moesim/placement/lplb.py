"""LPLB: a fixed graph of copies between ranks, and a linear program that splits their tokens for every batch.

DeepSeek's LPLB (github.com/deepseek-ai/LPLB, 2025, "early research"; MIT). Column k of ``r2o[rank, k]`` says which
rank's k-th heaviest expert the k-th redundant slot of a rank copies; so every copied expert has two homes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, unknown
from moesim.placement.plan import PlacementPlan
from moesim.placement.solvers.lpt import pack
from moesim.placement.split import split_layer

TOPOLOGIES = ("cube", "ring", "hypercube", "torus")
METHODS = ("exact", "interior_point")
ITERATIONS, BIG_M, STEP = 5, 1000.0, 0.999  # of LPLB's kernel
_RESIDUAL = 2.0**-10  # of the largest load: more than this and the solution is not one
_CUBE = ((3, 0, 1, 2, 7, 4, 5, 6), (6, 7, 4, 5, 0, 1, 2, 3))
_GRAY = (3, 0, 1, 2)  # who comes before whom in a cycle of four


def topology(name: str, num_ranks: int, ranks_per_node: int = 0) -> np.ndarray:
    """Return ``r2o`` int64[rank, K], the rank whose k-th heaviest expert each rank copies.

    Args:
        name: ``cube`` (K = 2, LPLB's own, repeated every 8 ranks: two rings of four and a twisted link across);
            ``ring`` (K = 1: the rank before); ``hypercube`` (K = 2, every 16 ranks: the 32 edges of the 4-cube, each
            directed around its ring of four; LPLB publishes no orientation, this one is ours); ``torus`` (K = 2: the
            rank before in the node, and the same place in the node before).
        num_ranks: ranks.
        ranks_per_node: ranks of a node, for ``torus``.

    Raises:
        InputError: an unknown name, or ranks that the graph does not fit.
    """
    ranks = np.arange(num_ranks)
    if name == "ring":
        _need(num_ranks >= 2, name, "at least 2 ranks", num_ranks)
        return ((ranks - 1) % num_ranks)[:, None]
    if name == "cube":
        _need(num_ranks >= 8 and num_ranks % 8 == 0, name, "a multiple of 8 ranks", num_ranks)
        return np.array(_CUBE).T[ranks % 8] + (ranks // 8 * 8)[:, None]
    if name == "hypercube":
        _need(num_ranks >= 16 and num_ranks % 16 == 0, name, "a multiple of 16 ranks", num_ranks)
        low, high, before = ranks % 4, ranks % 16 // 4, np.array(_GRAY)
        base = ranks // 16 * 16
        return np.stack([base + high * 4 + before[low], base + before[high] * 4 + low], axis=1)
    if name == "torus":
        fits = ranks_per_node >= 2 and num_ranks % ranks_per_node == 0 and num_ranks // ranks_per_node >= 2
        _need(fits, name, "at least 2 nodes of at least 2 ranks", num_ranks)
        node, place = ranks // ranks_per_node, ranks % ranks_per_node
        before = node * ranks_per_node + (place - 1) % ranks_per_node
        return np.stack([before, (ranks - ranks_per_node) % num_ranks], axis=1)
    raise unknown("LPLB topology", name, TOPOLOGIES)


def lplb_plan(load: np.ndarray, r2o: np.ndarray) -> PlacementPlan:
    """Return LPLB's plan: experts packed evenly without copies, then the K heaviest of each rank copied along `r2o`.

    Slots of a rank: its own experts, heaviest first, then its K copies. Shares are even until a batch is split.

    Args:
        load: float[layer, expert], tokens that the packing balances.
        r2o: int[rank, K], see `topology`.

    Raises:
        InputError: experts that do not divide over the ranks, fewer than K on a rank, or a rank that would copy its own.
    """
    load, (num_ranks, extra) = np.asarray(load, np.float64), r2o.shape
    num_experts = load.shape[1]
    size = num_experts // num_ranks
    if num_experts % num_ranks or size < extra:
        raise InputError(f"lplb: {num_experts} experts must divide over {num_ranks} ranks with at least {extra} on each")
    if np.any(r2o == np.arange(num_ranks)[:, None]) or r2o.min() < 0 or r2o.max() >= num_ranks:
        raise InputError("lplb: r2o must name another rank for every rank")
    rows = []
    for weight in load:
        own = pack(weight, num_ranks).reshape(num_ranks, size)
        heavy = np.argsort(-weight[own], axis=1, kind="stable")
        own = np.take_along_axis(own, heavy, axis=1)
        copies = own[r2o, np.arange(extra)]
        rows.append(np.concatenate([own, copies], axis=1).ravel())
    return PlacementPlan(np.stack(rows), num_ranks, num_experts)


@dataclass(frozen=True)
class Homes:
    """One layer of an LPLB plan as its linear program sees it: ``fixed`` float64[rank], weights float64[rank, K]."""

    fixed: np.ndarray
    weight: np.ndarray
    r2o: np.ndarray

    def rank_load(self, kept: np.ndarray) -> np.ndarray:
        """Return float64[rank] for the parts float64[rank, K] that copied experts keep at home."""
        moved = self.weight * (1.0 - kept)
        columns = np.arange(self.weight.shape[1])
        return self.fixed + (self.weight * kept).sum(axis=1) + moved[self.r2o, columns].sum(axis=1)


def homes(slots: np.ndarray, load: np.ndarray, r2o: np.ndarray) -> Homes:
    """Return the linear program's data for int[slot] of `lplb_plan` and float[expert] tokens of a batch."""
    num_ranks, extra = r2o.shape
    size = len(slots) // num_ranks
    own = np.asarray(load, np.float64)[np.asarray(slots).reshape(num_ranks, size)[:, :size - extra]]
    return Homes(own[:, extra:].sum(axis=1), own[:, :extra], r2o)


def split_tokens(slots: np.ndarray, load: np.ndarray, r2o: np.ndarray, method: str = "exact") -> np.ndarray:
    """Return float64[slot], the tokens that each slot of a layer serves in a batch.

    ``exact``: the optimum of ``min M`` with, for every rank r, ``fixed_r + sum_k w[r, k] x[r, k] +
    sum_k w[o, k] (1 - x[o, k]) <= M`` (o = r2o[r, k]) and x in 0 ... 1. ``interior_point``: LPLB's own solver,
    `interior_point`.

    Raises:
        InputError: an unknown method.
    """
    if method not in METHODS:
        raise unknown("LPLB method", method, METHODS)
    if method == "exact":
        return split_layer(slots, load, len(r2o)).tokens
    layer = homes(slots, load, r2o)
    kept = interior_point(layer)
    num_ranks, extra = r2o.shape
    tokens = np.asarray(load, np.float64)[np.asarray(slots).reshape(num_ranks, -1)]
    moved = (layer.weight * (1.0 - kept))[r2o, np.arange(extra)]
    tokens[:, :extra] = layer.weight * kept
    tokens[:, -extra:] = moved
    return tokens.ravel()


def interior_point(layer: Homes, iterations: int = ITERATIONS) -> np.ndarray:
    """Return float64[rank, K], the parts kept at home by affine scaling, all 0.5 where its residual test fails.

    Standard form as in LPLB's kernel: G ranks, G (1 + K) equalities, variables x and 1 - x (2 G K), a slack per
    rank, M and one artificial variable of cost `BIG_M`; loads over their largest. From all ones, each iteration steps
    0.999 of the way to the boundary along ``-D^2 (c - A' y)``, ``A D^2 A' y = A D^2 c`` (Dikin 1967; Vanderbei et al.,
    Algorithmica 1, 1986). The test: the artificial variable is below 2^-10.
    """
    matrix, right, cost = _standard_form(layer)
    values = np.ones(len(cost))
    for _ in range(iterations):
        scaled = matrix * values**2
        dual = np.linalg.lstsq(scaled @ matrix.T, scaled @ cost, rcond=None)[0]
        slope = values * (cost - dual @ matrix)
        if not slope.max() > 0:
            break
        values = values * (1.0 - STEP / slope.max() * slope)
    count = layer.weight.size
    residual = np.abs(matrix[:, :-1] @ values[:-1] - right).max()
    if not residual < _RESIDUAL:
        return np.full(layer.weight.shape, 0.5)
    return np.clip(values[:count], 0.0, 1.0).reshape(layer.weight.shape)


def _standard_form(layer: Homes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A, b, c of ``min c v, A v = b, v >= 0``; v = x, 1 - x, slack per rank, M, artificial."""
    num_ranks, extra = layer.weight.shape
    count = num_ranks * extra
    scale = max(float(layer.fixed.max()), float(layer.weight.max()), np.finfo(float).tiny)
    weight, fixed = layer.weight / scale, layer.fixed / scale
    matrix = np.zeros((num_ranks + count, 2 * count + num_ranks + 2))
    for rank in range(num_ranks):
        for k in range(extra):
            matrix[rank, rank * extra + k] += weight[rank, k]
            other = layer.r2o[rank, k]
            matrix[rank, count + other * extra + k] += weight[other, k]  # 1 - x is a variable of its own
        matrix[rank, 2 * count + rank] = 1.0
    matrix[:num_ranks, -2] = -1.0
    rows = np.arange(count)
    matrix[num_ranks + rows, rows] = matrix[num_ranks + rows, count + rows] = 1.0
    right = np.concatenate([-fixed, np.ones(count)])
    matrix[:, -1] = right - matrix[:, :-1].sum(axis=1)
    cost = np.zeros(matrix.shape[1])
    cost[-2:] = 1.0, BIG_M
    return matrix, right, cost


def _need(fits: bool, name: str, what: str, num_ranks: int) -> None:
    if not fits:
        raise InputError(f"LPLB topology {name!r} needs {what}, got {num_ranks} ranks")
