"""The walk back from every idle interval of a resource."""

from __future__ import annotations

import numba
import numpy as np

from moesim.simulate.kernels.borrow import borrow
from moesim.simulate.kernels.critical_path import Run, latest_before


@numba.njit(cache=True, nogil=True)
def split_idle(owned: Run, order: np.ndarray, cause: np.ndarray, origin: int, spent: np.ndarray) -> None:
    """Add to spent, int64[cause] (the last: nothing ran that it waited for), the idle time before each task of `order`.

    Args:
        order: int64[...], the tasks of one resource by their start. cause: int16[task]. origin: the beginning of time.
    """
    run = Run(borrow(owned.resource), borrow(owned.kind), borrow(owned.start), borrow(owned.end), borrow(owned.done),
              borrow(owned.offsets), borrow(owned.deps), borrow(owned.by_end), borrow(owned.first))
    other, idle_from = len(spent) - 1, origin
    for task in order:
        cursor, current = run.start[task], task
        while cursor > idle_from:
            current = latest_before(run, current)
            ended = idle_from if current < 0 else max(idle_from, run.end[current])
            if ended < cursor:
                spent[other] += cursor - ended
                cursor = ended
            if current >= 0 and cursor > idle_from:
                began = max(idle_from, run.start[current])
                spent[cause[current]] += cursor - began
                cursor = began
        idle_from = max(idle_from, run.end[task])
