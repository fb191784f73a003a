"""Energy of a run: what each device draws idle, and what it draws more while it computes."""

from __future__ import annotations

from collections.abc import Mapping

from moesim.errors import InputError
from moesim.hardware.spec import HardwareSpec


def energy_j(hardware: HardwareSpec, busy_s: Mapping[str, float], elapsed_s: float) -> float | None:
    """Return the joules of the devices named in `busy_s` over `elapsed_s`; None if the power of one is not known.

    ``sum over devices of idle_w * elapsed + (busy_w - idle_w) * busy``. The machine file's power includes the device's own
    memory; links, fans and power supplies are not counted.

    Raises:
        InputError: a device that is busy for longer than the run, or a time below 0.
    """
    total = 0.0
    for name, busy in busy_s.items():
        device = hardware.device(name)
        if not 0 <= busy <= elapsed_s * (1 + 2**-30):
            raise InputError(f"energy: device {name!r} cannot be busy for {busy} s of {elapsed_s} s")
        if device.idle_w is None or device.busy_w is None:
            return None
        total += device.idle_w * elapsed_s + (device.busy_w - device.idle_w) * busy
    return total
