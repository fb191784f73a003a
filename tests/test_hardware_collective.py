"""Collectives: closed forms against plain loops, and against an event loop over the transfers."""

import heapq
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.hardware.collective import (
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    all_to_all_transfers,
)
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Memory
from moesim.units import ns_from_s

NODE_RATE, CLUSTER_RATE = 4e9, 1e9
NODE_LATENCY, CLUSTER_LATENCY = 3e-6, 20e-6


def machine(
    nodes: int,
    local: int,
    contention: str = "port",
    node_sharing: int = 1,
    cluster_sharing: int = 1,
    scopes: tuple[str, ...] = ("node", "cluster"),
) -> HardwareSpec:
    """Return `nodes` nodes of `local` ranks; 4 GB/s inside a node, 1 GB/s between nodes."""
    names = [f"node{n}.gpu{i}" for n in range(nodes) for i in range(local)]
    fabrics = (
        Fabric("nv", "nvlink", "node", NODE_RATE, NODE_LATENCY, node_sharing, contention),
        Fabric("ib", "infiniband", "cluster", CLUSTER_RATE, CLUSTER_LATENCY, cluster_sharing, contention),
    )
    return HardwareSpec(
        "toy",
        {name: Device(name, "gpu", f"{name}.hbm", {"bf16": 1e12}) for name in names},
        {f"{name}.hbm": Memory(f"{name}.hbm", "hbm", 1e9, 1e12) for name in names},
        fabrics=tuple(fabric for fabric in fabrics if fabric.scope in scopes),
        ranks=tuple(names),
        ranks_per_node=local,
    )


def loads(hardware: HardwareSpec, traffic: np.ndarray) -> dict:
    """Return, by plain loops, the bytes of each (fabric scope, wire) under every assumption at once."""
    found = defaultdict(float)
    for source in range(hardware.num_ranks):
        for target in range(hardware.num_ranks):
            size = traffic[source, target]
            if source == target or size == 0:
                continue
            nodes = source // hardware.ranks_per_node, target // hardware.ranks_per_node
            fabric = hardware.fabric("node" if nodes[0] == nodes[1] else "cluster")
            ports = tuple(
                (node, rank % hardware.ranks_per_node // fabric.ranks_per_port)
                for node, rank in zip(nodes, (source, target), strict=True)
            )
            found[fabric.scope, "out", ports[0]] += size
            found[fabric.scope, "in", ports[1]] += size
            found[fabric.scope, "pair", ports] += size
    return found


def expected_seconds(hardware: HardwareSpec, traffic: np.ndarray) -> float:
    """Return the closed form from `loads`."""
    wires = {"port": ("out", "in"), "egress": ("out",), "pair": ("pair",)}
    best = 0.0
    for (scope, wire, _), size in loads(hardware, traffic).items():
        fabric = hardware.fabric(scope)
        if wire in wires[fabric.contention]:
            best = max(best, fabric.latency_s + size / fabric.bytes_per_s)
    return best


def run_ns(transfers: list) -> int:
    """Run transfers in whole ns on wires that carry one at a time; return when the last one has arrived.

    At one instant completions come first, then each wire takes the waiting transfer that was ready first,
    ties by index.
    """
    waiting, followers, free = defaultdict(list), defaultdict(list), defaultdict(lambda: True)
    # (time, arrival 0, index): a message may enter its wire's queue; (time, release 1, index): the wire is free
    events = [(0, 0, index) for index, transfer in enumerate(transfers) if transfer.after < 0]
    last = 0
    for index, transfer in enumerate(transfers):
        followers[transfer.after].append(index)
    heapq.heapify(events)
    while events:
        now = events[0][0]
        while events and events[0][0] == now:
            _, release, index = heapq.heappop(events)
            transfer = transfers[index]
            if not release:
                heapq.heappush(waiting[transfer.wire], (now, index))
                continue
            free[transfer.wire] = True
            end = now + ns_from_s(transfer.latency_s)
            last = max(last, end)
            for follower in followers[index]:
                heapq.heappush(events, (end, 0, follower))
        for wire, queue in waiting.items():
            if free[wire] and queue:
                _, index = heapq.heappop(queue)
                free[wire] = False
                heapq.heappush(events, (now + ns_from_s(transfers[index].seconds), 1, index))
    return last


@st.composite
def clusters(draw, contentions=("port", "egress", "pair")):
    """Draw a cluster and its traffic."""
    nodes, local = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    hardware = machine(
        nodes, local, draw(st.sampled_from(contentions)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    )
    size = hardware.num_ranks
    cells = draw(st.lists(st.sampled_from([0, 0, 1, 37, 5_000, 1_000_000]), min_size=size**2, max_size=size**2))
    return hardware, np.array(cells, dtype=np.float64).reshape(size, size)


@given(clusters())
@settings(max_examples=50, deadline=None)
def test_closed_form_is_the_busiest_wire(case):
    """The closed form equals latency plus the busiest wire's bytes, found by plain loops."""
    hardware, traffic = case
    assert all_to_all_seconds(hardware, traffic).seconds == pytest.approx(
        expected_seconds(hardware, traffic), rel=1e-12
    )


@given(clusters(contentions=("egress", "pair")))
@settings(max_examples=50, deadline=None)
def test_detail_equals_the_closed_form(case):
    """With one wire per message the transfers, run one at a time, end when the closed form says."""
    hardware, traffic = case
    transfers = all_to_all_transfers(hardware, traffic)
    closed = ns_from_s(all_to_all_seconds(hardware, traffic).seconds)
    assert abs(run_ns(transfers) - closed) <= len(transfers) + 2


@given(clusters(contentions=("port",)))
@settings(max_examples=50, deadline=None)
def test_detail_of_ports_is_bounded(case):
    """With an out and an in wire the detail lies between the closed form and out plus in."""
    hardware, traffic = case
    transfers = all_to_all_transfers(hardware, traffic)
    ends, most = run_ns(transfers), 0.0
    for fabric in hardware.fabrics:
        sums = {
            wire: max(
                (size for key, size in loads(hardware, traffic).items() if key[:2] == (fabric.scope, wire)),
                default=0.0,
            )
            for wire in ("out", "in")
        }
        most = max(most, fabric.latency_s + sum(sums.values()) / fabric.bytes_per_s)
    rounding = len(transfers) + 2
    assert ns_from_s(all_to_all_seconds(hardware, traffic).seconds) - rounding <= ends
    assert ends <= ns_from_s(most) + rounding


@pytest.mark.parametrize(
    ("nodes", "local", "node_sharing", "cluster_sharing"),
    [
        (1, 8, 1, 1),
        (1, 8, 2, 1),
        (4, 1, 1, 1),
        (4, 4, 1, 1),
        (4, 4, 1, 2),
        (3, 4, 2, 4),
        (3, 6, 3, 2),
    ],
)
def test_uniform_traffic_needs_one_message_more(nodes, local, node_sharing, cluster_sharing):
    """Uniform traffic in rotated order meets no queue at a receiver: the closed form and one message at most."""
    hardware = machine(nodes, local, "port", node_sharing, cluster_sharing)
    traffic = np.full((nodes * local, nodes * local), 100_000.0)
    transfers = all_to_all_transfers(hardware, traffic)
    over = run_ns(transfers) - ns_from_s(all_to_all_seconds(hardware, traffic).seconds)
    assert 0 <= over <= ns_from_s(max(transfer.seconds for transfer in transfers)) + len(transfers)


@given(clusters())
@settings(max_examples=30, deadline=None)
def test_detail_conserves_bytes(case):
    """Each message's bytes pass once per stage, from its source to its target, and nothing else does."""
    hardware, traffic = case
    total = np.zeros_like(traffic)
    for index, transfer in enumerate(all_to_all_transfers(hardware, traffic)):
        assert transfer.after < index
        if transfer.after < 0:
            total[transfer.source, transfer.target] += transfer.num_bytes
    np.fill_diagonal(traffic, 0.0)
    assert np.array_equal(total, traffic)


def test_golden_times():
    """Hand-computed: 8 MB leave rank 0, 6 MB of them for rank 1 beside it and 2 MB for the other node."""
    traffic = np.zeros((4, 4))
    traffic[0, 1], traffic[0, 2], traffic[3, 1] = 6e6, 2e6, 1e6
    time = all_to_all_seconds(machine(2, 2), traffic)
    assert (ns_from_s(time.seconds), time.bound_by) == (2_020_000, "ib")
    # a card per node: still 2 MB out of node 0, 1 MB in
    assert ns_from_s(all_to_all_seconds(machine(2, 2, cluster_sharing=2), traffic).seconds) == 2_020_000
    traffic[1, 3] = 2e6
    assert ns_from_s(all_to_all_seconds(machine(2, 2, cluster_sharing=2), traffic).seconds) == 4_020_000
    assert ns_from_s(all_to_all_seconds(machine(2, 2), traffic).seconds) == 2_020_000
    traffic[0, 1] = 9e6
    assert all_to_all_seconds(machine(2, 2), traffic) == (NODE_LATENCY + 9e6 / NODE_RATE, "nv")


@pytest.mark.parametrize(
    ("contention", "expected_ns"), [("port", 3_003_000), ("egress", 1_003_000), ("pair", 1_003_000)]
)
def test_contention_decides(contention, expected_ns):
    """Three senders to one receiver: only the port assumption makes them share its way in."""
    traffic = np.zeros((4, 4))
    traffic[1:, 0] = 4e6
    assert ns_from_s(all_to_all_seconds(machine(1, 4, contention), traffic).seconds) == expected_ns


def test_nothing_sent_takes_no_time():
    """Without traffic, or with only what stays on its rank, there is no time, no bound and no transfer."""
    hardware = machine(2, 2)
    for traffic in (np.zeros((4, 4)), np.diag([5.0, 1.0, 2.0, 3.0])):
        assert all_to_all_seconds(hardware, traffic) == (0.0, "")
        assert all_to_all_transfers(hardware, traffic) == []


def test_input_is_not_changed():
    """The caller's traffic, diagonal included, is as it was."""
    traffic = np.arange(16.0).reshape(4, 4)
    all_to_all_seconds(machine(2, 2), traffic)
    assert np.array_equal(traffic, np.arange(16.0).reshape(4, 4))


@given(st.integers(2, 8), st.integers(1, 10**9))
@settings(max_examples=30, deadline=None)
def test_ring_closed_forms_in_one_node(size, num_bytes):
    """In one node the rings cost what Thakur et al. (2005) give for p ranks and n bytes."""
    hardware = machine(1, size)
    alpha, beta, steps = NODE_LATENCY, 1 / NODE_RATE, size - 1
    assert all_gather_seconds(hardware, num_bytes) == pytest.approx(steps * alpha + steps * num_bytes * beta)
    assert all_reduce_seconds(hardware, num_bytes) == pytest.approx(
        2 * steps * alpha + 2 * steps / size * num_bytes * beta
    )


def test_ring_levels():
    """Between nodes the rings of a node's ranks share its card, and what they gathered goes round inside."""
    nodes, local, size = 4, 2, 1e6
    for sharing in (1, 2):
        hardware = machine(nodes, local, cluster_sharing=sharing)
        between = (nodes - 1) * (CLUSTER_LATENCY + sharing * size / CLUSTER_RATE)
        inside = (local - 1) * (NODE_LATENCY + nodes * size / NODE_RATE)
        assert all_gather_seconds(hardware, size) == pytest.approx(between + inside)
        between = 2 * (nodes - 1) * (CLUSTER_LATENCY + sharing * size / local / nodes / CLUSTER_RATE)
        inside = 2 * (local - 1) * (NODE_LATENCY + size / local / NODE_RATE)
        assert all_reduce_seconds(hardware, size) == pytest.approx(between + inside)


def test_one_rank_needs_no_collective():
    """A single rank, and zero bytes, take no time."""
    assert all_reduce_seconds(machine(1, 1, scopes=()), 1e6) == 0.0
    assert all_gather_seconds(machine(2, 2), 0) == 0.0


@pytest.mark.parametrize(
    ("traffic", "message"),
    [
        (np.zeros((4, 3)), r"float64\[4, 4\] \(rank, rank\), got shape \(4, 3\)"),
        (np.full((4, 4), -1.0), "finite and not negative"),
        (np.full((4, 4), np.nan), "finite and not negative"),
    ],
)
def test_bad_traffic(traffic, message):
    """Traffic of another shape, negative or not a number is refused."""
    for collective in (all_to_all_seconds, all_to_all_transfers):
        with pytest.raises(InputError, match=message):
            collective(machine(2, 2), traffic)


@pytest.mark.parametrize(
    ("scopes", "message"),
    [(("node",), "8 bytes need a cluster fabric"), (("cluster",), "4 bytes need a node fabric")],
)
def test_missing_fabric(scopes, message):
    """Traffic without a fabric to carry it is an error, not free."""
    with pytest.raises(InputError, match=message):
        all_to_all_seconds(machine(2, 2, scopes=scopes), np.ones((4, 4)))


def test_bad_collective_size():
    """A negative size of a gather or reduction is refused."""
    with pytest.raises(InputError, match="finite size that is not negative, got -1"):
        all_gather_seconds(machine(1, 2), -1)
    with pytest.raises(InputError, match="got nan"):
        all_reduce_seconds(machine(1, 2), float("nan"))
