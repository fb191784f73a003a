"""Bounds on affinity and hops: valid against every plan, never weaker than b-matching, re-checked by other code."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linprog

from moesim.errors import CheckError, InputError
from moesim.placement.bounds.chain_sdp import prove_affinity, prove_hops
from moesim.placement.bounds.chain_sdp_iterate import ChainSDP
from moesim.placement.bounds.chain_sdp_proof import prove_level
from moesim.placement.bounds.chain_sdp_spectrum import Spectrum, capped_simplex
from moesim.placement.bounds.matching import affinity_bound, best_matching
from moesim.placement.certificate import Certificate, read_certificate
from moesim.placement.kernels import affinity_sdp as kernels
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.place import place
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.verify.affinity import check_affinity

SHAPES = [(4, 2), (6, 2), (6, 3)]


def homes_of_layer(num_experts: int, num_ranks: int) -> np.ndarray:
    """Return int[choice, expert], every way to put equal numbers of experts on the ranks."""
    choices = itertools.product(range(num_ranks), repeat=num_experts)
    size = num_experts // num_ranks
    return np.array([one for one in choices if all(one.count(rank) == size for rank in range(num_ranks))])


def best_kept(transitions: np.ndarray, num_ranks: int, ranks_per_node: int, node_weight: float) -> float:
    """Return the most that any plan with one slot per expert keeps: the longest path over all choices per layer."""
    homes = homes_of_layer(transitions.shape[1], num_ranks)
    best = np.zeros(len(homes))
    for counts in transitions:
        step = np.empty((len(homes), len(homes)))
        for i, here in enumerate(homes):
            same = here[:, None] == homes[:, None, :]
            node = here[:, None] // ranks_per_node == homes[:, None, :] // ranks_per_node
            step[i] = np.einsum("ij,kij->k", counts, (1 - node_weight) * same + node_weight * node)
        best = (best[:, None] + step).max(axis=0)
    return float(best.max())


def random_problem(seed: int, num_experts: int, num_ranks: int, num_layers: int = 0,
                   ranks_per_node: int = 1) -> PlacementProblem:
    """Return a problem with uneven transitions, some layers of them blocks, some not whole."""
    rng = np.random.default_rng(seed)
    num_layers = num_layers or int(rng.integers(2, 5))
    transitions = np.floor(rng.lognormal(1, 1.2, (num_layers - 1, num_experts, num_experts)))
    transitions += (seed % 2) * rng.random(transitions.shape) + 8.0 * (rng.random(transitions.shape) < 0.2)
    return PlacementProblem(np.ones((num_layers, num_experts)), num_ranks, num_experts // num_ranks, ranks_per_node,
                            transitions=transitions)


def iterated(problem: PlacementProblem, rounds: int, *, cuts: int = 50) -> ChainSDP:
    """Return the chain SDP of the rank level after some rounds, with cuts looked for every third."""
    with ThreadPoolExecutor(1) as pool:
        sdp = ChainSDP(problem.transitions, problem.slots_per_rank, pool, cuts_per_pair=cuts)
        for _ in range(rounds):
            if cuts and sdp.rounds % 3 == 2:
                sdp.find_cuts()
            sdp.iterate()
    sdp.pool = ThreadPoolExecutor(1)
    return sdp


@pytest.mark.parametrize("seed", range(120))
def test_the_optimum_lies_between_plan_and_bound(seed: int) -> None:
    """Over all plans of a small problem the best keeps no more than the SDP's bound, and no less than the solver's."""
    num_experts, num_ranks = SHAPES[seed % 3]
    problem = random_problem(seed, num_experts, num_ranks)
    best = best_kept(problem.transitions, num_ranks, 1, 0.0)
    bound, _ = prove_level(iterated(problem, (5, 30)[seed % 2]), problem.transitions)
    found = place(problem, "affinity", anneal_moves=20).objective * problem.transitions.sum()
    assert found <= best * (1 + 1e-12)
    assert best <= bound


@pytest.mark.parametrize("seed", range(60))
def test_any_multipliers_give_a_valid_bound(seed: int) -> None:
    """Random duals and random weights of random cuts never go below the optimum: validity needs no convergence."""
    rng = np.random.default_rng(seed)
    num_experts, num_ranks = SHAPES[seed % 3]
    problem = random_problem(seed, num_experts, num_ranks)
    sdp = iterated(problem, int(rng.integers(0, 8)), cuts=10)
    sdp.dual += rng.normal(0, rng.choice([0.01, 0.3, 3.0]), sdp.dual.shape).astype(np.float32)
    for pair in range(sdp.num_pairs):
        sdp.cuts[pair] = np.array([rng.permutation(2 * num_experts)[:4] for _ in range(9)], np.int32)
        sdp.cuts[pair][::2, 3] = -1
        sdp.weights[pair] = rng.exponential(0.5, 9)
    bound, _ = prove_level(sdp, problem.transitions)
    assert bound >= best_kept(problem.transitions, num_ranks, 1, 0.0)


@pytest.mark.parametrize("node_weight", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_provers_hold_on_nodes_too(seed: int, node_weight: float) -> None:
    """With two ranks per node, weighted bounds lie above the optimum, and the checker agrees with the prover."""
    problem = random_problem(seed, 4, 4, num_layers=3, ranks_per_node=2)
    best = best_kept(problem.transitions, 4, 2, node_weight) / problem.transitions.sum()
    certificate = prove_affinity(problem, seed=0, time_limit_s=0.1, node_weight=node_weight)
    assert best <= certificate.bound <= 1.0
    assert check_affinity(problem, certificate) == pytest.approx(certificate.bound, rel=2**-30)
    if node_weight == 0.5:
        hops = prove_hops(problem, seed=0, time_limit_s=0.1)
        assert hops.bound <= 2 - 2 * best + 1e-12
        assert check_affinity(problem, hops) == pytest.approx(hops.bound, rel=2**-30)


def test_the_chain_sdp_is_tighter_than_matching() -> None:
    """On 16 experts with structure the SDP wins a fifth of what b-matching leaves open, and cuts win more."""
    problem = structured(16, 4)
    total = problem.transitions.sum()
    matching = affinity_bound(problem)
    plain = prove_level(iterated(problem, 60, cuts=0), problem.transitions)[0] / total
    cut = prove_level(iterated(problem, 60), problem.transitions)[0] / total
    kept = place(problem, "affinity").objective
    assert kept <= cut < plain < matching
    assert matching - plain > 0.2 * (matching - kept)


def structured(num_experts: int, num_ranks: int, ranks_per_node: int = 2, num_layers: int = 5) -> PlacementProblem:
    """Return a problem whose experts hand on inside blocks that are no multiple of a rank."""
    rng = np.random.default_rng(4)
    block = rng.permuted(np.tile(np.arange(num_experts) % 3, (num_layers, 1)), axis=1)
    transitions = rng.poisson(3.0 + 12.0 * (block[:-1, :, None] == block[1:, None, :])).astype(float)
    return PlacementProblem(np.ones((num_layers, num_experts)), num_ranks, num_experts // num_ranks, ranks_per_node,
                            transitions=transitions)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("perfect", "diagonal"), [(True, True), (True, False), (False, True)])
def test_matching_potentials_prove_the_linear_program(seed: int, perfect: bool, diagonal: bool) -> None:
    """Flow, potentials' dual value and scipy's linear program agree, with negative and broken counts too."""
    rng = np.random.default_rng(seed)
    size, capacity = int(rng.integers(2, 7)), int(rng.integers(1, 3))
    counts = rng.normal(0, 9, (size, size)) if seed % 2 else rng.integers(-4, 9, (size, size)).astype(float)
    capacity = min(capacity, size - 1)
    counts = counts if perfect else np.abs(counts)
    value, rows, columns = best_matching(counts, capacity, perfect, diagonal=diagonal)
    over = np.maximum(counts - rows[:, None] - columns, 0.0) * (1 if diagonal else 1 - np.eye(size))
    assert capacity * (rows.sum() + columns.sum()) + over.sum() == pytest.approx(value, abs=1e-7)
    sums = np.vstack([np.kron(np.eye(size), np.ones(size)), np.kron(np.ones(size), np.eye(size))])
    top = (np.ones((size, size)) if diagonal else 1 - np.eye(size)).ravel()
    limits = {"A_eq" if perfect else "A_ub": sums, "b_eq" if perfect else "b_ub": np.full(2 * size, capacity)}
    solved = linprog(-counts.ravel(), bounds=np.column_stack([0 * top, top]), **limits)
    assert value == pytest.approx(-solved.fun, abs=1e-7)
    if not perfect:
        assert min(rows.min(), columns.min()) >= 0


def test_redundant_slots_get_the_matching_bound_of_replicas() -> None:
    """With more slots than experts the prover stays with at-most b-matching, and its checker accepts it."""
    rng = np.random.default_rng(0)
    problem = PlacementProblem(np.ones((3, 6)), 4, 2, 2, transitions=np.floor(rng.lognormal(1, 1, (2, 6, 6))))
    certificate = prove_affinity(problem, seed=0, time_limit_s=1.0)
    assert certificate.method == "b-matching"
    assert certificate.bound == pytest.approx(affinity_bound(problem), rel=1e-12)
    assert check_affinity(problem, certificate) == pytest.approx(certificate.bound, rel=2**-30)
    for seed in range(200):
        plan = place(problem, "random", seed=seed).plan
        assert OBJECTIVES["affinity"].value(problem, plan) <= certificate.bound


def test_the_prover_tells_of_bounds_and_rounded_plans() -> None:
    """A listening progress hears of falling bounds and of plans whose value is exact."""
    problem = structured(12, 4)
    progress = Progress(sense="max")
    certificate = prove_affinity(problem, seed=0, time_limit_s=1.0, progress=progress)
    assert progress.bound == certificate.bound
    plan = PlacementPlan(progress.slots, 4, 12)
    assert OBJECTIVES["affinity"].value(problem, plan) == progress.objective <= certificate.bound


def test_hops_tells_its_progress_in_hops() -> None:
    """The prover of hops reports hops: its bound from below, its plans by the objective's own value."""
    problem = structured(12, 4)
    progress = Progress(sense="min")
    certificate = prove_hops(problem, seed=0, time_limit_s=1.0, progress=progress)
    plan = PlacementPlan(progress.slots, 4, 12)
    assert OBJECTIVES["hops"].value(problem, plan) == pytest.approx(progress.objective, abs=1e-15)
    assert certificate.bound == progress.bound <= progress.objective


def test_an_incumbent_that_meets_the_bound_ends_the_proof() -> None:
    """Where b-matching already proves the plan optimal, no SDP runs, however much time there is."""
    rng = np.random.default_rng(0)
    block = rng.permuted(np.tile(np.arange(8) // 2, (4, 1)), axis=1)
    transitions = 5.0 * (block[:-1, :, None] == block[1:, None, :])
    problem = PlacementProblem(np.ones((4, 8)), 4, 2, 1, transitions=transitions)
    plan = place(problem, "affinity").plan
    certificate = prove_affinity(problem, seed=0, time_limit_s=600.0, incumbent=plan)
    assert (certificate.method, certificate.bound) == ("b-matching", 1.0)


def test_no_transitions_no_proof() -> None:
    """A problem of counts only is refused with the reason."""
    with pytest.raises(InputError, match="holds counts only"):
        prove_affinity(PlacementProblem(np.ones((2, 4)), 2, 2, 1), seed=0, time_limit_s=0.1)


@pytest.fixture(scope="module")
def proven() -> tuple[PlacementProblem, Certificate]:
    """A problem on four ranks of two nodes and a chain SDP certificate of both levels, with cuts."""
    problem = structured(16, 4)
    certificate = prove_affinity(problem, seed=0, time_limit_s=2.0, node_weight=0.5)
    assert certificate.method == "chain SDP"
    assert len(certificate.arrays["rank.cuts"]) > 0
    return problem, certificate


def test_a_certificate_survives_its_file(proven: tuple[PlacementProblem, Certificate], tmp_path) -> None:
    """What is read back from disk proves the same bound, and takes two bytes per multiplier."""
    problem, certificate = proven
    again = read_certificate(certificate.write(tmp_path / "a.bound.npz"))
    assert check_affinity(problem, again) == check_affinity(problem, certificate)
    assert again.arrays["rank.cross"].dtype == np.int16


@pytest.mark.parametrize("name", ["cross", "first", "second", "scale", "rows", "columns", "within", "cut_weight",
                                  "cuts"])
def test_changed_multipliers_prove_another_bound(proven: tuple[PlacementProblem, Certificate], name: str) -> None:
    """Every array counts: turned around, it proves less (never more, or the bound would have been loose)."""
    problem, certificate = proven
    label = f"rank.{name}"
    changed = certificate.arrays[label][::-1]
    if name == "cut_weight":
        changed = certificate.arrays[label] * 2
    if name == "cuts":
        changed = (certificate.arrays[label][:, [1, 0, 2, 3]])
    tampered = replace(certificate, arrays={**certificate.arrays, label: changed})
    assert check_affinity(problem, tampered) > certificate.bound * (1 + 1e-7)


@pytest.mark.parametrize(("label", "change", "text"), [
    ("rank.cross", lambda a: None, "array 'rank.cross' is missing"),
    ("rank.cross", lambda a: a[:, :3], "array 'rank.cross' has shape (4, 3, 16), expected (4, 16, 16)"),
    ("rank.cross", lambda a: a.astype(float), "array 'rank.cross' has type float64"),
    ("node.rows", lambda a: a + np.nan, "array 'node.rows' is not finite"),
    ("rank.cut_weight", lambda a: -a, "a cut has a negative weight"),
    ("rank.cuts", lambda a: a + 40, "names a pair or an expert that does not exist"),
    ("rank.cuts", lambda a: a[:, [0, 1, 1, 3]], "a cut names an expert twice"),
    ("rank.cut_pair", lambda a: a - 9, "names a pair or an expert that does not exist"),
])
def test_broken_arrays_are_refused(proven: tuple[PlacementProblem, Certificate], label: str, change, text: str) -> None:
    """An array that is missing, misshapen, of another type, not finite or out of range is named."""
    problem, certificate = proven
    arrays = dict(certificate.arrays)
    arrays[label] = change(arrays[label])
    if arrays[label] is None:
        del arrays[label]
    with pytest.raises(CheckError) as caught:
        check_affinity(problem, replace(certificate, arrays=arrays))
    assert text in str(caught.value)


@pytest.mark.parametrize(("change", "text"), [
    ({"objective": "balance"}, "proves affinity or hops, not 'balance'"),
    ({"parameters": {"node_weight": 2.0, "levels": {}}}, "node_weight must be in 0 ... 1, got 2.0"),
    ({"parameters": {"levels": {}}}, "lack the number 'node_weight'"),
    ({"parameters": {"node_weight": 0.5}}, "lack 'levels'"),
    ({"parameters": {"node_weight": 0.5, "levels": {"rank": "guess"}}}, "level 'rank' has no known method ('guess')"),
])
def test_broken_headers_are_refused(proven: tuple[PlacementProblem, Certificate], change: dict[str, object],
                                    text: str) -> None:
    """Parameters that the checker cannot use are named."""
    problem, certificate = proven
    with pytest.raises(CheckError) as caught:
        check_affinity(problem, replace(certificate, **change))
    assert text in str(caught.value)


def test_a_chain_certificate_is_refused_for_replicas(proven: tuple[PlacementProblem, Certificate]) -> None:
    """The spectrum of plans with replicas is another: the same arrays prove nothing there."""
    problem, certificate = proven
    more = PlacementProblem(problem.expert_load, 4, 5, 2, transitions=problem.transitions)
    with pytest.raises(CheckError, match="holds for one slot per expert only"):
        check_affinity(more, certificate)


def test_negative_potentials_are_refused_for_replicas() -> None:
    """At-most rows need potentials that are not negative."""
    problem = PlacementProblem(np.ones((2, 3)), 2, 2, 1, transitions=np.ones((1, 3, 3)))
    rows = np.full((1, 3), -1.0)
    certificate = Certificate("affinity", "b-matching", 0.5, {"node_weight": 0.0, "levels": {"rank": "b-matching"}},
                              {"rank.rows": rows, "rank.columns": rows})
    with pytest.raises(CheckError, match="must not be negative where slots are redundant"):
        check_affinity(problem, certificate)


def test_capped_simplex_is_the_nearest_point() -> None:
    """The projection sums to the total, stays within the cap, and shifts all inner entries alike."""
    values = np.random.default_rng(1).normal(0, 3, 40)
    found = capped_simplex(values, 2.0, 12.0)
    assert found.sum() == pytest.approx(12.0)
    assert found.min() >= 0
    assert found.max() <= 2.0
    inner = (found > 1e-9) & (found < 2.0 - 1e-9)
    assert np.ptp((values - found)[inner]) < 1e-9


def test_a_followed_subspace_gives_nearly_the_whole_projection() -> None:
    """After a small change of a matrix, following the subspace gives the projection that numpy's eigh gives."""
    rng = np.random.default_rng(0)
    flat = np.kron(np.eye(2), np.eye(130) - 1 / 130)
    start, change = (flat @ (part + part.T) @ flat for part in rng.normal(size=(2, 260, 260)))
    low_rank = rng.normal(size=(260, 9))
    start += flat @ (low_rank @ low_rank.T) @ flat
    spectrum = Spectrum(500.0, 900.0)
    spectrum.decompose(start.astype(np.float32))
    target = start + 0.01 * change
    assert spectrum.follow(target.astype(np.float32))
    values, vectors = np.linalg.eigh(target)
    expected = (vectors * capped_simplex(values, 500.0, 900.0)) @ vectors.T
    found = spectrum.root() @ spectrum.root().T
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_kernels_of_the_sdp_match_numpy() -> None:
    """Centring, the entrywise step and the cuts' sums are what one writes in numpy."""
    rng = np.random.default_rng(2)
    size = 5
    first, cross, second = (rng.random((size, size)).astype(np.float32) for _ in range(3))
    first, second = first + first.T, second + second.T
    dual = rng.normal(size=(2 * size, 2 * size)).astype(np.float32)
    dual += dual.T
    out = np.empty_like(dual)
    kernels.centred_difference(first, cross, second, dual, out)
    flat = np.kron(np.eye(2), np.eye(size) - 1 / size)
    expected = flat @ (np.block([[first, cross], [cross.T, second]]) - dual) @ flat
    np.testing.assert_allclose(out, expected, atol=1e-5)
    cut, total = np.array([3, 0, 7, 9], np.int32), np.zeros((2 * size, 2 * size))
    kernels.add_cut(total, cut, 2.0)
    by_hand = dual[3, 0] + dual[3, 7] + dual[3, 9] - dual[0, 7] - dual[0, 9] - dual[7, 9]
    assert (total * dual).sum() == pytest.approx(2 * by_hand, rel=1e-5)
    assert kernels.value_of(dual, cut) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_cuts_hold_for_every_plan_and_are_found_where_broken(seed: int) -> None:
    """No 0/1 plan breaks a cut; a relaxed matrix that breaks a triangle is found out."""
    rng = np.random.default_rng(seed)
    homes = np.concatenate([rng.permutation(np.repeat(np.arange(3), 2)) for _ in range(2)])
    joint = np.equal.outer(homes, homes).astype(np.float32)
    assert len(kernels.find_cuts(joint, 0.01, 1000)[0]) == 0
    for cut in itertools.permutations(range(12), 4):
        assert kernels.value_of(joint, np.array(cut, np.int32)) <= 1
    joint = np.eye(12, dtype=np.float32)
    for i, j, value in ((2, 7, 0.7), (2, 9, 0.6), (7, 9, 0.1)):
        joint[i, j] = joint[j, i] = value
    cuts, excess = kernels.find_cuts(joint, 0.05, 1000)
    assert cuts.tolist() == [[2, 7, 9, -1]]
    assert excess == pytest.approx([0.2], abs=1e-6)
