"""Per-batch balancers of expert parallelism: who computes each token of an expert, decided after every router.

``lp`` splits replicated experts of any plan, ``lplb`` those of an LPLB plan over its two homes, ``llep`` sends spilled
experts' weights to helpers. All need the counts of the whole batch first: an exchange of counts and the time to solve
are on the critical path of every layer, and so are LLEP's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, unknown
from moesim.lowering.batch import expert_counts
from moesim.placement.llep import spill_plan
from moesim.placement.lplb import METHODS, split_tokens
from moesim.placement.plan import PlacementPlan
from moesim.placement.split import split_layer
from moesim.traces.trace import PAD

BALANCERS = ("none", "lp", "lplb", "llep")
COUNT_BYTES = 4  # of one expert's tokens on one rank
DEFAULT_SOLVE_S = 1e-4  # LPLB's README: about 100 us inside a node; stated, not measured
_NONE = np.zeros((0, 0), np.int64)


@dataclass(frozen=True)
class BalancerOptions:
    """How a batch is balanced.

    Attributes:
        name: one of `BALANCERS`.
        solve_s: seconds that every rank spends on the decision, per MoE layer (the host's part included).
        method: ``exact`` or ``interior_point`` (LPLB's five iterations); for ``lplb``.
        alpha, min_tokens, gate, gate_on: LLEP's parameters, see `placement.llep.spill_plan`.
    """

    name: str = "none"
    solve_s: float = DEFAULT_SOLVE_S
    method: str = "exact"
    alpha: float = 1.0
    min_tokens: int = 1024
    gate: float = 1.3
    gate_on: str = "ranks"

    def __post_init__(self) -> None:
        if self.name not in BALANCERS:
            raise unknown("balancer", self.name, BALANCERS)
        if self.method not in METHODS:
            raise unknown("balancer method", self.method, METHODS)
        if not 0 <= self.solve_s < float("inf"):
            raise InputError(f"balancer: solve_s must be finite and not negative, got {self.solve_s}")


@dataclass(frozen=True)
class Assignment:
    """Who computes what in one layer of one batch.

    Attributes:
        rank: int32[token, k], the rank that computes each (token, expert); -1 padded.
        group_tokens: int64[rank, group], rows of each expert copy on each rank.
        weights: int64[rank, rank], experts whose weights go from rank to rank first (LLEP).
    """

    rank: np.ndarray
    group_tokens: np.ndarray
    weights: np.ndarray


Balancer = Callable[[int, np.ndarray], Assignment]


def make_balancer(options: BalancerOptions, plan: PlacementPlan, r2o: np.ndarray | None = None) -> Balancer | None:
    """Return ``(layer, expert_ids int16[token, k]) -> Assignment`` for a plan; None for ``none``.

    Args:
        options: the balancer and its parameters.
        plan: where the copies are.
        r2o: LPLB's graph, int[rank, K]; read from the plan where None.

    Raises:
        InputError: ``lplb`` with a plan that is not LPLB's, ``llep`` with a plan that has replicas.
    """
    if options.name == "none":
        return None
    if options.name == "llep":
        if plan.num_slots != plan.num_experts:
            raise InputError(f"balancer llep needs a plan without replicas, but this one has {plan.num_slots} slots for "
                             f"{plan.num_experts} experts")
        return lambda layer, ids: _spilled(options, plan, layer, ids)
    graph = None
    if options.name == "lplb":
        graph = lplb_graph(plan) if r2o is None else r2o
    return lambda layer, ids: _split(options, plan, layer, ids, graph)


def lplb_graph(plan: PlacementPlan) -> np.ndarray:
    """Return ``r2o`` int64[rank, K] of a plan made by `placement.lplb.lplb_plan`; raises InputError for another plan."""
    ranks, size = plan.num_ranks, plan.slots_per_rank
    extra = (plan.num_slots - plan.num_experts) // ranks
    slots = plan.physical_to_logical.reshape(plan.num_layers, ranks, size)
    own, copied = slots[:, :, :size - extra], slots[:, :, size - extra:]
    graph = np.full((ranks, extra), -1, np.int64)
    for k in range(extra):
        hits = copied[:, :, None, k] == own[:, None, :, k]  # [layer, rank, source]
        graph[:, k] = np.where(hits.all(axis=0).any(axis=1), hits.all(axis=0).argmax(axis=1), -1)
    if extra < 1 or graph.min() < 0:
        raise InputError("balancer lplb needs a plan of LPLB (each rank's last slots copy the heaviest experts of a "
                         "fixed other rank, placement.lplb.lplb_plan); use balancer lp for other plans")
    return graph


def prefix_counts(tokens: np.ndarray, slots: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Return int64[slot], whole tokens per slot: the cumulated fractional `tokens` of each expert's slots, rounded.

    Every expert's slots, in rising order, sum to its load; no slot is off by a token or more.
    """
    order = np.argsort(slots, kind="stable")
    sums = np.cumsum(tokens[order])
    copies = np.bincount(slots, minlength=len(load))
    ends = np.cumsum(copies)
    before = np.concatenate([[0.0], sums])[ends - copies]
    upto = np.rint(sums - np.repeat(before, copies)).astype(np.int64)
    upto[ends - 1] = load  # rounding of the sums must not lose a token
    upto = np.minimum(upto, np.repeat(load, copies))
    whole = np.diff(upto, prepend=0)
    whole[(ends - copies)] = upto[ends - copies]
    result = np.empty_like(whole)
    result[order] = whole
    return result


def _split(options: BalancerOptions, plan: PlacementPlan, layer: int, ids: np.ndarray,
           graph: np.ndarray | None) -> Assignment:
    """Split replicated experts: the first tokens of an expert go to its first slot, the next to its second ..."""
    load, slots = expert_counts(ids, plan.num_experts), plan.physical_to_logical[layer]
    if graph is None:
        tokens = split_layer(slots, load, plan.num_ranks).tokens
    else:
        tokens = split_tokens(slots, load, graph, options.method)
    counts = prefix_counts(tokens, slots, load)
    order = np.argsort(slots, kind="stable")
    chosen = _in_turn(ids, np.repeat(order, counts[order]))
    rank = np.where(chosen == PAD, PAD, plan.slot_rank[np.maximum(chosen, 0)])
    return Assignment(rank.astype(np.int32), counts.reshape(plan.num_ranks, -1), _NONE)


def _spilled(options: BalancerOptions, plan: PlacementPlan, layer: int, ids: np.ndarray) -> Assignment:
    load = expert_counts(ids, plan.num_experts)
    native = np.empty(plan.num_experts, np.int64)
    native[plan.physical_to_logical[layer]] = plan.slot_rank
    spill = spill_plan(load, native, plan.num_ranks, alpha=options.alpha, min_tokens=options.min_tokens,
                       gate=options.gate, gate_on=options.gate_on)
    parts = sorted(spill.parts, key=lambda part: (part.expert, part.start))
    sizes = [part.end - part.start for part in parts]
    rank = _in_turn(ids, np.repeat(np.array([part.rank for part in parts], np.int64), sizes))
    groups = np.zeros((plan.num_ranks, plan.num_experts), np.int64)
    for part, size in zip(parts, sizes, strict=True):
        groups[part.rank, part.expert] += size
    weights = np.zeros((plan.num_ranks, plan.num_ranks), np.int64)
    for one in spill.transfers:
        weights[one.source, one.target] += 1
    return Assignment(rank.astype(np.int32), groups, weights)


def _in_turn(ids: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Return int64[token, k]: `answers`, sorted by expert, dealt to the uses of each expert in order; -1 padded."""
    flat = ids.ravel()
    used = np.flatnonzero(flat != PAD)
    order = used[np.argsort(flat[used], kind="stable")]
    dealt = np.full(len(flat), PAD, np.int64)
    dealt[order] = answers
    return dealt.reshape(ids.shape)
