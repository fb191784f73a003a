"""Lower bounds on the time of offloaded inference: no policy with these slots can be faster.

Two bounds, because a policy that fetches ahead may hide what one that waits for its routers cannot. Both follow from what the
program does with a run: attention, routers and heads stand in one row with the layers' experts, and a layer begins when
its router ends and is over when its last expert is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moesim.cache.bounds import fewest_misses
from moesim.cache.flow_bound import SlotPrices, cheapest_slots, spread
from moesim.cache.policy import AccessStream
from moesim.cache.stay_flow import StayFlow
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload_floors import FAR, LayerFloors, layer_floors
from moesim.lowering.offload_named import MAX_EVALUATIONS, named_ns
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.units import s_from_ns

WEIGHTS = 1024  # weights of time and link are parts of this
EVALUATIONS = 8
MAX_SHARED_USES = 16_000  # in the flows of one bound; a pool for all layers is one long network, layers' own are many short ones
_NEAR = 512  # a bound that at most 1 part in so many could be gained on is good enough
_FINE = 16  # parts of a nanosecond, so that rounding a slope down costs nothing that counts


@dataclass(frozen=True)
class OffloadBound:
    """Proven lower bounds on the time to the end of the last step, in seconds.

    Attributes:
        total_s: for every policy (the same as `prefetch_s`).
        compute_s, link_s: the device's and the slowest link's time where the largest of device, link and CPU is least.
        misses: the fewest experts that are absent when needed.
        prefetch_s: for every policy, whatever it fetches ahead or in the background.
        on_demand_s: for policies that fetch an expert only for the layer whose router has just named it.
        kernel_floor_s: with every expert in a slot: a floor for any number of slots.
        link_floor_s: the slowest link's time if each of the fewest misses is fetched (with a CPU that computes misses it
            need not be).
    """

    total_s: float
    compute_s: float
    link_s: float
    misses: int
    prefetch_s: float
    on_demand_s: float
    kernel_floor_s: float
    link_floor_s: float


@dataclass(frozen=True)
class _Slots:
    """What the slots are, for the questions that the bounds ask of them."""

    stream: AccessStream
    num_experts: int
    slots_per_layer: int | Sequence[int]
    preload: list[int]
    shared: bool

    @cached_property
    def misses(self) -> int:
        """The fewest absent experts."""
        found = fewest_misses(self.stream, self.num_experts, self.slots_per_layer, preload=self.preload, shared=self.shared)
        return int(found.sum())

    def cheapest(self, prices: SlotPrices) -> tuple[int, int]:
        """Return the least cost, and how many experts it fetches (0 where a shared pool is too long for a flow)."""
        flows = 1 if prices.fetch is None else EVALUATIONS
        if self.shared and flows * len(self.stream.experts) > MAX_SHARED_USES:
            return spread(prices, self.misses), 0
        flow = cheapest_slots(self.stream, self.num_experts, self.slots_per_layer, prices, preload=self.preload,
                              shared=self.shared)
        return flow.cost, int(flow.fetched.sum())

    def named_ns(self, floors: LayerFloors) -> int:
        """Return the bound that knows which experts stay; 0 where a shared pool is too long for it."""
        if self.shared and MAX_EVALUATIONS * len(self.stream.experts) > MAX_SHARED_USES:
            return 0
        return named_ns(floors, StayFlow(self.stream, self.num_experts, self.slots_per_layer, preload=self.preload,
                                         shared=self.shared))


def offload_bound(
    model: ModelSpec,
    trace: RoutingTrace,
    steps: list[Step],
    machine: OffloadMachine,
    cost: CostModel,
    stream: AccessStream,
    *,
    slots_per_layer: int | Sequence[int],
    preload: list[int],
    shared: bool,
    cpu_helps: bool,
    chunks: int = 1,
    defers: bool = False,
    skipped_links: int = 0,
) -> OffloadBound:
    """Return times that no policy with these slots can undercut: see `prefetch_ns` and `on_demand_ns` for the proofs.

    Args:
        slots_per_layer: of every layer, or of each; `shared` pools them all.
        cpu_helps: whether the CPU may compute experts. chunks: pieces of one expert's copy.
        defers: whether a layer may end before the CPU's part of it; both bounds are then the largest of device, link and CPU.
        skipped_links: how many of the route's first links a copy may do without.

    Raises:
        InputError: no slots, a preload larger than the slots, or a stream that is not that of the steps.
    """
    floors = layer_floors(model, trace, steps, machine, cost, cpu_helps=cpu_helps, chunks=chunks,
                          skipped_links=skipped_links)
    if not np.array_equal(floors.sizes, np.diff(stream.offsets)):
        raise InputError("offload bound: the stream is not that of the trace and the steps")
    slots = _Slots(stream, model.num_experts, slots_per_layer, preload, shared)
    compute, link, longest = sides_ns(floors, slots.misses)
    prefetch, on_demand, kernels = longest, longest, sides_ns(floors, 0)[2]
    if not defers:
        prefetch = max(longest, prefetch_ns(floors, slots))
        on_demand = max(prefetch, on_demand_ns(floors, slots), slots.named_ns(floors) if cpu_helps else 0)
        kernels = max(kernels, floors.serial + int(floors.both.min(axis=1).sum()))
    fetched = slots.misses * floors.copies.load
    return OffloadBound(
        total_s=s_from_ns(prefetch), compute_s=s_from_ns(compute), link_s=s_from_ns(link), misses=slots.misses,
        prefetch_s=s_from_ns(prefetch), on_demand_s=s_from_ns(on_demand), kernel_floor_s=s_from_ns(kernels),
        link_floor_s=s_from_ns(fetched))


def sides_ns(floors: LayerFloors, misses: int) -> tuple[int, int, int]:
    """Return device time, link time and the largest of device, link and CPU, for the split at which that is least.

    Of all experts the CPU computes some c; the device the rest, and all but c of the absent ones cross the link.
    """
    inside = np.arange(floors.width) < floors.sizes[:, None]
    device = _sums(np.diff(floors.device, axis=1)[inside])
    cpu = _sums(np.diff(floors.cpu, axis=1)[inside]) if (floors.both[:, 1:] < FAR).any() else np.zeros(1, np.int64)
    on_cpu = np.arange(len(cpu))
    device = floors.serial + int(floors.device[:, 0].sum()) + device[len(device) - 1 - on_cpu]
    link = np.maximum(misses - on_cpu, 0) * floors.copies.load
    longest = np.maximum(np.maximum(device, link), cpu)
    best = int(np.argmin(longest))
    return int(device[best]), int(link[best]), int(longest[best])


def prefetch_ns(floors: LayerFloors, slots: _Slots) -> int:
    """Return a bound for every policy: any eviction, admission, prefetch, any choice of fetch or CPU.

    Let the CPU compute c of a layer's experts. From router to barrier the layer takes T(c), the longer of device and CPU, and
    the whole run takes ``serial + sum T``; it takes as long as the slowest wire is busy too. So for any weight w in [0, 1]
    it takes ``(1 - w) (serial + sum T) + w * wire``. An expert that the device computes was in its slot since it was last
    computed there, or has crossed the wire since. So with u of a layer's experts neither kept nor fetched, c is at least u,
    and the least of the weighted sum over all uses of the slots is a minimum-cost flow: a fetch costs w times its load, an
    expert left off the device what T gains. The least is concave in w; the largest of a few evaluations is returned. (Weights
    of device against CPU are in T, which is the longer of the two layer by layer.)
    """
    low = (floors.serial + int(floors.both.min(axis=1).sum()), slots.misses * floors.copies.load)
    if not (floors.both[:, 1:] < FAR).any():
        return max(low)
    whole = floors.both[np.arange(len(floors.sizes)), floors.sizes]
    high = (floors.serial + int(whole.sum()), int(floors.sizes @ floors.copies.rows))
    best, tried = low[0], {0}
    for _ in range(EVALUATIONS):
        weight = _crossing(low, high)
        most = ((WEIGHTS - weight) * low[0] + weight * low[1]) // WEIGHTS
        if weight in tried or most - best <= best // _NEAR:
            break
        value, point = _weighted(floors, slots, weight)
        best, tried = max(best, -(-value // WEIGHTS)), tried | {weight}
        low, high = (point, high) if point[1] > point[0] else (low, point)
    return best


def _crossing(low: tuple[int, int], high: tuple[int, int]) -> int:
    """Return the weight, of WEIGHTS, at which two pairs of time and wire have the same weighted sum; 0 if the first has no
    more of the wire than of time."""
    (time_low, wire_low), (time_high, wire_high) = low, high
    if wire_low <= time_low:
        return 0
    gain, loss = wire_low - wire_high, time_high - time_low
    return WEIGHTS if gain + loss <= 0 else max(0, min(WEIGHTS, round(WEIGHTS * loss / (gain + loss))))


def _weighted(floors: LayerFloors, slots: _Slots, weight: int) -> tuple[int, tuple[int, int]]:
    """Return the least weighted sum (times WEIGHTS), and about the time and the wire of a schedule that has it."""
    rows = np.arange(floors.width + 1) * floors.copies.rows[:, None]
    table = np.where(floors.both < FAR, (WEIGHTS - weight) * floors.both + weight * rows, FAR)
    table = np.minimum.accumulate(table[:, ::-1], axis=1)[:, ::-1].copy()
    prices = SlotPrices(floors.sizes, _convex(table, floors.sizes), weight * floors.copies.load)
    cost, fetched = slots.cheapest(prices)
    value, wire = (WEIGHTS - weight) * floors.serial + cost, fetched * floors.copies.load
    return value, ((value - weight * wire) // max(1, WEIGHTS - weight), wire)


def on_demand_ns(floors: LayerFloors, slots: _Slots) -> int:
    """Return a bound for policies that fetch nothing before its router has spoken, and nothing in the background.

    All of a layer's copies then lie between its router and its barrier, where no other layer's do, so that the run takes
    ``serial`` and the sum of the layers' own times. A layer with m experts absent takes at least f(m): see
    `kernels.offload_bound.by_absent`; f is replaced by the greatest convex function below it. Which experts are absent
    is a matter of the slots alone: an expert is there if it stayed from its last use, at most as many stay as there are
    slots, and any expert may stay after its use. The least sum of f over all such choices is a minimum-cost flow. (That
    what the CPU computed was not fetched and cannot stay is left to `offload_named.named_ns`.)
    """
    from moesim.lowering.kernels.offload_bound import by_absent

    table = np.zeros_like(floors.both)
    by_absent(floors.both.copy(), floors.device.copy(), floors.sizes.copy(), floors.copies.alone.copy(),
              floors.copies.load, floors.copies.rows.copy(), table)
    cost, _ = slots.cheapest(SlotPrices(floors.sizes, _convex(_FINE * table, floors.sizes)))
    return floors.serial - (-cost // _FINE)


def _convex(table: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    from moesim.lowering.kernels.offload_bound import convex_floor

    convex_floor(table, sizes.copy())
    return table


def _sums(times: np.ndarray) -> np.ndarray:
    """int64[n + 1]: the sum of the n smallest."""
    return np.concatenate([[0], np.cumsum(np.sort(times))])
