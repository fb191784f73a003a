"""The exact split of tokens over replicas: equal to the linear program, proven by its own cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from moesim.errors import InputError
from moesim.placement.metrics import rank_load
from moesim.placement.plan import PlacementPlan
from moesim.placement.split import optimal_split, split_layer, static_split


def random_layer(num_experts: int, num_ranks: int, slots_per_rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots with every expert somewhere and random replicas, and skewed loads with some zeros."""
    rng = np.random.default_rng(seed)
    slots = np.concatenate([np.arange(num_experts),
                            rng.integers(num_experts, size=num_ranks * slots_per_rank - num_experts)])
    load = rng.multinomial(50 * num_experts, rng.dirichlet(np.full(num_experts, 0.4)))
    return rng.permutation(slots), load.astype(float)


def by_linprog(slots: np.ndarray, load: np.ndarray, num_ranks: int) -> float:
    """The linear program by HiGHS."""
    count, size = len(slots), len(slots) // num_ranks
    place = np.arange(count)
    equal = coo_matrix((np.ones(count), (slots, place)), shape=(len(load), count + 1))
    below = coo_matrix((np.concatenate([np.ones(count), -np.ones(num_ranks)]),
                        (np.concatenate([place // size, np.arange(num_ranks)]),
                         np.concatenate([place, np.full(num_ranks, count)]))), shape=(num_ranks, count + 1))
    cost = np.zeros(count + 1)
    cost[-1] = 1.0
    done = linprog(cost, A_ub=below, b_ub=np.zeros(num_ranks), A_eq=equal, b_eq=load, method="highs")
    assert done.status == 0
    return float(done.fun)


def check_split(slots: np.ndarray, load: np.ndarray, num_ranks: int) -> float:
    """Check feasibility, the value, and the cut that proves it; return the value."""
    split = split_layer(slots, load, num_ranks)
    assert split.tokens.min() >= 0
    np.testing.assert_allclose(np.bincount(slots, weights=split.tokens, minlength=len(load)), load, rtol=1e-12,
                               atol=1e-9)
    ranks = split.tokens.reshape(num_ranks, -1).sum(axis=1)
    assert ranks.max() == pytest.approx(split.largest, rel=1e-11, abs=1e-9)
    owner = np.arange(len(slots)) // (len(slots) // num_ranks)
    inside = [e for e in range(len(load)) if split.forced[owner[slots == e]].all()]
    assert load[inside].sum() / split.forced.sum() == pytest.approx(split.largest, rel=1e-11, abs=1e-9)
    return split.largest


@settings(max_examples=300, deadline=None)
@given(num_ranks=st.integers(1, 7), slots_per_rank=st.integers(1, 5), spare=st.integers(0, 12),
       seed=st.integers(0, 2**32 - 1))
def test_the_split_is_the_optimum_of_the_linear_program(num_ranks: int, slots_per_rank: int, spare: int,
                                                        seed: int) -> None:
    """On small random layers the value equals HiGHS's, and the set of ranks in the answer proves it alone."""
    num_experts = max(1, num_ranks * slots_per_rank - spare)
    slots, load = random_layer(num_experts, num_ranks, slots_per_rank, seed)
    assert check_split(slots, load, num_ranks) == pytest.approx(by_linprog(slots, load, num_ranks), rel=1e-9, abs=1e-7)


@pytest.mark.parametrize(("num_ranks", "slots_per_rank", "seed"), [(64, 5, 0), (64, 6, 1), (32, 9, 2), (128, 3, 3)])
def test_the_split_is_the_optimum_at_the_size_of_deepseek(num_ranks: int, slots_per_rank: int, seed: int) -> None:
    """With 256 experts the value equals HiGHS's."""
    slots, load = random_layer(256, num_ranks, slots_per_rank, seed)
    assert check_split(slots, load, num_ranks) == pytest.approx(by_linprog(slots, load, num_ranks), rel=1e-9)


def test_a_chain_of_replicas_carries_load_over_several_ranks() -> None:
    """Expert r sits on ranks r and r + 1: a load of 12 on the first spreads over all ranks only along the chain."""
    slots = np.array([0, 3, 1, 0, 2, 1, 3, 2])  # ranks (0, 3), (1, 0), (2, 1), (3, 2)
    split = split_layer(slots, np.array([12.0, 0.0, 0.0, 0.0]), 4)
    assert split.largest == 6.0  # only its own two ranks can take expert 0
    split = split_layer(slots, np.array([8.0, 4.0, 0.0, 0.0]), 4)
    assert split.largest == 4.0  # 4 + 4 of expert 0, expert 1 moves to rank 2
    assert split.forced.tolist() in ([True, True, False, False], [True, True, True, False])


def test_shares_belong_to_a_plan_and_make_it_as_light_as_the_split() -> None:
    """`optimal_split` gives shares that sum to 1, even ones where there is no load, and reach the layers' optimum."""
    rows = [random_layer(12, 4, 5, seed) for seed in range(3)]
    plan = PlacementPlan(np.stack([slots for slots, _ in rows]), 4, 12)
    load = np.stack([load for _, load in rows])
    load[0, 0] = 0.0
    shares = optimal_split(plan, load)
    held = plan.physical_to_logical[0] == 0
    assert np.allclose(shares[0][held], 1 / held.sum())
    best = [split_layer(plan.physical_to_logical[layer], load[layer], 4).largest for layer in range(3)]
    split = static_split(plan, load)
    np.testing.assert_allclose(rank_load(split, load).max(axis=1), best, rtol=1e-11)
    assert np.all(rank_load(plan, load).max(axis=1) >= np.array(best) * (1 - 1e-12))


@pytest.mark.parametrize(("slots", "load", "num_ranks", "text"), [
    ([0, 1, 0], [1.0, 1.0], 2, "3 slots do not divide over 2 ranks"),
    ([0, 0], [1.0, 1.0], 2, "expert 1 has no slot"),
    ([0, 2], [1.0, 1.0], 2, "slots must hold experts 0 ... 1"),
    ([0, 1], [1.0, -1.0], 2, "finite and not negative"),
    ([0, 1], [1.0, float("nan")], 2, "finite and not negative"),
])
def test_a_split_that_makes_no_sense_is_refused(slots: list[int], load: list[float], num_ranks: int, text: str) -> None:
    """What is wrong is said."""
    with pytest.raises(InputError, match=text.replace(".", r"\.")):
        split_layer(np.array(slots), np.array(load), num_ranks)


def test_a_load_of_another_shape_is_refused() -> None:
    """`optimal_split` says what it expects."""
    plan = PlacementPlan(np.array([[0, 1]]), 2, 2)
    with pytest.raises(InputError, match=r"\[layer, expert\] = \(1, 2\), got \(2, 2\)"):
        optimal_split(plan, np.ones((2, 2)))
