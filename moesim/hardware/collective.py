"""Collectives in closed form, and the same all-to-all link by link under the same contention assumption.

A fabric's `contention` says which wires limit it (`moesim.hardware.spec.Fabric`); `ranks_per_port` ranks of
a node share one port. Pairs of one node use the node fabric, pairs across nodes the cluster fabric; both run
at the same time. A fabric costs its latency once per collective, plus its busiest wire's bytes over its rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.hardware.spec import Fabric, HardwareSpec

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class CollectiveTime(NamedTuple):
    """Seconds of a collective, and the name of the fabric that bounds it (empty: nothing was sent)."""

    seconds: float
    bound_by: str


@dataclass(frozen=True)
class Transfer:
    """One message on one wire, which carries one message at a time.

    `seconds` is how long the wire is taken; `latency_s` passes after that, without holding the wire.
    `after` is the index, in the same list, of the transfer that must have ended first (-1: none).
    """

    source: int
    target: int
    num_bytes: float
    fabric: str
    wire: str
    seconds: float
    latency_s: float
    after: int = -1


@dataclass(frozen=True)
class _Ports:
    """A fabric, the bytes that pass it (float64[rank, rank]), and the port of each rank (int64[rank])."""

    fabric: Fabric
    traffic: Floats
    of_rank: Ints
    per_node: int

    @property
    def count(self) -> int:
        """Number of ports in the cluster."""
        return int(self.of_rank[-1]) + 1

    def between(self) -> Floats:
        """Return the bytes between ports, float64[port, port]; a port's own exchanges are on the diagonal."""
        if self.count == len(self.of_rank):
            return self.traffic
        rows = np.zeros((self.count, len(self.of_rank)))
        np.add.at(rows, self.of_rank, self.traffic)
        both = np.zeros((self.count, self.count))
        np.add.at(both.T, self.of_rank, rows.T)
        return both

    def seconds(self) -> float:
        """Return the closed form: latency and the busiest wire."""
        between = self.between()
        egress, ingress = between.sum(axis=1).max(), between.sum(axis=0).max()
        busiest = {"port": max(egress, ingress), "egress": egress, "pair": between.max()}
        return self.fabric.latency_s + float(busiest[self.fabric.contention]) / self.fabric.bytes_per_s


def all_to_all_seconds(hardware: HardwareSpec, traffic: Floats) -> CollectiveTime:
    """Return how long an all-to-all takes, and which fabric bounds it.

    Per fabric: ``latency_s + bytes / bytes_per_s`` with the bytes of the busiest wire: ``port``: the larger
    of what a port sends and what a port receives; ``egress``: what a port sends; ``pair``: what passes
    between an ordered pair of ports. The result is the slower fabric, and 0 s when nothing leaves its rank.

    Args:
        hardware: the cluster.
        traffic: float64[rank, rank], bytes from row to column; the diagonal stays local and is ignored.

    Raises:
        InputError: another shape, a negative or non-finite entry, or traffic where no fabric is.
    """
    times = [(part.seconds(), part.fabric.name) for part in _split(hardware, traffic)]
    seconds, name = max(times, key=lambda item: item[0], default=(0.0, ""))
    return CollectiveTime(seconds, name if seconds > 0 else "")


def all_to_all_transfers(hardware: HardwareSpec, traffic: Floats) -> list[Transfer]:
    """Return the messages of an all-to-all, each with the wire that it occupies.

    Run them on wires that carry one message at a time, first come first served, ties in list order; a message
    ends `latency_s` after its wire is free again. Then, against `all_to_all_seconds`:

    - ``egress`` and ``pair``: the last end is the closed form exactly (each wire is busy without a gap);
    - ``port``: each message passes two wires, its sender's ``out``, then its receiver's ``in`` (store and
      forward). The last end is at least the closed form (a wire's sum is a lower bound) and at most the
      largest ``out`` sum plus the largest ``in`` sum (all has arrived after the first, and an ``in`` wire
      then never idles), each fabric with its latency. Messages are listed in rotated order (rank r sends to
      r+1, r+2, ...), so uniform traffic on evenly shared ports meets no queue at the receivers: the closed
      form plus one message.

    Args and raises as in `all_to_all_seconds`.
    """
    found: list[Transfer] = []
    for part in _split(hardware, traffic):
        sources, targets = np.nonzero(part.traffic)
        for index in _rotated(part, sources, targets):
            _append(found, hardware, part, int(sources[index]), int(targets[index]))
    return found


def all_gather_seconds(hardware: HardwareSpec, num_bytes: float) -> float:
    """Return the seconds in which every rank gets the `num_bytes` that each rank holds.

    Rings, level by level (Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations
    in MPICH", IJHPCA 19(1), 2005, allgather: ``(p-1) latency + (p-1)/p n / rate``): first between nodes, each
    rank with those of the same place in the other nodes, then inside the nodes. A step of a ring is an
    all-to-all of one message per rank, so shared ports and the contention assumption count here too.

    Raises:
        InputError: a size that is negative, or no fabric where one is needed.
    """
    return _ring(hardware, "cluster", num_bytes) + _ring(hardware, "node", num_bytes * hardware.num_nodes)


def all_reduce_seconds(hardware: HardwareSpec, num_bytes: float) -> float:
    """Return the seconds in which `num_bytes` held by every rank are summed into every rank.

    A ring's reduce-scatter and then its all-gather (Thakur et al. 2005, allreduce, without the additions:
    ``2 (p-1) latency + 2 (p-1)/p n / rate``): scattered inside the nodes, summed between the nodes on each
    rank's own part, gathered inside the nodes.

    Raises:
        InputError: as `all_gather_seconds`.
    """
    nodes, local = hardware.num_nodes, hardware.ranks_per_node
    inside = 2 * _ring(hardware, "node", num_bytes / local)
    return inside + 2 * _ring(hardware, "cluster", num_bytes / local / nodes)


def _ring(hardware: HardwareSpec, scope: str, chunk_bytes: float) -> float:
    """Return the seconds of a full turn: each of ``size - 1`` steps sends `chunk_bytes` to the next rank."""
    if not 0 <= chunk_bytes < float("inf"):
        raise InputError(f"a collective needs a finite size that is not negative, got {chunk_bytes} bytes")
    size = hardware.ranks_per_node if scope == "node" else hardware.num_nodes
    if size == 1 or chunk_bytes == 0:
        return 0.0
    step = np.zeros((hardware.num_ranks, hardware.num_ranks))
    ranks = np.arange(hardware.num_ranks)
    node, local = np.divmod(ranks, hardware.ranks_per_node)
    after = (node, (local + 1) % size) if scope == "node" else ((node + 1) % size, local)
    step[ranks, after[0] * hardware.ranks_per_node + after[1]] = chunk_bytes
    return (size - 1) * all_to_all_seconds(hardware, step).seconds


def _split(hardware: HardwareSpec, traffic: Floats) -> list[_Ports]:
    """Return the traffic of each fabric, without the diagonal; fabrics that carry nothing are left out."""
    traffic = _checked(hardware, traffic)
    node, local = np.divmod(np.arange(hardware.num_ranks), hardware.ranks_per_node)
    same = node[:, None] == node[None, :]
    found = []
    for scope, mask in (("node", same), ("cluster", ~same)):
        part = np.where(mask, traffic, 0.0)
        np.fill_diagonal(part, 0.0)
        if part.any():
            fabric = hardware.fabric(scope)
            if fabric is None:
                raise InputError(f"hardware {hardware.name!r}: {part.sum():.0f} bytes need a {scope} fabric, "
                                 "and it has none")
            per_node = -(-hardware.ranks_per_node // fabric.ranks_per_port)
            found.append(_Ports(fabric, part, node * per_node + local // fabric.ranks_per_port, per_node))
    return found


def _checked(hardware: HardwareSpec, traffic: Floats) -> Floats:
    size = hardware.num_ranks
    array = np.asarray(traffic, dtype=np.float64)
    if array.shape != (size, size):
        raise InputError(f"traffic must be float64[{size}, {size}] (rank, rank), got shape {array.shape}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise InputError("traffic must be finite and not negative, in bytes")
    return array


def _rotated(part: _Ports, sources: Ints, targets: Ints) -> Ints:
    """Return the order of messages: by distance of the node, then of the port in the node, then of the rank.

    At one distance every port sends to another one, so no two meet at a receiver.
    """
    from_node, from_port = np.divmod(part.of_rank[sources], part.per_node)
    to_node, to_port = np.divmod(part.of_rank[targets], part.per_node)
    nodes, ranks = part.count // part.per_node, len(part.of_rank)
    by_node, by_port = (to_node - from_node) % nodes, (to_port - from_port) % part.per_node
    return np.lexsort((sources, (targets - sources) % ranks, by_port, by_node))


def _append(found: list[Transfer], hardware: HardwareSpec, part: _Ports, source: int, target: int) -> None:
    """Add the one or two transfers of a message."""
    fabric, num_bytes = part.fabric, float(part.traffic[source, target])
    sender, receiver = (_port_name(hardware, part, rank) for rank in (source, target))
    wires = {"port": (f"{sender}:{fabric.name}.out", f"{receiver}:{fabric.name}.in"),
             "egress": (f"{sender}:{fabric.name}.out",),
             "pair": (f"{sender}:{fabric.name}>{receiver}",)}[fabric.contention]
    for stage, wire in enumerate(wires):
        last = stage == len(wires) - 1
        found.append(Transfer(source, target, num_bytes, fabric.name, wire, num_bytes / fabric.bytes_per_s,
                              fabric.latency_s if last else 0.0, len(found) - 1 if stage else -1))


def _port_name(hardware: HardwareSpec, part: _Ports, rank: int) -> str:
    """Return the rank's device where it has a port of its own, else ``node0.port1``."""
    if part.fabric.ranks_per_port == 1:
        return hardware.ranks[rank]
    node, port = divmod(int(part.of_rank[rank]), part.per_node)
    return f"node{node}.port{port}"
