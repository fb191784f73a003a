"""Context-coherent expert parallelism (ExFlow): tokens do not return home, they move on from layer to layer.

Every rank holds the context (keys and values) of all requests, so a token's attention can run wherever the token
is; only the dispatch of each MoE layer is left of home execution's two all-to-alls (Yao et al., arXiv 2401.08383,
"context-coherent expert parallelism"). What that costs is charged:

- **decode** (and denoising): a token starts on its home rank; the dispatch moves it to the rank of its first choice
  (the expert of the highest gate weight; of the recorded order where there are no weights), its *next home*. The
  router, shared experts and attention run where the token is, so their load follows the tokens;
- **top-k > 1**, which the published scheme leaves open: the ranks of its other experts get a copy in the same
  all-to-all and return one partial sum each to the next home in a second one (``combine``);
- **end of a pass**: an AllGather makes the context whole again on every rank. `gather` says of what: ``kv`` (the keys
  and values of all layers, which were computed where each token happened to be: what an implementation with a cache
  has to send), ``activations`` or ``ids`` of the new tokens (the published description);
- **prefill** is repeated on every rank: attention, router, dense layers and shared experts for all prompts on each,
  after an AllGather of the prompts' ids; each expert's rows are computed once, where the expert lives, and the sums
  go to every rank (an AllGather of each rank's rows for top-1, an AllReduce of all rows otherwise);
- **memory**: each rank needs room for the keys and values of all requests that are active at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, unknown
from moesim.hardware.collective import all_gather_seconds, all_reduce_seconds
from moesim.hardware.cost import CostModel
from moesim.hardware.work import Cost
from moesim.lowering.batch import context_sums, last_places
from moesim.lowering.expert_parallel import ExpertParallelProgram, LayerTraffic, layer_traffic
from moesim.lowering.work import attention_work, dense_work, head_work, router_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.placement.metrics import slot_of_token
from moesim.placement.plan import PlacementPlan
from moesim.traces.steps import Step
from moesim.traces.trace import PAD, PHASES, PREFILL, RoutingTrace
from moesim.units import format_bytes

GATHERS = ("kv", "activations", "ids")
TOKEN_ID_BYTES = 4


@dataclass(frozen=True)
class MovingTraffic(LayerTraffic):
    """Who sends what in one layer of one step; `sent` counts moves and copies.

    Attributes:
        moves: int64[rank, rank], tokens that go from where they are to their next home (sums to the tokens).
        back: int64[rank, rank], partial sums that go from an expert's rank to the token's next home.
        next_home: int32[token].
    """

    moves: np.ndarray
    back: np.ndarray
    next_home: np.ndarray


def first_choice(trace: RoutingTrace) -> np.ndarray:
    """Return int64[token, layer], the column of each token's expert of highest weight (ties: the first column)."""
    if trace.gate_weights is None:
        return np.zeros(trace.expert_ids.shape[:2], np.int64)
    return np.argmax(np.where(trace.expert_ids == PAD, -np.inf, trace.gate_weights), axis=2)


def moving_traffic(plan: PlacementPlan, slots: np.ndarray, first: np.ndarray, where: np.ndarray) -> MovingTraffic:
    """Return the traffic of one layer.

    Args:
        plan: the plan.
        slots: int32[token, k], physical slots, -1 padded. A token without any stays where it is.
        first: int64[token], the column of the first choice.
        where: int[token], the rank that holds each token now.
    """
    base, shape = layer_traffic(plan, slots, where), (plan.num_ranks, plan.num_ranks)
    tokens = np.arange(len(where))
    chosen = slots[tokens, first]
    next_home = np.where(chosen == PAD, where, plan.slot_rank[np.maximum(chosen, 0)]).astype(np.int32)
    moves = np.zeros(shape, np.int64)
    np.add.at(moves, (where, next_home), 1)
    reached = np.zeros((len(where), plan.num_ranks), bool)
    token, column = np.nonzero(slots != PAD)
    reached[token, plan.slot_rank[slots[token, column]]] = True
    reached[tokens, next_home] = False
    back = np.zeros(shape, np.int64)
    np.add.at(back.T, next_home, reached)
    idle = np.bincount(where[(slots == PAD).all(axis=1)], minlength=plan.num_ranks)
    return MovingTraffic(base.sent + np.diag(idle), base.slot_tokens, moves, back, next_home)


class ContextCoherentProgram(ExpertParallelProgram):
    """Lowers steps of a trace under a plan, context-coherent. Interchangeable with `ExpertParallelProgram`.

    Args:
        dispatch_bytes: bytes per hidden value of the copies for further experts; a token that moves takes its
            residual along, in the activations' width.
        collective: only ``closed_form``.
        gather: one of `GATHERS`.

    Attributes:
        kv_bytes_per_rank: the most bytes of keys and values that each rank holds in any step.
        gathered_bytes: bytes that AllGathers of context sent, over all ranks and steps.

    Raises:
        InputError: as there; an unknown `gather`; a context that does not fit in a rank's memory.
    """

    def __init__(self, model: ModelSpec, trace: RoutingTrace, steps: list[Step], plan: PlacementPlan, cost: CostModel,
                 *, dispatch_bytes: float | None = None, collective: str = "closed_form", gather: str = "kv") -> None:
        if collective != "closed_form":
            raise InputError(f"coherent execution knows collectives in closed form only, got collective {collective!r}")
        if gather not in GATHERS:
            raise unknown("gather", gather, GATHERS)
        super().__init__(model, trace, steps, plan, cost, dispatch_bytes=dispatch_bytes)
        self.gather, self.gathered_bytes, self._first = gather, 0, first_choice(trace)
        context = max((context_tokens(trace, step) for step in steps), default=0)
        self.kv_bytes_per_rank = context * model.kv_bytes_per_token_layer * model.num_layers
        self._check_memory(context)

    def _check_memory(self, context: int) -> None:
        model, hardware = self.model, self.cost.hardware
        experts = self.plan.slots_per_rank * model.num_moe_layers * model.expert_bytes
        memory = min(hardware.memory_of(rank).num_bytes for rank in hardware.ranks)
        free = memory - model.non_expert_bytes - experts
        if self.kv_bytes_per_rank > free:
            raise InputError(
                f"coherent execution keeps the context of all requests on every rank: {context} tokens need "
                f"{format_bytes(self.kv_bytes_per_rank)}, but {format_bytes(max(free, 0.0))} of a rank's "
                f"{format_bytes(memory)} are left beside {model.name!r}; use a smaller batch, shorter requests or "
                "fewer slots per rank")

    def _lower_step(self, step: Step, before: tuple[int, ...]) -> int:
        if step.phase == PHASES[PREFILL]:
            return self._lower_prefill(step, before)
        position, where = self.trace.position[step.rows], self.home[step.rows]
        slots, first = slot_of_token(self.plan, self.trace.expert_ids[step.rows]), self._first[step.rows]
        held = np.zeros(self.plan.num_ranks, np.int64)
        moe_index = {layer: place for place, layer in enumerate(self.model.moe_layers)}
        done: list[int] = list(before)
        for layer in range(self.model.num_layers):
            moe, tokens = moe_index.get(layer, -1), np.bincount(where, minlength=self.plan.num_ranks)
            held += tokens
            attention = self._attention(step, moe, tokens, context_sums(position, where, self.plan.num_ranks), done)
            if moe < 0:
                done = self._dense(step, tokens, attention)
            else:
                traffic = moving_traffic(self.plan, slots[:, moe], first[:, moe], where)
                done = self._lower_move(step, moe, traffic, tokens, attention)
                where = traffic.next_home
        heads = np.bincount(where[last_places(step)], minlength=self.plan.num_ranks)
        return self._end(step, heads, done, self._context_bytes(held, heads))

    def _lower_move(self, step: Step, layer: int, traffic: MovingTraffic, tokens: np.ndarray,
                    attention: list[int]) -> list[int]:
        """One MoE layer; returns what the next layer waits for: collectives, and each rank's own experts."""
        self._count(traffic)
        model, row = self.model, self.model.hidden_size * self.model.activation_bytes
        router = self._on_ranks("router", step, layer, tokens, attention, lambda r: router_work(model, int(tokens[r])))
        copy = model.hidden_size * self.dispatch_bytes
        num_bytes = traffic.moves * row + (traffic.sent - traffic.moves) * copy
        dispatched = self._send("dispatch", step, layer, traffic.sent, num_bytes, router)
        experts = self._experts(step, layer, traffic, dispatched)
        shared = self._shared(step, layer, traffic.moves.sum(axis=0), dispatched)
        back = dispatched
        if traffic.back.any():
            back = self._send("combine", step, layer, traffic.back, traffic.back * row, experts)
        return [*back, *experts, *shared]

    def _lower_prefill(self, step: Step, before: tuple[int, ...]) -> int:
        """A prefill pass: everything but experts on every rank, for all rows."""
        model, ranks, rows = self.model, self.plan.num_ranks, len(step.rows)
        home, tokens = self.home[step.rows], np.full(ranks, rows)
        context = np.full(ranks, int(np.sum(self.trace.position[step.rows] + 1)))
        slots = slot_of_token(self.plan, self.trace.expert_ids[step.rows])
        moe_index = {layer: place for place, layer in enumerate(model.moe_layers)}
        own = int(np.bincount(home, minlength=ranks).max())
        done = [self._all_gather(step, own * TOKEN_ID_BYTES, list(before))]
        for layer in range(model.num_layers):
            moe = moe_index.get(layer, -1)
            attention = self._attention(step, moe, tokens, context, done)
            if moe < 0:
                done = self._dense(step, tokens, attention)
            else:
                done = self._prefill_moe(step, moe, layer_traffic(self.plan, slots[:, moe], home), tokens, attention)
        heads = np.bincount(home[last_places(step)], minlength=ranks)
        return self._end(step, heads, done, int(heads.max()) * TOKEN_ID_BYTES)

    def _prefill_moe(self, step: Step, layer: int, traffic: LayerTraffic, tokens: np.ndarray,
                     attention: list[int]) -> list[int]:
        model, row = self.model, self.model.hidden_size * self.model.activation_bytes
        router = self._on_ranks("router", step, layer, tokens, attention, lambda r: router_work(model, int(tokens[r])))
        shared = self._shared(step, layer, tokens, router)
        experts = self._experts(step, layer, traffic, router)
        self.remote_tokens["all"] += int(traffic.sent.sum())
        if model.top_k == 1:
            block = float(traffic.sent.sum(axis=0).max()) * row
            seconds = all_gather_seconds(self.cost.hardware, block / self.cost.route_efficiency)
        else:  # a ring's reduce-scatter and its all-gather pass one block per rank each
            num_bytes = float(tokens[0]) * row
            block = 2.0 * num_bytes / self.plan.num_ranks
            seconds = all_reduce_seconds(self.cost.hardware, num_bytes / self.cost.route_efficiency)
        return [self._ring("combine", step, layer, seconds, block, [*router, *shared, *experts], int(tokens[0]))]

    def _attention(self, step: Step, layer: int, tokens: np.ndarray, context: np.ndarray, done: list[int]) -> list[int]:
        return self._on_ranks("attention", step, layer, tokens, done,
                              lambda r: attention_work(self.model, int(tokens[r]), int(context[r])))

    def _dense(self, step: Step, tokens: np.ndarray, attention: list[int]) -> list[int]:
        return self._on_ranks("dense", step, -1, tokens, attention, lambda r: dense_work(self.model, int(tokens[r])))

    def _shared(self, step: Step, layer: int, tokens: np.ndarray, deps: list[int]) -> list[int]:
        if not self.model.shared_intermediate_size:
            return []
        return self._on_ranks("shared_expert", step, layer, tokens, deps,
                              lambda r: shared_work(self.model, int(tokens[r])))

    def _end(self, step: Step, heads: np.ndarray, done: list[int], gather_bytes: float) -> int:
        """The output embedding, the AllGather of what every rank must know, and the step's last barrier."""
        head = self._on_ranks("head", step, -1, heads, done, lambda r: head_work(self.model, int(heads[r])))
        gathered = self._all_gather(step, gather_bytes, [*done, *head])
        return self.graph.barrier([gathered], step=step.index)

    def _context_bytes(self, held: np.ndarray, heads: np.ndarray) -> float:
        """Bytes that the fullest rank brings to the AllGather at a pass's end.

        `held` int64[rank] counts tokens times layers whose keys and values a rank computed, `heads` new tokens.
        """
        new = float(heads.max()) * TOKEN_ID_BYTES
        if self.gather == "kv":
            return float(held.max()) * self.model.kv_bytes_per_token_layer + new
        if self.gather == "activations":
            return float(heads.max()) * self.model.hidden_size * self.model.activation_bytes
        return new

    def _all_gather(self, step: Step, num_bytes: float, deps: list[int]) -> int:
        """Add an AllGather of `num_bytes` from every rank (a ring passes blocks of the fullest rank's size)."""
        seconds = all_gather_seconds(self.cost.hardware, num_bytes / self.cost.route_efficiency)
        if seconds:
            self.gathered_bytes += round(num_bytes * self.plan.num_ranks * (self.plan.num_ranks - 1))
        return self._ring("all_gather", step, -1, seconds, num_bytes, deps, 0)

    def _ring(self, kind: str, step: Step, layer: int, seconds: float, block_bytes: float, deps: list[int],
              tokens: int) -> int:
        """Add a ring collective of known time, in which every rank's block reaches every other rank."""
        if not seconds:  # one rank alone has nothing to exchange
            return self.graph.barrier(deps, step=step.index, layer=layer)
        source = "nameplate" if self.cost.route_efficiency == 1 else "stated"
        sent = block_bytes * self.plan.num_ranks
        self.remote_bytes["rank"] += sent * (self.plan.num_ranks - 1)
        self.remote_bytes["node"] += sent * (self.cost.hardware.num_nodes - 1)
        return self._add(kind, self._index["network"], Cost(seconds, source), deps, step, layer, tokens=tokens,
                         num_bytes=round(sent * (self.plan.num_ranks - 1)))

    def _send(self, kind: str, step: Step, layer: int, sent: np.ndarray, num_bytes: np.ndarray,
              deps: list[int]) -> list[int]:
        """Add an all-to-all of `sent` tokens and float64[rank, rank] bytes; the diagonal stays."""
        traffic = num_bytes * ~np.eye(len(sent), dtype=bool)
        self._count_bytes(traffic)
        if not traffic.any():
            return [self.graph.add("barrier", -1, 0, deps, step=step.index, layer=layer, tokens=int(sent.sum()))]
        return [self._add(kind, self._index["network"], self.cost.all_to_all(traffic), deps, step, layer,
                          tokens=int(sent.sum()), num_bytes=round(traffic.sum()))]


def context_tokens(trace: RoutingTrace, step: Step) -> int:
    """Return the cached tokens of a step's requests, the step's own included."""
    return int(np.sum(trace.position[step.rows[last_places(step)]].astype(np.int64) + 1))
