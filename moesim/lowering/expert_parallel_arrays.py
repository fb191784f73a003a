"""`ExpertParallelProgram` lowered in whole windows of steps, without Python per task.

The readable program is the specification: columns, ids, dependencies, labels, sources and counts are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.expert_parallel_loads import LoadCounter, StepLoads
from moesim.lowering.expert_parallel_prices import DENSE_KINDS, EXCHANGES, StepPrices, price_steps
from moesim.lowering.graph import KINDS, LABELS, NONE
from moesim.lowering.task_arrays import TaskArrays

_EMITTED = (*DENSE_KINDS, *EXCHANGES, "experts", "barrier")


def supports(program: object) -> bool:
    """Return whether `windows`, `lower_steps` and `step_loads` know this program.

    They know `ExpertParallelProgram` itself with its collective in closed form and no balancer; ranks may be of
    several kinds. Subclasses (context-coherent execution) lower other tasks.
    """
    return (type(program) is ExpertParallelProgram and program.collective == "closed_form"
            and program._options.name == "none")


def lower_steps(program: ExpertParallelProgram) -> TaskArrays:
    """Return all tasks of a program; what `windows` says holds.

    Raises:
        InputError: as `windows`.
    """
    return next(windows(program, max(1, len(program.steps))))


def windows(program: ExpertParallelProgram, steps_per_window: int = 64) -> Iterator[TaskArrays]:
    """Yield the tasks of a program, some whole steps at a time.

    As when the program runs by itself: ``program.steps`` get their first and last tasks, ``program.remote_tokens`` and
    ``remote_bytes`` and the cost model's counts of sources grow. ``program.graph`` stays empty.

    Args:
        program: one that `supports` holds for, not run before.
        steps_per_window: how many steps each window holds (fewer in the last).

    Raises:
        InputError: steps with rows that the trace does not have; costs that the machine cannot give.
    """
    counter, first = LoadCounter(program), 0
    for start in range(0, len(program.steps), steps_per_window):
        loads = counter.count(start, min(start + steps_per_window, len(program.steps)))
        prices = price_steps(loads, program.model, program.cost, dispatch_bytes=program.dispatch_bytes)
        arrays = _tasks(program, loads, prices, start, first)
        _count(program, loads, prices)
        first += len(arrays)
        yield arrays


def _tasks(program: ExpertParallelProgram, loads: StepLoads, prices: StepPrices, start: int, first: int) -> TaskArrays:
    from moesim.lowering.kernels.expert_parallel_tasks import add_steps

    records = program.steps[start:start + loads.num_steps]
    before = program.steps[start - 1].last_task if start else NONE
    ends = np.empty((len(records), 2), np.int64)
    columns = _columns(_sizes(loads, prices))
    codes = np.array([KINDS.index(kind) for kind in _EMITTED])
    index = np.array([record.step.index for record in records], np.int64)
    add_steps(columns, _works(loads, prices, index), codes, prices.is_moe, prices.shared, first, before, ends)
    for record, (own_first, own_last) in zip(records, ends.tolist(), strict=True):
        record.first_task, record.last_task = own_first, own_last
    return _arrays(program, columns, first)


def _sizes(loads: StepLoads, prices: StepPrices) -> tuple[int, int]:
    """Return how many tasks the steps have, and no fewer dependencies than they have."""
    rows, heads = int((loads.tokens > 0).sum()), int((loads.heads > 0).sum())
    experts, layers = int((loads.expert_tokens > 0).sum()), loads.num_layers
    beside, dense = (2 if prices.shared else 1) * layers, len(prices.is_moe) - layers
    barriers = 3 * layers * loads.num_steps
    tasks = rows * (layers + beside + 2 * dense) + experts + barriers + heads + loads.num_steps
    return tasks, tasks + rows * beside + experts + heads + barriers


def _columns(sizes: tuple[int, int]) -> Any:
    from moesim.lowering.kernels.expert_parallel_tasks import Columns

    tasks, deps = sizes
    ints = [np.empty(tasks, np.int64) for _ in range(4)]
    return Columns(np.zeros(2, np.int64), np.empty(tasks, np.int16), np.empty(tasks, np.int32),
                   np.empty(tasks, np.int64), np.empty(tasks, np.int16), np.zeros(tasks + 1, np.int64),
                   np.empty(deps, np.int64), np.empty(tasks, np.float64), np.full(tasks, NONE, np.int64), *ints)


def _works(loads: StepLoads, prices: StepPrices, index: np.ndarray) -> Any:
    from moesim.lowering.kernels.expert_parallel_tasks import Works

    rows, heads = (np.require(column, np.int64, ["C", "W"]) for column in (loads.tokens, loads.heads))
    tokens = loads.expert_tokens.astype(np.int64)
    return Works(index, rows, heads, prices.dense.ns, prices.dense.source + np.int8(1), prices.dense_flops,
                 prices.dense_bytes, prices.experts.ns, prices.experts.source + np.int8(1), tokens,
                 (tokens * prices.expert_flops).astype(np.float64),
                 loads.expert_groups * float(prices.expert_bytes), prices.exchange.ns,
                 prices.exchange.source + np.int8(1), prices.traffic.num_bytes,
                 loads.moved.sum(axis=2) + loads.stayed)


def _arrays(program: ExpertParallelProgram, columns: Any, first: int) -> TaskArrays:
    tasks, deps = columns.at.tolist()
    labels = {name: np.full(tasks, NONE, np.int64) for name in ("expert", "slot", "chunk")}
    labels |= {"rank": columns.rank, "step": columns.step, "layer": columns.layer, "tokens": columns.tokens,
               "context": np.zeros(tasks, np.int64), "num_bytes": columns.num_bytes}
    return TaskArrays(program.graph.resources, columns.kind, columns.resource, columns.duration,
                      np.zeros(tasks, np.int64), columns.source, columns.offsets, columns.deps[:deps],
                      columns.flops, {name: labels[name] for name in LABELS}, first=first)


def _count(program: ExpertParallelProgram, loads: StepLoads, prices: StepPrices) -> None:
    """Add to the program's counts of tokens and bytes that leave their rank, all-to-all by all-to-all."""
    moved = loads.moved.sum(axis=(0, 1)).tolist()
    for name, tokens in (("rank", sum(moved)), ("node", moved[1]), ("all", sum(moved) + int(loads.stayed.sum()))):
        program.remote_tokens[name] += tokens
    by_exchange = np.moveaxis(prices.traffic.remote, 0, 2).reshape(-1, 2)  # dispatch, combine, dispatch, ...
    for place, name in enumerate(program.remote_bytes):
        sums = np.cumsum(np.concatenate([[program.remote_bytes[name]], by_exchange[:, place]]))
        program.remote_bytes[name] = float(sums[-1])
