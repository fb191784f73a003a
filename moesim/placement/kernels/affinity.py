"""Compiled loops of the affinity search: one layer placed exactly, and annealing by swaps.

Compiled because a search at 58 layers x 256 experts re-places layers some thousand times and looks at some 10**8
swaps: a general assignment solver takes 4 ms per layer (its columns are ranks repeated `capacity` times), this one
0.2 ms from a good start.

Shapes here: `counts` and `back` float64[pair, expert, expert] (transitions, and each transposed), `homes`
int64[layer, expert] (rank of each expert, every rank full: empty places are dummy experts without transitions).
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True)
def add_gain(counts: np.ndarray, neighbour: np.ndarray, gain: np.ndarray) -> None:
    """Add to float64[expert, rank] what each expert keeps with the neighbours on each rank."""
    for i in range(len(counts)):
        for j in range(len(neighbour)):
            gain[i, neighbour[j]] += counts[i, j]


@numba.njit(cache=True, nogil=True)
def layer_gain(counts: np.ndarray, back: np.ndarray, homes: np.ndarray, layer: int, ahead: bool,
               node_weight: float, ranks_per_node: int, num_ranks: int) -> np.ndarray:
    """Return float64[expert, rank], weighted transitions kept with the layer before and (`ahead`) the one after."""
    gain = np.zeros((homes.shape[1], num_ranks))
    if layer > 0:
        add_gain(back[layer - 1], homes[layer - 1], gain)
    if ahead and layer + 1 < len(homes):
        add_gain(counts[layer], homes[layer + 1], gain)
    if node_weight > 0.0:
        for row in gain:
            for node in range(num_ranks // ranks_per_node):
                part = row[node * ranks_per_node:(node + 1) * ranks_per_node]
                shared = node_weight * part.sum()
                for r in range(ranks_per_node):
                    part[r] = (1.0 - node_weight) * part[r] + shared
    return gain


@numba.njit(cache=True, nogil=True)
def _best_moves(gain: np.ndarray, home: np.ndarray, rank: int, best: np.ndarray, who: np.ndarray) -> None:
    """Fill ``best[rank, s]``: the most that moving one expert of `rank` to s gains, and ``who[rank, s]`` it is."""
    best[rank] = -np.inf
    for e in range(len(home)):
        if home[e] == rank:
            for s in range(gain.shape[1]):
                value = gain[e, s] - gain[e, rank]
                if value > best[rank, s]:
                    best[rank, s], who[rank, s] = value, e


@numba.njit(cache=True, nogil=True)
def _cycle(best: np.ndarray, tolerance: float, parent: np.ndarray) -> int:
    """Return a rank on a cycle of moves that gains (its predecessors in `parent`), or -1 if there is none.

    Bellman-Ford for longest paths; a cycle in the predecessor graph is one that gains.
    """
    num_ranks = len(best)
    reach = np.zeros(num_ranks)
    parent[:] = -1
    mark = np.zeros(num_ranks, np.int64)
    for _ in range(num_ranks + 1):
        changed = False
        for a in range(num_ranks):
            for b in range(num_ranks):
                value = reach[a] + best[a, b]
                if a != b and value > reach[b] + tolerance:
                    reach[b], parent[b], changed = value, a, True
        if not changed:
            return -1
        mark[:] = 0
        for first in range(num_ranks):
            here = first
            while here >= 0 and mark[here] == 0:
                mark[here] = first + 1
                here = parent[here]
            if here >= 0 and mark[here] == first + 1:
                return here
    return -1


@numba.njit(cache=True, nogil=True)
def assign(gain: np.ndarray, home: np.ndarray, tolerance: float) -> float:
    """Move experts along cycles of ranks until none gains; return the gain. `home` int64[expert] changes in place.

    This is minimum-cost flow by cancelling cycles (Klein, Management Science 14(3), 1967) on the graph of ranks: the
    arc a -> b is the best single move from a to b. Without a gaining cycle the assignment is optimal (up to
    ``tolerance`` per move). O(R^2) per cycle when, as here, cycles are found in the first rounds.
    """
    num_ranks = gain.shape[1]
    best = np.full((num_ranks, num_ranks), -np.inf)
    who = np.zeros((num_ranks, num_ranks), np.int64)
    for rank in range(num_ranks):
        _best_moves(gain, home, rank, best, who)
    parent = np.zeros(num_ranks, np.int64)
    total = 0.0
    while True:
        start = _cycle(best, tolerance, parent)
        if start < 0:
            return total
        step, b = 0.0, start
        while True:
            a = parent[b]
            step += best[a, b]
            home[who[a, b]] = b
            b = a
            if b == start:
                break
        total += step
        while True:  # every rank of the cycle lost one expert and got one
            _best_moves(gain, home, b, best, who)
            b = parent[b]
            if b == start:
                break
        if step <= 0.0:  # rounding: no more to win
            return total


@numba.njit(cache=True, nogil=True)
def improve_layer(counts: np.ndarray, back: np.ndarray, homes: np.ndarray, layer: int, ahead: bool,
                  node_weight: float, ranks_per_node: int, num_ranks: int) -> float:
    """Place one layer exactly, given its neighbours; return what that gained."""
    gain = layer_gain(counts, back, homes, layer, ahead, node_weight, ranks_per_node, num_ranks)
    return assign(gain, homes[layer], 2.0**-40 * gain.max())


@numba.njit(cache=True, nogil=True)
def kept(counts: np.ndarray, homes: np.ndarray, node_weight: float, ranks_per_node: int) -> float:
    """Return the weighted transitions that `homes` keeps."""
    total = 0.0
    for layer in range(len(counts)):
        for i in range(homes.shape[1]):
            a = homes[layer, i]
            for j in range(homes.shape[1]):
                b = homes[layer + 1, j]
                if a == b:
                    total += counts[layer, i, j]
                elif a // ranks_per_node == b // ranks_per_node:
                    total += node_weight * counts[layer, i, j]
    return total


@numba.njit(cache=True, nogil=True)
def tables(counts: np.ndarray, back: np.ndarray, homes: np.ndarray, places: np.ndarray, num_places: int) -> np.ndarray:
    """Return float64[layer, place, expert], transitions kept by each expert on each place; ``places[rank]``."""
    num_layers, num_experts = homes.shape
    table = np.zeros((num_layers, num_places, num_experts))
    for layer in range(num_layers):
        for k in range(num_experts):
            if layer > 0:
                table[layer, places[homes[layer - 1, k]]] += counts[layer - 1, k]
            if layer + 1 < num_layers:
                table[layer, places[homes[layer + 1, k]]] += back[layer, k]
    return table


@numba.njit(cache=True, nogil=True)
def _shift(table: np.ndarray, rows: np.ndarray, i: int, j: int, a: int, b: int) -> None:
    for k in range(rows.shape[1]):
        change = rows[i, k] - rows[j, k]
        table[b, k] += change
        table[a, k] -= change


@numba.njit(cache=True, nogil=True)
def anneal(counts: np.ndarray, back: np.ndarray, homes: np.ndarray, on_rank: np.ndarray, on_node: np.ndarray,
           node_weight: float, ranks_per_node: int, moves: int, hot: float, cold: float,
           rng: np.random.Generator) -> float:
    """Try swaps of two experts of a layer (Metropolis, temperature falling from `hot` to `cold`); return the gain.

    `on_rank` and `on_node` are `tables` of `homes`, kept up to date (`on_node` only where ``node_weight`` > 0).
    """
    num_layers, num_experts = homes.shape
    total, temperature = 0.0, hot
    for move in range(moves):
        if move % 1024 == 0:
            temperature = hot * (cold / hot) ** (move / moves)
        layer = int(rng.random() * num_layers)
        i, j = int(rng.random() * num_experts), int(rng.random() * num_experts)
        a, b = homes[layer, i], homes[layer, j]
        if a == b:
            continue
        table = on_rank[layer]
        gain = (1.0 - node_weight) * (table[b, i] - table[a, i] + table[a, j] - table[b, j])
        n, m = a // ranks_per_node, b // ranks_per_node
        if node_weight > 0.0 and n != m:
            table = on_node[layer]
            gain += node_weight * (table[m, i] - table[n, i] + table[n, j] - table[m, j])
        if gain < 0.0 and (gain < -30.0 * temperature or rng.random() >= np.exp(gain / temperature)):
            continue
        homes[layer, i], homes[layer, j] = b, a
        total += gain
        if layer > 0:
            _shift(on_rank[layer - 1], back[layer - 1], i, j, a, b)
            if node_weight > 0.0 and n != m:
                _shift(on_node[layer - 1], back[layer - 1], i, j, n, m)
        if layer + 1 < num_layers:
            _shift(on_rank[layer + 1], counts[layer], i, j, a, b)
            if node_weight > 0.0 and n != m:
                _shift(on_node[layer + 1], counts[layer], i, j, n, m)
    return total
