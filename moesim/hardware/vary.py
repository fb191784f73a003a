"""The same machine with other numbers: what a sweep over links, memories and processors varies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moesim.errors import InputError, did_you_mean
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Link, Memory

Part = Device | Memory | Link | Fabric
_NUMBERS = {
    Device: ("kernel_overhead_s", "tile_tokens"),
    Memory: ("num_bytes", "bytes_per_s"),
    Link: ("bytes_per_s", "latency_s"),
    Fabric: ("bytes_per_s", "latency_s"),
}
_WHOLE = ("tile_tokens",)
_RATES = "flops_per_s"
VARIED = "varied"


def hardware_keys(hardware: HardwareSpec) -> list[str]:
    """Return every key that `vary` takes for this machine: ``PART.NUMBER``, and ``PART.flops_per_s.DTYPE``.

    A part is named without its place: ``pcie`` stands for the PCIe link of every GPU of every node.
    """
    keys = []
    for name, part in _parts(hardware):
        base = _base(name)
        keys += [f"{base}.{number}" for number in _NUMBERS[type(part)]]
        if isinstance(part, Device):
            keys += [f"{base}.{_RATES}.{dtype}" for dtype in part.flops_per_s]
    return list(dict.fromkeys(keys))


def vary(hardware: HardwareSpec, values: Mapping[str, float]) -> HardwareSpec:
    """Return the machine with numbers replaced in every part of a name; their reference becomes ``varied``.

    Args:
        values: see `hardware_keys`, e.g. ``{"pcie.bytes_per_s": 64e9, "gpu.flops_per_s.bf16": 1e15}``.

    Raises:
        InputError: a key that the machine does not have (with a suggestion), or a number that it cannot take.
    """
    known = hardware_keys(hardware)
    for key, value in values.items():
        if key not in known:
            raise InputError(f"hardware {hardware.name!r} has no number {key!r}.{did_you_mean(key, known)}")
        if not math.isfinite(value):
            raise InputError(f"hardware {hardware.name!r}: {key} must be finite, got {value}")
    return dataclasses.replace(
        hardware,
        devices={name: _changed(name, part, values) for name, part in hardware.devices.items()},
        memories={name: _changed(name, part, values) for name, part in hardware.memories.items()},
        links={name: _changed(name, part, values) for name, part in hardware.links.items()},
        fabrics=tuple(_changed(part.name, part, values) for part in hardware.fabrics),
        references=hardware.references | ({VARIED: "a what-if value, no reference"} if values and hardware.references else {}))


def _parts(hardware: HardwareSpec) -> list[tuple[str, Part]]:
    named: list[tuple[str, Part]] = [*hardware.devices.items(), *hardware.memories.items(), *hardware.links.items()]
    return named + [(fabric.name, fabric) for fabric in hardware.fabrics]


def _base(name: str) -> str:
    """``node1.gpu0.pcie`` -> ``pcie``; ``node0.gpu3`` -> ``gpu``; a fabric keeps its name (``ndr400``)."""
    return name.rpartition(".")[2].rstrip("0123456789") if "." in name else name


def _changed(name: str, part: Any, values: Mapping[str, float]) -> Any:
    """Return a part with its own numbers replaced, or the part itself where none is its own."""
    changes: dict[str, Any] = {}
    for key, value in values.items():
        base, _, rest = key.partition(".")
        number, _, dtype = rest.partition(".")
        if base != _base(name) or not hasattr(part, number):
            continue
        if number == _RATES:
            changes[number] = {**changes.get(number, part.flops_per_s), dtype: value}
        else:
            changes[number] = _whole(key, value) if number in _WHOLE else value
    if changes and part.reference:
        changes["reference"] = VARIED
    return dataclasses.replace(part, **changes) if changes else part


def _whole(key: str, value: float) -> int:
    if not float(value).is_integer():
        raise InputError(f"{key} must be a whole number, got {value}")
    return int(value)
