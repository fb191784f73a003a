"""Chakra traces: read by the protobuf library from a schema declared here, and replayed by the graph's own rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from export_worlds import result_of, two_rank_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from step_worlds import random_plan, world

from moesim.errors import CheckError, InputError
from moesim.export.check.chakra import COLLECTIVE, COMP, MEM_LOAD, ChakraNode, check_traces, read_trace
from moesim.export.engines import EXPORTERS, export
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.graph import Resource, TaskGraph
from moesim.simulate.result import SimulationResult
from moesim.simulate.simpy_executor import run_simpy

# the part of MLCommons' et_def.proto that is written: message, field, number, type (Node and attributes by name)
SCHEMA = {
    "GlobalMetadata": [("version", 1, "string")],
    "AttributeProto": [("name", 1, "string"), ("int64_val", 9, "int64"), ("uint64_val", 13, "uint64"),
                       ("bool_val", 27, "bool")],
    "Node": [("id", 1, "uint64"), ("name", 2, "string"), ("type", 3, "int32"), ("ctrl_deps", 4, "uint64*"),
             ("data_deps", 5, "uint64*"), ("start_time_micros", 6, "uint64"), ("duration_micros", 7, "uint64"),
             ("attr", 10, "AttributeProto*")],
}


def message_classes() -> dict[str, Any]:
    """Classes of the protobuf library for `SCHEMA`."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="et.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, fields in SCHEMA.items():
        added = file.message_type.add(name=message)
        for name, number, kind in fields:
            field = added.field.add(name=name, number=number, label=3 if kind.endswith("*") else 1)
            plain = kind.rstrip("*")
            if plain in SCHEMA:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".t.{plain}"
            else:
                field.type = getattr(kinds, f"TYPE_{plain.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}")) for name in SCHEMA}


def library_nodes(data: bytes) -> list[Any]:
    """The nodes of a trace, as the protobuf library reads them; unknown fields are an error."""
    from google.protobuf.internal.decoder import _DecodeVarint32  # how Chakra's own Python reads lengths

    classes, place, messages = message_classes(), 0, []
    while place < len(data):
        size, place = _DecodeVarint32(data, place)
        kind = classes["Node" if messages else "GlobalMetadata"]
        messages.append(kind.FromString(data[place:place + size]))
        place += size
    assert messages[0].version == "0.0.4"
    return messages[1:]


def traces_of(result: SimulationResult) -> dict[str, bytes]:
    """The exported files by name."""
    content = EXPORTERS["chakra"].encode(result, None, Path("et"))
    assert isinstance(content, Mapping)
    return dict(content)


def test_golden_trace_of_two_ranks() -> None:
    """Every node of rank 0 by hand: ids, types, dependencies, microseconds, bytes per pair of ranks."""
    nodes = library_nodes(traces_of(result_of(two_rank_graph()))["npu.0.et"])
    rows = [(node.id, node.name, node.type, list(node.data_deps), node.start_time_micros, node.duration_micros,
             {attr.name: attr.bool_val or attr.int64_val or attr.uint64_val for attr in node.attr}) for node in nodes]
    # attention takes 1500 ns on rank 0 and 1501 ns on rank 1; dispatch starts at 1501, experts at 3501, combine at 6901
    assert rows == [
        (0, "attention L0", 4, [], 0, 2, {"is_cpu_op": 0, "num_ops": 1000, "tensor_size": 640}),
        (2, "dispatch L0", 7, [0], 2, 2, {"is_cpu_op": 0, "comm_type": 6, "comm_size": 4096}),
        (3, "experts L0", 4, [2], 4, 3, {"is_cpu_op": 0, "num_ops": 5000, "tensor_size": 1280}),
        (5, "combine L0", 7, [3], 7, 2, {"is_cpu_op": 0, "comm_type": 6, "comm_size": 8192})]


def test_bytes_of_an_exchange_are_the_runs() -> None:
    """ASTRA-sim sends comm_size / N between each two of N ranks; over all pairs that is what the run moved."""
    graph = TaskGraph((*(Resource(f"gpu{rank}.compute", f"gpu{rank}", "compute") for rank in range(4)),
                       Resource("network", "network", "all-to-all")))
    attention = [graph.add("attention", rank, 1000, rank=rank) for rank in range(4)]
    graph.add("dispatch", 4, 1000, attention, num_bytes=12_000)
    node = library_nodes(traces_of(result_of(graph))["npu.3.et"])[-1]
    size = next(attr.int64_val for attr in node.attr if attr.name == "comm_size")
    assert size == 4000
    assert 4 * 3 * size / 4 == 12_000


def test_barriers_are_folded_away() -> None:
    """The second layer's attention waits for the combine behind the barrier, and no barrier is written."""
    nodes = library_nodes(traces_of(result_of(two_rank_graph(layers=2)))["npu.1.et"])
    second = next(node for node in nodes if node.name == "attention L1")
    before = {node.id: node.name for node in nodes}
    assert [before[dep] for dep in second.data_deps] == ["combine L0"]
    assert not any("barrier" in node.name for node in nodes)


def test_offload_tasks_become_memory_and_cpu_nodes() -> None:
    """A copy is a memory load, a CPU's expert is marked; one device's run is one trace; cancelled tasks are left out."""
    graph = TaskGraph((Resource("gpu.compute", "gpu", "compute"), Resource("cpu", "node0", "experts"),
                       Resource("pcie", "gpu", "HtoD")))
    router = graph.add("router", 0, 1000, num_bytes=10)
    load = graph.add("load", 2, 5000, [router], num_bytes=700, expert=1, layer=0)
    graph.add("cpu_expert", 1, 9000, [router], expert=2, layer=0, num_bytes=700)
    graph.add("expert", 0, 2000, [load], expert=1, layer=0, num_bytes=700)
    graph.add("prefetch", 2, 1000, [router], num_bytes=700)
    result = result_of(graph)
    result.tables["tasks"].loc[4, "state"] = 1
    files = traces_of(result)
    assert sorted(files) == ["npu.0.et"]
    nodes = read_trace(files["npu.0.et"])
    assert [(node.name, node.type, node.attributes["is_cpu_op"], node.deps) for node in nodes] == [
        ("router", COMP, 0, ()), ("load L0 E1", MEM_LOAD, 0, (0,)), ("cpu_expert L0 E2", COMP, 1, (0,)),
        ("expert L0 E1", COMP, 0, (1,))]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_replayed_traces_end_when_the_run_did(data: st.DataObject) -> None:
    """Replaying one device's trace by dependencies and durations gives the run's end, to rounding of one microsecond.

    The tasks here hold a resource each, so nothing but dependencies decides when they start.
    """
    count = data.draw(st.integers(1, 12))
    graph = TaskGraph(tuple(Resource(f"r{task}", "gpu0", f"r{task}") for task in range(count)))
    for task in range(count):
        before = data.draw(st.lists(st.integers(0, task - 1), unique=True)) if task else []
        if data.draw(st.booleans()):
            graph.add("expert", task, data.draw(st.integers(1, 9000)), before)
        else:
            graph.barrier(before)
    result = result_of(graph)
    tasks = result.tasks
    ends: dict[int, int] = {}
    for node in library_nodes(traces_of(result)["npu.0.et"]):
        start = max((ends[dep] for dep in node.data_deps), default=0)
        assert abs(start - node.start_time_micros) <= 1
        ends[node.id] = node.start_time_micros + node.duration_micros
        assert abs(ends[node.id] - tasks["end_ns"][node.id] / 1000) <= 0.5
    assert sorted(ends) == tasks[tasks["resource"] != ""]["task"].tolist()


def test_traces_are_written_as_a_folder_that_astra_sim_finds(tmp_path: Path) -> None:
    """One file per NPU, under the prefix that the command gives."""
    report = export(result_of(two_rank_graph()), None, "chakra", tmp_path / "et")
    assert sorted(file.name for file in report.path.iterdir()) == ["npu.0.et", "npu.1.et"]
    assert f"--workload-configuration={tmp_path}/et/npu " in report.start_command


def test_exchanges_link_by_link_and_gathers_are_refused(tmp_path: Path) -> None:
    """Transfers that name no receiver, and context-coherent gathers, have no node in the schema."""
    graph = two_rank_graph()
    graph.labels["rank"][2] = 0
    with pytest.raises(InputError, match="collective: closed_form"):
        export(result_of(graph), None, "chakra", tmp_path / "et")
    graph = two_rank_graph()
    graph.kind[2] = "all_gather"
    with pytest.raises(InputError, match="context-coherent execution is not expressed"):
        export(result_of(graph), None, "chakra", tmp_path / "et")


NODE = ChakraNode(0, "a", COMP, (), 0, 1, {"is_cpu_op": 0, "num_ops": 1, "tensor_size": 1})
MEETING = ChakraNode(1, "b", COLLECTIVE, (0,), 0, 1, {"is_cpu_op": 0, "comm_type": 6, "comm_size": 8})


@pytest.mark.parametrize(("traces", "text"), [
    ({1: [NODE]}, r"traces for the NPUs \[1\]; they must be 0 \.\.\. 0"),
    ({0: [NODE, NODE]}, "node 0 of NPU 0 comes twice"),
    ({0: [MEETING, NODE]}, "waits for a later one"),
    ({0: [dataclasses.replace(NODE, attributes={"is_cpu_op": 0})]}, r"lacks \['num_ops', 'tensor_size'\]"),
    ({0: [dataclasses.replace(NODE, type=9)]}, r"lacks \['a known type'\]"),
    ({0: [NODE, MEETING], 1: [NODE]}, "do not meet at the same collectives"),
])
def test_rules_of_traces_are_enforced(traces: dict[int, list[ChakraNode]], text: str) -> None:
    """Each rule finds the traces that break it."""
    check_traces({0: [NODE, MEETING], 1: [NODE, MEETING]})
    with pytest.raises(CheckError, match=text):
        check_traces(traces)


@pytest.mark.parametrize("cut", [1, 2, 7, -1])
def test_torn_files_are_found(cut: int) -> None:
    """A file that ends inside a number or a message is an error, not a shorter trace."""
    data = traces_of(result_of(two_rank_graph()))["npu.0.et"]
    with pytest.raises(CheckError, match=r"chakra: the file ends inside|must be GlobalMetadata"):
        read_trace(data[:cut])


def test_large_numbers_survive(tmp_path: Path) -> None:
    """Bytes and times beyond 32 bits come back whole."""
    graph = TaskGraph((Resource("gpu0.compute", "gpu0", "compute"),))
    graph.add("expert", 0, 5 * 10**15, num_bytes=7 * 10**12, flops=3e18)
    node = library_nodes(traces_of(result_of(graph))["npu.0.et"])[0]
    values = {attr.name: attr.int64_val or attr.uint64_val for attr in node.attr if attr.name != "is_cpu_op"}
    assert values == {"num_ops": 3 * 10**18, "tensor_size": 7 * 10**12}
    assert node.duration_micros == 5 * 10**12
    assert np.iinfo(np.int64).max > values["num_ops"]


def lowered(seed: int, **changes: object) -> SimulationResult:
    """A run of three decode steps on four ranks in two nodes, with its dependencies."""
    problem, trace, model, cost, steps = world(seed, **changes)  # type: ignore[arg-type]
    program = ExpertParallelProgram(model, trace, steps, random_plan(np.random.default_rng(seed), problem), cost)
    tasks = run_simpy(program)
    pairs = [(task, dep) for task, before in enumerate(program.graph.deps) for dep in before]
    deps = pd.DataFrame(pairs, columns=["task", "dep"]).astype("int64")
    return SimulationResult("ep", {}, {"tasks": tasks, "deps": deps})


@pytest.mark.parametrize("seed", range(4))
def test_a_real_runs_traces_replay_to_the_same_times(seed: int) -> None:
    """Each NPU follows its own trace, all wait for each other at exchanges: every node starts when it did in the run.

    Without shared experts nothing waits for a busy resource, so dependencies alone give the times, to the microsecond.
    """
    traces = {npu: read_trace(data) for npu, data in enumerate(traces_of(lowered(seed)).values())}
    assert len(traces) == 4
    check_traces(traces)
    ends: list[dict[int, int]] = [{} for _ in traces]
    ready: dict[int, int] = {}
    for npu, nodes in traces.items():  # where each NPU would enter an exchange; the run's ends stand for the exchanges'
        for node in nodes:
            start = max((ends[npu][dep] for dep in node.deps), default=0)
            if node.type == COLLECTIVE:
                ready[node.node_id] = max(ready.get(node.node_id, 0), start)
            else:
                assert start == node.start_us
            ends[npu][node.node_id] = node.start_us + node.duration_us
    starts = {node.node_id: node.start_us for nodes in traces.values() for node in nodes if node.type == COLLECTIVE}
    assert ready == starts


def test_a_real_runs_flops_and_bytes_are_all_there() -> None:
    """Over all traces: the run's flops, the bytes read by compute, and the bytes of all exchanges."""
    result = lowered(1, shared_intermediate_size=64)
    tasks = result.tasks
    nodes = [(npu, node) for npu, data in enumerate(traces_of(result).values()) for node in read_trace(data)]
    compute = [node for _, node in nodes if node.type == COMP]
    assert sum(int(node.attributes["num_ops"]) for node in compute) == sum(round(x) for x in tasks["flops"])
    exchanges = tasks["kind"].isin(["dispatch", "combine"])
    assert sum(int(node.attributes["tensor_size"]) for node in compute) == int(tasks["num_bytes"][~exchanges].sum())
    moved = sum(int(node.attributes["comm_size"]) for npu, node in nodes if node.type == COLLECTIVE and npu == 0)
    assert abs(moved * 3 - int(tasks["num_bytes"][exchanges].sum())) <= 3 * exchanges.sum()
