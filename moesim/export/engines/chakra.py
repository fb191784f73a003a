"""Chakra execution traces of a run's task graph, one per rank, for ASTRA-sim.

Schema ``ChakraProtoMsg`` of MLCommons' Chakra; nodes are written by hand in protobuf's wire format (varints and
length-delimited fields), each behind its length, after one ``GlobalMetadata``.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import CheckError
from moesim.export.check.chakra import check_traces, read_trace
from moesim.export.engines.target import Content, Refusal, Target
from moesim.model.spec import ModelSpec
from moesim.simulate.result import DONE, SimulationResult
from moesim.units import NS_PER_US

VERSION, PREFIX = "0.0.4", "npu"
MEM_LOAD, MEM_STORE, COMP, COLLECTIVE = 2, 3, 4, 7
ALL_TO_ALL = 6
EXCHANGES = ("dispatch", "combine", "weights", "counts")
MEMORY = {"load": MEM_LOAD, "prefetch": MEM_LOAD, "admit": MEM_LOAD, "receive": MEM_LOAD, "send": MEM_STORE}
CPU_KINDS = ("cpu_expert",)
EVERY_NPU = -1


class Chakra(Target[SimulationResult]):
    """A folder of ``npu.<rank>.et``; barriers are folded into the dependencies of what waits for them.

    A task that names a rank becomes a node of that rank's trace. An all-to-all becomes an ``ALL_TO_ALL`` node of every
    trace, with the bytes that, spread evenly, give the run's total. Durations are whole microseconds between rounded
    start and end, so that rounding does not add up.
    """

    name, suffixes, needs_model = "chakra", (), False
    takes, takes_words = SimulationResult, "a run (*.result)"
    what = "execution traces for ASTRA-sim, one per rank"

    def refusal(self, subject: SimulationResult, model: ModelSpec | None) -> Refusal[SimulationResult] | None:
        """Refuse runs without dependencies, and exchanges that the schema's collectives cannot carry."""
        if "deps" not in subject.tables:
            return Refusal(f"chakra: the run {subject.name!r} has no table of dependencies (deps.parquet); "
                           "simulate it again with this version of moesim")
        tasks = subject.tasks
        if len(tasks[tasks["kind"] == "all_gather"]):
            return Refusal("chakra: context-coherent execution is not expressed; export a run of home execution")
        if len(tasks[tasks["kind"].isin(EXCHANGES) & (tasks["rank"] >= 0)]):
            return Refusal("chakra: the run has one task per transfer, which name no receiver; simulate it with "
                           "collective: closed_form")
        return None

    def encode(self, subject: SimulationResult, model: ModelSpec | None, path: Path) -> Content:
        """Return the traces by file name."""
        nodes, deps = _nodes(subject), _deps_of(subject)
        return {f"{PREFIX}.{npu}.et": _trace(nodes, deps, npu) for npu in range(_num_npus(subject))}

    def check(self, content: Content, subject: SimulationResult, model: ModelSpec | None) -> None:
        """Read every trace; each done task that took time must stand in the traces of its rank, or in all."""
        assert isinstance(content, Mapping)
        traces = {int(name.split(".")[1]): read_trace(data) for name, data in content.items()}
        check_traces(traces)
        tasks = subject.tasks[(subject.tasks["state"] == DONE) & (subject.tasks["resource"] != "")]
        for npu, nodes in traces.items():
            own = tasks[(tasks["rank"] == npu) | (tasks["rank"] < 0) | (len(traces) == 1)]
            if [node.node_id for node in nodes] != own["task"].tolist():
                raise CheckError(f"chakra: the nodes of NPU {npu} are not the tasks of its rank")

    def command(self, subject: SimulationResult, model: ModelSpec | None, path: Path) -> str:
        """Return the command line of ASTRA-sim's analytical backend."""
        return (f"AstraSim_Analytical_Congestion_Aware --workload-configuration={shlex.quote(str(path / PREFIX))} "
                f"--system-configuration=system.json --remote-memory-configuration=memory.json "
                f"--network-configuration=network_{_num_npus(subject)}_npus.yml")

    def notes(self, subject: SimulationResult, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what is lost."""
        several = ("An all-to-all is written with equal parts for all pairs: who sends more is lost. Ranks meet at "
                   "all-to-alls only; moesim also lets all wait at a layer's end for the slowest rank's shared experts.",
                   ) if _num_npus(subject) > 1 else ()
        return ("Compute nodes carry their simulated time (replayed) and their flops and bytes (for a roofline); "
                "network and memory times are ASTRA-sim's own, from its configuration files.", *several)


@dataclass(frozen=True)
class _Node:
    """One task: its trace (or all), and its encoded fields except the dependencies."""

    npu: int
    head: bytes
    tail: bytes


def _num_npus(result: SimulationResult) -> int:
    return max(0, int(result.tasks["rank"].max())) + 1


def _nodes(result: SimulationResult) -> dict[int, _Node]:
    """Return the nodes of done tasks that hold a resource, by task."""
    npus = _num_npus(result)
    tasks = result.tasks[(result.tasks["state"] == DONE) & (result.tasks["resource"] != "")]
    columns = ("task", "kind", "rank", "layer", "expert", "start_ns", "end_ns", "num_bytes", "flops")
    made = {}
    for task, kind, rank, layer, expert, start, end, size, flops in zip(*(tasks[name] for name in columns), strict=True):
        start_us, end_us = (round(int(ns) / NS_PER_US) for ns in (start, end))
        name = kind + (f" L{layer}" if layer >= 0 else "") + (f" E{expert}" if expert >= 0 else "")
        head = _number(1, int(task)) + _text(2, name) + _number(3, _type(kind))
        tail = _number(6, start_us) + _number(7, end_us - start_us)
        made[int(task)] = _Node(int(rank) if npus > 1 else EVERY_NPU, head,
                                tail + b"".join(_attributes(kind, int(size), round(float(flops)), npus)))
    return made


def _type(kind: str) -> int:
    return COLLECTIVE if kind in EXCHANGES else MEMORY.get(kind, COMP)


def _attributes(kind: str, num_bytes: int, flops: int, npus: int) -> Iterator[bytes]:
    """Yield the attributes of a node, in the types that both of ASTRA-sim's readers take."""
    yield _attribute("is_cpu_op", 27, int(kind in CPU_KINDS))
    if kind in EXCHANGES:  # every NPU sends comm_size / NPUs to each other one
        yield _attribute("comm_type", 9, ALL_TO_ALL)
        yield _attribute("comm_size", 9, max(1, round(num_bytes / (npus - 1))))
        return
    if kind not in MEMORY:
        yield _attribute("num_ops", 9, flops)
    yield _attribute("tensor_size", 13, num_bytes)


def _deps_of(result: SimulationResult) -> dict[int, list[int]]:
    """Return the tasks that each task waits for."""
    deps: dict[int, list[int]] = {}
    table = result.tables["deps"]
    for task, dep in zip(table["task"].tolist(), table["dep"].tolist(), strict=True):
        deps.setdefault(task, []).append(dep)
    return deps


def _trace(nodes: dict[int, _Node], deps: dict[int, list[int]], npu: int) -> bytes:
    """Return one NPU's trace; what is not in it (barriers, other ranks' tasks) hands its own dependencies on."""
    parts = [_message(_text(1, VERSION))]
    stands_for: dict[int, tuple[int, ...]] = {}
    direct: dict[int, tuple[int, ...]] = {}
    for task in sorted({*nodes, *deps}):
        found = dict.fromkeys(one for dep in deps.get(task, ()) for one in stands_for.get(dep, ()))
        implied = {one for dep in found for one in direct[dep]}
        before = tuple(one for one in found if one not in implied)
        node = nodes.get(task)
        if node is not None and node.npu in (npu, EVERY_NPU):
            parts.append(_message(node.head + _packed(5, before) + node.tail))
            stands_for[task], direct[task] = (task,), before
        else:
            stands_for[task] = before
    return b"".join(parts)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(body: bytes) -> bytes:
    return _varint(len(body)) + body


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value) if value else b""  # proto3 leaves zeros out


def _delimited(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _message(body)


def _text(field: int, value: str) -> bytes:
    return _delimited(field, value.encode())


def _packed(field: int, values: Iterable[int]) -> bytes:
    body = b"".join(map(_varint, values))
    return _delimited(field, body) if body else b""


def _attribute(name: str, field: int, value: int) -> bytes:
    """Return an attribute; a member of a oneof is written even where it is 0."""
    return _delimited(10, _text(1, name) + _varint(field << 3) + _varint(value))
