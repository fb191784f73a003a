"""The machines of the catalog: numbers that follow from other numbers, references, power, reads by size, one small run each."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

from moesim.artifacts import catalog_folder
from moesim.hardware.load import hardware_names, load_hardware
from moesim.scenario.inputs import load_inputs
from moesim.scenario.load import load_scenario
from moesim.scenario.offload import OffloadSetup

ROOT = Path(__file__).parent.parent
KIB, MIB = 1024, 1024**2
FLASH_LINKS = ("nvme", "ufs", "sata", "sd")
MOE_FIT = {4 * KIB: 0.028, 128 * KIB: 0.625, MIB: 2.46, 8 * MIB: 4.13}  # GB/s of one drive, as its package prints them


@functools.cache
def raw(name: str) -> dict[str, Any]:
    """Return a catalog file by another reader than the one under test."""
    document: dict[str, Any] = YAML(typ="safe", pure=True).load(catalog_folder("hardware") / f"{name}.yaml")
    return document


def flash_link(name: str) -> dict[str, Any]:
    """Return the link of a machine's file that leads from its flash."""
    return next(part for key, part in raw(name)["links"].items() if key in FLASH_LINKS)


def with_key(group: str, key: str) -> list[tuple[str, str]]:
    """Return (machine, part) of every part of a group that has a key."""
    return [(name, part) for name in hardware_names() for part, values in raw(name)[group].items() if key in values]


def text_of(name: str, part: dict[str, Any], key: str) -> str:
    """Return the reference that a file gives for one number of a part."""
    return str(raw(name)["references"][part.get("reference_of", {}).get(key, part["reference"])])


def benchmark() -> ModuleType:
    """Import benchmarks/machines.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("moesim_benchmark_machines", ROOT / "benchmarks/machines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", hardware_names())
def test_every_number_has_a_reference(name: str) -> None:
    """Each part names a listed reference, and so does each key that `reference_of` singles out, which the part must have."""
    file = raw(name)
    parts = [part for group in ("devices", "memories", "links") for part in file[group].values()]
    parts += [file[key] for key in ("node_fabric", "cluster_fabric") if key in file]
    for part in parts:
        assert part["reference"] in file["references"]
        assert set(part.get("reference_of", {}).values()) <= set(file["references"])
        assert set(part.get("reference_of", {})) <= set(part)


@pytest.mark.parametrize(("group", "key"), [("devices", "idle_w"), ("devices", "busy_w"), ("links", "share_of_rate")])
def test_power_and_read_curves_have_references_of_their_own(group: str, key: str) -> None:
    """No data sheet of a part gives them beside its rates, so they are never covered by the part's general reference."""
    found = with_key(group, key)
    assert len(found) >= 7
    assert [(name, part) for name, part in found if key not in raw(name)[group][part]["reference_of"]] == []


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        # pins x Gb/s per pin / 8
        ("rtx-a6000", "gddr", 384 * 16e9 / 8),
        ("rtx-a5000", "gddr", 384 * 16e9 / 8),
        ("a40", "gddr", 384 * 14.5e9 / 8),
        ("rtx-3060", "gddr", 192 * 14e9 / 8),
        ("quadro-rtx-6000", "gddr", 384 * 14e9 / 8),
        ("t4", "gddr", 256 * 10e9 / 8),
        ("l4", "gddr", 192 * 12.5e9 / 8),
        ("rtx-5070-ti", "gddr", 256 * 28e9 / 8),
        ("xeon-8452y-2s", "hbm", 5120 * 2.43e9 / 8),
        # channels x transfers per second x bytes per transfer
        ("rtx-a6000", "dram", 6 * 2667e6 * 8),
        ("rtx-a5000", "dram", 8 * 3200e6 * 8),
        ("a40", "dram", 8 * 3200e6 * 8),
        ("rtx-3060", "dram", 2 * 3200e6 * 8),
        ("quadro-rtx-6000", "dram", 12 * 2667e6 * 8),
        ("t4", "dram", 4 * 2133e6 * 8),
        ("l4", "dram", 6 * 2933e6 * 8),
        ("rtx-5070-ti", "dram", 2 * 5600e6 * 8),
        ("xeon-8452y-2s", "dram", 16 * 4800e6 * 8),
        ("jetson-tx2", "unified", 128 / 8 * 3732e6),
        ("raspberry-pi-4b", "unified", 32 / 8 * 3200e6),
        ("apple-m5-max", "unified", 512 / 8 * 9600e6),
    ],
)
def test_memory_rates_follow_from_the_bus(name: str, key: str, expected: float) -> None:
    """A memory's rate is what the width and the clock of its bus give."""
    assert raw(name)["memories"][key]["bytes_per_s"] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "gigatransfers_per_s"),
    [("quadro-rtx-6000", 8), ("t4", 8), ("rtx-a6000", 16), ("rtx-a5000", 16), ("rtx-3060", 16), ("a40", 16), ("l4", 16),
     ("xeon-8452y-2s", 16), ("rtx-5070-ti", 32)],
)
def test_pcie_rates_follow_from_the_lanes(name: str, gigatransfers_per_s: int) -> None:
    """A link of 16 lanes carries 128 of 130 bits of every transfer, in each direction."""
    link = load_hardware(name).links["node0.gpu0.pcie"]
    assert link.bytes_per_s == pytest.approx(16 * gigatransfers_per_s * 1e9 * 128 / 130 / 8, rel=2e-3)
    assert link.duplex == "full"


@pytest.mark.parametrize(
    ("name", "cores", "hertz", "fp32_per_cycle"),
    [("rtx-a6000", 10, 2.2e9, 32), ("rtx-a5000", 28, 2.75e9, 32), ("rtx-3060", 8, 2.3e9, 32), ("a40", 32, 2.0e9, 64),
     ("quadro-rtx-6000", 24, 2.6e9, 64), ("t4", 12, 2.3e9, 32), ("l4", 12, 2.2e9, 64), ("rtx-5070-ti", 6, 3.9e9, 64),
     ("xeon-8452y-2s", 72, 2.0e9, 64), ("jetson-tx2", 6, 2.0e9, 8), ("raspberry-pi-4b", 4, 1.5e9, 8)],
)
def test_cpu_peaks_follow_from_the_cores(name: str, cores: int, hertz: float, fp32_per_cycle: int) -> None:
    """A CPU's fp32 peak is cores x clock x flops per cycle."""
    assert raw(name)["devices"]["cpu"]["flops_per_s"]["fp32"] == pytest.approx(cores * hertz * fp32_per_cycle, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "cores", "hertz", "bf16_by_fp32"),
    [("rtx-a6000", 10752, 1.80e9, 4), ("rtx-a5000", 8192, 1.695e9, 4), ("a40", 10752, 1.74e9, 4), ("rtx-3060", 3840, 1.703e9, 2),
     ("quadro-rtx-6000", 4608, 1.77e9, 1), ("t4", 2560, 1.59e9, 1), ("l4", 7424, 2.04e9, 4), ("rtx-5070-ti", 8960, 2.452e9, 2),
     ("jetson-tx2", 256, 1.3e9, 1)],
)
def test_gpu_peaks_follow_from_the_cores(name: str, cores: int, hertz: float, bf16_by_fp32: int) -> None:
    """A GPU's fp32 peak is two flops per core and cycle; tensor cores do a whole multiple of that in bf16."""
    peaks = raw(name)["devices"]["gpu"]["flops_per_s"]
    assert peaks["fp32"] == pytest.approx(2 * cores * hertz, rel=1e-2)
    assert peaks["bf16"] == pytest.approx(bf16_by_fp32 * peaks["fp32"], rel=1e-2)


@pytest.mark.parametrize(("name", "part"), with_key("devices", "busy_w"))
def test_power_is_what_the_file_cites_and_is_read_back(name: str, part: str) -> None:
    """Both numbers reach the device; the busy one is the cited rating (times two sockets, or by the share of cores used)."""
    values = raw(name)["devices"][part]
    idle, busy = float(values["idle_w"]), float(values["busy_w"])
    device = load_hardware(name).device(f"node0.{part}0")
    assert (device.idle_w, device.busy_w) == (idle, busy)
    assert 0 < idle < busy
    text = text_of(name, values, "busy_w")
    if name == "raspberry-pi-4b":
        assert (idle, busy) == (pytest.approx(5 * 0.540), pytest.approx(5 * 1.280))
        return
    rated = float(re.findall(r"([\d.]+) W\b", text)[0]) * (2 if "two of them" in text else 1)
    if name == "rtx-a6000" and part == "cpu":
        rated = rated / 4 + rated * 3 / 4 * 10 / 24
    assert busy == pytest.approx(rated, rel=5e-3)
    if part == "cpu" and name != "rtx-a6000":
        assert idle == pytest.approx(rated / 4, abs=0.75)


def test_parts_of_one_module_have_no_power() -> None:
    """Where only the whole module is rated nothing is said of its devices, so that no energy is made up."""
    silent = [name for name in hardware_names() if not any("busy_w" in part for part in raw(name)["devices"].values())]
    assert silent == ["apple-m5-max", "jetson-agx-orin", "jetson-tx2", "phone-soc", "raspberry-pi-5"]


@pytest.mark.parametrize(
    ("name", "reads_per_s"),
    [("rtx-a6000", 22000), ("rtx-3090", 22000), ("rtx-4090", 22000), ("jetson-agx-orin", 22000), ("rtx-3060", 15000),
     ("jetson-tx2", 10000), ("raspberry-pi-4b", 1500)],
)
def test_small_reads_take_what_the_data_sheet_says(name: str, reads_per_s: int) -> None:
    """One read of 4 KiB takes the inverse of the rate at queue depth 1, which the file cites."""
    link = next(link for link in load_hardware(name).links.values() if link.share_of_rate)
    assert link.seconds(4 * KIB) == pytest.approx(1 / reads_per_s, rel=5e-3)
    assert re.search(rf"\b{reads_per_s // 1000} ?{reads_per_s % 1000:03d}\b", text_of(name, flash_link(name), "share_of_rate"))


@pytest.mark.parametrize("name", [name for name, _ in with_key("links", "share_of_rate")
                                  if "moe-fit" in text_of(name, flash_link(name), "share_of_rate")])
def test_nvme_curves_have_the_measured_shape(name: str) -> None:
    """Above 4 KiB a drive's curve is that of the measured one, as shares of what it reaches at 8 MiB."""
    shares = flash_link(name)["share_of_rate"]
    measured = {size: rate for size, rate in MOE_FIT.items() if size > 4 * KIB or name in ("rtx-5070-ti", "apple-m5-max")}
    for size, rate in measured.items():
        assert shares[size] / shares[8 * MIB] == pytest.approx(rate / MOE_FIT[8 * MIB], rel=6e-3)


@pytest.mark.parametrize(("name", "reads_per_s"), [("jetson-tx2", 10000), ("raspberry-pi-4b", 1500)])
def test_slow_drives_add_a_fixed_time_to_the_bytes(name: str, reads_per_s: int) -> None:
    """A SATA drive and a card: each stated size takes the time of a 4 KiB read and of the further bytes at the full rate."""
    link = next(link for link in load_hardware(name).links.values() if link.share_of_rate)
    for size, _ in link.share_of_rate:
        assert link.seconds(size) == pytest.approx(1 / reads_per_s + (size - 4 * KIB) / link.bytes_per_s, rel=5e-3)


def read_seconds(link: dict[str, Any], num_bytes: int) -> float:
    """The time of one read by the words of the file format: log-log between the sizes of the curve, or latency and bytes."""
    rate, shares = link["bytes_per_s"], link.get("share_of_rate")
    if not shares:
        return float(link["latency_s"] + num_bytes / rate)
    sizes = list(shares)
    times = [size / (shares[size] * rate) for size in sizes]
    if num_bytes <= sizes[0]:
        return float(times[0])
    if num_bytes >= sizes[-1]:
        return float(num_bytes / (shares[sizes[-1]] * rate))
    place = next(place for place, size in enumerate(sizes) if size > num_bytes)
    part = math.log(num_bytes / sizes[place - 1]) / math.log(sizes[place] / sizes[place - 1])
    return float(times[place - 1] * (times[place] / times[place - 1]) ** part)


@pytest.mark.parametrize("name", hardware_names())
def test_a_small_offloaded_run(tiny_folder: Path, name: str) -> None:
    """Each machine runs a scenario with its experts on flash, and every read takes what its file says of such a read."""
    old, new = "hardware: {name: rtx-4090}", f"hardware: {{name: {name}}}\n    system: {{slow_memory: node0.flash}}"
    text = (tiny_folder / "tiny.yaml").read_text()
    assert old in text
    (tiny_folder / "tiny.yaml").write_text(text.replace(old, new))
    scenario = load_scenario(tiny_folder / "tiny.yaml")
    study = scenario.study("one-gpu")
    setup = OffloadSetup(load_inputs(scenario), study, "simpy")  # type: ignore[arg-type]
    ran = setup.point(study.expand()[0])  # type: ignore[union-attr, arg-type]
    assert ran.row["tokens_per_s"] > 0
    assert 0 <= ran.row["hit_rate"] < 1
    key = next(key for key in raw(name)["links"] if key in FLASH_LINKS)
    wire = f"node0.{key}.{'both' if flash_link(name)['duplex'] == 'half' else 'in'}"
    reads = ran.result.tasks[ran.result.tasks["resource"] == wire]
    assert len(reads) > 0
    for size, took_ns in zip(reads["num_bytes"], reads["duration_ns"], strict=True):
        assert abs(took_ns - read_seconds(flash_link(name), int(size)) * 1e9) <= 1


def test_the_page_shows_the_catalog() -> None:
    """docs/hardware.md holds the table that benchmarks/machines.py prints, and no system is put to a machine that is not there."""
    module = benchmark()
    assert module.table() in (ROOT / "docs/hardware.md").read_text()
    assert set(module.USED_BY) <= set(hardware_names())
    assert len(module.table().splitlines()) == len(hardware_names()) + 2
