"""PlaneCache: which planes of which experts are resident under a budget in bytes; D2MoE's memory-budget scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from moesim.cache.precision import ABSENT_LEVEL, ExpertVersions
from moesim.errors import CheckError, InputError
from moesim.units import format_bytes


class Plane(NamedTuple):
    """One plane of one expert."""

    layer: int
    expert: int
    level: int


class PlaneCache:
    """Resident planes of nested versions, in one budget for all layers (D2MoE, MobiCom 2025, arXiv 2504.15299).

    When the planes of layer j do not fit, those of layer j - 1 are freed: from the highest level down, the base planes last, as many
    as it takes. Beyond the paper: then those of the layer before it, and so on round the model, because a step goes through the layers
    in order and the layer just done comes up last; at last what layer j itself does not need now. Of planes at one
    level those of the expert with the fewest uses go first, then the lower expert.

    Raises:
        InputError: versions that are not nested, or a budget below one expert at its lowest level.
    """

    def __init__(self, num_layers: int, num_experts: int, budget_bytes: int, versions: ExpertVersions) -> None:
        if not versions.nested:
            raise InputError("plane cache: the versions are exclusive copies; it needs nested ones")
        if budget_bytes < versions.weight_bytes(0):
            raise InputError(f"plane cache: a budget of {format_bytes(budget_bytes)} holds no expert of "
                             f"{format_bytes(versions.weight_bytes(0))}")
        self.num_layers, self.num_experts, self.budget_bytes = num_layers, num_experts, budget_bytes
        self.versions = versions
        self.num_slots = 0  # planes are counted in bytes
        self._levels = [[ABSENT_LEVEL] * num_experts for _ in range(num_layers)]
        self._uses = [[0] * num_experts for _ in range(num_layers)]
        self._used_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Bytes of the budget that no plane takes."""
        return self.budget_bytes - self._used_bytes

    def level_of(self, layer: int, expert: int) -> int:
        """Return the highest level whose planes are all resident, -1 for none."""
        return self._levels[layer][expert]

    def prepare(self, layer: int, wanted: Mapping[int, int]) -> list[Plane]:
        """Make experts of a layer resident at least at the levels wanted; returns the planes that had to go, in order.

        Raises:
            InputError: more than the budget holds.
        """
        needed = sum(self.versions.weight_bytes(level) for level in wanted.values())
        if needed > self.budget_bytes:
            raise InputError(f"plane cache: layer {layer} needs {format_bytes(needed)} at once, but the budget is "
                             f"{format_bytes(self.budget_bytes)}")
        missing = sum(self.versions.copy_bytes(self._levels[layer][expert], level) for expert, level in wanted.items()
                      if level > self._levels[layer][expert])
        freed = self._free(layer, wanted, missing)
        for expert, level in wanted.items():
            self._uses[layer][expert] += 1
            self._levels[layer][expert] = max(level, self._levels[layer][expert])
        self._used_bytes += missing
        return freed

    def check(self) -> None:
        """Raise CheckError unless the bytes are those of the resident planes and within the budget."""
        held = sum(self.versions.weight_bytes(level) for row in self._levels for level in row)
        if held != self._used_bytes or held > self.budget_bytes:
            raise CheckError(f"plane cache: {held} bytes are resident, {self._used_bytes} are counted, and "
                             f"{self.budget_bytes} fit")

    def _free(self, layer: int, wanted: Mapping[int, int], num_bytes: int) -> list[Plane]:
        freed = []
        planes = self._candidates(layer, wanted)
        while self.free_bytes < num_bytes:
            plane = next(planes)
            self._levels[plane.layer][plane.expert] -= 1
            self._used_bytes -= self.versions.part_bytes[plane.level]
            freed.append(plane)
        return freed

    def _candidates(self, layer: int, wanted: Mapping[int, int]) -> Iterator[Plane]:
        """Yield the planes in the order in which they go; every plane comes after those above it."""
        for back in range(1, self.num_layers + 1):
            other = (layer - back) % self.num_layers
            keep = wanted if other == layer else {}
            ranked = sorted(range(self.num_experts), key=self._uses[other].__getitem__)  # stable: then the lower expert
            for level in reversed(range(self.versions.num_levels)):
                for expert in ranked:
                    if keep.get(expert, ABSENT_LEVEL) < level <= self._levels[other][expert]:
                        yield Plane(other, expert, level)
