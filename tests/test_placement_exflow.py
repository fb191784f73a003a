"""ExFlow: its staged programs against brute force and the sweep, its metric, its files."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.export.engines import export_plan
from moesim.placement.exflow_files import read_exflow_csv
from moesim.placement.exflow_metric import hop_metric
from moesim.placement.metrics import kept_transitions, rank_load
from moesim.placement.objectives import OBJECTIVES
from moesim.placement.place import place, problem_from_trace
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem
from moesim.placement.solvers._exflow_program import crossing, forward_split, relabelled, solve_split
from moesim.placement.solvers._homes import homes_from_plan, slots_from_homes
from moesim.placement.solvers.exflow import exflow
from moesim.placement.step_sample import StepSample
from moesim.traces.blocks import block_trace
from moesim.traces.importers import import_trace
from moesim.traces.stats import transition_counts


def random_transitions(layers: int, experts: int, seed: int, whole: bool = True) -> np.ndarray:
    """Sparse counts between neighbouring layers."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 20, (layers - 1, experts, experts)) * (rng.random((layers - 1, experts, experts)) < 0.7)
    return counts.astype(float) if whole else counts * 0.37


def problem_of(transitions: np.ndarray, num_ranks: int, ranks_per_node: int, slots: int = 0,
               **more: object) -> PlacementProblem:
    """A problem of these transitions with their row sums as load."""
    load = np.concatenate([transitions[:1].sum(axis=2), transitions.sum(axis=1)])
    return PlacementProblem(load, num_ranks, slots or transitions.shape[1] // num_ranks, ranks_per_node,
                            transitions=transitions, **more)  # type: ignore[arg-type]


def balanced(members: int, parts: int) -> list[np.ndarray]:
    """Every way to put members into equal parts."""
    return [np.array(p) for p in set(itertools.permutations(np.repeat(range(parts), members // parts).tolist()))]


def fewest_crossings(transitions: np.ndarray, parts: int) -> float:
    """Dynamic programming over all balanced layers."""
    states = balanced(transitions.shape[1], parts)
    cost = np.zeros(len(states))
    for counts in transitions:
        step = np.array([[(counts * (a[:, None] != b[None, :])).sum() for b in states] for a in states])
        cost = (cost[:, None] + step).min(axis=0)
    return float(cost.min())


@pytest.mark.parametrize("backend", ["cpsat", "pulp"])
@pytest.mark.parametrize(("layers", "members", "parts"), [(3, 4, 2), (5, 4, 2), (3, 4, 4), (3, 6, 2)])
def test_a_split_is_that_of_dynamic_programming(backend: str, layers: int, members: int, parts: int) -> None:
    """Both backends reach the fewest crossings, from a bad start, and prove it."""
    for seed in range(4 if backend == "cpsat" else 2):
        counts = random_transitions(layers, members, seed)
        start = np.tile(np.arange(members) // (members // parts), (layers, 1))[:, ::-1]
        split = solve_split(counts, start, backend=backend, limit_s=20, seed=seed, hint=seed % 2 == 0)
        best = fewest_crossings(counts, parts)
        assert split.crossing == crossing(counts, split.parts) == best
        assert split.bound == pytest.approx(best)
        assert all(np.all(np.bincount(row, minlength=parts) == members // parts) for row in split.parts)


def test_weights_that_are_not_whole_are_scaled() -> None:
    """Fractions of tokens give the optimum of the fractions, and a bound that is not above it."""
    counts = random_transitions(4, 4, 5, whole=False)
    start = np.tile([0, 0, 1, 1], (4, 1))
    split = solve_split(counts, start, backend="cpsat", limit_s=20, seed=0, hint=True)
    assert split.crossing == pytest.approx(fewest_crossings(counts, 2))
    assert split.crossing * (1 - 2**-20) <= split.bound <= split.crossing


def test_parts_are_numbered_by_first_appearance() -> None:
    """Renaming parts changes no crossing and puts the first expert into part 0."""
    counts = random_transitions(4, 6, 1)
    parts = np.random.default_rng(0).permuted(np.tile(np.repeat(range(3), 2), (4, 1)), axis=1)
    again = relabelled(parts)
    assert crossing(counts, again) == crossing(counts, parts)
    first = again[0].tolist()
    assert [first.index(part) for part in range(3)] == sorted(first.index(part) for part in range(3))
    assert first[0] == 0


def test_without_time_the_start_is_kept() -> None:
    """A program that cannot be written down in time, or is too large for CBC, ends with its start."""
    counts = random_transitions(3, 80, 0)
    start = forward_split(counts, 2)
    for backend in ("cpsat", "pulp"):
        split = solve_split(counts, start, backend=backend, limit_s=0.0 if backend == "cpsat" else 5, seed=0, hint=True)
        assert split.crossing == crossing(counts, start)
        assert not split.improved


@pytest.mark.parametrize("mode", ["bipartition", "direct"])
def test_nodes_come_first_then_their_ranks(mode: str) -> None:
    """Stage 1 has the fewest transitions between nodes, stage 2 within the chosen nodes the fewest between ranks."""
    for seed in range(3):
        counts = random_transitions(3, 4, seed)
        problem = problem_of(counts, 4, 2)
        result = place(problem, "exflow", seed=seed, time_limit_s=20, mode=mode)
        assert result.plan is not None
        kept = kept_transitions(result.plan, counts, 2)
        assert (1 - kept["node"]) * counts.sum() == pytest.approx(fewest_crossings(counts, 2))
        homes = homes_from_plan(result.plan)
        assert homes is not None
        for node in range(2):  # by brute force over the two orders of each layer
            own = [np.flatnonzero(row // 2 == node) for row in homes]
            inside = np.stack([counts[layer][np.ix_(own[layer], own[layer + 1])] for layer in range(2)])
            here = np.stack([homes[layer][own[layer]] - 2 * node for layer in range(3)])
            assert crossing(inside, here) == fewest_crossings(inside, 2)
        assert result.plan.provenance["proved"] == result.plan.provenance["programs"] == 3


def test_halves_of_halves_have_ids_that_adjoin() -> None:
    """The first cut of four ranks is between ranks 0, 1 and ranks 2, 3, and it is the one with the fewest crossings."""
    for seed in range(4):
        counts = random_transitions(3, 4, seed)
        plan = place(problem_of(counts, 4, 4), "exflow", time_limit_s=20).plan
        assert plan is not None
        homes = homes_from_plan(plan)
        assert homes is not None
        assert crossing(counts, homes // 2) == fewest_crossings(counts, 2)


def test_the_greedy_pass_alone_is_beaten_where_there_is_time_and_never_loses() -> None:
    """The program improves on its warm start or keeps it; cold, with no time, blocks are what is left."""
    trace = block_trace(800, 5, 6, 1, strength=3.0, seed=2)
    problem = problem_from_trace(trace, num_ranks=2, ranks_per_node=2)
    assert problem.transitions is not None
    greedy = crossing(problem.transitions, forward_split(problem.transitions, 2)) / problem.transitions.sum()
    warm = place(problem, "exflow", time_limit_s=20)
    assert warm.objective is not None
    assert warm.objective <= greedy
    assert warm.objective == pytest.approx(fewest_crossings(problem.transitions, 2) / problem.transitions.sum())
    cold = place(problem, "exflow", time_limit_s=2**-30, warm_start=False)
    blocks = place(problem, "contiguous").plan
    assert blocks is not None
    assert cold.objective == pytest.approx(OBJECTIVES["hops"].value(problem, blocks))


def test_the_result_is_never_worse_than_a_start_and_never_beats_its_bound() -> None:
    """Hops of the result against every start, whole seconds or none; the bound is below."""
    for seed in range(3):
        trace = block_trace(500, 4, 8, 2, seed=seed)
        problem = problem_from_trace(trace, num_ranks=4, ranks_per_node=2)
        starts = [place(problem, name, seed=seed).plan for name in ("random", "affinity", "lpt")]
        hops = OBJECTIVES["hops"]
        for limit_s in (2**-20, 0.5):
            result = exflow(problem, seed=seed, time_limit_s=limit_s, starts=[plan for plan in starts if plan])
            assert result.objective is not None
            assert result.objective_bound is not None
            assert result.objective <= min(hops.value(problem, plan) for plan in starts if plan)
            assert result.objective == hops.value(problem, result.plan)  # type: ignore[arg-type]
            assert result.objective_bound <= result.objective


@pytest.mark.parametrize("mode", ["bipartition", "direct"])
def test_a_plan_to_start_from_is_found_again_at_every_level(mode: str) -> None:
    """Without time for any program, the cuts of the start are kept through all stages, whatever its ranks are called."""
    # planted homes whose cut is the best at every level: ranks, pairs of ranks, nodes of four, all eight
    rng = np.random.default_rng(4)
    homes = np.stack([rng.permutation(np.repeat(np.arange(8), 2)) for _ in range(5)])
    weight = np.stack([sum(10.0 * (here[:, None] // width == there[None, :] // width) for width in (1, 2, 4))
                       for here, there in itertools.pairwise(homes)]) + rng.integers(0, 3, (4, 16, 16))
    problem = PlacementProblem(np.ones((5, 16)), 8, 2, 4, transitions=weight)
    good = PlacementPlan(slots_from_homes(homes, 8, 2), 8, 16)
    name = np.array([6, 7, 5, 4, 2, 3, 1, 0])  # within nodes and halves only
    renamed = PlacementPlan(slots_from_homes(name[homes], 8, 2), 8, 16)
    result = exflow(problem, seed=0, time_limit_s=2**-20, mode=mode, starts=[renamed], warm_start=False)
    assert result.plan is not None
    assert result.objective == pytest.approx(OBJECTIVES["hops"].value(problem, good))
    assert not result.plan.provenance["from_start"]  # the stages themselves arrived there
    alone = exflow(problem, seed=0, time_limit_s=2**-20, mode=mode, warm_start=False)
    assert alone.objective > result.objective  # without the start they do not


def test_the_same_seed_gives_the_same_plan() -> None:
    """Where every program is solved, the clock plays no part."""
    problem = problem_of(random_transitions(4, 4, 3), 4, 2)
    plans = [place(problem, "exflow", seed=7, time_limit_s=20).plan for _ in range(2)]
    assert np.array_equal(*(plan.physical_to_logical for plan in plans if plan))


def test_tokens_in_chunks_end_with_all_tokens() -> None:
    """Chunk by chunk: more programs, and a plan for the whole that is still the best one."""
    trace = block_trace(600, 4, 4, 1, seed=1)
    problem = problem_from_trace(trace, num_ranks=2, ranks_per_node=2)
    steps = StepSample(trace.expert_ids, np.zeros(600, np.int64), np.zeros(600, np.int32))
    chunked = PlacementProblem(problem.expert_load, 2, 2, 2, transitions=problem.transitions, steps=steps)
    result = place(chunked, "exflow", time_limit_s=20, chunk_tokens=250)
    assert result.plan is not None
    assert result.plan.provenance["programs"] == 3  # 250 tokens, 500, all
    assert problem.transitions is not None
    assert result.objective == pytest.approx(fewest_crossings(problem.transitions, 2) / problem.transitions.sum())
    with pytest.raises(InputError, match="chunk_tokens needs the routing token by token"):
        place(problem, "exflow", chunk_tokens=250)


def test_further_slots_hold_copies_of_the_ranks_own_experts() -> None:
    """A copy beside its original: rank loads and kept transitions are those of the homes."""
    counts = random_transitions(3, 4, 0)
    tight, roomy = problem_of(counts, 2, 2), problem_of(counts, 2, 2, slots=5)
    first, second = (place(one, "exflow", time_limit_s=20).plan for one in (tight, roomy))
    assert first is not None
    assert second is not None
    assert second.slots_per_rank == 5
    np.testing.assert_allclose(rank_load(first, tight.expert_load), rank_load(second, tight.expert_load))
    assert kept_transitions(first, counts, 2) == pytest.approx(kept_transitions(second, counts, 2))
    assert np.array_equal(homes_from_plan(first), homes_from_plan(second))  # type: ignore[arg-type]


@pytest.mark.parametrize(("ranks", "per_node", "options", "message"), [
    (3, 3, {}, "6 experts do not divide over 4 ranks|halves again and again, but 3 ranks per node are no power of two"),
    (6, 2, {}, "3 nodes are no power of two; use mode 'direct'"),
    (4, 4, {}, "6 experts do not divide over 4 ranks"),
    (2, 2, {"mode": "bipart"}, r"unknown exflow mode 'bipart'\. Did you mean 'bipartition'\?"),
    (2, 2, {"backend": "gurobi"}, "unknown exflow backend 'gurobi'"),
    (2, 2, {"sub_limit_s": 0.0}, "needs sub_limit_s > 0"),
])
def test_what_it_cannot_do_is_named(ranks: int, per_node: int, options: dict[str, object], message: str) -> None:
    """Parts that cannot be halved, experts that do not divide, options out of range."""
    problem = problem_of(random_transitions(2, 6, 0), ranks, per_node, slots=-(-6 // ranks))
    with pytest.raises(InputError, match=message):
        place(problem, "exflow", **options)


def test_direct_mode_takes_three_parts() -> None:
    """No power of two is needed where nothing is halved."""
    counts = random_transitions(2, 6, 4)
    result = place(problem_of(counts, 3, 3), "exflow", time_limit_s=20, mode="direct")
    assert result.objective == pytest.approx(fewest_crossings(counts, 3) / counts.sum())


# ---------------------------------------------------------------- metric and files


def test_hops_of_a_constructed_trace() -> None:
    """Four GPUs in two nodes, expert e on GPU e: tokens 0-1-3 and 2-2-3 and 0-0-0 make known hops.

    Transitions: 0 to 1 within a node, 1 to 3 across, 2 to 2 none, 2 to 3 within, 0 to 0 none twice: 2 within and 1
    across over 3 tokens.
    """
    ids = np.array([[0, 1, 3], [2, 2, 3], [0, 0, 0]])
    counts = np.zeros((2, 4, 4))
    for token in ids:
        counts[0, token[0], token[1]] += 1
        counts[1, token[1], token[2]] += 1
    plan = PlacementPlan(np.tile(np.arange(4), (3, 1)), 4, 4)
    hops = hop_metric(plan, counts, 2)
    assert hops == pytest.approx((2 / 3, 1 / 3, 4 / 3, 2 / 3, 1 / 6))
    assert hops.cost == pytest.approx(2 * OBJECTIVES["hops"].value(problem_of(counts, 4, 2), plan))
    one_node = hop_metric(plan, counts, 4)
    assert one_node == pytest.approx((1.0, 0.0, 1.0, 1 / 3, 0.0))
    with pytest.raises(InputError, match="no transition from layer 1 to layer 2"):
        hop_metric(plan, counts * np.array([1, 0])[:, None, None], 2)


def test_a_random_plan_has_the_hops_of_chance() -> None:
    """Independent layers on G GPUs: (G - 1) / G hops per transition, 23.25 of 31 on four and 27.125 on eight."""
    counts = np.ones((31, 8, 8))
    for ranks, expected in ((4, 31 * 0.75), (8, 31 * 0.875)):
        plan = PlacementPlan(np.tile(np.arange(8), (32, 1)), ranks, 8)
        assert hop_metric(plan, counts, ranks).cost == pytest.approx(expected)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_plan_survives_its_csv(tmp_path: Path, ranks: int) -> None:
    """Written by the exporter and read again: the same homes, from layers or from experts per layer, in any line order."""
    rng = np.random.default_rng(ranks)
    plan = PlacementPlan(np.stack([rng.permutation(8) for _ in range(5)]), ranks, 8)
    path = export_plan(plan, None, "exflow", tmp_path / "p.csv").path
    lines = path.read_text().splitlines()
    (tmp_path / "q.csv").write_text("\n".join([lines[0], *rng.permutation(lines[1:]).tolist()]))
    for file, sizes in ((path, {"num_experts": 8}), (path, {"num_layers": 5}),
                        (tmp_path / "q.csv", {"num_experts": 8, "num_layers": 5, "num_ranks": ranks})):
        again = read_exflow_csv(file, **sizes)
        assert np.array_equal(homes_from_plan(again), homes_from_plan(plan))  # type: ignore[arg-type]
        assert again.slots_per_rank == 8 // ranks


GOOD = ["Expert,Node", "0,0", "1,1", "2,1", "3,0"]


@pytest.mark.parametrize(("line", "text", "message"), [
    (0, "expert;node", r"bad\.csv:1: expected the header 'Expert,Node', found 'expert;node'"),
    (2, "1,x", r"bad\.csv:3: expected two whole numbers 'expert,node', found '1,x'"),
    (2, "1", r"bad\.csv:3: expected two whole numbers"),
    (3, "-2,1", r"bad\.csv:4: expert and node must not be negative"),
    (3, "1,1", r"bad\.csv:4: expert 1 came before, in line 3; each must come once"),
    (4, "7,0", r"bad\.csv:5: expert 7 in a file of 4 experts; they must be 0 \.\.\. 3, each once"),
    (4, "3,1", r"node 0 holds 0 experts of layer 1, expected 1 on each of 2 nodes"),
    (4, "3,5", r"expert 3 \(expert 1 of layer 1\) is on node 5, expected 0 \.\.\. 1"),
])
def test_a_bad_line_is_named(tmp_path: Path, line: int, text: str, message: str) -> None:
    """What was expected, and where."""
    (tmp_path / "bad.csv").write_text("\n".join([*GOOD[:line], text, *GOOD[line + 1:]]) + "\n")
    with pytest.raises(InputError, match=message):
        read_exflow_csv(tmp_path / "bad.csv", num_experts=2, num_ranks=2)


@pytest.mark.parametrize(("sizes", "message"), [
    ({}, "holds 4 experts of all layers; say how many there are per layer"),
    ({"num_experts": 3}, "4 experts do not divide by 3 experts per layer"),
    ({"num_experts": 2, "num_layers": 3}, "4 experts are 2 layers of 2, expected 3 layers"),
    ({"num_experts": 2, "num_ranks": 3}, "2 experts per layer do not divide over 3 nodes"),
])
def test_sizes_that_do_not_fit_are_named(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    """The file does not say where a layer ends."""
    (tmp_path / "good.csv").write_text("\n".join(GOOD) + "\n")
    with pytest.raises(InputError, match=message):
        read_exflow_csv(tmp_path / "good.csv", **sizes)


def test_its_traces_are_read(tmp_path: Path) -> None:
    """``.npy`` int[token, layer], top-1: the importer gives the transitions that a count by hand gives."""
    ids = np.random.default_rng(0).integers(0, 4, (30, 3))
    np.save(tmp_path / "t.npy", ids)
    trace = import_trace(tmp_path / "t.npy", source_format="npy", num_experts=4, axes=("token", "layer"))
    counts = np.zeros((2, 4, 4), int)
    for token in ids:
        for layer in range(2):
            counts[layer, token[layer], token[layer + 1]] += 1
    assert np.array_equal(transition_counts(getattr(trace, "trace", trace)), counts)


def test_homes_and_slots_are_inverse() -> None:
    """Slots of homes give the homes back; copies on two ranks have none."""
    homes = np.array([[0, 1, 1, 0], [1, 1, 0, 1]])
    slots = slots_from_homes(homes, 2, 3)
    assert slots.tolist() == [[0, 3, 0, 1, 2, 1], [2, 2, 2, 0, 1, 3]]
    assert np.array_equal(homes_from_plan(PlacementPlan(slots, 2, 4)), homes)  # type: ignore[arg-type]
    assert homes_from_plan(PlacementPlan([[0, 1, 1, 2]], 2, 3)) is None
