"""Offloading: what is in a slot when it is read, what crosses the link, closed forms, and the bound."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.cache import ExpertCache
from moesim.cache.policy import PolicyContext, access_stream, make_policy
from moesim.cache.replay import replay
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import Device, HardwareSpec, Link, Memory
from moesim.lowering.machine import OffloadMachine, offload_machine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_bound import OffloadBound, offload_bound
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point
from moesim.simulate.result import DONE
from moesim.simulate.run import simulate
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import DECODE, RoutingTrace

POLICIES = ("lru", "lfu", "lfu-resident", "belady", "belady-bypass", "static")
PREFETCHERS = ("none", "popularity", "transition", "stated_recall", "oracle")
COPIES = ("load", "prefetch", "admit")
HBM_RATE = 10e9


def tiny_model(num_layers: int = 3, num_experts: int = 6, top_k: int = 2, **changes: object) -> ModelSpec:
    """A model whose experts take 36864 bytes."""
    model = ModelSpec(
        name="tiny", num_layers=num_layers, moe_layers=tuple(range(num_layers)), num_experts=num_experts,
        top_k=top_k, hidden_size=64, expert_intermediate_size=96, attention=AttentionSpec(4, 2, 16),
        vocab_size=128)
    return model.replace(**changes)


def machine_of(link_rate: float = 1e9, *, memory: str = "dram", hbm_bytes: float = 1e9, cpu_rate: float = 2e9,
               latency_s: float = 1e-6) -> OffloadMachine:
    """A GPU whose experts lie in DRAM, or on flash behind it."""
    spec = HardwareSpec(
        "box",
        devices={"gpu": Device("gpu", "gpu", "hbm", {"bf16": 1e12}, 1e-6),
                 "cpu": Device("cpu", "cpu", "dram", {"bf16": 1e11}, 1e-6)},
        memories={"hbm": Memory("hbm", "hbm", hbm_bytes, HBM_RATE), "dram": Memory("dram", "dram", 1e9, cpu_rate),
                  "flash": Memory("flash", "flash", 1e9, 1e9)},
        links={"pcie": Link("pcie", "dram", "hbm", "pcie", link_rate, latency_s),
               "nvme": Link("nvme", "flash", "dram", "nvme", link_rate / 2, latency_s)})
    return OffloadMachine(spec, "gpu", memory, "cpu")


@dataclass(frozen=True)
class Ran:
    """One simulated point, with what its slots held before it ran (slot -> key)."""

    offload: Offload
    program: OffloadProgram
    preload: dict[int, int]
    cost: CostModel
    table: pd.DataFrame

    @cached_property
    def tasks(self) -> pd.DataFrame:
        """The tasks that were done."""
        return self.table[self.table["state"] == DONE]

    @property
    def counts(self) -> dict[str, int]:
        """The cache's counts over all layers."""
        return {name: int(values.sum()) for name, values in self.program.cache_counts.items()}

    @property
    def elapsed_ns(self) -> int:
        """The end of the last step."""
        return int(self.table["end_ns"].iloc[self.program.steps[-1].last_task])

    def link_tasks(self, place: int = -1) -> pd.DataFrame:
        """Expert copies that were done on one link of the route (the last one: into the device)."""
        link = self.program.graph.resources[self.program.machine.route_indexes[place]].name
        return self.tasks[self.tasks["kind"].isin(COPIES) & (self.tasks["resource"] == link)]


@cache
def small_trace(num_layers: int, num_experts: int, top_k: int, seed: int) -> RoutingTrace:
    """Synthetic routing of six requests."""
    return synthetic_trace(48, num_layers, num_experts, top_k, 6, seed=seed)


def offload_of(machine: OffloadMachine, *, num_layers: int = 3, num_experts: int = 6, top_k: int = 2, batch: int = 1,
               steps: int = 6, seed: int = 0, prefill: bool = False, **options: object) -> Offload:
    """A small offload case on synthetic routing."""
    train, test = split_requests(small_trace(num_layers, num_experts, top_k, seed), 0.5, seed)
    made = closed_loop_steps(test, batch_size=batch, max_steps=steps, include_prefill=prefill, repeat=True, seed=seed)
    model = tiny_model(num_layers, num_experts, top_k)
    return Offload(model, train, test, made, machine, seed, **options)  # type: ignore[arg-type]


def run(offload: Offload, point: Point) -> Ran:
    """Simulate a point."""
    cost = CostModel(offload.machine.hardware)
    program = offload.program(point, cost)
    cache, experts = program.cache, offload.model.num_experts
    preload = {cache.slot_of(layer, e): layer * experts + e
               for layer in range(cache.num_layers) for e in cache.residents(layer)}
    return Ran(offload, program, preload, cost, run_simpy(program))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Offload, Point]:
    """Every policy, prefetcher and way to handle a miss, on several machines and sizes."""
    miss = draw(st.sampled_from(("load", "cpu", "faster")))
    memory = draw(st.sampled_from(("dram", "flash"))) if miss == "load" else "dram"
    machine = machine_of(draw(st.sampled_from((2e8, 1e9, 2e10))), memory=memory,
                         cpu_rate=draw(st.sampled_from((5e8, 1e10))))
    num_experts = draw(st.integers(4, 7))
    offload = offload_of(
        machine, num_layers=draw(st.integers(1, 4)), num_experts=num_experts, top_k=draw(st.integers(1, 3)),
        batch=draw(st.integers(1, 3)), steps=draw(st.integers(1, 6)), seed=draw(st.integers(0, 9)),
        prefill=draw(st.booleans()), preload=draw(st.sampled_from(("popular", "none"))), shared=draw(st.booleans()),
        chunks=draw(st.integers(1, 4)), admit=draw(st.booleans()))
    prefetch = draw(st.sampled_from(PREFETCHERS))
    width = 0 if prefetch == "none" else draw(st.integers(1, 4))
    recall = draw(st.sampled_from((0.0, 0.5, 1.0))) if prefetch == "stated_recall" else None
    slots = draw(st.integers(1, num_experts))
    return offload, Point(draw(st.sampled_from(POLICIES)), slots, prefetch, width, recall, miss)


def writes_by_chunk(ran: Ran) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """(slot, chunk) -> (start, end, key) of every copy that reached the device."""
    found = defaultdict(list)
    for row in ran.link_tasks().itertuples():
        key = row.layer * ran.offload.model.num_experts + row.expert
        found[row.slot, row.chunk].append((row.start_ns, row.end_ns, key))
    return found


def check_slots(ran: Ran) -> None:
    """Every expert that is computed finds all its bytes in its slot, and nobody writes there meanwhile."""
    writes, pieces = writes_by_chunk(ran), len(ran.program.transfers.chunk_bytes)
    for task in ran.tasks[ran.tasks["kind"] == "expert"].itertuples():
        key = task.layer * ran.offload.model.num_experts + task.expert
        for chunk in range(pieces):
            there = writes[task.slot, chunk]
            assert not [w for w in there if w[0] < task.end_ns and w[1] > task.start_ns], "written while read"
            before = [(end, written) for _, end, written in there if end <= task.start_ns]
            held = max(before)[1] if before else ran.preload.get(task.slot)
            assert held == key, f"slot {task.slot} chunk {chunk} holds {held}, task {task.task} reads {key}"


def check_work(ran: Ran) -> None:
    """Each step and layer computes each chosen expert once, on the device or the CPU, with all its tokens."""
    done = ran.tasks[ran.tasks["kind"].isin(("expert", "cpu_expert"))]
    found = {(t.step, t.layer, t.expert): t.tokens for t in done.itertuples()}
    assert len(found) == len(done)
    expected: dict[tuple[int, int, int], int] = defaultdict(int)
    for step in ran.offload.steps:
        for layer in range(ran.offload.model.num_moe_layers):
            for expert in ran.offload.test.expert_ids[step.rows, layer].ravel().tolist():
                expected[step.index, layer, expert] += 1
    assert found == expected


@settings(max_examples=50, deadline=None)
@given(cases())
def test_no_slot_is_overwritten_while_its_expert_is_computed_or_awaited(case: tuple[Offload, Point]) -> None:
    """Chunk by chunk, the last copy into a slot before an expert is computed there is that expert's."""
    ran = run(*case)
    check_slots(ran)
    check_work(ran)
    ran.program.cache.check()


@pytest.mark.parametrize("policy", ["static", "lru", "belady-bypass"])
@pytest.mark.parametrize("memory", ["dram", "flash"])
def test_passing_experts_wait_for_a_staging_slot(policy: str, memory: str) -> None:
    """One slot per layer, many misses, a link faster than the kernels: two staging slots take turns, in time."""
    machine = machine_of(1e12, memory=memory, latency_s=0.0)
    ran = run(offload_of(machine, top_k=3, batch=3, preload="none"), Point(policy, 1))
    staged = ran.tasks[(ran.tasks["kind"] == "expert") & (ran.tasks["slot"] >= 3)]
    assert set(staged["slot"]) == {3, 4}
    assert staged.groupby(["step", "layer"]).size().max() > 3
    check_slots(ran)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_no_simulated_time_is_below_the_bound(case: tuple[Offload, Point]) -> None:
    """The bound holds for every policy, prefetcher and miss mode (half a nanosecond of rounding per task)."""
    offload, point = case
    ran = run(offload, point)
    bound = offload.bound(point, ran.cost)
    assert 0 < bound.total_s <= ran.elapsed_ns / 1e9 + len(ran.tasks) * 0.5e-9
    assert bound.total_s >= max(bound.compute_s, bound.link_s)


# ---------------------------------------------------------------- counts and bytes


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("batch", "slots", "shared"), [(1, 1, False), (1, 3, False), (2, 4, False), (2, 2, True)])
def test_hits_and_misses_are_those_of_a_replay_without_time(policy: str, batch: int, slots: int, shared: bool) -> None:
    """Without prefetch, and loading every miss, time changes nothing about what hits.

    (Where an access needs more than its slots the two may differ: the program gives slots to the fullest experts.)
    """
    offload = offload_of(machine_of(), batch=batch, steps=12, shared=shared)
    ran = run(offload, Point(policy, slots))
    context = PolicyContext(3, 6, offload.popularity, offload.stream)
    cache = ExpertCache(3, 6, slots, make_policy(policy, context), shared=shared)
    cache.preload(offload.preloaded(slots))
    stats = replay(offload.stream, cache)
    counts = ran.program.cache_counts
    assert counts["hits"].tolist() == stats.hits.tolist()
    assert counts["misses"].tolist() == counts["loads"].tolist() == stats.misses.tolist()
    assert not counts["late_hits"].any()


@settings(max_examples=25, deadline=None)
@given(cases())
def test_bytes_over_the_link_are_the_chunks_that_were_not_cancelled(case: tuple[Offload, Point]) -> None:
    """Demand loads arrive whole; a fetch ahead arrives whole or is cut short between chunks."""
    ran = run(*case)
    counts, size = ran.counts, ran.offload.model.expert_bytes
    by_kind = ran.link_tasks().groupby("kind")["num_bytes"].sum()
    assert by_kind.get("load", 0) == counts["loads"] * size
    cancelled = ran.table[ran.table["state"] != DONE]
    last = ran.program.graph.resources[ran.program.machine.route_indexes[-1]].name
    lost = cancelled[cancelled["resource"] == last].groupby("kind")["num_bytes"].sum()
    assert set(cancelled["kind"]) <= {"prefetch", "admit"}
    assert by_kind.get("prefetch", 0) + lost.get("prefetch", 0) == counts["prefetches"] * size
    assert by_kind.get("admit", 0) + lost.get("admit", 0) == counts["admits"] * size
    assert counts["accesses"] == counts["hits"] + counts["late_hits"] + counts["misses"]
    assert counts["cancelled_prefetches"] <= counts["useless_prefetches"] <= counts["prefetches"]


def test_bytes_to_the_device_count_once_however_many_links_they_cross() -> None:
    """Over flash and PCIe the summary still says the bytes that reached the device."""
    ran = run(offload_of(machine_of(memory="flash"), preload="none"), Point("lru", 2))
    result = simulate(ran.program, executor=lambda _: ran.table)
    assert result.summary["htod_bytes"] == ran.counts["loads"] * ran.offload.model.expert_bytes > 0


# ---------------------------------------------------------------- closed forms


def one_token(num_layers: int = 1, num_experts: int = 4, top_k: int = 1, tokens: int = 1) -> RoutingTrace:
    """Decode of one request in which token t uses experts t, t + 1, ... (mod num_experts) in every layer."""
    ids = (np.arange(tokens)[:, None] + np.arange(top_k)) % num_experts
    return RoutingTrace(
        expert_ids=np.repeat(ids[:, None, :], num_layers, axis=1), request_id=np.zeros(tokens, int),
        position=np.arange(tokens), phase=np.full(tokens, DECODE), step=np.arange(tokens), num_experts=num_experts,
        layer_ids=np.arange(num_layers))


def by_hand(trace: RoutingTrace, model: ModelSpec, machine: OffloadMachine, *, slots: int, policy: str = "lru",
            chunks: int = 1, miss: str = "load", preload: list[int] | None = None, admit: bool = True) -> Ran:
    """Run a trace of one request token by token."""
    steps = closed_loop_steps(trace, batch_size=1)
    stream = access_stream(trace, [step.rows for step in steps])
    offload = Offload(model, trace, trace, steps, machine, 0, chunks=chunks, admit=admit)
    cost = CostModel(machine.hardware)
    context = PolicyContext(model.num_moe_layers, model.num_experts, offload.popularity, stream)
    cache = ExpertCache(model.num_moe_layers, model.num_experts, slots, make_policy(policy, context))
    cache.preload(preload or [])
    contents = {cache.slot_of(*divmod(key, model.num_experts)): key for key in preload or []}
    program = OffloadProgram(model, trace, steps, machine, cost, cache, OffloadPolicy(miss, admit, chunks))
    return Ran(offload, program, contents, cost, run_simpy(program))


def nanoseconds(num_bytes: float, flops: float = 0.0) -> int:
    """One kernel on the test's GPU: 1 us to start, then 10 GB/s or 1 Tflop/s, whichever takes longer."""
    return round(1e9 * (1e-6 + max(num_bytes / HBM_RATE, flops / 1e12)))


def fixed_ns(context: int, num_layers: int = 1) -> int:
    """Attention, router and head of one decoded token of the tiny model with 4 experts, by hand.

    hidden 64; query and output 64 x 64, key and value 64 x 32 each: 12288 weights; 2 bytes each.
    """
    activations = 2 * 64 * 2
    attention = nanoseconds(12288 * 2 + context * 64 * 2 + activations, 2 * 12288 + context * 4 * 64)
    router = nanoseconds(64 * 4 * 2 + activations)
    head = nanoseconds(64 * 128 * 2 + activations)
    return num_layers * (attention + router) + head


EXPERT_NS = nanoseconds(36864 + 2 * (64 + 96) * 2)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "static"])
def test_a_cache_that_holds_everything_only_computes(policy: str) -> None:
    """With every expert preloaded nothing is copied, and the time is the sum of the kernels by hand."""
    model = tiny_model(2, 4, 2)
    ran = by_hand(one_token(2, 4, 2, tokens=3), model, machine_of(), slots=4, policy=policy, preload=list(range(8)))
    assert set(ran.tasks["kind"]) == {"attention", "router", "expert", "barrier", "head"}
    assert ran.elapsed_ns == sum(fixed_ns(context, 2) + 4 * EXPERT_NS for context in (1, 2, 3))
    assert ran.counts["hits"] == 12


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("latency_s", [0.0, 1e-6])
def test_a_stream_that_always_misses_waits_for_each_load(chunks: int, latency_s: float) -> None:
    """One slot, one layer, a new expert per token: attention, router, load, expert, head, one after the other."""
    ran = by_hand(one_token(tokens=4), tiny_model(1, 4, 1), machine_of(latency_s=latency_s), slots=1, chunks=chunks)
    load = chunks * round(1e9 * latency_s) + 36864  # 1 GB/s: a byte per ns
    assert ran.elapsed_ns == sum(fixed_ns(context) + load + EXPERT_NS for context in (1, 2, 3, 4))
    assert ran.counts["loads"] == 4


def test_over_two_links_chunks_follow_one_another() -> None:
    """From flash the second link starts when the first chunk has crossed the first, slower one."""
    ran = by_hand(one_token(), tiny_model(1, 4, 1), machine_of(memory="flash", latency_s=0.0), slots=1, chunks=3)
    load = 36864 * 2 + 36864 // 3  # nvme at half a byte per ns, then the last chunk over pcie
    assert ran.elapsed_ns == fixed_ns(1) + load + EXPERT_NS


def test_a_miss_on_the_cpu_is_sent_computed_and_received() -> None:
    """Send 128 bytes down, compute where the weights are, send 128 bytes up; nothing else waits."""
    ran = by_hand(one_token(), tiny_model(1, 4, 1), machine_of(), slots=1, miss="cpu", admit=False)
    on_cpu = round(1e9 * (1e-6 + (36864 + 640) / 2e9))
    assert ran.elapsed_ns == fixed_ns(1) + 2 * (1000 + 128) + on_cpu
    assert not ran.tasks["kind"].isin(COPIES).any()


def test_what_the_cpu_computed_is_admitted_for_the_next_use() -> None:
    """With `admit` the expert is fetched beside the CPU's work, and its second use hits without the CPU."""
    trace = one_token(num_experts=1, tokens=2)
    ran = by_hand(trace, tiny_model(1, 1, 1), machine_of(link_rate=2e10), slots=1, miss="cpu")
    kinds = ran.tasks[ran.tasks["step"] == 1]["kind"].tolist()
    assert (ran.counts["admits"], ran.counts["cpu_misses"], ran.counts["hits"]) == (1, 1, 1)
    assert "expert" in kinds
    assert "cpu_expert" not in kinds


@pytest.mark.parametrize(("link_rate", "where"), [(1e12, "expert"), (1e7, "cpu_expert")])
def test_faster_takes_the_quicker_side(link_rate: float, where: str) -> None:
    """A fast link fetches, a slow one leaves the expert to the CPU (Fiddler's rule)."""
    machine = machine_of(link_rate, cpu_rate=1e9)
    ran = by_hand(one_token(), tiny_model(1, 4, 1), machine, slots=1, miss="faster", admit=False)
    assert set(ran.tasks["kind"]) & {"expert", "cpu_expert"} == {where}


# ---------------------------------------------------------------- prefetch


@pytest.mark.parametrize("seed", range(4))
def test_foresight_on_an_idle_link_is_never_slower(seed: int) -> None:
    """One token at a time, empty slots for everything: fetching the next layer's experts early only helps."""
    offload = offload_of(machine_of(), num_layers=4, seed=seed, steps=1, preload="none")
    plain, ahead = (run(offload, Point("lru", 6, *how)) for how in ((), ("oracle", 2)))
    assert ahead.elapsed_ns < plain.elapsed_ns
    assert ahead.counts["prefetches"] == ahead.counts["useful_prefetches"] + ahead.counts["late_prefetches"] == 6


def wrong_guess(layers: int = 2) -> tuple[RoutingTrace, RoutingTrace]:
    """Train: expert 0 then 1, 2 and 3 in the next layer; test: expert 0, then 5 (never guessed)."""
    ids = np.array([[[0], [guess]] for guess in (1, 2, 3)] * 2)
    common = {"request_id": np.zeros(6, int), "position": np.arange(6), "phase": np.full(6, DECODE),
              "step": np.arange(6), "num_experts": 6, "layer_ids": np.arange(layers)}
    train = RoutingTrace(expert_ids=ids, **common)
    return train, dataclasses.replace(train, expert_ids=np.tile(np.array([[0], [5]]), (6, 1, 1)))


def test_a_demand_overtakes_queued_prefetches_which_are_then_cancelled() -> None:
    """Three useless prefetches are queued: the demand load waits for the chunk on the wire and no longer."""
    train, test = wrong_guess()
    offload = Offload(tiny_model(2, 6, 1), train, test, closed_loop_steps(test, batch_size=1, max_steps=1),
                      machine_of(2e8, latency_s=0.0), 0, preload="none", chunks=4)
    ran = run(offload, Point("lru", 5, "transition", 3))
    chunk_ns = 36864 // 4 * 5
    demand = ran.tasks[(ran.tasks["kind"] == "load") & (ran.tasks["layer"] == 1)]
    router = ran.tasks[(ran.tasks["kind"] == "router") & (ran.tasks["layer"] == 1)]
    assert (demand["expert"] == 5).all()
    assert 0 < demand["start_ns"].min() - router["end_ns"].item() < chunk_ns
    assert np.diff(demand["start_ns"]).tolist() == [chunk_ns] * 3
    cancelled = ran.table[ran.table["state"] != DONE]
    assert set(cancelled["expert"]) == {1, 2, 3}
    assert (ran.counts["prefetches"], ran.counts["useless_prefetches"], ran.counts["cancelled_prefetches"]) == (3, 3, 3)
    assert ran.program.cache.residents(1) == [5]


def test_a_wanted_prefetch_in_the_queue_is_promoted() -> None:
    """Of three guesses the last is right and still queued: it now goes before the other two, as a demand."""
    train, test = wrong_guess()
    test = dataclasses.replace(test, expert_ids=np.tile(np.array([[0], [3]]), (6, 1, 1)))
    offload = Offload(tiny_model(2, 6, 1), train, test, closed_loop_steps(test, batch_size=1, max_steps=1),
                      machine_of(2e8, latency_s=0.0), 0, preload="none", chunks=4)
    ran = run(offload, Point("lru", 6, "transition", 3))
    wanted = ran.tasks[(ran.tasks["kind"] == "prefetch") & (ran.tasks["expert"] == 3)]
    assert (wanted["priority"] == 0).all()
    assert np.diff(wanted["start_ns"]).tolist() == [36864 // 4 * 5] * 3
    assert (ran.counts["late_hits"], ran.counts["late_prefetches"], ran.counts["loads"]) == (1, 1, 1)


# ---------------------------------------------------------------- the bound


def test_the_bound_is_reached_where_nothing_is_lost() -> None:
    """With every expert resident the bound is the simulated time; with one slot and no reuse it counts every miss."""
    model, trace = tiny_model(1, 4, 1), one_token(tokens=4)
    full = by_hand(trace, model, machine_of(), slots=4, preload=[0, 1, 2, 3])
    assert bound_of(full, 4, [0, 1, 2, 3]).total_s * 1e9 == pytest.approx(full.elapsed_ns, abs=16)
    short = by_hand(trace, model, machine_of(latency_s=0.0), slots=1)
    assert bound_of(short, 1, []).misses == 4
    assert bound_of(short, 1, []).link_s == pytest.approx(4 * 36864e-9)


def bound_of(ran: Ran, slots: int, preload: list[int]) -> OffloadBound:
    """The bound of a case made by hand."""
    offload = ran.offload
    return offload_bound(offload.model, offload.test, offload.steps, offload.machine, ran.cost, offload.stream,
                         slots_per_layer=slots, preload=preload, shared=False, cpu_helps=False)


def test_a_fast_cpu_beside_a_policy_with_many_misses_stays_above_the_bound() -> None:
    """Nothing admitted and a CPU as fast as the GPU: half the work runs beside the device, and the bound knows it."""
    offload = offload_of(machine_of(1e12, cpu_rate=HBM_RATE), num_experts=6, top_k=3, batch=3, admit=False,
                         preload="popular")
    point = Point("lru", 3, miss="cpu")
    ran = run(offload, point)
    assert ran.counts["cpu_misses"] > offload.bound(point, ran.cost).misses
    assert offload.bound(point, ran.cost).total_s * 1e9 <= ran.elapsed_ns


# ---------------------------------------------------------------- errors


def test_slots_beyond_the_memory_are_refused_with_what_fits() -> None:
    """The message names the memory and how many slots per layer fit beside the rest."""
    machine = machine_of(hbm_bytes=400_000)
    with pytest.raises(InputError, match=r"18 expert slots need .* of 'hbm' are left .* at most \d slots per"):
        run(offload_of(machine), Point("lru", 6))


def test_experts_beyond_the_slow_memory_are_refused() -> None:
    """All experts must lie in the slow memory."""
    machine = machine_of()
    memories = machine.hardware.memories | {"dram": Memory("dram", "dram", 1e5, 1e9)}
    small = dataclasses.replace(machine, hardware=dataclasses.replace(machine.hardware, memories=memories))
    with pytest.raises(InputError, match="the experts of 'tiny' need 664 kB, but 'dram' holds 100 kB"):
        run(offload_of(small), Point("lru", 1))


@pytest.mark.parametrize("miss", ["cpu", "faster"])
def test_a_cpu_cannot_compute_experts_that_lie_on_flash(miss: str) -> None:
    """The CPU computes where the weights are, and that must be its own memory."""
    message = f"miss: {miss} needs the experts in the CPU's memory, but they lie in 'flash'"
    with pytest.raises(InputError, match=message):
        run(offload_of(machine_of(memory="flash")), Point("lru", 2, miss=miss))


def test_a_trace_of_another_shape_is_refused() -> None:
    """Layers, experts and top-k of trace and model must agree."""
    offload = offload_of(machine_of())
    wrong = dataclasses.replace(offload, model=tiny_model(3, 6, 1))
    with pytest.raises(InputError, match=r"has 3 MoE layers x 6 experts, top-2, but model 'tiny' has .* top-1"):
        run(wrong, Point("lru", 2))


@pytest.mark.parametrize(("options", "message"), [
    ({"miss": "fetch"}, "miss must be one of load, cpu, faster, got 'fetch'"),
    ({"chunks": 0}, "chunks must be at least 1, got 0")])
def test_a_policy_that_is_none_is_refused(options: dict[str, object], message: str) -> None:
    """Unknown ways to handle a miss, and copies in no pieces."""
    with pytest.raises(InputError, match=message):
        OffloadPolicy(**options)  # type: ignore[arg-type]


def test_a_machine_needs_a_second_memory() -> None:
    """Experts cannot be offloaded into the memory that computes, nor where there is only one."""
    machine = machine_of()
    with pytest.raises(InputError, match="the experts' memory 'hbm' is the device's own"):
        dataclasses.replace(machine, slow_memory="hbm")
    alone = HardwareSpec("solo", {"soc": Device("soc", "soc", "ram", {"bf16": 1e12})},
                         {"ram": Memory("ram", "unified", 1e9, 1e9)})
    with pytest.raises(InputError, match="hardware 'solo' has no second memory"):
        offload_machine(alone)


def test_the_machine_picks_gpu_and_dram_and_obeys_names() -> None:
    """By default the GPU computes and DRAM holds the experts; names override both."""
    spec = machine_of().hardware
    chosen = offload_machine(spec)
    assert (chosen.device, chosen.slow_memory, chosen.cpu) == ("gpu", "dram", "cpu")
    assert offload_machine(spec, slow_memory="flash").slow_memory == "flash"
    assert offload_machine(spec, device="cpu").slow_memory == "flash"
    with pytest.raises(InputError, match=r"no device 'gqu'. Did you mean 'gpu'"):
        offload_machine(spec, device="gqu")
