"""PlacementPlan: which expert each slot of each rank holds. Written as ``plan.json``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moesim.artifacts import read_json, write_json
from moesim.errors import CheckError, InputError

SCHEMA = "moesim.plan/1"
_SHARE_SUM = 1e-7


@dataclass(frozen=True)
class PlacementPlan:
    """Rank r owns slots ``r * slots_per_rank ... (r + 1) * slots_per_rank - 1`` of every layer.

    Attributes:
        physical_to_logical: int32[layer, slot], the logical expert in each slot. An expert may fill
            several slots (replicas, on one rank or several).
        slot_share: float64[layer, slot], the part of its expert's tokens that each slot serves; the shares of
            an expert's slots sum to 1. None (what most engines do): an even split over the replicas.
        num_ranks, num_experts: ranks, and logical experts per layer.
        provenance: solver, seed, status, objective, bound, digests of the inputs.

    Raises:
        CheckError: an id out of range, slots that do not divide, an expert of a layer without a slot.
    """

    physical_to_logical: np.ndarray
    num_ranks: int
    num_experts: int
    provenance: dict[str, Any] = field(default_factory=dict)
    slot_share: np.ndarray | None = None

    def __post_init__(self) -> None:
        slots = np.array(self.physical_to_logical, dtype=np.int32)
        slots.setflags(write=False)
        object.__setattr__(self, "physical_to_logical", slots)
        if self.slot_share is not None:
            shares = np.array(self.slot_share, dtype=np.float64)
            shares.setflags(write=False)
            object.__setattr__(self, "slot_share", shares)
        self.check()

    def check(self) -> None:
        """Raise CheckError unless every expert has a home and every id is in range."""
        slots = self.physical_to_logical
        if slots.ndim != 2 or slots.size == 0:
            raise CheckError(f"plan: physical_to_logical must be [layer, slot], got shape {slots.shape}")
        if self.num_ranks < 1 or slots.shape[1] % self.num_ranks:
            raise CheckError(f"plan: {slots.shape[1]} slots do not divide over {self.num_ranks} ranks")
        wrong = np.argwhere((slots < 0) | (slots >= self.num_experts))
        if len(wrong):
            layer, slot = wrong[0]
            raise CheckError(
                f"plan: layer {layer}, slot {slot} holds expert {slots[layer, slot]}, outside 0 ... {self.num_experts - 1}"
            )
        missing = np.argwhere(self.replica_count == 0)
        if len(missing):
            layer, expert = missing[0]
            raise CheckError(
                f"plan: expert {expert} of layer {layer} has no slot ({len(missing)} such experts)"
            )
        if self.slot_share is not None:
            self._check_shares(self.slot_share)

    def _check_shares(self, shares: np.ndarray) -> None:
        if shares.shape != self.physical_to_logical.shape or not np.all(shares >= 0):
            raise CheckError(f"plan: slot_share must be {self.physical_to_logical.shape} and not negative")
        sums = np.zeros((self.num_layers, self.num_experts))
        layers = np.repeat(np.arange(self.num_layers), self.num_slots)
        np.add.at(sums, (layers, self.physical_to_logical.ravel()), shares.ravel())
        wrong = np.argwhere(~np.isclose(sums, 1.0, rtol=0, atol=_SHARE_SUM))
        if len(wrong):
            layer, expert = wrong[0]
            raise CheckError(f"plan: the shares of expert {expert} in layer {layer} sum to "
                             f"{sums[layer, expert]:.6g}, not 1")

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return self.physical_to_logical.shape[0]

    @property
    def num_slots(self) -> int:
        """Slots per layer."""
        return self.physical_to_logical.shape[1]

    @property
    def slots_per_rank(self) -> int:
        """Slots of one layer on one rank."""
        return self.num_slots // self.num_ranks

    @cached_property
    def slot_rank(self) -> np.ndarray:
        """int32[slot], the rank that owns a slot."""
        return (np.arange(self.num_slots) // self.slots_per_rank).astype(np.int32)

    @cached_property
    def replica_count(self) -> np.ndarray:
        """int32[layer, expert], slots that hold each expert."""
        counts = np.zeros((self.num_layers, self.num_experts), np.int32)
        layers = np.repeat(np.arange(self.num_layers), self.num_slots)
        np.add.at(counts, (layers, self.physical_to_logical.ravel()), 1)
        return counts

    @cached_property
    def share(self) -> np.ndarray:
        """float64[layer, slot], the part of its expert's tokens that each slot serves (even without `slot_share`)."""
        if self.slot_share is not None:
            return self.slot_share
        return 1.0 / np.take_along_axis(self.replica_count, self.physical_to_logical.astype(np.intp), axis=1)

    @cached_property
    def logical_to_physical(self) -> np.ndarray:
        """int32[layer, expert, replica], slots of each expert in rising order, -1 padded."""
        table = np.full((self.num_layers, self.num_experts, int(self.replica_count.max())), -1, np.int32)
        for layer, slots in enumerate(self.physical_to_logical):
            seen = np.zeros(self.num_experts, np.int32)
            for slot, expert in enumerate(slots):
                table[layer, expert, seen[expert]] = slot
                seen[expert] += 1
        return table

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write ``*.plan.json``."""
        body = {
            "num_ranks": self.num_ranks,
            "num_experts": self.num_experts,
            "slots_per_rank": self.slots_per_rank,
            "provenance": self.provenance,
            "physical_to_logical": self.physical_to_logical.tolist(),
        }
        if self.slot_share is not None:
            body["slot_share"] = self.slot_share.tolist()
        return write_json(path, SCHEMA, body)


def read_plan(path: str | os.PathLike[str]) -> PlacementPlan:
    """Read a plan; raises InputError for a file that is not one, CheckError for a plan that breaks a rule."""
    body = read_json(path, SCHEMA)
    try:
        rows = [np.asarray(row, dtype=np.int64) for row in body["physical_to_logical"]]
        if len({len(row) for row in rows}) != 1:
            raise InputError(f"{path}: the rows of physical_to_logical differ in length")
        shares = body.get("slot_share")
        return PlacementPlan(
            np.stack(rows), int(body["num_ranks"]), int(body["num_experts"]), body.get("provenance", {}),
            None if shares is None else np.asarray(shares, dtype=np.float64),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a placement plan: {error!r}") from None
    except CheckError as error:
        raise CheckError(f"{path}: {error}") from None
