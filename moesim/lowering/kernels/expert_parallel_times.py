"""The recurrence of expert-parallel steps over layers and ranks; why it is exact: `lowering.expert_parallel_times`."""

from __future__ import annotations

import numba
import numpy as np

ATTENTION, ROUTER, SHARED, DENSE, HEAD = range(5)
RANKS, DISPATCH, EXPERTS, COMBINE, TAIL = range(5)


@numba.njit(cache=True, nogil=True)
def step_parts(is_moe: np.ndarray, rows: np.ndarray, heads: np.ndarray, dense: np.ndarray, experts: np.ndarray,
               exchange: np.ndarray, parts: np.ndarray, slowest: np.ndarray) -> None:
    """Fill ``parts`` int64[step, 5], which sum to the time of each step, and ``slowest`` int64[step].

    Args:
        is_moe: bool[model layer]; rows, heads: int64[step, rank].
        dense: int64[kind, step, rank]; experts: int64[step, layer, rank]; exchange: int64[kind, step, layer].
    """
    num_steps, num_ranks = rows.shape
    since, until = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
    for step in range(num_steps):
        own, layer = parts[step], 0
        own[:] = 0
        slowest[step] = 0
        since[:] = 0  # from the last time that all ranks met to each rank's next task
        for model_layer in range(len(is_moe)):
            last = 0
            for rank in range(num_ranks):
                if rows[step, rank]:
                    since[rank] += dense[ATTENTION, step, rank]
                    since[rank] += dense[ROUTER if is_moe[model_layer] else DENSE, step, rank]
                    last = max(last, since[rank])
            if not is_moe[model_layer]:
                continue
            sent = last + exchange[0, step, layer]
            done, tail, most = sent, 0, 0
            for rank in range(num_ranks):
                until[rank] = since[rank] + dense[SHARED, step, rank] if rows[step, rank] else 0
                tail = max(tail, until[rank])
                busy = experts[step, layer, rank]
                if busy:
                    done, most = max(done, max(sent, until[rank]) + busy), max(most, busy)
                since[rank] = 0
            back = done + exchange[1, step, layer]
            own[RANKS] += last
            own[DISPATCH] += sent - last
            own[EXPERTS] += done - sent
            own[COMBINE] += back - done
            own[TAIL] += max(tail - back, 0)
            slowest[step] += most
            layer += 1
        last = 0
        for rank in range(num_ranks):
            if heads[step, rank]:
                last = max(last, since[rank] + dense[HEAD, step, rank])
        own[RANKS] += last
