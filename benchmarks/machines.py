"""The table of docs/hardware.md: the machines of the catalog, and which published systems used them.

Run ``python benchmarks/machines.py``; all numbers are read from the catalog. Nothing is timed.
"""

from __future__ import annotations

from moesim.hardware.load import hardware_names, load_hardware
from moesim.hardware.spec import Device, HardwareSpec, Link, Memory
from moesim.units import format_bytes, format_rate

COLUMNS = ("machine", "computes", "its memory", "host memory", "link to it", "flash", "a 4 KiB read", "idle to busy", "used by")

# which systems ran on such a machine; their papers name at least its GPU (its SoC, its board)
USED_BY = {
    "a100-sxm": "Pre-gated MoE, Read-ME, FineMoE",
    "a40": "ExpertFlow",
    "apple-m5-max": "boyle",
    "jetson-agx-orin": "HOBBIT, D2MoE",
    "jetson-tx2": "EdgeMoE",
    "l4": "MoE-Lightning, Fiddler (first version)",
    "phone-soc": "EdgeMoE (Xiaomi 14), PowerInfer-2 (OnePlus 12)",
    "quadro-rtx-6000": "Fiddler",
    "raspberry-pi-4b": "EdgeMoE",
    "rtx-3060": "D2MoE",
    "rtx-3090": "DALI, FloE, FineMoE",
    "rtx-4090": "HOBBIT, ProMoE",
    "rtx-5070-ti": "FlashMoE",
    "rtx-a5000": "MoE-Infinity",
    "rtx-a6000": "HybriMoE",
    "t4": "Mixtral-offloading, MoE-Lightning",
    "xeon-8452y-2s": "KTransformers",
}
SMALL_READ = 4096


def table() -> str:
    """Return the table in Markdown, one row per machine of the catalog."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(_row(load_hardware(name)) for name in hardware_names())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(spec: HardwareSpec) -> tuple[str, ...]:
    devices = {device.kind: device for device in reversed(spec.devices.values())}  # the first of each kind
    main = spec.device(spec.ranks[0])
    own = spec.memory_of(main.name)
    host = next((memory for memory in spec.memories.values() if memory.kind == "dram"), own)
    flash = next(link for link in spec.links.values() if spec.memories[link.source].kind == "flash")
    return (f"`{spec.name}`", _kinds(spec), _memory(own), "the same" if host is own else _memory(host),
            "–" if host is own else format_rate(spec.route(host.name, own.name)[0].bytes_per_s),
            _flash(spec, flash), format_rate(SMALL_READ / flash.seconds(SMALL_READ)),
            ", ".join(_power(device) for _, device in sorted(devices.items(), reverse=True) if device.idle_w is not None) or "–",
            USED_BY.get(spec.name, "–"))


def _kinds(spec: HardwareSpec) -> str:
    names = [device.kind for device in spec.devices.values()]
    return ", ".join(f"{names.count(kind)} {kind.upper()}" for kind in dict.fromkeys(names))


def _memory(memory: Memory) -> str:
    return f"{format_bytes(memory.num_bytes)}, {format_rate(memory.bytes_per_s)}"


def _flash(spec: HardwareSpec, link: Link) -> str:
    reached = link.share_of_rate[-1][1] if link.share_of_rate else 1.0
    text = f"{format_bytes(spec.memories[link.source].num_bytes)}, {format_rate(link.bytes_per_s)}"
    return text if reached > 0.99 else f"{text} ({format_rate(reached * link.bytes_per_s)} reached)"


def _power(device: Device) -> str:
    return f"{device.kind.upper()} {device.idle_w:g} to {device.busy_w:g} W"


if __name__ == "__main__":
    print(table())
