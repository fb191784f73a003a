"""A reader of Chakra execution traces (protobuf wire format by hand) and the rules that ASTRA-sim relies on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moesim.errors import CheckError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MEM_LOAD, MEM_STORE, COMP, COLLECTIVE = 2, 3, 4, 7
ATTRIBUTE_NAME, ATTRIBUTE_VALUES = 1, {9: "int64", 13: "uint64", 27: "bool", 29: "string"}
NEEDED = {COMP: {"is_cpu_op", "num_ops", "tensor_size"}, MEM_LOAD: {"is_cpu_op", "tensor_size"},
          MEM_STORE: {"is_cpu_op", "tensor_size"}, COLLECTIVE: {"is_cpu_op", "comm_type", "comm_size"}}


@dataclass(frozen=True)
class ChakraNode:
    """One node of a trace: type by the schema's number, ids of the nodes it waits for, attributes by name."""

    node_id: int
    name: str
    type: int
    deps: tuple[int, ...]
    start_us: int
    duration_us: int
    attributes: dict[str, int | str]


def read_trace(data: bytes) -> list[ChakraNode]:
    """Return the nodes of one NPU's trace: after the metadata, each message behind its length; raises CheckError."""
    messages = list(_messages(data))
    if not messages or 1 not in dict(_fields(messages[0])):
        raise CheckError("chakra: the first message must be GlobalMetadata with a version")
    return [_node(message) for message in messages[1:]]


def check_traces(traces: Mapping[int, list[ChakraNode]]) -> None:
    """Raise CheckError unless ASTRA-sim can run these traces, one per NPU from 0.

    Every node waits for nodes before it, in its own file; it carries what its type needs; and all NPUs meet at the
    same collectives in the same order.
    """
    if sorted(traces) != list(range(len(traces))):
        raise CheckError(f"chakra: traces for the NPUs {sorted(traces)}; they must be 0 ... {len(traces) - 1}")
    for npu, nodes in traces.items():
        seen: set[int] = set()
        for node in nodes:
            if node.node_id in seen or not set(node.deps) <= seen:
                raise CheckError(f"chakra: node {node.node_id} of NPU {npu} comes twice or waits for a later one")
            if missing := NEEDED.get(node.type, {"a known type"}) - set(node.attributes):
                raise CheckError(f"chakra: node {node.node_id} of NPU {npu} lacks {sorted(missing)}")
            seen.add(node.node_id)
    meetings = {npu: [(node.node_id, node.attributes["comm_type"], node.attributes["comm_size"])
                      for node in nodes if node.type == COLLECTIVE] for npu, nodes in traces.items()}
    if any(meeting != meetings[0] for meeting in meetings.values()):
        raise CheckError("chakra: the NPUs do not meet at the same collectives")


def _messages(data: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(data):
        size, place = _varint(data, place)
        if place + size > len(data):
            raise CheckError("chakra: the file ends inside a message")
        yield data[place:place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data):
            raise CheckError("chakra: the file ends inside a number")
        byte = data[place]
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if byte < 0x80:
            return value, place


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, int or bytes) of a message."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        kind = key & 7
        if kind == VARINT:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        if kind not in (FIXED64, BYTES, FIXED32):
            raise CheckError(f"chakra: wire type {kind} is not one of the format")
        size, place = _varint(message, place) if kind == BYTES else (8 if kind == FIXED64 else 4, place)
        yield key >> 3, message[place:place + size]
        place += size


def _node(message: bytes) -> ChakraNode:
    plain: dict[int, Any] = {1: 0, 2: b"", 3: 0, 6: 0, 7: 0}
    deps: list[int] = []
    attributes: dict[str, int | str] = {}
    for number, value in _fields(message):
        if number == 5:
            deps += _packed(value)
        elif number == 10:
            name, found = _attribute(value)
            attributes[name] = found
        elif number in plain:
            plain[number] = value
        else:
            raise CheckError(f"chakra: a node has the field {number}, which is not expected")
    return ChakraNode(plain[1], plain[2].decode(), plain[3], tuple(deps), plain[6], plain[7], attributes)


def _packed(value: bytes) -> list[int]:
    numbers, place = [], 0
    while place < len(value):
        number, place = _varint(value, place)
        numbers.append(number)
    return numbers


def _attribute(message: bytes) -> tuple[str, int | str]:
    fields = dict(_fields(message))
    name = fields.pop(ATTRIBUTE_NAME).decode()
    if len(fields) != 1 or next(iter(fields)) not in ATTRIBUTE_VALUES:
        raise CheckError(f"chakra: the attribute {name!r} has the fields {sorted(fields)}")
    value = next(iter(fields.values()))
    return name, value.decode() if isinstance(value, bytes) else value
