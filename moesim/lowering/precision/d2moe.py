"""D2MoE as a program: planes on top of each other, loaded hottest expert bit first, under a budget in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from moesim.cache.precision import ABSENT_LEVEL
from moesim.cache.precision_levels import level_counts
from moesim.cache.precision_order import load_order
from moesim.cache.precision_planes import PlaneCache
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.graph import PRIORITY_DEMAND
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import LayerMoment
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.lowering.precision.program import VersionPlan, VersionProgram
from moesim.model.spec import ModelSpec
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace

if TYPE_CHECKING:
    from moesim.cache.cache import ExpertCache


PAPER_WIDTHS = ((2, 3, 4), (5, 6, 7, 8))


class D2MoeProgram(VersionProgram):
    """D2MoE, MobiCom 2025, arXiv 2504.15299: nested planes, HEBF order, memory-budget scheduler; nothing is prefetched.

    Each (expert, level) that tokens of a step chose is a kernel of its own over these tokens, with the planes up to its
    level; it starts when they are in, so that what is resident comes first and the rest in the order of loading. The bit router's
    own time (1.04 to 1.67 % of latency in the paper) is not in the program.

    Args:
        planes: the budget; its versions are nested. levels: int8[token, layer, k] of the trace, from
            `cache.precision_levels.bit_levels`. levels_source: who chose them. order: ``hebf`` or ``id``.

    Raises:
        InputError: levels of another shape or range, a layer of a step that needs more than the budget, an unknown order,
            and as `VersionProgram`.
    """

    method: ClassVar[str] = "d2moe"
    extra_columns: ClassVar[tuple[str, ...]] = ("planes",)

    def __init__(
        self,
        model: ModelSpec,
        trace: RoutingTrace,
        steps: list[Step],
        machine: OffloadMachine,
        cost: CostModel,
        planes: PlaneCache,
        policy: OffloadPolicy,
        levels: np.ndarray,
        *,
        order: str = "hebf",
        levels_source: str = "stated capacity",
        dequantize_share: float = 0.0,
    ) -> None:
        versions = planes.versions
        if levels.shape != trace.expert_ids.shape or levels.max() >= versions.num_levels:
            raise InputError(f"d2moe: levels must be [token, layer, k] = {list(trace.expert_ids.shape)} below "
                             f"{versions.num_levels}, got {list(levels.shape)} up to {levels.max()}")
        if (planes.num_layers, planes.num_experts) != (model.num_moe_layers, model.num_experts):
            raise InputError(f"d2moe: the plane cache is of {planes.num_layers} layers x {planes.num_experts} experts, not of "
                             f"{model.num_moe_layers} x {model.num_experts}")
        load_order(order, np.zeros((0, 0), np.int64))
        plan = VersionPlan(versions, planes.budget_bytes, model.num_pool_experts * versions.slow_bytes, dequantize_share)
        super().__init__(model, trace, steps, machine, cost, cast("ExpertCache", planes), policy, None, plan)
        self.planes, self.levels, self.order, self.levels_source = planes, levels, order, levels_source
        self._check_budget()

    def _check_budget(self) -> None:
        for record in self.steps:
            for layer in range(self.model.num_moe_layers):
                counts = self._level_counts(record.step, layer)
                needed = sum(self.versions.weight_bytes(level) for level in _top_levels(counts).values())
                if needed > self.planes.budget_bytes:
                    raise InputError(f"d2moe: step {record.step.index} needs {needed} bytes of experts in layer {layer} at "
                                     f"once, but the budget is {self.planes.budget_bytes}")

    def _about(self) -> tuple[str, Mapping[str, Any]]:
        return self.levels_source, {"paper_widths": self.versions.bits in PAPER_WIDTHS}

    def _level_counts(self, step: Step, layer: int) -> np.ndarray:
        ids, levels = self.trace.expert_ids[step.rows, layer], self.levels[step.rows, layer]
        return level_counts(ids, levels, self.model.num_experts, self.versions.num_levels)

    def _moe_layer(self, at: LayerMoment) -> int:
        """Schedule one layer's experts; returns the barrier that ends it."""
        counts = self._level_counts(at.step, at.layer)
        have = {expert: self.planes.level_of(at.layer, expert) for expert in range(self.model.num_experts)}
        self.planes.prepare(at.layer, _top_levels(counts))
        self._shared_expert(at)
        arrivals: dict[tuple[int, int], int] = {}
        for expert, level in load_order(self.order, counts):
            missing = range(have[expert] + 1, level + 1)
            for plane in missing:
                arrivals[expert, plane] = self._load_plane(at, expert, plane)
            have[expert] = max(have[expert], level)
            self._count(at.layer, accesses=1, hits=int(not missing), misses=int(bool(missing)), loads=int(bool(missing)))
            self._compute_level(at, expert, level, int(counts[expert, level]), arrivals, len(missing))
        ids, weights = self._rows(at)
        self._counter.add(ids, weights, self.levels[at.step.rows, at.layer])
        return self._end(at)

    def _slot(self, layer: int, expert: int, plane: int) -> int:
        """Every plane has a place of its own: what was freed for it belongs to layers whose work is done."""
        return plane * self.model.num_moe_layers * self.model.num_experts + self.key(layer, expert)

    def _load_plane(self, at: LayerMoment, expert: int, plane: int) -> int:
        num_bytes = self.versions.part_bytes[plane]
        self._count(at.layer, planes=1, loaded_bytes=num_bytes)
        return self.transfers.fetch(self.key(at.layer, expert), self._slot(at.layer, expert, plane), "load", PRIORITY_DEMAND,
                                    at.router, at.step.index, resident=False, num_bytes=num_bytes)

    def _compute_level(self, at: LayerMoment, expert: int, level: int, tokens: int,
                       arrivals: Mapping[tuple[int, int], int], num_new: int) -> None:
        """Compute the tokens of one level when its planes, and those of the levels below, have arrived."""
        deps = [at.router, *(arrivals[expert, plane] for plane in range(level + 1) if (expert, plane) in arrivals)]
        slot = self._slot(at.layer, expert, level)
        num_bytes = sum(self.versions.part_bytes[level + 1 - num_new: level + 1])
        deps = self._dequantize(at, expert, level, num_bytes, slot, deps)
        task = self._kernel(at, expert, level, tokens, slot, deps)
        for plane in range(level + 1):
            self.transfers.use(self._slot(at.layer, expert, plane), task)


def _top_levels(counts: np.ndarray) -> dict[int, int]:
    """Return expert -> the highest level that any token chose."""
    tops = {int(expert): int(np.flatnonzero(counts[expert])[-1]) for expert in np.flatnonzero(counts.any(axis=1))}
    assert ABSENT_LEVEL not in tops.values()
    return tops
