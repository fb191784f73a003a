"""A bound for on-demand policies beside a CPU: an expert that the CPU computed was not fetched, and cannot stay."""

from __future__ import annotations

import numpy as np

from moesim.cache.stay_flow import StayFlow
from moesim.lowering.offload_floors import FAR, LayerFloors

MAX_USES = 200_000  # of all evaluations together
MAX_EVALUATIONS = 16
MAX_ENTRIES = 1 << 24
_STEP, _SLOWER = 8, 4


def named_ns(floors: LayerFloors, stays: StayFlow) -> int:
    """Return a bound for policies that fetch nothing before its router has spoken, and nothing in the background.

    A layer that fetches q experts and leaves u to the CPU takes at least L(q, u): see `kernels.offload_bound`. For any prices
    f and g of a layer, L(q, u) is at least ``f q + g u`` plus the least of ``L - f q - g u``, and the sum of ``f q + g u``
    over the run is at least that of the cheapest stays. So any prices give a bound (Lagrangian relaxation of the
    layers' times). It is concave in the prices; they follow its supergradient, what the stays do less what the layer would, with
    steps that shrink (Shor, Minimization Methods for Non-Differentiable Functions, 1985), and the largest bound is returned.
    0 where the run is too long for that.
    """
    from moesim.lowering.kernels.offload_bound import by_fetched_and_left, under_planes

    number, side = len(floors.sizes), floors.width + 1
    evaluations = min(MAX_EVALUATIONS, MAX_USES // max(1, int(floors.sizes.sum())))
    if not evaluations or number * side * side > MAX_ENTRIES:
        return 0
    table, where = np.empty((number, side, side), np.int64), np.zeros((number, 2), np.int64)
    by_fetched_and_left(floors.both.copy(), floors.device.copy(), floors.sizes.copy(), floors.copies.alone.copy(),
                        floors.copies.load, floors.copies.rows.copy(), FAR, table)
    gain = int((floors.both[np.arange(number), floors.sizes] - floors.both[:, 0]).sum())
    prices = np.empty((2, number), np.int64)
    prices[0], prices[1] = floors.copies.load // 2, max(0, gain) // (2 * max(1, int(floors.sizes.sum())))
    best = 0
    for evaluation in range(evaluations):
        least = under_planes(table, FAR, prices[0].copy(), prices[1].copy(), where)
        flow = stays.cheapest(*prices)
        best = max(best, floors.serial + least + flow.cost)
        step = floors.copies.load * _SLOWER // (_STEP * (_SLOWER + evaluation))
        chosen = np.stack([flow.fetched, flow.absent - flow.fetched])
        prices = np.maximum(0, prices + step * np.sign(chosen - where.T))
    return best
