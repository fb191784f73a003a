"""Slots of layers: published costs against enumeration, the dynamic program against brute force, roundings against what they minimise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.allocation import adapmoe_costs, adapmoe_slots, best_slots, measured_slots, plec_slots
from moesim.cache.cache import ExpertCache
from moesim.cache.curves import NOT_DETERMINED, HitCurve, hit_curves
from moesim.cache.policy import AccessStream, PolicyContext, access_stream, make_policy
from moesim.cache.replay import replay
from moesim.errors import InputError
from moesim.traces.synth import synthetic_trace


def all_slots(num_layers: int, most: int, total: int) -> Iterator[tuple[int, ...]]:
    """Every way to give each of the layers 0 ... most slots, at most `total` in sum."""
    return (slots for slots in itertools.product(range(most + 1), repeat=num_layers) if sum(slots) <= total)


# AdapMoE


def test_adapmoe_is_the_printed_formula() -> None:
    """8 experts, 2 per token, 4 slots, a = 0.8, r = 0.25: P2 = 12/56, P1 = 32/56, so 0.25 * 0.5 * 0.2 + 0.75 * (2 * 12/56 * 0.2 +
    12/56 * 0.8 + 32/56 * 0.2) = 0.025 + 0.75 * 20.8/56."""
    cost = adapmoe_costs([0.8], [0.25], 8)
    assert cost.shape == (1, 9)
    assert cost[0, 4] == pytest.approx(0.025 + 0.75 * 20.8 / 56)
    for t in range(9):
        p2, p1 = (8 - t) * (7 - t) / 56, 2 * t * (8 - t) / 56
        printed = 0.25 * (1 - t / 8) * 0.2 + 0.75 * (2 * p2 * 0.2 + p2 * 0.8 + p1 * 0.2)
        assert cost[0, t] == pytest.approx(printed)


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (5, 2), (6, 3), (6, 6), (7, 4)])
def test_adapmoe_counts_all_sets(num_experts: int, top_k: int) -> None:
    """For any E and k it is the mean over all sets of k experts: absent ones, less one where the prediction helps."""
    accuracy, single = 0.7, 0.4
    cost = adapmoe_costs([accuracy], [single], num_experts, top_k)[0]
    for slots in range(num_experts + 1):
        loads = {}
        for k in (1, top_k):
            sets = list(itertools.combinations(range(num_experts), k))
            absent = [sum(expert >= slots for expert in chosen) for chosen in sets]
            loads[k] = sum(n - accuracy * (n > 0) for n in absent) / len(sets)
        assert cost[slots] == pytest.approx(single * loads[1] + (1 - single) * loads[top_k])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3), st.integers(2, 4), st.integers(0, 9))
def test_adapmoe_slots_are_the_best(layers: list[tuple[float, float]], num_experts: int, more: int) -> None:
    """No way of giving each layer at least one slot expects fewer loads."""
    accuracy, single = zip(*layers, strict=True)
    total = len(layers) + more
    slots = adapmoe_slots(total, accuracy, single, num_experts)
    cost = adapmoe_costs(accuracy, single, num_experts)
    every = [sum(cost[layer, n] for layer, n in enumerate(given_)) for given_ in all_slots(len(layers), num_experts, total)
             if min(given_) >= 1]
    assert slots.min() >= 1
    assert slots.sum() <= total
    assert sum(cost[layer, n] for layer, n in enumerate(slots)) == pytest.approx(min(every), abs=1e-12)


def test_adapmoe_gives_slots_to_layers_that_are_predicted_badly() -> None:
    """The first layer, for which nothing predicts, gets most of 24 slots for 4 layers of 8 experts."""
    assert adapmoe_slots(24, [0.0, 0.6, 0.8, 0.9], [0.25] * 4, 8).tolist() == [8, 7, 5, 4]


# The dynamic program


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(0, 14), st.integers(0, 1))
def test_best_slots_are_brute_force(cost: list[list[int]], more: int, least: int) -> None:
    """Curves of any shape: the least sum of all ways, within the total."""
    table, total = np.array(cost), least * len(cost) + more
    slots = best_slots(table, total, least=least)
    sums = [sum(row[n] for row, n in zip(cost, given_, strict=True)) for given_ in all_slots(len(cost), 3, total)
            if min(given_) >= least]
    assert slots.sum() <= total
    assert slots.min() >= least
    assert sum(row[n] for row, n in zip(cost, slots.tolist(), strict=True)) == min(sums)


# PLEC


def test_plec_example() -> None:
    """The paper's example, 4 slots for demands 3 and 2: 3 and 1. The largest remainder gives something else."""
    assert plec_slots([3, 2], 4).tolist() == [3, 1]
    assert plec_slots([3, 2], 4, rounding="in-order").tolist() == [3, 1]
    assert plec_slots([3, 2], 4, rounding="largest-remainder").tolist() == [2, 2]


demands = st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any)


@settings(deadline=None, max_examples=150)
@given(demands, st.integers(0, 9), st.sampled_from(["dhondt", "largest-remainder", "in-order"]))
def test_plec_gives_out_everything(demand: list[int], total: int, rounding: str) -> None:
    """All slots are given (``in-order``: as many as are wanted), none to a layer without demand."""
    slots = plec_slots(demand, total, rounding=rounding)
    assert slots.sum() == (min(total, sum(demand)) if rounding == "in-order" else total)
    assert all(n == 0 for n, each in zip(slots, demand, strict=True) if each == 0)


@settings(deadline=None, max_examples=100)
@given(demands, st.integers(1, 8))
def test_dhondt_keeps_the_most_slots_per_demand_low(demand: list[int], total: int) -> None:
    """Of all ways to give out the slots none has a smaller largest share of slots per demand."""
    def largest(slots: tuple[int, ...]) -> float:
        return max(n / each if each else np.inf * (n > 0) if n else 0.0 for n, each in zip(slots, demand, strict=True))

    every = [slots for slots in all_slots(len(demand), total, total) if sum(slots) == total]
    assert largest(tuple(plec_slots(demand, total).tolist())) == min(map(largest, every))


@settings(deadline=None, max_examples=100)
@given(demands, st.integers(1, 8))
def test_largest_remainder_is_nearest_to_the_shares(demand: list[int], total: int) -> None:
    """Of all ways to give out the slots none is nearer to the exact shares, added up."""
    def distance(slots: tuple[int, ...]) -> int:
        return sum(abs(n * sum(demand) - each * total) for n, each in zip(slots, demand, strict=True))

    every = [slots for slots in all_slots(len(demand), total, total) if sum(slots) == total]
    assert distance(tuple(plec_slots(demand, total, rounding="largest-remainder").tolist())) == min(map(distance, every))


# Measured curves


def curve_of(rows: list[list[int]], smallest: list[int] | None = None) -> HitCurve:
    """A curve of these hits at 0, 1, ... slots."""
    hits = np.array(rows)
    least = np.array(smallest or [0] * len(rows))
    hits[np.arange(hits.shape[1]) < least[:, None]] = NOT_DETERMINED
    return HitCurve("lru", "set", True, np.full(len(rows), hits.max() + 1), hits, least)


curves = st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4).map(lambda gains: np.cumsum([0, *gains]).tolist()),
                  min_size=1, max_size=4)


@settings(deadline=None, max_examples=150)
@given(curves, st.integers(0, 17))
def test_measured_slots_are_the_best(rows: list[list[int]], total: int) -> None:
    """``exact`` has the most hits of all ways for curves of any shape; ``marginal`` never more, and as many if no curve bends up."""
    curve = curve_of(rows)

    def hits(slots: np.ndarray) -> int:
        return sum(row[n] for row, n in zip(rows, slots.tolist(), strict=True))

    most = max(sum(row[n] for row, n in zip(rows, given_, strict=True)) for given_ in all_slots(len(rows), 4, total))
    exact, marginal = measured_slots(curve, total), measured_slots(curve, total, method="marginal")
    assert max(exact.sum(), marginal.sum()) <= total
    assert hits(exact) == most >= hits(marginal)
    if all(np.all(np.diff(row, 2) <= 0) for row in rows):
        assert hits(marginal) == most


def test_marginal_gain_can_miss_a_cliff() -> None:
    """A layer that only hits from two slots on never gets its first one from the marginal rule."""
    curve = curve_of([[0, 0, 10], [0, 1, 2]])
    assert measured_slots(curve, 2).tolist() == [2, 0]
    assert measured_slots(curve, 2, method="marginal").tolist() == [0, 2]


def layer_hits(stream: AccessStream, layer: int, slots: int, num_experts: int) -> int:
    """The LRU hits of one layer alone with so many slots, by the readable replay."""
    own = np.flatnonzero(stream.layers == layer)
    parts = [stream.experts_of(int(access)) for access in own]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    alone = AccessStream(np.zeros(len(own), np.int32), offsets, np.concatenate(parts))
    cache = ExpertCache(1, num_experts, slots, make_policy("lru", PolicyContext(1, num_experts)))
    return int(replay(alone, cache).hits.sum())


def test_measured_slots_of_a_trace() -> None:
    """On a trace the curve's best slots have the hits that replays of the single layers add up to, and beat equal pools."""
    trace = synthetic_trace(60, 3, 8, 2, 6, seed=2)
    stream = access_stream(trace, [np.array([row]) for row in range(60)])
    curve = hit_curves(stream, 8)["lru"]
    slots = measured_slots(curve, 12)
    assert slots.sum() == 12
    assert slots.min() >= curve.smallest_slots.max() == 2
    found = int(curve.hits[np.arange(3), slots].sum())
    assert found == sum(layer_hits(stream, layer, int(n), 8) for layer, n in enumerate(slots))
    assert found >= int(curve.hits_at(4).sum())


@pytest.mark.parametrize(("call", "text"), [
    (lambda: adapmoe_slots(1, [0.5, 0.5], [0, 0], 8), "2 layers need at least 2 slots, got 1"),
    (lambda: adapmoe_costs([1.5], [0], 8), "accuracy must be one number in 0 ... 1 per layer"),
    (lambda: adapmoe_costs([0.5], [0, 0], 8), "1 accuracies and 2 single shares"),
    (lambda: adapmoe_costs([0.5], [0], 8, 9), "top_k must lie in 1 ... 8, got 9"),
    (lambda: best_slots(np.array([[np.nan]]), 1), "costs must be numbers"),
    (lambda: best_slots(np.array([[np.inf]]), 1), "a layer can have no number of slots"),
    (lambda: plec_slots([0, 0], 1), "some demand"),
    (lambda: plec_slots([1], 1, rounding="dhont"), "unknown rounding 'dhont'. Did you mean 'dhondt'?"),
    (lambda: measured_slots(curve_of([[0, 1, 2]], [2]), 1), "1 layers need at least 2 slots, got 1"),
    (lambda: measured_slots(curve_of([[0, 1, 2]], [2]), 1, method="marginal"), "1 layers need at least 2 slots, got 1"),
    (lambda: measured_slots(curve_of([[0, 1]]), 1, method="greedy"), "unknown method 'greedy'"),
])
def test_bad_input(call: object, text: str) -> None:
    """What cannot be allotted is refused in one line."""
    with pytest.raises(InputError) as caught:
        call()  # type: ignore[operator]
    assert text in str(caught.value)
