"""HardwareSpec: devices, memories, links and fabrics as flat, named parts; every number has a reference.

It knows flops, bytes and routes, never experts. One file in the catalog describes one machine (a node);
`moesim.hardware.load` reads it and repeats it into a cluster.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np

from moesim.errors import InputError, did_you_mean

DEVICE_KINDS = ("gpu", "cpu", "soc", "npu")
MEMORY_KINDS = ("hbm", "gddr", "dram", "unified", "flash")
CONTENTIONS = ("port", "egress", "pair")
SCOPES = ("node", "cluster")


@dataclass(frozen=True)
class Memory:
    """A memory: capacity in bytes, read rate in bytes per second."""

    name: str
    kind: str
    num_bytes: float
    bytes_per_s: float
    node: int = 0
    reference: str = ""


@dataclass(frozen=True)
class Device:
    """A processor. `flops_per_s` is dense peak by dtype (bf16, fp8, fp32, int8 ...).

    `kernel_overhead_s` is the fixed cost of starting one kernel; `tile_tokens` is the granularity in
    tokens at which a matrix kernel pads its work (1: no padding). `idle_w` and `busy_w`: power drawn, its own
    memory included, while it computes nothing and while it computes (None: not known).
    """

    name: str
    kind: str
    memory: str
    flops_per_s: dict[str, float]
    kernel_overhead_s: float = 0.0
    tile_tokens: int = 1
    node: int = 0
    reference: str = ""
    idle_w: float | None = None
    busy_w: float | None = None


@dataclass(frozen=True)
class Link:
    """A point-to-point connection between two memories; rates are per direction.

    `duplex` ``full`` gives each direction its own wire, ``half`` shares one. Links that name the same
    `port` contend for it. `share_of_rate`: (bytes, share) in rising order, where small requests do not reach the rate (a
    flash drive): one request of so many bytes takes ``bytes / (share * bytes_per_s)``, its latency included.
    """

    name: str
    source: str
    target: str
    kind: str
    bytes_per_s: float
    latency_s: float
    duplex: str = "full"
    port: str = ""
    reference: str = ""
    share_of_rate: tuple[tuple[float, float], ...] = ()

    def seconds(self, num_bytes: float, efficiency: float = 1.0) -> float:
        """Return the nameplate time of one request; `efficiency` is a further share of the rate.

        Between the sizes of `share_of_rate` the time is interpolated log-log; below the first size a request takes as
        long as one of that size; above the last it reaches the last share.
        """
        rate = self.bytes_per_s * efficiency
        if not self.share_of_rate or num_bytes <= 0:
            return self.latency_s + num_bytes / rate
        sizes, shares = zip(*self.share_of_rate, strict=True)
        if num_bytes >= sizes[-1]:
            return num_bytes / (shares[-1] * rate)
        times = [math.log(size / share) for size, share in self.share_of_rate]
        return math.exp(float(np.interp(math.log(num_bytes), [math.log(size) for size in sizes], times))) / rate


@dataclass(frozen=True)
class Fabric:
    """A network that joins ranks: inside a node (`scope` node) or between nodes (cluster).

    `bytes_per_s` is per direction and per port; `ranks_per_port` ranks share one port (1: every GPU has
    its own; 8: one network card for a node of eight). `contention` names the assumption used by both
    the closed form and the per-link detail:

    - ``port``: a port's sends and its receives each pass one wire (full duplex);
    - ``egress``: only the sender's port is limited;
    - ``pair``: a wire of that rate for each ordered pair of ports.
    """

    name: str
    kind: str
    scope: str
    bytes_per_s: float
    latency_s: float
    ranks_per_port: int = 1
    contention: str = "port"
    reference: str = ""


@dataclass(frozen=True)
class HardwareSpec:
    """A machine or cluster. Names are unique; ends of links and memories of devices must exist.

    `ranks` are the devices that hold experts in expert parallelism, in rank order, node by node.

    Raises:
        InputError: a name that is not there, a number that is not positive, a missing reference.
    """

    name: str
    devices: dict[str, Device]
    memories: dict[str, Memory]
    links: dict[str, Link] = field(default_factory=dict)
    fabrics: tuple[Fabric, ...] = ()
    ranks: tuple[str, ...] = ()
    ranks_per_node: int = 1
    description: str = ""
    references: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts: list[Device | Memory | Link | Fabric] = [*self.devices.values(), *self.memories.values()]
        for part in [*parts, *self.links.values(), *self.fabrics]:
            self._check_part(part)
        for device in self.devices.values():
            self._check_end(f"device {device.name!r}", device.memory)
        for link in self.links.values():
            self._check_end(f"link {link.name!r}: source", link.source)
            self._check_end(f"link {link.name!r}: target", link.target)
        for rank in self.ranks:
            if rank not in self.devices:
                raise InputError(
                    f"hardware {self.name!r}: rank {rank!r} is no device.{did_you_mean(rank, self.devices)}"
                )
        if self.ranks and len(self.ranks) % self.ranks_per_node:
            raise InputError(
                f"hardware {self.name!r}: {len(self.ranks)} ranks are not whole nodes of {self.ranks_per_node}"
            )

    def _check_part(self, part: Device | Memory | Link | Fabric) -> None:
        where = f"hardware {self.name!r}: {type(part).__name__.lower()} {part.name!r}"
        for key in ("num_bytes", "bytes_per_s", "ranks_per_port", "tile_tokens"):
            value = getattr(part, key, 1)
            if not value > 0:
                raise InputError(f"{where}: {key} must be positive, got {value}")
        for key in ("latency_s", "kernel_overhead_s"):
            if not getattr(part, key, 0.0) >= 0:
                raise InputError(f"{where}: {key} must not be negative, got {getattr(part, key)}")
        for dtype, rate in getattr(part, "flops_per_s", {}).items():
            if not rate > 0:
                raise InputError(f"{where}: flops_per_s[{dtype}] must be positive, got {rate}")
        if isinstance(part, Link):
            self._check_shares(where, part.share_of_rate)
        if isinstance(part, Device):
            self._check_power(where, part)
        allowed = {
            Device: ("kind", DEVICE_KINDS),
            Memory: ("kind", MEMORY_KINDS),
            Link: ("duplex", ("full", "half")),
            Fabric: ("contention", CONTENTIONS),
        }
        key, options = allowed[type(part)]
        if getattr(part, key) not in options:
            raise InputError(f"{where}: {key} {getattr(part, key)!r}.{did_you_mean(getattr(part, key), options)}")
        if isinstance(part, Fabric) and part.scope not in SCOPES:
            raise InputError(f"{where}: scope {part.scope!r}.{did_you_mean(part.scope, SCOPES)}")
        if self.references and part.reference not in self.references:
            raise InputError(
                f"{where}: reference {part.reference!r} is not listed.{did_you_mean(part.reference, self.references)}"
            )

    def _check_shares(self, where: str, shares: tuple[tuple[float, float], ...]) -> None:
        sizes = [size for size, _ in shares]
        times = [size / share if share > 0 else math.inf for size, share in shares]
        if any(size <= 0 for size in sizes) or any(b <= a for a, b in itertools.pairwise(sizes)):
            raise InputError(f"{where}: share_of_rate needs rising sizes in bytes, got {sizes}")
        if any(not 0 < share <= 1 for _, share in shares) or any(b < a for a, b in itertools.pairwise(times)):
            raise InputError(
                f"{where}: share_of_rate needs shares above 0 and up to 1, and a larger request must not take less time")

    def _check_power(self, where: str, device: Device) -> None:
        if (device.idle_w is None) != (device.busy_w is None):
            raise InputError(f"{where}: give both idle_w and busy_w, or neither")
        if device.idle_w is not None and device.busy_w is not None and not 0 <= device.idle_w <= device.busy_w:
            raise InputError(f"{where}: needs 0 <= idle_w <= busy_w, got {device.idle_w} and {device.busy_w}")

    def _check_end(self, where: str, name: str) -> None:
        if name not in self.memories:
            raise InputError(f"hardware {self.name!r}: {where}: no memory {name!r}.{did_you_mean(name, self.memories)}")

    @property
    def num_ranks(self) -> int:
        """Number of expert-parallel ranks."""
        return len(self.ranks)

    @property
    def num_nodes(self) -> int:
        """Number of nodes that hold ranks."""
        return max(1, self.num_ranks // self.ranks_per_node)

    def node_of_rank(self, rank: int) -> int:
        """Return the node of a rank."""
        return rank // self.ranks_per_node

    def memory_of(self, device: str) -> Memory:
        """Return a device's own memory."""
        return self.memories[self.device(device).memory]

    def device(self, name: str) -> Device:
        """Return a device; raises InputError with a suggestion."""
        if name not in self.devices:
            raise InputError(f"hardware {self.name!r} has no device {name!r}.{did_you_mean(name, self.devices)}")
        return self.devices[name]

    def devices_of_kind(self, *kinds: str) -> list[Device]:
        """Return devices of these kinds in file order."""
        return [device for device in self.devices.values() if device.kind in kinds]

    def fabric(self, scope: str) -> Fabric | None:
        """Return the fabric of a scope (``node`` or ``cluster``), or None."""
        return next((fabric for fabric in self.fabrics if fabric.scope == scope), None)

    def route(self, source: str, target: str) -> list[Link]:
        """Return the links of the route of least time per byte between two memories.

        Raises:
            InputError: no such memory, or no route.
        """
        import networkx as nx

        for name in (source, target):
            self._check_end("route", name)
        graph = nx.MultiGraph()
        graph.add_nodes_from(self.memories)
        for link in self.links.values():
            graph.add_edge(link.source, link.target, key=link.name, weight=1.0 / link.bytes_per_s)
        try:
            path = nx.shortest_path(graph, source, target, weight="weight")
        except nx.NetworkXNoPath:
            raise InputError(f"hardware {self.name!r}: no route from {source!r} to {target!r}") from None
        names = [min(graph[a][b], key=lambda key: graph[a][b][key]["weight"]) for a, b in itertools.pairwise(path)]
        return [self.links[name] for name in names]
