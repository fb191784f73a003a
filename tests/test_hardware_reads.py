"""Reads of flash by request size, and power: what a machine file may say of them, and what it costs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.artifacts import catalog_folder
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.energy import energy_j
from moesim.hardware.load import load_hardware
from moesim.hardware.spec import Link

SHARES = ((4096.0, 0.01), (131072.0, 0.25), (8388608.0, 1.0))


def drive(**changes: object) -> Link:
    """A drive of 4 GB/s whose small requests are slow."""
    return Link("nvme", "flash", "dram", "nvme", 4e9, 100e-6, share_of_rate=SHARES, **changes)  # type: ignore[arg-type]


def machine_file(tmp_path: Path, **lines: str) -> Path:
    """The desktop of the catalog without its read curve and power, with lines added to its NVMe link or its GPU."""
    own = ("    idle_w:", "    busy_w:", "    share_of_rate:")
    kept = (catalog_folder("hardware") / "rtx-4090.yaml").read_text().splitlines(keepends=True)
    text = "".join(line for line in kept if not line.startswith(own))
    if "nvme" in lines:
        text = text.replace("    target: dram\n", f"    target: dram\n    {lines['nvme']}\n")
    if "gpu" in lines:
        text = text.replace("    max_count: 4\n", f"    max_count: 4\n    {lines['gpu']}\n")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_stated_sizes_are_exact() -> None:
    """At the sizes of the table a request takes size over (share times rate), its latency included."""
    for size, share in SHARES:
        assert drive().seconds(size) == pytest.approx(size / (share * 4e9), rel=1e-12)


def test_between_sizes_is_the_geometric_mean_and_beyond_them_the_last_rate() -> None:
    """Half way in the logarithm of the size lies half way in the logarithm of the time."""
    (a, share_a), (b, share_b) = SHARES[:2]
    middle = (a / share_a * b / share_b) ** 0.5 / 4e9
    assert drive().seconds((a * b) ** 0.5) == pytest.approx(middle, rel=1e-9)
    assert drive().seconds(2.0**30) == pytest.approx(2.0**30 / 4e9)
    assert drive().seconds(1) == drive().seconds(4096)
    assert drive().seconds(0) == 100e-6


@given(st.lists(st.floats(1, 2.0**34), min_size=2, max_size=20), st.floats(0.1, 1))
def test_a_larger_request_never_takes_less_time(sizes: list[float], efficiency: float) -> None:
    """The curve rises, and a share of the rate scales it."""
    times = [drive().seconds(size, efficiency) for size in sorted(sizes)]
    assert all(later >= earlier * (1 - 1e-12) for earlier, later in itertools.pairwise(times))
    assert times[-1] == pytest.approx(drive().seconds(max(sizes)) / efficiency)


def test_the_cost_model_reads_small_requests_slowly(tmp_path: Path) -> None:
    """A machine file's curve reaches the cost of a copy: sixty-four reads of 128 KiB take longer than one of 8 MiB."""
    hardware = load_hardware(machine_file(tmp_path, nvme="share_of_rate: {4096: 0.01, 131072: 0.25, 8388608: 1.0}"))
    cost = CostModel(hardware)
    small, large = (cost.copy("node0.nvme", size).seconds for size in (131072, 8388608))
    assert 64 * small == pytest.approx(4 * large)


@pytest.mark.parametrize(("lines", "message"), [
    ({"nvme": "share_of_rate: {8388608: 1.0, 4096: 0.01}"}, "rising sizes"),
    ({"nvme": "share_of_rate: {4096: 0.0}"}, "above 0"),
    ({"nvme": "share_of_rate: {4096: 1.5}"}, "up to 1"),
    ({"nvme": "share_of_rate: {4096: 0.01, 8192: 1.0}"}, "must not take less time"),
    ({"nvme": "share_of_rate: {small: 0.01}"}, "a size in bytes"),
    ({"nvme": "share_of_rate: 0.5"}, "must be a mapping"),
    ({"gpu": "idle_w: 20"}, "both idle_w and busy_w"),
    ({"gpu": "idle_w: 500\n    busy_w: 450"}, "idle_w <= busy_w"),
])
def test_wrong_numbers_are_refused(tmp_path: Path, lines: dict[str, str], message: str) -> None:
    """A curve that falls, a share out of range or half a power is an error that says so."""
    with pytest.raises(InputError, match=message):
        load_hardware(machine_file(tmp_path, **lines))


def test_power_is_read(tmp_path: Path) -> None:
    """Idle and busy power reach the device; a device without them has None."""
    hardware = load_hardware(machine_file(tmp_path, gpu="idle_w: 20\n    busy_w: 450"))
    assert (hardware.device("node0.gpu0").idle_w, hardware.device("node0.gpu0").busy_w) == (20.0, 450.0)
    assert hardware.device("node0.cpu0").idle_w is None


def test_energy_is_idle_power_over_the_run_and_busy_power_on_top(tmp_path: Path) -> None:
    """By hand: 10 s at 20 W, and 430 W more for 4 of them; a device without power makes the sum unknown."""
    hardware = load_hardware(machine_file(tmp_path, gpu="idle_w: 20\n    busy_w: 450"))
    assert energy_j(hardware, {"node0.gpu0": 4.0}, 10.0) == pytest.approx(10 * 20 + 4 * 430)
    assert energy_j(hardware, {"node0.gpu0": 4.0, "node0.cpu0": 1.0}, 10.0) is None
    with pytest.raises(InputError, match="cannot be busy"):
        energy_j(hardware, {"node0.gpu0": 11.0}, 10.0)
