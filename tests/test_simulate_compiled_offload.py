"""The compiled offload engine gives what SimPy gives with the program in Python: every row, every count."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offload_worlds import cost_of, random_case

from moesim.cache.cache import ExpertCache
from moesim.cache.policies.belady import BeladyPolicy
from moesim.cache.policies.lru import LruPolicy
from moesim.cache.policy import PolicyContext, access_stream
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.lowering.batch import expert_counts, head_rows
from moesim.lowering.machine import offload_machine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.model.catalog import load_model
from moesim.scenario.inputs import load_inputs
from moesim.scenario.load import load_scenario
from moesim.scenario.offload import Offload, OffloadSetup
from moesim.scenario.schema import OffloadStudy, Point
from moesim.simulate import compiled_offload, compiled_offload_state, compiled_offload_stream
from moesim.simulate.compiled_offload import (
    OffloadTimes,
    execute_offload,
    offload_times,
    predictions,
    supports,
    times_of,
)
from moesim.simulate.execution import Execution
from moesim.simulate.simpy_executor import execute_simpy
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace

ROOT = Path(__file__).parent.parent
BLOCK, NUM_BLOCKS = 40, 10
RARE_SEEDS = (14169, 14540)  # an expert is evicted with its last chunk on the wire, and fetched again before that ends
COLUMNS = ("kind", "resource", "duration_ns", "priority", "source", "dep_offsets", "deps", "flops")


def assert_same_tasks(expected: Execution, found: Execution) -> None:
    """Every column of every task, dependencies and dtypes included, and the table that comes of them."""
    assert expected.arrays.resources == found.arrays.resources
    for name in COLUMNS:
        column, other = getattr(expected.arrays, name), getattr(found.arrays, name)
        assert column.dtype == other.dtype, name
        np.testing.assert_array_equal(other, column, err_msg=name)
    pd.testing.assert_frame_equal(found.table(), expected.table(), check_exact=True)


def assert_same_times(expected: OffloadTimes, found: OffloadTimes) -> None:
    """Everything that a run without a table tells."""
    for field in dataclasses.fields(OffloadTimes):
        column, other = getattr(expected, field.name), getattr(found, field.name)
        if field.name == "cache_counts":
            assert list(column) == list(other)
            np.testing.assert_array_equal(list(other.values()), list(column.values()))
        else:
            np.testing.assert_array_equal(other, column, err_msg=field.name)


def compare(offload: Offload, point: Point, seed: int = 0) -> Execution:
    """Run one point on SimPy and on the engine, with a table and without, and compare all they say."""
    costs = [cost_of(offload, seed) for _ in range(3)]
    reference, program, other = (offload.program(point, cost) for cost in costs)
    assert supports(program)
    expected = execute_simpy(reference)
    found = execute_offload(program)
    assert_same_tasks(expected, found)
    np.testing.assert_array_equal(list(program.cache_counts.values()), list(reference.cache_counts.values()))
    ends = [[(record.first_task, record.last_task) for record in each.steps] for each in (reference, program)]
    assert ends[0] == ends[1]
    assert_same_times(times_of(reference, expected), offload_times(other))
    counts = [cost.source_counts() for cost in costs]
    assert counts[0] == counts[1] == counts[2]
    return found


@pytest.mark.parametrize("block", range(NUM_BLOCKS))
def test_random_worlds_agree_row_for_row(block: int) -> None:
    """All policies, prefetchers, ways to handle a miss, routes, batches, slots down to one; times that tie."""
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        compare(*random_case(seed), seed)


@settings(max_examples=40, deadline=None)
@given(st.integers(NUM_BLOCKS * BLOCK, 1 << 30))
def test_any_world_agrees_row_for_row(seed: int) -> None:
    """Worlds that nobody has chosen."""
    compare(*random_case(seed), seed)


@pytest.mark.parametrize("seed", RARE_SEEDS)
def test_rare_worlds_agree_row_for_row(seed: int) -> None:
    """What one world in a thousand holds."""
    compare(*random_case(seed), seed)


@pytest.mark.slow
def test_many_random_worlds_agree_row_for_row() -> None:
    """Five thousand more of them."""
    for seed in range(10_000, 15_000):
        compare(*random_case(seed), seed)


def test_the_random_worlds_hold_what_is_hard() -> None:
    """Among them are copies that wait for their slot, promotions, cancelled copies, second hops, the CPU, and ties."""
    seen = dict.fromkeys(("slot users", "two users", "promoted", "cancelled", "cut short", "cpu", "admitted", "ties"), 0)
    for seed in range(NUM_BLOCKS * BLOCK):
        offload, point = random_case(seed)
        run = execute_offload(offload.program(point, cost_of(offload, seed)))
        arrays, table = run.arrays, run.table()
        users = np.diff(arrays.dep_offsets)[table["kind"].isin(("prefetch", "admit")).to_numpy()] - 1
        seen["slot users"] += int((users > 0).sum())
        seen["two users"] += int((users > 1).sum())
        seen["promoted"] += int((run.priority < arrays.priority).sum())
        seen["cancelled"] += int((run.state != 0).sum())
        copies = table[table["kind"] == "prefetch"].groupby(["step", "layer", "expert", "slot"])["state"]
        seen["cut short"] += int((copies.nunique() == 2).sum())
        seen["cpu"] += int((table["kind"] == "cpu_expert").sum())
        seen["admitted"] += int((table["kind"] == "admit").sum())
        ended = table.loc[(table["state"] == 0) & (table["resource"] != ""), "end_ns"]
        seen["ties"] += len(ended) - ended.nunique()
    assert min(seen.values()) > 10, seen


# ---------------------------------------------------------------- what ships


def quickstart() -> OffloadSetup:
    """The offload study of the quickstart."""
    scenario = load_scenario(ROOT / "scenarios" / "quickstart.yaml")
    study = next(study for study in scenario.studies if isinstance(study, OffloadStudy))
    return OffloadSetup(load_inputs(scenario), study)


def test_the_quickstart_agrees() -> None:
    """Every offload point of the scenario that ships, on fewer of its steps."""
    setup = quickstart()
    offload = dataclasses.replace(setup.offload, steps=setup.offload.steps[:12])
    for point in setup.study.expand():
        compare(offload, point)


@pytest.mark.parametrize("case", ["offload_olmoe", "offload_deepseek"])
def test_the_benchmark_cases_agree(case: str) -> None:
    """OLMoE's and DeepSeek-V3's sizes, as `benchmarks/simulation.py` runs them."""
    spec = importlib.util.spec_from_file_location("moesim_benchmark_simulation", ROOT / "benchmarks" / "simulation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    expected, found = execute_simpy(getattr(module, case)(1)), execute_offload(getattr(module, case)(1))
    assert_same_tasks(expected, found)


def large(num_steps: int = 3, batch: int = 1, **options: object) -> Offload:
    """DeepSeek-V3's shape with experts of 4 bits on one GPU."""
    model, hardware = load_model("deepseek-v3").replace(weight_bytes=0.5), load_hardware("h200-sxm")
    trace = synthetic_trace(96, model.num_moe_layers, model.num_experts, model.top_k, 6, locality=0.8, seed=0)
    train, test = split_requests(trace, 0.5, 0)
    steps = closed_loop_steps(test, batch_size=batch, max_steps=num_steps, include_prefill=False, repeat=True, seed=0)
    return Offload(model, train, test, steps, offload_machine(hardware), 0, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch", "policy", "prefetch", "miss", "chunks", "shared"), [
    (1, "lru", "oracle", "load", 3, False), (1, "lfu", "transition", "faster", 1, False),
    (8, "belady-bypass", "popularity", "cpu", 3, True), (64, "lru", "none", "faster", 3, False)])
def test_large_models_agree(batch: int, policy: str, prefetch: str, miss: str, chunks: int, shared: bool) -> None:
    """256 experts, so that many of a layer are wanted at once, and more than 64 slots in a pool."""
    offload = large(batch=batch, chunks=chunks, shared=shared)
    compare(offload, Point(policy, 48, prefetch, 0 if prefetch == "none" else 8, None, miss))


def test_a_machine_with_one_memory_for_both_agrees() -> None:
    """A phone computes in the memory of its CPU and fetches experts from flash."""
    model = load_model("olmoe-1b-7b").replace(weight_bytes=0.25, other_weight_bytes=0.5)
    trace = synthetic_trace(40, model.num_moe_layers, model.num_experts, model.top_k, 4, seed=0)
    steps = closed_loop_steps(trace, batch_size=2, max_steps=4, seed=0)
    offload = Offload(model, trace, trace, steps, offload_machine(load_hardware("phone-soc")), 0)
    assert offload.machine.shares_memory
    compare(offload, Point("lru", 12, "transition", 4))


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("seed", range(6))
def test_a_run_does_not_depend_on_its_windows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step at a time, or all at once: the same table and the same times."""
    offload, point = random_case(seed)
    whole = execute_offload(offload.program(point, cost_of(offload, seed)))
    times = offload_times(offload.program(point, cost_of(offload, seed)))
    monkeypatch.setattr(compiled_offload, "TABLE_USES", 1)
    monkeypatch.setattr(compiled_offload_stream, "WINDOW_USES", 1)
    parts = compiled_offload_stream.windows(offload.program(point, cost_of(offload, seed)))
    assert len(list(parts)) == len(offload.steps)
    assert_same_tasks(whole, execute_offload(offload.program(point, cost_of(offload, seed))))
    assert_same_times(times, offload_times(offload.program(point, cost_of(offload, seed))))


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_the_stream_is_that_of_the_cache(batch: int) -> None:
    """Experts by access as `access_stream` has them, padded ids too, their tokens and the head's rows as the program has."""
    offload = large(5, batch=batch)
    ids = offload.test.expert_ids.copy()
    ids[::3, :, 2], ids[::2, ::2, -1], ids[5] = -1, -1, -1
    offload = dataclasses.replace(offload, test=dataclasses.replace(offload.test, expert_ids=ids))
    program = offload.program(Point("lru", 8), CostModel(offload.machine.hardware))
    expected = access_stream(offload.test, [step.rows for step in offload.steps])
    window, = compiled_offload_stream.windows(program)
    assert window.offsets.tolist() == expected.offsets.tolist()
    assert window.experts.tolist() == expected.experts.tolist()
    layers = offload.model.num_moe_layers
    for number, step in enumerate(offload.steps):
        assert window.head_rows[number] == head_rows(step)
        assert window.context[number] == (offload.test.position[step.rows] + 1).sum()
        for layer in range(0, layers, 19):
            uses = slice(*window.offsets[number * layers + layer:][:2])
            counts = expert_counts(offload.test.expert_ids[step.rows, layer], offload.model.num_experts)
            assert window.tokens[uses].tolist() == counts[window.experts[uses]].tolist()


@pytest.mark.parametrize("prefetch", ["popularity", "oracle"])
def test_predictions_are_those_that_the_prefetcher_gives(prefetch: str) -> None:
    """The ones that are read off its tables equal the answers to a question per access."""
    for seed in range(30):
        offload, point = random_case(seed)
        point = dataclasses.replace(point, prefetch=prefetch, prefetch_width=1 + seed % 5, prefetch_recall=None)
        program = offload.program(point, cost_of(offload, seed))
        for window in compiled_offload_stream.windows(program, 8):
            found = compiled_offload_stream.predictor(program)(window)
            asked = compiled_offload_stream._asked(program, window)
            width = asked.shape[1]
            np.testing.assert_array_equal(found[:, :width], asked)
            assert (found[:, width:] == -1).all()


def test_predictions_serve_again() -> None:
    """Made once, used by runs with other slots: the same as asking in each."""
    offload = large(chunks=1)
    points = [Point("lru", slots, "transition", 4) for slots in (8, 32)]
    cost = CostModel(offload.machine.hardware)
    named = predictions(offload.program(points[0], cost))
    assert named.shape == (len(offload.steps) * offload.model.num_moe_layers, 4)
    for point in points:
        one, two, three, four = (offload.program(point, cost) for _ in range(4))
        assert_same_times(offload_times(one), offload_times(two, named))
        assert_same_tasks(execute_offload(three), execute_offload(four, named))
    for wrong in (named[:-1], np.full_like(named, offload.model.num_experts)):
        with pytest.raises(InputError, match=r"predictions must be \[174, width\] of experts below 256, -1 padded; got"):
            offload_times(offload.program(points[0], cost), wrong)


class OneExpert:
    """A prefetcher that always names the same expert."""

    information = "I0"
    source = "stated"

    def __init__(self, expert: int) -> None:
        self.expert = expert

    def predict(self, layer: int, experts_now: np.ndarray, counts_now: np.ndarray, now: int) -> list[int]:
        """Return that expert."""
        return [self.expert]


def test_a_prediction_outside_the_model_is_refused() -> None:
    """A prefetcher of somebody else's is asked like the others; what it names must exist."""
    offload, point = random_case(2)
    program = offload.program(point, cost_of(offload, 2))
    experts = offload.model.num_experts
    program.prefetcher = OneExpert(experts - 1)
    assert int(offload_times(program).cache_counts["prefetches"].sum()) > 0
    program.prefetcher = OneExpert(experts)
    with pytest.raises(InputError, match=f"names experts outside 0 ... {experts - 1}"):
        predictions(program)


def test_a_run_leaves_the_program_as_it_was() -> None:
    """The cache is read, not changed, so that a program can be run again, and by SimPy as well."""
    offload, point = random_case(11)
    program = offload.program(point, cost_of(offload, 11))
    first, second = execute_offload(program), execute_offload(program)
    assert_same_tasks(first, second)
    assert_same_tasks(execute_simpy(program), second)


# ---------------------------------------------------------------- what is left to the generic executor


class MyLru(LruPolicy):
    """A policy of somebody else's."""


def program_with(cache: ExpertCache, offload: Offload) -> OffloadProgram:
    """An offload program with a cache of the caller's."""
    return OffloadProgram(offload.model, offload.test, offload.steps, offload.machine,
                          CostModel(offload.machine.hardware), cache, OffloadPolicy())


def test_foreign_parts_are_left_to_the_generic_executor() -> None:
    """A child of a built-in policy may do anything, and a cache in use has a past that the engine does not know."""
    offload, point = random_case(1)
    layers, experts = offload.model.num_moe_layers, offload.model.num_experts
    context = PolicyContext(layers, experts)
    assert supports(program_with(ExpertCache(layers, experts, 1, LruPolicy(context)), offload))
    assert not supports(program_with(ExpertCache(layers, experts, 1, MyLru(context)), offload))
    used = ExpertCache(layers, experts, 1, LruPolicy(context))
    used.touch(0, [0], 0)
    assert not supports(program_with(used, offload))
    program = offload.program(point, CostModel(offload.machine.hardware))
    assert supports(program)
    execute_simpy(program)
    assert not supports(program)


def test_a_future_that_is_too_short_is_left_to_the_program() -> None:
    """Belady must know every access that will run; the program says so in its own words."""
    offload = random_case(1)[0]
    layers, experts = offload.model.num_moe_layers, offload.model.num_experts
    short = access_stream(offload.test, [offload.steps[0].rows])
    policy = BeladyPolicy(PolicyContext(layers, experts, future=short))
    longer = dataclasses.replace(offload, steps=closed_loop_steps(offload.test, batch_size=1, max_steps=2, seed=0))
    assert not supports(program_with(ExpertCache(layers, experts, 1, policy), longer))


def test_a_future_of_other_steps_is_obeyed() -> None:
    """Belady with the wrong future evicts by it, here as there."""
    offload = large(4, chunks=1)
    rows = [step.rows for step in offload.steps]
    context = PolicyContext(offload.model.num_moe_layers, offload.model.num_experts,
                            future=access_stream(offload.test, rows[::-1]))
    caches = [ExpertCache(context.num_layers, context.num_experts, 8, BeladyPolicy(context)) for _ in range(2)]
    reference, program = (program_with(cache, offload) for cache in caches)
    assert_same_tasks(execute_simpy(reference), execute_offload(program))


def test_runs_whose_ranks_do_not_fit_are_left_to_the_generic_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank holds a key's worth and the key in 64 bits: it ends somewhere, at a count of uses before a last use."""
    monkeypatch.setattr(compiled_offload_state, "RANK_BITS", 24)
    offload = large(40)
    points = {policy: Point(policy, 8) for policy in ("lru", "lfu", "belady")}
    cost = CostModel(offload.machine.hardware)
    assert not any(supports(offload.program(point, cost)) for point in points.values())
    monkeypatch.setattr(compiled_offload_state, "RANK_BITS", 30)
    assert [policy for policy, point in points.items() if supports(offload.program(point, cost))] == ["lru"]
