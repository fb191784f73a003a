"""Machines from strict YAML: one file describes one node, `load_hardware` repeats it into a cluster.

A file (schema ``moesim.hardware/1``) has groups of devices (``gpu: {count: 8, ...}``), memories and links
that exist once per device of a group (``per: gpu``) or once per node (``per: node``), and up to two fabrics.
Every part names the entry of `references` that its numbers come from; ``reference_of`` names another one
for single keys. Expanded names: ``node0.gpu3``, ``node0.gpu3.hbm``, ``node0.dram``, ``node0.gpu3.pcie``.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from moesim.artifacts import catalog_folder, read_bytes
from moesim.errors import InputError, did_you_mean, unknown
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Link, Memory

SCHEMA = "moesim.hardware/1"
PER_NODE = "node"

_TEXT, _NUMBER, _WHOLE, _MAP, _RATES = "text", "a number", "a whole number", "a mapping", "numbers by dtype"
_SHARES = "shares of the rate by size in bytes"

_TOP = {"schema": _TEXT, "name": _TEXT, "description": _TEXT, "references": _MAP, "ranks": _TEXT,
        "devices": _MAP, "memories": _MAP}
_TOP_OPTIONAL = {"links": _MAP, "node_fabric": _MAP, "cluster_fabric": _MAP}
_PART_OPTIONAL = {"reference_of": _MAP}
_DEVICE = {"count": _WHOLE, "kind": _TEXT, "memory": _TEXT, "flops_per_s": _RATES,
           "kernel_overhead_s": _NUMBER, "tile_tokens": _WHOLE, "reference": _TEXT}
_DEVICE_OPTIONAL = {"max_count": _WHOLE, "idle_w": _NUMBER, "busy_w": _NUMBER, **_PART_OPTIONAL}
_MEMORY = {"per": _TEXT, "kind": _TEXT, "num_bytes": _NUMBER, "bytes_per_s": _NUMBER, "reference": _TEXT}
_LINK = {"per": _TEXT, "kind": _TEXT, "source": _TEXT, "target": _TEXT, "bytes_per_s": _NUMBER,
         "latency_s": _NUMBER, "duplex": _TEXT, "reference": _TEXT}
_LINK_OPTIONAL = {"port": _TEXT, "share_of_rate": _SHARES, **_PART_OPTIONAL}
_FABRIC = {"name": _TEXT, "kind": _TEXT, "bytes_per_s": _NUMBER, "latency_s": _NUMBER,
           "ranks_per_port": _WHOLE, "contention": _TEXT, "reference": _TEXT}


def hardware_names() -> list[str]:
    """Return the names of the catalog's machines, sorted."""
    return sorted(file.stem for file in catalog_folder("hardware").glob("*.yaml"))


def load_hardware(name_or_path: str | os.PathLike[str], *, num_nodes: int = 1,
                  gpus_per_node: int | None = None) -> HardwareSpec:
    """Read a machine of the catalog, or a YAML file, as `num_nodes` equal nodes.

    Args:
        name_or_path: a catalog name (``h100-sxm``) or the path of a ``.yaml`` file.
        num_nodes: how many nodes, joined by the file's `cluster_fabric`.
        gpus_per_node: how many of a node's GPUs to use (None: the file's `count`); at most its `max_count`.

    Returns:
        the flat spec; ranks are the devices of the group that the file's `ranks` names, node by node.

    Raises:
        InputError: no such machine; a file that is wrong (named with line and column); a fabric that the
            size asks for and the file does not have.
    """
    return _expand(_read(_file_of(os.fspath(name_or_path))), num_nodes, gpus_per_node)


def _file_of(name: str) -> Path:
    if name in hardware_names():
        return catalog_folder("hardware") / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml") or os.sep in name:
        return Path(name)
    raise unknown("hardware", name, hardware_names())


@dataclass(frozen=True)
class _Node:
    """A checked mapping of a file: its values, and where each of them stands."""

    file: Path
    path: str
    raw: Any

    def fail(self, key: str | None, message: str) -> NoReturn:
        """Raise InputError at a key (None: at the mapping itself), with line and column from 1."""
        line, column = self.raw.lc.key(key) if key in self.raw else (self.raw.lc.line, self.raw.lc.col)
        where = f"{self.path}: " if self.path else ""
        raise InputError(f"{self.file}:{line + 1}:{column + 1}: {where}{message}")

    def child(self, key: str) -> _Node:
        """Return the mapping under `key`, which must be one and not be empty."""
        value = self.raw[key]
        if not hasattr(value, "lc") or not isinstance(value, dict) or not value:
            self.fail(key, f"{key!r} must be {_MAP} with at least one key, got {_show(value)}")
        return _Node(self.file, f"{self.path}.{key}" if self.path else key, value)

    def children(self, key: str) -> dict[str, _Node]:
        """Return the mappings under `key` by name; none where the file leaves `key` out."""
        parent = self.child(key) if key in self.raw else None
        return {str(name): parent.child(name) for name in parent.raw} if parent else {}

    def check(self, required: dict[str, str], optional: dict[str, str]) -> dict[str, Any]:
        """Return the values after checking keys and types; mappings stay unread."""
        allowed = required | optional
        for key in self.raw:
            if key not in allowed:
                self.fail(key, f"unknown key {key!r}.{did_you_mean(key, allowed)}")
        for key in required:
            if key not in self.raw:
                self.fail(None, f"missing key {key!r} ({required[key]})")
        return {key: self._value(key, allowed[key]) for key in self.raw}

    def _value(self, key: str, expected: str) -> Any:
        value = self.raw[key]
        if expected == _TEXT and isinstance(value, str) and value:
            return str(value)
        if expected == _NUMBER and _is_number(value):
            return float(value)
        if expected == _WHOLE and _is_number(value) and float(value).is_integer():
            return int(value)
        if expected == _RATES:
            rates = self.child(key)
            return {str(name): rates._value(name, _NUMBER) for name in rates.raw}
        if expected == _SHARES:
            return self._shares(key)
        if expected == _MAP:
            return self.child(key).raw
        return self.fail(key, f"{key!r} must be {expected}, got {_show(value)}")


    def _shares(self, key: str) -> tuple[tuple[float, float], ...]:
        shares = self.child(key)
        for size in shares.raw:
            if not _is_number(size):
                shares.fail(size, f"a size in bytes must be {_NUMBER}, got {_show(size)}")
        return tuple((float(size), shares._value(size, _NUMBER)) for size in shares.raw)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def _read(file: Path) -> _Node:
    """Parse YAML 1.2 (``64e9`` is a number, ``on`` is text, a repeated key is an error) and check the top."""
    try:
        raw = YAML(typ="rt", pure=True).load(io.BytesIO(read_bytes(file)))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise InputError(f"{file}{place}: {error.problem or error.context}") from None
    except (YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{file}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}:1:1: expected a mapping with schema {SCHEMA!r}, found {_show(raw)}")
    top = _Node(file, "", raw)
    if raw.get("schema") != SCHEMA:
        top.fail("schema", f"expected schema {SCHEMA!r}, found {_show(raw.get('schema'))}")
    top.check(_TOP, _TOP_OPTIONAL)
    return top


class _References:
    """The file's references; several of one part are joined under one id that says which is which."""

    def __init__(self, top: _Node) -> None:
        node = top.child("references")
        self.texts = {str(key): str(node._value(key, _TEXT)) for key in node.raw}

    def of(self, part: _Node, keys: Iterable[str]) -> str:
        """Return the id for a part, adding a joined entry where `reference_of` names further ones."""
        found = self._known(part, "reference")
        if "reference_of" not in part.raw:
            return found
        others, allowed = part.child("reference_of"), set(keys)
        for key in others.raw:
            if key not in allowed:
                others.fail(key, f"unknown key {key!r}.{did_you_mean(key, allowed)}")
        ids = {str(key): self._known(others, key) for key in others.raw}
        joined = "; ".join([found, *(f"{key}: {name}" for key, name in ids.items())])
        texts = (f"{key}: {self.texts[name]}" for key, name in ids.items())
        self.texts[joined] = "; ".join([self.texts[found], *texts])
        return joined

    def _known(self, node: _Node, key: str) -> str:
        name = str(node._value(key, _TEXT))
        if name not in self.texts:
            node.fail(key, f"reference {name!r} is not listed.{did_you_mean(name, self.texts)}")
        return name


def _expand(top: _Node, num_nodes: int, gpus_per_node: int | None) -> HardwareSpec:
    """Repeat the checked file into `num_nodes` nodes; see `load_hardware`."""
    if num_nodes < 1:
        raise InputError(f"num_nodes must be at least 1, got {num_nodes}")
    references = _References(top)
    counts = _counts(top, gpus_per_node)
    rank_group = str(top.raw["ranks"])
    if rank_group not in counts:
        top.fail("ranks", f"no device group {rank_group!r}.{did_you_mean(rank_group, counts)}")
    devices: dict[str, Device] = {}
    memories: dict[str, Memory] = {}
    links: dict[str, Link] = {}
    for node in range(num_nodes):
        _add_memories(memories, top, references, counts, node)
        _add_devices(devices, top, references, counts, node, memories)
        _add_links(links, top, references, counts, node, memories)
    ranks = tuple(f"node{n}.{rank_group}{i}" for n in range(num_nodes) for i in range(counts[rank_group]))
    fabrics = _fabrics(top, references, counts[rank_group], num_nodes)
    return HardwareSpec(str(top.raw["name"]), devices, memories, links, fabrics, ranks, counts[rank_group],
                        str(top.raw["description"]), references.texts)


def _counts(top: _Node, gpus_per_node: int | None) -> dict[str, int]:
    """Return how many devices of each group a node has, `gpus_per_node` applied to those of kind gpu."""
    counts, has_gpus = {}, False
    for group, part in top.children("devices").items():
        values = part.check(_DEVICE, _DEVICE_OPTIONAL)
        counts[group] = values["count"]
        if values["count"] < 1:
            part.fail("count", f"count must be at least 1, got {values['count']}")
        if values["kind"] == "gpu" and gpus_per_node is not None:
            most, has_gpus = values.get("max_count", values["count"]), True
            if not 1 <= gpus_per_node <= most:
                part.fail("count", f"gpus_per_node must be 1 to {most}, got {gpus_per_node}")
            counts[group] = gpus_per_node
    if gpus_per_node is not None and not has_gpus:
        raise InputError(f"{top.file}: gpus_per_node={gpus_per_node}, but no device here is of kind 'gpu'")
    return counts


def _owners(part: _Node, counts: dict[str, int], node: int) -> list[str]:
    """Return the name prefixes that a part is repeated for: the node, or each device of its group."""
    per = str(part.raw["per"])
    if per == PER_NODE:
        return [f"node{node}"]
    if per not in counts:
        part.fail("per", f"no device group {per!r}.{did_you_mean(per, [*counts, PER_NODE])}")
    return [f"node{node}.{per}{index}" for index in range(counts[per])]


def _add_memories(found: dict[str, Memory], top: _Node, references: _References, counts: dict[str, int],
                  node: int) -> None:
    for name, part in top.children("memories").items():
        values = part.check(_MEMORY, _PART_OPTIONAL)
        for owner in _owners(part, counts, node):
            found[f"{owner}.{name}"] = Memory(
                f"{owner}.{name}", values["kind"], values["num_bytes"], values["bytes_per_s"], node,
                references.of(part, ("num_bytes", "bytes_per_s")))


def _add_devices(found: dict[str, Device], top: _Node, references: _References, counts: dict[str, int],
                 node: int, memories: dict[str, Memory]) -> None:
    for group, part in top.children("devices").items():
        values = part.check(_DEVICE, _DEVICE_OPTIONAL)
        for index in range(counts[group]):
            name = f"node{node}.{group}{index}"
            found[name] = Device(
                name, values["kind"], _end(part, "memory", name, node, memories), values["flops_per_s"],
                values["kernel_overhead_s"], values["tile_tokens"], node,
                references.of(part, ("flops_per_s", "kernel_overhead_s", "tile_tokens", "idle_w", "busy_w")),
                values.get("idle_w"), values.get("busy_w"))


def _add_links(found: dict[str, Link], top: _Node, references: _References, counts: dict[str, int], node: int,
               memories: dict[str, Memory]) -> None:
    for name, part in top.children("links").items():
        values = part.check(_LINK, _LINK_OPTIONAL)
        for owner in _owners(part, counts, node):
            source, target = (_end(part, key, owner, node, memories) for key in ("source", "target"))
            port = f"node{node}.{values['port']}" if "port" in values else ""
            found[f"{owner}.{name}"] = Link(
                f"{owner}.{name}", source, target, values["kind"], values["bytes_per_s"], values["latency_s"],
                values["duplex"], port, references.of(part, ("bytes_per_s", "latency_s", "share_of_rate")),
                values.get("share_of_rate", ()))


def _end(part: _Node, key: str, owner: str, node: int, memories: dict[str, Memory]) -> str:
    """Return a memory's full name: the owner's own memory of that name, else the node's."""
    name = str(part.raw[key])
    for candidate in (f"{owner}.{name}", f"node{node}.{name}"):
        if candidate in memories:
            return candidate
    local = {full.removeprefix(f"{prefix}.") for full in memories for prefix in (owner, f"node{node}")
             if full.startswith(f"{prefix}.")}
    return part.fail(key, f"{key}: no memory {name!r}.{did_you_mean(name, local)}")


def _fabrics(top: _Node, references: _References, ranks_per_node: int, num_nodes: int) -> tuple[Fabric, ...]:
    found = []
    for scope, size, what in (("node", ranks_per_node, "ranks in a node"), ("cluster", num_nodes, "nodes")):
        key = f"{scope}_fabric"
        if key in top.raw:
            part = top.child(key)
            values = part.check(_FABRIC, _PART_OPTIONAL)
            found.append(Fabric(
                values["name"], values["kind"], scope, values["bytes_per_s"], values["latency_s"],
                values["ranks_per_port"], values["contention"],
                references.of(part, ("bytes_per_s", "latency_s", "ranks_per_port", "contention"))))
        elif size > 1:
            raise InputError(f"{top.file}: {size} {what} need a {key!r}, and the file has none")
    return tuple(found)
