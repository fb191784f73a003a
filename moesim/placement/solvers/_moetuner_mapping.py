"""MoETuner's second program without a solver: what a mapping of clusters to ranks costs, exact answers, good starts."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import numpy as np

VITERBI_RANKS = 6


@dataclass(frozen=True)
class MappingTask:
    """One cluster per rank and layer; a pair of layers costs what its slowest pair of ranks does.

    Attributes:
        counts: float64[layer - 1, cluster, cluster], tokens that go from a cluster to one of the next layer.
        link: float64[rank, rank], cost of a token between ranks; 0 on the diagonal.
        sizes: int64[layer, cluster], experts.
        memory_weight: cost of one expert more than ``ceil(experts of all layers / ranks)`` on a rank.
    """

    counts: np.ndarray
    link: np.ndarray
    sizes: np.ndarray
    memory_weight: float = 0.0
    uniform: bool = field(init=False)

    def __post_init__(self) -> None:
        off = self.link[~np.eye(len(self.link), dtype=bool)]
        object.__setattr__(self, "uniform", bool(len(off) == 0 or np.all(off == off[0])))

    @property
    def has_memory(self) -> bool:
        """Whether sizes differ, so that the experts of a rank over all layers depend on the mapping."""
        return bool(self.memory_weight > 0 and np.any(self.sizes != self.sizes.flat[0]))

    @property
    def share(self) -> int:
        """Experts of all layers that a rank may hold without a cost."""
        return -(-int(self.sizes.sum()) // len(self.link))

    def pair(self, index: int, here: np.ndarray, there: np.ndarray) -> float:
        """Return the slowest pair between two layers, for int64[cluster] ranks of each."""
        return float((self.counts[index] * self.link[np.ix_(here, there)]).max())

    def excess(self, ranks: np.ndarray) -> int:
        """Return the experts above the share, over all ranks."""
        held = np.bincount(ranks.ravel(), weights=self.sizes.ravel(), minlength=len(self.link)).astype(np.int64)
        return int(np.maximum(held - self.share, 0).sum())

    def value(self, ranks: np.ndarray) -> float:
        """Return the cost of int64[layer, cluster] ranks."""
        pairs = sum(self.pair(index, *ranks[index:index + 2]) for index in range(len(self.counts)))
        return pairs + (self.memory_weight * self.excess(ranks) if self.has_memory else 0.0)

    def floors(self) -> np.ndarray:
        """Return float64[layer - 1], proven lower bounds on each pair of layers.

        Whatever the mapping, at most one cluster of the next layer shares a cluster's rank, so the second largest count
        of every row and of every column travels at least over the best link.
        """
        if len(self.link) == 1:
            return np.zeros(len(self.counts))
        off = self.link[~np.eye(len(self.link), dtype=bool)].min()
        return np.array([max(np.sort(counts, axis=axis).take(-2, axis=axis).max() for axis in (0, 1)) * off
                         for counts in self.counts])


def relative_mapping(task: MappingTask) -> np.ndarray:
    """Return optimal int64[layer, cluster] ranks where all links are equal and memory plays no part.

    Counts above the floor of a pair of layers are alone in their row and column, so one permutation keeps all of them on
    their ranks and the floor is met; and a permutation relative to the layer before is free to choose, whatever came
    before. O(L G^3). (Not in the paper, which leaves this to its solver.)
    """
    from scipy.optimize import linear_sum_assignment

    link = float(task.link.max())
    ranks = [np.arange(len(task.link))]
    for counts, floor in zip(task.counts, task.floors(), strict=True):
        gain = counts + (counts * link > floor) * (counts.sum() + 1.0)
        _, match = linear_sum_assignment(gain, maximize=True)
        following = np.empty(len(match), np.int64)
        following[match] = ranks[-1]
        ranks.append(following)
    return np.stack(ranks)


def viterbi_mapping(task: MappingTask, until_s: float = float("inf")) -> np.ndarray | None:
    """Return optimal int64[layer, cluster] ranks, memory left out: the shortest path over all permutations.

    States are the G! ways to map a layer's clusters, edges cost the slowest pair. O(L (G!)^2 G^2) time, so for
    G <= 6; None if `until_s` (`time.perf_counter`) passes first.
    """
    states = np.array(list(itertools.permutations(range(len(task.link)))))
    cost, came = np.zeros(len(states)), []
    for counts in task.counts:
        step = np.zeros((len(states), len(states)))
        for first, second in np.argwhere(counts > 0):
            if time.perf_counter() > until_s:
                return None
            edge = counts[first, second] * task.link
            np.maximum(step, edge[np.ix_(states[:, first], states[:, second])], out=step)
        step += cost[:, None]
        came.append(np.argmin(step, axis=0))
        cost = step.min(axis=0)
    path = [int(np.argmin(cost))]
    for best in reversed(came):
        path.append(int(best[path[-1]]))
    return states[path[::-1]]


def searched_mapping(task: MappingTask, until_s: float) -> np.ndarray:
    """Return good int64[layer, cluster] ranks: a greedy pass, sweeps that are exact per layer, swaps for memory."""
    num_layers, num_ranks = task.sizes.shape
    ranks = np.tile(np.arange(num_ranks), (num_layers, 1))
    for layer in range(1, num_layers):
        before = _before(task, layer, ranks[layer - 1])
        ranks[layer] = _two_sided(before, np.zeros_like(before))
    improved = True
    while improved and time.perf_counter() < until_s:
        improved = False
        for layer in (*range(num_layers), *reversed(range(num_layers))):
            if time.perf_counter() > until_s:
                break
            improved = _improve(task, ranks, layer) or improved
    if task.has_memory:
        _swap(task, ranks, until_s)
    return ranks


def _before(task: MappingTask, layer: int, previous: np.ndarray) -> np.ndarray:
    """Return float64[cluster, rank], the slowest pair that a cluster of `layer` makes with the layer before."""
    if layer == 0:
        return np.zeros(task.link.shape)
    return np.max(task.counts[layer - 1][:, :, None] * task.link[previous][:, None, :], axis=0)


def _after(task: MappingTask, layer: int, following: np.ndarray) -> np.ndarray:
    if layer == len(task.counts):
        return np.zeros(task.link.shape)
    return np.max(task.counts[layer][:, :, None] * task.link[:, following].T[None], axis=1)


def _improve(task: MappingTask, ranks: np.ndarray, layer: int) -> bool:
    """Map one layer exactly, given its neighbours; return whether that gained anything."""
    before = _before(task, layer, ranks[layer - 1])
    after = _after(task, layer, ranks[min(layer + 1, len(ranks) - 1)])
    new, rows = _two_sided(before, after), np.arange(len(before))
    old = ranks[layer]
    gained = (before[rows, old].max() + after[rows, old].max()) - (before[rows, new].max() + after[rows, new].max())
    if gained <= 0:
        return False
    ranks[layer] = new
    return True


def _two_sided(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the permutation p of least ``max_c before[c, p[c]] + max_c after[c, p[c]]``, along its Pareto stairs."""
    best, least, cap, rows = np.arange(len(before)), np.inf, np.inf, np.arange(len(before))
    while True:
        first = _bottleneck(after, before < cap, before)
        if first is None or after[rows, first].max() >= least:
            return best
        second = _bottleneck(before, (before < cap) & (after <= after[rows, first].max()), after)
        assert second is not None  # `first` is one
        cap = before[rows, second].max()
        total = cap + after[rows, second].max()
        if total < least:
            best, least = second, total


def _bottleneck(values: np.ndarray, allowed: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """Return the allowed permutation of least largest value (of those: of least sum), or None."""
    from scipy.optimize import linear_sum_assignment

    def match(limit: float) -> np.ndarray | None:
        open_ = allowed & (values <= limit)
        cost = np.where(open_, values + other, (values + other).sum() + 1.0)
        rows, columns = linear_sum_assignment(cost)
        return columns if open_[rows, columns].all() else None

    levels = np.unique(values[allowed])
    if not len(levels) or match(levels[-1]) is None:
        return None
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if match(levels[middle]) is not None else (middle + 1, high)
    return match(levels[low])


def _swap(task: MappingTask, ranks: np.ndarray, until_s: float) -> None:
    """Swap pairs of clusters of one layer in place while the whole cost falls."""
    value, improved = task.value(ranks), True
    while improved:
        improved = False
        for layer, (first, second) in itertools.product(range(len(ranks)),
                                                        itertools.combinations(range(ranks.shape[1]), 2)):
            if time.perf_counter() > until_s:
                return
            ranks[layer, [first, second]] = ranks[layer, [second, first]]
            new = task.value(ranks)
            if new < value:
                value, improved = new, True
            else:
                ranks[layer, [first, second]] = ranks[layer, [second, first]]
