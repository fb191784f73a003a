"""Costs of many works at once are those of one work at a time: the same bits, sources, counts and errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.cost_arrays import (
    Costs,
    all_to_all_costs,
    copy_costs,
    dense_costs,
    grouped_costs,
    ns_from_seconds,
)
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Link, Memory
from moesim.hardware.work import SOURCES, Cost, DenseWork, GroupedWork
from moesim.units import NS_PER_S, ns_from_s

EFFICIENCIES = (1.0, 0.5, 0.7, 0.83)


def machine(num_ranks: int = 4, ranks_per_node: int = 4, *, contention: str = "port", ranks_per_port: int = 1,
            tile: int = 16) -> HardwareSpec:
    """Equal GPUs, a link to each, a fabric inside the node and one between nodes; odd numbers that round."""
    names = [f"gpu{rank}" for rank in range(num_ranks)]
    memories = {f"{name}.hbm": Memory(f"{name}.hbm", "hbm", 1e9, 3.35e12 / 7) for name in names}
    memories["dram"] = Memory("dram", "dram", 1e12, 1e11)
    devices = {name: Device(name, "gpu", f"{name}.hbm", {"bf16": 0.9891e15}, 3.1e-6, tile,
                            node=rank // ranks_per_node) for rank, name in enumerate(names)}
    links = {f"{name}.pcie": Link(f"{name}.pcie", "dram", f"{name}.hbm", "pcie", 27e9 / 1.3, 1.7e-5) for name in names}
    fabrics = (Fabric("nv", "nvlink", "node", 4.5e11 / 1.1, 1.9e-6, ranks_per_port, contention),
               Fabric("ib", "rdma", "cluster", 5e10 / 1.1, 4.3e-6, ranks_per_port, contention))
    return HardwareSpec("toy", devices, memories, links, fabrics, tuple(names), ranks_per_node)


def table(op: str, axes: tuple[str, ...], sizes: tuple[tuple[float, ...], ...], device: str = "gpu",
          shape: str = "s") -> MeasuredTable:
    """A table that rises, with one step down that the fit makes level."""
    seconds = tuple(1e-3 * (1 + place) + (2e-3 if place == 1 else 0.0) for place in range(len(sizes)))
    return MeasuredTable(op, device, shape, "bf16", axes, sizes, seconds)


def profiles() -> list[CalibrationProfile | None]:
    """Nameplate only; a table of one axis for everything; tables of several axes."""
    line = ((1.0,), (4.0,), (16.0,), (64.0,))
    grid = tuple((float(a), float(b)) for a in (1, 8, 64) for b in (1, 100, 5000))
    groups = ((1.0, 1.0, 1.0), (8.0, 2.0, 5.0), (8.0, 8.0, 1.0), (64.0, 8.0, 20.0))
    one = (table("dense", ("tokens",), line), table("grouped_ffn", ("tokens",), line),
           table("copy", ("bytes",), ((1e3,), (1e5,), (1e6,)), device="pcie"))
    more = (table("dense", ("tokens", "context"), grid), table("grouped_ffn", ("tokens", "groups", "largest_group"), groups))
    return [None, CalibrationProfile("one", one), CalibrationProfile("more", more)]


def assert_same(costs: Costs, expected: list[Cost]) -> None:
    """Bits and names."""
    assert costs.seconds.dtype == np.float64
    assert costs.seconds.ravel().tolist() == [cost.seconds for cost in expected]
    assert [SOURCES[code] for code in costs.source.ravel().tolist()] == [cost.source for cost in expected]


@pytest.mark.parametrize("profile", profiles(), ids=("nameplate", "one", "more"))
def test_dense_costs_are_those_of_one_work_at_a_time(profile: CalibrationProfile | None) -> None:
    """Roofline on both sides of its ridge, every way to use a table, no tokens; and the counts of sources."""
    rng = np.random.default_rng(0)
    shape = (7, 30)
    tokens = rng.choice([0, 1, 2, 4, 7, 16, 100, 5000], shape)
    context = rng.choice([0, 0, 1, 100, 333, 70_000], shape)
    flops, num_bytes = rng.integers(0, 10**13, shape), rng.random(shape) * 1e10
    one, many = CostModel(machine(), profile), CostModel(machine(), profile)
    costs = dense_costs(many, "gpu1", DenseWork("dense", "s", tokens, flops, num_bytes, "bf16", context))  # type: ignore[arg-type]
    points = zip(tokens.flat, flops.flat, num_bytes.flat, context.flat, strict=True)
    assert_same(costs, [one.dense("gpu1", DenseWork("dense", "s", int(a), int(b), float(c), "bf16", int(d)))
                        for a, b, c, d in points])
    assert costs.seconds.shape == shape
    assert sum(many.source_counts().values()) == 0
    many.count(costs.source)
    assert many.source_counts() == one.source_counts()


@pytest.mark.parametrize("profile", profiles(), ids=("nameplate", "one", "more"))
@pytest.mark.parametrize("tile", [1, 16, 64])
def test_grouped_costs_are_those_of_one_work_at_a_time(profile: CalibrationProfile | None, tile: int) -> None:
    """Every way to put up to 40 tokens into groups, and large works; read-only int32 sizes too."""
    sizes = [(tokens, groups, largest) for tokens in (0, 1, 5, 8, 17, 40) for groups in range(1, 9)
             for largest in range(1, tokens + 1) if groups <= tokens <= groups * largest and largest <= tokens - groups + 1]
    sizes += [(0, 0, 0), (100_000, 256, 90_000), (100_000, 256, 400), (65, 1, 65)]
    tokens, groups, largest = np.array(sizes, np.int32).T
    tokens.setflags(write=False)
    work = GroupedWork("s", tokens, groups, largest, 88_080_384, 88_080_384, 36_864.0, "bf16")  # type: ignore[arg-type]
    one, many = CostModel(machine(tile=tile), profile), CostModel(machine(tile=tile), profile)
    costs = grouped_costs(many, "gpu0", work)
    assert_same(costs, [one.grouped_ffn("gpu0", dataclasses.replace(work, tokens=a, groups=b, largest_group=c))
                        for a, b, c in sizes])
    many.count(costs.source)
    assert many.source_counts() == one.source_counts()


@pytest.mark.parametrize("profile", profiles(), ids=("nameplate", "one", "more"))
@pytest.mark.parametrize("efficiency", EFFICIENCIES)
def test_copy_costs_are_those_of_one_copy_at_a_time(profile: CalibrationProfile | None, efficiency: float) -> None:
    """Repeated sizes, measured ones, none at all."""
    sizes = np.array([[0.0, 1.0, 1e3, 5e4], [1e5, 1e5, 3e9, 0.0]])
    one, many = (CostModel(machine(), profile, route_efficiency=efficiency) for _ in range(2))
    assert_same(copy_costs(many, "gpu0.pcie", sizes), [one.copy("gpu0.pcie", size) for size in sizes.ravel().tolist()])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(((1, 1, 1), (4, 2, 1), (4, 4, 3), (16, 8, 1), (24, 8, 4), (144, 16, 1), (40, 20, 2))),
       st.sampled_from(("port", "egress", "pair")), st.sampled_from(EFFICIENCIES), st.integers(0, 2**32 - 1))
def test_all_to_alls_are_those_of_one_at_a_time(world: tuple[int, int, int], contention: str, efficiency: float,
                                                seed: int) -> None:
    """Sums that round, dense and sparse traffic, ranks that share ports, exchanges in which nothing moves."""
    ranks, per_node, per_port = world
    hardware = machine(ranks, per_node, contention=contention, ranks_per_port=per_port)
    rng = np.random.default_rng(seed)
    traffic = rng.random((5, ranks, ranks)) * 1e9 * (rng.random((5, 1, 1)) > rng.random((5, ranks, ranks)))
    traffic[0] = np.diag(rng.random(ranks))
    one, many = (CostModel(hardware, route_efficiency=efficiency) for _ in range(2))
    costs = all_to_all_costs(many, traffic)
    assert_same(costs, [one.all_to_all(part) for part in traffic])
    many.count(costs.source)
    assert many.source_counts() == one.source_counts()


def test_nanoseconds_round_as_for_one_duration() -> None:
    """Halves to even, far beyond the integers that float64 holds one by one."""
    rng = np.random.default_rng(0)
    halves = (np.arange(2000) + 0.5) / NS_PER_S
    large = rng.random(2000) * 10.0 ** rng.integers(-9, 10, 2000)
    edges = np.array([0.0, 2**52 / NS_PER_S, 2**53 / NS_PER_S, (2**53 + 2) / NS_PER_S, 9.2e9])
    seconds = np.concatenate([halves, large, edges])
    assert ns_from_seconds(seconds).tolist() == [ns_from_s(value) for value in seconds.tolist()]


@pytest.mark.parametrize("seconds", [-1e-9, float("nan"), float("inf"), 9.3e9])
def test_durations_that_are_none_are_refused(seconds: float) -> None:
    """Negative, not finite, or more than 64 bits of nanoseconds."""
    with pytest.raises(ValueError, match="durations must be finite and not negative"):
        ns_from_seconds(np.array([1.0, seconds]))


def test_bad_works_are_refused_as_one_work_is() -> None:
    """The scalar model's own words, about the first work that is wrong."""
    cost = CostModel(machine())
    ones = np.ones(3, np.int64)
    with pytest.raises(InputError, match="has no device 'gpu9'"):
        dense_costs(cost, "gpu9", DenseWork("dense", "s", ones, ones, ones, "bf16"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no flops_per_s for dtype 'fp4'"):
        dense_costs(cost, "gpu0", DenseWork("dense", "s", ones, ones, ones, "fp4"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="got 1 flops and -1 bytes"):
        dense_costs(cost, "gpu0", DenseWork("dense", "s", ones, ones, np.array([1, -1, 1]), "bf16"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no flops_per_s for dtype 'fp4'"):
        grouped_costs(cost, "gpu0", GroupedWork("s", ones, ones, ones, 1, 1, 1, "fp4"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 tokens cannot be in 2 groups"):
        grouped_costs(cost, "gpu0", GroupedWork("s", ones, ones * (1, 2, 1), ones, 1, 1, 1, "bf16"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"no link 'gpu0\.pci'"):
        copy_costs(cost, "gpu0.pci", np.ones(2))
    with pytest.raises(InputError, match="a copy needs a finite size"):
        copy_costs(cost, "gpu0.pcie", np.array([1.0, -1.0]))
    with pytest.raises(InputError, match=r"traffic must be float64\[n, 4, 4\]"):
        all_to_all_costs(cost, np.zeros((4, 4)))
    with pytest.raises(InputError, match="traffic must be finite and not negative"):
        all_to_all_costs(cost, np.full((1, 4, 4), np.inf))
    assert sum(cost.source_counts().values()) == 0


@pytest.mark.parametrize("efficiency", EFFICIENCIES)
def test_traffic_without_a_fabric_is_refused_as_for_one_exchange(efficiency: float) -> None:
    """The first exchange that needs the fabric is named with its bytes."""
    alone = dataclasses.replace(machine(4, 2), fabrics=(machine().fabrics[0],))
    traffic = np.zeros((3, 4, 4))
    traffic[0, 0, 1] = 5.0  # stays in its node
    traffic[1, 0, 3] = 700.0
    cost = CostModel(alone, route_efficiency=efficiency)
    with pytest.raises(InputError) as one:
        cost.all_to_all(traffic[1])
    with pytest.raises(InputError, match="need a cluster fabric") as many:
        all_to_all_costs(cost, traffic)
    assert str(many.value) == str(one.value)


def test_a_count_of_nothing_changes_nothing() -> None:
    """Counts in bulk, some times over."""
    cost = CostModel(machine())
    cost.count(np.zeros(0, np.int8))
    assert set(cost.source_counts().values()) == {0}
    cost.count(np.array([[0, 3], [3, 4]]), times=5)
    assert cost.source_counts() == {"measured": 5, "interpolated": 0, "extrapolated": 0, "nameplate": 10, "stated": 5}
