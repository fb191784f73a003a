"""Constraints on a plan beyond one home per expert: pins, pairs kept apart, capacities of ranks and nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError
from moesim.placement.plan import PlacementPlan

ALL_LAYERS = -1


@dataclass(frozen=True)
class Pin:
    """Expert `expert` of `layer` (`ALL_LAYERS`: of each) must have a copy on `rank`."""

    expert: int
    rank: int
    layer: int = ALL_LAYERS

    def __str__(self) -> str:
        return f"pin {self.expert}@{self.rank}{_where(self.layer)}"


@dataclass(frozen=True)
class Apart:
    """No rank may hold both experts of `layer` (`ALL_LAYERS`: of any)."""

    first: int
    second: int
    layer: int = ALL_LAYERS

    def __str__(self) -> str:
        return f"apart {self.first},{self.second}{_where(self.layer)}"


@dataclass(frozen=True)
class Capacity:
    """A rank (a node) may hold at most `num_experts` distinct experts of each layer."""

    scope: str
    place: int
    num_experts: int

    def __str__(self) -> str:
        return f"{self.scope} {self.place} holds at most {self.num_experts} experts"


Constraint = Pin | Apart | Capacity


def _where(layer: int) -> str:
    return "" if layer == ALL_LAYERS else f" in layer {layer}"


@dataclass(frozen=True)
class Constraints:
    """Every constraint of a problem; empty by default."""

    pins: tuple[Pin, ...] = ()
    apart: tuple[Apart, ...] = ()
    capacities: tuple[Capacity, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pins or self.apart or self.capacities)

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from (*self.pins, *self.apart, *self.capacities)

    def of_layer(self, layer: int) -> list[Constraint]:
        """Return the constraints that touch a layer."""
        return [one for one in self if getattr(one, "layer", ALL_LAYERS) in (ALL_LAYERS, layer)]

    def check_names(self, num_layers: int, num_experts: int, num_ranks: int, num_nodes: int) -> None:
        """Raise InputError for a layer, expert, rank or node that the problem does not have."""
        limits = {"layer": num_layers, "expert": num_experts, "first": num_experts, "second": num_experts,
                  "rank": num_ranks}
        for one in self:
            for name, limit in limits.items():
                value = getattr(one, name, None)
                if value is not None and not (0 <= value < limit or (name == "layer" and value == ALL_LAYERS)):
                    kind = {"first": "expert", "second": "expert"}.get(name, name)
                    raise InputError(f"constraint '{one}': {kind} {value} is outside 0 ... {limit - 1}")
            if isinstance(one, Capacity):
                places = {"rank": num_ranks, "node": num_nodes}.get(one.scope)
                if places is None or not 0 <= one.place < places or one.num_experts < 1:
                    raise InputError(f"constraint '{one}': needs a rank or node that exists and at least 1 expert")
            if isinstance(one, Apart) and one.first == one.second:
                raise InputError(f"constraint '{one}': an expert cannot be kept from itself")

    def broken(self, plan: PlacementPlan, ranks_per_node: int) -> list[str]:
        """Return what `plan` breaks, one text per constraint and layer."""
        found = []
        for layer in range(plan.num_layers):
            held = np.zeros((plan.num_ranks, plan.num_experts), bool)
            held[plan.slot_rank, plan.physical_to_logical[layer]] = True
            found += [f"{one} (broken in layer {layer})" for one in self.of_layer(layer)
                      if not _holds(one, held, ranks_per_node)]
        return found


def _holds(one: Constraint, held: np.ndarray, ranks_per_node: int) -> bool:
    if isinstance(one, Pin):
        return bool(held[one.rank, one.expert])
    if isinstance(one, Apart):
        return not bool(np.any(held[:, one.first] & held[:, one.second]))
    width = 1 if one.scope == "rank" else ranks_per_node
    part = held[one.place * width:(one.place + 1) * width].any(axis=0)
    return int(part.sum()) <= one.num_experts
