"""Context-coherent execution: tokens move on from layer to layer, and everything that this costs is charged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.hardware.collective import all_gather_seconds, all_reduce_seconds, all_to_all_seconds
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Memory
from moesim.lowering.coherent_bound import ContextCoherentBound
from moesim.lowering.context_coherent import ContextCoherentProgram, first_choice, moving_traffic
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.placement.place import place, problem_from_trace
from moesim.placement.plan import PlacementPlan
from moesim.scenario.load import load_scenario
from moesim.scenario.reporter import QuietReporter
from moesim.scenario.run import run_scenario
from moesim.simulate.run import simulate
from moesim.traces.blocks import block_trace
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import DECODE, PAD, PREFILL, RoutingTrace

RATE, LATENCY_NS = 1e9, 2000


def cluster(num_ranks: int = 4, ranks_per_node: int = 4, memory: float = 100e9, rate: float = RATE) -> HardwareSpec:
    """Equal GPUs, a fabric inside the node and a slower one between nodes."""
    devices = {f"gpu{r}": Device(f"gpu{r}", "gpu", f"hbm{r}", {"bf16": 1e12}, 1e-6, node=r // ranks_per_node)
               for r in range(num_ranks)}
    memories = {f"hbm{r}": Memory(f"hbm{r}", "hbm", memory, 100e9) for r in range(num_ranks)}
    fabrics = [Fabric("nvlink", "nvlink", "node", rate, 2e-6, 1, "port")]
    if num_ranks > ranks_per_node:
        fabrics.append(Fabric("rdma", "rdma", "cluster", rate / 4, 4e-6, 1, "port"))
    return HardwareSpec("cluster", devices, memories, fabrics=tuple(fabrics), ranks=tuple(devices),
                        ranks_per_node=ranks_per_node)


def tiny_model(num_experts: int, top_k: int, num_moe: int, *, dense: int = 0, **changes: object) -> ModelSpec:
    """A model with `dense` dense layers, then `num_moe` MoE layers."""
    moe = tuple(range(dense, dense + num_moe))
    model = ModelSpec("tiny", dense + num_moe, moe, num_experts, top_k, 64, 96, AttentionSpec(4, 2, 16), 128,
                      dense_intermediate_size=512)
    return model.replace(**changes)


def plan_of(homes: list[list[int]], num_ranks: int) -> PlacementPlan:
    """The plan in which expert e of layer l lives on rank homes[l][e]."""
    return PlacementPlan(np.argsort(np.array(homes), axis=1, kind="stable"), num_ranks, len(homes[0]))


def run(trace: RoutingTrace, plan: PlacementPlan, hardware: HardwareSpec, steps: list[Step],
        model: ModelSpec | None = None, kind: type[ExpertParallelProgram] = ContextCoherentProgram,
        **options: object) -> tuple[ExpertParallelProgram, pd.DataFrame, int]:
    """Lower and simulate; returns the program, its tasks and the end of the last step."""
    model = model or tiny_model(trace.num_experts, trace.top_k, trace.num_layers)
    program = kind(model, trace, steps, plan, CostModel(hardware), **options)  # type: ignore[arg-type]
    result = simulate(program)
    return program, result.tasks, int(result.tasks["end_ns"][program.steps[-1].last_task])


def decode_trace(ids: list[list[list[int]]], num_experts: int, weights: list[list[list[float]]] | None = None,
                 phase: int = DECODE) -> tuple[RoutingTrace, list[Step]]:
    """One request per token [token][layer][k], all in one step; requests are at home on ranks in turn."""
    array = np.array(ids)
    count = len(array)
    trace = RoutingTrace(
        expert_ids=array, request_id=np.arange(count), position=np.zeros(count, int), phase=np.full(count, phase),
        step=np.zeros(count, int), num_experts=num_experts, layer_ids=np.arange(array.shape[1]),
        gate_weights=None if weights is None else np.array(weights))
    return trace, closed_loop_steps(trace, batch_size=count)


# ---------------------------------------------------------------- by hand


def kernel_ns(num_bytes: float, flops: float) -> int:
    """1 us to start, then 100 GB/s or 1 Tflop/s, whichever takes longer."""
    return round(1e9 * (1e-6 + max(num_bytes / 100e9, flops / 1e12)))


def attention_ns(rows: int) -> int:
    """12288 weights, 64 cached numbers per token, first position."""
    return kernel_ns(12288 * 2 + rows * 64 * 2 + rows * 256, rows * 2 * 12288 + rows * 256)


def router_ns(rows: int, experts: int = 2) -> int:
    """64 numbers per expert."""
    return kernel_ns(64 * experts * 2 + rows * 256, rows * 64 * experts * 2)


def experts_ns(rows: int, groups: int = 1) -> int:
    """Three 64 x 96 matrices per expert."""
    return kernel_ns(groups * 36864 + rows * 640, rows * 36864)


def head_ns(rows: int) -> int:
    """64 x 128."""
    return kernel_ns(64 * 128 * 2 + rows * 256, rows * 2 * 64 * 128)


@pytest.mark.parametrize("gather", ["kv", "activations", "ids"])
def test_two_ranks_by_hand(gather: str) -> None:
    """Two tokens meet on rank 1 for two layers: one hop in all, attention of both rows there, one AllGather.

    Token 0 (home rank 0) and token 1 (home rank 1) use expert 1 on rank 1 twice. Rank 1 then holds the keys and values
    of one row in layer 0 and of two in layer 1, and rank 0 of one row in layer 0.
    """
    trace, steps = decode_trace([[[1], [1]], [[1], [1]]], 2)
    _, tasks, end = run(trace, plan_of([[0, 1], [0, 1]], 2), cluster(2, 2), steps, gather=gather)
    held = {"kv": 3 * 128 + 8, "activations": 256, "ids": 8}[gather]
    dispatch = LATENCY_NS + 128  # one row of 64 values in bf16 at 1 GB/s; the second layer moves nobody
    layers = attention_ns(1) + router_ns(1) + dispatch + experts_ns(2) + attention_ns(2) + router_ns(2) + experts_ns(2)
    assert end == layers + head_ns(2) + LATENCY_NS + held
    assert tasks["kind"].value_counts()[["dispatch", "all_gather"]].tolist() == [1, 1]
    assert "combine" not in set(tasks["kind"])


def test_home_execution_of_the_same_tokens_pays_the_way_back() -> None:
    """Home execution of the example has two dispatches and two combines, and attention of one row per rank."""
    trace, steps = decode_trace([[[1], [1]], [[1], [1]]], 2)
    _, tasks, end = run(trace, plan_of([[0, 1], [0, 1]], 2), cluster(2, 2), steps, kind=ExpertParallelProgram)
    assert end == 2 * (attention_ns(1) + router_ns(1) + 2 * (LATENCY_NS + 128) + experts_ns(2)) + head_ns(1)
    assert tasks["kind"].value_counts()[["dispatch", "combine"]].tolist() == [2, 2]


def test_top_two_by_hand_sends_partial_sums_to_the_next_home() -> None:
    """First choice on rank 0, second on rank 1: the token stays, a copy goes out in fp8, one partial sum comes back."""
    trace, steps = decode_trace([[[0, 1]]], 2)
    _, tasks, end = run(trace, plan_of([[0, 1]], 2), cluster(2, 2), steps, dispatch_bytes=1.0, gather="ids")
    times = attention_ns(1) + router_ns(1) + (LATENCY_NS + 64) + experts_ns(1) + (LATENCY_NS + 128) + head_ns(1)
    assert end == times + LATENCY_NS + 4
    sums = tasks.groupby("kind")["num_bytes"].sum()
    assert (sums["dispatch"], sums["combine"]) == (64, 128)


def test_the_first_choice_is_the_expert_of_highest_weight() -> None:
    """With weights the heavier expert's rank is the next home, without them the first in the row; pads never are."""
    trace, _ = decode_trace([[[0, 1]], [[1, PAD]]], 2, [[[0.2, 0.8]], [[0.0, 0.0]]])
    assert first_choice(trace).tolist() == [[1], [0]]
    assert first_choice(decode_trace([[[0, 1]]], 2)[0]).tolist() == [[0]]
    plan = plan_of([[0, 1]], 2)
    traffic = moving_traffic(plan, trace.expert_ids[:, 0].astype(np.int32), first_choice(trace)[:, 0], np.array([0, 1]))
    assert traffic.next_home.tolist() == [1, 1]
    assert traffic.moves.tolist() == [[0, 1], [0, 1]]
    assert traffic.back.tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize("top_k", [1, 2])
def test_prefill_is_repeated_on_every_rank(top_k: int) -> None:
    """Each rank runs attention, router, shared experts and dense layers for all rows; experts compute each row once."""
    rows = 6
    trace = synthetic_trace(rows, 1, 4, top_k, 2, seed=0)
    trace = RoutingTrace(trace.expert_ids, trace.request_id, trace.position, np.full(rows, PREFILL), trace.step, 4,
                         trace.layer_ids)
    steps = closed_loop_steps(trace, batch_size=2)
    hardware, model = cluster(2, 2), tiny_model(4, top_k, 1, dense=1, shared_intermediate_size=96)
    _, tasks, _ = run(trace, plan_of([[0, 0, 1, 1]], 2), hardware, steps, model)
    assert len(steps) == 1
    for kind, times in (("attention", 2), ("router", 1), ("shared_expert", 1), ("dense", 1)):
        own = tasks[tasks["kind"] == kind]
        assert own.groupby("rank")["tokens"].agg(list).to_dict() == {0: [rows] * times, 1: [rows] * times}
    assert tasks.loc[tasks["kind"] == "experts", "tokens"].sum() == rows * top_k
    assert "dispatch" not in set(tasks["kind"])
    per_rank = [int((trace.expert_ids // 2 == rank).any(axis=2).sum()) for rank in range(2)]
    seconds = (all_gather_seconds(hardware, max(per_rank) * 128.0) if top_k == 1
               else all_reduce_seconds(hardware, rows * 128.0))
    assert tasks.loc[tasks["kind"] == "combine", "duration_ns"].tolist() == [round(seconds * 1e9)]
    ids = tasks.loc[tasks["kind"] == "all_gather", "duration_ns"].tolist()
    own_rows = np.bincount(trace.request_id % 2).max()
    assert ids == [round(1e9 * all_gather_seconds(hardware, 4.0 * count)) for count in (own_rows, 1)]


# ---------------------------------------------------------------- conservation


@st.composite
def cases(draw: st.DrawFn) -> tuple[RoutingTrace, PlacementPlan, int]:
    """Random routing, plans with replicas, padded rows."""
    top_k, seed, num_ranks = draw(st.integers(1, 3)), draw(st.integers(0, 99)), draw(st.sampled_from((1, 2, 4, 12)))
    trace = synthetic_trace(40, 3, 8, top_k, 8, zipf=1.0, seed=seed)
    rng = np.random.default_rng(seed)
    ids = trace.expert_ids.copy()
    if draw(st.booleans()):
        ids[rng.random(len(ids)) < 0.3, :, top_k - 1] = PAD
    trace = RoutingTrace(ids, trace.request_id, trace.position, trace.phase, trace.step, 8, trace.layer_ids)
    slots = [rng.permutation(np.concatenate([np.arange(8), rng.integers(8, size=4)])) for _ in range(3)]
    return trace, PlacementPlan(np.stack(slots), num_ranks, 8), num_ranks


@settings(max_examples=40, deadline=None)
@given(cases())
def test_tokens_that_leave_arrive(case: tuple[RoutingTrace, PlacementPlan, int]) -> None:
    """Token by token by hand: where each is, what is moved, copied and returned, and who runs whose attention."""
    trace, plan, num_ranks = case
    steps = closed_loop_steps(trace, batch_size=6, max_steps=4, repeat=True, include_prefill=False)
    program, tasks, _ = run(trace, plan, cluster(num_ranks, num_ranks), steps)
    order = list(dict.fromkeys(trace.request_id.tolist()))
    by_kind = tasks.groupby(["kind", "step", "layer"])["tokens"].sum()
    remote = 0
    for step in steps:
        where = {token: order.index(trace.request_id[row]) % num_ranks for token, row in enumerate(step.rows.tolist())}
        for layer in range(3):
            attention = tasks[(tasks["kind"] == "attention") & (tasks["step"] == step.index)
                              & (tasks["layer"] == layer)]
            counts = np.bincount(list(where.values()), minlength=num_ranks)
            assert dict(zip(attention["rank"], attention["tokens"], strict=True)) == {
                r: n for r, n in enumerate(counts) if n}
            returned, uses, rows = 0, [0] * 8, 0
            for token, row in enumerate(step.rows.tolist()):
                ranks = []
                for expert in trace.expert_ids[row, layer].tolist():
                    if expert == PAD:
                        continue
                    held = [s for s, e in enumerate(plan.physical_to_logical[layer].tolist()) if e == expert]
                    ranks.append(held[uses[expert] % len(held)] // plan.slots_per_rank)
                    uses[expert], rows = uses[expert] + 1, rows + 1
                following = ranks[0] if ranks else where[token]
                remote += len(set(ranks) - {where[token]})
                returned += len(set(ranks) - {following})
                where[token] = following
            assert by_kind.get(("combine", step.index, layer), 0) == returned
            assert by_kind.get(("experts", step.index, layer), 0) == rows
        heads = tasks[(tasks["kind"] == "head") & (tasks["step"] == step.index)]
        assert dict(zip(heads["rank"], heads["tokens"], strict=True)) == {
            r: n for r, n in enumerate(np.bincount(list(where.values()), minlength=num_ranks)) if n}
    assert program.remote_tokens["rank"] == remote
    wires = tasks[tasks["kind"].isin(("dispatch", "combine", "all_gather"))]
    assert program.remote_bytes["rank"] == pytest.approx(wires["num_bytes"].sum(), abs=len(wires))


def test_the_same_input_gives_the_same_tasks() -> None:
    """Two runs agree in every cell."""
    trace = synthetic_trace(60, 3, 8, 2, 6, seed=3)
    steps = closed_loop_steps(trace, batch_size=4, max_steps=6)
    plan = plan_of([[0, 0, 1, 1, 2, 2, 3, 3]] * 3, 4)
    first, second = (run(trace, plan, cluster(4, 2), steps)[1] for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


# ---------------------------------------------------------------- what affinity is worth


def test_affinity_pays_in_coherent_execution() -> None:
    """The affinity plan beats random plans when tokens move on, and itself with the ranks of each layer renamed.

    Renaming the ranks layer by layer keeps every group of experts and loses the affinity between layers.
    """
    trace = block_trace(400, 6, 16, 1, strength=8.0, seed=1, request_tokens=10)
    problem = problem_from_trace(trace, num_ranks=4, ranks_per_node=4)
    good = place(problem, "affinity", seed=0, time_limit_s=5).plan
    assert good is not None
    steps = closed_loop_steps(trace, batch_size=40, max_steps=6, include_prefill=False)
    hardware = cluster(rate=1e8)
    rng = np.random.default_rng(0)
    renamed = PlacementPlan(np.stack([row.reshape(4, 4)[rng.permutation(4)].ravel() for row in good.physical_to_logical]),
                            4, 16)
    runs = {(name, kind): run(trace, plan, hardware, steps, kind=kind)
            for name, plan in (("good", good), ("renamed", renamed))
            for kind in (ContextCoherentProgram, ExpertParallelProgram)}
    moved = {key: value[0].remote_tokens["rank"] for key, value in runs.items()}
    assert moved["good", ContextCoherentProgram] < 0.7 * moved["renamed", ContextCoherentProgram]
    assert moved["good", ExpertParallelProgram] > 0.9 * moved["renamed", ExpertParallelProgram]
    network = {key: value[1].loc[value[1]["kind"] == "dispatch", "duration_ns"].sum() for key, value in runs.items()}
    assert network["good", ContextCoherentProgram] < 0.8 * network["renamed", ContextCoherentProgram]
    for seed in range(3):
        rand = place(problem, "random", seed=seed, time_limit_s=5).plan
        assert rand is not None
        assert run(trace, rand, hardware, steps)[2] > runs["good", ContextCoherentProgram][2]


def test_inter_layer_affinity_changes_nothing_at_home() -> None:
    """Every home asks for every expert equally often: renaming ranks layer by layer leaves home execution as it was."""
    rng = np.random.default_rng(0)
    paths = np.argsort(rng.random((4, 3, 4)), axis=2)[:, :, :1]  # four paths through three layers
    ids = np.repeat(paths, 4, axis=0)  # each path once per home rank: token t is at home on rank t mod 4
    trace, steps = decode_trace(ids.tolist(), 4)
    ends = []
    for seed in range(4):
        homes = [np.random.default_rng(9 * seed + layer).permutation(4).tolist() for layer in range(3)]
        ends.append([run(trace, plan_of(homes, 4), cluster(), steps, kind=kind)[2]
                     for kind in (ExpertParallelProgram, ContextCoherentProgram)])
    assert len({home for home, _ in ends}) == 1
    assert len({coherent for _, coherent in ends}) > 1


# ---------------------------------------------------------------- the bound


@st.composite
def bounded(draw: st.DrawFn) -> tuple[ContextCoherentProgram, int]:
    """Random plans on random clusters; dense layers, shared experts, pads, prefill, every gather."""
    trace, plan, num_ranks = draw(cases())
    phase = trace.phase.copy()
    if draw(st.booleans()):
        phase[:] = PREFILL
    trace = RoutingTrace(trace.expert_ids, trace.request_id, trace.position, phase, trace.step, 8, trace.layer_ids)
    model = tiny_model(8, trace.top_k, 3, dense=draw(st.sampled_from((0, 1))),
                       shared_intermediate_size=draw(st.sampled_from((0, 96))))
    if draw(st.booleans()):  # a dense layer at the end
        model = model.replace(num_layers=model.num_layers + 1)
    hardware = cluster(num_ranks, draw(st.sampled_from((1, num_ranks))), rate=draw(st.sampled_from((1e8, 1e10))))
    steps = closed_loop_steps(trace, batch_size=draw(st.integers(1, 8)), max_steps=3, repeat=True)
    options = {"dispatch_bytes": draw(st.sampled_from((None, 1.0, 4.0))),
               "gather": draw(st.sampled_from(("kv", "activations", "ids")))}
    program, _, _ = run(trace, plan, hardware, steps, model, **options)
    assert isinstance(program, ContextCoherentProgram)
    return program, plan.slots_per_rank


@settings(max_examples=60, deadline=None)
@given(bounded())
def test_no_plan_is_faster_than_the_bound(case: tuple[ContextCoherentProgram, int]) -> None:
    """Step by step, over both phases and all options."""
    program, slots = case
    fresh = ContextCoherentProgram(program.model, program.trace, [record.step for record in program.steps], program.plan,
                                   program.cost, dispatch_bytes=program.dispatch_bytes, gather=program.gather)
    bound = ContextCoherentBound(program.model, program.trace, program.cost, slots, program.dispatch_bytes, program.gather)
    for row in simulate(fresh).tables["steps"].itertuples():
        parts = bound.step(program.steps[row.step].step)
        assert parts.total_ns == parts.fixed_ns + parts.experts_ns + parts.traffic_ns
        assert 0 < parts.total_ns <= row.duration_ns


@pytest.mark.parametrize("gather", ["kv", "activations", "ids"])
def test_the_bound_is_reached_by_a_perfect_plan(gather: str) -> None:
    """Every token stays where it is, one on each rank: bound and time agree to the nanosecond."""
    trace, steps = decode_trace([[[rank], [rank]] for rank in range(4)], 4)
    plan, hardware = plan_of([[0, 1, 2, 3]] * 2, 4), cluster()
    program, _, end = run(trace, plan, hardware, steps, gather=gather)
    assert ContextCoherentBound(program.model, trace, program.cost, 1, None, gather).step(steps[0]).total_ns == end


def test_long_contexts_apart_from_many_tokens_are_not_added() -> None:
    """One token of a long context on one rank, forty short ones on the other: the bound counts the shortest contexts."""
    count = 41
    experts = np.array([0] + [1] * 40)
    trace = RoutingTrace(
        expert_ids=np.tile(experts[:, None, None], (1, 3, 1)), request_id=np.arange(count),
        position=np.array([20_000] + [500] * 40), phase=np.full(count, DECODE), step=np.zeros(count, int), num_experts=2,
        layer_ids=np.arange(3))
    steps = closed_loop_steps(trace, batch_size=count)
    program, _, end = run(trace, plan_of([[0, 1]] * 3, 2), cluster(2, 2, rate=1e12), steps, gather="ids")
    bound = ContextCoherentBound(program.model, trace, program.cost, 1, None, "ids").step(steps[0])
    assert bound.total_ns <= end


# ---------------------------------------------------------------- memory and errors


def test_the_context_of_all_requests_must_fit_on_every_rank() -> None:
    """One byte too little and the error says how much is needed; home execution, where each rank keeps its own, runs."""
    trace = synthetic_trace(400, 2, 4, 1, 4, seed=0)
    steps = closed_loop_steps(trace, batch_size=4, include_prefill=False)
    model, plan = tiny_model(4, 1, 2), plan_of([[0, 0, 1, 1]] * 2, 2)
    context = max(int(np.sum(trace.position[step.rows] + 1)) for step in steps)
    needed = model.non_expert_bytes + 2 * 2 * model.expert_bytes + context * 128 * 2
    program, _, _ = run(trace, plan, cluster(2, 2, memory=float(needed)), steps, model)
    assert isinstance(program, ContextCoherentProgram)
    assert program.kv_bytes_per_rank == context * 128 * 2
    small = cluster(2, 2, memory=float(needed - 1))
    with pytest.raises(InputError, match=rf"context of all requests on every rank: {context} tokens need .* smaller batch"):
        run(trace, plan, small, steps, model)
    run(trace, plan, small, steps, model, kind=ExpertParallelProgram)


def test_options_that_do_not_exist_are_named() -> None:
    """An unknown gather with a suggestion; link by link is not known here."""
    trace, steps = decode_trace([[[0]]], 2)
    with pytest.raises(InputError, match=r"unknown gather 'kvs'\. Did you mean 'kv'\?"):
        run(trace, plan_of([[0, 1]], 2), cluster(2, 2), steps, gather="kvs")
    with pytest.raises(InputError, match="closed form only, got collective 'per_link'"):
        run(trace, plan_of([[0, 1]], 2), cluster(2, 2), steps, collective="per_link")


def test_the_all_to_all_is_the_closed_form_of_its_bytes() -> None:
    """Two nodes, top-2: every dispatch takes what the collective's closed form says of moves and copies."""
    trace = synthetic_trace(40, 2, 8, 2, 8, seed=2)
    steps = closed_loop_steps(trace, batch_size=8, max_steps=1, include_prefill=False)
    plan, hardware = plan_of([[0, 0, 1, 1, 2, 2, 3, 3]] * 2, 4), cluster(4, 2)
    _, tasks, _ = run(trace, plan, hardware, steps, dispatch_bytes=1.0)
    rows = steps[0].rows
    where = np.array([trace.requests().tolist().index(trace.request_id[row]) % 4 for row in rows])
    for layer in range(2):
        traffic = np.zeros((4, 4))
        ranks = trace.expert_ids[rows, layer] // 2
        for place_, (first, second) in enumerate(ranks.tolist()):
            traffic[where[place_], first] += 128
            traffic[where[place_], second] += 64 if second != first else 0
        where = ranks[:, 0]
        task = tasks[(tasks["kind"] == "dispatch") & (tasks["layer"] == layer)].iloc[0]
        assert task["duration_ns"] == round(1e9 * all_to_all_seconds(hardware, traffic).seconds)


# ---------------------------------------------------------------- scenario


def test_a_study_compares_home_and_coherent(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plans under both executions, end to end; the coherent study says what it charges."""
    monkeypatch.setattr("moesim.scenario.run.report_folder", lambda folder: folder)
    text = (tiny_folder / "tiny.yaml").read_text()
    head, _ = text.split("  - kind: offload")
    study = head[head.index("  - kind: expert"):]
    coherent = study.replace("four-gpus", "moving").replace("    placement:", "    system: {execution: coherent}\n    placement:")
    (tiny_folder / "both.yaml").write_text(head + coherent)
    outcome = run_scenario(load_scenario(tiny_folder / "both.yaml"), tiny_folder / "out", QuietReporter(), None)
    home, moving = (study.table for study in outcome.studies)
    assert (home["placement"] == moving["placement"]).all()
    assert home["step_time_bound_s"].notna().all()
    for table in (home, moving):
        assert (table["step_time_s"].astype(float) >= table["step_time_bound_s"].astype(float)).all()
    assert not np.allclose(home["step_time_s"].astype(float), moving["step_time_s"].astype(float))
    assert any("Context-coherent" in note for note in outcome.studies[1].notes)


@pytest.mark.parametrize(("system", "message"), [
    ("{execution: coherent, collective: per_link}", "knows collective: closed_form only, not per_link"),
    ("{gather: ids}", "'gather' belongs to execution: coherent"),
    ("{execution: moving}", "must be 'home' or 'coherent', got 'moving'"),
])
def test_scenario_mistakes_are_named(tiny_folder: Path, system: str, message: str) -> None:
    """Keys that do not go together are refused when the file is read."""
    text = (tiny_folder / "tiny.yaml").read_text()
    (tiny_folder / "bad.yaml").write_text(text.replace("    placement:", f"    system: {system}\n    placement:", 1))
    with pytest.raises(InputError, match=message):
        load_scenario(tiny_folder / "bad.yaml")
