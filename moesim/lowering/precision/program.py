"""VersionProgram: what offloaded programs with experts in several widths share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.precision import FLOAT_BITS, ExpertVersions
from moesim.cache.precision_debit import AccuracyDebit, DebitCounter
from moesim.cache.prefetch import LookaheadPrefetcher, Prefetcher
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.work import Cost
from moesim.lowering.graph import ExecutorView
from moesim.lowering.machine import STAGING_SLOTS, OffloadMachine
from moesim.lowering.offload import LayerMoment, OffloadProgram
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.lowering.transfers import Transfers
from moesim.lowering.work import experts_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.units import format_bytes

BYTE_COLUMNS = ("loaded_bytes", "prefetched_bytes")  # asked for on demand, and ahead


@dataclass(frozen=True)
class VersionPlan:
    """What a program needs to know of the versions.

    Attributes:
        versions: of each expert.
        device_bytes: what pools and staging slots take on the device; slow_bytes: what all experts take on the slow tier.
        dequantize_share: dequantisation on the device, once per copy, as a share of the copy's time with nothing in the way
            (EdgeMoE reports 2.7 % on a Jetson TX2; stated). 0: kernels take the narrow weights as they are.

    Raises:
        InputError: a negative share.
    """

    versions: ExpertVersions
    device_bytes: int
    slow_bytes: int
    dequantize_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dequantize_share < float("inf"):
            raise InputError(f"dequantize_share must be finite and not negative, got {self.dequantize_share}")


class VersionProgram(OffloadProgram):
    """An `OffloadProgram` whose experts exist in several widths; a kernel reads the weights at the width that it is given.

    Misses are loaded: the CPU computes nothing, and nothing is written back. Measured tables of a grouped kernel serve the model's own
    width; another width looks for a table of ``<shape>.int<bits>`` and falls back to the roofline.

    Raises:
        InputError: another way to handle a miss, or pools that do not fit.
    """

    method: ClassVar[str] = ""
    extra_columns: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: ModelSpec,
        trace: RoutingTrace,
        steps: list[Step],
        machine: OffloadMachine,
        cost: CostModel,
        cache: ExpertCache,
        policy: OffloadPolicy,
        prefetcher: Prefetcher | LookaheadPrefetcher | None,
        plan: VersionPlan,
    ) -> None:
        if policy.miss != "load" or policy.write_back:
            raise InputError(f"{self.method}: experts in several widths are loaded on a miss; give miss: load without "
                             f"write_back, not miss: {policy.miss}")
        self.plan, self.versions = plan, plan.versions
        super().__init__(model, trace, steps, machine, cost, cache, policy, prefetcher)
        for name in (*BYTE_COLUMNS, *self.extra_columns):
            self.cache_counts[name] = np.zeros(model.num_moe_layers, np.int64)
        self._counter = DebitCounter(self.versions.num_levels)

    def debit(self) -> AccuracyDebit:
        """Return what the run gave up; raises CheckError before the program has run."""
        source, settings = self._about()
        return self._counter.debit(self.method, self.versions.bits, source, settings)

    def decisions(self, view: ExecutorView) -> Iterator[int]:
        """Hand over up to the next router, decide there, and go on."""
        for transfers in self._all_transfers():
            transfers.view = view
        yield from super().decisions(view)

    def _about(self) -> tuple[str, Mapping[str, Any]]:
        """Return who chose the widths, and the settings by which published figures are found."""
        raise NotImplementedError

    def _all_transfers(self) -> tuple[Transfers, ...]:
        return (self.transfers,)

    def _check_memory(self, model: ModelSpec, machine: OffloadMachine, cache: ExpertCache, kv_tokens: int) -> None:
        free = machine.free_bytes(model, kv_tokens) + STAGING_SLOTS * model.expert_bytes
        if self.plan.device_bytes > free:
            raise InputError(f"{self.method}: the experts' pools need {format_bytes(self.plan.device_bytes)}, but "
                             f"{format_bytes(max(free, 0.0))} of {machine.fast_memory!r} are left beside the rest of "
                             f"{model.name!r}")
        slow = machine.hardware.memories[machine.slow_memory]
        if self.plan.slow_bytes > slow.num_bytes:
            raise InputError(f"{self.method}: the experts of {model.name!r} need {format_bytes(self.plan.slow_bytes)} in all "
                             f"widths, but {machine.slow_memory!r} holds {format_bytes(slow.num_bytes)}")

    def _shared_expert(self, at: LayerMoment) -> None:
        if self.model.shared_intermediate_size:
            work = shared_work(self.model, len(at.step.rows))
            at.tasks.append(self._dense("shared_expert", work, (at.router,), at.step, at.layer))

    def _rows(self, at: LayerMoment) -> tuple[np.ndarray, np.ndarray | None]:
        """Return expert_ids and gate_weights (or None), [token, k], of this access."""
        weights = self.trace.gate_weights
        return self.trace.expert_ids[at.step.rows, at.layer], None if weights is None else weights[at.step.rows, at.layer]

    def _count(self, layer: int, **values: int) -> None:
        for name, value in values.items():
            self.cache_counts[name][layer] += value

    def _kernel(self, at: LayerMoment, expert: int, level: int, tokens: int, slot: int, deps: list[int]) -> int:
        """Compute rows of an expert with the weights of a level; returns the task."""
        bits, work = self.versions.bits[level], experts_work(self.model, tokens, 1, tokens)
        own = bits == 8 * self.model.weight_bytes or bits >= FLOAT_BITS
        work = dataclasses.replace(work, bytes_per_group=float(self.versions.weight_bytes(level)),
                                   shape=work.shape if own else f"{work.shape}.int{bits}")
        task = self._add(
            "expert", self.machine.compute_index, self.cost.grouped_ffn(self.machine.device, work), deps, at.step, at.layer,
            expert=expert, slot=slot, tokens=tokens, num_bytes=self.versions.weight_bytes(level),
            flops=tokens * work.flops_per_token)
        at.tasks.append(task)
        return task

    def _dequantize(self, at: LayerMoment, expert: int, level: int, num_bytes: int, slot: int,
                    deps: list[int]) -> list[int]:
        """Return what a kernel waits for after `num_bytes` of a level have arrived by `deps`; floats need nothing more."""
        if not self.plan.dequantize_share or not num_bytes or self.versions.bits[level] >= FLOAT_BITS:
            return deps
        slowest_s = max(self.cost.copy(link.name, num_bytes).seconds for link in self.machine.route)
        cost = Cost(self.plan.dequantize_share * slowest_s, "stated")
        return [self._add("dequantize", self.machine.compute_index, cost, deps, at.step, at.layer, expert=expert, slot=slot,
                          num_bytes=num_bytes)]
