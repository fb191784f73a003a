"""HOBBIT, EdgeMoE and D2MoE as programs: what is in memory when it is read, what crosses the link, and in which width."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from precision_worlds import PROGRAMS, Ran, World, d2moe_program, random_world, run_world

from moesim.cache.byte_cache import ByteCache
from moesim.cache.policy import make_policy
from moesim.cache.precision import Quantization, exclusive_versions
from moesim.cache.precision_bits import BitChoice
from moesim.cache.precision_hobbit import HIGH, LOW, SKIP, HobbitPrecision
from moesim.cache.precision_levels import level_counts
from moesim.cache.precision_order import Item, load_order, makespan_ns
from moesim.cache.precision_planes import PlaneCache
from moesim.cache.prefetch import LookaheadPrefetcher, Prefetcher
from moesim.cache.prefetchers import PrefetchMoment, Wish
from moesim.errors import CheckError, InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.spec import Memory
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import LayerMoment, OffloadProgram
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.lowering.precision.d2moe import D2MoeProgram
from moesim.lowering.precision.edgemoe import EdgeMoeProgram, edgemoe_versions, expert_bytes_of
from moesim.lowering.precision.hobbit import HobbitProgram
from moesim.lowering.precision.program import VersionProgram
from moesim.lowering.work import experts_work
from moesim.simulate.executors import executor_of
from moesim.simulate.result import DONE
from moesim.simulate.run import simulate
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import RoutingTrace

METHODS = tuple(PROGRAMS)
seeds = st.integers(0, 99_999)


# ---------------------------------------------------------------- all three


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40, deadline=None)
@given(seeds)
def test_bytes_on_the_link_are_those_of_the_versions_loaded(method: str, seed: int) -> None:
    """Demand loads arrive whole; what was fetched ahead arrives whole or is cut short between chunks."""
    ran = run_world(random_world(seed), method)
    asked = ran.into_device.groupby("kind")["num_bytes"].sum()
    assert asked.get("load", 0) == ran.counts["loaded_bytes"]
    assert asked.get("prefetch", 0) == ran.counts["prefetched_bytes"]
    assert set(ran.table[ran.table["state"] != DONE]["kind"]) <= {"prefetch"}
    assert ran.counts["accesses"] == ran.counts["hits"] + ran.counts["late_hits"] + ran.counts["misses"]
    assert ran.counts["cancelled_prefetches"] <= ran.counts["useless_prefetches"] <= ran.counts["prefetches"]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40, deadline=None)
@given(seeds)
def test_the_debit_is_what_the_kernels_computed(method: str, seed: int) -> None:
    """Choice by choice from the task table: the gate weight at each width, and what no kernel computed."""
    ran = run_world(random_world(seed), method)
    debit, found = ran.program.debit(), Counter()
    computed = ran.computed()
    for step in ran.world.steps:
        for row in step.rows:
            for layer in range(ran.world.model.num_moe_layers):
                for bits, share in width_of_choices(ran, computed, step.index, int(row), layer):
                    found[bits] += share
    total = sum(found.values())
    assert debit.skipped == pytest.approx(found[0] / total, abs=1e-9)
    assert debit.shares == pytest.approx([found[bits] / total for bits in debit.bits], abs=1e-9)


def width_of_choices(ran: Ran, computed: dict, step: int, row: int, layer: int) -> list[tuple[int, float]]:
    """(bits, share of the token's weight) of each choice of one token; D2MoE's by the level that it was given."""
    trace, versions = ran.world.trace, ran.program.versions
    by_bytes = {versions.weight_bytes(level): bits for level, bits in enumerate(versions.bits)}
    weights = np.asarray(trace.gate_weights)[row, layer].astype(float)
    found = []
    for slot, (expert, weight) in enumerate(zip(trace.expert_ids[row, layer].tolist(), weights / weights.sum(), strict=True)):
        widths = [by_bytes[kernel.num_bytes] for kernel in computed.get((step, layer, expert), ())]
        if isinstance(ran.program, D2MoeProgram):
            given_bits = versions.bits[ran.program.levels[row, layer, slot]]
            assert given_bits in widths
            widths = [given_bits]
        assert len(widths) <= 1
        found.append((widths[0] if widths else 0, weight))
    return found


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15, deadline=None)
@given(seeds)
def test_the_compiled_executor_gives_the_same_tables(method: str, seed: int) -> None:
    """The generic engine, row for row and nanosecond for nanosecond; and so do counts and debit."""
    world = random_world(seed)
    results, debits = [], []
    for executor in ("simpy", "compiled"):
        program = PROGRAMS[method](world)
        results.append(simulate(program, executor=executor_of(executor)))
        debits.append(program.debit())
    for name, table in results[0].tables.items():
        assert table.equals(results[1].tables[name]), name
    assert results[0].summary == results[1].summary
    assert debits[0] == debits[1]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(seeds)
def test_every_kernel_reads_what_has_arrived(method: str, seed: int) -> None:
    """No expert is computed before the last copy of its version that was asked for before it; dequantisation comes between."""
    ran = run_world(random_world(seed), method)
    table = ran.into_device[ran.into_device["state"] == DONE]
    arrived: dict[tuple[int, int], int] = {}
    rows = [*table.itertuples(), *ran.tasks[ran.tasks["kind"].isin(("dequantize", "expert"))].itertuples()]
    for row in sorted(rows, key=lambda row: row.task):
        place = row.slot, ran.key(row)
        if row.kind in ("load", "prefetch"):
            arrived[place] = max(arrived.get(place, 0) if row.chunk else 0, row.end_ns)
        else:
            assert row.start_ns >= arrived.get(place, 0)
            arrived[place] = max(arrived.get(place, 0), row.end_ns) if row.kind == "dequantize" else arrived.get(place, 0)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None)
@given(seeds)
def test_a_kernel_takes_the_time_of_its_own_bytes(method: str, seed: int) -> None:
    """The roofline by hand: start, then the weights at this width and the rows, or the flops, whichever takes longer."""
    ran = run_world(random_world(seed), method)
    hardware, model = ran.world.machine.hardware, ran.world.model
    device, memory = hardware.device("gpu"), hardware.memories["hbm"]
    for row in ran.kernels.itertuples():
        rows_bytes = row.tokens * 2 * (model.hidden_size + model.expert_intermediate_size) * 2
        flops = row.tokens * 6 * model.hidden_size * model.expert_intermediate_size
        busy = max((row.num_bytes + rows_bytes) / memory.bytes_per_s, flops / device.flops_per_s["bf16"])
        assert abs(row.duration_ns - max(1, 1e9 * (device.kernel_overhead_s + busy))) <= 0.51
        assert row.num_bytes in {ran.program.versions.weight_bytes(level) for level in range(ran.program.versions.num_levels)}


def test_measured_kernels_serve_the_models_own_width_only() -> None:
    """A table of the FP16 kernel prices high copies; low ones look for a table of their own, or take the roofline."""
    world = random_world(3)
    shape = experts_work(world.model, 1, 1, 1).shape
    for name, low_source in ((shape, {"nameplate"}), (f"{shape}.int4", {"measured", "extrapolated", "interpolated"})):
        tables = tuple(MeasuredTable("grouped_ffn", "gpu", each, "bf16", ("tokens",), ((1.0,), (64.0,)), (1e-3, 2e-3))
                       for each in {shape, name})
        program = hobbit_of(world, cost=CostModel(world.machine.hardware, CalibrationProfile("some", tables)))
        ran = Ran(world, program, run_simpy(program), {})
        by_width = ran.kernels.groupby(ran.kernels["num_bytes"] == program.versions.weight_bytes(HIGH))["source"]
        sources = {high: set(found) for high, found in by_width}
        assert sources[True] <= {"measured", "interpolated", "extrapolated"}
        assert sources[False] <= low_source


@pytest.mark.parametrize("method", METHODS)
def test_dequantisation_is_a_task_of_its_own_and_takes_its_share(method: str) -> None:
    """One per copy that is used, on the device, for the stated share of its time, with the source stated."""
    for seed in range(40):
        ran = run_world(random_world(seed), method)
        extra = ran.tasks[ran.tasks["kind"] == "dequantize"]
        share = ran.program.plan.dequantize_share
        assert bool(len(extra)) == (share > 0 and needs_it(ran))
        copies = Counter((row.slot, ran.key(row)) for row in ran.into_device.itertuples() if row.chunk == 0)
        assert not Counter((row.slot, ran.key(row)) for row in extra.itertuples()) - copies, "more than once per copy"
        for row in extra.itertuples():
            slowest = max(CostModel(ran.world.machine.hardware).copy(link.name, row.num_bytes).seconds
                          for link in ran.world.machine.route)
            assert abs(row.duration_ns - max(1, share * slowest * 1e9)) <= 1
            assert row.source == "stated"


def needs_it(ran: Ran) -> bool:
    """Whether any copy of integers was used."""
    kernels = ran.kernels
    used = {(row.slot, ran.key(row)) for row in kernels[kernels["num_bytes"] < ran.world.model.expert_bytes].itertuples()}
    done = ran.into_device[ran.into_device["state"] == DONE]
    return any((row.slot, ran.key(row)) in used for row in done.itertuples())


# ---------------------------------------------------------------- HOBBIT


def needs_of_step(ran: Ran, step: int, layer: int) -> dict[int, int]:
    """expert -> the strictest need of the step's tokens, token by token."""
    program, trace = ran.program, ran.world.trace
    assert isinstance(program, HobbitProgram)
    found: dict[int, int] = {}
    for row in ran.world.steps[step].rows:
        pairs = sorted(zip((-np.asarray(trace.gate_weights)[row, layer].astype(float)).tolist(),
                           trace.expert_ids[row, layer].tolist(), strict=True))
        total, before = -sum(weight for weight, _ in pairs), 0.0
        for weight, expert in pairs:
            need = HIGH if before / total <= program.precision.t1 else LOW if before / total <= program.precision.t2 else SKIP
            found[expert] = max(found.get(expert, SKIP), need)
            before -= weight
    return found


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_no_need_is_served_by_a_lower_version(seed: int) -> None:
    """A high need gets the high copy, a low need either; only what no token needs is left out; loads are as needed."""
    ran = run_world(random_world(seed), "hobbit")
    versions, computed = ran.program.versions, ran.computed()
    loads = {(r.step, r.layer, r.expert): r.slot for r in ran.into_device.itertuples() if r.kind == "load"}
    high_slots = ran.program.pools[HIGH].cache.num_slots + 2
    for step in range(len(ran.world.steps)):
        for layer in range(ran.world.model.num_moe_layers):
            for expert, need in needs_of_step(ran, step, layer).items():
                kernels = computed.get((step, layer, expert), [])
                levels = [LOW if kernel.num_bytes == versions.weight_bytes(LOW) else HIGH for kernel in kernels]
                assert len(levels) <= 1
                assert levels[0] >= need if levels else need == SKIP
                if (step, layer, expert) in loads:
                    assert need == (HIGH if loads[step, layer, expert] < high_slots else LOW)
    assert ran.counts["skips"] == ran.counts["accesses"] - len(computed)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_no_slot_of_a_pool_is_overwritten_while_used(seed: int) -> None:
    """Chunk by chunk, the last copy into a slot before a version is computed there is that version's."""
    ran = run_world(random_world(seed), "hobbit")
    check_slots(ran)
    for pool in ran.program.pools:
        pool.cache.check()


def check_slots(ran: Ran) -> None:
    """Every version that is computed finds all its chunks in its slot, and nobody writes there meanwhile."""
    writes = defaultdict(list)
    for row in ran.into_device[ran.into_device["state"] == DONE].itertuples():
        writes[row.slot, row.chunk].append((row.start_ns, row.end_ns, ran.key(row)))
    for task in ran.kernels.itertuples():
        for chunk in range(ran.world.policy.chunks):
            there = writes[task.slot, chunk]
            assert not [w for w in there if w[0] < task.end_ns and w[1] > task.start_ns], "written while read"
            before = [(end, key) for _, end, key in there if end <= task.start_ns]
            assert (max(before)[1] if before else ran.preload.get(task.slot)) == ran.key(task)


def crowded_world(fast_link: bool, layers: int = 2) -> World:
    """Four experts per token for one or two slots per layer; a link much faster, or much slower, than the kernels."""
    world = random_world(3, one_link=True)
    model = world.model.replace(top_k=4, num_experts=9, num_layers=layers, moe_layers=tuple(range(layers)))
    trace = synthetic_trace(60, layers, 9, 4, 5, seed=1)
    steps = closed_loop_steps(trace, batch_size=8 // layers, max_steps=6, include_prefill=False, repeat=True)
    spec = world.machine.hardware
    links = {name: dataclasses.replace(link, bytes_per_s=1e12 if fast_link else 1e8, latency_s=0.0)
             for name, link in spec.links.items()}
    memories = spec.memories | {"hbm": Memory("hbm", "hbm", 1e12, 1e9 if fast_link else 1e12)}
    machine = dataclasses.replace(world.machine, hardware=dataclasses.replace(spec, links=links, memories=memories))
    return World(3, machine, model, trace, steps, OffloadPolicy("load", True, 2))


def test_passing_versions_wait_for_a_staging_slot() -> None:
    """Many misses and a link faster than the kernels: the two staging slots of each pool take turns, in time."""
    world = crowded_world(fast_link=True)
    ran = Ran(world, program := hobbit_of(world), run_simpy(program), {})
    high_staging, low_staging = {2, 3}, {6, 7}
    assert high_staging | low_staging <= set(ran.kernels["slot"]) <= set(range(8))
    assert ran.kernels[ran.kernels["slot"].isin(high_staging)].groupby(["step", "layer"]).size().max() > 2
    check_slots(ran)


def test_a_version_that_nothing_needs_is_cancelled() -> None:
    """All needs are high and low copies are prefetched, over a slow link: all are useless, and most never arrive."""
    world = crowded_world(fast_link=False)
    ahead = world.prefetcher("oracle", 4, 1.0)
    program = hobbit_of(world, low_slots=4, precision=HobbitPrecision(1.0, 1.0), prefetcher=ahead, prefetch_bits="low")
    ran = Ran(world, program, run_simpy(program), {})
    assert ran.counts["prefetches"] == ran.counts["useless_prefetches"] > 0
    assert ran.counts["cancelled_prefetches"] > ran.counts["prefetches"] / 2
    assert ran.counts["useful_prefetches"] == ran.counts["late_prefetches"] == ran.counts["low_hits"] == 0
    assert ran.counts["high_loads"] == ran.counts["misses"]


@pytest.mark.parametrize("prefetch", ["none", "transition", "stated_recall", "read-me"])
@settings(max_examples=15, deadline=None)
@given(seeds)
def test_with_high_needs_only_it_is_the_plain_program(prefetch: str, seed: int) -> None:
    """Thresholds of 1 leave no low version: the same table as `OffloadProgram` with the high pool alone."""
    check_plain_hobbit(random_world(seed), prefetch, seed)


@pytest.mark.parametrize("prefetch", ["oracle", "read-me"])
def test_exact_predictions_are_fetched_in_the_width_that_they_will_need(prefetch: str) -> None:
    """With room for all, every prefetched version is used, whichever it is; what would be skipped is not fetched."""
    world = crowded_world(fast_link=True, layers=6)
    program = hobbit_of(world, high_slots=9, low_slots=9, prefetcher=world.prefetcher(prefetch, 9, 1.0))
    ran = Ran(world, program, run_simpy(program), {})
    prefetched = ran.into_device[ran.into_device["kind"] == "prefetch"]
    assert (prefetched["slot"] < 9 * 6 + 2).nunique() == 2  # high ones and low ones
    assert ran.counts["useless_prefetches"] == 0
    assert ran.counts["useful_prefetches"] + ran.counts["late_prefetches"] == ran.counts["prefetches"] > 30
    assert ran.counts["skips"] > 0
    for row in prefetched.itertuples():
        assert needs_of_step(ran, row.step, row.layer)[row.expert] == (HIGH if row.slot < 9 * 6 + 2 else LOW)


def test_of_two_resident_copies_the_wider_serves() -> None:
    """And what is resident serves even an expert that no token needs; a low copy does not serve a high need."""
    world = random_world(3)
    program = hobbit_of(world)
    for pool, experts in zip(program.pools, ([0, 1], [1]), strict=True):  # low, high
        pool.cache = world.cache(2, "lru", shared=False, preload=False)
        pool.cache.preload(experts)
    for need in (HIGH, LOW, SKIP):
        assert program._serve(0, 1, need) == (1, HIGH, "hit")
    assert [program._serve(0, 0, need)[1:] for need in (HIGH, LOW, SKIP)] == [(HIGH, "miss"), (LOW, "hit"), (LOW, "hit")]
    assert program._serve(0, 2, SKIP) == (2, SKIP, "skipped")


@pytest.mark.parametrize(("bits", "levels"), [
    ("mixed", [HIGH, LOW, HIGH, LOW]), ("high", [HIGH] * 4), ("low", [LOW] * 4)])
def test_predictions_without_weights_are_fetched_by_their_rank(bits: str, levels: list[int]) -> None:
    """Of each layer the first guess high and the others low, or all in one width."""
    world = random_world(3)
    program = hobbit_of(world, prefetch_bits=bits, prefetcher=world.prefetcher("transition", 2, 1.0))
    wishes = [Wish(1, 4), Wish(1, 2), Wish(2, 5), Wish(1, 0)]
    assert program.wished_levels(LayerMoment(world.steps[0], 0, 0, 0, np.zeros(9, int)), wishes) == levels


class FarWishes:
    """At the first layer of a step, all absent experts of the last one."""

    information = "I0"
    source = "test"

    def wishes(self, moment: PrefetchMoment) -> list[Wish]:
        """Return them."""
        last = moment.num_layers - 1
        return [] if moment.layer else [Wish(last, expert) for expert in range(9) if not moment.is_resident(last, expert)]


def test_copies_of_experts_that_lose_their_slot_are_stopped() -> None:
    """Far predictions over a slow link, evicted from one pool by demand loads before they land: as the plain program."""
    world = crowded_world(fast_link=False, layers=6)
    table = check_plain_hobbit(world, "far", 0)
    lost = table[table["state"] != DONE]
    assert set(lost["layer"]) == {5}
    assert len(lost) > 40
    check_plain_edgemoe(world, "far", 0)


def check_plain_hobbit(world: World, prefetch: str, seed: int) -> pd.DataFrame:
    """Compare HOBBIT with high needs only and the plain program; returns the table."""
    parts = (world.model, world.trace, world.steps, world.machine, CostModel(world.machine.hardware))
    pool, high, low = (world.cache(2, "lru", shared=seed % 2 == 0, preload=True) for _ in range(3))
    plain = OffloadProgram(*parts, pool, world.policy, ahead_of(world, prefetch))
    hobbit = HobbitProgram(*parts, high, low, world.policy, HobbitPrecision(1.0, 1.0), ahead_of(world, prefetch),
                           prefetch_bits="high")
    return check_same(plain, hobbit, ["slot"])


def ahead_of(world: World, name: str) -> Prefetcher | LookaheadPrefetcher | None:
    """A prefetcher of eight experts, or `FarWishes`."""
    return FarWishes() if name == "far" else world.prefetcher(name, 8, 0.5)


def check_same(plain: OffloadProgram, other: VersionProgram, more_columns: list[str]) -> pd.DataFrame:
    """Run both and compare what the tasks are, when they run, and the counts; returns the table."""
    tables = [run_simpy(program) for program in (plain, other)]
    columns = ["kind", "resource", "layer", "expert", "ready_ns", "start_ns", "end_ns", "priority", "num_bytes", "state"]
    for column in columns + more_columns:
        assert tables[0][column].equals(tables[1][column]), column
    for name, counts in plain.cache_counts.items():
        assert counts.tolist() == other.cache_counts[name].tolist(), name
    return tables[0]


def test_the_penalty_counts_low_loads_by_their_bytes() -> None:
    """From the counts of a run."""
    ran = run_world(random_world(3), "hobbit")
    versions = ran.program.versions
    expected = ran.counts["high_loads"] + ran.counts["low_loads"] * versions.weight_bytes(LOW) / versions.weight_bytes(HIGH)
    assert ran.counts["loads"] == ran.counts["high_loads"] + ran.counts["low_loads"] > 0
    assert ran.program.miss_penalty() == expected


# ---------------------------------------------------------------- EdgeMoE


@settings(max_examples=80, deadline=None)
@given(seeds)
def test_the_buffer_never_holds_more_bytes_than_it_has(seed: int) -> None:
    """Each residence counts its bytes from its first copied byte to its last reader; no two need the same bytes at once."""
    ran = run_world(random_world(seed), "edgemoe")
    cache = ran.program.cache
    assert isinstance(cache, ByteCache)
    room = cache.bytes_per_layer * (cache.num_layers if cache.shared else 1)
    changes = defaultdict(list)
    for pool, start, end, size in residences(ran):
        changes[pool] += [(start, 1, size), (end, 0, -size)]
    for pool in changes:
        held = 0
        for _, _, size in sorted(changes[pool]):
            held += size
            assert held <= room
    cache.check()


def residences(ran: Ran) -> list[tuple[int, int, int, int]]:
    """(pool, start, end, bytes) of every stay in the buffer, from the tasks that write or read it."""
    cache, staging = ran.program.cache, ran.program.cache.num_slots
    sizes = ran.program.choice.bits  # shape only; bytes below
    sizes = expert_bytes_of(sizes, ran.program.versions).ravel()
    open_stays = {key: [0, 0] for key in ran.preload.values()}
    found, last_asked = [], {}
    kinds = ("load", "prefetch", "dequantize", "expert")
    device = set(ran.into_device["task"])
    rows = ran.tasks[ran.tasks["kind"].isin(kinds) & (ran.tasks["slot"] < staging)]
    for row in rows.sort_values("task").itertuples():
        key = ran.key(row)
        if row.kind in ("load", "prefetch"):
            if row.task not in device:
                continue
            if row.chunk == 0 or key not in open_stays or last_asked.get(key) != (row.kind, row.step, row.chunk - 1):
                if key in open_stays:
                    found.append((key, *open_stays.pop(key)))
                open_stays[key] = [row.start_ns, row.end_ns]
            last_asked[key] = row.kind, row.step, row.chunk
        stay = open_stays[key]
        stay[:] = min(stay[0], row.start_ns), max(stay[1], row.end_ns)
    found += [(key, *stay) for key, stay in open_stays.items()]
    return [(0 if cache.shared else key // ran.world.model.num_experts, start, end, int(sizes[key]))
            for key, start, end in found]


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_every_expert_has_its_own_width(seed: int) -> None:
    """Copies and kernels of an expert have the bytes of the width that was chosen for it, and all tokens are computed."""
    ran = run_world(random_world(seed), "edgemoe")
    program = ran.program
    assert isinstance(program, EdgeMoeProgram)
    sizes = expert_bytes_of(program.choice.bits, program.versions)
    assert all(row.num_bytes == sizes[row.layer, row.expert] for row in ran.kernels.itertuples())
    whole = ran.into_device.groupby(["kind", "step", "layer", "expert", "slot"])["num_bytes"].sum()
    assert all(total % sizes[index[2], index[3]] == 0 for index, total in whole.items())
    choices = sum(ran.world.trace.expert_ids[step.rows].size for step in ran.world.steps)
    assert ran.kernels["tokens"].sum() == choices


@pytest.mark.parametrize("prefetch", ["none", "stated_recall", "read-me"])
@settings(max_examples=15, deadline=None)
@given(seeds)
def test_with_one_width_it_is_the_plain_program(prefetch: str, seed: int) -> None:
    """All experts at the model's own width in whole slots: every task starts and ends as in `OffloadProgram`."""
    check_plain_edgemoe(random_world(seed), prefetch, seed)


def check_plain_edgemoe(world: World, prefetch: str, seed: int) -> None:
    """Compare EdgeMoE with one width and the plain program: all but the numbers of slots."""
    model = world.model
    bits = np.full((model.num_moe_layers, model.num_experts), 16)
    choice = BitChoice(bits, 0.0, 0.0, 16, 16, 0, 0)
    versions = edgemoe_versions(model, choice)
    parts = (model, world.trace, world.steps, world.machine, CostModel(world.machine.hardware))
    plain = OffloadProgram(*parts, world.cache(2, "lru", shared=seed % 2 == 0, preload=False), world.policy,
                           ahead_of(world, prefetch))
    room = ByteCache(model.num_moe_layers, model.num_experts, 2 * model.expert_bytes, expert_bytes_of(bits, versions),
                     make_policy("lru", world.context()), shared=seed % 2 == 0)
    check_same(plain, EdgeMoeProgram(*parts, room, world.policy, choice, versions, ahead_of(world, prefetch)), [])


# ---------------------------------------------------------------- D2MoE


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_kernel_finds_all_planes_up_to_its_level(seed: int) -> None:
    """Replay of the planes: every plane that a level needs was copied after it was last freed, and before the kernel."""
    ran = run_world(random_world(seed), "d2moe")
    program = ran.program
    assert isinstance(program, D2MoeProgram)
    model, versions = ran.world.model, program.versions
    planes = PlaneCache(model.num_moe_layers, model.num_experts, program.planes.budget_bytes, versions)
    arrived: dict[tuple[int, int, int], int] = {}
    num_keys = model.num_moe_layers * model.num_experts
    copies, kernels = defaultdict(list), defaultdict(list)
    for row in ran.into_device.itertuples():
        copies[row.step, row.layer].append(row)
    for row in ran.kernels.itertuples():
        kernels[row.step, row.layer].append(row)
    for step in ran.world.steps:
        for layer in range(model.num_moe_layers):
            tops = top_levels(program, ran.world.trace, step.rows, layer)
            for plane in planes.prepare(layer, tops):
                del arrived[plane]
            for row in copies[step.index, layer]:
                place = layer, row.expert, row.slot // num_keys
                assert row.slot % num_keys == ran.key(row)
                assert row.chunk or place not in arrived, "copied while resident"
                arrived[place] = max(arrived.get(place, 0), row.end_ns)
            for row in kernels[step.index, layer]:
                level = row.slot // num_keys
                assert row.num_bytes == versions.weight_bytes(level)
                assert all(arrived[layer, row.expert, plane] <= row.start_ns for plane in range(level + 1))
    assert sum(versions.part_bytes[plane] for *_, plane in arrived) <= program.planes.budget_bytes


def top_levels(program: D2MoeProgram, trace: RoutingTrace, rows: np.ndarray, layer: int) -> dict[int, int]:
    """expert -> its highest level in one access, in the order of experts."""
    found: dict[int, int] = {}
    for row in rows:
        for expert, level in zip(trace.expert_ids[row, layer].tolist(), program.levels[row, layer].tolist(), strict=True):
            found[expert] = max(found.get(expert, 0), level)
    return dict(sorted(found.items()))


@pytest.mark.parametrize("order", ["hebf", "id"])
def test_a_layer_takes_the_makespan_of_the_flow_shop(order: str) -> None:
    """One link, whole copies: from router to barrier, each layer takes what `makespan_ns` says of its items in this order."""
    layers = 0
    for seed in range(30):
        world = random_world(seed, one_link=True)
        world = dataclasses.replace(world, policy=OffloadPolicy("load", True, 1),
                                    model=world.model.replace(shared_intermediate_size=0))
        program = dataclass_free(world, order)
        table = run_simpy(program)
        for step in world.steps:
            for layer in range(world.model.num_moe_layers):
                here = table[(table["step"] == step.index) & (table["layer"] == layer)]
                start = int(here[here["kind"] == "router"]["end_ns"].iloc[0])
                end = int(here[here["kind"] == "barrier"]["end_ns"].max())
                assert end - start == makespan_ns(items_of(world, program, here, order))
                layers += 1
    assert layers > 100


def dataclass_free(world: World, order: str) -> D2MoeProgram:
    """The world's program without dequantisation, which takes the device beside the kernels."""
    program = d2moe_program(world, order)
    planes = PlaneCache(program.planes.num_layers, program.planes.num_experts, program.planes.budget_bytes, program.versions)
    return D2MoeProgram(world.model, world.trace, world.steps, world.machine, CostModel(world.machine.hardware), planes,
                        world.policy, program.levels, order=order)


def items_of(world: World, program: D2MoeProgram, here: object, order: str) -> list[Item]:
    """The items of one layer in the order of loading, resident ones first, with the durations of their tasks."""
    num_keys = world.model.num_moe_layers * world.model.num_experts
    step, layer = int(here["step"].iloc[0]), int(here["layer"].iloc[0])  # type: ignore[index]
    rows = world.steps[step].rows
    counts = level_counts(world.trace.expert_ids[rows, layer], program.levels[rows, layer], world.model.num_experts,
                          program.versions.num_levels)
    io_ns: Counter[tuple[int, int]] = Counter()
    compute = {}
    for row in here.itertuples():  # type: ignore[attr-defined]
        if row.kind == "load":
            plane = row.slot // num_keys
            level = next(level for level in range(plane, program.versions.num_levels) if counts[row.expert, level])
            io_ns[row.expert, level] += row.duration_ns
        if row.kind == "expert":
            compute[row.expert, row.slot // num_keys] = row.duration_ns
    items = [Item(*item, io_ns[item], compute[item]) for item in load_order(order, counts)]
    return sorted(items, key=lambda item: item.io_ns > 0)


# ---------------------------------------------------------------- errors


def hobbit_of(world: World, high_slots: int = 1, low_slots: int = 1, **options: object) -> HobbitProgram:
    """A HOBBIT program with some slots per layer."""
    high, low = (world.cache(slots, "lru", shared=False, preload=False) for slots in (high_slots, low_slots))
    settings = {"policy": world.policy, "precision": HobbitPrecision(), "trace": world.trace, "machine": world.machine} | options
    cost = settings.pop("cost", CostModel(settings["machine"].hardware))  # type: ignore[attr-defined]
    return HobbitProgram(world.model, settings.pop("trace"), world.steps, settings.pop("machine"),  # type: ignore[arg-type]
                         cost, high, low, **settings)  # type: ignore[arg-type]


def with_memory(machine: OffloadMachine, name: str, num_bytes: float) -> OffloadMachine:
    """The same machine with another size of one memory."""
    old = machine.hardware.memories[name]
    memories = machine.hardware.memories | {name: Memory(name, old.kind, num_bytes, old.bytes_per_s)}
    return dataclasses.replace(machine, hardware=dataclasses.replace(machine.hardware, memories=memories))


def test_pools_and_stored_versions_must_fit() -> None:
    """On the device both pools and their staging slots; on the slow tier every copy of every expert."""
    world = random_world(2, one_link=True)
    model = world.model
    versions = HobbitPrecision().versions(model)
    rest = world.machine.hardware.memories["hbm"].num_bytes - world.machine.free_bytes(model, 0) - 2 * model.expert_bytes
    pools = (model.num_moe_layers + 2) * (versions.weight_bytes(HIGH) + versions.weight_bytes(LOW))
    tokens = max(int((world.trace.position[step.rows].astype(int) + 1).sum()) if step.phase == "decode" else len(step.rows)
                 for step in world.steps)
    kv = tokens * model.kv_bytes_per_token_layer * model.num_layers
    hobbit_of(world, machine=with_memory(world.machine, "hbm", rest + kv + pools))
    with pytest.raises(InputError, match=r"hobbit: the experts' pools need .* of 'hbm' are left beside the rest of 'tiny'"):
        hobbit_of(world, machine=with_memory(world.machine, "hbm", rest + kv + pools - 1))
    slow = model.num_moe_layers * model.num_experts * versions.slow_bytes
    hobbit_of(world, machine=with_memory(world.machine, "dram", slow))
    with pytest.raises(InputError, match=r"the experts of 'tiny' need .* in all widths, but 'dram' holds"):
        hobbit_of(world, machine=with_memory(world.machine, "dram", slow - 1))


@pytest.mark.parametrize(("options", "message"), [
    ({"policy": OffloadPolicy("load", write_back=True)}, "hobbit: .* give miss: load without write_back"),
    ({"prefetch_bits": "half"}, "prefetch_bits must be one of mixed, high, low, got 'half'"),
    ({"dequantize_share": -0.1}, "dequantize_share must be finite and not negative, got -0.1"),
    ({"versions": "other"}, r"needs exclusive copies of 4 and 16 bits, got \[2, 16\]"),
    ({"versions": "one"}, "both copies of every expert must lie on the slow tier"),
    ({"trace": None}, "no gate weights, by which it chooses widths")])
def test_a_hobbit_program_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    """Other ways to handle a miss, unknown widths, versions that do not fit the rule, a trace without weights."""
    world = random_world(3)
    made = {"other": exclusive_versions(world.model, (2, 16)),
            "one": dataclasses.replace(exclusive_versions(world.model, (4, 16)), on_slow_tier=(1,))}
    if "versions" in options:
        options = {"versions": made[str(options["versions"])]}
    if "trace" in options:
        options = {"trace": dataclasses.replace(world.trace, gate_weights=None)}
    with pytest.raises(InputError, match=message):
        hobbit_of(world, **options)


def test_a_cache_of_other_sizes_is_refused() -> None:
    """EdgeMoE's buffer must know the bytes of the chosen widths."""
    world = random_world(3)
    model = world.model
    choice = BitChoice(np.full((model.num_moe_layers, model.num_experts), 4), 0.0, 0.0, 4, 4, 0, 0)
    sizes = expert_bytes_of(choice.bits, edgemoe_versions(model, choice))
    cache = ByteCache(model.num_moe_layers, model.num_experts, 10**6, sizes + 1, make_policy("lru", world.context()))
    with pytest.raises(InputError, match="must hold experts of the chosen widths"):
        EdgeMoeProgram(model, world.trace, world.steps, world.machine, CostModel(world.machine.hardware), cache,
                       world.policy, choice, edgemoe_versions(model, choice, Quantization()))


@pytest.mark.parametrize(("change", "message"), [
    ("budget", r"d2moe: step \d+ needs \d+ bytes of experts in layer \d+ at once, but the budget is"),
    ("levels", "levels must be .* below"), ("order", "one of hebf, id, got 'best'"),
    ("shape", "the plane cache is of 9 layers x")])
def test_a_d2moe_program_that_cannot_be_is_refused(change: str, message: str) -> None:
    """A budget below a layer of a step, levels of another shape, an unknown order, a cache of another model."""
    world = random_world(3)
    good = d2moe_program(world)
    versions, budget = good.versions, good.planes.budget_bytes
    layers = 9 if change == "shape" else world.model.num_moe_layers
    planes = PlaneCache(layers, world.model.num_experts, versions.weight_bytes(0) if change == "budget" else budget, versions)
    levels = good.levels[:, :, :0] if change == "levels" else good.levels
    levels = np.full_like(good.levels, 9) if change == "levels" else levels
    with pytest.raises(InputError, match=message):
        D2MoeProgram(world.model, world.trace, world.steps, world.machine, CostModel(world.machine.hardware), planes,
                     world.policy, levels, order="best" if change == "order" else "hebf")


def test_a_debit_needs_a_run() -> None:
    """Before it there is nothing to report."""
    with pytest.raises(CheckError, match="has not run yet"):
        hobbit_of(random_world(3)).debit()
