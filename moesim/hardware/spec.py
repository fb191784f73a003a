"""HardwareSpec: devices, memories, links and fabrics as flat, named parts; every number has a reference.

It knows flops, bytes and routes, never experts. One file in the catalog describes one machine (a node);
`moesim.hardware.load` reads it and repeats it into a cluster.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

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
    tokens at which a matrix kernel pads its work (1: no padding).
    """

    name: str
    kind: str
    memory: str
    flops_per_s: dict[str, float]
    kernel_overhead_s: float = 0.0
    tile_tokens: int = 1
    node: int = 0
    reference: str = ""


@dataclass(frozen=True)
class Link:
    """A point-to-point connection between two memories; rates are per direction.

    `duplex` ``full`` gives each direction its own wire, ``half`` shares one. Links that name the same
    `port` contend for it.
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
