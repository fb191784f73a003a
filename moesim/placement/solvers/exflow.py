"""ExFlow: keep a token's successive experts together, by integer programs for the nodes, then for each node's GPUs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from moesim.errors import InputError, unknown
from moesim.placement.bounds import affinity_bound, counted_transitions
from moesim.placement.exflow_metric import hop_metric
from moesim.placement.metrics import imbalance
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.result import SolveResult, SolveStatus
from moesim.placement.solvers._exflow_program import Split, crossing, forward_split, solve_split
from moesim.placement.solvers._homes import homes_from_plan, slots_from_homes

MODES = ("bipartition", "direct")
BACKENDS = ("cpsat", "pulp")
_BOUND_CELLS = 2**20  # entries of the transitions up to which the b-matching bound takes about a second
_MEETS = 1e-12


def exflow(problem: PlacementProblem, *, seed: int, time_limit_s: float, mode: str = "bipartition",
           backend: str = "cpsat", sub_limit_s: float = 60.0, warm_start: bool = True, chunk_tokens: int = 0,
           starts: Sequence[PlacementPlan] = ()) -> SolveResult:
    """Minimise the hops of tokens from layer to layer as ExFlow does (Yao et al., arXiv 2401.08383, IPDPS 2024).

    Two stages: the experts are split over the nodes (fewest transitions that leave their node), then each node's
    experts over its ranks, each layer into equal parts (`_exflow_program.solve_split` has the program). `mode`
    ``bipartition`` halves again and again, as the released code does by default: nodes and ranks per node must be
    powers of two; the id of a part is twice that of the half it came from, plus 0 or 1. ``direct`` solves each stage
    as one program.

    The program's linear relaxation is 0 (every expert spread evenly over all parts crosses nowhere), so searches run
    into their limit beyond small sizes: `sub_limit_s` seconds each (the paper's 60), and in proportion to the pairs of
    experts within `time_limit_s` together. Each program is told of a greedy forward pass (`warm_start`; False: it
    starts cold, and experts in blocks are the fall-back) or of the same cut of a plan in `starts`. With `chunk_tokens`
    the whole is solved on the first so many tokens, then twice as many, each time from the plan before, as the paper
    does with 5,000.

    The result's objective is ExFlow's cost per transition (`objectives` ``hops``: 0 same rank, 1 same node, 2 other
    node), never worse than that of any of `starts`; its bound is that of b-matchings, for up to 2**20 pairs of experts.
    Equal counts of experts, not of tokens, go to each rank: provenance has the imbalance too. Slots beyond one per
    expert hold copies of the rank's own experts, which changes nothing. Complexity: exponential.

    Raises:
        InputError: no transitions; experts that do not divide over the ranks; numbers of parts that are no powers of
            two; `chunk_tokens` without recorded steps; an option out of range.
    """
    started_s = time.perf_counter()
    _check(problem, mode, backend, sub_limit_s, chunk_tokens)
    search = _Staged(problem, mode, backend, sub_limit_s, warm_start, seed)
    known = [plan for plan in starts if homes_from_plan(plan) is not None]
    homes = [home for plan in known if (home := homes_from_plan(plan)) is not None]
    rounds = [*_chunks(problem, chunk_tokens), counted_transitions(problem)]
    for done, transitions in enumerate(rounds):
        left_s = started_s + time_limit_s - time.perf_counter()
        homes = [search.solve(transitions, homes, left_s / (len(rounds) - done)), *homes]
    slots = slots_from_homes(homes[0], problem.num_ranks, problem.slots_per_rank)
    plan = PlacementPlan(slots, problem.num_ranks, problem.num_experts)
    hops = OBJECTIVES["hops"]
    best = min([plan, *starts], key=lambda one: hops.value(problem, one))
    facts = search.facts(best) | {"from_start": best is not plan}
    return _result(problem, PlacementPlan(best.physical_to_logical, best.num_ranks, best.num_experts, facts,
                                          best.slot_share), seed, started_s)


def _result(problem: PlacementProblem, plan: PlacementPlan, seed: int, started_s: float) -> SolveResult:
    hops = OBJECTIVES["hops"]
    value, bound = hops.value(problem, plan), None
    if counted_transitions(problem).size <= _BOUND_CELLS:
        bound = max(0.0, 2.0 - affinity_bound(problem, "node") - affinity_bound(problem, "rank"))
    met = bound is not None and value <= bound + _MEETS
    return SolveResult(
        solver="exflow", status=SolveStatus.OPTIMAL if met else SolveStatus.FEASIBLE, plan=plan,
        objective_name=hops.unit, objective=value, objective_bound=bound, time_s=time.perf_counter() - started_s,
        seed=seed, sense=hops.sense, bound_method="" if bound is None else "b-matching")


def _check(problem: PlacementProblem, mode: str, backend: str, sub_limit_s: float, chunk_tokens: int) -> None:
    if mode not in MODES:
        raise unknown("exflow mode", mode, MODES)
    if backend not in BACKENDS:
        raise unknown("exflow backend", backend, BACKENDS)
    if not sub_limit_s > 0 or chunk_tokens < 0:
        raise InputError(f"exflow: needs sub_limit_s > 0 and chunk_tokens >= 0, got {sub_limit_s} and {chunk_tokens}")
    counted_transitions(problem)
    if problem.num_experts % problem.num_ranks:
        raise InputError(f"exflow: it puts equally many experts of a layer on every rank, but {problem.num_experts} "
                         f"experts do not divide over {problem.num_ranks} ranks")
    levels = {"nodes": problem.num_nodes, "ranks per node": problem.ranks_per_node}
    for words, count in levels.items():
        if mode == "bipartition" and count & (count - 1):
            raise InputError(f"exflow: mode 'bipartition' halves again and again, but {count} {words} are no power of "
                             "two; use mode 'direct'")
    if chunk_tokens and problem.steps is None:
        raise InputError("exflow: chunk_tokens needs the routing token by token (a problem with steps), not counts")


def _chunks(problem: PlacementProblem, chunk_tokens: int) -> list[np.ndarray]:
    """Return the transitions of the first 1, 2, ... chunks of tokens, the whole left out."""
    if not chunk_tokens or problem.steps is None:
        return []
    ids, experts = problem.steps.expert_ids.astype(np.int64), problem.num_experts
    found, counts = [], np.zeros((problem.num_layers - 1, experts * experts))
    for start in range(0, len(ids) - chunk_tokens, chunk_tokens):
        part = ids[start:start + chunk_tokens]
        pairs = part[:, :-1, :, None] * experts + part[:, 1:, None, :]
        real = (part[:, :-1, :, None] >= 0) & (part[:, 1:, None, :] >= 0)
        for layer in range(len(counts)):
            counts[layer] += np.bincount(pairs[:, layer][real[:, layer]], minlength=experts * experts)
        found.append(counts.reshape(-1, experts, experts).copy())
    return [one for one in found if one.any(axis=(1, 2)).all()]


class _Staged:
    """Nodes first, then the ranks of each node; keeps count of its programs."""

    def __init__(self, problem: PlacementProblem, mode: str, backend: str, sub_limit_s: float, warm_start: bool,
                 seed: int) -> None:
        self.problem, self.mode, self.backend, self.seed = problem, mode, backend, seed
        self.sub_limit_s, self.warm_start = sub_limit_s, warm_start
        self.counts = {"programs": 0, "proved": 0, "kept_start": 0}
        self.transitions = np.zeros(0)
        self.starts: list[np.ndarray] = []
        self.until_s = self.weight_left = 0.0

    def solve(self, transitions: np.ndarray, starts: list[np.ndarray], limit_s: float) -> np.ndarray:
        """Return int64[layer, expert] home ranks within `limit_s` seconds."""
        problem, width = self.problem, self.problem.ranks_per_node
        self.transitions, self.starts, self.until_s = transitions, starts, time.perf_counter() + limit_s
        inside = problem.num_experts // problem.num_nodes
        self.weight_left = (self._weight(problem.num_experts, problem.num_nodes)
                            + problem.num_nodes * self._weight(inside, width))
        everyone = np.tile(np.arange(problem.num_experts), (problem.num_layers, 1))
        node = self._split(everyone, problem.num_nodes, problem.num_ranks)
        homes = np.empty_like(node)
        for number in range(problem.num_nodes):
            members = everyone[node == number].reshape(problem.num_layers, inside)
            rank = self._split(members, width, width)
            homes[node == number] = (number * width + rank).ravel()
        return homes

    def facts(self, plan: PlacementPlan) -> dict[str, object]:
        """Return what provenance says: programs, ExFlow's figures, and the imbalance that the objective ignores."""
        hops = hop_metric(plan, counted_transitions(self.problem), self.problem.ranks_per_node)
        load = self.problem.expert_load
        return {**self.counts, "hops": hops._asdict(), "imbalance": float(imbalance(plan, load).mean())}

    def _weight(self, members: int, num_parts: int) -> float:
        """Return the work of a split: pairs of experts, over all its programs."""
        if num_parts == 1:
            return 0.0
        if self.mode == "direct":
            return float(members**2)
        return members**2 + 2 * self._weight(members // 2, num_parts // 2)

    def _split(self, members: np.ndarray, num_parts: int, num_ranks: int) -> np.ndarray:
        """Return int64[layer, member] parts of int64[layer, member] experts, which get `num_ranks` ranks in all."""
        if num_parts == 1:
            return np.zeros_like(members)
        if self.mode == "direct":
            return self._program(members, num_parts, num_ranks)
        half = self._program(members, 2, num_ranks)
        parts = np.empty_like(half)
        for side in (0, 1):
            own = members[half == side].reshape(len(members), -1)
            inner = self._split(own, num_parts // 2, num_ranks // 2)
            parts[half == side] = (side * (num_parts // 2) + inner).ravel()
        return parts

    def _program(self, members: np.ndarray, num_parts: int, num_ranks: int) -> np.ndarray:
        rows = members[:-1, :, None], members[1:, None, :]
        own = self.transitions[np.arange(len(members) - 1)[:, None, None], *rows]
        weight = float(members.shape[1] ** 2)
        left_s = max(0.0, self.until_s - time.perf_counter())
        limit_s = min(self.sub_limit_s, left_s * weight / self.weight_left)
        self.weight_left = max(weight, self.weight_left - weight)
        start = self._start(own, members, num_parts, num_ranks)
        split = solve_split(own, start, backend=self.backend, limit_s=limit_s, seed=self.seed,
                            hint=self.warm_start or bool(self.starts))
        self._record(split)
        return split.parts

    def _start(self, own: np.ndarray, members: np.ndarray, num_parts: int, num_ranks: int) -> np.ndarray:
        """Return the best split at hand: greedy or blocks, and that of each plan to start from that has one here.

        A plan has one where these experts are all that some aligned block of `num_ranks` of its ranks holds, whichever:
        splits number their parts anew.
        """
        room = members.shape[1] // num_parts
        blocks = np.tile(np.arange(members.shape[1]) // room, (len(members), 1))
        found = [forward_split(own, num_parts) if self.warm_start else blocks]
        for homes in self.starts:
            here = np.take_along_axis(homes, members, axis=1)
            parts = (here - here.min() // num_ranks * num_ranks) // (num_ranks // num_parts)
            counts = [np.bincount(row, minlength=num_parts) for row in np.clip(parts, 0, num_parts - 1)]
            if parts.min() >= 0 and parts.max() < num_parts and np.all(np.array(counts) == room):
                found.append(parts)
        return min(found, key=lambda parts: crossing(own, parts))

    def _record(self, split: Split) -> None:
        self.counts["programs"] += 1
        self.counts["proved"] += int(split.crossing <= split.bound * (1 + _MEETS))
        self.counts["kept_start"] += int(not split.improved)
