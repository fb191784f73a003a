"""Constraints on a plan beyond one home per expert: pins, pairs kept apart, capacities of ranks and nodes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, unknown
from moesim.placement.plan import PlacementPlan

ALL_LAYERS = -1


@dataclass(frozen=True)
class Pin:
    """Expert `expert` of `layer` (`ALL_LAYERS`: of each) must have a copy on `rank`."""

    expert: int
    rank: int
    layer: int = ALL_LAYERS

    def __str__(self) -> str:
        return f"pin {self.expert}@{self.rank}{_of_layer(self.layer)}"


@dataclass(frozen=True)
class Apart:
    """No rank may hold both experts of `layer` (`ALL_LAYERS`: of any)."""

    first: int
    second: int
    layer: int = ALL_LAYERS

    def __str__(self) -> str:
        return f"apart {self.first},{self.second}{_of_layer(self.layer)}"


@dataclass(frozen=True)
class Capacity:
    """A rank (a node) may hold at most `num_experts` distinct experts of each layer."""

    scope: str
    place: int
    num_experts: int

    def __str__(self) -> str:
        return f"{self.scope}-capacity {self.place}={self.num_experts}"


Constraint = Pin | Apart | Capacity


_FORMS = {"pin": (r"(\d+)@(\d+)(?::(\d+))?", "EXPERT@RANK or EXPERT@RANK:LAYER"),
          "apart": (r"(\d+),(\d+)(?::(\d+))?", "A,B or A,B:LAYER"),
          "rank-capacity": (r"(\d+)=(\d+)", "RANK=N"), "node-capacity": (r"(\d+)=(\d+)", "NODE=N")}


def _of_layer(layer: int) -> str:
    return "" if layer == ALL_LAYERS else f":{layer}"


def parse_constraint(kind: str, text: str) -> Constraint:
    """Return the constraint that is written ``kind text``, the form in which `str` writes it.

    Kinds: ``pin`` EXPERT@RANK[:LAYER], ``apart`` A,B[:LAYER], ``rank-capacity`` RANK=N, ``node-capacity`` NODE=N.

    Raises:
        InputError: an unknown kind, or another form.
    """
    if kind not in _FORMS:
        raise unknown("constraint", kind, _FORMS)
    pattern, form = _FORMS[kind]
    found = re.fullmatch(pattern, text)
    if not found:
        raise InputError(f"constraint {kind} {text!r}: expected {form}")
    first, second, *layer = (ALL_LAYERS if group is None else int(group) for group in found.groups())
    if kind == "pin":
        return Pin(first, second, *layer)
    return Apart(first, second, *layer) if kind == "apart" else Capacity(kind.removesuffix("-capacity"), first, second)


def parse_constraints(texts: Iterable[str]) -> Constraints:
    """Return the constraints written ``kind text`` each, e.g. ``["pin 3@1", "apart 2,5:0"]``."""
    found = [parse_constraint(*text.split(maxsplit=1)) if " " in text else parse_constraint(text, "")
             for text in texts]
    return Constraints(tuple(one for one in found if isinstance(one, Pin)),
                       tuple(one for one in found if isinstance(one, Apart)),
                       tuple(one for one in found if isinstance(one, Capacity)))


@dataclass(frozen=True)
class Constraints:
    """Every constraint of a problem; empty by default."""

    pins: tuple[Pin, ...] = ()
    apart: tuple[Apart, ...] = ()
    capacities: tuple[Capacity, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pins or self.apart or self.capacities)

    def __iter__(self) -> Iterator[Constraint]:
        yield from self.pins
        yield from self.apart
        yield from self.capacities

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
