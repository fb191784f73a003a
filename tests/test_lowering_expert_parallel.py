"""Expert parallelism: who sends what to whom, what it costs by hand, and that no plan beats the bound."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Memory
from moesim.lowering.bounds import ExpertParallelBound
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.model.catalog import load_model
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.placement.place import place, problem_from_trace
from moesim.placement.plan import PlacementPlan
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import DECODE, PAD, PREFILL, RoutingTrace

RATE, HBM_RATE = 1e9, 100e9


def cluster(num_ranks: int = 4, ranks_per_node: int = 4, *, contention: str = "port", ranks_per_port: int = 1,
            latency_s: float = 2e-6, rate: float = RATE) -> HardwareSpec:
    """Equal GPUs with a fabric inside the node and, where there are several nodes, one between them."""
    devices = {f"gpu{r}": Device(f"gpu{r}", "gpu", f"hbm{r}", {"bf16": 1e12}, 1e-6, node=r // ranks_per_node)
               for r in range(num_ranks)}
    memories = {f"hbm{r}": Memory(f"hbm{r}", "hbm", 100e9, HBM_RATE) for r in range(num_ranks)}
    fabrics = [Fabric("nvlink", "nvlink", "node", rate, latency_s, ranks_per_port, contention)]
    if num_ranks > ranks_per_node:
        fabrics.append(Fabric("rdma", "rdma", "cluster", rate / 4, 2 * latency_s, ranks_per_port, contention))
    return HardwareSpec("cluster", devices, memories, fabrics=tuple(fabrics), ranks=tuple(devices),
                        ranks_per_node=ranks_per_node)


def tiny_model(num_experts: int = 8, top_k: int = 2, moe_layers: tuple[int, ...] = (0, 1), num_layers: int = 2,
               **changes: object) -> ModelSpec:
    """A small model; layers outside `moe_layers` are dense."""
    model = ModelSpec("tiny", num_layers, moe_layers, num_experts, top_k, 64, 96, AttentionSpec(4, 2, 16), 128,
                      dense_intermediate_size=512)
    return model.replace(**changes)


@cache
def skewed(num_layers: int = 2, num_experts: int = 8, top_k: int = 2, seed: int = 0,
           requests: int = 10) -> RoutingTrace:
    """Synthetic routing of a few requests."""
    return synthetic_trace(80, num_layers, num_experts, top_k, requests, zipf=1.2, seed=seed)


def contiguous(trace: RoutingTrace, num_ranks: int) -> PlacementPlan:
    """Experts in order."""
    return PlacementPlan(np.tile(np.arange(trace.num_experts), (trace.num_layers, 1)), num_ranks, trace.num_experts)


def shuffled_plan(trace: RoutingTrace, num_ranks: int, extra: int, seed: int) -> PlacementPlan:
    """Every expert somewhere, `extra` random replicas (rounded up to whole ranks), in random order."""
    rng = np.random.default_rng(seed)
    slots = -(-(trace.num_experts + extra) // num_ranks) * num_ranks
    rows = [rng.permutation(np.concatenate([np.arange(trace.num_experts),
                                            rng.integers(trace.num_experts, size=slots - trace.num_experts)]))
            for _ in range(trace.num_layers)]
    return PlacementPlan(np.stack(rows), num_ranks, trace.num_experts)


def lower(trace: RoutingTrace, plan: PlacementPlan, hardware: HardwareSpec, steps: list[Step],
          model: ModelSpec | None = None, **options: object) -> tuple[ExpertParallelProgram, pd.DataFrame]:
    """Lower and simulate."""
    model = model or tiny_model(trace.num_experts, trace.top_k, tuple(range(trace.num_layers)), trace.num_layers)
    program = ExpertParallelProgram(model, trace, steps, plan, CostModel(hardware), **options)  # type: ignore[arg-type]
    return program, run_simpy(program)


def elapsed_ns(program: ExpertParallelProgram, tasks: pd.DataFrame) -> int:
    """End of the last step."""
    return int(tasks["end_ns"][program.steps[-1].last_task])


def reached(trace: RoutingTrace, plan: PlacementPlan, step: Step, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Brute force: tokens from home rank to expert rank [rank, rank], and rows per rank, one token at a time.

    Requests are dealt to ranks in turn; the n-th use of an expert in a step goes to its replica n mod replicas.
    """
    order = list(dict.fromkeys(trace.request_id.tolist()))
    sent, rows, uses = np.zeros((plan.num_ranks,) * 2, int), np.zeros(plan.num_ranks, int), Counter()
    for row in step.rows.tolist():
        home, ranks = order.index(trace.request_id[row]) % plan.num_ranks, set()
        for expert in trace.expert_ids[row, layer].tolist():
            if expert == PAD:
                continue
            slots = [s for s, held in enumerate(plan.physical_to_logical[layer].tolist()) if held == expert]
            rank = slots[uses[expert] % len(slots)] // plan.slots_per_rank
            uses[expert] += 1
            rows[rank] += 1
            ranks.add(rank)
        for rank in ranks:
            sent[home, rank] += 1
    return sent, rows


# ---------------------------------------------------------------- conservation


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("prefill", [False, True])
def test_tokens_sent_computed_and_returned_are_those_of_a_count_by_hand(seed: int, prefill: bool) -> None:
    """Dispatched = combined = the ranks that each token reaches; the experts compute tokens times k rows."""
    trace = skewed(seed=seed)
    plan = shuffled_plan(trace, 4, 4, seed)
    steps = closed_loop_steps(trace, batch_size=6, max_steps=5, include_prefill=prefill, seed=seed)
    _, tasks = lower(trace, plan, cluster(), steps)
    by_kind = tasks.groupby(["kind", "step", "layer"])["tokens"].sum()
    for step in steps:
        for layer in range(trace.num_layers):
            sent, rows = reached(trace, plan, step, layer)
            assert by_kind["dispatch", step.index, layer] == by_kind["combine", step.index, layer] == sent.sum()
            here = tasks[(tasks["kind"] == "experts") & (tasks["step"] == step.index) & (tasks["layer"] == layer)]
            assert dict(zip(here["rank"], here["tokens"], strict=True)) == {r: n for r, n in enumerate(rows) if n}
            assert rows.sum() == len(step.rows) * trace.top_k


@pytest.mark.parametrize("dispatch_bytes", [None, 1.0])
def test_every_wire_carries_the_bytes_of_its_port(dispatch_bytes: float | None) -> None:
    """With full-duplex ports, each rank's out and in wires carry what it sends and receives, fp8 dispatch included."""
    trace = skewed()
    plan = contiguous(trace, 4)
    steps = closed_loop_steps(trace, batch_size=6, max_steps=3, include_prefill=False)
    _, tasks = lower(trace, plan, cluster(), steps, collective="per_link", dispatch_bytes=dispatch_bytes)
    expected: dict[tuple[str, str], int] = defaultdict(int)
    for step in steps:
        for layer in range(trace.num_layers):
            sent = reached(trace, plan, step, layer)[0] * ~np.eye(4, dtype=bool)
            for kind, size in (("dispatch", 64 * int(dispatch_bytes or 2)), ("combine", 128)):
                moved = (sent if kind == "dispatch" else sent.T) * size
                for rank in range(4):
                    expected[kind, f"gpu{rank}:nvlink.out"] += moved[rank].sum()
                    expected[kind, f"gpu{rank}:nvlink.in"] += moved[:, rank].sum()
    wires = tasks[tasks["kind"].isin(("dispatch", "combine"))].groupby(["kind", "resource"])["num_bytes"].sum()
    assert wires.to_dict() == {key: value for key, value in expected.items() if value}
    directions = wires.groupby(lambda key: key[1].rpartition(".")[2]).sum()
    assert directions["in"] == directions["out"]


@pytest.mark.parametrize("collective", ["closed_form", "per_link"])
def test_a_resource_never_runs_two_tasks_at_once(collective: str) -> None:
    """Intervals on one resource do not overlap, so it is busy no longer than the run lasts."""
    trace = skewed()
    steps = closed_loop_steps(trace, batch_size=6, max_steps=3)
    program, tasks = lower(trace, contiguous(trace, 4), cluster(), steps, collective=collective)
    for name, own in tasks[~tasks["resource"].isin(("", "network.latency"))].groupby("resource"):
        ordered = own.sort_values("start_ns")
        assert (ordered["start_ns"].to_numpy()[1:] >= ordered["end_ns"].to_numpy()[:-1]).all(), name
        assert own["duration_ns"].sum() <= elapsed_ns(program, tasks)


@pytest.mark.parametrize("contention", ["egress", "pair"])
@pytest.mark.parametrize(("num_ranks", "ranks_per_node", "ranks_per_port"), [(4, 4, 1), (4, 2, 1), (8, 4, 2)])
def test_links_one_by_one_take_as_long_as_the_closed_form(
        contention: str, num_ranks: int, ranks_per_node: int, ranks_per_port: int) -> None:
    """Where a message passes one wire, both ways to lower an all-to-all end together (a nanosecond per message)."""
    trace = skewed()
    hardware = cluster(num_ranks, ranks_per_node, contention=contention, ranks_per_port=ranks_per_port)
    steps = closed_loop_steps(trace, batch_size=8, max_steps=3, include_prefill=False)
    closed, links = (lower(trace, contiguous(trace, num_ranks), hardware, steps, collective=how)
                     for how in ("closed_form", "per_link"))
    messages = len(links[1][links[1]["kind"].isin(("dispatch", "combine"))])
    assert abs(elapsed_ns(*closed) - elapsed_ns(*links)) <= messages
    assert messages > 20


def test_store_and_forward_through_two_ports_takes_at_least_the_closed_form() -> None:
    """With full-duplex ports the link-by-link run is a lower bound's upper side, within twice the traffic."""
    trace = skewed()
    steps = closed_loop_steps(trace, batch_size=8, max_steps=3, include_prefill=False)
    closed, links = (lower(trace, contiguous(trace, 4), cluster(), steps, collective=how)
                     for how in ("closed_form", "per_link"))
    network = closed[1].loc[closed[1]["resource"] == "network", "duration_ns"].sum()
    assert elapsed_ns(*closed) - 50 <= elapsed_ns(*links) <= elapsed_ns(*closed) + network


# ---------------------------------------------------------------- by hand


def one_request(ids: list[list[int]], phase: int = DECODE, num_experts: int = 2) -> tuple[RoutingTrace, list[Step]]:
    """One request of len(ids) tokens in one layer."""
    count = len(ids)
    trace = RoutingTrace(
        expert_ids=np.array(ids)[:, None, :], request_id=np.zeros(count, int), position=np.arange(count),
        phase=np.full(count, phase), step=np.arange(count), num_experts=num_experts, layer_ids=np.arange(1))
    return trace, closed_loop_steps(trace, batch_size=1)


def kernel_ns(num_bytes: float, flops: float) -> int:
    """1 us to start, then 100 GB/s or 1 Tflop/s, whichever takes longer."""
    return round(1e9 * (1e-6 + max(num_bytes / HBM_RATE, flops / 1e12)))


def attention_ns(rows: int, context: int) -> int:
    """12288 weights (64 x 64 twice, 64 x 32 twice), 64 numbers cached per token, 4 heads of 16."""
    return kernel_ns(12288 * 2 + context * 64 * 2 + rows * 256, rows * 2 * 12288 + context * 256)


def experts_ns(rows: int, groups: int) -> int:
    """Three 64 x 96 matrices per expert."""
    return kernel_ns(groups * 36864 + rows * 640, rows * 36864)


@pytest.mark.parametrize("phase", [DECODE, PREFILL])
@pytest.mark.parametrize("collective", ["closed_form", "per_link"])
def test_a_step_of_one_request_is_the_sum_of_its_parts(phase: int, collective: str) -> None:
    """Attention, router, dispatch of 128 bytes per row, experts, combine, head; one row or a prompt of three."""
    trace, steps = one_request([[1]] * 3, phase)
    hardware = cluster(2, 2, contention="egress")
    program, tasks = lower(trace, contiguous(trace, 2), hardware, steps, collective=collective)
    expected = 0
    for step in steps:
        rows, context = len(step.rows), int(np.sum(trace.position[step.rows] + 1))
        router, head = kernel_ns(64 * 2 * 2 + rows * 256, rows * 256), kernel_ns(64 * 128 * 2 + 256, 2 * 64 * 128)
        expected += attention_ns(rows, context) + router + experts_ns(rows, 1) + head + 2 * (2000 + 128 * rows)
    assert elapsed_ns(program, tasks) == expected
    assert len(steps) == (3 if phase == DECODE else 1)


def test_a_token_that_stays_at_home_meets_no_network() -> None:
    """Expert 0 lives on rank 0, the only request too: nothing is sent, and rank 1 does nothing."""
    trace, steps = one_request([[0]])
    _, tasks = lower(trace, contiguous(trace, 2), cluster(2, 2), steps)
    assert set(tasks["kind"]) == {"attention", "router", "experts", "head", "barrier"}
    assert set(tasks["rank"]) == {0, -1}


def test_a_token_goes_once_to_a_rank_that_holds_both_its_experts() -> None:
    """Two experts on one remote rank: one row dispatched, two rows computed in two groups, one row combined."""
    trace, steps = one_request([[2, 3]], num_experts=4)
    _, tasks = lower(trace, contiguous(trace, 2), cluster(2, 2), steps)
    sums = tasks.groupby("kind")[["tokens", "num_bytes", "duration_ns"]].sum()
    assert sums["tokens"][["dispatch", "experts", "combine"]].tolist() == [1, 2, 1]
    assert sums["num_bytes"]["dispatch"] == 128
    assert sums["duration_ns"]["experts"] == experts_ns(2, 2)


def test_a_layer_whose_rows_are_all_padding_still_waits_for_its_router() -> None:
    """No expert, no traffic: attention, router and head, one after the other, and the bound is exactly that."""
    trace, steps = one_request([[PAD]])
    program, tasks = lower(trace, contiguous(trace, 2), cluster(2, 2), steps)
    assert elapsed_ns(program, tasks) == tasks["duration_ns"].sum()
    assert set(tasks["kind"]) == {"attention", "router", "head", "barrier"}
    bound = ExpertParallelBound(program.model, trace, program.cost, 1).step(steps[0])
    assert bound.total_ns == elapsed_ns(program, tasks)


def test_shared_experts_run_beside_the_dispatch_and_dense_layers_send_nothing() -> None:
    """DeepSeek-V2-Lite: one dense layer, then 26 with shared experts that start with the dispatch."""
    model = load_model("deepseek-v2-lite")
    trace = synthetic_trace(24, 26, 64, 6, 6, seed=0)
    steps = closed_loop_steps(trace, batch_size=4, max_steps=1, include_prefill=False)
    _, tasks = lower(trace, contiguous(trace, 4), cluster(), steps, model)
    dense, shared = tasks[tasks["kind"] == "dense"], tasks[tasks["kind"] == "shared_expert"]
    assert (len(model.moe_layers), model.moe_layers[0]) == (26, 1)
    assert dense.groupby("rank").size().eq(1).all()
    assert sorted(set(shared["layer"])) == list(range(26))
    for layer in range(26):
        here = tasks[tasks["layer"] == layer].set_index("kind")
        assert here.loc["shared_expert", "start_ns"].min() <= here.loc["dispatch", "start_ns"]
        assert here.loc["attention", "start_ns"].min() >= dense["end_ns"].min()


def test_every_request_of_a_step_has_its_own_head_row() -> None:
    """Copies of one request (a trace that repeats) are different requests, though they share trace rows."""
    trace = skewed(requests=2)
    steps = closed_loop_steps(trace, batch_size=6, max_steps=4, include_prefill=False, repeat=True)
    _, tasks = lower(trace, contiguous(trace, 4), cluster(), steps)
    heads = tasks[tasks["kind"] == "head"].groupby("step")["tokens"].sum()
    assert heads.tolist() == [len(set(step.requests.tolist())) for step in steps] == [6] * 4


def test_a_better_plan_gives_a_shorter_step() -> None:
    """All load on the experts of rank 0: spread over the ranks by load, the same steps take less time."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((60, 1, 4)), axis=2)[..., :2]  # experts 0 to 3 of 16
    trace = RoutingTrace(
        expert_ids=ids, request_id=np.repeat(np.arange(20), 3), position=np.tile(np.arange(3), 20),
        phase=np.full(60, DECODE), step=np.arange(60), num_experts=16, layer_ids=np.arange(1))
    steps = closed_loop_steps(trace, batch_size=20)
    problem = problem_from_trace(trace, num_ranks=4, ranks_per_node=4)
    plans = [place(problem, solver, seed=0, time_limit_s=5).plan for solver in ("contiguous", "lpt")]
    slow, fast = (elapsed_ns(*lower(trace, plan, cluster(rate=1e12), steps)) for plan in plans if plan)
    assert fast < slow


# ---------------------------------------------------------------- the bound


@st.composite
def cases(draw: st.DrawFn) -> tuple[ExpertParallelProgram, int]:
    """Random plans with replicas on random clusters; dense layers, shared experts, padded rows, both phases."""
    num_ranks, per_node = draw(st.sampled_from(((1, 1), (2, 2), (4, 4), (4, 2))))
    contention = draw(st.sampled_from(("port", "egress", "pair")))
    hardware = cluster(num_ranks, per_node, contention=contention, rate=draw(st.sampled_from((1e8, 1e10))),
                       ranks_per_port=draw(st.sampled_from((1, per_node))))
    top_k = draw(st.integers(1, 4))
    trace = skewed(2, 8, top_k, draw(st.integers(0, 5)), draw(st.integers(2, 10)))
    if top_k > 1 and draw(st.booleans()):
        ids = trace.expert_ids.copy()
        ids[::2, :, -1] = PAD
        trace = dataclasses.replace(trace, expert_ids=ids)
    plan = shuffled_plan(trace, num_ranks, draw(st.integers(0, 8)), draw(st.integers(0, 99)))
    layers = draw(st.sampled_from(((0, 1), (1, 3), (0, 2))))
    model = tiny_model(8, top_k, layers, 4 if layers == (1, 3) else 3 if layers == (0, 2) else 2,
                       shared_intermediate_size=draw(st.sampled_from((0, 96))))
    steps = closed_loop_steps(trace, batch_size=draw(st.integers(1, 8)), max_steps=draw(st.integers(1, 4)),
                              include_prefill=draw(st.booleans()), repeat=True, seed=draw(st.integers(0, 9)))
    program = ExpertParallelProgram(
        model, trace, steps, plan, CostModel(hardware), dispatch_bytes=draw(st.sampled_from((None, 1.0, 0.5))),
        collective=draw(st.sampled_from(("closed_form", "per_link"))))
    return program, plan.slots_per_rank


@settings(max_examples=50, deadline=None)
@given(cases())
def test_no_plan_is_faster_than_the_bound(case: tuple[ExpertParallelProgram, int]) -> None:
    """Step by step; links one by one round each message, so a nanosecond for each is allowed there."""
    program, slots = case
    tasks = run_simpy(program)
    bound = ExpertParallelBound(program.model, program.trace, program.cost, slots, program.dispatch_bytes)
    before = 0
    for record in program.steps:
        end = int(tasks["end_ns"][record.last_task])
        messages = int(tasks["kind"].isin(("dispatch", "combine")).sum()) if program.collective == "per_link" else 0
        parts = bound.step(record.step)
        assert parts.total_ns == parts.fixed_ns + parts.experts_ns + parts.traffic_ns
        assert 0 < parts.total_ns <= end - before + messages
        before = end


def test_the_bound_is_reached_by_a_perfect_plan() -> None:
    """Each rank's request uses the expert at home: equal rows, nothing sent, and the bound is the step time exactly."""
    trace = RoutingTrace(
        expert_ids=np.arange(4)[:, None, None] % 4, request_id=np.arange(4), position=np.zeros(4, int),
        phase=np.full(4, DECODE), step=np.arange(4), num_experts=4, layer_ids=np.arange(1))
    steps = closed_loop_steps(trace, batch_size=4)
    program, tasks = lower(trace, contiguous(trace, 4), cluster(), steps)
    bound = ExpertParallelBound(program.model, trace, program.cost, 1).step(steps[0])
    assert bound.total_ns == elapsed_ns(program, tasks)
    assert bound.traffic_ns == 0


def forced(hardware: HardwareSpec, experts: list[list[int]], **options: object) -> tuple[int, int, int]:
    """One token per request, token i at home on rank i mod ranks, expert e on rank e: (traffic bound, bound, time)."""
    count = len(experts)
    trace = RoutingTrace(
        expert_ids=np.array(experts)[:, None, :], request_id=np.arange(count), position=np.zeros(count, int),
        phase=np.full(count, DECODE), step=np.arange(count), num_experts=hardware.num_ranks, layer_ids=np.arange(1))
    steps = closed_loop_steps(trace, batch_size=count)
    program, tasks = lower(trace, contiguous(trace, hardware.num_ranks), hardware, steps, **options)
    bound = ExpertParallelBound(program.model, trace, program.cost, 1, program.dispatch_bytes).step(steps[0])
    return bound.traffic_ns, bound.total_ns, elapsed_ns(program, tasks)


@pytest.mark.parametrize(("dispatch_bytes", "traffic"), [(None, 128 + 128), (1.0, 64 + 128), (0.5, 32 + 128)])
def test_forced_traffic_is_bounded_by_hand(dispatch_bytes: float | None, traffic: int) -> None:
    """Two experts per token and one slot per rank: one row per token travels, back in bf16."""
    hardware = cluster(2, 2, latency_s=0.0)
    found, total, elapsed = forced(hardware, [[0, 1], [1, 0]], dispatch_bytes=dispatch_bytes)
    assert (found, total) == (traffic, elapsed)


def test_wires_of_every_pair_share_the_forced_traffic() -> None:
    """With a wire for each ordered pair of ranks, rows that go to both neighbours in turn take half the time."""
    experts = [[rank, (rank + 1 + turn) % 3] for turn in range(2) for rank in range(3)]
    _, total, elapsed = forced(cluster(3, 3, contention="pair", latency_s=0.0, rate=1e7), experts)
    assert total == elapsed


def test_two_fabrics_carry_forced_traffic_at_once() -> None:
    """Four rows inside the node for one to the other node, whose fabric has a quarter of the rate."""
    experts = [[rank, (rank ^ 1) if turn < 4 else (rank + 2) % 4] for turn in range(5) for rank in range(4)]
    _, total, elapsed = forced(cluster(4, 2, latency_s=0.0, rate=1e7), experts)
    assert total == elapsed


def test_a_padded_row_forces_no_traffic() -> None:
    """A token with one expert of a possible two can stay at home."""
    traffic, total, elapsed = forced(cluster(2, 2, rate=1e6), [[0, PAD], [1, PAD]])
    assert traffic == 0
    assert total <= elapsed


def test_a_rank_slow_at_attention_and_another_slow_at_dense_layers_do_not_add_up() -> None:
    """Before a dense layer ranks need not meet: one request with a long context here, forty short ones there."""
    length = 20_000
    request = np.concatenate([np.zeros(length, int), np.arange(1, 81)])  # request r is at home on rank r mod 2
    count = len(request)
    trace = RoutingTrace(
        expert_ids=np.arange(count)[:, None, None] % 2, request_id=request,
        position=np.concatenate([np.arange(length), np.zeros(80, int)]), phase=np.full(count, DECODE),
        step=np.arange(count), num_experts=2, layer_ids=np.array([1]))
    rows = np.concatenate([[length - 1], np.arange(length, count, 2)])
    step = Step(0, "decode", rows, request[rows].astype(np.int32))
    model = tiny_model(2, 1, (1,), 2)
    program, tasks = lower(trace, contiguous(trace, 2), cluster(2, 2), [step], model)
    parts = ExpertParallelBound(model, trace, program.cost, 1).step(step)
    before_experts = tasks.loc[tasks["kind"] == "router", "end_ns"].max()
    assert parts.fixed_ns == before_experts + tasks.loc[tasks["kind"] == "head", "duration_ns"].max()
    assert parts.total_ns <= elapsed_ns(program, tasks)


# ---------------------------------------------------------------- errors


def test_parts_that_do_not_fit_are_named() -> None:
    """Ranks, layers, experts, top-k and the kind of collective are checked before anything is lowered."""
    trace = skewed()
    steps = closed_loop_steps(trace, batch_size=4, max_steps=1)
    with pytest.raises(InputError, match="the plan is for 2 ranks, hardware 'cluster' has 4"):
        lower(trace, contiguous(trace, 2), cluster(), steps)
    with pytest.raises(InputError, match=r"the plan has 3 layers x 8 experts, model 'tiny' has 2 x 8"):
        lower(trace, contiguous(skewed(3), 4), cluster(), steps)
    with pytest.raises(InputError, match="collective must be one of closed_form, per_link, got 'ring'"):
        lower(trace, contiguous(trace, 4), cluster(), steps, collective="ring")
    with pytest.raises(InputError, match=r"has 2 MoE layers x 8 experts, top-2, but model 'tiny' has .*top-3"):
        lower(trace, contiguous(trace, 4), cluster(), steps, tiny_model(8, 3))


def test_traffic_without_a_fabric_is_refused() -> None:
    """Ranks that must talk need something to talk over."""
    trace = skewed()
    alone = dataclasses.replace(cluster(), fabrics=())
    steps = closed_loop_steps(trace, batch_size=4, max_steps=1)
    with pytest.raises(InputError, match="need a node fabric, and it has none"):
        lower(trace, contiguous(trace, 4), alone, steps)
