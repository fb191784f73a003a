"""PlacementProblem: what a solver is given, and the one check that every plan must pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moesim.errors import CheckError, InputError
from moesim.placement.constraints import Constraints
from moesim.placement.plan import PlacementPlan
from moesim.placement.step_cost import StepCost
from moesim.placement.step_sample import ExchangeRates, StepSample


@dataclass(frozen=True)
class PlacementProblem:
    """Where should each expert of each layer live?

    Attributes:
        expert_load: float64[layer, expert], tokens routed to each expert.
        transitions: float64[layer - 1, expert, expert], pairs (expert of a layer, expert of the next) that one
            token used; or None when no token identity was recorded (counts only).
        num_ranks, ranks_per_node: the ranks and how they are grouped.
        slots_per_rank: expert slots of one layer on one rank; ``num_slots = num_ranks * slots_per_rank``.
        expert_bytes: int64[layer], bytes of one expert of a layer.
        memory_bytes_per_rank: bytes for experts on one rank (inf: not limited).
        num_groups: expert groups of group-limited routing (EPLB's hierarchical policy packs them to nodes).
        steps: token sets step by step, for the objectives that need them (fan-out, step time).
        step_cost: what a layer of a step costs on the machine (step time).
        rates: linear rates on mean counts (the bottleneck objective).
        current: the plan that is loaded now, from which experts would have to move (migration).
        constraints: pins, pairs kept apart, capacities.

    Raises:
        InputError: too few slots, ranks that are not whole nodes, slots that do not fit in memory.
    """

    expert_load: np.ndarray
    num_ranks: int
    slots_per_rank: int
    ranks_per_node: int
    transitions: np.ndarray | None = None
    expert_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    memory_bytes_per_rank: float = float("inf")
    num_groups: int = 1
    steps: StepSample | None = None
    step_cost: StepCost | None = None
    rates: ExchangeRates | None = None
    current: PlacementPlan | None = None
    constraints: Constraints = field(default_factory=Constraints)

    def __post_init__(self) -> None:
        load = np.array(self.expert_load, dtype=np.float64)
        if load.ndim != 2 or load.size == 0 or not np.all(np.isfinite(load)) or load.min() < 0:
            raise InputError("placement: expert_load must be [layer, expert], finite and not negative")
        load.setflags(write=False)
        object.__setattr__(self, "expert_load", load)
        if self.num_ranks < 1 or self.slots_per_rank < 1:
            raise InputError(
                f"placement: needs ranks and slots, got {self.num_ranks} ranks x {self.slots_per_rank} slots"
            )
        if self.ranks_per_node < 1 or self.num_ranks % self.ranks_per_node:
            raise InputError(
                f"placement: {self.num_ranks} ranks are not whole nodes of {self.ranks_per_node}"
            )
        if self.num_slots < self.num_experts:
            raise InputError(
                f"placement: {self.num_experts} experts do not fit in {self.num_ranks} ranks x {self.slots_per_rank} slots"
            )
        self._check_transitions()
        self._check_memory()
        self.constraints.check_names(self.num_layers, self.num_experts, self.num_ranks, self.num_nodes)
        if self.steps is not None and self.steps.expert_ids.shape[1] != self.num_layers:
            raise InputError(f"placement: the steps have {self.steps.expert_ids.shape[1]} layers, the loads "
                             f"{self.num_layers}")
        if self.current is not None:
            self.check_shape(self.current)

    def _check_transitions(self) -> None:
        if self.transitions is None:
            return
        expected = (self.num_layers - 1, self.num_experts, self.num_experts)
        if self.transitions.shape != expected:
            raise InputError(f"placement: transitions must be {expected}, got {self.transitions.shape}")

    def _check_memory(self) -> None:
        if len(self.expert_bytes) == 0:
            return
        needed = int(np.sum(self.expert_bytes)) * self.slots_per_rank
        if needed > self.memory_bytes_per_rank:
            raise InputError(
                f"placement: {self.slots_per_rank} slots in each of {self.num_layers} layers need {needed} bytes per "
                f"rank, but {self.memory_bytes_per_rank:.0f} are free; use more ranks or fewer redundant experts"
            )

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return self.expert_load.shape[0]

    @property
    def num_experts(self) -> int:
        """Logical experts per layer."""
        return self.expert_load.shape[1]

    @property
    def num_slots(self) -> int:
        """Physical slots per layer."""
        return self.num_ranks * self.slots_per_rank

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.num_ranks // self.ranks_per_node

    def check(self, plan: PlacementPlan) -> None:
        """Raise CheckError unless `plan` is a valid answer to this problem, constraints included."""
        self.check_shape(plan)
        plan.check()
        broken = self.constraints.broken(plan, self.ranks_per_node) if self.constraints else []
        if broken:
            raise CheckError(f"plan: it breaks {len(broken)} constraints, first: {broken[0]}")

    def check_shape(self, plan: PlacementPlan) -> None:
        """Raise CheckError unless `plan` has the problem's layers, slots, ranks and experts."""
        shape = (self.num_layers, self.num_slots)
        if plan.physical_to_logical.shape != shape:
            raise CheckError(
                f"plan: physical_to_logical is {plan.physical_to_logical.shape}, the problem needs {shape}"
            )
        if plan.num_ranks != self.num_ranks:
            raise CheckError(f"plan: made for {plan.num_ranks} ranks, the problem has {self.num_ranks}")
        if plan.num_experts != self.num_experts:
            raise CheckError(f"plan: made for {plan.num_experts} experts, the problem has {self.num_experts}")
