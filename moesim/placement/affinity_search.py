"""Search for plans that keep transitions: greedy passes, exact sweeps over layers, annealing by swaps."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from moesim.placement.problem import PlacementProblem

# (hot, cold) of a round, in spreads of an expert's gains over the ranks: the first suits strong structure, where a
# plan sits in a deep valley; the second even routing
ANNEALING = ((0.4, 0.1), (0.2, 0.05))
_CHUNK = 1 << 18  # swaps per compiled call: well under half a second


class AffinitySearch:
    """Moves on `homes` int64[layer, place]: the rank of every expert, then of the dummies that fill the ranks.

    The value of homes is ``w kept on the node + (1 - w) kept on the rank``, in transitions, for ``w = node_weight``.
    """

    def __init__(self, problem: PlacementProblem, transitions: np.ndarray, node_weight: float) -> None:
        self.num_ranks, self.ranks_per_node = problem.num_ranks, problem.ranks_per_node
        self.num_layers, self.num_experts = problem.num_layers, problem.num_experts
        self.capacity = -(-self.num_experts // self.num_ranks)
        self.node_weight = float(node_weight)
        self.counts, self.back = self.padded(transitions)

    def padded(self, transitions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return float64[pair, place, place] counts with rows of zeros for the dummies, and each transposed."""
        more = self.capacity * self.num_ranks - self.num_experts
        counts = np.pad(np.asarray(transitions, np.float64), ((0, 0), (0, more), (0, more)))
        return counts, np.ascontiguousarray(counts.transpose(0, 2, 1))

    def block(self) -> np.ndarray:
        """Return int64[place], homes of one layer in order of expert id."""
        return np.arange(self.capacity * self.num_ranks) // self.capacity

    def homes_of(self, slots: np.ndarray) -> np.ndarray | None:
        """Return the homes of int[layer, slot] with one slot per expert, else None."""
        if self.capacity * self.num_ranks != self.num_experts or slots.shape[1] != self.num_experts:
            return None
        return np.argsort(slots, axis=1) // self.capacity

    def slots_of(self, homes: np.ndarray) -> np.ndarray:
        """Return int64[layer, slot] of homes without dummies."""
        return np.argsort(homes[:, :self.num_experts], axis=1, kind="stable")

    def value(self, homes: np.ndarray) -> float:
        """Return the weighted transitions kept."""
        from moesim.placement.kernels import affinity as kernels

        return float(kernels.kept(self.counts, homes, self.node_weight, self.ranks_per_node))

    def forward(self, first: np.ndarray, source: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
        """Return homes grown layer by layer from int64[place], each exact given the layer before."""
        homes = np.tile(first, (self.num_layers, 1))
        for layer in range(1, self.num_layers):
            self.improve(homes, layer, ahead=False, source=source)
        return homes

    def improve(self, homes: np.ndarray, layer: int, *, ahead: bool = True,
                source: tuple[np.ndarray, np.ndarray] | None = None) -> float:
        """Place one layer exactly, in place; return the gain. `source`: other counts than the problem's."""
        from moesim.placement.kernels import affinity as kernels

        counts, back = source or (self.counts, self.back)
        return float(kernels.improve_layer(counts, back, homes, layer, ahead, self.node_weight,
                                           self.ranks_per_node, self.num_ranks))

    def sweep(self, homes: np.ndarray, until_s: float, source: tuple[np.ndarray, np.ndarray] | None = None) -> bool:
        """Improve `homes` in place until no layer can be; return False if the time ran out first."""
        stale = np.ones(self.num_layers, bool)
        order = [*range(self.num_layers), *reversed(range(self.num_layers))]
        while stale.any():
            for layer in order:
                if not stale[layer]:
                    continue
                if time.perf_counter() > until_s:
                    return False
                stale[layer] = False
                if self.improve(homes, layer, source=source) > 0.0:
                    stale[max(0, layer - 1):layer + 2:2] = True
                    stale[layer] = False
        return True

    def round(self, relaxed: np.ndarray, until_s: float = float("inf")) -> np.ndarray:
        """Return homes made of relaxed co-location matrices float[pair, E, E]: sweeps on them, then on the counts."""
        source = self.padded(relaxed)
        homes = self.forward(self.block(), source)
        self.sweep(homes, until_s, source)
        self.sweep(homes, until_s)
        return homes

    def anneal(self, homes: np.ndarray, moves: int, seed: int, until_s: float, *, hot: float = 0.3,
               cold: float = 0.02, each: Callable[[], None] | None = None) -> bool:
        """Anneal `homes` in place; temperatures in spreads of the gains of an expert over ranks.

        Returns False if the time ran out before all `moves` were tried.
        """
        from moesim.placement.kernels import affinity as kernels

        ranks = np.arange(self.num_ranks)
        nodes = ranks // self.ranks_per_node
        on_rank = kernels.tables(self.counts, self.back, homes, ranks, self.num_ranks)
        weight = self.node_weight
        on_node = kernels.tables(self.counts, self.back, homes, nodes, int(nodes[-1]) + 1) if weight else on_rank[:, :1]
        spread = weight * float(on_node.std(axis=1).mean()) + (1 - weight) * float(on_rank.std(axis=1).mean())
        if spread <= 0.0:
            return True
        rng = np.random.default_rng(seed)
        chunks = -(-moves // _CHUNK)
        for chunk in range(chunks):
            if time.perf_counter() > until_s:
                return False
            here, there = (spread * hot * (cold / hot) ** ((chunk + part) / chunks) for part in (0, 1))
            kernels.anneal(self.counts, self.back, homes, on_rank, on_node, weight, self.ranks_per_node,
                           min(_CHUNK, moves - chunk * _CHUNK), here, there, rng)
            if each is not None:
                each()
        return True
