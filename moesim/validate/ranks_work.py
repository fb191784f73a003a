"""What the ranks of an expert-parallel step hold and send under a plan, from the trace and the plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.lowering.batch import context_sums, home_ranks, last_places
from moesim.lowering.expert_parallel import LayerTraffic, layer_traffic
from moesim.placement.metrics import slot_of_token
from moesim.placement.plan import PlacementPlan
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace


@dataclass(frozen=True)
class RankStep:
    """One rank's own tokens in one step.

    Attributes:
        rows: int64[token], rows of the trace.
        slots: int32[token, layer, k], the physical slot that computes each use of an expert; -1 pads.
        context: cached tokens that the rows attend to in sum, themselves included.
        heads: int64[request], which of the tokens are the last of their request.
    """

    rows: np.ndarray
    slots: np.ndarray
    context: int
    heads: np.ndarray


@dataclass(frozen=True)
class StepWork:
    """One step of all ranks.

    Attributes:
        home: int32[token], the rank of each token's context.
        ranks: each rank's own part.
        traffic: per layer, who sends what to whom and what each slot computes.
    """

    step: Step
    home: np.ndarray
    ranks: tuple[RankStep, ...]
    traffic: tuple[LayerTraffic, ...]

    @property
    def tokens(self) -> np.ndarray:
        """int64[rank], tokens at home on each rank."""
        return np.array([len(part.rows) for part in self.ranks], np.int64)

    @property
    def context(self) -> np.ndarray:
        """int64[rank], cached tokens that each rank's tokens attend to."""
        return np.array([part.context for part in self.ranks], np.int64)

    @property
    def heads(self) -> np.ndarray:
        """int64[rank], requests whose last token is on each rank."""
        return np.array([len(part.heads) for part in self.ranks], np.int64)

    def expert_loads(self, layer: int) -> np.ndarray:
        """int64[rank, 3]: rows of each rank's experts, slots with rows, rows of the fullest slot."""
        per_rank = self.traffic[layer].slot_tokens.reshape(len(self.ranks), -1)
        return np.stack([per_rank.sum(axis=1), np.count_nonzero(per_rank, axis=1), per_rank.max(axis=1)], axis=1)

    def busiest_tokens(self, layer: int) -> int:
        """Tokens that the busiest rank sends to others, or receives from them, whichever is more."""
        sent = self.traffic[layer].sent
        away = sent - np.diag(np.diag(sent))
        return int(max(away.sum(axis=0).max(), away.sum(axis=1).max()))


def step_works(trace: RoutingTrace, plan: PlacementPlan, steps: Sequence[Step]) -> list[StepWork]:
    """Return the work of every step; raises InputError for a trace that is not the plan's."""
    homes = home_ranks(trace, plan.num_ranks)
    return [_step_work(trace, plan, step, homes[step.rows]) for step in steps]


def _step_work(trace: RoutingTrace, plan: PlacementPlan, step: Step, home: np.ndarray) -> StepWork:
    slots = slot_of_token(plan, trace.expert_ids[step.rows])
    context = context_sums(trace.position[step.rows], home, plan.num_ranks)
    is_last = np.zeros(len(step.rows), bool)
    is_last[last_places(step)] = True
    parts = []
    for rank in range(plan.num_ranks):
        own = np.flatnonzero(home == rank)
        parts.append(RankStep(step.rows[own], slots[own], int(context[rank]), np.flatnonzero(is_last[own])))
    traffic = tuple(layer_traffic(plan, slots[:, layer], home) for layer in range(plan.num_layers))
    return StepWork(step, home, tuple(parts), traffic)
