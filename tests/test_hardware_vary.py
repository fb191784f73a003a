"""Varied machines: what changes, what stays, what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.load import hardware_names, load_hardware
from moesim.hardware.vary import VARIED, hardware_keys, vary


def test_a_key_changes_that_number_of_every_part_of_the_name() -> None:
    """Both GPUs of both nodes get the new link rate; their other numbers, and all other parts, stay."""
    base = load_hardware("h100-sxm", num_nodes=2, gpus_per_node=2)
    varied = vary(base, {"pcie.bytes_per_s": 1e9})
    own = [name for name in base.links if name.endswith(".pcie")]
    assert len(own) == 4
    for name in own:
        assert varied.links[name] == dataclasses.replace(base.links[name], bytes_per_s=1e9, reference=VARIED)
    assert {n: p for n, p in varied.links.items() if n not in own} == {
        n: p for n, p in base.links.items() if n not in own}
    assert (varied.devices, varied.memories, varied.fabrics) == (base.devices, base.memories, base.fabrics)


def test_fabrics_and_peaks_of_one_dtype() -> None:
    """A fabric goes by its name, digits and all; a peak by its dtype; several numbers of one part at once."""
    base = load_hardware("h100-sxm", num_nodes=2)
    varied = vary(base, {"ndr400.bytes_per_s": 1e9, "ndr400.latency_s": 1e-6, "gpu.flops_per_s.bf16": 1e12,
                         "gpu.tile_tokens": 8.0})
    fabric = varied.fabric("cluster")
    assert fabric is not None
    assert (fabric.bytes_per_s, fabric.latency_s) == (1e9, 1e-6)
    assert varied.fabric("node") == base.fabric("node")
    for name in base.ranks:
        device = varied.device(name)
        assert device.flops_per_s == {**base.device(name).flops_per_s, "bf16": 1e12}
        assert device.tile_tokens == 8
        assert isinstance(device.tile_tokens, int)


def test_a_link_twice_as_fast_copies_in_half_the_time() -> None:
    """The varied number reaches the cost model."""
    base = load_hardware("rtx-4090")
    link = base.links["node0.gpu0.pcie"]
    fast = vary(base, {"pcie.bytes_per_s": 2 * link.bytes_per_s, "pcie.latency_s": 0.0})
    slow = vary(base, {"pcie.latency_s": 0.0})
    assert CostModel(fast).copy(link.name, 1e6).seconds == CostModel(slow).copy(link.name, 1e6).seconds / 2


@pytest.mark.parametrize("name", hardware_names())
def test_every_key_of_the_catalog_can_be_varied(name: str) -> None:
    """Each key changes something, and nothing varied is nothing changed."""
    base = load_hardware(name)
    assert vary(base, {}) == base
    for key in hardware_keys(base):
        assert vary(base, {key: 7.0}) != base


@pytest.mark.parametrize(("values", "message"), [
    ({"pci.bytes_per_s": 1.0}, "hardware 'rtx-4090' has no number 'pci.bytes_per_s'.*pcie.bytes_per_s"),
    ({"pcie.bytes_per_s": float("nan")}, "pcie.bytes_per_s must be finite, got nan"),
    ({"pcie.bytes_per_s": -1.0}, "bytes_per_s must be positive, got -1.0"),
    ({"gpu.tile_tokens": 1.5}, "gpu.tile_tokens must be a whole number, got 1.5"),
])
def test_what_is_refused(values: dict[str, float], message: str) -> None:
    """Unknown keys get a suggestion; numbers that a part cannot take are refused by name."""
    with pytest.raises(InputError, match=message):
        vary(load_hardware("rtx-4090"), values)
