"""OffloadMachine: which device computes, where the experts lie, and over which links they come."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moesim.errors import InputError, did_you_mean
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import HardwareSpec, Link
from moesim.hardware.work import Cost
from moesim.lowering.graph import NONE, Resource
from moesim.model.spec import ModelSpec
from moesim.units import format_bytes

STAGING_SLOTS = 2


@dataclass(frozen=True)
class OffloadMachine:
    """One device with its own memory, a slower memory that holds every expert, and a CPU.

    Attributes:
        device: computes attention, routers and resident experts.
        slow_memory: holds all experts; `cpu` computes misses if that is its own memory.
    """

    hardware: HardwareSpec
    device: str
    slow_memory: str
    cpu: str

    def __post_init__(self) -> None:
        self.hardware.device(self.device)
        self.hardware.device(self.cpu)
        if self.slow_memory not in self.hardware.memories:
            raise InputError(
                f"hardware {self.hardware.name!r} has no memory {self.slow_memory!r}."
                f"{did_you_mean(self.slow_memory, self.hardware.memories)}"
            )
        if self.slow_memory == self.fast_memory:
            raise InputError(
                f"hardware {self.hardware.name!r}: the experts' memory {self.slow_memory!r} is the device's own"
            )

    @property
    def fast_memory(self) -> str:
        """The device's own memory."""
        return self.hardware.memory_of(self.device).name

    @cached_property
    def route(self) -> tuple[Link, ...]:
        """Links from the slow memory to the device, in order."""
        return tuple(self.hardware.route(self.slow_memory, self.fast_memory))

    @property
    def cpu_sees_experts(self) -> bool:
        """Whether the CPU can compute an expert where it lies."""
        return self.hardware.memory_of(self.cpu).name == self.slow_memory

    def resources(self) -> tuple[Resource, ...]:
        """Return the resources: compute, CPU, then the wires of each link (shared ports and half duplex share one)."""
        fixed = (
            Resource(f"{self.device}.compute", self.device, "compute"),
            Resource(f"{self.cpu}.experts", self.cpu, "experts"),
        )
        return (
            *fixed,
            *(
                Resource(wire, self.device, wire.rsplit(".", 2)[-2] + " " + wire.rsplit(".", 1)[-1])
                for wire in self._wires
            ),
        )

    @property
    def compute_index(self) -> int:
        """The device's resource."""
        return 0

    @property
    def cpu_index(self) -> int:
        """The CPU's resource."""
        return 1

    @cached_property
    def _wires(self) -> tuple[str, ...]:
        wires = [_wire(link, "in") for link in self.route] + [_wire(self.route[-1], "out")]
        return tuple(dict.fromkeys(wires))

    @cached_property
    def route_indexes(self) -> tuple[int, ...]:
        """The resource of each link of the route, towards the device."""
        return tuple(2 + self._wires.index(_wire(link, "in")) for link in self.route)

    @property
    def in_index(self) -> int:
        """The wire that brings activations to the device, -1 when CPU and device share a memory."""
        return NONE if self.shares_memory else self.route_indexes[-1]

    @property
    def out_index(self) -> int:
        """The wire that takes activations to the CPU, -1 when they share a memory."""
        return NONE if self.shares_memory else 2 + self._wires.index(_wire(self.route[-1], "out"))

    @property
    def back_index(self) -> int:
        """The wire that takes an evicted expert out of the device's memory."""
        return 2 + self._wires.index(_wire(self.route[-1], "out"))

    @property
    def shares_memory(self) -> bool:
        """Whether device and CPU compute in one memory."""
        return self.hardware.memory_of(self.cpu).name == self.fast_memory

    def activation_copy(self, cost: CostModel, num_bytes: int) -> Cost:
        """Return the cost of moving activations between device and CPU."""
        return cost.copy(self.route[-1].name, num_bytes)

    def free_bytes(self, model: ModelSpec, kv_tokens: int) -> float:
        """Return what is left on the device for expert slots (without the staging slots)."""
        kv_bytes = kv_tokens * model.kv_bytes_per_token_layer * model.num_layers
        taken = model.non_expert_bytes + kv_bytes + STAGING_SLOTS * model.expert_bytes
        return self.hardware.memory_of(self.device).num_bytes - taken

    def check_memory(self, model: ModelSpec, num_slots: int, kv_tokens: int) -> None:
        """Raise InputError unless the slots fit on the device and all experts in the slow memory."""
        free, needed = self.free_bytes(model, kv_tokens), num_slots * model.expert_bytes
        if needed > free:
            most = max(0, int(free // model.expert_bytes)) // model.num_moe_layers
            raise InputError(
                f"{num_slots} expert slots need {format_bytes(needed)}, but {format_bytes(max(free, 0.0))} of {self.fast_memory!r} are "
                f"left beside the rest of {model.name!r}; at most {most} slots per layer fit"
            )
        slow = self.hardware.memories[self.slow_memory]
        total = model.num_pool_experts * model.expert_bytes
        if total > slow.num_bytes:
            raise InputError(
                f"the experts of {model.name!r} need {format_bytes(total)}, but {self.slow_memory!r} holds {format_bytes(slow.num_bytes)}"
            )


def _wire(link: Link, direction: str) -> str:
    return f"{link.port or link.name}.{'both' if link.duplex == 'half' else direction}"


def offload_machine(
    hardware: HardwareSpec, *, device: str | None = None, slow_memory: str | None = None
) -> OffloadMachine:
    """Pick the parts: the first GPU (or SoC, NPU, CPU), the CPU, and the largest other memory that has a route.

    Args:
        device: name of the computing device. slow_memory: name of the memory that holds the experts; default the
            host's DRAM, or flash where the device shares the host's memory.
    """
    ordered = [d for kind in ("gpu", "npu", "soc", "cpu") for d in hardware.devices_of_kind(kind)]
    chosen = hardware.device(device) if device else ordered[0]
    cpus = hardware.devices_of_kind("cpu") or [chosen]
    cpu = next((c for c in cpus if c.node == chosen.node), cpus[0])
    if slow_memory is None:
        others = [
            m for m in hardware.memories.values() if m.name != chosen.memory and m.kind in ("dram", "unified", "flash")
        ]
        ranked = sorted(others, key=lambda m: (m.kind == "flash", m.node != chosen.node))
        if not ranked:
            raise InputError(f"hardware {hardware.name!r} has no second memory to keep experts in")
        slow_memory = ranked[0].name
    return OffloadMachine(hardware, chosen.name, slow_memory, cpu.name)
