"""One subject of each kind that can be exported, and what each target must refuse. Not a test module."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from moesim.export.residency import Residency
from moesim.lowering.graph import Resource, TaskGraph
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.placement.plan import PlacementPlan
from moesim.simulate.result import SimulationResult, task_table
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import RoutingTrace

# 5 layers of which 1, 2 and 4 are MoE layers: a row number and a layer number are never mixed up unseen.
MODEL = ModelSpec("org/tiny", 5, (1, 2, 4), 4, 2, 16, 8, AttentionSpec(2, 2, 8), 100, dense_intermediate_size=32)
# KTransformers counts MoE layers from the first to the last
TAIL_MODEL = dataclasses.replace(MODEL, moe_layers=(2, 3, 4))
SLOTS = [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2], [1, 2, 0, 2, 3, 1]]
PLAN = PlacementPlan(np.array(SLOTS), 2, 4)
SINGLE = PlacementPlan(np.array([[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]]), 2, 4)
MOVED = PlacementPlan(np.array([[0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]]), 2, 4)  # SINGLE with two experts exchanged
DOUBLED = PlacementPlan(np.array([[0, 0, 1, 2, 3, 1], *SLOTS[1:]]), 2, 4)  # expert 0 twice on rank 0
ONE_RANK = PlacementPlan(np.array(SLOTS), 1, 4)
UNEVEN = PlacementPlan(np.array(SLOTS), 2, 4, slot_share=np.array(
    [[0.75, 1, 1, 1, 0.25, 0], [0.5, 0.5, 1, 1, 0.5, 0.5], [1, 0.5, 1, 0.5, 1, 0]]))
KEPT = Residency(np.array([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]], bool), "by hand")
WHOLE = Residency(np.array([[1] * 4, [0] * 4, [1] * 4], bool), "by hand")


def tiny_trace(seed: int = 3) -> RoutingTrace:
    """A trace of 3 MoE layers with 4 experts, top-2."""
    return synthetic_trace(24, 3, 4, 2, 4, seed=seed)


def padded_trace() -> RoutingTrace:
    """The same with one token that uses one expert only."""
    trace = tiny_trace()
    ids = np.array(trace.expert_ids)
    ids[5, 1, 1] = -1
    return dataclasses.replace(trace, expert_ids=ids)


def result_of(graph: TaskGraph, *, deps: bool = True) -> SimulationResult:
    """A result in which every task starts when the tasks that it waits for have ended."""
    ready = []
    for task, before in enumerate(graph.deps):
        ready.append(max((ready[dep] + graph.duration_ns[dep] for dep in before), default=0))
        assert len(ready) == task + 1
    start, zero = np.array(ready), np.zeros(len(graph), np.int64)
    tables = {"tasks": task_table(graph, start, start, start + np.array(graph.duration_ns), zero, zero)}
    if deps:
        pairs = [(task, dep) for task, before in enumerate(graph.deps) for dep in before]
        tables["deps"] = pd.DataFrame(pairs, columns=["task", "dep"]).astype("int64")
    return SimulationResult("tiny", {}, tables)


def two_rank_graph(*, layers: int = 1) -> TaskGraph:
    """Attention on two ranks, dispatch, experts, combine, and the barrier at which all have their tokens back."""
    graph = TaskGraph((Resource("gpu0.compute", "gpu0", "compute"), Resource("gpu1.compute", "gpu1", "compute"),
                       Resource("network", "network", "all-to-all")))
    before: list[int] = []
    for layer in range(layers):
        attention = [graph.add("attention", rank, 1500 + rank, before, rank=rank, layer=layer, num_bytes=640,
                               flops=1000.0) for rank in (0, 1)]
        dispatch = graph.add("dispatch", 2, 2000, attention, layer=layer, num_bytes=4096, tokens=8)
        experts = [graph.add("experts", rank, 3400, [dispatch], rank=rank, layer=layer, num_bytes=1280, flops=5000.0)
                   for rank in (0, 1)]
        combine = graph.add("combine", 2, 2000, experts, layer=layer, num_bytes=8192, tokens=8)
        before = [graph.barrier([combine], layer=layer)]
    return graph


@dataclass(frozen=True)
class Case:
    """What one target is tried with: a subject, another that its file must be told from, and what it refuses.

    `refused` holds (subject, text of the reason, whether a nearest one is offered).
    """

    subject: Any
    other: Any
    suffix: str
    model: ModelSpec = MODEL
    refused: tuple[tuple[Any, str, bool], ...] = field(default=())


UNEVEN_REFUSED = (UNEVEN, "how an expert's tokens are shared", True)
ONE_RANK_REFUSED = (ONE_RANK, "the plan has 1 rank", False)
REPLICAS_REFUSED = (PLAN, "the plan has 6 slots for 4 experts", True)
PART_REFUSED = (KEPT, "2 of 4 of MoE layer 0 are on the GPU", True)

CASES = {
    "sglang": Case(PLAN, DOUBLED, ".json", refused=(UNEVEN_REFUSED,)),
    "tensorrt-llm": Case(PLAN, DOUBLED, ".yaml", refused=(UNEVEN_REFUSED, ONE_RANK_REFUSED)),
    "vllm": Case(PLAN, DOUBLED, ".json", refused=(UNEVEN_REFUSED, ONE_RANK_REFUSED)),
    "vllm-ascend": Case(PLAN, SINGLE, ".json", refused=(UNEVEN_REFUSED, (DOUBLED, "an expert twice on one rank", True))),
    "eplb": Case(PLAN, DOUBLED, ".npz", refused=(UNEVEN_REFUSED,)),
    "exflow": Case(SINGLE, MOVED, ".csv", refused=(REPLICAS_REFUSED,)),
    "deepspeed": Case(SINGLE, MOVED, ".json", refused=(REPLICAS_REFUSED,)),
    "eplb-weight": Case(tiny_trace(), tiny_trace(4), ".safetensors"),
    "vllm-routing": Case(tiny_trace(), tiny_trace(4), ".safetensors",
                         refused=((padded_trace(), "token 5 uses fewer than 2 experts", True),)),
    "ktransformers": Case(KEPT, WHOLE, ".pt", TAIL_MODEL),
    "ktransformers-rules": Case(WHOLE, Residency(~WHOLE.on_gpu), ".yaml", refused=(PART_REFUSED,)),
    "llama.cpp": Case(WHOLE, Residency(~WHOLE.on_gpu), ".sh", refused=(PART_REFUSED,)),
    "chakra": Case(result_of(two_rank_graph()), result_of(two_rank_graph(layers=2)), "",
                   refused=((result_of(two_rank_graph(), deps=False), "no table of dependencies", False),)),
}
