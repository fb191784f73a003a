"""Refreshing a GPU's experts: costs as simulated, schedules against brute force, formulas against runs."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.cache import ExpertCache
from moesim.cache.policy import PolicyContext, make_policy
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.hardware.spec import Device, HardwareSpec, Link, Memory
from moesim.lowering.machine import OffloadMachine, offload_machine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.lowering.refresh import (
    RefreshCosts,
    RefreshProblem,
    refresh_costs,
    refresh_problem,
    run_schedule,
    target_sets,
    top_sets,
)
from moesim.lowering.refresh_derived import (
    IntervalCurves,
    block_start_swaps,
    drift_rate,
    empirical_curves,
    empirical_sides,
    empirical_swaps,
    geometric_misses,
    geometric_swaps,
)
from moesim.lowering.refresh_hbm import coreset_rows
from moesim.lowering.refresh_policies import (
    FixedInterval,
    Never,
    RefreshPolicy,
    SkiRental,
    best_fixed_interval,
    run_policy,
)
from moesim.lowering.refresh_rows import POLICIES, diffusion_rows
from moesim.lowering.refresh_schedule import (
    BlockPattern,
    edge_costs,
    optimal_schedule,
    shortest_schedule,
    train_pattern,
)
from moesim.model.catalog import load_model
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.simulate.run import simulate
from moesim.traces.coresets import des_seq, des_vote
from moesim.traces.denoise import DenoiseSettings, denoise_scored, denoise_trace
from moesim.traces.denoise_passes import DenoisePasses, denoise_passes
from moesim.traces.steps import Step
from moesim.traces.trace import DENOISE, RoutingTrace

DIFFUSION_MD = Path(__file__).parent.parent / "docs/diffusion.md"


def tiny_model(num_layers: int = 2, num_experts: int = 6, top_k: int = 2) -> ModelSpec:
    """A model whose experts take 36864 bytes."""
    return ModelSpec(
        name="tiny", num_layers=num_layers, moe_layers=tuple(range(num_layers)), num_experts=num_experts,
        top_k=top_k, hidden_size=64, expert_intermediate_size=96, attention=AttentionSpec(4, 2, 16), vocab_size=128)


def machine_of(memory: str = "dram") -> OffloadMachine:
    """A GPU and a CPU with DRAM of its own, joined by PCIe."""
    return OffloadMachine(HardwareSpec(
        "box",
        devices={"gpu": Device("gpu", "gpu", "hbm", {"bf16": 1e12}, 1e-6),
                 "cpu": Device("cpu", "cpu", "dram", {"bf16": 1e11}, 1e-6)},
        memories={"hbm": Memory("hbm", "hbm", 1e9, 10e9), "dram": Memory("dram", "dram", 1e9, 2e9),
                  "flash": Memory("flash", "flash", 1e9, 1e9)},
        links={"pcie": Link("pcie", "dram", "hbm", "pcie", 1e9, 1e-6),
               "nvme": Link("nvme", "flash", "dram", "nvme", 5e8, 1e-6)}), "gpu", memory, "cpu")


def passes_of(counts: np.ndarray, blocks: tuple[int, ...]) -> DenoisePasses:
    """Passes with counts int64[step, layer, expert] in blocks of these lengths; one request."""
    block = np.repeat(np.arange(len(blocks)), blocks)
    step = np.concatenate([np.arange(length) for length in blocks])
    ones = np.ones(len(counts), np.int64)
    return DenoisePasses(counts, tuple(np.arange(1) for _ in counts), 0 * ones, block, step, ones, ones)


def problem_of(counts: np.ndarray, blocks: tuple[int, ...], budget: int, *, in_ns: int = 50, out_ns: int = 0,
               overlap: bool = True) -> RefreshProblem:
    """A problem with calls of 10 + n ns on the GPU and 40 + 3 n ns on the CPU."""
    tokens = np.arange(counts.max() + 1)
    costs = RefreshCosts(np.where(tokens, 10 + tokens, 0), np.where(tokens, 40 + 3 * tokens, 0), in_ns, out_ns, overlap)
    prior = np.zeros(counts.shape[1:], np.int64)
    return RefreshProblem(passes_of(counts, blocks), costs, budget, top_sets(prior, budget),
                          target_sets(counts, budget, prior), np.full(len(counts), 7))


def walk(problem: RefreshProblem, layer: int, steps: set[int]) -> int:
    """The cost of one layer's schedule, with sets of experts, step by step, straight from the description."""
    costs, counts = problem.costs, problem.passes.counts[:, layer]
    resident = set(np.flatnonzero(problem.initial[layer]).tolist())
    history = [0] * counts.shape[1]
    total = 0
    for step, own in enumerate(counts.tolist()):
        if step in steps:
            order = sorted(range(len(own)), key=lambda e: (-own[e], -history[e], e))
            wanted = set(order[:problem.budget])
            total += len(wanted - resident) * costs.in_ns + len(resident - wanted) * costs.out_ns
            resident = wanted
        gpu = sum(10 + n for e, n in enumerate(own) if n and e in resident)
        cpu = sum(40 + 3 * n for e, n in enumerate(own) if n and e not in resident)
        total += max(gpu, cpu) if costs.overlap else gpu + cpu
        history = [a + b for a, b in zip(history, own, strict=True)]
    return total


def schedules(num_steps: int) -> Iterator[set[int]]:
    """All sets of steps."""
    for bits in itertools.product((False, True), repeat=num_steps):
        yield {step for step, bit in enumerate(bits) if bit}


@st.composite
def problems(draw: st.DrawFn, max_steps: int = 7, num_layers: int = 2) -> RefreshProblem:
    """Small problems with few tokens, so that ties and idle experts are common."""
    blocks = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    while sum(blocks) > max_steps:
        blocks = blocks[:-1]
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    counts = rng.multinomial(draw(st.integers(1, 8)), rng.dirichlet(np.full(5, 0.5)), size=(sum(blocks), num_layers))
    return problem_of(counts, blocks, draw(st.integers(1, 5)), in_ns=draw(st.sampled_from([0, 15, 60, 300])),
                      out_ns=draw(st.sampled_from([0, 40])), overlap=draw(st.booleans()))


@cache
def drifting(num_steps: int = 200, num_layers: int = 3, *, routed: str = "block") -> DenoisePasses:
    """Passes of a fitted trace with 64 experts, cut to a length."""
    own = DenoiseSettings(2, num_layers, num_experts=64, top_k=4, blocks_per_request=9, prompt_tokens=0, routed=routed)
    passes = denoise_passes(denoise_trace(own, seed=3))
    cut = {name: getattr(passes, name)[:num_steps]
           for name in ("counts", "rows", "request", "block", "step_in_block", "active", "block_end")}
    return DenoisePasses(**cut)


@cache
def drifting_problem(num_steps: int = 200, budget: int = 20, *, out_ns: int = 0, overlap: bool = True,
                     in_ns: int = 5000) -> RefreshProblem:
    """A problem on the fitted passes: CPU calls of some 4 us, GPU calls of 1 us."""
    passes = drifting(num_steps)
    tokens = np.arange(int(passes.counts.max()) + 1)
    costs = RefreshCosts(np.where(tokens, 1000 + tokens, 0), np.where(tokens, 4000 + 30 * tokens, 0), in_ns, out_ns, overlap)
    prior = np.zeros(passes.counts.shape[1:], np.int64)
    return RefreshProblem(passes, costs, budget, top_sets(prior, budget), target_sets(passes.counts, budget, prior),
                          np.zeros(passes.num_steps, np.int64))


@settings(max_examples=60)
@given(problems(), st.integers(0, 2**14 - 1))
def test_a_run_agrees_with_the_description(problem: RefreshProblem, bits: int) -> None:
    """Any schedule, layer by layer, costs what a walk with plain sets finds."""
    flat = np.array([bits >> place & 1 for place in range(14)], bool)
    refresh = flat[:2 * problem.num_steps].reshape(problem.num_steps, 2)
    result = run_schedule(problem, refresh)
    expected = [walk(problem, layer, set(np.flatnonzero(refresh[:, layer]).tolist())) for layer in range(2)]
    assert result.layer_ns.tolist() == expected
    assert result.total_ns == sum(expected) + 7 * problem.num_steps


@settings(max_examples=40)
@given(problems())
def test_the_best_schedule_by_brute_force(problem: RefreshProblem) -> None:
    """Each layer's own schedule, the common one and one with forced refreshes are the best of all schedules."""
    table = [{frozenset(steps): walk(problem, layer, steps) for steps in schedules(problem.num_steps)} for layer in range(2)]
    own = optimal_schedule(problem)
    assert own.schedule_ns == sum(min(costs.values()) for costs in table)
    common = optimal_schedule(problem, common=True)
    assert common.schedule_ns == min(table[0][steps] + table[1][steps] for steps in table[0])
    starts = problem.passes.block_starts
    must = set(np.flatnonzero(starts).tolist())
    forced = optimal_schedule(problem, forced=starts)
    assert forced.schedule_ns == sum(min(cost for steps, cost in costs.items() if must <= steps) for costs in table)
    for best in (own, common, forced):
        assert run_schedule(problem, best.refresh).schedule_ns == best.schedule_ns
    assert (common.refresh == common.refresh[:, :1]).all()
    assert forced.refresh[starts].all()


@pytest.mark.parametrize(("in_ns", "out_ns", "overlap"), [(60, 0, True), (25, 25, False)])
def test_the_best_of_4096_schedules(in_ns: int, out_ns: int, overlap: bool) -> None:
    """Twelve passes: one of all 2^12 schedules, neither the empty nor the full one."""
    rng = np.random.default_rng(5)
    mean = np.abs(np.cumsum(rng.normal(size=(12, 8)), axis=0)) + 0.1
    counts = np.stack([rng.multinomial(9, row / row.sum()) for row in mean])[:, None]
    problem = problem_of(counts, (5, 7), 3, in_ns=in_ns, out_ns=out_ns, overlap=overlap)
    best = optimal_schedule(problem)
    assert best.schedule_ns == min(walk(problem, 0, steps) for steps in schedules(12))
    assert 0 < best.refresh.sum() < 12


def test_the_best_schedule_is_networkx_shortest_path() -> None:
    """On 200 passes the dynamic program finds the length that networkx finds in the same graph."""
    problem = drifting_problem()
    for layer in range(problem.num_layers):
        edges = edge_costs(problem, layer)
        graph = nx.DiGraph()
        graph.add_weighted_edges_from((i, j, int(edges[i, j])) for i, j in itertools.combinations(range(len(edges)), 2))
        steps, cost = shortest_schedule(edges)
        assert cost == nx.dijkstra_path_length(graph, 0, len(edges) - 1)
        assert 3 < len(steps) < 100


@pytest.mark.parametrize(("out_ns", "overlap"), [(0, True), (0, False), (5000, True), (5000, False)])
def test_nothing_with_these_sets_beats_the_best_schedule(out_ns: int, overlap: bool) -> None:
    """Fixed intervals, ski-rental, patterns and never are at or above it; own schedules are at or below common ones."""
    problem = drifting_problem(out_ns=out_ns, overlap=overlap)
    best, common = optimal_schedule(problem).schedule_ns, optimal_schedule(problem, common=True).schedule_ns
    policies: list[RefreshPolicy] = [Never(), SkiRental(), SkiRental(0.3), train_pattern(problem)]
    others = [run_policy(problem, policy).schedule_ns for policy in policies]
    intervals = [*best_fixed_interval(problem).schedule_ns, *best_fixed_interval(problem, reset_at_block=False).schedule_ns]
    assert best < common < min(intervals)
    assert best < min(others)


def pattern_of(*blocks: list[bool], layers: int = 2) -> BlockPattern:
    """The same pattern for all layers."""
    return BlockPattern(np.repeat(np.array(blocks)[:, :, None], layers, axis=2))


@settings(max_examples=40)
@given(problems(max_steps=8), st.sampled_from([1, 2]))
def test_a_trained_pattern_is_the_best_pattern(problem: RefreshProblem, cycle: int) -> None:
    """Of all patterns that begin with a refresh, blocks of different lengths included (all are tried)."""
    longest = int(problem.passes.steps_per_block().max())
    plans = itertools.product((False, True), repeat=cycle * longest - 1)
    patterns = [pattern_of(*np.array([True, *bits]).reshape(cycle, longest).tolist()) for bits in plans]
    results = [run_policy(problem, pattern).layer_ns for pattern in patterns]
    own = train_pattern(problem, blocks_per_cycle=cycle)
    assert run_policy(problem, own).layer_ns.tolist() == np.min(results, axis=0).tolist()
    common = train_pattern(problem, common=True, blocks_per_cycle=cycle)
    assert run_policy(problem, common).schedule_ns == min(int(layers.sum()) for layers in results)
    assert (common.refresh == common.refresh[..., :1]).all()


def test_a_pattern_on_blocks_that_end_early() -> None:
    """What a block does not reach is done at the next block's start; a cycle starts anew with a request."""
    counts = np.ones((12, 2, 5), np.int64)
    problem = problem_of(counts, (2, 4, 1, 3, 2), 2)

    def steps(pattern: BlockPattern, on: RefreshProblem) -> list[int]:
        return np.flatnonzero(pattern.schedule(on)[:, 0]).tolist()

    assert steps(pattern_of([True, False, True]), problem) == [0, 2, 4, 6, 7, 9, 10]
    two = pattern_of([True, False, True], [False, True, False])
    assert steps(two, problem) == [0, 2, 3, 6, 7, 8, 10]  # block 0 is too short for its third pass, block 2 too
    passes = dataclasses.replace(problem.passes, request=np.repeat([0, 1], [6, 6]))
    assert steps(two, dataclasses.replace(problem, passes=passes)) == [0, 2, 3, 6, 7, 8, 10]
    passes = dataclasses.replace(problem.passes, request=np.repeat([0, 1], [2, 10]))
    assert steps(two, dataclasses.replace(problem, passes=passes)) == [0, 2, 4, 7, 9, 11]


def test_a_pattern_is_no_worse_than_an_interval_where_it_was_trained() -> None:
    """Fixed intervals that start anew in each block are patterns, and longer cycles hold shorter ones."""
    problem = drifting_problem()
    costs = [run_policy(problem, train_pattern(problem, common=True, blocks_per_cycle=cycle)).schedule_ns
             for cycle in (1, 3, 9)]
    assert costs[0] <= best_fixed_interval(problem).schedule_ns.min()
    assert costs[2] < costs[1] < costs[0]
    assert optimal_schedule(problem, common=True).schedule_ns < costs[2]


def test_intervals_count_as_told() -> None:
    """Anew in each block or on and on; the released code refreshes at every pass of a request's first block."""
    problem = problem_of(np.ones((9, 1, 4), np.int64), (4, 5), 2)

    def steps(policy: RefreshPolicy) -> list[int]:
        return np.flatnonzero(policy.schedule(problem)[:, 0]).tolist()

    assert steps(FixedInterval(3)) == [0, 3, 4, 7]
    assert steps(FixedInterval(3, reset_at_block=False)) == [0, 3, 6]
    assert steps(FixedInterval(3, every_step_of_first_block=True)) == [0, 1, 2, 3, 4, 7]
    assert steps(FixedInterval(1)) == list(range(9))
    assert steps(Never()) == []


def test_the_released_code_demotes_by_id() -> None:
    """It brings in used experts only and evicts the lowest ids among the others, though the paper says the least used."""
    counts = np.array([[[0, 0, 0, 5, 1]], [[2, 1, 0, 0, 4]]])
    problem = problem_of(counts, (2,), 3)  # {0, 1, 2} at first
    every = np.ones((2, 1), bool)
    paper, code = run_schedule(problem, every), run_schedule(problem, every, contents="released")
    # step 0: paper {3, 4, 0}; code takes in 3 and 4 for 0 and 1 -> {2, 3, 4}
    # step 1: paper {4, 0, 1}; code wants 4, 0, 1, takes in 0 and 1 for 2 and 3
    assert (paper.promotions[:, 0].tolist(), code.promotions[:, 0].tolist()) == ([2, 1], [2, 2])
    later = run_schedule(problem, np.array([[True], [False]]), contents="released")
    assert later.misses[:, 0].tolist() == [0, 2]  # 0 and 1 are gone; the paper's set still has 0
    assert run_schedule(problem, np.array([[True], [False]])).misses[:, 0].tolist() == [0, 1]


@settings(max_examples=40)
@given(problems(), st.integers(0, 6), st.sampled_from(["counts", "released"]))
def test_calls_and_tokens_are_conserved(problem: RefreshProblem, tau: int, contents: str) -> None:
    """Each used expert is one call on one side, as many experts leave as come, and writing back is paid for."""
    result = run_policy(problem, FixedInterval(tau + 1), contents=contents)
    counts = problem.passes.counts
    resident = problem.initial.sum(axis=1)
    assert (result.promotions == result.demotions).all()
    assert (result.misses <= (counts > 0).sum(axis=2)).all()
    assert (result.promotions <= resident).all()
    every = problem.call_gpu_ns.sum(axis=2)
    missed = result.cpu_ns - 40 * result.misses - 3 * result.miss_tokens
    assert not missed.any()
    assert (result.gpu_ns == every - 10 * result.misses - result.miss_tokens).all()
    assert (result.move_ns == result.promotions * (problem.costs.in_ns + problem.costs.out_ns)).all()
    assert not result.move_ns[~result.refreshed].any()


@settings(max_examples=30)
@given(problems(), st.integers(1, 5), st.integers(0, 99))
def test_sets_and_online_decisions_do_not_know_the_future(problem: RefreshProblem, cut: int, seed: int) -> None:
    """Other routing after a pass changes neither the sets nor what ski-rental did up to it."""
    cut = min(cut, problem.num_steps)
    counts = problem.passes.counts.copy()
    counts[cut:] = np.random.default_rng(seed).integers(0, 4, counts[cut:].shape)
    prior = np.zeros(counts.shape[1:], np.int64)
    assert np.array_equal(target_sets(counts, problem.budget, prior)[:cut], problem.targets[:cut])
    other = problem_of(counts, tuple(problem.passes.steps_per_block()), problem.budget, in_ns=problem.costs.in_ns,
                       out_ns=problem.costs.out_ns, overlap=problem.costs.overlap)
    assert np.array_equal(SkiRental().schedule(other)[:cut], SkiRental().schedule(problem)[:cut])


def test_ski_rental_pays_rent_up_to_the_price() -> None:
    """A set that costs 33 ns more per pass is replaced at the second pass when the move costs 60 ns, with factor 2 at the fourth."""
    counts = np.tile(np.array([[[0, 0, 1]]]), (6, 1, 1))
    problem = problem_of(counts, (6,), 1, in_ns=60, overlap=False)  # a miss takes 43 ns, a hit 11
    for factor, at in ((1.0, 1), (2.0, 3), (0.01, 0)):
        assert np.flatnonzero(SkiRental(factor).schedule(problem)).tolist() == [at]


def test_overlap_is_never_slower_and_writing_back_never_faster() -> None:
    """The same schedule: the two sides at once take at most their sum, and a second copy adds its time."""
    policy = FixedInterval(4)
    together, serial = (run_policy(drifting_problem(overlap=overlap), policy) for overlap in (True, False))
    assert (together.experts_ns < serial.experts_ns).any()
    assert (serial.experts_ns == together.gpu_ns + together.cpu_ns).all()
    both_ways = run_policy(drifting_problem(out_ns=5000), policy)
    assert np.array_equal(both_ways.move_ns, 2 * together.move_ns)


def one_pass(expert_ids: list[list[int]]) -> RoutingTrace:
    """A trace of one denoising pass over one layer."""
    ids = np.array(expert_ids)[:, None, :]
    tokens = len(ids)
    return RoutingTrace(ids, np.zeros(tokens, int), np.arange(tokens), np.full(tokens, DENOISE), np.zeros(tokens, int), 6,
                        np.arange(1), metadata={"denoise": {"block_size": tokens, "prompt_tokens": 0}})


@pytest.mark.parametrize(("budget", "on_cpu"), [(1, 1), (2, 0)])
def test_costs_are_those_of_the_simulated_offload(budget: int, on_cpu: int) -> None:
    """With one miss the CPU's path is one chain, with none the GPU's calls follow one another: SimPy finds the same times."""
    model, machine = tiny_model(1), machine_of()
    cost = CostModel(machine.hardware)
    trace = one_pass([[0, 1], [0, 1], [0, 1]])
    passes = denoise_passes(trace)
    problem = refresh_problem(model, trace, passes, machine, cost, budget)
    found = run_policy(problem, Never())
    cache = ExpertCache(1, 6, budget, make_policy("static", PolicyContext(1, 6, np.arange(6, 0, -1)[None].astype(float), None)))
    cache.preload(range(budget))
    program = OffloadProgram(model, trace, [Step(0, "denoise", np.arange(3), np.zeros(3, np.int32))], machine, cost, cache,
                             OffloadPolicy("cpu", admit=False))
    tasks = simulate(program, name="one").tasks
    routed = tasks[tasks["kind"].isin(["expert", "send", "cpu_expert", "receive"])]
    assert (routed["kind"] == "cpu_expert").sum() == on_cpu == found.misses.sum()
    assert routed["end_ns"].max() - routed["start_ns"].min() == found.experts_ns.sum()
    gpu = routed[routed["kind"] == "expert"]
    assert gpu["duration_ns"].sum() == found.gpu_ns.sum()


def test_prices_come_from_the_cost_model() -> None:
    """One expert's call and copy by the nameplate, a CPU call is bound by its weights and not by its tokens."""
    model, machine = tiny_model(), machine_of()
    costs = refresh_costs(model, machine, CostModel(machine.hardware), 4, write_back=True)
    flops, rows = 2 * 3 * 64 * 96, 2 * 64  # per token; bytes of a row
    call = [1000 + round(1e9 * (36864 + n * 2 * (64 + 96) * 2) / 2e9) for n in range(1, 5)]
    way = [1000 + n * rows for n in range(1, 5)]
    assert flops / 1e11 < 36864 / 2e9
    assert costs.cpu_ns[1:].tolist() == [a + 2 * b for a, b in zip(call, way, strict=True)]
    assert costs.cpu_ns[4] < 1.2 * costs.cpu_ns[1]
    assert (costs.in_ns, costs.out_ns) == (37864, 37864)
    assert refresh_costs(model, machine, CostModel(machine.hardware), 4).out_ns == 0


def test_the_rest_of_a_pass_is_priced() -> None:
    """Attention, router and head of both layers; block tokens attend to the whole block, the prefix to what is before it."""
    model, machine = tiny_model(), machine_of()
    cost = CostModel(machine.hardware)
    for routed, tokens, context in (("block", 4, 4 * 10), ("prefix", 10, 4 * 10 + 21)):
        own = DenoiseSettings(1, 2, num_experts=6, top_k=2, blocks_per_request=1, block_size=4, prompt_tokens=6, accept=1.0,
                              routed=routed)
        trace = denoise_trace(own, seed=1)
        problem = refresh_problem(model, trace, denoise_passes(trace), machine, cost, 2)
        attention = 2 * (64 * 64 + 64 * 32)  # query and output, key and value
        weights = [2 * attention + context * 128 + 2 * tokens * 128, 2 * 64 * 6 + 2 * tokens * 128, 2 * 64 * 128 + 2 * 4 * 128]
        parts = [1000 + round(num_bytes / 10) for num_bytes in weights]
        assert problem.other_ns.tolist() == [2 * parts[0] + 2 * parts[1] + parts[2]]


def test_geometric_swaps_per_step_hardly_fall() -> None:
    """S(tau) / tau goes to B d for small d tau; the ratios to B d are those of the derivation."""
    for drift in (1e-5, 1e-4):
        for tau in (1, 7, 32):
            assert geometric_swaps(128, drift, tau) / tau == pytest.approx(128 * drift, rel=drift * tau)
    table = {(0.02, 8): 0.933, (0.02, 32): 0.744, (0.1, 8): 0.712, (0.1, 32): 0.302}
    for (drift, tau), ratio in table.items():
        assert geometric_swaps(1, drift, tau) / (tau * drift) == pytest.approx(ratio, abs=1e-3)


def test_geometric_misses_run_from_the_first_to_the_last_hit() -> None:
    """A fresh set misses m0; a set that is gone misses what its experts carried, as the expected share of the displaced."""
    assert geometric_misses(0, 0.3, at_once=5, routed=256) == 5
    assert geometric_misses(9, 1.0, at_once=5, routed=256) == 256
    assert geometric_misses(2, 0.5, at_once=0, routed=100, displaced=0.4) == pytest.approx(100 * 0.4 * 0.75)


def test_real_churn_comes_back() -> None:
    """Experts at the budget's edge flicker: sets drift apart far more slowly than the geometric form fitted at lag 1 says."""
    problem = drifting_problem()
    measured = np.array([empirical_swaps(problem, tau).mean() for tau in (1, 2, 4, 8)])
    drift = float(drift_rate(problem).mean())
    assert drift == pytest.approx(measured[0] / 20)
    geometric = np.array([geometric_swaps(20, drift, tau) for tau in (1, 2, 4, 8)])
    assert (measured[1:] < 0.9 * geometric[1:]).all()
    assert (np.diff(measured / geometric) < 0).all()
    per_step = measured / [1, 2, 4, 8]
    assert (np.diff(per_step) < 0).all()
    assert per_step[-1] < 0.5 * per_step[0]  # the geometric form keeps 0.7 of it


def test_a_new_block_is_the_big_refresh() -> None:
    """More experts change from the last pass of a block to the next block than over most of a block."""
    problem = drifting_problem()
    assert (block_start_swaps(problem, 0) > 1.5 * empirical_swaps(problem, 8)).all()


def test_curves_are_counted_pair_by_pair() -> None:
    """Swaps, sides and block starts against loops over all pairs of passes."""
    problem = drifting_problem(60)
    block, layer = problem.passes.block_index(), 1
    sets = [set(np.flatnonzero(row).tolist()) for row in problem.targets[:, layer]]
    pairs = [(i, i + 3) for i in range(57) if block[i] == block[i + 3]]
    assert empirical_swaps(problem, 3)[layer] == pytest.approx(np.mean([len(sets[j] - sets[i]) for i, j in pairs]))
    gpu = [sum(int(problem.call_gpu_ns[j, layer, e]) for e in sets[i]) for i, j in pairs]
    assert empirical_sides(problem, 3)[0][layer] == pytest.approx(np.mean(gpu))
    cpu = [int(problem.call_cpu_ns[j, layer].sum()) - sum(int(problem.call_cpu_ns[j, layer, e]) for e in sets[i])
           for i, j in pairs]
    assert empirical_sides(problem, 3)[1][layer] == pytest.approx(np.mean(cpu))
    starts = [s for s in np.flatnonzero(problem.passes.block_starts).tolist() if s]
    assert block_start_swaps(problem, 0)[layer] == pytest.approx(np.mean([len(sets[s] - sets[s - 1]) for s in starts]))


def test_the_empirical_form_predicts_a_run() -> None:
    """Mean curves, with the move at a block's start measured too, come within 4 % of the run for every interval."""
    problem = drifting_problem(overlap=False)
    lengths = problem.passes.steps_per_block()
    curves = [empirical_curves(problem, layer) for layer in range(3)]
    for tau in (1, 2, 3, 5, 8):
        start = block_start_swaps(problem, 0) * 5000
        predicted = sum(curve.block_ns(tau, int(length), start_ns=float(start[layer]))
                        for layer, curve in enumerate(curves) for length in lengths)
        assert predicted == pytest.approx(run_policy(problem, FixedInterval(tau)).schedule_ns, rel=0.04)


def test_a_cost_per_token_picks_another_interval() -> None:
    """A CPU call costs about the same for one token and for many; the same total priced per assignment misleads."""
    problem = drifting_problem(overlap=False, in_ns=3000)
    assignments = int(problem.passes.counts.sum())
    per_token = round(problem.call_cpu_ns.sum() / assignments)  # the same CPU time in all, if everything were missed
    tokens = np.arange(len(problem.costs.cpu_ns))
    linear = dataclasses.replace(problem.costs, cpu_ns=tokens * per_token)
    other = dataclasses.replace(problem, costs=linear)
    assert other.call_cpu_ns.sum() == pytest.approx(problem.call_cpu_ns.sum(), rel=0.01)
    right, wrong = best_fixed_interval(problem), best_fixed_interval(other)
    assert right.schedule_ns[wrong.tau - 1] > right.schedule_ns[right.tau - 1]


def test_interval_curves_add_up() -> None:
    """A block of 5 steps with tau 2: three refreshes, ages 0 1 0 1 0; a dearer start is paid once."""
    curves = IntervalCurves(lambda tau: 100.0 * tau, lambda age: 5.0, lambda age: 3.0 + 10 * age, overlap=True)
    assert curves.block_ns(2, 5) == 3 * 200 + 3 * 5 + 2 * 13
    assert curves.block_ns(2, 5, start_ns=1000) == 1000 + 2 * 200 + 41
    assert dataclasses.replace(curves, overlap=False).block_ns(2, 5) == 3 * 200 + 41 + 3 * 3 + 2 * 5
    assert curves.best_tau(5) == 1  # 5 * 100 + 5 * 5 = 525, before 3 * 200 + 41, ..., 500 + 117
    assert dataclasses.replace(curves, move_ns=lambda tau: 100.0).best_tau(5) == 5


def test_which_tokens_count_decides_whether_the_set_fits() -> None:
    """A block's experts fit into half of all, so that a fresh set misses nothing; those of the prefix never fit."""
    for routed, fits in (("block", True), ("prefix", False)):
        passes = denoise_passes(denoise_trace(
            DenoiseSettings(1, 2, blocks_per_request=4, prompt_tokens=256, routed=routed), seed=1))
        missed = (passes.counts > 0) & ~target_sets(passes.counts, 128, np.zeros((2, 256), np.int64))
        assert (missed.sum() == 0) == fits


@cache
def rows_of(budget: int = 64, **options: Any) -> dict[str, dict[str, Any]]:
    """All policies on a small fitted trace of LLaDA2.0-mini's sizes, by name."""
    model = dataclasses.replace(load_model("llada2.0-mini"), num_layers=3, moe_layers=(1, 2))
    hardware = load_hardware("rtx-4090")
    trace = denoise_trace(DenoiseSettings(4, 2, blocks_per_request=3), seed=1)
    rows = diffusion_rows(model, trace, offload_machine(hardware), CostModel(hardware), budget=budget, **options)
    return {row["policy"]: row for row in rows}


def test_rows_of_a_study() -> None:
    """Every policy has a row; parts add up; nothing with the same sets beats the best schedule, which gains something."""
    rows = rows_of()
    assert list(rows) == list(POLICIES)
    for row in rows.values():
        assert row["total_s"] == pytest.approx(row["experts_s"] + row["moves_s"] + row["other_s"])
        assert row["tokens_per_s"] == pytest.approx(2 * 3 * 32 / row["total_s"])
        assert row["knows"] in ("causal", "trained", "offline")
        if row["policy"] != "interval-released":
            assert row["over_optimal"] >= 0
    assert rows["optimal"]["over_optimal"] == 0
    assert 0 < rows["optimal-common"]["over_optimal"] < rows["interval-best"]["over_optimal"]
    assert rows["interval-best"]["over_optimal"] <= rows["interval-trained"]["over_optimal"]
    assert rows["static"]["moves_s"] == rows["static"]["promotions_per_step"] == 0
    assert rows["every-step"]["tau"] == 1
    assert rows["every-step"]["miss_rate"] < rows["interval"]["miss_rate"] < rows["static"]["miss_rate"]
    assert [name for name, row in rows.items() if row["knows"] == "offline"] == ["interval-best", "optimal-common", "optimal"]


def test_the_order_of_tide_s_table() -> None:
    """LLaDA2.0-mini, 128 experts, released code's costs: a good interval is ahead of every step and of a static set."""
    rows = rows_of(128, write_back=True, overlap=False)
    assert rows["interval-trained"]["tokens_per_s"] > rows["every-step"]["tokens_per_s"]
    assert rows["interval-trained"]["tokens_per_s"] > rows["static"]["tokens_per_s"]


def test_rows_repeat() -> None:
    """The same seed gives the same rows; another split gives others."""
    names = ("static", "optimal")
    assert rows_of(64, policies=names, seed=1) == rows_of.__wrapped__(64, policies=names, seed=1)
    assert rows_of(64, policies=names, seed=1)["optimal"] != rows_of()["optimal"]


def test_coresets_in_device_memory() -> None:
    """At a block's few tokens the time of a layer is overhead and distinct weights: the rewrites save in proportion."""
    model = dataclasses.replace(load_model("llada2.0-mini"), num_layers=3, moe_layers=(1, 2))
    hardware = load_hardware("h100-sxm")
    trace, scores = denoise_scored(DenoiseSettings(1, 2, blocks_per_request=2), seed=1)
    passes = denoise_passes(trace)
    traces = {("none", 0): trace, ("des-vote", 0.15): des_vote(trace, passes, 0.15, scores=scores),
              ("des-seq", 2): des_seq(trace, passes, 2, scores=scores)}
    rows = coreset_rows(model, traces, CostModel(hardware), hardware.ranks[0])
    for row in rows:
        weights = row["unique_experts"] * model.expert_bytes + 32 * 8 * 2 * (2048 + 512) * 2
        assert row["experts_s_per_step"] == pytest.approx(2 * (5e-6 + weights / 3.35e12), rel=1e-6)
        assert row["unique_experts"] < row["no_locality_experts"] == pytest.approx(163.3, abs=0.1)
    assert [row["published_accuracy"] for row in rows] == [1.0, 0.995, 0.957]
    assert rows[1]["unique_experts"] == 38
    other = coreset_rows(model.replace(name="mine"), {("none", 0): trace}, CostModel(hardware), hardware.ranks[0])
    assert other[0]["published_accuracy"] is None


def test_what_cannot_be_run() -> None:
    """Wrong sizes, names, shapes and machines are refused with the reason."""
    problem = problem_of(np.ones((3, 1, 4), np.int64), (3,), 2)
    model, machine = tiny_model(1), machine_of()
    cost = CostModel(machine.hardware)
    trace = one_pass([[0, 1]])
    passes = denoise_passes(trace)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: FixedInterval(0), "tau must be at least 1"),
        (lambda: SkiRental(0.0), "factor must be positive"),
        (lambda: best_fixed_interval(problem, largest=-1), "largest interval must be at least 1"),
        (lambda: run_schedule(problem, np.ones((3, 2), bool)), "must be bool"),
        (lambda: run_schedule(problem, np.ones((3, 1), bool), contents="count"), "Did you mean 'counts'"),
        (lambda: optimal_schedule(problem, forced=np.ones(4, bool)), "forced must be"),
        (lambda: BlockPattern(np.zeros((1, 2, 1), bool)), "begin with a refresh"),
        (lambda: BlockPattern(np.ones((2, 1), bool)), "block of the cycle, pass of the block, layer"),
        (lambda: BlockPattern(np.ones((1, 2, 3), bool)).schedule(problem), "it has 3 layers, the problem 1"),
        (lambda: train_pattern(problem, blocks_per_cycle=0), "blocks_per_cycle must be at least 1"),
        (lambda: dataclasses.replace(problem, budget=3), "every set must hold 3"),
        (lambda: dataclasses.replace(problem, other_ns=np.zeros(2)), "do not fit counts"),
        (lambda: dataclasses.replace(problem, costs=RefreshCosts(np.zeros(1, int), np.zeros(1, int), 1)), "the costs end at 0"),
        (lambda: RefreshCosts(np.ones(3, int), np.zeros(3, int), 1), "0 for no tokens"),
        (lambda: RefreshCosts(np.zeros(3, int), np.zeros(3, int), -1), "cannot take -1"),
        (lambda: refresh_problem(model, trace, passes, machine, cost, 7), "budget must be 1 ... 6"),
        (lambda: refresh_problem(model, trace, passes, machine, cost, 2, popularity=np.ones(6)), "popularity must be"),
        (lambda: refresh_problem(model, trace, passes, machine_of("flash"), cost, 2), "the experts lie in 'flash'"),
        (lambda: refresh_problem(tiny_model(2), trace, passes, machine, cost, 2), "but model 'tiny' has 2 MoE"),
        (lambda: empirical_swaps(problem, 3), "no block has 4 passes"),
        (lambda: empirical_swaps(problem, 0), "lag must be at least 1"),
        (lambda: block_start_swaps(problem, 0), "no block with 1 passes"),
        (lambda: geometric_swaps(4, 1.5, 1), "drift must lie"),
        (lambda: geometric_misses(1, 0.5, at_once=9, routed=4), "at_once in 0 ... routed"),
        (lambda: rows_of.__wrapped__(policies=("statik",)), "Did you mean 'static'"),
        (lambda: rows_of.__wrapped__(policies=()), "at least one policy"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message):
            call()


def test_experts_that_do_not_fit_are_refused() -> None:
    """The GPU's memory limits the budget, as everywhere."""
    model, machine = load_model("llada2.0-mini"), offload_machine(load_hardware("rtx-4090"))
    trace = denoise_trace(DenoiseSettings(1, 19, blocks_per_request=1, accept=1.0), seed=0)
    with pytest.raises(InputError, match="slots per layer fit"):
        refresh_problem(model, trace, denoise_passes(trace), machine, CostModel(machine.hardware), 256)


def test_too_many_passes_for_one_schedule() -> None:
    """The table of edges grows with the square of the passes, so there is a limit, and it is said."""
    problem = problem_of(np.ones((4097, 1, 2), np.int64), (4097,), 1)
    with pytest.raises(InputError, match="at most 4096 are; split the trace"):
        optimal_schedule(problem)


def test_the_documented_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/diffusion.md: the Python blocks run one after another and print what the page shows."""
    text = DIFFUSION_MD.read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.S)
    assert code
    names: dict[str, Any] = {}
    for block in code:
        exec(compile(block, str(DIFFUSION_MD), "exec"), names)
    shown = re.findall(r"```text\n(.*?)```", text, re.S)
    assert capsys.readouterr().out == "".join(shown)
