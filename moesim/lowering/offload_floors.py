"""What an offloaded layer takes at the very least, by how many of its experts are absent or left to the CPU.

In whole nanoseconds, from the durations that the simulator's own tasks have; the bounds on a whole run add them up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.hardware.cost import CostModel
from moesim.hardware.work import DenseWork
from moesim.lowering.batch import expert_counts, head_rows
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.work import attention_work, dense_work, experts_work, head_work, router_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.units import ns_from_s

FAR = 1 << 60
_PARTS = 8  # weights of device against CPU that are tried: k/8


@dataclass(frozen=True)
class CopyFloors:
    """What copies take, ns. `load`: one expert on the wire that is busy longest with it; `alone`, int64[k + 1]: until k
    experts of one layer have arrived, counted from its router; `rows`: on that wire for one expert that the CPU computes.
    """

    load: int
    alone: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class LayerFloors:
    """Least times of the layers of a run, ns. k and c run from 0 to the most distinct experts of an access (`width`).

    Attributes:
        serial: attention, routers, dense layers and heads, which nothing overlaps.
        sizes: int64[access], distinct experts.
        device: int64[access, width + 1], shared expert and the k cheapest experts on the device.
        cpu: int64[access, width + 1], the c cheapest experts on the CPU.
        there: int64[access], rows to the CPU before its first expert and back after its last.
        both: int64[access, width + 1], at least the longer of device and CPU if the CPU computes c experts; FAR for a c
            that cannot be.
        copies: what copies take.
    """

    serial: int
    sizes: np.ndarray
    device: np.ndarray
    cpu: np.ndarray
    there: np.ndarray
    both: np.ndarray
    copies: CopyFloors

    @property
    def width(self) -> int:
        """The most distinct experts of an access."""
        return self.both.shape[1] - 1


def layer_floors(
    model: ModelSpec,
    trace: RoutingTrace,
    steps: list[Step],
    machine: OffloadMachine,
    cost: CostModel,
    *,
    cpu_helps: bool,
    chunks: int = 1,
    skipped_links: int = 0,
) -> LayerFloors:
    """Return the floors of a run's layers; accesses are in order of step and layer, as in `access_stream`.

    Args:
        cpu_helps: whether experts may be computed on the CPU. chunks: pieces of one expert's copy.
        skipped_links: how many of the route's first links a copy may do without (a memory on the way keeps experts).
    """
    prices = _Prices(model, machine, cost.uncounted())
    counts = [expert_counts(trace.expert_ids[step.rows, layer], model.num_experts)
              for step in steps for layer in range(model.num_moe_layers)]
    tokens = np.sort(np.stack(counts), axis=1)[:, ::-1]
    sizes = (tokens > 0).sum(axis=1)
    tokens, inside = tokens[:, :int(sizes.max())], tokens[:, :int(sizes.max())] > 0
    gpu, fixed = _of_tokens(tokens, prices.expert), np.array([prices.shared(step) for step in steps], np.int64)
    device = np.repeat(fixed, model.num_moe_layers)[:, None] + _cheapest(gpu, inside)
    serial = sum(prices.serial(step, trace) for step in steps)
    alone = prices.arrivals(tokens.shape[1], chunks, skipped_links)
    if not cpu_helps:
        both = np.full_like(device, FAR)
        both[:, 0] = device[np.arange(len(sizes)), sizes]
        none = np.zeros(len(sizes), np.int64)
        return LayerFloors(serial, sizes, device, np.zeros_like(device), none, both, CopyFloors(*alone[:2], none))
    fewest = np.where(inside, tokens, FAR).min(axis=1)
    there = _of_tokens(fewest, prices.rows_there_and_back)
    rows = _of_tokens(fewest, lambda n: prices.rows_on(alone[2], n))
    host = _of_tokens(tokens, prices.cpu_expert)
    cpu, both = _cheapest(host, inside), _longer(device, gpu, host, sizes, there)
    return LayerFloors(serial, sizes, device, cpu, there, both, CopyFloors(*alone[:2], rows))


@dataclass(frozen=True)
class _Prices:
    """Durations of the tasks that the program makes, ns."""

    model: ModelSpec
    machine: OffloadMachine
    cost: CostModel

    def _ns(self, kind: str, seconds: float) -> int:
        return ns_from_s(seconds + self.cost.task_overhead(kind).seconds)

    def _dense(self, kind: str, work: DenseWork) -> int:
        return self._ns(kind, self.cost.dense(self.machine.device, work).seconds)

    def serial(self, step: Step, trace: RoutingTrace) -> int:
        """Everything in a step but its experts: one task after the other."""
        model, tokens, context = self.model, len(step.rows), int(np.sum(trace.position[step.rows] + 1))
        parts = (("attention", attention_work(model, tokens, context), model.num_layers),
                 ("router", router_work(model, tokens), model.num_moe_layers),
                 ("dense", dense_work(model, tokens), model.num_dense_layers),
                 ("head", head_work(model, head_rows(step)), 1))
        return sum(times * self._dense(kind, work) for kind, work, times in parts if times)

    def shared(self, step: Step) -> int:
        """The shared expert of one layer."""
        if not self.model.shared_intermediate_size:
            return 0
        return self._dense("shared_expert", shared_work(self.model, len(step.rows)))

    def expert(self, tokens: int) -> int:
        """One expert on the device."""
        return self._ns("expert", self._grouped(self.machine.device, tokens))

    def cpu_expert(self, tokens: int) -> int:
        """One expert on the CPU."""
        return self._ns("cpu_expert", self._grouped(self.machine.cpu, tokens))

    def _grouped(self, device: str, tokens: int) -> float:
        return self.cost.grouped_ffn(device, experts_work(self.model, tokens, 1, tokens)).seconds

    def rows_there_and_back(self, tokens: int) -> int:
        """The rows of one expert to the CPU and its results back."""
        return sum(self._rows(kind, tokens) for kind, _ in self._row_wires())

    def rows_on(self, wire: int, tokens: int) -> int:
        """The part of it that is on one wire."""
        return sum(self._rows(kind, tokens) for kind, other in self._row_wires() if other == wire)

    def _row_wires(self) -> tuple[tuple[str, int], ...]:
        ways = (("send", self.machine.out_index), ("receive", self.machine.in_index))
        return () if self.machine.shares_memory else ways

    def _rows(self, kind: str, tokens: int) -> int:
        num_bytes = round(tokens * self.model.hidden_size * self.model.activation_bytes)
        return self._ns(kind, self.machine.activation_copy(self.cost, num_bytes).seconds)

    def arrivals(self, width: int, chunks: int, skipped: int) -> tuple[int, np.ndarray, int]:
        """Return `CopyFloors.load`, `CopyFloors.alone` and the wire of `load`.

        The k-th expert arrives when a wire has carried k; before its first hop on that wire a chunk crosses the links in
        front, and after its last the links behind.
        """
        base, extra = divmod(self.model.expert_bytes, chunks)
        pieces = [size for size in (base + (place < extra) for place in range(chunks)) if size]
        overhead = self.cost.task_overhead("load").seconds
        links, wires = self.machine.route[skipped:], self.machine.route_indexes[skipped:]
        hops = np.array([[ns_from_s(self.cost.copy(link.name, size).seconds + overhead) for size in pieces] for link in links])
        number, least, alone, busy = np.arange(width + 1), hops.min(axis=1), np.zeros(width + 1, np.int64), {}
        for wire in wires:
            own = np.flatnonzero(np.array(wires) == wire)
            busy[wire] = int(hops[own].sum())
            around = int(least[:own[0]].sum() + least[own[-1] + 1:].sum())
            alone = np.maximum(alone, np.where(number > 0, number * busy[wire] + around, 0))
        slowest = max(busy, key=lambda wire: busy[wire])
        return busy[slowest], alone, slowest


def _of_tokens(tokens: np.ndarray, duration: Callable[[int], int]) -> np.ndarray:
    """int64, as `tokens`: durations of experts by their tokens, 0 where there is no expert."""
    sizes, index = np.unique(tokens, return_inverse=True)
    return np.array([duration(n) if n else 0 for n in sizes.tolist()], np.int64)[index.reshape(tokens.shape)]


def _cheapest(times: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """int64[access, k]: the sum of the k cheapest of an access's experts (of all, where k is more)."""
    ordered = np.sort(np.where(inside, times, FAR), axis=1)
    sums = np.cumsum(np.where(ordered < FAR, ordered, 0), axis=1)
    return np.concatenate([np.zeros((len(times), 1), np.int64), sums], axis=1)


def _longer(device: np.ndarray, gpu: np.ndarray, host: np.ndarray, sizes: np.ndarray, there: np.ndarray) -> np.ndarray:
    """int64[access, c]: at least the longer of the two sides if the CPU computes c experts, FAR beyond the access's.

    The sum of the sides with weights w and 1 - w is no longer than the longer of them, and least for the c experts whose
    weighted difference is least: taken for w = 0, 1/8 ... 1.
    """
    inside, whole = np.arange(gpu.shape[1]) < sizes[:, None], device[np.arange(len(sizes)), sizes][:, None]
    longer = np.zeros_like(device)
    for part in range(_PARTS + 1):
        total = part * whole + _cheapest((_PARTS - part) * host - part * gpu, inside)
        total[:, 1:] += (_PARTS - part) * there[:, None]
        longer = np.maximum(longer, -(-total // _PARTS))
    return np.where(np.arange(gpu.shape[1] + 1) <= sizes[:, None], longer, FAR)
