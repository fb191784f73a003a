"""Expert-parallel steps without Python per task: the same tasks, times, counts and bytes as the readable program."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.shapes import attention_shape, expert_shape, router_shape
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Memory
from moesim.lowering.balancers import BalancerOptions
from moesim.lowering.batch import home_ranks
from moesim.lowering.context_coherent import ContextCoherentProgram
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.expert_parallel_arrays import lower_steps, supports, windows
from moesim.lowering.expert_parallel_loads import by_layer, step_loads
from moesim.lowering.expert_parallel_prices import price_steps
from moesim.lowering.expert_parallel_times import PARTS, program_times, step_ends_ns, step_times
from moesim.lowering.task_arrays import TaskArrays, arrays_of
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.placement.metrics import imbalance, slot_of_token
from moesim.placement.plan import PlacementPlan
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import DECODE, PAD, RoutingTrace

RATE = 1e9
LAYERS = {"moe": ((0, 1), 2), "dense first": ((1, 2), 3), "dense between": ((0, 2), 3), "dense last": ((0, 1), 4),
          "one": ((1,), 3)}


def cluster(num_ranks: int, ranks_per_node: int, *, contention: str = "port", ranks_per_port: int = 1,
            rate: float = RATE, latency_s: float = 2e-6, mixed: bool = False) -> HardwareSpec:
    """GPUs with a fabric inside the node and one between nodes; `mixed`: every third one is of another kind."""
    devices, memories = {}, {}
    for rank in range(num_ranks):
        other = mixed and rank % 3 == 1
        devices[f"gpu{rank}"] = Device(f"gpu{rank}", "npu" if other else "gpu", f"hbm{rank}", {"bf16": 1e12 / (1 + other)},
                                       1e-6 * (1 + 2 * other), 4 + 4 * other, node=rank // ranks_per_node)
        memories[f"hbm{rank}"] = Memory(f"hbm{rank}", "hbm", 100e9, 1e11 / (1 + 2 * other))
    fabrics = [Fabric("nvlink", "nvlink", "node", rate, latency_s, ranks_per_port, contention)]
    if num_ranks > ranks_per_node:
        fabrics.append(Fabric("rdma", "rdma", "cluster", rate / 3, 2 * latency_s, ranks_per_port, contention))
    return HardwareSpec("cluster", devices, memories, fabrics=tuple(fabrics), ranks=tuple(devices),
                        ranks_per_node=ranks_per_node)


def tiny_model(num_experts: int, top_k: int, layers: str = "moe", **changes: object) -> ModelSpec:
    """A small model, with dense layers where `layers` says."""
    moe_layers, num_layers = LAYERS[layers]
    model = ModelSpec("tiny", num_layers, moe_layers, num_experts, top_k, 64, 96, AttentionSpec(4, 2, 16), 128,
                      dense_intermediate_size=512)
    return model.replace(**changes)


def random_plan(rng: np.random.Generator, trace: RoutingTrace, num_ranks: int, extra: int, shares: bool) -> PlacementPlan:
    """Every expert somewhere, `extra` replicas at least, in random order; random shares where wanted, some of them 0."""
    experts = trace.num_experts
    slots = -(-(experts + extra) // num_ranks) * num_ranks
    rows = np.stack([rng.permutation(np.concatenate([np.arange(experts), rng.integers(experts, size=slots - experts)]))
                     for _ in range(trace.num_layers)])
    if not shares:
        return PlacementPlan(rows, num_ranks, experts)
    weight = rng.random(rows.shape)
    _, first = np.unique(rows + experts * np.arange(len(rows))[:, None], return_index=True)
    weight[rng.random(rows.shape) < 0.2] = 0.0
    weight.ravel()[first] += 0.1
    total = np.zeros((len(rows), experts))
    np.add.at(total, (np.arange(len(rows))[:, None], rows), weight)
    return PlacementPlan(rows, num_ranks, experts, slot_share=weight / np.take_along_axis(total, rows, axis=1))


def measured(model: ModelSpec) -> CalibrationProfile:
    """Tables for attention over (tokens, context), routers, experts over three axes, and the executor's overhead."""
    grid = tuple((float(a), float(b)) for a in (1, 3, 9) for b in (5, 50, 500))
    groups = ((1.0, 1.0, 1.0), (4.0, 2.0, 3.0), (4.0, 4.0, 1.0), (40.0, 4.0, 20.0))
    line = ((1.0,), (4.0,), (16.0,))
    tables = [("attention", attention_shape(model), ("tokens", "context"), grid),
              ("router", router_shape(model), ("tokens",), line),
              ("grouped_ffn", expert_shape(model), ("tokens", "groups", "largest_group"), groups),
              ("task_overhead", "experts", (), ((),)), ("task_overhead", "", (), ((),))]
    return CalibrationProfile("some", tuple(
        MeasuredTable(op, "gpu", shape, "bf16", axes, sizes, tuple(1.3e-6 * (2 + place) for place in range(len(sizes))))
        for op, shape, axes, sizes in tables))


@dataclasses.dataclass(frozen=True)
class World:
    """What a program is made of; programs run once, so every use makes its own."""

    model: ModelSpec
    trace: RoutingTrace
    steps: list[Step]
    plan: PlacementPlan
    hardware: HardwareSpec
    profile: CalibrationProfile | None = None
    efficiency: float = 1.0
    dispatch_bytes: float | None = None

    def cost(self) -> CostModel:
        """A cost model with counts of its own."""
        return CostModel(self.hardware, self.profile, route_efficiency=self.efficiency)

    def program(self) -> ExpertParallelProgram:
        """A program that has not run."""
        return ExpertParallelProgram(self.model, self.trace, self.steps, self.plan, self.cost(),
                                     dispatch_bytes=self.dispatch_bytes)


def padded(trace: RoutingTrace) -> RoutingTrace:
    """Every second token uses one expert less, every tenth none at all."""
    ids = trace.expert_ids.copy()
    ids[::2, :, -1] = PAD
    ids[::10] = PAD
    return dataclasses.replace(trace, expert_ids=ids)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Nodes, ports, contention, kinds of rank; replicas, shares, padding; dense layers, shared experts; both phases."""
    ranks, per_node = draw(st.sampled_from(((1, 1), (2, 2), (4, 4), (4, 2), (8, 2), (16, 4), (72, 8))))
    hardware = cluster(ranks, per_node, contention=draw(st.sampled_from(("port", "egress", "pair"))),
                       ranks_per_port=draw(st.sampled_from((1, 2))), rate=draw(st.sampled_from((1e8, 1e10, 1e13))),
                       latency_s=draw(st.sampled_from((0.0, 2e-6))), mixed=draw(st.booleans()))
    top_k, seed, layers = draw(st.integers(1, 4)), draw(st.integers(0, 99)), draw(st.sampled_from(sorted(LAYERS)))
    model = tiny_model(8, top_k, layers, shared_intermediate_size=draw(st.sampled_from((0, 96, 4096))))
    trace = synthetic_trace(80, model.num_moe_layers, 8, top_k, draw(st.integers(2, 12)), zipf=1.2, seed=seed % 5)
    if draw(st.booleans()):
        trace = padded(trace)
    steps = closed_loop_steps(trace, batch_size=draw(st.integers(1, 12)), max_steps=draw(st.integers(1, 5)),
                              include_prefill=draw(st.booleans()), repeat=True, seed=seed)
    plan = random_plan(np.random.default_rng(seed), trace, ranks, draw(st.integers(0, 12)), draw(st.booleans()))
    return World(model, trace, steps, plan, hardware, draw(st.sampled_from((None, measured(model)))),
                 draw(st.sampled_from((1.0, 1.0, 0.5, 0.7))), draw(st.sampled_from((None, 1.0, 0.5, 0.3))))


def assert_arrays_equal(found: TaskArrays, expected: TaskArrays) -> None:
    """Every column, with its dtype."""
    assert (found.resources, found.kinds, found.sources, found.first) == (
        expected.resources, expected.kinds, expected.sources, expected.first)
    columns = {field.name for field in dataclasses.fields(TaskArrays)} - {
        "resources", "kinds", "sources", "first", "labels"}
    pairs = [(name, getattr(found, name), getattr(expected, name)) for name in columns]
    pairs += [(name, found.labels[name], expected.labels[name]) for name in expected.labels]
    for name, one, other in pairs:
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, name)


def ends_of(program: ExpertParallelProgram, tasks: pd.DataFrame) -> list[int]:
    """When each step ended."""
    return tasks["end_ns"].to_numpy()[[record.last_task for record in program.steps]].tolist()


def readable(world: World) -> tuple[ExpertParallelProgram, pd.DataFrame]:
    """The Python program, run on SimPy."""
    program = world.program()
    return program, run_simpy(program)


# ---------------------------------------------------------------- the same as the readable program


@settings(max_examples=120, deadline=None)
@given(worlds())
def test_tasks_counts_and_times_are_those_of_the_readable_program(world: World) -> None:
    """Columns, first and last tasks, tokens and bytes between ranks, sources, and the end of every step on SimPy."""
    program, tasks = readable(world)
    lowered = world.program()
    assert supports(lowered)
    assert_arrays_equal(lower_steps(lowered), arrays_of(program.graph))
    assert lowered.steps == program.steps
    assert lowered.remote_tokens == program.remote_tokens
    assert lowered.remote_bytes == program.remote_bytes
    assert lowered.cost.source_counts() == program.cost.source_counts()
    assert len(lowered.graph) == 0
    timed = world.program()
    assert program_times(timed, 2).end_ns.tolist() == ends_of(program, tasks)
    assert timed.cost.source_counts() == program.cost.source_counts()


@settings(max_examples=25, deadline=None)
@given(worlds(), st.integers(1, 3))
def test_windows_are_the_whole_in_pieces(world: World, size: int) -> None:
    """Ids go on from window to window, and a window waits for the last task of the one before."""
    whole, pieces = world.program(), world.program()
    everything, parts = lower_steps(whole), list(windows(pieces, size))
    assert [len(part) for part in parts] == [sum(record.last_task - record.first_task + 1 for record in rows)
                                             for rows in (whole.steps[at:at + size]
                                                          for at in range(0, len(whole.steps), size))]
    assert [part.first for part in parts] == np.cumsum([0, *map(len, parts[:-1])]).tolist()
    np.testing.assert_array_equal(np.concatenate([part.deps for part in parts]), everything.deps)
    np.testing.assert_array_equal(np.concatenate([part.duration_ns for part in parts]), everything.duration_ns)
    assert pieces.steps == whole.steps
    assert pieces.remote_tokens == whole.remote_tokens
    assert pieces.remote_bytes == pytest.approx(whole.remote_bytes, rel=1e-12)
    assert pieces.cost.source_counts() == whole.cost.source_counts()


def test_a_large_batch_over_many_ranks_is_lowered_alike() -> None:
    """Prompts of hundreds of tokens on 72 ranks: counts in several planes of several words."""
    trace = synthetic_trace(3000, 2, 96, 6, 4, zipf=1.0, prompt_fraction=0.8, seed=3)
    steps = closed_loop_steps(trace, batch_size=4, max_steps=3, max_prefill_tokens=2000)
    plan = random_plan(np.random.default_rng(0), trace, 72, 40, False)
    world = World(tiny_model(96, 6, shared_intermediate_size=96), trace, steps, plan, cluster(72, 8))
    program, tasks = readable(world)
    assert max(len(step.rows) for step in steps) > 1000
    assert_arrays_equal(lower_steps(world.program()), arrays_of(program.graph))
    assert step_ends_ns(world.program()).tolist() == ends_of(program, tasks)


# ---------------------------------------------------------------- loads


def by_hand(world: World, step: Step, layer: int) -> tuple[np.ndarray, Counter[int]]:
    """Tokens from home rank to expert rank, and rows per slot, one token at a time."""
    order, plan = list(dict.fromkeys(world.trace.request_id.tolist())), world.plan
    chosen = slot_of_token(plan, world.trace.expert_ids[step.rows])[:, layer]
    sent, rows = np.zeros((plan.num_ranks,) * 2, int), Counter()
    for row, slots in zip(step.rows.tolist(), chosen.tolist(), strict=True):
        home = order.index(world.trace.request_id[row]) % plan.num_ranks
        used = [slot for slot in slots if slot != PAD]
        rows.update(used)
        for rank in {slot // plan.slots_per_rank for slot in used}:
            sent[home, rank] += 1
    return sent, rows


@settings(max_examples=40, deadline=None)
@given(worlds())
def test_loads_are_those_of_a_count_by_hand(world: World) -> None:
    """Rows, groups and the fullest slot of every rank; the busiest port of each scope in each direction, and pair."""
    loads = step_loads(world.program(), keep_sent=True, pairs=True)
    node = np.arange(loads.num_ranks) // world.hardware.ranks_per_node
    for place, step in enumerate(world.steps):
        for layer in range(loads.num_layers):
            sent, rows = by_hand(world, step, layer)
            np.testing.assert_array_equal(loads.sent[place, layer], sent)
            slots = np.array([rows[slot] for slot in range(world.plan.num_slots)]).reshape(loads.num_ranks, -1)
            for name, expected in (("tokens", slots.sum(axis=1)), ("groups", (slots > 0).sum(axis=1)),
                                   ("largest", slots.max(axis=1))):
                np.testing.assert_array_equal(getattr(loads, f"expert_{name}")[place, layer], expected)
            assert loads.stayed[place, layer] == np.trace(sent)
            for scope, mask in enumerate((node[:, None] == node, node[:, None] != node)):
                part, port = sent * mask * ~np.eye(len(sent), dtype=bool), loads.port[scope]
                between = np.array([[part[port == a][:, port == b].sum() for b in set(port.tolist())]
                                    for a in set(port.tolist())])
                assert loads.moved[place, layer, scope] == part.sum()
                assert loads.wires[place, layer, scope].tolist() == [
                    between.sum(axis=1).max(), between.sum(axis=0).max(), between.max()]


def test_loads_hold_no_more_than_they_were_asked_for() -> None:
    """Pairs of ports and who sends what are counted only where the costs need them, or on request."""
    world = simple_world()
    lean = step_loads(world.program())
    assert lean.sent is None
    assert (lean.wires[..., 2] == -1).all()
    full = step_loads(dataclasses.replace(world, efficiency=0.9).program(), pairs=True)
    assert full.sent is not None
    np.testing.assert_array_equal(full.wires[..., :2], lean.wires[..., :2])
    assert not lean.tokens.flags.writeable


def test_imbalance_is_that_of_the_plan_on_the_rows_of_a_step() -> None:
    """One layer, no replicas: the metric of placement on the step's own counts."""
    trace = synthetic_trace(80, 1, 8, 2, 10, zipf=1.2, seed=0)
    steps = closed_loop_steps(trace, batch_size=8, max_steps=4)
    plan = random_plan(np.random.default_rng(0), trace, 4, 0, False)
    world = World(tiny_model(8, 2, "one"), trace, steps, plan, cluster(4, 4))
    loads = step_loads(world.program())
    for place, step in enumerate(steps):
        counts = np.bincount(trace.expert_ids[step.rows].ravel(), minlength=8)[None, :]
        assert loads.imbalance[place] == pytest.approx(imbalance(plan, counts)[0])


def test_selections_are_copied_layer_by_layer() -> None:
    """Any width of a row, down to no token at all."""
    for tokens, layers, width in ((5, 3, 1), (4, 2, 3), (7, 5, 8), (0, 2, 2)):
        ids = np.arange(tokens * layers * width, dtype=np.int16).reshape(tokens, layers, width)
        found = by_layer(ids)
        np.testing.assert_array_equal(found, ids.transpose(1, 0, 2))
        assert found.flags.c_contiguous


def test_the_largest_ids_of_a_trace_are_counted() -> None:
    """32,768 experts fill the ids of 16 bits; padding beside them stays padding."""
    ids = np.array([[[0, 32_767]], [[32_767, PAD]], [[5, PAD]]])
    trace = RoutingTrace(ids, np.arange(3), np.zeros(3, int), np.full(3, DECODE), np.arange(3), 32_768, np.arange(1))
    model = tiny_model(32_768, 2, "one")
    plan = PlacementPlan(np.arange(32_768)[None, :], 2, 32_768)
    loads = step_loads(World(model, trace, closed_loop_steps(trace, batch_size=3), plan, cluster(2, 2)).program())
    assert loads.expert_tokens.tolist() == [[[2, 2]]]
    assert loads.expert_largest.tolist() == [[[1, 2]]]


def test_homes_are_dealt_in_order_of_first_appearance() -> None:
    """Request ids in any order, interleaved rows."""
    trace = synthetic_trace(30, 1, 8, 2, 6, seed=0)
    names = np.array([7, 2, 90, 0, 41, 5], np.int32)[trace.request_id]
    order = np.argsort(np.arange(len(names)) % 5, kind="stable")
    shuffled = dataclasses.replace(
        trace, request_id=names[order], phase=np.full(30, DECODE), position=_positions(names[order]),
        expert_ids=trace.expert_ids[order])
    seen = list(dict.fromkeys(names[order].tolist()))
    for ranks in (1, 4, 7):
        homes = home_ranks(shuffled, ranks)
        assert homes.dtype == np.int32
        assert homes.tolist() == [seen.index(name) % ranks for name in names[order].tolist()]


def _positions(requests: np.ndarray) -> np.ndarray:
    """Positions that rise by one in every request."""
    return pd.Series(requests).groupby(requests).cumcount().to_numpy().astype(np.int32)


# ---------------------------------------------------------------- times


def simple_world(layers: str = "moe", shared: int = 96, ranks: int = 4, rate: float = RATE) -> World:
    """One trace, contiguous experts."""
    model = tiny_model(8, 2, layers, shared_intermediate_size=shared)
    trace = synthetic_trace(80, model.num_moe_layers, 8, 2, 10, zipf=1.2, seed=0)
    steps = closed_loop_steps(trace, batch_size=6, max_steps=4)
    plan = PlacementPlan(np.tile(np.arange(8), (trace.num_layers, 1)), ranks, 8)
    return World(model, trace, steps, plan, cluster(ranks, 2, rate=rate))


@settings(max_examples=30, deadline=None)
@given(worlds())
def test_parts_of_a_step_are_those_of_its_tasks(world: World) -> None:
    """Dispatch and combine are their tasks' durations; all parts are non-negative and sum to the time of the step."""
    program, tasks = readable(world)
    times = step_times(step_loads(world.program()), world.model, world.cost(), dispatch_bytes=world.dispatch_bytes)
    assert times.end_ns.tolist() == ends_of(program, tasks)
    assert (times.parts_ns >= 0).all()
    for place, step in enumerate(world.steps):
        own = tasks[tasks["step"] == step.index]
        for kind in ("dispatch", "combine"):
            part = times.parts_ns[place, PARTS.index(kind)]
            assert part == own.loc[own["kind"] == kind, "duration_ns"].sum()
        experts = own[own["kind"] == "experts"].groupby("layer")["duration_ns"].max().sum()
        assert times.experts_ns[place] == experts
        assert times.experts_ns[place] <= times.parts_ns[place, PARTS.index("experts")]
    sums = times.remote_bytes.sum(axis=0)
    assert sums[:2].sum() == pytest.approx(program.remote_bytes["rank"], rel=1e-12)
    assert sums[2:].sum() == pytest.approx(program.remote_bytes["node"], rel=1e-12)


@pytest.mark.parametrize("shared", [0, 16, 4096, 65_536])
@pytest.mark.parametrize("layers", sorted(LAYERS))
@pytest.mark.parametrize("rate", [1e7, 1e14])
def test_shared_experts_end_before_between_and_after_everything_else(shared: int, layers: str, rate: float) -> None:
    """From none to longer than both exchanges and the experts, with slow and fast networks."""
    world = simple_world(layers, shared, rate=rate)
    program, tasks = readable(world)
    assert step_ends_ns(world.program()).tolist() == ends_of(program, tasks)
    times = step_times(step_loads(world.program()), world.model, world.cost())
    if shared == 65_536 and rate == 1e14:
        assert times.parts_ns[:, PARTS.index("experts")].sum() > times.experts_ns.sum()  # experts wait for them


def test_shared_experts_that_outlast_the_combine_are_the_tail() -> None:
    """All rows are at home on rank 1 and use the expert on rank 0: rank 1 keeps the layer waiting."""
    ids = np.zeros((4, 1, 1), int)
    trace = RoutingTrace(ids, np.array([0, 1, 1, 1]), np.array([0, 0, 1, 2]), np.full(4, DECODE), np.arange(4), 2,
                         np.arange(1))
    model = tiny_model(2, 1, "one", shared_intermediate_size=65_536).replace(num_layers=1, moe_layers=(0,))
    step = Step(0, "decode", np.arange(1, 4), trace.request_id[1:])
    plan = PlacementPlan(np.array([[0, 1]]), 2, 2)
    world = World(model, trace, [step], plan, cluster(2, 2, rate=1e13))
    program, tasks = readable(world)
    times = step_times(step_loads(world.program()), model, world.cost())
    assert times.end_ns.tolist() == ends_of(program, tasks)
    ends = tasks.set_index("kind")["end_ns"]
    assert times.parts_ns[0, PARTS.index("shared_tail")] == ends["shared_expert"] - ends["combine"] > 0


def test_ties_between_shared_experts_and_experts_keep_their_order() -> None:
    """Nothing leaves its rank, so both are ready when the last router ends: shared experts run first, and it fits."""
    ids = (np.arange(8) % 4)[:, None, None]  # token of request r uses the expert on rank r mod 4
    trace = RoutingTrace(ids, np.arange(8), np.zeros(8, int), np.full(8, DECODE), np.arange(8), 4, np.arange(1))
    model = tiny_model(4, 1, "one", shared_intermediate_size=96).replace(num_layers=1, moe_layers=(0,))
    world = World(model, trace, closed_loop_steps(trace, batch_size=8), PlacementPlan(np.array([[0, 1, 2, 3]]), 4, 4),
                  cluster(4, 4))
    program, tasks = readable(world)
    ready = tasks[tasks["kind"].isin(("shared_expert", "experts"))]
    assert ready["ready_ns"].nunique() == 1
    assert set(tasks["kind"]) == {"attention", "router", "shared_expert", "experts", "head", "barrier"}
    assert step_ends_ns(world.program()).tolist() == ends_of(program, tasks)
    assert_arrays_equal(lower_steps(world.program()), arrays_of(program.graph))


def test_steps_without_rows_take_no_time() -> None:
    """An empty step between two others is a chain of barriers."""
    world = simple_world("dense last")
    empty = Step(1, "decode", np.zeros(0, np.int64), np.zeros(0, np.int32))
    world = dataclasses.replace(world, steps=[world.steps[0], empty, dataclasses.replace(world.steps[1], index=2)])
    program, tasks = readable(world)
    assert_arrays_equal(lower_steps(world.program()), arrays_of(program.graph))
    ends = step_ends_ns(world.program()).tolist()
    assert ends == ends_of(program, tasks)
    assert ends[0] == ends[1] < ends[2]


def test_one_count_of_loads_serves_many_machines_and_precisions() -> None:
    """Other rates, latencies, contention, kernels, efficiency and bytes per value: each as its own program times it."""
    world = simple_world()
    loads = step_loads(world.program(), keep_sent=True, pairs=True)
    machines = [(cluster(4, 2, rate=rate, latency_s=latency, contention=contention), efficiency, size)
                for rate, latency in ((1e8, 0.0), (1e11, 1e-5)) for contention in ("port", "egress", "pair")
                for efficiency, size in ((1.0, 2.0), (0.7, 1.0))]
    machines.append((cluster(4, 2, mixed=True), 1.0, 4.0))
    ends = set()
    for hardware, efficiency, size in machines:
        model = world.model.replace(weight_bytes=size)
        other = dataclasses.replace(world, hardware=hardware, efficiency=efficiency, dispatch_bytes=size, model=model)
        times = step_times(loads, model, other.cost(), dispatch_bytes=size)
        assert times.end_ns.tolist() == ends_of(*readable(other))
        ends.add(tuple(times.end_ns.tolist()))
    assert len(ends) > len(machines) / 2


# ---------------------------------------------------------------- what is not supported


def test_other_programs_are_not_claimed() -> None:
    """Links one by one, balancers, and context-coherent execution lower other tasks."""
    world = simple_world()
    parts = (world.model, world.trace, world.steps, world.plan)
    assert supports(world.program())
    assert not supports(ExpertParallelProgram(*parts, world.cost(), collective="per_link"))
    assert not supports(ExpertParallelProgram(*parts, world.cost(), balancer=BalancerOptions("lp")))
    assert not supports(ContextCoherentProgram(*parts, world.cost()))
    assert not supports(None)


def test_work_that_could_outlive_its_step_is_refused() -> None:
    """A step made by hand, one request over two ranks, in a model that ends with dense layers: tasks, but no times."""
    world = simple_world("dense last")
    first = [int(np.flatnonzero(world.trace.request_id == request)[0]) for request in (0, 1)]
    world = dataclasses.replace(world, steps=[Step(0, "decode", np.array(first), np.zeros(2, np.int32))])
    program, _ = readable(world)
    assert_arrays_equal(lower_steps(world.program()), arrays_of(program.graph))
    with pytest.raises(InputError, match="some rank has rows but no head in a step; run the tasks instead"):
        step_ends_ns(world.program())


def test_loads_of_another_machine_or_model_are_refused() -> None:
    """Ranks, nodes, ports, pairs, layers, and costs that need who sends what."""
    world = simple_world()
    loads = step_loads(world.program())

    def price(hardware: HardwareSpec, model: ModelSpec = world.model, **options: float) -> None:
        price_steps(loads, model, CostModel(hardware, **options))

    with pytest.raises(InputError, match=r"counted for 4 ranks, 2 per node; hardware 'cluster' has 4, 4 per node"):
        price(cluster(4, 4))
    with pytest.raises(InputError, match=r"counted with other node ports .*\(2 ranks per port\)"):
        price(cluster(4, 2, ranks_per_port=2))
    with pytest.raises(InputError, match="pairs of ports were not counted, and fabric 'nvlink' needs them"):
        price(cluster(4, 2, contention="pair"))
    with pytest.raises(InputError, match="counted for 2 MoE layers, model 'tiny' has 1"):
        price(cluster(4, 2), tiny_model(8, 2, "one"))
    with pytest.raises(InputError, match=r"need step_loads\(\.\.\., keep_sent=True\)"):
        price(cluster(4, 2), route_efficiency=0.9)
    with pytest.raises(InputError, match="need a node fabric, and it has none"):
        price(dataclasses.replace(cluster(4, 2), fabrics=cluster(4, 2).fabrics[1:]))
    with pytest.raises(InputError, match=r"wires must be \(4, 2, 2, 3\), got \(4, 2, 2, 2\)"):
        dataclasses.replace(loads, wires=loads.wires[..., :2])


def test_rows_beyond_the_trace_are_refused() -> None:
    """A step of another trace is an error, not a read from somewhere."""
    world = simple_world()
    program = world.program()
    rows = np.array([0, world.trace.num_tokens])
    program.steps[0].step = Step(0, "decode", rows, np.array([0, 1], np.int32))
    with pytest.raises(InputError, match=r"the steps have rows 0 \.\.\. 80, the trace has 80 tokens"):
        step_loads(program)
