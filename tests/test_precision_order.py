"""D2MoE's order of loading against the exact best, and its planes under a budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.precision import ExpertVersions
from moesim.cache.precision_order import Item, best_order, hebf_order, id_order, load_order, makespan_ns
from moesim.cache.precision_planes import Plane, PlaneCache
from moesim.errors import CheckError, InputError

VERSIONS = ExpertVersions((2, 3, 4), (20, 10, 10), nested=True)


def random_layer(seed: int, experts: int = 3, levels: int = 3) -> tuple[np.ndarray, dict[tuple[int, int], Item]]:
    """Choices of each (expert, level) and their times: a plane takes 8 to 40, a kernel 1 plus 2 per choice and plane."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, (experts, levels)) * (rng.random((experts, levels)) < 0.7)
    plane, items = int(rng.integers(8, 41)), {}
    for expert in range(experts):
        below = -1
        for level in np.flatnonzero(counts[expert]).tolist():
            planes = level - below + (below < 0)  # the base plane is twice as large
            items[expert, level] = Item(expert, level, plane * planes, 1 + 2 * int(counts[expert, level]) * (level + 2))
            below = level
    return counts, items


def every_order(items: dict[tuple[int, int], Item]) -> list[list[Item]]:
    """All orders that load each expert's levels rising."""
    return [list(order) for order in itertools.permutations(items.values())
            if all(a.level < b.level for a, b in itertools.combinations(order, 2) if a.expert == b.expert)]


def flow_shop(order: list[Item]) -> int:
    """Two machines step by step: start each operation as soon as its machine and its load allow."""
    link = device = 0
    for item in order:
        link += item.io_ns
        device = (link if link > device else device) + item.compute_ns
    return device


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999))
def test_the_best_order_is_the_best_of_all(seed: int) -> None:
    """Dynamic programming against every order of up to 7 items; neither published order is better."""
    counts, items = random_layer(seed)
    items = dict(sorted(items.items())[:7])
    best = best_order(list(items.values()))
    assert sorted(best) == sorted(items.values())
    assert makespan_ns(best) == min(map(flow_shop, every_order(items)), default=0)
    for name in ("hebf", "id"):
        order = [items[item] for item in load_order(name, counts) if item in items]
        assert makespan_ns(order) == flow_shop(order) >= makespan_ns(best)


def test_hottest_first_is_nearer_to_the_best_than_id_order() -> None:
    """Over 300 random layers of 5 experts: HEBF's makespan is on average below that of ID order, and never below the best."""
    shares = []
    for seed in range(300):
        counts, items = random_layer(seed, experts=5)
        best = makespan_ns(best_order(list(items.values())))
        shares.append([makespan_ns([items[i] for i in load_order(name, counts)]) / best for name in ("hebf", "id")])
    hebf, by_id = np.array(shares).mean(axis=0)
    assert np.min(shares) >= 1
    assert hebf < by_id


def hebf_by_hand(counts: np.ndarray) -> list[tuple[int, int]]:
    """The paper's text: a queue per expert, always the hottest head; here by looking at all items every time."""
    left, order = {(int(e), int(k)) for e, k in np.argwhere(counts)}, []
    while left:
        heads = [(e, k) for e, k in left if all((e, lower) not in left for lower in range(k))]
        hottest = max(counts[head] for head in heads)
        head = min((head for head in heads if counts[head] == hottest), key=lambda head: (head[1], head[0]))
        order.append(head)
        left.discard(head)
    return order


@given(st.integers(0, 9999), st.integers(1, 6))
def test_hebf_takes_the_hottest_head(seed: int, experts: int) -> None:
    """Against a direct restatement, ties included."""
    counts, _ = random_layer(seed, experts)
    assert hebf_order(counts) == hebf_by_hand(counts)
    assert id_order(counts) == sorted(hebf_order(counts))


def test_hebf_by_hand() -> None:
    """Expert 0 is hot at a high level only, behind its cold base; expert 1 goes first."""
    assert hebf_order(np.array([[1, 9], [5, 0], [2, 3]])) == [(1, 0), (2, 0), (2, 1), (0, 0), (0, 1)]


def test_orders_that_are_none_are_refused() -> None:
    """An unknown name, and a search over too many states."""
    with pytest.raises(InputError, match="one of hebf, id, got 'hot'"):
        load_order("hot", np.zeros((1, 1), int))
    with pytest.raises(InputError, match="30 experts with 30 items are too many"):
        best_order([Item(expert, 0, 1, 1) for expert in range(30)])


# ---------------------------------------------------------------- planes under a budget


def test_the_layer_before_goes_first_from_the_highest_bit_down() -> None:
    """Layer 1 needs 40 of 90 bytes; 20 are free; layer 0 gives its top planes, and keeps its base planes."""
    planes = PlaneCache(2, 3, 90, VERSIONS)
    assert planes.prepare(0, {0: 2, 1: 1}) == []
    assert planes.free_bytes == 90 - 40 - 30
    assert planes.prepare(1, {2: 2}) == [Plane(0, 0, 2), Plane(0, 0, 1)]
    assert (planes.level_of(0, 0), planes.level_of(0, 1), planes.level_of(1, 2)) == (0, 1, 2)
    planes.check()


def test_of_equal_planes_the_least_used_experts_go_first() -> None:
    """Expert 1 was used twice, expert 0 once: expert 0's plane goes."""
    planes = PlaneCache(2, 2, 70, VERSIONS)
    planes.prepare(0, {1: 1})
    planes.prepare(0, {0: 1, 1: 1})
    assert planes.prepare(1, {0: 0}) == [Plane(0, 0, 1)]


def test_after_the_layer_before_come_those_before_it_and_at_last_its_own() -> None:
    """Layer 2 of 3 takes all: layer 1, then layer 0, then what it holds and does not need."""
    planes = PlaneCache(3, 2, 60, VERSIONS)
    for layer in (2, 0, 1):
        planes.prepare(layer, {0: 0})
    assert planes.prepare(2, {1: 2}) == [Plane(1, 0, 0), Plane(0, 0, 0)]
    assert planes.prepare(2, {0: 2}) == [Plane(2, 1, 2), Plane(2, 1, 1)]
    assert planes.level_of(2, 0) == 2
    planes.check()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999))
def test_planes_stay_within_the_budget_and_serve_what_is_wanted(seed: int) -> None:
    """Random layers in turn: all wanted levels are there, nothing is freed that fits, and bases outlive their planes."""
    rng = np.random.default_rng(seed)
    planes = PlaneCache(3, 4, int(rng.integers(100, 400)), VERSIONS)
    for step in range(12):
        wanted = {int(e): int(rng.integers(0, 3)) for e in rng.permutation(4)[: rng.integers(1, 3)]}
        before = [[planes.level_of(layer, e) for e in range(4)] for layer in range(3)]
        missing = sum(VERSIONS.copy_bytes(before[step % 3][e], level) for e, level in wanted.items()
                      if level > before[step % 3][e])
        free = planes.free_bytes
        freed = planes.prepare(step % 3, wanted)
        planes.check()
        assert all(planes.level_of(step % 3, e) >= level for e, level in wanted.items())
        assert bool(freed) == (missing > free)
        if freed:  # without the last one it would not have fitted
            assert free + sum(VERSIONS.part_bytes[plane.level] for plane in freed[:-1]) < missing
        for plane in freed:
            before[plane.layer][plane.expert] -= 1
            assert before[plane.layer][plane.expert] == plane.level - 1


def test_planes_that_cannot_fit_are_refused() -> None:
    """A layer beyond the budget, a budget below one base, and copies instead of planes."""
    with pytest.raises(InputError, match="layer 0 needs 80 B at once, but the budget is 60 B"):
        PlaneCache(1, 2, 60, VERSIONS).prepare(0, {0: 2, 1: 2})
    with pytest.raises(InputError, match="a budget of 10 B holds no expert of 20 B"):
        PlaneCache(1, 2, 10, VERSIONS)
    with pytest.raises(InputError, match="it needs nested ones"):
        PlaneCache(1, 2, 60, ExpertVersions((2, 4), (3, 5)))


def test_a_broken_plane_cache_is_found() -> None:
    """The check can fail."""
    planes = PlaneCache(1, 2, 60, VERSIONS)
    planes.prepare(0, {0: 1})
    planes._used_bytes -= 1
    with pytest.raises(CheckError, match="30 bytes are resident, 29 are counted"):
        planes.check()
