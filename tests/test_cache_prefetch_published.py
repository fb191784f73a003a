"""Published prefetchers: against the rules of their papers, written out anew from the whole history; worked examples."""

from __future__ import annotations

import ast
import itertools
import math
import random
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.policy import AccessStream, access_stream
from moesim.cache.prefetch import (
    PREFETCHERS,
    LookaheadPrefetcher,
    PrefetchContext,
    Prefetcher,
    PrefetchMoment,
    Wish,
    looks_ahead,
    make_prefetcher,
    reads,
)
from moesim.cache.prefetchers import LookaheadBase
from moesim.cache.prefetchers.finemoe import FineMoePrefetch
from moesim.cache.prefetchers.moe_infinity import MoeInfinityPrefetch, MoeInfinityRepositoryPrefetch
from moesim.cache.prefetchers.stated_recall import StatedPredictions, StatedRecallPrefetch, blurred
from moesim.cache.prefetchers.training import token_accesses, use_tokens
from moesim.cache.scores import RouterScores, request_starts
from moesim.errors import InputError
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import RoutingTrace

Accesses = list[tuple[int, dict[int, int]]]  # layer, tokens by expert
Makespan = Callable[[Mapping[int, int], AbstractSet[int]], float]


@dataclass
class World:
    """A run to be checked: its accesses, what is resident at each, and what is known besides."""

    layers: int
    experts: int
    width: int
    lookahead: int | None
    recall: tuple[float, ...]
    accesses: Accesses
    resident: list[set[tuple[int, int]]]
    starts: list[bool]
    scores: list[list[int]]  # sixteenths, each row sums to 16
    training: Accesses
    training_starts: list[bool]
    training_scores: list[list[int]]
    seed: int

    def context(self, **changes: object) -> PrefetchContext:
        """Return all of it for a prefetcher."""
        fields = {
            "future": stream_of(self.accesses), "future_tokens": tokens_of(self.accesses), "recall": self.recall,
            "seed": self.seed, "lookahead": self.lookahead, "scores": sixteenths(self.scores),
            "training": stream_of(self.training), "training_starts": np.array(self.training_starts),
            "training_scores": sixteenths(self.training_scores), "makespan": two_sides, "copy_s": 1.0,
            "num_layers": self.layers, "num_experts": self.experts, "width": self.width}
        return PrefetchContext(**{**fields, **changes})  # type: ignore[arg-type]


def stream_of(accesses: Accesses) -> AccessStream:
    """Return the stream of (layer, tokens by expert) pairs."""
    return AccessStream(
        np.array([layer for layer, _ in accesses]), np.cumsum([0, *(len(tokens) for _, tokens in accesses)]),
        np.array([expert for _, tokens in accesses for expert in sorted(tokens)], dtype=np.int64))


def tokens_of(accesses: Accesses) -> np.ndarray:
    """Return the tokens of each use."""
    return np.array([tokens[expert] for _, tokens in accesses for expert in sorted(tokens)], dtype=np.int64)


def sixteenths(rows: list[list[int]]) -> RouterScores:
    """Return scores that are exact in binary; the first token's are those of the access."""
    array = np.array(rows) / 16
    return RouterScores(1, array, array)


def two_sides(tokens: Mapping[int, int], resident: AbstractSet[int]) -> float:
    """A layer's time on two sides: residents on the device one after the other, the others on a slower CPU or copied."""
    device = sum(1 for expert in tokens if expert in resident)
    missing = sorted((count, expert) for expert, count in tokens.items() if expert not in resident)
    best = math.inf
    for on_cpu in range(len(missing) + 1):
        cpu = sum(2 * count for count, _ in missing[:on_cpu])
        link = 3 * (len(missing) - on_cpu)
        best = min(best, max(device + (len(missing) - on_cpu), cpu, link))
    return float(best)


def random_world(seed: int) -> World:
    """A small world of few experts, so that keys recur, priorities tie and much is resident."""
    draw = random.Random(seed)
    layers, experts = draw.randint(1, 5), draw.randint(2, 5)

    def steps(count: int) -> Accesses:
        return [(layer, {e: draw.randint(1, 3) for e in draw.sample(range(experts), draw.randint(1, min(3, experts)))})
                for _ in range(count) for layer in range(layers)]

    def rows(count: int) -> list[list[int]]:
        cuts = [sorted(draw.choice((0, 4, 8, 16, draw.randint(0, 16))) for _ in range(experts - 1)) for _ in range(count)]
        return with_all([np.diff([0, *cut, 16]).tolist() for cut in cuts])

    accesses, training = steps(draw.randint(1, 7)), steps(draw.randint(1, 6))
    share, often = draw.choice((0.1, 0.5, 0.9)), draw.choice((0.0, 0.4, 1.0))
    resident = [{key for key in itertools.product(range(layers), range(experts)) if draw.random() < share} for _ in accesses]
    return World(
        layers, experts, draw.randint(1, 6), draw.choice((None, 1, 2, 3, 4)),
        draw.choice(((1.0,), (0.0,), (0.5,), (1.0, 0.5, 0.0))), accesses, resident,
        [layer == 0 and draw.random() < often for layer, _ in accesses], rows(len(accesses)), training,
        [layer == 0 and draw.random() < often for layer, _ in training], rows(len(training)), draw.randint(0, 9))


def worlds() -> st.SearchStrategy[World]:
    """Worlds by their seed."""
    return st.integers(0, 2**32 - 1).map(random_world)


def with_all(rows: list[list[int]]) -> list[list[int]]:
    """Make the last row one in which every expert has a score, as a router gives."""
    rows[-1] = [1] * (len(rows[-1]) - 1) + [17 - len(rows[-1])]
    return rows


def run(prefetcher: Prefetcher | LookaheadPrefetcher, world: World) -> list[list[Wish]]:
    """Return what is wished for at every access (of a one-layer prefetcher: what it names and is absent)."""
    found = []
    for now, (layer, tokens) in enumerate(world.accesses):
        experts = np.array(sorted(tokens), dtype=np.int64)
        counts = np.array([tokens[expert] for expert in experts.tolist()], dtype=np.int64)
        resident = world.resident[now]
        if looks_ahead(prefetcher):
            found.append(prefetcher.wishes(PrefetchMoment(
                layer, now, experts, counts, lambda *key, resident=resident: key in resident,  # type: ignore[misc]
                world.layers, world.starts[now])))
        else:
            named = prefetcher.predict(layer, experts, counts, now)  # type: ignore[union-attr]
            found.append([Wish(layer + 1, expert) for expert in named if (layer + 1, expert) not in resident])
    return found


Rule = Callable[[World, int], list[Wish]]


def all_of(rule: Rule, world: World) -> list[list[Wish]]:
    """Apply a rule to every access: the wishes of absent experts, cut to the width."""
    return [[wish for wish in rule(world, now) if wish[:2] not in world.resident[now]][: world.width]
            for now in range(len(world.accesses))]


def guesses(world: World, now: int, distance: int) -> dict[int, int]:
    """What the stated predictor names, in its order; `test_the_blur...` check it by itself. {} past the last layer."""
    layer = world.accesses[now][0]
    if layer + distance >= world.layers:
        return {}
    return dict(StatedPredictions(world.context(), (0.96, 0.90, 0.90)).guesses(layer, now, distance))


# -- the stated predictor ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(truth=st.sets(st.integers(0, 7)), experts=st.integers(8, 10), seed=st.integers(0, 99), draw=st.integers(0, 99))
def test_the_blur_keeps_truth_and_error_apart(truth: set[int], experts: int, seed: int, draw: int) -> None:
    """No one is named twice; a wrong guess is no true expert; a higher recall recognises all that a lower one does."""
    array, known_before = np.array(sorted(truth), dtype=np.int16), set()
    for recall in (0.0, 0.3, 0.7, 1.0):
        named = blurred(array, experts, recall, seed, draw)
        told = [expert for expert in named if expert is not None]
        assert len(told) == len(set(told))
        assert set(told) <= set(range(experts))
        assert len(told) == len(truth) or experts - len(truth) < len(truth)
        for expert, true in zip(named, sorted(truth), strict=True):
            assert expert == true or expert not in truth
        assert known_before <= set(told) & truth
        known_before = set(told) & truth
    assert known_before == truth
    assert not set(blurred(array, experts, 0.0, seed, draw)) & truth


@pytest.mark.parametrize("recall", [(0.9, 0.6, 0.2), (0.5,), 0.75])
def test_the_recall_of_each_distance_is_met(recall: tuple[float, ...] | float) -> None:
    """The share of true experts among the guesses, over many accesses, within four standard errors."""
    rng = np.random.default_rng(5)
    accesses = [(layer, dict.fromkeys(rng.permutation(16)[:3].tolist(), 1)) for _ in range(300) for layer in range(5)]
    stated = StatedPredictions(PrefetchContext(5, 16, 3, future=stream_of(accesses), recall=recall, seed=2))
    for distance in (1, 2, 3, 4):
        told = [stated.experts(layer, now, distance) for now, (layer, _) in enumerate(accesses) if layer + distance < 5]
        truth = [accesses[now + distance][1] for now, (layer, _) in enumerate(accesses) if layer + distance < 5]
        assert all(len(named) == 3 for named in told)
        right, total = sum(len(set(a) & b.keys()) for a, b in zip(told, truth, strict=True)), 3 * len(told)
        list_of = [recall] if isinstance(recall, float) else list(recall)
        expected = list_of[min(distance, len(list_of)) - 1]
        assert abs(right - expected * total) <= 4 * math.sqrt(expected * (1 - expected) * total)


@settings(deadline=None)
@given(worlds())
def test_who_is_recognised_from_afar_is_recognised_from_near(world: World) -> None:
    """Of every access: under a recall that falls with distance, the true experts told earlier are told later too."""
    stated = StatedPredictions(world.context(recall=(0.8, 0.5, 0.5, 0.2)))
    for then, (layer, truth) in enumerate(world.accesses):
        told = [truth.keys() & stated.experts(layer - distance, then - distance, distance) for distance in range(1, layer + 1)]
        assert all(far <= near for near, far in itertools.pairwise(told))


@settings(deadline=None)
@given(worlds())
def test_one_layer_ahead_all_stated_predictors_guess_alike(world: World) -> None:
    """`stated_recall` names the same experts as the guesses of the others."""
    made = StatedRecallPrefetch(world.context(width=99))
    for now, (layer, tokens) in enumerate(world.accesses):
        named = made.predict(layer, np.array(sorted(tokens)), np.ones(len(tokens)), now)
        assert set(named) == guesses(world, now, 1).keys()


@settings(deadline=None)
@given(worlds())
def test_guesses_are_ranked_by_true_score_or_tokens(world: World) -> None:
    """Under full recall: by the score of the access that is predicted, else by tokens; ties to the lower expert."""
    for now, (layer, _) in enumerate(world.accesses):
        for distance in range(1, world.layers - layer):
            tokens, row = world.accesses[now + distance][1], world.scores[now + distance]
            scored = StatedPredictions(world.context(recall=1.0)).guesses(layer, now, distance)
            assert scored == sorted(tokens.items(), key=lambda item: (-row[item[0]], item[0]))
            counted = StatedPredictions(world.context(recall=1.0, scores=None)).guesses(layer, now, distance)
            assert counted == sorted(tokens.items(), key=lambda item: (-item[1], item[0]))


# -- one layer ahead ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(worlds())
def test_gate_speculation_takes_the_first_guesses(world: World) -> None:
    """The top `width` of the next layer; a resident one takes its place all the same."""

    def rule(world: World, now: int) -> list[Wish]:
        return [Wish(world.accesses[now][0] + 1, expert) for expert in list(guesses(world, now, 1))[: world.width]]

    assert run(make_prefetcher("gate-speculation", world.context()), world) == all_of(rule, world)


@settings(deadline=None)
@given(worlds())
def test_dali_takes_the_fullest(world: World) -> None:
    """The most predicted tokens first, whatever the scores."""

    def rule(world: World, now: int) -> list[Wish]:
        ranked = sorted(guesses(world, now, 1).items(), key=lambda item: (-item[1], item[0]))[: world.width]
        return [Wish(world.accesses[now][0] + 1, expert) for expert, _ in ranked]

    assert run(make_prefetcher("dali", world.context()), world) == all_of(rule, world)


@settings(deadline=None)
@given(worlds())
def test_pre_gated_knows_the_next_layer(world: World) -> None:
    """All true experts of the next layer in rising order, cut to the width."""

    def rule(world: World, now: int) -> list[Wish]:
        layer = world.accesses[now][0] + 1
        return [Wish(layer, e) for e in sorted(world.accesses[now + 1][1])[: world.width]] if layer < world.layers else []

    assert run(make_prefetcher("pre-gated", world.context()), world) == all_of(rule, world)


# -- several layers ahead ----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(worlds())
def test_read_me_knows_the_rest_of_the_step(world: World) -> None:
    """Every later layer, the nearest first; a layer's urgency is how many layers lie between."""

    def rule(world: World, now: int) -> list[Wish]:
        layer = world.accesses[now][0]
        last = min(world.layers - 1, layer + (world.lookahead or 99))
        return [Wish(then, expert, then - layer - 1) for then in range(layer + 1, last + 1)
                for expert in sorted(world.accesses[now + then - layer][1])]

    assert run(make_prefetcher("read-me", world.context()), world) == all_of(rule, world)


@settings(deadline=None)
@given(worlds())
def test_promoe_looks_one_stride_ahead(world: World) -> None:
    """Only the layer `stride` later, all that is predicted for it."""

    def rule(world: World, now: int) -> list[Wish]:
        stride = world.lookahead or 1
        return [Wish(world.accesses[now][0] + stride, expert) for expert in guesses(world, now, stride)]

    assert run(make_prefetcher("promoe", world.context()), world) == all_of(rule, world)


@settings(deadline=None)
@given(worlds(), st.booleans())
def test_hobbit_stops_at_the_first_layer_with_a_miss(world: World, published: bool) -> None:
    """All misses of that layer and none of another; without a stated recall the published ones hold."""
    given_recall = (0.96, 0.90, 0.90) if published else world.recall

    def rule(world: World, now: int) -> list[Wish]:
        for distance in range(1, (world.lookahead or 3) + 1):
            named = guesses(replace(world, recall=given_recall), now, distance)
            wishes = [Wish(world.accesses[now][0] + distance, expert) for expert in named]
            if any(wish[:2] not in world.resident[now] for wish in wishes):
                return wishes
        return []

    context = world.context(recall=None) if published else world.context()
    assert run(make_prefetcher("hobbit", context), world) == all_of(rule, world)


@settings(deadline=None)
@given(worlds())
def test_adapmoe_wishes_for_the_first_missing_expert(world: World) -> None:
    """One expert at most: the first absent one of all guesses, layer after layer."""

    def rule(world: World, now: int) -> list[Wish]:
        named = [Wish(world.accesses[now][0] + distance, expert)
                 for distance in range(1, (world.lookahead or 3) + 1) for expert in guesses(world, now, distance)]
        return [wish for wish in named if wish[:2] not in world.resident[now]][:1]

    assert run(make_prefetcher("adapmoe", world.context()), world) == all_of(rule, world)


# -- HybriMoE ----------------------------------------------------------------------------------------------------------


def layers_of(world: World, now: int) -> dict[int, dict[int, int]]:
    """Predicted tokens by expert of the next layers."""
    layer = world.accesses[now][0]
    return {layer + distance: guesses(world, now, distance) for distance in range(1, (world.lookahead or 3) + 1)}


def greedy_by_gain(world: World, now: int) -> list[Wish]:
    """Again and again the (layer, expert) whose residence shortens its layer most."""
    chosen: list[Wish] = []
    while len(chosen) < world.width:
        best = (0.0, 0, 0)
        for layer, tokens in layers_of(world, now).items():
            there = {e for e in tokens if (layer, e) in world.resident[now] or Wish(layer, e) in chosen}
            for expert in sorted(tokens.keys() - there):
                gain = two_sides(tokens, there) - two_sides(tokens, there | {expert})
                if gain > best[0]:
                    best = (gain, layer, expert)  # a later one must gain more
        if best[0] == 0.0:
            break
        chosen.append(Wish(best[1], best[2]))
    return chosen


def net_gain(world: World, now: int) -> list[Wish]:
    """All (layer, expert) whose residence saves more than a copy takes, once, the most saving first."""
    gains = []
    for layer, tokens in layers_of(world, now).items():
        there = {e for e in tokens if (layer, e) in world.resident[now]}
        gains += [(two_sides(tokens, there | {e}) - two_sides(tokens, there) + 1.0, layer, e) for e in tokens.keys() - there]
    return [Wish(layer, expert) for loss, layer, expert in sorted(gains) if loss < 0]


@pytest.mark.parametrize(("name", "rule"), [("hybrimoe", greedy_by_gain), ("hybrimoe-ascend", net_gain)])
@settings(deadline=None)
@given(world=worlds())
def test_hybrimoe_ranks_by_what_a_copy_saves(name: str, rule: Rule, world: World) -> None:
    """With the time of a layer from the context."""
    assert run(make_prefetcher(name, world.context()), world) == all_of(rule, world)


def best_schedule(load_s: float) -> Makespan:
    """Return the exact least time of a layer: every assignment to CPU and device, every order of copies and computing.

    A device takes 1 per expert and a CPU 2 per token, one expert after the other; a copy takes `load_s`.
    """

    def makespan(tokens: Mapping[int, int], resident: AbstractSet[int]) -> float:
        best = math.inf
        for on_cpu in itertools.product((False, True), repeat=len(tokens)):
            device = [expert for expert, cpu in zip(tokens, on_cpu, strict=True) if not cpu]
            cpu_s = sum(2.0 * tokens[expert] for expert, cpu in zip(tokens, on_cpu, strict=True) if cpu)
            for order in itertools.permutations(device):
                link_s = now_s = 0.0
                for expert in order:
                    link_s += 0.0 if expert in resident else load_s
                    now_s = max(now_s, 0.0 if expert in resident else link_s) + 1.0
                best = min(best, max(now_s, cpu_s))
        return best

    return makespan


@settings(deadline=None, max_examples=40)
@given(worlds(), st.sampled_from([0.5, 1.0, 3.0]))
def test_no_gain_exceeds_the_copy_under_the_best_schedule(world: World, load_s: float) -> None:
    """So that HybriMoE as in vllm-ascend fetches nothing ahead then, whatever is predicted."""
    context = world.context(makespan=best_schedule(load_s), copy_s=load_s)
    assert not any(run(make_prefetcher("hybrimoe-ascend", context), world))


def test_hybrimoe_takes_what_the_first_choice_leaves() -> None:
    """Worked by hand: 3 experts of 1, 1 and 4 tokens are absent; copied one by one on demand they take 3, 6, 9."""
    accesses: Accesses = [(0, {0: 1}), (1, {0: 1, 1: 1, 2: 4})]
    # nobody there: two on the CPU (4), one copied (3): 4. With 0 or 1 there: CPU 2, copy 3: 3. With 2: device 1, CPU 2+2 or
    # 2 and a copy: 3. All gain 1; 0 is taken. Then: with 1 as well: copy 3: 3, no gain; with 2: CPU 2, device 2: 2, gain 1.
    # Then 0 and 2 are there, and with 1 too the device takes 3: no gain.
    world = World(2, 3, 9, None, (1.0,), accesses, [set(), set()], [True, False], [[16, 0, 0], [4, 6, 6]], accesses,
                  [True, False], [[16, 0, 0]] * 2, 0)
    assert run(make_prefetcher("hybrimoe", world.context(scores=None)), world) == [[Wish(1, 0), Wish(1, 2)], []]
    assert run(make_prefetcher("hybrimoe-ascend", world.context(copy_s=0.9)), world)[0] == [
        Wish(1, 0), Wish(1, 1), Wish(1, 2)]


@settings(deadline=None)
@given(worlds(), st.booleans())
def test_hybrimoe_as_released_ranks_by_recent_scores(world: World, scored: bool) -> None:
    """Half of the two highest scores (top_k is 1) plus half of what was, at every access of the layer, from the history."""

    def rule(world: World, now: int) -> list[Wish]:
        layer, recent = world.accesses[now][0] + 1, [Fraction(0)] * world.experts
        for (other, tokens), row in list(zip(world.accesses, world.scores, strict=True))[: now + 1]:
            top = sorted(range(world.experts), key=lambda e: (-row[e], e))[:2]
            gets = {e: Fraction(row[e], 16) for e in top} if scored else dict.fromkeys(tokens, Fraction(1))
            if other == layer:
                recent = [value / 2 + gets.get(e, Fraction(0)) / 2 for e, value in enumerate(recent)]
        ranked = sorted((e for e in range(world.experts) if recent[e]), key=lambda e: (-recent[e], e))
        return [Wish(layer, expert) for expert in ranked[: world.width]]

    context = world.context() if scored else world.context(scores=None)
    assert run(make_prefetcher("hybrimoe-repository", context), world) == all_of(rule, world)


# -- EdgeMoE -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(worlds())
def test_edgemoe_counts_what_followed(world: World) -> None:
    """The dictionary counted over the training part: two layers' sets, else one, else how popular the next layer's are."""

    def rule(world: World, now: int) -> list[Wish]:
        layer = world.accesses[now][0] + 1
        last = sorted(world.accesses[now][1])
        before = sorted(world.accesses[now - 1][1]) if layer >= 2 else None
        for keys in ([before, last], [last], []):
            if None in keys:
                continue
            seen = [world.training[place][1] for place in range(len(world.training)) if world.training[place][0] == layer
                    and [sorted(world.training[place - len(keys) + k][1]) for k in range(len(keys))] == keys]
            share = {e: Fraction(sum(e in one for one in seen), len(seen)) for e in range(world.experts) if seen}
            if seen:
                ranked = sorted((e for e in share if share[e]), key=lambda e: (-share[e], e))
                return [Wish(layer, expert) for expert in ranked]
        return []

    assert run(make_prefetcher("edgemoe", world.context()), world) == all_of(rule, world)


def edgemoe_world(accesses: Accesses) -> World:
    """Three layers, four experts; in training 3 follows (0, 1) twice and 2 once, and 0 follows (2, 1)."""
    paths = [(0, 1, 3), (0, 1, 3), (0, 1, 2), (2, 1, 0), (2, 1, 0), (2, 1, 0), (3, 2, 1)]
    training = [(layer, {expert: 1}) for path in paths for layer, expert in enumerate(path)]
    return World(3, 4, 4, None, (1.0,), accesses, [set() for _ in accesses], [False] * len(accesses),
                 [[4] * 4] * len(accesses), training, [False] * len(training), [[4] * 4] * len(training), 0)


@pytest.mark.parametrize(("path", "first", "second"), [
    ((0, 1), [1], [3, 2]),  # P(3 | 0, 1) = 2/3, P(2 | 0, 1) = 1/3
    ((2, 1), [1], [0]),  # P(0 | 2, 1) = 1
    ((3, 1), [2], [0, 3, 2]),  # (3, 1) was never seen; after 1 alone 3/6, 2/6, 1/6
    ((1, 0), [1, 2], [0, 3, 1, 2]),  # 1 in layer 0 and 0 in layer 1 were never seen: popularity 6, 1 and 3, 2, 1, 1
])
def test_edgemoe_counted_by_hand(path: tuple[int, int], first: list[int], second: list[int]) -> None:
    """Layer 1 by what layer 0 used, layer 2 by both; nothing for the next step."""
    world = edgemoe_world([(0, {path[0]: 1}), (1, {path[1]: 1}), (2, {0: 1})])
    found = run(make_prefetcher("edgemoe", world.context()), world)
    assert [[wish.expert for wish in wishes] for wishes in found] == [first, second, []]


# -- MoE-Infinity ------------------------------------------------------------------------------------------------------


def matrix(world: World, accesses: Accesses) -> list[list[int]]:
    """Tokens by layer and expert."""
    return [[sum(tokens.get(e, 0) for other, tokens in accesses if other == layer) for e in range(world.experts)]
            for layer in range(world.layers)]


def requests_of(accesses: Accesses, starts: list[bool]) -> list[Accesses]:
    """Cut accesses where a request begins."""
    begins = [0, *(place for place, start in enumerate(starts) if start and place), len(accesses)]
    return [accesses[first:last] for first, last in itertools.pairwise(begins) if first < last]


def cosine(one: list[float], other: list[float]) -> float:
    """As a float in the usual order: product, then root of the product of squares."""
    norm = math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))
    return sum(a * b for a, b in zip(one, other, strict=True)) / norm if norm else 0.0


def once(accesses: Accesses) -> Accesses:
    """One token per use, as training counts."""
    return [(layer, dict.fromkeys(tokens, 1)) for layer, tokens in accesses]


def flat(rows: list[list[int]] | list[list[float]]) -> list[float]:
    """All rows in one list."""
    return [float(value) for row in rows for value in row]


def infinity(capacity: int) -> Rule:
    """MoE-Infinity's rule, from the whole history."""

    def rule(world: World, now: int) -> list[Wish]:
        layer, past = world.accesses[now][0], world.accesses[: now + 1]
        finished = requests_of(past, world.starts[: now + 1])[:-1]
        collection: list[list[list[int]]] = []
        for request in [*map(once, requests_of(world.training, world.training_starts)), *finished]:
            entry = matrix(world, request)
            if len(collection) < capacity:
                collection.append(entry)
            else:
                alike = [cosine(flat(other), flat(entry)) for other in collection]
                collection[alike.index(max(alike))] = entry
        alike = [cosine(flat(entry), flat(matrix(world, past[now - layer:]))) for entry in collection]
        matched = [entry for entry, value in zip(collection, alike, strict=True) if value == max(alike)]
        wishes = []
        for i in range(layer + 1, world.layers):
            counts = [sum(entry[i][e] for entry in matched) for e in range(world.experts)]
            if sum(counts):
                wishes += [(-(count / sum(counts)) * (1 - (i - layer) / world.layers), i, e)
                           for e, count in enumerate(counts) if count]
        return [Wish(i, e, round((1 + minus) * 1000)) for minus, i, e in sorted(wishes)]

    return rule


@pytest.mark.parametrize("capacity", [1, 2, 3, 120])
@settings(deadline=None)
@given(world=worlds())
def test_moe_infinity_matches_by_brute_force(capacity: int, world: World) -> None:
    """Collection, match, sum, rows and nearness computed anew at every access, also with a full collection."""

    class Small(MoeInfinityPrefetch):
        pass

    Small.capacity = capacity
    assert run(Small(world.context()), world) == all_of(infinity(capacity), world)


def infinity_released(world: World, capacity: int) -> list[list[Wish]]:
    """The released code's loop, in plain lists."""
    collection = [matrix(world, request) for request in map(once, requests_of(world.training, world.training_starts))]
    collection = collection[:capacity]
    persistent, used, found = len(collection), [0] * len(collection), []
    current = matrix(world, [])
    for now, (layer, tokens) in enumerate(world.accesses):
        if world.starts[now] and any(flat(current)):
            if len(collection) < capacity:
                collection.append(current)
                used.append(1)
            else:
                ranks = [math.inf if place < persistent else count for place, count in enumerate(used)]
                place = ranks.index(min(ranks))
                collection[place], used[place] = current, 1
        if world.starts[now]:
            current = matrix(world, [])
        for expert, count in tokens.items():
            current[layer][expert] += count
        wishes = []
        if collection:
            later = range(layer + 1, world.layers)
            alike = [sum(cosine(flat([entry[i]]), flat([current[i]])) for i in later) for entry in collection]
            place = alike.index(max(alike))
            used[place] += 1
            wishes = [(-(collection[place][i][e] + 1e-8) * (1 - (i - layer) / (world.layers + 1)), i, e)
                      for i in later for e in range(world.experts)]
        found.append([Wish(i, e) for _, i, e in sorted(wishes) if (i, e) not in world.resident[now]][: world.width])
    return found


@pytest.mark.parametrize("capacity", [1, 2, 3, 1000])
@settings(deadline=None, max_examples=300)
@given(world=worlds(), trained=st.booleans())
def test_moe_infinity_as_released(capacity: int, trained: bool, world: World) -> None:
    """Rows of later layers only, one entry, counts as they are, and the one matched least is replaced."""

    class Small(MoeInfinityRepositoryPrefetch):
        pass

    Small.capacity = Small.training_capacity = capacity
    context = world.context() if trained else world.context(training=None, training_starts=None)
    expected = world if trained else replace(world, training=[], training_starts=[])
    assert run(Small(context), world) == infinity_released(expected, capacity)


def infinity_world(accesses: Accesses, starts: list[bool], training: Accesses, training_starts: list[bool]) -> World:
    """Three layers, three experts, room for all wishes."""
    return World(3, 3, 9, None, (1.0,), accesses, [set() for _ in accesses], starts, [[16, 0, 0]] * len(accesses),
                 training, training_starts, [[16, 0, 0]] * len(training), 0)


def test_moe_infinity_worked_by_hand() -> None:
    """Request A is 0-0-0 twice, then 0-1-0; request B is 2-2-2. A step that begins with 0 matches A."""
    a = [(0, {0: 1}), (1, {0: 1}), (2, {0: 1})] * 2 + [(0, {0: 1}), (1, {1: 1}), (2, {0: 1})]
    b = [(layer, {2: 1}) for layer in range(3)]
    world = infinity_world([(0, {0: 1}), (1, {1: 1}), (2, {0: 1})], [True, False, False], a + b,
                           [True] + [False] * 8 + [True, False, False])
    found = run(make_prefetcher("moe-infinity", world.context()), world)
    # from layer 0: share 2/3 and 1/3 in layer 1 (nearness 2/3), 1 in layer 2 (nearness 1/3): 4/9, 3/9, 2/9
    assert found == [[Wish(1, 0, 556), Wish(2, 0, 667), Wish(1, 1, 778)], [Wish(2, 0, 333)], []]
    released = run(make_prefetcher("moe-infinity-repository", replace(world, width=4).context()), world)
    # the request has no rows of later layers yet, so the first entry predicts: 2 and 1 tokens at 3/4, 3 at 1/2, then the rest
    assert released[0] == [Wish(1, 0), Wish(2, 0), Wish(1, 1), Wish(1, 2)]  # 1.5 and 1.5: the nearer layer first


def test_moe_infinity_learns_a_request_when_the_next_begins() -> None:
    """Without training the request's own steps stand in; once it is over, its matrix is in the collection."""
    step = [(layer, {1: 1}) for layer in range(3)]
    other = [(0, {1: 1}), (1, {0: 1}), (2, {0: 1})]
    world = infinity_world(step * 2 + other, [True] + [False] * 5 + [True, False, False], step, [True, False, False])
    made = make_prefetcher("moe-infinity", world.context(training=None, training_starts=None))
    found = run(made, world)
    assert found[0] == []  # nothing is known
    assert found[3] == [Wish(1, 1, 333), Wish(2, 1, 667)]  # the request's first step
    assert found[6] == [Wish(1, 1, 333), Wish(2, 1, 667)]  # the first request, matched by layer 0
    assert isinstance(made, MoeInfinityPrefetch)
    assert made.stored.tolist() == [[0, 2, 0] * 3]


def test_moe_infinity_as_released_forgets_the_one_matched_least() -> None:
    """Six requests, three places: the fourth replaces the second; matched once, it stays when the fifth replaces the third."""

    class Small(MoeInfinityRepositoryPrefetch):
        capacity = training_capacity = 3

    steps = [(True, 1), (True, 2), (True, 3), (True, 4), (True, 4), (False, 4), (True, 0)]  # begins a request; layer 1's expert
    accesses: Accesses = [access for _, expert in steps for access in ((0, {0: 1}), (1, {expert: 1}))]
    starts = [flag for start, _ in steps for flag in (start, False)]
    world = World(2, 5, 9, None, (1.0,), accesses, [set() for _ in accesses], starts, [[4] * 4 + [0]] * len(accesses),
                  accesses, starts, [[4] * 4 + [0]] * len(accesses), 0)
    made = Small(world.context(training=None, training_starts=None))
    run(made, world)
    assert made.stored.reshape(3, 2, 5)[:, 1].tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 2]]


# -- FineMoE -----------------------------------------------------------------------------------------------------------


def finemoe(capacity: int) -> Callable[[World], list[list[Wish]]]:
    """FineMoE's rule in plain lists, with every map and every cosine taken anew."""

    def add(maps: list[list[list[float]]], one: list[list[float]]) -> None:
        if len(maps) < capacity:
            maps.append(one)
            return
        alike = [cosine(flat(other), flat(one)) for other in maps]
        maps[alike.index(max(alike))] = one

    def rule(world: World) -> list[list[Wish]]:
        distance, maps, found = world.lookahead or 6, [], []
        training = [[value / 16 for value in row] for row in world.training_scores]
        for first in range(0, len(training), world.layers):
            add(maps, training[first: first + world.layers])
        for now, (layer, _) in enumerate(world.accesses):
            path = [[value / 16 for value in row] for row in world.scores[now - layer: now + 1]]
            pending: dict[tuple[int, int], float] = {}
            for end in range(layer + 1):  # what this and the earlier layers of the step named
                if end + distance >= world.layers:
                    continue
                alike = [cosine(flat(one[: end + 1]), flat(path[: end + 1])) for one in maps]
                row, mass = maps[alike.index(max(alike))][end + distance], 0.0
                for rank, expert in enumerate(sorted(range(world.experts), key=lambda e, row=row: (-row[e], e))):
                    if rank < 1 or mass < min(max(1 - max(alike), 0), 1):
                        pending[end + distance, expert] = row[expert]
                    mass += row[expert]
            ranked = sorted((-share / (i - layer), i, e) for (i, e), share in pending.items() if i > layer)
            found.append([Wish(i, e, round((1 + minus) * 1000)) for minus, i, e in ranked
                          if (i, e) not in world.resident[now]][: world.width])
            if layer + 1 == world.layers:
                add(maps, path)
        return found

    return rule


@pytest.mark.parametrize("capacity", [1, 2, 4, 1000])
@settings(deadline=None)
@given(world=worlds())
def test_finemoe_takes_the_most_similar_map(capacity: int, world: World) -> None:
    """Match, threshold, priority by what is left of the way, and the replacement of a full store."""

    class Small(FineMoePrefetch):
        pass

    Small.capacity = capacity
    assert run(Small(world.context()), world) == finemoe(capacity)(world)


def finemoe_world(first: list[int], **changes: object) -> World:
    """Two layers, four experts; the training steps begin with expert 0 and end broadly, or begin with 1 and end with 3."""
    training_scores = [[16, 0, 0, 0], [6, 5, 4, 1], [0, 16, 0, 0], [1, 1, 0, 14]]
    accesses: Accesses = [(0, {0: 1}), (1, {0: 1})]
    training: Accesses = [(0, {0: 1}), (1, {0: 1}), (0, {1: 1}), (1, {3: 1})]
    world = World(2, 4, 9, 1, (1.0,), accesses, [set(), set()], [True, False], [first, [4, 4, 4, 4]], training, [False] * 4,
                  training_scores, 0)
    return replace(world, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("first", "names"), [
    ([16, 0, 0, 0], [0]),  # the same path: threshold 0, so top_k = 1 expert
    ([0, 16, 0, 0], [3]),
    ([10, 4, 2, 0], [0]),  # cosine 0.91: threshold 0.09 < 6/16
    ([4, 4, 4, 4], [0, 1]),  # cosine 1/2 with both, the first counts: 6/16 < 1/2 <= 11/16
])
def test_finemoe_worked_by_hand(first: list[int], names: list[int]) -> None:
    """The less alike the paths, the more of the next layer's mass is fetched."""
    world = finemoe_world(first)
    found = run(make_prefetcher("finemoe", world.context()), world)
    assert [wish.expert for wish in found[0]] == names
    assert found[1] == []
    shares = {0: 6, 1: 5, 3: 14}
    assert [wish.urgency for wish in found[0]] == [round(1000 * (1 - shares[e] / 16)) for e in names]


def test_finemoe_comes_back_to_what_was_cut() -> None:
    """What a width cut off is wished for at the next layer, nearer and so more urgent."""
    rows = [[16, 0], [8, 8], [8, 8]]
    accesses: Accesses = [(layer, {0: 1}) for layer in range(3)]
    world = World(3, 2, 1, 2, (1.0,), accesses, [set(), {(2, 0)}, set()], [True, False, False], [[0, 16], [8, 8], [8, 8]],
                  accesses, [True, False, False], rows, 0)
    found = run(make_prefetcher("finemoe", world.context()), world)
    assert found == [[Wish(2, 0, 750)], [Wish(2, 1, 500)], []]  # cosine 0: the whole mass; p / 2, then p / 1


def test_finemoe_needs_the_scores_of_all_experts() -> None:
    """Gate weights of the chosen experts only are refused, with the way out."""
    world = finemoe_world([16, 0, 0, 0], scores=[[16, 0, 0, 0], [0, 16, 0, 0]])
    with pytest.raises(InputError, match="those of the 1 chosen experts only, but it needs the router's probabilities of all 4"):
        make_prefetcher("finemoe", world.context())


# -- information -------------------------------------------------------------------------------------------------------

REACH = {"promoe": 1, "hobbit": 3, "adapmoe": 3, "hybrimoe": 3, "hybrimoe-ascend": 3, "gate-speculation": 1, "dali": 1,
         "stated_recall": 1, "oracle": 1, "pre-gated": 1, "read-me": 9}


@pytest.mark.parametrize("name", PREFETCHERS.names())
@settings(deadline=None)
@given(world=worlds(), seed=st.integers(0, 999))
def test_no_one_sees_farther_than_it_says(name: str, world: World, seed: int) -> None:
    """Another run after some access changes nothing that was wished for up to it, less the layers that are predicted."""
    rng = np.random.default_rng(seed)
    cut = int(rng.integers(len(world.accesses)))
    fields = {"popularity": np.ones((world.layers, world.experts)),
              "transitions": np.ones((world.layers - 1, world.experts, world.experts))}
    changed = replace(
        world, scores=world.scores[: cut + 1] + with_all([rng.permutation(row).tolist() for row in world.scores])[cut + 1:],
        accesses=world.accesses[: cut + 1] + [
            (layer, dict.fromkeys(rng.permutation(world.experts)[:2].tolist(), int(rng.integers(1, 3))))
            for layer, _ in world.accesses[cut + 1:]],
        starts=world.starts[: cut + 1] + [False] * (len(world.starts) - cut - 1))
    found = [run(make_prefetcher(name, one.context(**fields)), one) for one in (world, changed)]
    reach = (world.lookahead or REACH[name]) if name in REACH else 0
    if name in ("stated_recall", "oracle", "pre-gated", "gate-speculation", "dali"):
        reach = 1
    sure = [now for now in range(cut + 1)
            if now + min(reach, world.layers - 1 - world.accesses[now][0]) <= cut]
    assert [found[0][now] for now in sure] == [found[1][now] for now in sure]


@pytest.mark.parametrize("name", [name for name in PREFETCHERS.names() if hasattr(PREFETCHERS[name], "wishes")])
@settings(deadline=None)
@given(world=worlds())
def test_every_wish_is_an_expected_absent_expert(name: str, world: World) -> None:
    """`named` holds every wish, and of others only what is resident or was cut off; urgency never falls."""
    made = make_prefetcher(name, world.context())
    assert isinstance(made, LookaheadBase)
    for now, (layer, tokens) in enumerate(world.accesses):
        experts = np.array(sorted(tokens), dtype=np.int64)
        counts = np.array([tokens[e] for e in sorted(tokens)], dtype=np.int64)
        wishes = made.wishes(PrefetchMoment(
            layer, now, experts, counts, lambda *key, now=now: key in world.resident[now],  # type: ignore[misc]
            world.layers, world.starts[now]))
        assert {wish[:2] for wish in wishes} <= set(made.named)
        assert len(wishes) == len({wish[:2] for wish in wishes}) <= world.width
        assert not {wish[:2] for wish in wishes} & world.resident[now]
        assert all(layer < wish.layer < world.layers and wish.expert < world.experts for wish in wishes)
        assert [wish.urgency for wish in wishes] == sorted(max(wish.urgency, 0) for wish in wishes)


# -- what they are built from ------------------------------------------------------------------------------------------


def padded_trace() -> RoutingTrace:
    """Two interleaved requests, one token with a padded expert."""
    ids = np.array([[[1, 0], [2, 3]], [[3, 2], [0, 1]], [[2, -1], [3, 0]]], dtype=np.int16)
    return RoutingTrace(
        expert_ids=ids, request_id=np.array([7, 4, 7], np.int32), position=np.array([0, 0, 1], np.int32),
        phase=np.ones(3, np.int8), step=np.array([0, 0, 1], np.int32), num_experts=4, layer_ids=np.arange(2, dtype=np.int32))


def test_a_trace_token_by_token() -> None:
    """Requests by rising id, each in the order of its positions; padding is left out."""
    stream, starts = token_accesses(padded_trace())
    assert stream.layers.tolist() == [0, 1] * 3
    assert [stream.experts_of(access).tolist() for access in range(6)] == [[2, 3], [0, 1], [0, 1], [2, 3], [2], [0, 3]]
    assert starts.tolist() == [True, False, True, False, False, False]


def test_a_trace_token_by_token_equals_steps_of_one_token() -> None:
    """The same stream as from `access_stream` with a step for each token, and the same starts of requests."""
    trace = synthetic_trace(60, 3, 6, 2, 5, seed=4)
    order = np.lexsort((trace.position, trace.request_id))
    steps = [np.array([row]) for row in order]
    stream, starts = token_accesses(trace)
    expected = access_stream(trace, steps)
    for field in ("layers", "offsets", "experts"):
        assert np.array_equal(getattr(stream, field), getattr(expected, field))
    assert np.array_equal(starts, request_starts(trace, steps))


def test_the_tokens_of_each_use() -> None:
    """In the order of the stream: layer by layer, experts rising; padding is left out."""
    trace, steps = padded_trace(), [np.array([0, 2]), np.array([1])]
    assert use_tokens(trace, steps).tolist() == [1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    assert access_stream(trace, steps).experts.tolist() == [0, 1, 2, 0, 2, 3, 2, 3, 0, 1]


# -- the page ----------------------------------------------------------------------------------------------------------


def page() -> str:
    """Return the part of docs/policies.md on prefetchers."""
    return (Path(__file__).parents[1] / "docs/policies.md").read_text().split("\n## Prefetchers\n")[1]


def test_the_page_lists_every_prefetcher() -> None:
    """A row per registered name: its level, and the fields that it is built from (of the optional ones at least none else)."""
    rows = {cells[1].strip(" `"): (cells[0].strip(), set(cells[5].split("`")[1::2])) for line in page().splitlines()
            if line.startswith("| I") for cells in [line.strip("|").split("|")]}
    assert list(rows) != []
    assert rows.keys() == set(PREFETCHERS.names())
    by_level = {"future", "future_tokens", "scores"}
    for name, (level, fields) in rows.items():
        assert level == PREFETCHERS[name].information  # type: ignore[attr-defined]
        assert fields <= set(reads(name))
        assert set(reads(name)) - fields <= (by_level if level in ("I3", "I4") else set())


def test_the_example_of_an_own_prefetcher_runs() -> None:
    """It is at most 22 lines, runs as it stands and prints what the page says."""
    code, shown = page().split("```python\n")[1].split("```")[0], page().split("```text\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 22
    printed: list[str] = []
    exec(compile(ast.parse(code), "docs/policies.md", "exec"), {"print": lambda *values: printed.append(" ".join(map(str, values)))})
    assert "\n".join(printed) == shown.strip()
