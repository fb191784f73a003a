"""Metrics of a plan: conservation, the three balance figures, kept transitions, fan-out, slot choice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.placement import metrics
from moesim.placement.plan import PlacementPlan
from moesim.traces.trace import RoutingTrace


@st.composite
def plans(draw: st.DrawFn) -> PlacementPlan:
    """Draw a plan of any shape, with or without replicas."""
    num_ranks, slots_per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_slots = num_ranks * slots_per_rank
    num_experts, num_layers = draw(st.integers(1, num_slots)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    extra = rng.integers(0, num_experts, (num_layers, num_slots - num_experts))
    slots = np.concatenate([np.tile(np.arange(num_experts), (num_layers, 1)), extra], axis=1)
    return PlacementPlan(rng.permuted(slots, axis=1), num_ranks, num_experts)


def draw_ids(plan: PlacementPlan, num_tokens: int, top_k: int, seed: int) -> np.ndarray:
    """Return int64[token, layer, k] distinct experts with some padding."""
    rng = np.random.default_rng(seed)
    top_k = min(top_k, plan.num_experts)
    order = np.argsort(rng.random((num_tokens, plan.num_layers, plan.num_experts)), axis=2)[..., :top_k]
    length = rng.integers(0, top_k + 1, (num_tokens, plan.num_layers, 1))
    return np.where(np.arange(top_k) < length, order, -1)


def make_trace(expert_ids: np.ndarray, num_experts: int) -> RoutingTrace:
    """Return one request whose tokens use these experts."""
    num_tokens, num_layers, _ = expert_ids.shape
    zeros = np.zeros(num_tokens, np.int32)
    return RoutingTrace(expert_ids=expert_ids, request_id=zeros, position=np.arange(num_tokens), phase=zeros,
                        step=zeros, num_experts=num_experts, layer_ids=np.arange(num_layers))


# Expert 0 of the first layer has a copy on each rank, expert 1 of the second has both on rank 1.
PLAN = PlacementPlan(np.array([[0, 1, 2, 0], [0, 2, 1, 1]]), num_ranks=2, num_experts=3)


@settings(max_examples=50, deadline=None)
@given(plans(), st.integers(0, 2**16))
def test_rank_loads_sum_to_the_load(plan: PlacementPlan, seed: int) -> None:
    """No token is lost or made: rank and node loads of a layer sum to its load."""
    load = np.random.default_rng(seed).integers(0, 100, (plan.num_layers, plan.num_experts))
    total = load.sum(axis=1)
    np.testing.assert_allclose(metrics.rank_load(plan, load).sum(axis=1), total, rtol=1e-12)
    np.testing.assert_allclose(metrics.node_load(plan, load, plan.num_ranks)[:, 0], total, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(plans(), st.integers(0, 2**16))
def test_the_three_balance_figures_agree(plan: PlacementPlan, seed: int) -> None:
    """max/mean is one more than (max - mean)/mean and the inverse of mean/max, never below one."""
    load = np.random.default_rng(seed).integers(0, 3, (plan.num_layers, plan.num_experts))
    ratio = metrics.imbalance(plan, load)
    assert ratio.min() >= 1 - 1e-12
    np.testing.assert_allclose(metrics.imbalance_excess(plan, load), ratio - 1, atol=1e-12)
    np.testing.assert_allclose(metrics.balancedness(plan, load) * ratio, 1, rtol=1e-12)


def test_loads_by_hand() -> None:
    """Expert 0 with 10 tokens and two copies gives 5 to each; 8 and 4 stay whole."""
    load = np.array([[10, 8, 4], [10, 8, 4]])
    assert metrics.slot_load(PLAN, load).tolist() == [[5, 8, 4, 5], [10, 4, 4, 4]]
    assert metrics.rank_load(PLAN, load).tolist() == [[13, 9], [14, 8]]
    assert metrics.imbalance(PLAN, load).tolist() == [13 / 11, 14 / 11]
    assert metrics.duplicates_on_rank(PLAN).tolist() == [[0, 0], [0, 1]]


def test_a_layer_without_load_is_balanced() -> None:
    """Zero load is imbalance 1, not a division by zero."""
    assert metrics.imbalance(PLAN, np.zeros((2, 3))).tolist() == [1.0, 1.0]


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(0, 2**16))
def test_duplicates_are_slots_minus_distinct_experts(plan: PlacementPlan, seed: int) -> None:
    """On each rank, slots less distinct experts are the wasted copies."""
    found = metrics.duplicates_on_rank(plan)
    size = plan.slots_per_rank
    for layer, slots in enumerate(plan.physical_to_logical.tolist()):
        expected = [size - len(set(slots[first:first + size])) for first in range(0, len(slots), size)]
        assert found[layer].tolist() == expected


@settings(max_examples=50, deadline=None)
@given(plans(), st.integers(0, 30), st.integers(1, 4), st.integers(0, 2**16))
def test_slot_choice_is_an_even_split(plan: PlacementPlan, num_tokens: int, top_k: int, seed: int) -> None:
    """A slot holds the expert asked for, padding stays padding, and replicas differ by at most one token."""
    ids = draw_ids(plan, num_tokens, top_k, seed)
    slots = metrics.slot_of_token(plan, ids)
    assert slots.dtype == np.int32
    assert slots.shape == ids.shape
    np.testing.assert_array_equal(slots == -1, ids == -1)
    for layer, row in enumerate(plan.physical_to_logical):
        used = slots[:, layer][slots[:, layer] >= 0]
        np.testing.assert_array_equal(row[used], ids[:, layer][ids[:, layer] >= 0])
        tokens = np.bincount(used, minlength=plan.num_slots)
        for expert in range(plan.num_experts):
            assert np.ptp(tokens[row == expert]) <= 1


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(0, 2**16))
def test_slot_choice_is_the_running_counter(plan: PlacementPlan, seed: int) -> None:
    """The slots are those of a plain loop that counts the uses of each expert."""
    ids = draw_ids(plan, 12, 3, seed)
    count: dict[tuple[int, int], int] = {}
    expected = np.full(ids.shape, -1)
    for token, layer, k in np.ndindex(*ids.shape):
        expert = int(ids[token, layer, k])
        if expert >= 0:
            turn = count.get((layer, expert), 0)
            homes = np.flatnonzero(plan.physical_to_logical[layer] == expert)
            expected[token, layer, k] = homes[turn % len(homes)]
            count[layer, expert] = turn + 1
    np.testing.assert_array_equal(metrics.slot_of_token(plan, ids), expected)


def test_slot_choice_follows_the_token_index() -> None:
    """Rows in another order with their old index get the slots that they had."""
    ids = draw_ids(PLAN, 20, 2, seed=4)
    order = np.random.default_rng(0).permutation(20)
    slots = metrics.slot_of_token(PLAN, ids)
    np.testing.assert_array_equal(metrics.slot_of_token(PLAN, ids[order], order), slots[order])
    assert (metrics.slot_of_token(PLAN, ids[order]) != slots[order]).any()


def test_kept_transitions_are_those_of_the_tokens() -> None:
    """With one home each, the fraction is that of token steps which stay, counted one by one."""
    plan = PlacementPlan(np.array([[0, 3, 1, 2], [2, 3, 0, 1], [1, 0, 3, 2]]), num_ranks=4, num_experts=4)
    path = np.random.default_rng(1).integers(0, 4, (50, 3))
    transitions = np.zeros((2, 4, 4))
    stays = {"rank": 0, "node": 0}
    for token in path:
        ranks = [plan.physical_to_logical[layer].tolist().index(expert) for layer, expert in enumerate(token)]
        for layer in range(2):
            transitions[layer, token[layer], token[layer + 1]] += 1
            stays["rank"] += ranks[layer] == ranks[layer + 1]
            stays["node"] += ranks[layer] // 2 == ranks[layer + 1] // 2
    kept = metrics.kept_transitions(plan, transitions, ranks_per_node=2)
    assert kept == pytest.approx({scope: count / 100 for scope, count in stays.items()})
    assert 0 < kept["rank"] < kept["node"] < 1


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(0, 2**16))
def test_kept_transitions_of_replicas_are_an_expectation(plan: PlacementPlan, seed: int) -> None:
    """A pair is kept as often as two independent draws of its replicas fall on one rank."""
    shape = (plan.num_layers - 1, plan.num_experts, plan.num_experts)
    transitions = np.random.default_rng(seed).integers(0, 5, shape).astype(float)
    if not transitions.sum():
        return
    expected = 0.0
    for layer, i, j in np.ndindex(*shape):
        here = plan.slot_rank[plan.physical_to_logical[layer] == i]
        there = plan.slot_rank[plan.physical_to_logical[layer + 1] == j]
        expected += transitions[layer, i, j] * np.mean(np.equal.outer(here, there))
    kept = metrics.kept_transitions(plan, transitions, plan.num_ranks)
    assert kept["rank"] == pytest.approx(expected / transitions.sum())
    assert kept["node"] == pytest.approx(1.0)


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(0, 2**16))
def test_fanout_is_a_count_of_distinct_places(plan: PlacementPlan, seed: int) -> None:
    """The mean over token and layer of remote ranks is that of Python sets."""
    ids = draw_ids(plan, 9, 3, seed)
    home = np.random.default_rng(seed).integers(0, plan.num_ranks, 9)
    slots = metrics.slot_of_token(plan, ids)
    sizes = [len({slot // plan.slots_per_rank for slot in row if slot >= 0} - {rank})
             for rank, rows in zip(home.tolist(), slots.tolist(), strict=True) for row in rows]
    found = metrics.fanout(plan, make_trace(ids, plan.num_experts), home, ranks_per_node=1)
    assert found["ranks"] == found["nodes"] == pytest.approx(np.mean(sizes))
    whole = metrics.fanout(plan, make_trace(ids, plan.num_experts), home, ranks_per_node=plan.num_ranks)
    assert whole == {"ranks": found["ranks"], "nodes": 0.0}


def test_fanout_by_hand() -> None:
    """A token at home on rank 0 that uses ranks 0, 1, 2 and 3 visits three ranks and one other node."""
    plan = PlacementPlan(np.array([[0, 1, 2, 3]]), num_ranks=4, num_experts=4)
    trace = make_trace(np.array([[[0, 1, 2, 3]], [[1, 0, -1, -1]]]), 4)
    assert metrics.fanout(plan, trace, np.array([0, 1]), 2) == {"ranks": 2.0, "nodes": 0.5}


@pytest.mark.parametrize(("call", "text"), [
    (lambda: metrics.rank_load(PLAN, np.ones((2, 4))), r"load must be \[layer, expert\] = \(2, 3\), got \(2, 4\)"),
    (lambda: metrics.node_load(PLAN, np.ones((2, 3)), 3), "2 ranks are not whole nodes of 3"),
    (lambda: metrics.node_load(PLAN, np.ones((2, 3)), 0), "2 ranks are not whole nodes of 0"),
    (lambda: metrics.kept_transitions(PLAN, np.ones((2, 3, 3)), 1), r"transitions must be \(1, 3, 3\)"),
    (lambda: metrics.kept_transitions(PLAN, np.zeros((1, 3, 3)), 1), "no transition was counted"),
    (lambda: metrics.slot_of_token(PLAN, np.zeros((5, 3, 1), int)), r"\[token, 2 layers, k\], got \(5, 3, 1\)"),
    (lambda: metrics.slot_of_token(PLAN, np.full((1, 2, 1), 3)), r"must be -1 ... 2 for this plan, found 3 ... 3"),
    (lambda: metrics.slot_of_token(PLAN, np.full((1, 2, 1), -2)), r"found -2 ... -2"),
    (lambda: metrics.slot_of_token(PLAN, np.zeros((4, 2, 1), int), np.arange(3)),
     r"token_index must have shape \(4,\)"),
    (lambda: metrics.fanout(PLAN, make_trace(np.zeros((2, 2, 1), int), 3), np.array([0, 2]), 1),
     "home_rank must be in 0 ... 1"),
    (lambda: metrics.fanout(PLAN, make_trace(np.zeros((2, 2, 1), int), 3), np.zeros(3, int), 1),
     r"home_rank must have shape \(2,\)"),
])
def test_what_is_not_of_the_plan_is_refused(call: object, text: str) -> None:
    """Shapes, ids and ranks that do not belong to the plan give an error, never a number."""
    with pytest.raises(InputError, match=text):
        call()
