"""This machine as a HardwareSpec: two tiers and two processors, with every cost from the profile.

The numbers written here only satisfy the type; a validated prediction takes none of them (its report
counts the sources, and a test asserts that none is nameplate).
"""

from __future__ import annotations

from moesim.hardware.spec import Device, HardwareSpec, Link, Memory
from moesim.lowering.machine import OffloadMachine
from moesim.units import GB, TB

FAST, SLOW, COMPUTE, HOST, LINK = "fast", "slow", "device", "host", "slow_tier"
_REFERENCE = "placeholder"


def local_machine(device: str, slow_tier_bytes_per_s: float | None) -> OffloadMachine:
    """Return the machine that the torch executor runs on: `device` (cpu or cuda) and its host."""
    kind = "gpu" if device == "cuda" else "cpu"
    rate = slow_tier_bytes_per_s or 10 * GB
    flops = {"fp32": float(TB), "bf16": float(TB)}
    hardware = HardwareSpec(
        name="this machine",
        devices={
            COMPUTE: Device(COMPUTE, kind, FAST, flops, reference=_REFERENCE),
            HOST: Device(HOST, "cpu", SLOW, flops, reference=_REFERENCE),
        },
        memories={
            FAST: Memory(FAST, "hbm" if kind == "gpu" else "dram", TB, 10 * GB, reference=_REFERENCE),
            SLOW: Memory(SLOW, "dram", TB, 10 * GB, reference=_REFERENCE),
        },
        links={LINK: Link(LINK, SLOW, FAST, LINK, rate, 0.0, reference=_REFERENCE)},
        ranks=(COMPUTE,),
        references={_REFERENCE: "not a data sheet: replaced by measured tables"},
    )
    return OffloadMachine(hardware, COMPUTE, SLOW, HOST)
