"""Costs between all pairs of layer states for the exact solver. Compiled: states squared, times assignments inside.

A state is one way to divide the experts of a layer over the ranks, up to relabelling: int64[expert] rank ids.
"""

from __future__ import annotations

import numba
import numpy as np

HUGE = 1e300


@numba.njit(cache=True, nogil=True)
def _flows(sent: np.ndarray, there: np.ndarray, flow: np.ndarray) -> None:
    """Fill flow[r, s], the tokens from rank r of one state (sent[expert, r]) to rank s of the other."""
    flow[:] = 0.0
    for j in range(len(there)):
        s = there[j]
        for r in range(len(flow)):
            flow[r, s] += sent[j, r]


@numba.njit(cache=True, nogil=True)
def _assign(cost: np.ndarray, worst: bool, best: np.ndarray) -> float:
    """Return the least total (`worst`: the least maximum) of a square assignment, over subsets of columns."""
    width = len(cost)
    best[0] = 0.0
    for mask in range(1, 1 << width):
        row, least, bits = -1, HUGE, mask
        while bits:
            bits &= bits - 1
            row += 1
        for column in range(width):
            if mask >> column & 1:
                before = best[mask ^ (1 << column)]
                value = max(before, cost[row, column]) if worst else before + cost[row, column]
                least = min(least, value)
        best[mask] = least
    return best[(1 << width) - 1]


@numba.njit(cache=True, nogil=True)
def _fill(flow: np.ndarray, nodes: np.ndarray, node: int, width: int, near: float, far: float, worst: bool,
          leaving: np.ndarray, coming: np.ndarray, cost: np.ndarray) -> None:
    """Fill cost[a, b] of joining rank a of `node` with rank b of the other state's node ``nodes[node]``.

    `worst`: the busier direction of the port, seconds (near, far: per token within a node and beyond); else the
    tokens lost, weighted (near: off the rank but on the node, far: off the node).
    """
    first, second = node * width, nodes[node] * width
    for a in range(width):
        for b in range(width):
            r, s = first + a, second + b
            out_near, in_near = -flow[r, s], -flow[r, s]
            for k in range(width):
                out_near += flow[r, second + k]
                in_near += flow[first + k, s]
            out_far, in_far = leaving[r] - out_near - flow[r, s], coming[s] - in_near - flow[r, s]
            out = near * out_near + far * out_far
            cost[a, b] = max(out, near * in_near + far * in_far) if worst else out


@numba.njit(cache=True, nogil=True)
def _pair_cost(flow: np.ndarray, orders: np.ndarray, near: float, far: float, worst: bool, leaving: np.ndarray,
               coming: np.ndarray, cost: np.ndarray, best: np.ndarray) -> float:
    """Return the least cost over all relabellings: nodes in every order, ranks inside a node by assignment."""
    ranks, num_nodes = len(flow), orders.shape[1]
    width = ranks // num_nodes
    for r in range(ranks):
        leaving[r] = coming[r] = 0.0
        for s in range(ranks):
            leaving[r] += flow[r, s]
            coming[r] += flow[s, r]
    least = HUGE
    for order in range(len(orders)):
        total = 0.0
        for node in range(num_nodes):
            _fill(flow, orders[order], node, width, near, far, worst, leaving, coming, cost)
            value = _assign(cost, worst, best)
            total = max(total, value) if worst else total + value
        least = min(least, total)
    return least


@numba.njit(cache=True, nogil=True)
def relax(sent: np.ndarray, states: np.ndarray, start: int, stop: int, value: np.ndarray, orders: np.ndarray,
          near: float, far: float, worst: bool, ranks: int, after: np.ndarray, parent: np.ndarray) -> None:
    """Fill after[q] = min over p of value[p] + cost(p, q), and the p of the minimum, for q in start ... stop - 1.

    sent[p, j, r]: tokens from rank r of state p to expert j of the next layer.
    """
    width = ranks // orders.shape[1]
    flow, cost = np.zeros((ranks, ranks)), np.zeros((width, width))
    leaving, coming, best = np.zeros(ranks), np.zeros(ranks), np.zeros(1 << width)
    for q in range(start, stop):
        after[q] = HUGE
        for p in range(len(states)):
            if value[p] >= after[q]:  # costs are not negative
                continue
            _flows(sent[p], states[q], flow)
            total = value[p] + _pair_cost(flow, orders, near, far, worst, leaving, coming, cost, best)
            if total < after[q]:
                after[q], parent[q] = total, p
