"""CostModel: rooflines, measured tables, copies and where each number comes from."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.hardware.collective import all_to_all_seconds
from moesim.hardware.cost import CostModel, padded_rows
from moesim.hardware.load import load_hardware
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Link, Memory
from moesim.hardware.work import Cost, DenseWork, GroupedWork

PEAK, RATE, OVERHEAD = 1e12, 1e11, 2e-6


def machine(tile: int = 16) -> HardwareSpec:
    """Return two small GPUs with DRAM and flash behind them."""
    names = ("node0.gpu0", "node0.gpu1")
    memories = {f"{name}.hbm": Memory(f"{name}.hbm", "hbm", 1e9, RATE) for name in names}
    memories |= {name: Memory(name, name[6:], 1e10, 1e10) for name in ("node0.dram", "node0.flash")}
    links = {f"{name}.pcie": Link(f"{name}.pcie", "node0.dram", f"{name}.hbm", "pcie", 1e10, 1e-5) for name in names}
    links["node0.nvme"] = Link("node0.nvme", "node0.flash", "node0.dram", "nvme", 2e9, 1e-4)
    return HardwareSpec(
        "toy",
        {name: Device(name, "gpu", f"{name}.hbm", {"bf16": PEAK}, OVERHEAD, tile) for name in names},
        memories,
        links,
        (Fabric("nv", "nvlink", "node", 1e10, 1e-6),),
        names,
        2,
    )


def profile(*tables: MeasuredTable) -> CalibrationProfile:
    """Return a profile of these tables."""
    return CalibrationProfile("toy", tables)


def table(
    op: str,
    device: str = "gpu",
    shape: str = "s",
    axes=("tokens",),
    sizes=((1,), (100,)),
    seconds=(1e-3, 2e-3),
) -> MeasuredTable:
    """Return a measured table."""
    return MeasuredTable(op, device, shape, "bf16", axes, sizes, seconds)


def dense(**changes) -> DenseWork:
    """Return dense work over eight tokens."""
    return dataclasses.replace(DenseWork("dense", "s", 8, 1e9, 1e6, "bf16"), **changes)


def grouped(tokens=64, groups=8, largest_group=8, **changes) -> GroupedWork:
    """Return an expert layer: 3 MB of weights per group and 3 Mflop per row, as 2-byte weights have."""
    return dataclasses.replace(GroupedWork("s", tokens, groups, largest_group, 3e6, 3e6, 8e3, "bf16"), **changes)


@st.composite
def group_sizes(draw):
    """Draw the rows of each group, none empty."""
    return draw(st.lists(st.integers(1, 200), min_size=1, max_size=12))


@pytest.mark.parametrize(
    ("flops", "num_bytes", "busy_s"),
    [
        (1e9, 1e6, 1e-3),
        (1e6, 1e9, 1e-2),
        (0.0, 1e6, 1e-5),
        (1e9, 1e8, 1e-3),
    ],
)
def test_dense_roofline(flops, num_bytes, busy_s):
    """Dense work takes the overhead and the slower of arithmetic and memory."""
    cost = CostModel(machine()).dense("node0.gpu0", dense(flops=flops, num_bytes=num_bytes))
    assert cost == (OVERHEAD + busy_s, "nameplate")


def test_no_tokens_no_cost():
    """Nothing to do takes no time, not even an overhead."""
    model = CostModel(machine())
    assert model.dense("node0.gpu0", dense(tokens=0)) == (0.0, "nameplate")
    assert model.grouped_ffn("node0.gpu0", grouped(0, 0, 0)) == (0.0, "nameplate")
    assert model.copy("node0.nvme", 0) == (0.0, "nameplate")


def test_grouped_memory_limit():
    """At few tokens the layer costs the weights of the groups that are hit, and the rows' activations."""
    cost = CostModel(machine(tile=1)).grouped_ffn("node0.gpu0", grouped(8, 8, 1))
    assert cost.seconds == pytest.approx(OVERHEAD + (8 * 3e6 + 8 * 8e3) / RATE)


def test_grouped_compute_limit():
    """At many tokens without padding the layer costs its flops."""
    cost = CostModel(machine(tile=1)).grouped_ffn("node0.gpu0", grouped(8000, 8, 1000))
    assert cost.seconds == pytest.approx(OVERHEAD + 8000 * 3e6 / PEAK)


def test_skew_changes_sign_with_the_tokens():
    """Skew makes an expert layer faster at few tokens (fewer groups read), slower at many (a fuller rank)."""
    # a rank with 32 of 256 experts of 3 x 7168 x 2048 fp8 weights
    shape = {"bytes_per_group": 44e6, "flops_per_token": 88e6, "bytes_per_token": 14e3, "dtype": "fp8"}
    model = CostModel(load_hardware("h200-sxm"))
    balanced = [
        model.grouped_ffn("node0.gpu0", grouped(*sizes, **shape)).seconds for sizes in ((32, 32, 1), (8192, 32, 256))
    ]
    skewed = [
        model.grouped_ffn("node0.gpu0", grouped(*sizes, **shape)).seconds for sizes in ((40, 21, 12), (16384, 32, 8000))
    ]
    assert skewed[0] < 0.7 * balanced[0]
    assert skewed[1] > 1.6 * balanced[1]


@given(group_sizes(), st.sampled_from([1, 8, 16, 64]))
@settings(max_examples=50, deadline=None)
def test_padding_is_within_a_tile_of_each_group(sizes, tile):
    """Padded rows, from three numbers only, are within one tile per group of padding every group up."""
    true = sum(-(-size // tile) * tile for size in sizes)
    rows = padded_rows(sum(sizes), len(sizes), max(sizes), tile)
    assert rows >= sum(sizes)
    assert abs(rows - true) <= len(sizes) * tile
    if tile == 1 or len(sizes) == 1:
        assert rows == true


@given(group_sizes(), st.sampled_from([1, 16, 64]), st.integers(0, 300), st.booleans())
@settings(max_examples=50, deadline=None)
def test_grouped_never_falls(sizes, tile, more, to_largest):
    """More tokens, more groups, or a fuller largest group at the same tokens never make a layer faster."""
    model = CostModel(machine(tile))
    # cheap weights, so that the arithmetic and its padding show
    work = grouped(sum(sizes), len(sizes), max(sizes), bytes_per_group=1e3)
    before = model.grouped_ffn("node0.gpu0", work).seconds
    extra = more if to_largest else 0
    tokens = dataclasses.replace(work, tokens=work.tokens + more, largest_group=work.largest_group + extra)
    one_more = dataclasses.replace(work, tokens=work.tokens + 1, groups=work.groups + 1)
    fuller = dataclasses.replace(work, largest_group=min(work.largest_group + more, work.tokens - work.groups + 1))
    split = dataclasses.replace(work, groups=work.groups + 1)
    for larger in (tokens, one_more, fuller, split):
        if larger.groups * larger.largest_group >= larger.tokens >= larger.largest_group + larger.groups - 1:
            assert model.grouped_ffn("node0.gpu0", larger).seconds >= before * (1 - 1e-12)


@given(st.integers(1, 5000), st.integers(1, 64), st.data())
@settings(max_examples=50, deadline=None)
def test_grouped_is_at_least_the_roofline_without_padding(tokens, groups, data):
    """Padding only adds: the layer never takes less than its bytes and its unpadded flops."""
    assume(groups <= tokens)
    largest = data.draw(st.integers(-(-tokens // groups), tokens - groups + 1))
    cost = CostModel(machine()).grouped_ffn("node0.gpu0", grouped(tokens, groups, largest))
    assert cost.seconds >= (OVERHEAD + max(tokens * 3e6 / PEAK, (groups * 3e6 + tokens * 8e3) / RATE)) * (1 - 1e-12)


def test_measured_tables_go_first():
    """A table of exactly this operation answers, with its own source, and for no other shape or op."""
    model = CostModel(machine(), profile(table("dense")))
    assert model.dense("node0.gpu0", dense(tokens=1)) == (1e-3, "measured")
    assert model.dense("node0.gpu0", dense(tokens=34)) == (
        pytest.approx(1e-3 + 33 / 99 * 1e-3),
        "interpolated",
    )
    assert model.dense("node0.gpu0", dense(tokens=200)).source == "extrapolated"
    nameplate = CostModel(machine()).dense("node0.gpu0", dense())
    for other in (dense(shape="t"), dense(op="router"), dense(context=10)):
        assert model.dense("node0.gpu0", other) == nameplate
    assert model.source_counts() == {
        "measured": 1,
        "interpolated": 1,
        "extrapolated": 1,
        "nameplate": 3,
        "stated": 0,
    }


def test_tables_with_a_context():
    """An attention table over tokens and context is asked for both."""
    rows = ((1, 0), (1, 100), (8, 0), (8, 800))
    measured = table("attention", axes=("tokens", "context"), sizes=rows, seconds=(1e-3, 2e-3, 3e-3, 4e-3))
    model = CostModel(machine(), profile(measured))
    assert model.dense("node0.gpu0", dense(op="attention", tokens=8, context=800)) == (4e-3, "measured")
    assert model.dense("node0.gpu0", dense(op="attention", tokens=1, context=0)) == (1e-3, "measured")


def test_grouped_tables():
    """The three numbers of an expert layer index its table; a table over tokens serves one group only."""
    full = table(
        "grouped_ffn",
        axes=("tokens", "groups", "largest_group"),
        sizes=((8, 2, 4), (8, 8, 1)),
        seconds=(1e-3, 4e-3),
    )
    model = CostModel(machine(), profile(full))
    assert model.grouped_ffn("node0.gpu0", grouped(8, 2, 4)) == (1e-3, "measured")
    assert model.grouped_ffn("node0.gpu0", grouped(8, 4, 2)).source == "interpolated"
    single = CostModel(machine(), profile(table("grouped_ffn")))
    assert single.grouped_ffn("node0.gpu0", grouped(100, 1, 100)) == (2e-3, "measured")
    assert single.grouped_ffn("node0.gpu0", grouped(100, 2, 50)).source == "nameplate"


def test_copies():
    """A copy takes latency and bytes over rate; over several links the slowest and the other latencies."""
    model = CostModel(machine())
    assert model.copy("node0.gpu1.pcie", 1e7) == (pytest.approx(1e-5 + 1e-3), "nameplate")
    assert model.route_copy("node0.dram", "node0.gpu1.hbm", 1e7) == model.copy("node0.gpu1.pcie", 1e7)
    assert model.route_copy("node0.flash", "node0.gpu1.hbm", 1e7) == (
        pytest.approx(1e-4 + 5e-3 + 1e-5),
        "nameplate",
    )
    assert model.route_copy("node0.dram", "node0.dram", 1e7).seconds == 0.0


def test_stated_efficiency():
    """A stated efficiency slows the bytes, not the latencies, of links and fabrics, and is the source."""
    model, traffic = CostModel(machine(), route_efficiency=0.5), np.array([[0.0, 1e7], [1e7, 0.0]])
    assert model.copy("node0.gpu0.pcie", 1e7) == (pytest.approx(1e-5 + 2e-3), "stated")
    assert model.all_to_all(traffic) == (pytest.approx(1e-6 + 2e-3), "stated")
    assert model.route_copy("node0.flash", "node0.gpu0.hbm", 1e7).source == "stated"
    assert CostModel(machine()).all_to_all(traffic) == (
        all_to_all_seconds(machine(), traffic).seconds,
        "nameplate",
    )


@pytest.mark.parametrize(
    ("device", "route", "expected"),
    [
        ("pcie", ("node0.dram", "node0.gpu0.hbm"), Cost(1e-3, "measured")),
        ("dram_to_hbm", ("node0.dram", "node0.gpu0.hbm"), Cost(1e-3, "measured")),
        ("flash_to_hbm", ("node0.flash", "node0.gpu0.hbm"), Cost(1e-3, "measured")),
        # one link of two is measured: the route is only as certain as the other
        ("nvme", ("node0.flash", "node0.gpu0.hbm"), Cost(1e-3 + 1e-5, "nameplate")),
        # the other direction is not measured
        ("dram_to_hbm", ("node0.gpu0.hbm", "node0.dram"), Cost(1e-5 + 100 / 1e10, "nameplate")),
    ],
)
def test_measured_copies(device, route, expected):
    """A copy's table is found by the link's kind or by the names of its ends."""
    measured = table("copy", device, axes=("bytes",), sizes=((100,), (1e9,)))
    cost = CostModel(machine(), profile(measured)).route_copy(*route, 100)
    assert cost == (pytest.approx(expected.seconds), expected.source)


def test_task_overhead():
    """The fixed cost of a task is its kind's, else that of all kinds, else nothing and not counted."""
    rows = {"axes": ("tasks",), "sizes": ((1,),)}
    model = CostModel(
        machine(),
        profile(
            table("task_overhead", shape="expert", seconds=(3e-5,), **rows),
            table("task_overhead", shape="", seconds=(1e-5,), **rows),
        ),
    )
    assert model.task_overhead("expert") == (3e-5, "measured")
    assert model.task_overhead("load") == (1e-5, "measured")
    plain = CostModel(machine())
    assert plain.task_overhead("expert").seconds == 0.0
    assert sum(plain.source_counts().values()) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.dense("node0.gpu9", dense()), "no device 'node0.gpu9'. Did you mean 'node0.gpu"),
        (lambda m: m.dense("node0.gpu0", dense(dtype="fp8")), "no flops_per_s for dtype 'fp8'; it has bf16"),
        (lambda m: m.dense("node0.gpu0", dense(flops=-1.0)), "finite and not negative, got -1.0 flops"),
        (lambda m: m.dense("node0.gpu0", dense(num_bytes=float("nan"))), "nan bytes"),
        (lambda m: m.grouped_ffn("node0.gpu0", grouped(8, 9, 1)), "8 tokens cannot be in 9 groups"),
        (lambda m: m.grouped_ffn("node0.gpu0", grouped(8, 2, 3)), "of which the largest has 3"),
        (lambda m: m.grouped_ffn("node0.gpu0", grouped(8, 2, 8)), "none empty, of which the largest has 8"),
        (lambda m: m.grouped_ffn("node0.gpu0", grouped(-4, 1, 1)), "-4 tokens"),
        (lambda m: m.copy("node0.gpu0.pci", 1), "no link 'node0.gpu0.pci'. Did you mean 'node0.gpu0.pcie'?"),
        (lambda m: m.copy("node0.nvme", -1), "not negative, got -1 bytes"),
        (lambda m: m.route_copy("node0.dram", "node0.gpu0.hbm", float("inf")), "finite size"),
        (lambda m: m.route_copy("node0.dram", "node0.hbm", 1), "no memory 'node0.hbm'"),
        (lambda m: m.all_to_all(np.zeros((3, 3))), "got shape (3, 3)"),
    ],
)
def test_bad_requests(call, message):
    """What the machine does not have, or no work can be, is named."""
    with pytest.raises(InputError) as caught:
        call(CostModel(machine()))
    assert message in str(caught.value)


@pytest.mark.parametrize("efficiency", [0.0, -0.1, 1.1, float("nan")])
def test_bad_efficiency(efficiency):
    """An efficiency is a share of the nameplate rate, above 0 and at most 1."""
    with pytest.raises(InputError, match=r"route_efficiency must be in \(0, 1\]"):
        CostModel(machine(), route_efficiency=efficiency)


def test_every_catalog_machine_has_costs():
    """On each kind of catalog machine the ranks can compute in bf16 and read from flash."""
    for name in ("h100-sxm", "jetson-agx-orin", "raspberry-pi-5"):
        hardware = load_hardware(name)
        model, rank = CostModel(hardware), hardware.ranks[0]
        assert model.dense(rank, dense()).seconds > 0
        assert model.route_copy("node0.flash", hardware.memory_of(rank).name, 1e6).seconds > 1e-4
