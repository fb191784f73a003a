"""Fan-out: the objective by hand, bounds below every plan there is, certificates that cannot be bent."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import CheckError, InputError
from moesim.placement.bounds.colocation import colocation_multipliers, colocation_value
from moesim.placement.bounds.fanout import best_slope, prove_fanout, split_gain
from moesim.placement.objectives.fanout import FANOUT, layer_fanout, mean_fanout
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.solvers.joint import joint
from moesim.placement.step_sample import StepSample
from moesim.placement.verify.fanout import check_coactivation


def divisions(experts: tuple[int, ...], per_rank: int) -> Iterator[list[tuple[int, ...]]]:
    """Every division of experts into unlabelled ranks of `per_rank`."""
    if not experts:
        yield []
        return
    first, rest = experts[0], experts[1:]
    for others in itertools.combinations(rest, per_rank - 1):
        left = tuple(one for one in rest if one not in others)
        for more in divisions(left, per_rank):
            yield [(first, *others), *more]


def sampled(seed: int, *, experts: int = 6, ranks: int = 3, per_rank: int = 2, top_k: int = 3, layers: int = 1,
            tokens: int = 20, pads: bool = True) -> PlacementProblem:
    """Random token sets with structure, some padded, in three steps."""
    rng = np.random.default_rng(seed)
    taste = rng.gumbel(size=(3, layers, experts)) * rng.choice([0.3, 1.5])
    score = taste[rng.integers(3, size=tokens)] + rng.gumbel(size=(tokens, layers, experts))
    ids = np.argsort(-score, axis=2)[:, :, :top_k].astype(np.int16)
    if pads:
        ids[rng.random(ids.shape) < 0.1] = -1
    sample = StepSample(ids, np.sort(np.arange(tokens) % 3), rng.integers(ranks, size=tokens).astype(np.int32))
    load = np.stack([np.bincount(part[part >= 0], minlength=experts) for part in np.moveaxis(ids, 1, 0)])
    return PlacementProblem(load, ranks, per_rank, 1, steps=sample)


def distinct_ranks(problem: PlacementProblem, ranks: list[tuple[int, ...]]) -> int:
    """Distinct ranks of all tokens of layer 0, by sets."""
    home = {expert: rank for rank, held in enumerate(ranks) for expert in held}
    assert problem.steps is not None
    return sum(len({home[e] for e in row if e >= 0}) for row in problem.steps.expert_ids[:, 0].tolist())


def test_fanout_by_hand() -> None:
    """Two experts on one rank count once, replicas take turns anew in every step, pads count nothing."""
    ids = np.array([[[0, 1]], [[0, 2]], [[0, -1]], [[3, 0]]], np.int16)
    sample = StepSample(ids, np.array([0, 0, 1, 1]), np.zeros(4, np.int32))
    problem = PlacementProblem(np.ones((1, 4)), 3, 2, 1, steps=sample)
    plan = PlacementPlan(np.array([[0, 1, 2, 0, 3, 3]]), 3, 4)
    # step 0: 0@rank0 with 1@rank0; 0@rank1 with 2@rank1; step 1: 0@rank0; 3@rank2 with 0@rank1
    assert layer_fanout(problem, plan)["ranks"].tolist() == [5]
    assert FANOUT.value(problem, plan) == 5 / 4
    assert mean_fanout(dataclasses.replace(problem, ranks_per_node=3), plan)["nodes"] == 1.0


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([(6, 3, 2), (6, 2, 3), (8, 4, 2), (8, 2, 4), (4, 4, 1), (5, 1, 5)]),
       st.integers(1, 4), st.sampled_from([0.0, 5.0]))
def test_no_plan_is_below_the_bound(seed: int, shape: tuple[int, int, int], top_k: int, limit: float) -> None:
    """The bound holds for all divisions of small instances, checked or not, with multipliers or without."""
    experts, ranks, per_rank = shape
    problem = sampled(seed, experts=experts, ranks=ranks, per_rank=per_rank, top_k=top_k)
    best = min(distinct_ranks(problem, one) for one in divisions(tuple(range(experts)), per_rank)) / 20
    certificate = prove_fanout(problem, seed=0, time_limit_s=limit)
    assert certificate.bound <= best
    checked = check_coactivation(problem, certificate)
    assert checked <= best
    assert checked == pytest.approx(certificate.bound, rel=2.0**-20, abs=2.0**-20)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 3))
def test_no_replicated_plan_is_below_the_bound(seed: int, turn: int) -> None:
    """With redundant slots random plans, with uneven shares too, stay above the bound, and so does the search."""
    problem = sampled(seed, experts=6, ranks=3 + turn % 2, per_rank=3, top_k=3)
    certificate = prove_fanout(problem, seed=0, time_limit_s=0.0)
    assert check_coactivation(problem, certificate) == pytest.approx(certificate.bound, rel=2.0**-20)
    rng = np.random.default_rng(seed)
    extra = problem.num_slots - 6
    for _ in range(20):
        row = rng.permutation(np.concatenate([np.arange(6), rng.integers(6, size=extra)]))
        assert FANOUT.value(problem, PlacementPlan(row[None], problem.num_ranks, 6)) >= certificate.bound
    found = joint(problem, seed=0, time_limit_s=10.0, objective="fanout", moves=300)
    assert found.objective is not None
    assert found.objective >= certificate.bound


def test_the_multipliers_tighten_the_bound() -> None:
    """Where routing has structure the eigenvalue part closes most of what counting leaves open."""
    problem = sampled(3, experts=32, ranks=8, per_rank=4, top_k=4, tokens=1500, pads=False)
    quick = prove_fanout(problem, seed=0, time_limit_s=0.0).bound
    slow = prove_fanout(problem, seed=0, time_limit_s=20.0)
    found = joint(problem, seed=0, time_limit_s=20.0, objective="fanout", moves=20_000).objective
    assert found is not None
    assert quick < slow.bound <= found
    assert found - slow.bound < 0.3 * (found - quick)


def test_colocation_is_exact_on_blocks() -> None:
    """Two cliques of weight 1 on two ranks: exactly all pairs inside, whatever the order of experts."""
    order = np.random.default_rng(0).permutation(8)
    weight = np.kron(np.eye(2), np.ones((4, 4)))[np.ix_(order, order)]
    np.fill_diagonal(weight, 0.0)
    pairs, diagonal, value = colocation_multipliers(weight, 4, time.perf_counter() + 10.0, 20)
    assert value == pytest.approx(24.0, abs=2.0**-20)
    assert colocation_value(weight, pairs.astype(float), diagonal, 4) == value


def test_splits_by_hand() -> None:
    """A token of 4 on ranks of 2 saves at most 2; at a full price per pair every split into pairs breaks even."""
    assert split_gain(4, 0.0, 2).tolist() == [0, 0, 1, 1, 2]
    assert split_gain(4, 1.0, 4).tolist() == [0, 0, 0, 0, 0]
    assert best_slope(np.array([0, 0, 0, 0, 10]), 0.0, 2)[1] == 40.0  # nothing can be shared
    assert best_slope(np.array([0, 0, 0, 0, 10]), 1000.0, 2)[1] == 20.0  # top-k forces two ranks


def test_a_bent_certificate_is_refused() -> None:
    """Missing, misshapen, infinite or negative arrays are a CheckError; worse multipliers only weaken the bound."""
    problem = sampled(1, experts=8, ranks=4, per_rank=2)
    good = prove_fanout(problem, seed=0, time_limit_s=5.0)
    for name in good.arrays:
        rest = {key: value for key, value in good.arrays.items() if key != name}
        with pytest.raises(CheckError, match=f"'{name}' is missing"):
            check_coactivation(problem, dataclasses.replace(good, arrays=rest))
        for wrong in (good.arrays[name][:, :1] if good.arrays[name].ndim > 1 else np.ones(3),
                      np.full_like(good.arrays[name], np.inf)):
            with pytest.raises(CheckError, match="finite"):
                check_coactivation(problem, dataclasses.replace(good, arrays={**rest, name: wrong}))
    with pytest.raises(CheckError, match="negative"):
        check_coactivation(problem, dataclasses.replace(good, arrays={**good.arrays, "slope": np.array([-1.0])}))
    noise = np.random.default_rng(0).normal(size=(1, 8, 8))
    worse = dataclasses.replace(good, arrays={**good.arrays, "pairs": good.arrays["pairs"] + noise})
    best = min(distinct_ranks(problem, one) for one in divisions(tuple(range(8)), 2)) / 20
    assert check_coactivation(problem, worse) <= best


def test_steps_are_needed() -> None:
    """Counts alone bound nothing here."""
    problem = dataclasses.replace(sampled(0), steps=None)
    with pytest.raises(InputError, match="needs token sets step by step"):
        prove_fanout(problem, seed=0, time_limit_s=1.0)
