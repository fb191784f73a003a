"""Refresh schedules that are provably best: a shortest path over the passes.

Node 0 is the initial set, node i = 1 ... T a refresh at pass i - 1, node T + 1 the end. An edge (i, j) holds the passes
from i's up to j's under i's set, and the move from i's set to j's. A set depends on its own pass only (`target_sets`), so
the cost of an edge does too, and the shortest path from 0 to T + 1 is the best of all schedules with these sets. The sets
are causal; the schedule knows the whole run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError
from moesim.lowering.refresh import RefreshProblem

MAX_STEPS = 4096
NEVER = 1 << 61  # larger than any real cost, and two of them still add up


@dataclass(frozen=True)
class BestSchedule:
    """A schedule bool[step, layer] and its cost in ns: experts and moves over all layers, nothing else."""

    refresh: np.ndarray
    schedule_ns: int


def optimal_schedule(problem: RefreshProblem, *, common: bool = False,
                     forced: np.ndarray | None = None) -> BestSchedule:
    """Return the best schedule, each layer its own, or with `common` the best one that all layers share.

    Layers follow one another and a move is waited for, so they do not compete for the link and each can be solved alone;
    both answers are exact. A limit on what moves per pass over all layers would couple them; it is not modelled.

    Args:
        forced: bool[step], passes at which every layer must refresh (`DenoisePasses.block_starts`).

    Raises:
        InputError: more passes than `MAX_STEPS`, or `forced` of another shape.
    """
    refresh = np.zeros((problem.num_steps, problem.num_layers), bool)
    if common:
        edges = edge_costs(problem, 0)
        for layer in range(1, problem.num_layers):
            edges += edge_costs(problem, layer)
        steps, cost = shortest_schedule(_forbid(edges, forced))
        refresh[steps] = True
        return BestSchedule(refresh, cost)
    total = 0
    for layer in range(problem.num_layers):
        steps, cost = shortest_schedule(_forbid(edge_costs(problem, layer), forced))
        refresh[steps, layer] = True
        total += cost
    return BestSchedule(refresh, total)


def edge_costs(problem: RefreshProblem, layer: int) -> np.ndarray:
    """Return int64[node, node], the cost of every edge of one layer; 0 where there is none (on and below the diagonal).

    Sums are taken in float64, which is exact for whole numbers up to 2^53 ns (104 days).

    Raises:
        InputError: more passes than `MAX_STEPS`.
    """
    steps = problem.num_steps
    if steps > MAX_STEPS:
        raise InputError(f"refresh: {steps} passes are too many for one schedule, at most {MAX_STEPS} are; split the trace")
    sets = np.concatenate([problem.initial[None, layer], problem.targets[:, layer]]).astype(np.float64)
    gpu, cpu = (calls[:, layer].astype(np.float64) for calls in (problem.call_gpu_ns, problem.call_cpu_ns))
    on_gpu, on_cpu = sets @ gpu.T, cpu.sum(axis=1) - sets @ cpu.T
    run = np.zeros((steps + 1, steps + 1))
    np.cumsum(problem.costs.layer_ns(on_gpu, on_cpu), axis=1, out=run[:, 1:])
    start = np.maximum(np.arange(steps + 1) - 1, 0)  # the first pass under each node's set
    edges = np.zeros((steps + 2, steps + 2))
    edges[:-1, 1:] = run - np.take_along_axis(run, start[:, None], 1)
    moved = problem.budget - sets @ sets.T  # sets are of one size: as many come as go
    edges[:-1, 1:-1] += (moved * (problem.costs.in_ns + problem.costs.out_ns))[:, 1:]
    return np.triu(edges, 1).astype(np.int64)


def shortest_schedule(edges: np.ndarray) -> tuple[np.ndarray, int]:
    """Return (int64[refresh], the passes at which to refresh, and the cost) from int64[node, node] of `edge_costs`.

    Dynamic programming over the nodes in order; entries on and below the diagonal are not read.

    Of equally good paths the one whose last edge starts earliest, and so on backwards, is taken.
    """
    into = np.ascontiguousarray(edges.T)
    best = np.zeros(len(edges), np.int64)
    before = np.zeros(len(edges), np.int64)
    for node in range(1, len(edges)):
        ways = best[:node] + into[node, :node]
        before[node] = ways.argmin()
        best[node] = ways[before[node]]
    path, node = [], int(before[-1])
    while node:
        path.append(node - 1)
        node = int(before[node])
    return np.array(path[::-1], np.int64), int(best[-1])


@dataclass(frozen=True)
class BlockPattern:
    """Refresh at the same passes of every cycle of blocks: bool[block of the cycle, pass of the block, layer].

    A cycle begins with a request's first block, and always with a refresh. A refresh that is planned for a pass which
    its block does not reach happens at the first pass of the next block; what a block has beyond the pattern's length is
    not refreshed. So the pattern needs no knowledge of when blocks will end.
    """

    refresh: np.ndarray

    def __post_init__(self) -> None:
        shape = self.refresh.shape
        if len(shape) != 3 or self.refresh.dtype != np.bool_ or 0 in shape or not self.refresh[0, 0].all():
            raise InputError("block pattern: refresh must be bool[block of the cycle, pass of the block, layer] and "
                             "begin with a refresh")
        self.refresh.setflags(write=False)

    def schedule(self, problem: RefreshProblem) -> np.ndarray:
        """Return bool[step, layer], the pattern on these passes.

        Raises:
            InputError: a pattern of another number of layers.
        """
        cycle, longest, layers = self.refresh.shape
        if layers != problem.num_layers:
            raise InputError(f"block pattern: it has {layers} layers, the problem {problem.num_layers}")
        found = np.zeros((problem.num_steps + 1, layers), bool)
        for first, length, number in _blocks(problem):
            own, shown = self.refresh[number % cycle], min(length, longest)
            found[first:first + shown] |= own[:shown]
            found[first + length] |= own[shown:].any(axis=0)
        return found[:-1]


def train_pattern(problem: RefreshProblem, *, common: bool = False, blocks_per_cycle: int = 1) -> BlockPattern:
    """Return the pattern that costs least on these (training) passes; it can then be applied to others.

    It is exact among all patterns of that cycle: each cycle begins with a refresh, so that its cost depends on the
    pattern alone, and cycles with blocks of different lengths add up edge by edge.

    Args:
        common: the same pattern for all layers.
        blocks_per_cycle: 1: the same in every block; as many as a request has: one plan for the whole request.

    Raises:
        InputError: more passes than `MAX_STEPS`, or a cycle below 1.
    """
    if blocks_per_cycle < 1:
        raise InputError(f"block pattern: blocks_per_cycle must be at least 1, got {blocks_per_cycle}")
    longest = int(problem.passes.steps_per_block().max())
    refresh = np.zeros((blocks_per_cycle * longest, problem.num_layers), bool)
    refresh[0] = True
    places = _cycle_places(problem, blocks_per_cycle, longest)
    folded = (_folded(edge_costs(problem, layer), places) for layer in range(problem.num_layers))
    if common:
        refresh[shortest_schedule(np.sum(list(folded), axis=0))[0] + 1] = True
    else:
        for layer, edges in enumerate(folded):
            refresh[shortest_schedule(edges)[0] + 1, layer] = True
    return BlockPattern(refresh.reshape(blocks_per_cycle, longest, problem.num_layers))


def _blocks(problem: RefreshProblem) -> list[tuple[int, int, int]]:
    """Return (first pass, passes, number within its request) of each block."""
    lengths = problem.passes.steps_per_block()
    first = np.cumsum(lengths) - lengths
    request = problem.passes.request[first]
    new = np.concatenate([[True], request[1:] != request[:-1]])
    index = np.arange(len(first))
    number = index - np.maximum.accumulate(np.where(new, index, 0))
    return list(zip(first.tolist(), lengths.tolist(), number.tolist(), strict=True))


def _cycle_places(problem: RefreshProblem, cycle: int, longest: int) -> list[np.ndarray]:
    """Return per cycle int64[planned pass + 1], the pass at which each planned one is; the last is the next cycle's first."""
    cycles: list[list[np.ndarray]] = []
    for first, length, number in _blocks(problem):
        if number % cycle == 0:
            cycles.append([])
        cycles[-1].append(first + np.minimum(np.arange(longest), length))
    ends = [*(parts[0][0] for parts in cycles[1:]), problem.num_steps]
    return [np.concatenate([*parts, np.full((cycle - len(parts)) * longest + 1, end)])
            for parts, end in zip(cycles, ends, strict=True)]


def _folded(edges: np.ndarray, places: list[np.ndarray]) -> np.ndarray:
    """Return int64[planned pass, planned pass], the edges of all cycles laid over each other; the last is the end."""
    found = np.zeros((len(places[0]), len(places[0])), np.int64)
    for own in places:
        found += edges[np.ix_(own + 1, own + 1)]  # planned passes that fall together have an edge of cost 0
    return found


def _forbid(edges: np.ndarray, forced: np.ndarray | None) -> np.ndarray:
    """Return the edges without those that pass over a forced refresh."""
    if forced is None:
        return edges
    if forced.shape != (len(edges) - 2,):
        raise InputError(f"refresh: forced must be bool[step] of {len(edges) - 2} passes, got shape {forced.shape}")
    must = np.concatenate([[0], np.cumsum(np.concatenate([[False], forced]))])  # forced nodes below each node
    inside = must[None, :] - np.concatenate([must[1:], must[-1:]])[:, None]
    return np.where(inside > 0, NEVER, edges)
