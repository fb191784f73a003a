"""One layer's search: arrays for the compiled kernels, made from a problem; costs as the objectives count them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moesim.placement.constraints import Apart, Capacity, Pin
from moesim.placement.problem import PlacementProblem
from moesim.placement.step_cost import CONTENTIONS, TimedSteps

if TYPE_CHECKING:
    from moesim.placement.kernels.moves import Place, Rules, Uses
    from moesim.placement.kernels.step_time import Net


class LayerSearch(Protocol):
    """One layer under annealing. Costs are sums over steps (ns) or tokens (places), plus moves and breaches."""

    best: np.ndarray

    def start(self, row: np.ndarray) -> float:
        """Begin anew from int[slot]; return its cost."""

    def change(self, slot: int, other: int, expert: int) -> float:
        """Put an expert into a slot, and what was there into another (-1: nowhere); return the new cost."""

    def anneal(self, moves: int, hot: float, cold: float) -> None:
        """Try moves at falling temperatures; `best` keeps the best slots."""

    @property
    def best_cost(self) -> float:
        """The cost of `best`."""


def layer_uses(problem: PlacementProblem, layer: int) -> Uses:
    """Return the uses of a layer's experts in the sampled steps, expert by expert (see `kernels.moves.Uses`)."""
    from moesim.placement.kernels.moves import Uses

    steps = problem.steps
    assert steps is not None
    ids = steps.expert_ids[:, layer]
    token, column = np.nonzero(ids >= 0)
    expert = ids[token, column].astype(np.int64)
    order = np.argsort(expert, kind="stable")
    token, expert = token[order], expert[order]
    group = expert * steps.num_steps + steps.step[token]
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    turn = np.arange(len(group)) - np.repeat(begins, np.diff(np.append(begins, len(group))))
    first = np.searchsorted(expert, np.arange(problem.num_experts + 1))
    return Uses(first.astype(np.int64), token.astype(np.int32), turn.astype(np.int32), steps.step.astype(np.int32),
                steps.home_rank.astype(np.int32))


def layer_rules(problem: PlacementProblem, layer: int, move_cost: float) -> Rules:
    """Return a layer's constraints and the price of one moved expert (0 without a current plan)."""
    from moesim.placement.kernels.moves import Rules

    wanted = problem.constraints.of_layer(layer)
    width = {"rank": 1, "node": problem.ranks_per_node}
    pins = [(one.expert, one.rank) for one in wanted if isinstance(one, Pin)]
    apart = [(one.first, one.second) for one in wanted if isinstance(one, Apart)]
    full = [(one.place * width[one.scope], (one.place + 1) * width[one.scope], one.num_experts)
            for one in wanted if isinstance(one, Capacity)]
    before = np.ones((problem.num_ranks, problem.num_experts), np.int8)
    if problem.current is not None and move_cost > 0:
        before[:] = 0
        before[problem.current.slot_rank, problem.current.physical_to_logical[layer]] = 1
    return Rules(np.array(pins, np.int64).reshape(-1, 2), np.array(apart, np.int64).reshape(-1, 2),
                 np.array(full, np.int64).reshape(-1, 3), before, float(move_cost), problem.slots_per_rank,
                 np.arange(problem.num_slots) // problem.slots_per_rank,
                 np.arange(problem.num_ranks) // problem.ranks_per_node)


def empty_place(problem: PlacementProblem) -> Place:
    """Return room for one layer's slots and counts."""
    from moesim.placement.kernels.moves import Place

    assert problem.steps is not None
    most = problem.num_slots - problem.num_experts + 2  # a move holds one copy more for a moment
    shape = (problem.num_ranks, problem.num_experts)
    return Place(np.zeros(problem.num_slots, np.int64), np.zeros((problem.num_experts, most), np.int64),
                 np.zeros(problem.num_experts, np.int64), np.zeros(shape, np.int16),
                 np.zeros((len(problem.steps.expert_ids), problem.num_ranks), np.int16), np.zeros(1, np.int64))


def network(problem: PlacementProblem, layer: int) -> Net:
    """Return the problem's step costs as arrays for the kernels."""
    from moesim.placement.kernels.step_time import Net

    cost, steps = problem.step_cost, problem.steps
    assert cost is not None
    assert steps is not None
    latency, rate, contention = np.zeros(2), np.ones(2), np.zeros(2, np.int64)
    port = np.zeros((2, problem.num_ranks), np.int64)
    for index, level in enumerate(cost.levels):
        if level is not None:
            latency[index], rate[index] = level.latency_s, level.bytes_per_s
            port[index], contention[index] = level.port, CONTENTIONS.index(level.contention)
    one = cost.kernel
    kernel = np.array([one.overhead_s, one.task_overhead_s, one.flops_per_row, one.flops_per_s, one.bytes_per_group,
                       one.bytes_per_row, one.bytes_per_s, one.tile_rows])
    until = getattr(steps, "until_ns", None)
    waits = np.zeros((steps.num_steps, problem.num_ranks), np.int64) if until is None else until[:, layer]
    width = np.array([cost.dispatch_token_bytes, cost.combine_token_bytes]) / cost.efficiency
    return Net(latency, rate, port, contention, width, np.array([cost.dispatch_overhead_s, cost.combine_overhead_s]),
               kernel, np.ascontiguousarray(np.maximum(waits, 0)))


class StepTimeSearch:
    """A layer judged by the sampled step times: ns, summed over the steps."""

    def __init__(self, problem: PlacementProblem, layer: int, seed: int, move_cost: float, guided: float = 0.5) -> None:
        from moesim.placement.kernels import step_time
        from moesim.placement.kernels.step_time import Times

        assert problem.steps is not None
        self._kernel, self.guided = step_time, guided
        self.uses, self.rules = layer_uses(problem, layer), layer_rules(problem, layer, move_cost)
        self.net, self.place = network(problem, layer), empty_place(problem)
        steps, ports = problem.steps.num_steps, int(self.net.port.max()) + 1
        pairs = (steps, 2, ports, ports) if self.net.contention.max() == CONTENTIONS.index("pair") else (0, 2, 1, 1)
        self.times = Times(
            np.zeros((steps, 2, ports), np.int64), np.zeros((steps, 2, ports), np.int64), np.zeros(pairs, np.int64),
            np.zeros((steps, problem.num_slots), np.int64), np.zeros((steps, problem.num_ranks), np.int64),
            np.zeros(steps, np.int64), np.zeros(2), np.zeros((2, self.place.replicas.shape[1]), np.int64))
        self.state = seeded(seed, layer)
        self.best = np.zeros(problem.num_slots, np.int64)

    def start(self, row: np.ndarray) -> float:
        """Begin anew from int[slot]; return its cost."""
        self.place.slots[:] = self.best[:] = row
        self.times.value[1] = self._kernel.start(self.uses, self.net, self.place, self.rules, self.times)
        return self.best_cost

    def change(self, slot: int, other: int, expert: int) -> float:
        """Put an expert into a slot, and what was there into another (-1: nowhere); return the new cost."""
        return float(self._kernel.change(self.uses, self.net, self.place, self.rules, self.times, slot, other, expert))

    def anneal(self, moves: int, hot: float, cold: float) -> None:
        """Try moves at falling temperatures; `best` keeps the best slots."""
        self._kernel.anneal(self.uses, self.net, self.place, self.rules, self.times, self.best, self.state, moves,
                            hot, cold, self.guided)

    @property
    def best_cost(self) -> float:
        """The cost of `best`."""
        return float(self.times.value[1])


class FanoutSearch:
    """A layer judged by distinct ranks + `node_weight` x distinct nodes, summed over the tokens."""

    def __init__(self, problem: PlacementProblem, layer: int, seed: int, move_cost: float,
                 node_weight: float = 0.0) -> None:
        from moesim.placement.kernels import fanout

        assert problem.steps is not None
        self._kernel, self.node_weight = fanout, float(node_weight)
        self.uses, self.rules = layer_uses(problem, layer), layer_rules(problem, layer, move_cost)
        self.place = empty_place(problem)
        self.nodes = np.zeros((len(problem.steps.expert_ids), problem.num_nodes), np.int16)
        self.value, self.old = np.zeros(3), np.zeros((2, self.place.replicas.shape[1]), np.int64)
        ids = np.sort(problem.steps.expert_ids[:, layer], axis=1)
        repeated = bool(np.any((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)))
        self.plain = not (problem.constraints or repeated or move_cost > 0)
        self.state = seeded(seed, layer)
        self.best = np.zeros(problem.num_slots, np.int64)

    def start(self, row: np.ndarray) -> float:
        """Begin anew from int[slot]; return its cost."""
        self.place.slots[:] = self.best[:] = row
        self.value[1] = self._kernel.start(self.uses, self.place, self.nodes, self.rules, self.value, self.node_weight)
        return self.best_cost

    def change(self, slot: int, other: int, expert: int) -> float:
        """Put an expert into a slot, and what was there into another (-1: nowhere); return the new cost."""
        return float(self._kernel.change(self.uses, self.place, self.nodes, self.rules, self.value, self.old,
                                         self.node_weight, slot, other, expert))

    def anneal(self, moves: int, hot: float, cold: float) -> None:
        """Try moves at falling temperatures; `best` keeps the best slots."""
        self._kernel.anneal(self.uses, self.place, self.nodes, self.rules, self.value, self.old, self.node_weight,
                            self.best, self.state, moves, hot, cold, self.plain)

    @property
    def best_cost(self) -> float:
        """The cost of `best`."""
        return float(self.value[1])


def seeded(seed: int, layer: int) -> np.ndarray:
    """Return uint64[1], the start of a layer's own random sequence."""
    return np.maximum(np.random.SeedSequence((seed, layer)).generate_state(1, np.uint64), np.uint64(1))


def resampled(problem: PlacementProblem, times: int, seed: int) -> PlacementProblem:
    """Return the problem with its steps and `times` further dealings of their tokens into steps.

    Tokens keep their home rank, so every step keeps its tokens per rank, and what the shared experts take.
    """
    steps = problem.steps
    assert steps is not None
    if not times:
        return problem
    rng = np.random.default_rng(seed)
    deals = [np.arange(len(steps.expert_ids))]
    for _ in range(times):
        deal = deals[0].copy()
        for home in np.unique(steps.home_rank):
            own = np.flatnonzero(steps.home_rank == home)
            deal[own] = rng.permutation(own)
        deals.append(deal)
    until = getattr(steps, "until_ns", None)
    number = np.concatenate([steps.step + turn * steps.num_steps for turn in range(times + 1)])
    dealt = TimedSteps(steps.expert_ids[np.concatenate(deals)], number, np.tile(steps.home_rank, times + 1),
                       None if until is None else np.tile(until, (times + 1, 1, 1)))
    return dataclasses.replace(problem, steps=dealt)


def split_steps(problem: PlacementProblem, share: float) -> tuple[PlacementProblem, PlacementProblem | None]:
    """Return the problem with its first steps, and with the last `share` of them (None: no whole step to spare)."""
    steps = problem.steps
    assert steps is not None
    held = int(share * steps.num_steps)
    if not held:
        return problem, None
    cut = steps.num_steps - held
    return _some_steps(problem, 0, cut), _some_steps(problem, cut, steps.num_steps)


def _some_steps(problem: PlacementProblem, first: int, last: int) -> PlacementProblem:
    steps = problem.steps
    assert steps is not None
    part = slice(*steps.starts[[first, last]])
    until = getattr(steps, "until_ns", None)
    return dataclasses.replace(problem, steps=TimedSteps(
        steps.expert_ids[part], steps.step[part] - first, steps.home_rank[part],
        None if until is None else until[first:last]))
