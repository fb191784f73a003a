"""The engines' variants of EPLB, LPLB and LLEP: their rules by hand, their published figures, their traps."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.placement import lplb
from moesim.placement.llep import Part, SpillPlan, Transfer, spill_plan
from moesim.placement.metrics import duplicates_on_rank, imbalance, rank_load
from moesim.placement.place import place
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.solvers.sglang import snake, step_copies
from moesim.placement.solvers.tensorrt_llm import replicate
from moesim.placement.solvers.vllm import preserve_slots
from moesim.placement.step_sample import StepSample

# DeepSeek EPLB's README example
README_LOAD = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
README_RANKS = [[121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152], [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5]]


def readme_problem(**more: object) -> PlacementProblem:
    """EPLB's README: 16 slots on 8 ranks, 4 groups, 2 nodes."""
    return PlacementProblem(README_LOAD, 8, 2, 4, num_groups=4, **more)  # type: ignore[arg-type]


# ---------------------------------------------------------------- vLLM


def test_vllm_plans_like_eplb_and_keeps_slots() -> None:
    """The README's rank loads; what stays on a rank keeps its slot, the rest fills the free slots in order."""
    plan = place(readme_problem(), "eplb-vllm").plan
    np.testing.assert_allclose(rank_load(plan, README_LOAD), README_RANKS)
    turned = plan.physical_to_logical.reshape(2, 8, 2)[:, :, ::-1].reshape(2, 16)
    again = place(readme_problem(current=PlacementPlan(turned, 8, 12)), "eplb-vllm").plan
    np.testing.assert_array_equal(again.physical_to_logical, turned)
    np.testing.assert_allclose(rank_load(again, README_LOAD), README_RANKS)


def test_preserved_slots_by_hand() -> None:
    """Rank 0 held 1 2 3 and gets 3 4 1: 1 and 3 stay in place, 4 fills; two copies of 5 keep one slot each."""
    old, new = np.array([[1, 2, 3, 5, 5, 0]]), np.array([[3, 4, 1, 0, 5, 5]])
    assert preserve_slots(new, old, 2).tolist() == [[1, 4, 3, 5, 5, 0]]
    assert preserve_slots(np.array([[5, 6, 5]]), np.array([[6, 5, 7]]), 1).tolist() == [[6, 5, 5]]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_preserved_slots_are_a_reordering_and_as_many_as_can_be(seed: int) -> None:
    """Each rank holds the same multiset, and as many slots are unchanged as the two multisets share."""
    rng = np.random.default_rng(seed)
    old, new = rng.integers(6, size=(2, 1, 12))
    kept = preserve_slots(new, old, 3)
    for first in range(0, 12, 4):
        mine, before, after = (Counter(rows[0, first:first + 4].tolist()) for rows in (kept, old, new))
        assert mine == after
        assert np.sum(kept[0, first:first + 4] == old[0, first:first + 4]) == (before & after).total()


# ---------------------------------------------------------------- SGLang


def by_trial(steps: np.ndarray, num_slots: int) -> list[int]:
    """Every extra copy tried on every expert: the lowest sum over steps of the maximum wins, then the lower id."""
    copies, items = np.ones(steps.shape[1]), list(range(steps.shape[1]))
    for _ in range(num_slots - steps.shape[1]):
        values = []
        for expert in range(steps.shape[1]):
            copies[expert] += 1
            values.append((steps / copies).max(axis=1).sum())
            copies[expert] -= 1
        items.append(int(np.argmin(values)))
        copies[items[-1]] += 1
    return items


@settings(max_examples=150, deadline=None)
@given(num_steps=st.integers(1, 6), num_experts=st.integers(2, 8), extra=st.integers(0, 6),
       seed=st.integers(0, 2**32 - 1))
def test_sglang_gives_copies_where_the_steps_gain_most(num_steps: int, num_experts: int, extra: int, seed: int) -> None:
    """Loads far enough apart that no tie-break matters: the same copies as trying each one."""
    steps = np.random.default_rng(seed).permutation(num_steps * num_experts).reshape(num_steps, -1) ** 1.5 * 10 + 1
    assert step_copies(steps, num_experts + extra).tolist() == by_trial(steps, num_experts + extra)


def test_sglang_looks_at_steps_and_not_at_their_sum() -> None:
    """Two experts burst in turn, one is steadily warm and has the most tokens: the bursts get the copies."""
    steps = np.array([[90.0, 10, 60, 5]] * 2 + [[10.0, 90, 60, 5]] * 2)
    assert steps.sum(axis=0).argmax() == 2
    assert sorted(step_copies(steps, 6).tolist()[4:]) == [0, 1]


def test_sglang_deals_copies_in_snake_order() -> None:
    """Heaviest first, 0 1 2 then 2 1 0; one slot per rank stays as it is."""
    assert snake(np.array([1.0, 6, 2, 5, 3, 4]), 3).tolist() == [1, 0, 3, 2, 5, 4]
    assert snake(np.array([1.0, 3, 2]), 3).tolist() == [0, 1, 2]


def test_sglang_uses_the_steps_of_the_problem() -> None:
    """Steps from token sets; without them the loads are one step."""
    ids = np.array([[[0]]] * 9 + [[[1]]] + [[[1]]] * 9 + [[[0]]] + [[[2]]] * 11, np.int16)
    step = np.array([0] * 10 + [1] * 10 + [1] * 11)
    sample = StepSample(ids, step, np.zeros(31, np.int32))
    load = np.bincount(ids.ravel(), minlength=3)[None]
    plan = place(PlacementProblem(load, 2, 2, 2, steps=sample), "eplb-sglang").plan
    # step maxima 9 and 11: a copy of 2 lowers 11 to 9, of 0 lowers 9 to 4.5
    assert plan.replica_count.tolist() == [[2, 1, 1]]
    assert place(PlacementProblem(load, 2, 2, 2), "eplb-sglang").plan.replica_count.tolist() == [[1, 1, 2]]


# ---------------------------------------------------------------- TensorRT-LLM


def test_tensorrt_llm_packs_by_load_even_with_one_slot_per_rank() -> None:
    """EPLB leaves single slots in place; the min-heap deals the heaviest first."""
    problem = PlacementProblem(np.array([[1.0, 9, 4, 6]]), 4, 1, 1)
    assert place(problem, "eplb-tensorrt-llm").plan.physical_to_logical.tolist() == [[1, 3, 2, 0]]
    assert place(problem, "eplb").plan.physical_to_logical.tolist() == [[0, 1, 2, 3]]


def test_tensorrt_llm_by_hand() -> None:
    """Loads 8 3 2 1 on 2 x 3 slots: 8 -> 3 copies; copies 3 | 2.67 x 3 | 2 | 1 to the lightest rank with room."""
    assert replicate(np.array([8.0, 3, 2, 1]), 6).tolist() == [3, 1, 1, 1]
    plan = place(PlacementProblem(np.array([[8.0, 3, 2, 1]]), 2, 3, 1), "eplb-tensorrt-llm").plan
    assert plan.physical_to_logical.tolist() == [[1, 0, 3, 0, 0, 2]]
    assert duplicates_on_rank(plan).sum() == 1  # no anti-affinity


def test_tensorrt_llm_spreads_a_layer_without_load_evenly() -> None:
    """Zero load: 7 slots for 3 experts are 3 + 2 + 2; EPLB would give all to the first."""
    assert replicate(np.zeros(3), 7).tolist() == [3, 2, 2]


# ---------------------------------------------------------------- LPLB


def test_the_cube_is_lplbs() -> None:
    """The published r2o of the cube, and once more for the next eight ranks."""
    r2o = lplb.topology("cube", 16)
    assert r2o[:8].T.tolist() == [[3, 0, 1, 2, 7, 4, 5, 6], [6, 7, 4, 5, 0, 1, 2, 3]]
    assert np.array_equal(r2o[8:], r2o[:8] + 8)


@pytest.mark.parametrize(("name", "num_ranks", "per_node", "extra"), [
    ("cube", 8, 0, 2), ("ring", 8, 0, 1), ("hypercube", 16, 0, 2), ("torus", 12, 4, 2)])
def test_every_graph_copies_each_expert_once_and_elsewhere(name: str, num_ranks: int, per_node: int,
                                                           extra: int) -> None:
    """Each column is a permutation without fixed points, and no rank copies from the same rank twice."""
    r2o = lplb.topology(name, num_ranks, per_node)
    assert r2o.shape == (num_ranks, extra)
    for column in r2o.T:
        assert sorted(column.tolist()) == list(range(num_ranks))
        assert np.all(column != np.arange(num_ranks))
    assert all(len(set(row)) == extra for row in r2o.tolist())


def test_the_hypercube_is_the_cube_of_four_dimensions() -> None:
    """Its links join ranks that differ in one bit of their places, numbered along rings of four (Gray code)."""
    gray = [0, 1, 3, 2]
    place_of = np.array([gray[rank // 4] * 4 + gray[rank % 4] for rank in range(16)])
    r2o = lplb.topology("hypercube", 16)
    edges = {frozenset((int(place_of[rank]), int(place_of[other]))) for rank in range(16) for other in r2o[rank]}
    assert len(edges) == 32
    assert all(bin(a ^ b).count("1") == 1 for a, b in map(tuple, edges))


def draws(name: str, num_ranks: int, per_node: int = 0, count: int = 60) -> np.ndarray:
    """max/mean before, by the exact split, and by five iterations, for batches 30 % around a planned load."""
    rng, r2o, rows = np.random.default_rng(0), lplb.topology(name, num_ranks, per_node), []
    for _ in range(count):
        load = np.maximum(1, rng.normal(100, 30, 256))
        plan = lplb.lplb_plan(load[None], r2o)
        batch = np.maximum(0, load * (1 + 0.3 * rng.standard_normal(256)))
        slots, mean = plan.physical_to_logical[0], batch.sum() / num_ranks
        own = slots.reshape(num_ranks, -1)[:, :256 // num_ranks]
        row = [batch[own].sum(axis=1).max() / mean]
        for method in lplb.METHODS:
            tokens = lplb.split_tokens(slots, batch, r2o, method)
            np.testing.assert_allclose(np.bincount(slots, tokens, minlength=256), batch, rtol=1e-9, atol=1e-9)
            assert tokens.min() >= 0
            row.append(tokens.reshape(num_ranks, -1).sum(axis=1).max() / mean)
        rows.append(row)
    return np.array(rows)


def test_the_cube_balances_as_published() -> None:
    """30 % noise, 256 experts on 8 ranks: max/mean 1.075 falls to 1.005 on average (exact), worst below 1.1."""
    before, exact, five = draws("cube", 8).T
    assert before.mean() == pytest.approx(1.075, abs=0.01)
    assert exact.mean() == pytest.approx(1.005, abs=0.003)
    assert exact.max() < 1.085
    assert np.all(five >= exact * (1 - 1e-9))
    assert five.max() < 1.10  # the tolerance of LPLB's own test


@pytest.mark.parametrize(("name", "num_ranks", "per_node"), [("hypercube", 16, 0), ("torus", 16, 4)])
def test_larger_graphs_balance_within_published_tolerances(name: str, num_ranks: int, per_node: int) -> None:
    """Exact split: 1.03 (hypercube), 1.01 (torus) at most, on average; five iterations come close."""
    _, exact, five = draws(name, num_ranks, per_node, 30).T
    assert exact.mean() < 1.01
    assert exact.max() < 1.03
    assert five.mean() < 1.03


def test_five_iterations_fall_back_to_halves_when_they_do_not_converge() -> None:
    """With no iteration the residual test fails and every copied expert is split in half."""
    r2o = lplb.topology("ring", 2)
    layer = lplb.Homes(np.array([0.0, 9.0]), np.array([[8.0], [1.0]]), r2o)
    assert lplb.interior_point(layer, iterations=0).tolist() == [[0.5], [0.5]]
    kept = lplb.interior_point(layer)
    assert layer.rank_load(kept).max() == pytest.approx(9.0, abs=0.1)  # rank 1 keeps nothing, rank 0 all


def test_lplb_against_extreme_skew_loses_to_eplb() -> None:
    """One expert with most tokens has two homes under LPLB, many copies under EPLB."""
    load = np.ones((1, 64))
    load[0, 5] = 600.0
    plan = lplb.lplb_plan(load, lplb.topology("cube", 8))
    split = lplb.split_tokens(plan.physical_to_logical[0], load[0], lplb.topology("cube", 8))
    best = split.reshape(8, -1).sum(axis=1).max()
    assert best >= 300
    eplb = place(PlacementProblem(load, 8, 10, 8), "eplb").plan
    assert imbalance(eplb, load)[0] * load.sum() / 8 < best


@pytest.mark.parametrize(("call", "text"), [
    (lambda: lplb.topology("cube", 12), "'cube' needs a multiple of 8 ranks, got 12"),
    (lambda: lplb.topology("hypercub", 16), "Did you mean 'hypercube'"),
    (lambda: lplb.topology("torus", 4, 4), "at least 2 nodes"),
    (lambda: lplb.lplb_plan(np.ones((1, 10)), lplb.topology("ring", 4)), "10 experts must divide over 4 ranks"),
    (lambda: lplb.lplb_plan(np.ones((1, 8)), np.array([[0], [1]])), "another rank"),
])
def test_lplb_says_what_does_not_fit(call: object, text: str) -> None:
    """Ranks, names and experts that the graph cannot take."""
    with pytest.raises(InputError, match=text):
        call()  # type: ignore[operator]


# ---------------------------------------------------------------- LLEP


def check_spill(load: np.ndarray, native: np.ndarray, num_ranks: int, plan: SpillPlan) -> None:
    """Every token once, transfers exactly for foreign parts, each once."""
    for expert, tokens in enumerate(load.tolist()):
        spans = sorted((part.start, part.end) for part in plan.parts if part.expert == expert)
        flat = [place for start, end in spans for place in range(start, end)]
        assert flat == list(range(tokens))
    foreign = {(p.expert, p.rank) for p in plan.parts if p.rank != native[p.expert]}
    assert sorted((t.expert, t.target) for t in plan.transfers) == sorted(foreign)
    assert all(t.source == native[t.expert] for t in plan.transfers)
    assert plan.rank_load(num_ranks).sum() == load.sum()


@settings(max_examples=200, deadline=None)
@given(num_ranks=st.integers(1, 6), per_rank=st.integers(1, 4), alpha=st.sampled_from([1.0, 1.1, 1.5]),
       min_tokens=st.sampled_from([1, 5, 40]), gate=st.sampled_from([0.0, 1.3]), seed=st.integers(0, 2**32 - 1))
def test_llep_computes_every_token_once(num_ranks: int, per_rank: int, alpha: float, min_tokens: int, gate: float,
                                        seed: int) -> None:
    """Parts cover every expert's tokens exactly, and the plan never makes the busiest rank busier than the cap allows."""
    rng = np.random.default_rng(seed)
    native = np.repeat(np.arange(num_ranks), per_rank)
    load = rng.multinomial(60 * len(native), rng.dirichlet(np.full(len(native), 0.3)))
    plan = spill_plan(load, native, num_ranks, alpha=alpha, min_tokens=min_tokens, gate=gate)
    check_spill(load, native, num_ranks, plan)
    if plan.spilled and min_tokens == 1 and alpha > 1:
        assert plan.rank_load(num_ranks).max() <= int(alpha * load.sum() / num_ranks) + num_ranks


def test_llep_by_hand() -> None:
    """Ranks 0 1 2 with one expert each and 80 10 0 tokens: cap 30; 30 stay, 30 go to rank 2, 20 to rank 1."""
    plan = spill_plan(np.array([80, 10, 0]), np.arange(3), 3, min_tokens=5)
    assert plan.parts == (Part(0, 0, 0, 30), Part(0, 2, 30, 60), Part(0, 1, 60, 80), Part(1, 1, 0, 10))
    assert plan.transfers == (Transfer(0, 0, 2), Transfer(0, 0, 1))
    assert plan.foreign_experts(3).tolist() == [0, 1, 1]


def test_llep_refuses_small_chunks_but_not_the_last() -> None:
    """With m = 25 rank 1 (room 20) takes the rest of 20 since it is the last; with 35 to go it would be refused."""
    plan = spill_plan(np.array([80, 10, 0]), np.arange(3), 3, min_tokens=25)
    assert Part(0, 1, 60, 80) in plan.parts
    forced = spill_plan(np.array([90, 20, 10]), np.arange(3), 3, min_tokens=25)  # cap 40: room 20 and 30, 50 to go
    assert forced.parts[1:3] == (Part(0, 2, 40, 70), Part(0, 1, 70, 90))
    stuck = spill_plan(np.array([90, 20, 10]), np.arange(3), 3, min_tokens=35)  # no room for 35: least loaded takes all
    assert stuck.parts[1] == Part(0, 2, 40, 90)


def test_llep_gate_reads_rank_loads_unless_told_otherwise() -> None:
    """30 % of the tokens into 4 of 128 experts on 8 ranks: 9.6 by experts, 2.9 by ranks."""
    load = np.full(128, 700)
    load[:4] = 9300
    load = load * 1000 // load.sum()
    native = np.repeat(np.arange(8), 16)
    by_rank, by_expert = (spill_plan(load, native, 8, gate=gate, gate_on=on)
                          for on, gate in (("ranks", 3.5), ("experts", 3.5)))
    assert not by_rank.spilled
    assert by_expert.spilled


def test_llep_moves_few_large_experts() -> None:
    """gpt-oss-120b's layer, 32K tokens, top-4: 95 % into 1 expert takes 7 helpers and some more, not hundreds."""
    load = np.full(128, 262144 * 4 * 0.05 // 127).astype(int)
    load[0] = int(262144 * 4 * 0.95)
    plan = spill_plan(load, np.repeat(np.arange(8), 16), 8)
    check_spill_cheaply = plan.rank_load(8)
    assert check_spill_cheaply.max() / check_spill_cheaply.mean() < 1.02
    assert 7 <= len(plan.transfers) <= 12  # a published count for it is 9


@pytest.mark.parametrize(("change", "text"), [
    ({"alpha": 0.5}, "alpha >= 1"), ({"min_tokens": 0}, "min_tokens >= 1"), ({"gate": -1.0}, "gate >= 0"),
    ({"gate_on": "rank"}, "Did you mean 'ranks'")])
def test_llep_refuses_bad_parameters(change: dict[str, object], text: str) -> None:
    """Each parameter's range is checked."""
    with pytest.raises(InputError, match=text):
        spill_plan(np.array([3, 1]), np.array([0, 1]), 2, **change)  # type: ignore[arg-type]


def test_llep_refuses_homes_that_are_no_rank() -> None:
    """Native ranks must exist."""
    with pytest.raises(InputError, match=r"0 \.\.\. 1"):
        spill_plan(np.array([3, 1]), np.array([0, 2]), 2)


def test_all_engines_agree_where_there_is_nothing_to_decide() -> None:
    """Equal loads, no redundant slot: every variant ends at the mean."""
    problem = PlacementProblem(np.full((2, 8), 5.0), 4, 2, 2)
    for solver, layer in product(("eplb", "eplb-vllm", "eplb-sglang", "eplb-tensorrt-llm", "balance"), range(2)):
        assert imbalance(place(problem, solver).plan, problem.expert_load)[layer] == 1.0
