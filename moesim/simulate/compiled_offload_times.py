"""What an offloaded run took, without its task table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesim.lowering.offload import OffloadProgram
from moesim.simulate.execution import Execution
from moesim.simulate.result import DONE


class ResourceWork(NamedTuple):
    """What a resource did of one kind: tasks that ran, their bytes, and how long they took."""

    resource: str
    kind: str
    num_tasks: int
    num_bytes: int
    busy_ns: int


@dataclass(frozen=True)
class OffloadTimes:
    """A run without its task table.

    Attributes:
        step_end_ns: int64[step], when each step's last task ended.
        makespan_ns: when the last task of all ended (copies in the background may outlast the last step).
        cache_counts: int64[layer] by the names in `CACHE_COLUMNS`.
        work: by resource and kind, in that order; kinds that never ran are left out.
        num_tasks: tasks in all, barriers and cancelled ones included.
        num_cancelled: tasks that were cancelled.
        cost_sources: tasks that ran on a resource, by the source of their cost.
    """

    step_end_ns: np.ndarray
    makespan_ns: int
    cache_counts: dict[str, np.ndarray]
    work: tuple[ResourceWork, ...]
    num_tasks: int
    num_cancelled: int
    cost_sources: dict[str, int]

    def busy_ns(self, resource: str) -> int:
        """Return how long a resource worked."""
        return sum(part.busy_ns for part in self.work if part.resource == resource)


def times_of(program: OffloadProgram, execution: Execution) -> OffloadTimes:
    """Return what `offload_times` gives, from a whole task table (and the program that made it)."""
    arrays, done = execution.arrays, execution.state == DONE
    names = [resource.name for resource in arrays.resources]
    work = []
    real = np.flatnonzero(done & (arrays.resource >= 0))
    pairs = arrays.resource[real].astype(np.int64) * len(arrays.kinds) + arrays.kind[real]
    for pair in np.unique(pairs).tolist():
        resource, kind = divmod(pair, len(arrays.kinds))
        tasks = real[pairs == pair]
        work.append(ResourceWork(names[resource], arrays.kinds[kind], len(tasks),
                                 int(arrays.labels["num_bytes"][tasks].sum()), int(arrays.duration_ns[tasks].sum())))
    sources = np.bincount(arrays.source[real], minlength=len(arrays.sources))
    counted = {name: int(count) for name, count in zip(arrays.sources, sources, strict=True) if name and count}
    ends = execution.end_ns[[record.last_task for record in program.steps]]
    return OffloadTimes(ends, int(execution.end_ns.max()), program.cache_counts, tuple(sorted(work)), len(arrays),
                        int(np.sum(~done)), counted)
