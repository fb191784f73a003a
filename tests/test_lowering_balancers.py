"""Per-batch balancers in the expert-parallel program: conservation, what they cost, where they win and lose."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Memory
from moesim.lowering.balancers import (
    COUNT_BYTES,
    BalancerOptions,
    lplb_graph,
    make_balancer,
    prefix_counts,
)
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.placement.lplb import lplb_plan, topology
from moesim.placement.plan import PlacementPlan
from moesim.placement.split import split_layer
from moesim.scenario.balancer import BalancerChoice
from moesim.scenario.load import load_scenario
from moesim.scenario.reporter import QuietReporter
from moesim.scenario.run import run_scenario
from moesim.scenario.schema import ExpertParallelSystem
from moesim.simulate.simpy_executor import run_simpy
from moesim.simulate.study import read_study
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.trace import DECODE, PAD, RoutingTrace

RANKS = 8


def cluster(num_ranks: int = RANKS) -> HardwareSpec:
    """GPUs of one node."""
    devices = {f"gpu{r}": Device(f"gpu{r}", "gpu", f"hbm{r}", {"bf16": 20e12}, 5e-6) for r in range(num_ranks)}
    memories = {f"hbm{r}": Memory(f"hbm{r}", "hbm", 80e9, 2e12) for r in range(num_ranks)}
    fabric = Fabric("nvlink", "nvlink", "node", 400e9, 5e-6, 1, "port")
    return HardwareSpec("node", devices, memories, fabrics=(fabric,), ranks=tuple(devices), ranks_per_node=num_ranks)


def model(trace: RoutingTrace, hidden: int = 512) -> ModelSpec:
    """A model of the trace's layers and experts."""
    return ModelSpec("small", trace.num_layers, tuple(range(trace.num_layers)), trace.num_experts, trace.top_k, hidden,
                     hidden, AttentionSpec(8, 2, 64), 1000)


@cache
def skewed(hot: float = 0.6, tokens_per_request: int = 64, requests: int = 16, num_experts: int = 32) -> RoutingTrace:
    """Tokens of which `hot` put their first choice on experts 0 or 1, the rest even; a few pads."""
    rng = np.random.default_rng(0)
    count = tokens_per_request * requests
    ids = np.stack([[rng.choice(np.arange(2, num_experts), 2, replace=False) for _ in range(count)] for _ in range(2)],
                   axis=1).astype(np.int16)
    chosen = rng.random((count, 2)) < hot
    ids[..., 0][chosen] = rng.integers(2, size=int(chosen.sum()))
    ids[::50, 1, 1] = PAD
    place = np.arange(count)
    return RoutingTrace(expert_ids=ids, num_experts=num_experts, layer_ids=np.arange(2),
                        request_id=place // tokens_per_request, position=place % tokens_per_request,
                        phase=np.full(count, DECODE), step=place)


def big_step(trace: RoutingTrace) -> list[Step]:
    """All rows of the trace in one step, as a prefill-like large batch."""
    return [Step(0, "prefill", np.arange(trace.num_tokens), trace.request_id)]


def contiguous(trace: RoutingTrace) -> PlacementPlan:
    """Experts in order, one home each."""
    return PlacementPlan(np.tile(np.arange(trace.num_experts), (trace.num_layers, 1)), RANKS, trace.num_experts)


def replicated(trace: RoutingTrace, seed: int = 0) -> PlacementPlan:
    """Two more slots per rank with random replicas, the hot experts among them."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.concatenate([np.arange(trace.num_experts), [0] * 4, [1] * 4,
                                            rng.integers(trace.num_experts, size=8)])) for _ in range(2)]
    return PlacementPlan(np.stack(rows), RANKS, trace.num_experts)


def planned(name: str, trace: RoutingTrace) -> PlacementPlan:
    """A plan that the balancer takes."""
    if name == "lplb":
        load = np.stack([np.bincount(trace.expert_ids[:, layer].ravel()[trace.expert_ids[:, layer].ravel() >= 0],
                                     minlength=trace.num_experts) for layer in range(2)])
        return lplb_plan(load, topology("cube", RANKS))
    return contiguous(trace) if name in ("llep", "none") else replicated(trace)


OPTIONS = {
    "lp": BalancerOptions("lp"), "lplb": BalancerOptions("lplb"),
    "five": BalancerOptions("lplb", method="interior_point"), "llep": BalancerOptions("llep", min_tokens=16),
}


def lower(trace: RoutingTrace, steps: list[Step], plan: PlacementPlan, options: BalancerOptions, hidden: int = 512,
          **more: object) -> tuple[ExpertParallelProgram, pd.DataFrame]:
    """Lower and simulate."""
    program = ExpertParallelProgram(model(trace, hidden), trace, steps, plan, CostModel(cluster()),
                                    balancer=options, **more)  # type: ignore[arg-type]
    return program, run_simpy(program)


def makespan(program: ExpertParallelProgram, tasks: pd.DataFrame) -> int:
    """End of the last step, ns."""
    return int(tasks["end_ns"][program.steps[-1].last_task])


# ---------------------------------------------------------------- conservation


@pytest.mark.parametrize("name", OPTIONS)
def test_every_pair_is_computed_once_by_a_rank_that_has_the_weights(name: str) -> None:
    """Each (token, expert) has one rank; it holds the expert, or is sent its weights; groups count the pairs."""
    trace, options = skewed(), OPTIONS[name]
    plan = planned(options.name, trace)
    balancer = make_balancer(options, plan)
    assert balancer is not None
    for layer in range(2):
        ids = trace.expert_ids[:, layer]
        chosen = balancer(layer, ids)
        assert np.array_equal(chosen.rank < 0, ids == PAD)
        assert chosen.group_tokens.sum() == np.sum(ids != PAD)
        assert np.array_equal(np.bincount(chosen.rank[ids != PAD], minlength=RANKS), chosen.group_tokens.sum(axis=1))
        held = np.zeros((RANKS, trace.num_experts), bool)
        held[plan.slot_rank, plan.physical_to_logical[layer]] = True
        used = np.zeros_like(held)
        used[chosen.rank[ids != PAD], ids[ids != PAD]] = True
        missing = used & ~held
        assert chosen.weights.sum() == missing.sum()
        if options.name == "llep":
            assert np.array_equal(chosen.weights.sum(axis=0), missing.sum(axis=1))
            np.testing.assert_array_equal(chosen.group_tokens > 0, used)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_ranks=st.integers(1, 5), size=st.integers(1, 5))
def test_prefix_counts_are_the_split_in_whole_tokens(seed: int, num_ranks: int, size: int) -> None:
    """Whole, never negative, exact per expert, and within one token of the fractional split."""
    rng = np.random.default_rng(seed)
    num_experts = int(rng.integers(1, num_ranks * size + 1))
    slots = rng.permutation(np.concatenate([np.arange(num_experts),
                                            rng.integers(num_experts, size=num_ranks * size - num_experts)]))
    load = rng.integers(0, 30, num_experts)
    tokens = split_layer(slots, load, num_ranks).tokens
    whole = prefix_counts(tokens, slots, load)
    assert whole.min() >= 0
    assert np.array_equal(np.bincount(slots, whole, minlength=num_experts).astype(int), load)
    assert np.abs(whole - tokens).max() <= 1.0 + 1e-9


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("collective", ["closed_form", "per_link"])
def test_bytes_and_rows_of_the_run_are_those_of_the_assignment(name: str, collective: str) -> None:
    """Experts compute every pair once, dispatch = combine in tokens, counts and weights are charged in full."""
    trace, options = skewed(), OPTIONS[name]
    program, tasks = lower(trace, big_step(trace), planned(options.name, trace), options, collective=collective)
    spec = program.model
    rows = tasks[tasks["kind"] == "experts"]["tokens"].sum()
    assert rows == np.sum(trace.expert_ids != PAD)
    by_kind = tasks[tasks["resource"] != ""].groupby("kind")["num_bytes"].sum()
    if collective == "per_link":  # every message passes two ports, and is a task on each
        by_kind = by_kind // 2
    assert by_kind["counts"] == 2 * RANKS * (RANKS - 1) * trace.num_experts * COUNT_BYTES
    assert by_kind["dispatch"] == by_kind["combine"]
    assert np.sum(tasks["kind"] == "balance") == 2
    moved = sum(int(program._balancer(layer, trace.expert_ids[:, layer]).weights.sum()) for layer in range(2))
    assert by_kind.get("weights", 0) == moved * spec.expert_bytes
    assert (moved > 0) == (options.name == "llep")
    remote = by_kind[["counts", "dispatch", "combine"]].sum() + by_kind.get("weights", 0)
    assert program.remote_bytes["rank"] == pytest.approx(remote)


def test_decision_and_weights_come_before_the_experts() -> None:
    """Router, counts, decision, dispatch, weights, experts: each starts when the one before has ended everywhere."""
    trace = skewed()
    _, tasks = lower(trace, big_step(trace), contiguous(trace), OPTIONS["llep"])
    layer = tasks[tasks["layer"] == 0]
    order = ["router", "counts", "balance", "dispatch", "weights", "experts", "combine"]
    for before, after in pairwise(order):
        assert layer[layer["kind"] == before]["end_ns"].max() <= layer[layer["kind"] == after]["start_ns"].min()
    solve = layer[layer["kind"] == "balance"]
    assert (solve["duration_ns"] == 100_000).all()
    assert set(solve["source"]) == {"stated"}


def test_scratch_is_the_largest_number_of_foreign_experts_on_a_rank() -> None:
    """LLEP's helpers hold foreign weights; nobody else needs scratch."""
    trace = skewed()
    program, _ = lower(trace, big_step(trace), contiguous(trace), OPTIONS["llep"])
    most = max(int(program._balancer(layer, trace.expert_ids[:, layer]).weights.sum(axis=0).max())
               for layer in range(2))
    assert program.scratch_bytes == most * program.model.expert_bytes > 0
    assert lower(trace, big_step(trace), replicated(trace), OPTIONS["lp"])[0].scratch_bytes == 0


# ---------------------------------------------------------------- balance and time


@pytest.mark.parametrize("name", ["lp", "lplb"])
def test_a_split_reaches_the_linear_program_up_to_rounding(name: str) -> None:
    """The busiest rank of a batch has the exact optimum plus at most one token per slot."""
    trace, options = skewed(), OPTIONS[name]
    plan = planned(name, trace)
    balancer = make_balancer(options, plan)
    for layer in range(2):
        ids = trace.expert_ids[:, layer]
        load = np.bincount(ids[ids >= 0], minlength=trace.num_experts)
        best = split_layer(plan.physical_to_logical[layer], load, RANKS).largest
        busiest = balancer(layer, ids).group_tokens.sum(axis=1).max()
        assert best - 1e-6 <= busiest <= best + plan.slots_per_rank


def test_llep_wins_on_a_large_skewed_batch_and_loses_on_a_small_decode_step() -> None:
    """60 % of the tokens on two experts: faster with 8192 large rows, slower with 16 (trap 4: weights are whole)."""
    trace = skewed(tokens_per_request=512)
    # hidden 2048 makes the experts' products outweigh the copies of their weights
    large = [makespan(*lower(trace, big_step(trace), contiguous(trace), options, hidden=2048))
             for options in (BalancerOptions(), BalancerOptions("llep", min_tokens=64))]
    assert large[1] < 0.8 * large[0]
    steps = closed_loop_steps(trace, batch_size=16, max_steps=3, include_prefill=False)
    small = [makespan(*lower(trace, steps, contiguous(trace), options, hidden=2048))
             for options in (BalancerOptions(), BalancerOptions("llep", min_tokens=1))]
    assert small[1] > 1.2 * small[0]


def test_lp_wins_on_a_large_batch_by_what_it_balances_and_loses_its_latency_on_a_small_one() -> None:
    """The same plan with an even split and with a split per batch."""
    trace = skewed(tokens_per_request=512)
    plan = replicated(trace, seed=3)
    even, split = (makespan(*lower(trace, big_step(trace), plan, options, hidden=2048))
                   for options in (BalancerOptions(), BalancerOptions("lp")))
    assert split < even
    steps = closed_loop_steps(trace, batch_size=16, max_steps=3, include_prefill=False)
    even, split = (makespan(*lower(trace, steps, plan, options)) for options in (BalancerOptions(), OPTIONS["lp"]))
    assert split > even + 3 * 2 * 90_000  # three steps, two layers, 100 us each


def test_without_a_balancer_nothing_changes() -> None:
    """`none` gives the same tasks as leaving the option out, and no balancer's task."""
    trace = skewed()
    steps = closed_loop_steps(trace, batch_size=8, max_steps=2, include_prefill=False)
    _, tasks = lower(trace, steps, replicated(trace), BalancerOptions("none"))
    bare = run_simpy(ExpertParallelProgram(model(trace), trace, steps, replicated(trace), CostModel(cluster())))
    pd.testing.assert_frame_equal(tasks, bare)
    assert not set(tasks["kind"]) & {"counts", "balance", "weights"}


def test_a_gate_that_holds_leaves_ordinary_expert_parallelism() -> None:
    """Below the gate LLEP moves no weights, but has paid for the counts."""
    trace = skewed()
    program, tasks = lower(trace, big_step(trace), contiguous(trace), BalancerOptions("llep", gate=50.0))
    assert program.scratch_bytes == 0
    assert {"counts", "balance"} <= set(tasks["kind"])
    assert "weights" not in set(tasks["kind"])


# ---------------------------------------------------------------- errors and the scenario


def test_lplb_reads_its_graph_from_the_plan() -> None:
    """`lplb_graph` finds the r2o that the plan was made with."""
    trace = skewed()
    for name in ("cube", "ring"):
        load = np.random.default_rng(1).integers(1, 99, (2, trace.num_experts))
        assert np.array_equal(lplb_graph(lplb_plan(load, topology(name, RANKS))), topology(name, RANKS))


@pytest.mark.parametrize(("call", "text"), [
    (lambda: BalancerOptions("lpbl"), "Did you mean 'lplb'"),
    (lambda: BalancerOptions("lplb", method="exakt"), "Did you mean 'exact'"),
    (lambda: BalancerOptions("lp", solve_s=-1.0), "solve_s must be finite and not negative"),
    (lambda: make_balancer(OPTIONS["llep"], replicated(skewed())), "needs a plan without replicas"),
    (lambda: make_balancer(OPTIONS["lplb"], replicated(skewed())), "needs a plan of LPLB"),
    (lambda: make_balancer(OPTIONS["lplb"], contiguous(skewed())), "needs a plan of LPLB"),
])
def test_what_does_not_fit_is_said(call: object, text: str) -> None:
    """Names, ranges, and plans that the balancer cannot work with."""
    with pytest.raises(InputError, match=text):
        call()  # type: ignore[operator]


def test_the_scenario_takes_a_name_or_a_mapping() -> None:
    """``balancer: lp`` and ``balancer: {name: llep, alpha: 1.1}``; the lowering's defaults fill the rest."""
    assert ExpertParallelSystem.model_validate({"balancer": "lp"}).balancer.options == BalancerOptions("lp")
    given = ExpertParallelSystem.model_validate({"balancer": {"name": "llep", "alpha": 1.1, "gate_on": "experts"}})
    assert given.balancer.options == BalancerOptions("llep", alpha=1.1, gate_on="experts")
    assert ExpertParallelSystem().balancer.options == BalancerOptions()


@pytest.mark.parametrize(("value", "text"), [
    ({"balancer": "lpx"}, "Input should be 'none', 'lp', 'lplb' or 'llep'"),
    ({"balancer": {"name": "lp", "alpha": 1.1}}, "'alpha' belongs to balancer llep, not to lp"),
    ({"balancer": {"name": "llep", "method": "exact"}}, "'method' belongs to balancer lplb, not to llep"),
    ({"balancer": {"name": "llep", "alpha": 0.9}}, "greater than or equal to 1"),
    ({"balancer": "lp", "execution": "coherent"}, "balancer: lp belongs to execution: home"),
])
def test_a_scenario_with_a_wrong_balancer_is_refused(value: dict[str, object], text: str) -> None:
    """Names, parameters of another balancer, ranges, and the execution."""
    with pytest.raises(ValueError, match=text):
        ExpertParallelSystem.model_validate(value)
    assert BalancerChoice().name == "none"


@pytest.mark.parametrize(("balancer", "plans"), [
    ("llep", "        - {solver: contiguous}\n"),
    ("lp", "        - {solver: contiguous}\n        - {solver: eplb, redundant_experts: 4}\n"),
])
def test_a_study_runs_under_a_balancer_and_says_so(tiny_folder: Path, balancer: str, plans: str) -> None:
    """From the scenario file to the report: the note, scratch memory for LLEP, and no bound that it could beat."""
    text = (tiny_folder / "tiny.yaml").read_text()
    start, end = text.index("      plans:\n"), text.index("  - kind: offload")
    text = text[:start] + "      plans:\n" + plans + f"    system: {{balancer: {balancer}}}\n" + text[end:]
    (tiny_folder / "balanced.yaml").write_text(text)
    outcome = run_scenario(load_scenario(tiny_folder / "balanced.yaml"), tiny_folder / "out", QuietReporter(), "four-gpus")
    study = next(read_study(path) for path in sorted((tiny_folder / "out").rglob("*.study.json")))
    assert outcome is not None
    assert any(f"Balancer {balancer}" in note for note in study.notes)
    row = study.table.iloc[0]
    assert ("scratch_bytes" in row) == (balancer == "llep")
    bound = row["step_time_bound_s"]
    assert (bound is None or bound != bound) if balancer == "llep" else 0 < bound <= row["step_time_s"]
