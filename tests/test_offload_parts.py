"""Every prefetcher, miss rule, allocation and tier in one program: slots stay in order, executors agree, counts add up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_lowering_offload import Ran, check_slots, machine_of, offload_of, run

from moesim.cache.prefetch import PREFETCHERS, needs_recall
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.lowering.expert_times import ExpertTimes
from moesim.lowering.misses.makespan import makespan_ns
from moesim.lowering.misses.registry import MISS_RULES, make_rule
from moesim.lowering.offload_policy import MISSES
from moesim.scenario.allocation import slots_by_layer
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point
from moesim.simulate.compiled_executor import execute_program
from moesim.simulate.compiled_offload import supports

RULES = [name for name in MISS_RULES.names() if name not in MISSES]
AHEAD = [name for name in PREFETCHERS.names() if name not in ("none", "finemoe")]  # finemoe needs scores of all experts


def case(**options: object) -> Offload:
    """A small case with two requests at once."""
    return offload_of(machine_of(), batch=2, steps=8, num_experts=7, num_layers=4, **options)  # type: ignore[arg-type]


def point_of(prefetch: str = "none", **changes: object) -> Point:
    """Three slots, width 3, and a recall where one must be stated."""
    recall = 0.8 if needs_recall(prefetch) else None
    return dataclasses.replace(
        Point("lru", 3, prefetch, 0 if prefetch == "none" else 3, recall), **changes)  # type: ignore[arg-type]


def checked(offload: Offload, point: Point) -> Ran:
    """Run a point on both executors and check what holds for each."""
    done = run(offload, point)
    check_slots(done)
    again = offload.program(point, CostModel(offload.machine.hardware))
    assert execute_program(again).table().equals(done.table)
    counts = done.counts
    assert counts["accesses"] == counts["hits"] + counts["late_hits"] + counts["misses"]
    met = counts["useful_prefetches"] + counts["late_prefetches"] + counts["useless_prefetches"]
    assert met <= counts["prefetches"] <= met + offload.model.num_pool_experts
    computed = done.tasks["kind"].isin(("expert", "cpu_expert")).sum()
    assert computed == counts["accesses"]
    return done


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("prefetch", AHEAD)
def test_every_prefetcher(prefetch: str, shared: bool) -> None:
    """Copies ahead of any layer never spoil a slot in use, and each prefetch is counted once."""
    offload = case(shared=shared)
    for miss in ("load", "hybrimoe"):
        done = checked(offload, point_of(prefetch, miss=miss))
        assert done.counts["cancelled_prefetches"] <= done.counts["useless_prefetches"]
        assert done.program.rule is None or not supports(done.program)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str) -> None:
    """A layer's experts all run once, whoever computes them."""
    for shared in (False, True):
        checked(case(shared=shared), point_of(miss=rule))


def test_a_rule_that_loads_everything_does_what_the_policy_load_does() -> None:
    """``load`` as a rule and ``load`` as a policy take the same time and count the same."""
    offload = case()
    plain, ruled = run(offload, point_of(miss="load")), run(offload, point_of(miss="gpu-only"))
    assert plain.elapsed_ns == ruled.elapsed_ns
    assert plain.counts == ruled.counts


def test_deferred_experts_end_the_next_layer() -> None:
    """KTransformers' deferral takes the CPU's last experts out of the layer, and only the last layer waits for all."""
    offload = case()
    plain = run(offload, point_of(miss="ktransformers"))
    late = run(offload, point_of(miss="ktransformers", miss_options=(("defer", 2),)))
    assert late.elapsed_ns < plain.elapsed_ns
    assert len(late.tasks) == len(plain.tasks)
    heads = late.table[late.table["kind"] == "head"]
    on_cpu = late.table[late.table["kind"] == "receive"]
    for step, start in zip(heads["step"], heads["start_ns"], strict=True):
        assert on_cpu[on_cpu["step"] == step]["end_ns"].max() <= start


def test_the_makespan_of_a_layer_is_the_simulators() -> None:
    """The timing model of the rules gives what the simulator takes from router to barrier, for every rule and layer."""
    offload = dataclasses.replace(case(), chunks=1)
    for rule in ("hybrimoe", "exact", "dali", "fiddler", "ktransformers"):
        point = point_of(miss=rule)
        done = run(offload, point)
        times = ExpertTimes(offload.model, offload.machine, CostModel(offload.machine.hardware), 1, on_cpu=True)
        table = done.table
        layer = table[(table["step"] == 0) & (table["layer"] == 0)]
        router = layer[layer["kind"] == "router"].iloc[0]
        barrier = layer[layer["kind"] == "barrier"].iloc[0]
        ran = layer[layer["kind"].isin(("expert", "cpu_expert"))]
        experts = sorted(ran["expert"].tolist())
        tokens = ran.set_index("expert")["tokens"]
        held = set(done.preload.values())
        work = times.layer(experts, [int(tokens[e]) for e in experts], [e in held for e in experts])
        assert makespan_ns(work, make_rule(rule).assign(work)) == barrier["end_ns"] - router["end_ns"]


@pytest.mark.parametrize("allocation", ["plec", "adapmoe", "measured"])
def test_every_allocation_gives_all_slots_to_layers(allocation: str) -> None:
    """The slots sum to what was asked for, each layer has one to all, and the program runs with them."""
    offload = offload_of(machine_of(), steps=8, num_experts=7, num_layers=4)
    point = point_of(allocation=allocation)
    slots = slots_by_layer(point, offload)
    assert slots.sum() == 12
    assert np.all((slots >= 1) & (slots <= 7))
    assert checked(offload, point).program.cache.num_slots == 12
    with pytest.raises(InputError, match="shared: false"):
        slots_by_layer(point, dataclasses.replace(offload, shared=True))


def test_finemoe_says_what_a_trace_must_hold() -> None:
    """Gate weights of the chosen experts are not the router's probabilities."""
    with pytest.raises(InputError, match="router's probabilities"):
        run(case(), point_of("finemoe"))


def test_a_host_tier_serves_rules_and_prefetchers() -> None:
    """With experts on flash and some on the host every part works as with experts in DRAM."""
    offload = offload_of(machine_of(memory="flash"), batch=2, steps=6, num_experts=7, host_slots_per_layer=3)
    for point in (point_of("hobbit"), point_of(miss="hybrimoe"), point_of("moe-infinity", miss="cpu")):
        done = checked(offload, point)
        assert 0 < done.counts["host_hits"] < done.counts["host_accesses"]


def test_writing_back_costs_time_only_where_the_wire_is_shared() -> None:
    """Mixtral-offloading's swap is free on a full-duplex link."""
    plain, swapped = (run(case(write_back=back), point_of()) for back in (False, True))
    assert swapped.elapsed_ns == plain.elapsed_ns
    assert (swapped.tasks["kind"] == "write_back").sum() > 0
