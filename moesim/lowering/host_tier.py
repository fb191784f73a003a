"""A middle tier: host memory that keeps some of the experts, between flash and the device.

Every expert lies on flash. A copy to the device starts in host memory if the expert is there; otherwise it is read from
flash into host memory first and stays there, where it takes the place of another (MoE-Infinity, arXiv 2401.14361, keeps four
times as many experts on the host as on the device). Weights never change, so whoever leaves host memory is dropped, and its
place is free at once (a copy of it that is under way goes on from a buffer).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.errors import InputError
from moesim.lowering.graph import PRIORITY_DEMAND
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import LayerMoment, OffloadProgram
from moesim.lowering.transfers import Transfers
from moesim.model.spec import ModelSpec
from moesim.units import format_bytes

HOST_COLUMNS = ("host_accesses", "host_hits")


class TieredTransfers(Transfers):
    """Copies that begin where the expert is: `host` says what host memory holds."""

    def __init__(self, *parts: Any, host: ExpertCache) -> None:
        super().__init__(*parts)
        self.host, self.now = host, 0
        self.counts = {name: np.zeros(host.num_layers, np.int64) for name in HOST_COLUMNS}
        self._reads: dict[int, list[int]] = {}

    def _first_hop(self, key: int) -> int:
        """Look an expert up in host memory; an absent one takes a place there and is read from flash."""
        layer, expert = divmod(key, self.num_experts)
        absent = self.host.touch(layer, [expert], self.now)
        self.counts["host_accesses"][layer] += 1
        self.counts["host_hits"][layer] += not absent
        if not absent:
            return 1
        self._reads.pop(key, None)
        self.host.reserve(layer, expert, self.now)
        return 0

    def _awaited(self, key: int) -> list[int]:
        """Return the reads from flash that an expert in host memory still waits for."""
        waiting = [task for task in self._reads.get(key, []) if not self._view.is_done(task)]
        if not waiting:
            self._reads.pop(key, None)
        return waiting

    def fetch(self, key: int, *args: Any, **options: Any) -> int:
        """Emit a copy; one that finds its expert on the way from flash to the host waits for that."""
        first = len(self.graph)
        arrival = super().fetch(key, *args, **options)
        self._remember(key, first)
        return arrival

    def read_to_host(self, key: int, after: int, step: int) -> list[int]:
        """Bring an expert into host memory for the CPU; returns what the CPU waits for beside `after`."""
        if self._first_hop(key):
            return self._awaited(key)
        layer, expert = divmod(key, self.num_experts)
        tasks = []
        for place, size in enumerate(self.chunk_bytes):
            cost, ns = self._price(size)[0]
            tasks.append(self.graph.add(
                "load", self.machine.route_indexes[0], ns, [after], priority=PRIORITY_DEMAND, step=step, layer=layer,
                expert=expert, chunk=place, num_bytes=size, source=cost.source))
        self._reads[key] = tasks
        return tasks

    def cancel_rest(self, key: int) -> bool:
        """Cancel what has not started; an expert that is not read whole does not stay in host memory."""
        lost = any(not self._view.is_started(task) for task in self._reads.get(key, []))
        cancelled = super().cancel_rest(key)
        if cancelled and lost:
            layer, expert = divmod(key, self.num_experts)
            del self._reads[key]
            if self.host.slot_of(layer, expert) >= 0:
                self.host.release(layer, expert)
        return cancelled

    def _remember(self, key: int, first: int) -> None:
        flash = self.machine.route_indexes[0]
        reads = [task for task in range(first, len(self.graph)) if self.graph.resource[task] == flash]
        if reads:
            self._reads[key] = reads


class TieredOffloadProgram(OffloadProgram):
    """Offloaded inference with experts on flash and some of them in host memory.

    Args (beside those of `OffloadProgram`):
        host: which experts host memory holds; its policy drops. Preload it with what is there at the start.

    Raises:
        InputError: a machine whose experts do not come over host memory, or a host memory too small.
    """

    def __init__(self, *parts: Any, host: ExpertCache, **options: Any) -> None:
        self._host = host
        super().__init__(*parts, **options)
        self.transfers: TieredTransfers = TieredTransfers(
            self.graph, self.machine, self.cost, self.model.expert_bytes, self.policy.chunks, self.cache.num_slots,
            self.model.num_experts, host=host)
        self.cache_counts |= self.transfers.counts

    def _check_memory(self, model: ModelSpec, machine: OffloadMachine, cache: ExpertCache, kv_tokens: int) -> None:
        super()._check_memory(model, machine, cache, kv_tokens)
        memory = machine.hardware.memory_of(machine.cpu)
        if len(machine.route) < 2 or memory.name not in (machine.route[0].source, machine.route[0].target):
            raise InputError(
                f"host_slots need experts on flash that reach the device over the CPU's memory; {machine.slow_memory!r} is "
                f"{len(machine.route)} link away: set slow_memory to a flash memory")
        needed = self._host.num_slots * model.expert_bytes
        if needed > memory.num_bytes:
            raise InputError(f"{self._host.num_slots} host slots need {format_bytes(needed)}, but {memory.name!r} holds "
                             f"{format_bytes(memory.num_bytes)}")

    def cpu_can_reach_experts(self) -> bool:
        """Return True: over host memory."""
        return True

    def _moe_layer(self, at: LayerMoment) -> int:
        self.transfers.now = at.now
        return super()._moe_layer(at)

    def _cpu_waits_for(self, at: LayerMoment, expert: int) -> list[int]:
        return self.transfers.read_to_host(self.key(at.layer, expert), at.router, at.step.index)
