"""When expert-parallel steps end, by a recurrence over layers and ranks instead of tasks and events.

Exact, because no queue of `ExpertParallelProgram` (closed form) ever has a choice to make:

- all ranks meet at the barrier of every MoE layer, which waits for every task of the layer, so nothing runs or waits
  beyond it; before it a rank's own tasks form a chain (attention, router or dense part, shared experts);
- a rank's shared experts are ready when its router ends, at which instant nothing else of it can be waiting: its
  experts are ready when the dispatch ends, which is not before the last router. Where both fall on one instant (this
  router is the last, and nothing was to be sent), the shared experts go first: equal priority, equal ready time,
  lower id. So experts start at the later of dispatch and own shared experts;
- the network holds one all-to-all at a time: combine waits for experts, which wait for dispatch;
- a step ends with its last head. Heads exist on every rank with rows (a rank's last row ends some request), so no
  dense layer at the end of a model outlives its step. Steps made by hand could break that; `step_times` refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.expert_parallel_loads import LoadCounter, StepLoads
from moesim.lowering.expert_parallel_prices import StepPrices, price_steps
from moesim.model.spec import ModelSpec

PARTS = ("ranks", "dispatch", "experts", "combine", "shared_tail")


@dataclass(frozen=True)
class StepTimes:
    """When steps end that follow one another from time 0, and what their time goes to; read-only arrays.

    Attributes:
        parts_ns: int64[step, part in `PARTS`]; a step's parts sum to its time. ``ranks``: until the slowest rank has
            done attention, router and dense layers, and the heads; ``dispatch`` and ``combine``: the all-to-alls;
            ``experts``: from the end of the dispatch to the last expert, waiting for shared experts included;
            ``shared_tail``: shared experts that outlast the combine.
        experts_ns: int64[step], the experts of the slowest rank of each layer, summed over layers.
        remote_bytes: float64[step, 4], bytes dispatched and bytes combined that leave their rank, then those that
            leave their node.
    """

    parts_ns: np.ndarray
    experts_ns: np.ndarray
    remote_bytes: np.ndarray

    def __post_init__(self) -> None:
        for part in fields(self):
            getattr(self, part.name).setflags(write=False)

    @property
    def duration_ns(self) -> np.ndarray:
        """int64[step]."""
        return self.parts_ns.sum(axis=1)

    @property
    def end_ns(self) -> np.ndarray:
        """int64[step], as the barrier at the end of each step completes."""
        return np.cumsum(self.duration_ns)


def step_times(loads: StepLoads, model: ModelSpec, cost: CostModel, *,
               dispatch_bytes: float | None = None) -> StepTimes:
    """Return the times of steps on one machine; many machines share the loads.

    Args and raises as `expert_parallel_prices.price_steps`; also

    Raises:
        InputError: a model that ends with a dense layer, and a step in which a rank has rows but no request ends its
            rows there (that rank's work could reach into the next step).
    """
    prices = price_steps(loads, model, cost, dispatch_bytes=dispatch_bytes)
    return times_of(loads, prices)


def times_of(loads: StepLoads, prices: StepPrices) -> StepTimes:
    """Return the times of priced steps; raises as `step_times`."""
    from moesim.lowering.kernels.expert_parallel_times import step_parts

    if not prices.is_moe[-1] and ((loads.tokens > 0) & (loads.heads == 0)).any():
        raise InputError("step times: the model ends with a dense layer, and some rank has rows but no head in a step; "
                         "run the tasks instead")
    parts, slowest = np.empty((loads.num_steps, len(PARTS)), np.int64), np.empty(loads.num_steps, np.int64)
    rows, heads = (np.require(column, np.int64, ["C", "W"]) for column in (loads.tokens, loads.heads))
    step_parts(prices.is_moe, rows, heads, prices.dense.ns, prices.experts.ns, prices.exchange.ns, parts, slowest)
    by_step = prices.traffic.remote.sum(axis=2)  # [kind, step, rank or node]
    remote = np.moveaxis(by_step, 2, 0).reshape(4, -1).T
    return StepTimes(parts, slowest, remote)


def program_times(program: ExpertParallelProgram, steps_per_window: int = 64) -> StepTimes:
    """Return the times of a program's steps; loads are made and dropped window by window.

    The program is not run; its cost model counts sources as if it were.

    Raises:
        InputError: as `step_loads` and `step_times`.
    """
    counter, count = LoadCounter(program), len(program.steps)
    parts = [step_times(counter.count(first, min(first + steps_per_window, count)), program.model, program.cost,
                        dispatch_bytes=program.dispatch_bytes) for first in range(0, count, steps_per_window)]
    return StepTimes(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(StepTimes)))


def step_ends_ns(program: ExpertParallelProgram) -> np.ndarray:
    """Return int64[step], when each step of a program ends: what an executor of its tasks finds, without tasks.

    Raises:
        InputError: as `program_times`.
    """
    return program_times(program).end_ns
