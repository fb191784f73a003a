"""Prefetchers: what each names, on what ground, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.policy import AccessStream
from moesim.cache.prefetch import (
    PREFETCHERS,
    LookaheadPrefetcher,
    NoPrefetch,
    PrefetchContext,
    Prefetcher,
    PrefetchMoment,
    Wish,
    check_wishes,
    looks_ahead,
    make_prefetcher,
    needs_recall,
    reads,
)
from moesim.cache.scores import RouterScores
from moesim.errors import InputError

LAYERS, EXPERTS, STEPS = 3, 8, 120


def random_stream(seed: int, per_access: int = 3) -> AccessStream:
    """Return STEPS steps of LAYERS accesses with `per_access` random experts each."""
    rng = np.random.default_rng(seed)
    experts = [np.sort(rng.permutation(EXPERTS)[:per_access]) for _ in range(STEPS * LAYERS)]
    return AccessStream(
        np.tile(np.arange(LAYERS), STEPS), np.arange(STEPS * LAYERS + 1) * per_access, np.concatenate(experts))


def random_scores(seed: int) -> RouterScores:
    """Return scores of all experts for the accesses of `random_stream`, the chosen ones no higher than the others."""
    rows = np.random.default_rng(seed).dirichlet(np.ones(EXPERTS), STEPS * LAYERS)
    return RouterScores(3, rows, rows)


def context(**changes: object) -> PrefetchContext:
    """Return a context with everything that any prefetcher may want."""
    rng = np.random.default_rng(3)
    everything = {
        "num_layers": LAYERS, "num_experts": EXPERTS, "width": 4, "future": random_stream(1), "recall": 0.7,
        "future_tokens": rng.integers(1, 4, 3 * STEPS * LAYERS), "scores": random_scores(2), "lookahead": 2,
        "transitions": rng.integers(0, 5, (LAYERS - 1, EXPERTS, EXPERTS)), "popularity": rng.random((LAYERS, EXPERTS)),
        "training": random_stream(4), "training_starts": np.arange(STEPS * LAYERS) % (4 * LAYERS) == 0,
        "training_scores": random_scores(5), "copy_s": 0.5,
        "makespan": lambda tokens, resident: float(sum(n * (1 if e in resident else 3) for e, n in tokens.items()))}
    if changes.get("future", everything["future"]) is not everything["future"]:
        everything["future_tokens"] = None
    return PrefetchContext(**{**everything, **changes})  # type: ignore[arg-type]


ONE_LAYER = ["none", "popularity", "transition", "stated_recall", "oracle", "gate-speculation", "pre-gated", "dali"]
LOOKAHEAD = [name for name in PREFETCHERS.names() if name not in ONE_LAYER]


def one_layer(name: str, given: PrefetchContext) -> Prefetcher:
    """Return a prefetcher that is asked by `predict`."""
    made = make_prefetcher(name, given)
    assert not looks_ahead(made)
    return made  # type: ignore[return-value]


def predict_all(prefetcher: Prefetcher, stream: AccessStream) -> list[list[int]]:
    """Return the predictions made during every access of `stream`."""
    found = []
    for now, layer in enumerate(stream.layers.tolist()):
        experts = stream.experts_of(now)
        found.append(prefetcher.predict(layer, experts, np.ones(len(experts), np.int64), now))
    return found


def wish_all(prefetcher: LookaheadPrefetcher, stream: AccessStream, resident: Callable[[int, int, int], bool],
             starts: np.ndarray) -> list[list[Wish]]:
    """Return the wishes at every access of `stream`; `resident` is of (access, layer, expert)."""
    found = []
    for now, layer in enumerate(stream.layers.tolist()):
        experts = stream.experts_of(now).astype(np.int64)
        found.append(prefetcher.wishes(PrefetchMoment(
            layer, now, experts, np.ones(len(experts), np.int64),
            lambda other, expert, now=now: resident(now, other, expert),  # type: ignore[misc]
            int(stream.layers.max()) + 1, bool(starts[now]))))
    return found


def some_resident(now: int, layer: int, expert: int) -> bool:
    """About a third of the experts, changing with time."""
    return (7 * now // 3 + 5 * layer + expert) % 3 == 0


STARTS = np.arange(STEPS * LAYERS) % (5 * LAYERS) == 0


@pytest.mark.parametrize("name", LOOKAHEAD)
def test_every_lookahead_prefetcher_keeps_the_contract(name: str) -> None:
    """Wishes are distinct absent experts of later layers of the step, at most `width`, by urgency; repeatable."""
    made = make_prefetcher(name, context())
    assert looks_ahead(made)
    found = wish_all(made, random_stream(1), some_resident, STARTS)
    for now, wishes in enumerate(found):
        assert len(wishes) == len({wish[:2] for wish in wishes}) <= 4
        assert all(type(value) is int for wish in wishes for value in wish)
        assert all(now % LAYERS < wish.layer < LAYERS and 0 <= wish.expert < EXPERTS for wish in wishes)
        assert not any(some_resident(now, wish.layer, wish.expert) for wish in wishes)
        assert [wish.urgency for wish in wishes] == sorted(wish.urgency for wish in wishes)
        assert all(wish.urgency >= 0 for wish in wishes)
    assert any(found)
    again = make_prefetcher(name, context())
    assert looks_ahead(again)
    assert wish_all(again, random_stream(1), some_resident, STARTS) == found


@pytest.mark.parametrize("name", PREFETCHERS.names())
def test_a_prefetcher_reads_what_it_says(name: str) -> None:
    """Without the fields that `reads` does not list, everything is as before."""
    kept = {"num_layers", "num_experts", "width", "lookahead", "seed", "recall", *reads(name)}
    without = {field: None for field in PrefetchContext.__dataclass_fields__ if field not in kept}
    if "future" in without:
        without["future_tokens"] = None
    if "training" in without:
        without["training_starts"] = None
    found = []
    for fields in ({}, without):
        made = make_prefetcher(name, context(**fields))
        found.append(wish_all(made, random_stream(1), some_resident, STARTS) if looks_ahead(made)
                     else predict_all(made, random_stream(1)))  # type: ignore[arg-type]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ONE_LAYER)
def test_every_prefetcher_keeps_the_contract(name: str) -> None:
    """Predictions are distinct experts in range, at most `width`, and none for the last layer; repeatable."""
    found = predict_all(one_layer(name, context()), random_stream(1))
    for now, predicted in enumerate(found):
        assert len(predicted) == len(set(predicted)) <= 4
        assert all(type(expert) is int and 0 <= expert < EXPERTS for expert in predicted)
        assert now % LAYERS < LAYERS - 1 or predicted == []
    assert any(found) == (name != "none")
    assert predict_all(one_layer(name, context()), random_stream(1)) == found


@pytest.mark.parametrize("width", [2, 8])
def test_oracle_names_the_next_access(width: int) -> None:
    """The oracle names the true experts of the next layer, cut to the width."""
    stream = random_stream(1)
    found = predict_all(one_layer("oracle", context(width=width)), stream)
    for now, predicted in enumerate(found):
        truth = stream.experts_of(now + 1).tolist() if now % LAYERS < LAYERS - 1 else []
        assert predicted == truth[:width]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(1, EXPERTS))
def test_transition_equals_a_plain_sum(seed: int, width: int) -> None:
    """Scores are the token-weighted sum of the row-normalised table, written out in loops."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 3, (LAYERS - 1, EXPERTS, EXPERTS))
    experts, counts = np.sort(rng.permutation(EXPERTS)[:3]), rng.integers(1, 9, 3)
    prefetcher = one_layer("transition", context(transitions=table, width=width))
    scores = [0.0] * EXPERTS
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        total = int(table[1, expert].sum())
        for following in range(EXPERTS):
            scores[following] += count * int(table[1, expert, following]) / total if total else 0.0
    predicted = prefetcher.predict(1, experts, counts, 0)
    positive = [score for score in scores if score > 1e-12]
    assert len(predicted) == min(width, len(positive))
    assert np.allclose([scores[expert] for expert in predicted], sorted(positive, reverse=True)[:width])


def test_transition_follows_the_table() -> None:
    """Worked by hand: the more tokens an expert has, the more its followers count; ties go to the lower id."""
    table = np.zeros((1, 3, 3))
    table[0, 0], table[0, 1] = [0, 4, 4], [3, 0, 1]
    prefetcher = one_layer("transition", PrefetchContext(2, 3, 3, transitions=table))
    assert prefetcher.predict(0, np.array([0]), np.array([1]), 0) == [1, 2]
    assert prefetcher.predict(0, np.array([0, 1]), np.array([1, 3]), 0) == [0, 2, 1]  # 2.25, 0.5 + 0.75, 0.5
    assert prefetcher.predict(0, np.array([2]), np.array([9]), 0) == []  # never seen in training


def test_popularity_names_the_most_popular_of_the_next_layer() -> None:
    """The named experts are the most popular of layer + 1, the best first."""
    popularity = np.array([[9.0, 0, 0, 0], [1, 7, 0, 3]])
    prefetcher = one_layer("popularity", PrefetchContext(2, 4, 2, popularity=popularity))
    assert prefetcher.predict(0, np.array([2]), np.array([1]), 0) == [1, 3]


@pytest.mark.parametrize("recall", [0.0, 0.3, 0.85, 1.0])
def test_stated_recall_is_met(recall: float) -> None:
    """Over many accesses the share of true experts named is the stated recall, within four standard errors."""
    stream = random_stream(1)
    found = predict_all(one_layer("stated_recall", context(recall=recall, width=EXPERTS)), stream)
    named = [len(set(predicted) & set(stream.experts_of(now + 1).tolist()))
             for now, predicted in enumerate(found) if now % LAYERS < LAYERS - 1]
    total = 3 * len(named)
    assert all(len(predicted) == 3 for now, predicted in enumerate(found) if now % LAYERS < LAYERS - 1)
    assert abs(sum(named) - recall * total) <= 4 * np.sqrt(recall * (1 - recall) * total)


def test_stated_recall_depends_on_seed_and_access_only() -> None:
    """The same access gives the same guess in whatever order it is asked; another seed gives another."""
    ones, experts = np.ones(3), random_stream(1).experts_of(3)
    first = one_layer("stated_recall", context(seed=5))
    forward = [first.predict(0, experts, ones, now) for now in (0, 3, 6, 9, 12)]
    second = one_layer("stated_recall", context(seed=5))
    assert [second.predict(0, experts, ones, now) for now in (12, 9, 6, 3, 0)] == forward[::-1]
    assert predict_all(one_layer("stated_recall", context(seed=6)), random_stream(1)) != predict_all(
        second, random_stream(1))


def test_stated_recall_runs_out_of_wrong_experts() -> None:
    """If the next layer uses all experts, a wrong guess has nothing to name and falls away."""
    stream = AccessStream(np.array([0, 1]), np.array([0, 1, 4]), np.array([0, 0, 1, 2]))
    for recall, count in ((0.0, 0), (1.0, 3)):
        prefetcher = one_layer("stated_recall", PrefetchContext(2, 3, 3, future=stream, recall=recall))
        assert len(prefetcher.predict(0, np.array([0]), np.array([1]), 0)) == count


def test_every_prefetcher_states_its_level_and_source() -> None:
    """What a prediction rests on can be read off, so that a what-if is never taken for a measurement."""
    found = {name: (PREFETCHERS[name].information, PREFETCHERS[name].source)  # type: ignore[attr-defined]
             for name in PREFETCHERS.names()}
    assert found == {
        "none": ("I0", "none"), "popularity": ("I0", "training trace"), "transition": ("I0", "training trace"),
        "stated_recall": ("I3", "stated"), "oracle": ("I4", "exact future"),
        "gate-speculation": ("I3", "stated"), "hobbit": ("I3", "stated"), "edgemoe": ("I1", "training trace"),
        "moe-infinity": ("I1", "past requests"), "moe-infinity-repository": ("I1", "past requests"),
        "hybrimoe": ("I3", "stated"), "hybrimoe-ascend": ("I3", "stated"), "hybrimoe-repository": ("I2", "past scores"),
        "promoe": ("I3", "stated"), "finemoe": ("I2", "past scores"), "pre-gated": ("I4", "exact future"),
        "read-me": ("I4", "exact future"), "adapmoe": ("I3", "stated"), "dali": ("I3", "stated")}


def test_what_is_stated_is_told_from_what_is_published() -> None:
    """Stated predictors need a recall, but for the one with published numbers; others have no use for one."""
    stated = {name for name in PREFETCHERS.names() if "recall" in reads(name)}
    assert stated == {name for name in PREFETCHERS.names() if PREFETCHERS[name].source == "stated"}  # type: ignore[attr-defined]
    assert {name for name in PREFETCHERS.names() if needs_recall(name)} == stated - {"hobbit"}
    for name in sorted(stated - {"hobbit", "stated_recall"}):
        with pytest.raises(InputError, match="needs recall: give PrefetchContext\\(recall="):
            make_prefetcher(name, context(recall=None))


def test_the_built_in_recall_is_one() -> None:
    """Without a recall, `stated_recall` names the truth."""
    stream = random_stream(1)
    found = predict_all(one_layer("stated_recall", context(recall=None, width=EXPERTS)), stream)
    assert found[0] == stream.experts_of(1).tolist()


@pytest.mark.parametrize(("level", "sees_future", "sees_scores"), [
    ("I0", False, False), ("I1", False, False), ("I2", False, True), ("I3", True, True), ("I4", True, True)])
def test_the_future_is_given_to_predictions_only(
        level: str, sees_future: bool, sees_scores: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below I3 a prefetcher never receives the future, below I2 no scores."""
    seen: list[PrefetchContext] = []

    class Spy(NoPrefetch):
        information = level

        def __init__(self, given: PrefetchContext) -> None:
            seen.append(given)

    monkeypatch.setitem(PREFETCHERS._entries, "spy", Spy)
    one_layer("spy", context())
    assert (seen[0].future is not None, seen[0].future_tokens is not None) == (sees_future, sees_future)
    assert (seen[0].scores is not None) is sees_scores


@pytest.mark.parametrize(("name", "lacks"), [
    ("transition", "transitions"), ("popularity", "popularity"), ("oracle", "future"), ("stated_recall", "future"),
    ("gate-speculation", "future"), ("pre-gated", "future"), ("dali", "future"), ("dali", "future_tokens"),
    ("hobbit", "future"), ("adapmoe", "future"), ("promoe", "future"), ("read-me", "future"), ("hybrimoe", "future"),
    ("hybrimoe", "makespan"), ("hybrimoe-ascend", "copy_s"), ("edgemoe", "training"), ("finemoe", "scores")])
def test_a_prefetcher_without_what_it_needs_is_an_error(name: str, lacks: str) -> None:
    """The error names the field that is missing."""
    with pytest.raises(InputError, match=f"needs {lacks}: give PrefetchContext\\({lacks}="):
        make_prefetcher(name, context(**{"future_tokens": None, lacks: None} if lacks == "future" else {
            "training_starts": None, lacks: None}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_layers": 0}, "needs layers and experts, got 0 x 8"),
    ({"width": 0}, "width must be at least 1, got 0; for none, use 'none'"),
    ({"recall": 1.5}, "recall must lie in 0 ... 1, got 1.5"),
    ({"recall": float("nan")}, "recall must lie in 0 ... 1, got nan"),
    ({"seed": -1}, "seed must not be negative"),
    ({"recall": ()}, "recall must lie in 0 ... 1"),  # no distance
    ({"recall": (0.9, -0.1)}, "recall must lie in 0 ... 1, got \\(0.9, -0.1\\)"),  # the second layer ahead
    ({"lookahead": 0}, "lookahead must be at least 1, got 0"),
    ({"copy_s": float("nan")}, "copy_s must be a number of seconds, got nan"),
    ({"future_tokens": np.ones(7, np.int64)}, "for each of the 1080 uses in future, got int64\\[7\\]"),
    ({"future_tokens": np.ones(3 * STEPS * LAYERS)}, "got float64"),  # not whole
    ({"future_tokens": np.zeros(3 * STEPS * LAYERS, np.int64)}, "must be a positive integer"),  # a use by nobody
    ({"training_starts": np.ones(7, bool)}, "training_starts must be bool\\[access\\] of `training`, got bool\\[7\\]"),
    ({"training_starts": np.ones(STEPS * LAYERS)}, "training_starts must be bool"),
    ({"scores": RouterScores(1, np.ones((6, 3)), np.ones((6, 3)))}, "scores are of 3 experts, not 8"),
    ({"training_scores": RouterScores(1, np.ones((7, 8)), np.ones((7, 8)))}, "whole steps of 3 layers, got 7 accesses"),
    ({"transitions": np.ones((3, 8, 8))}, r"transitions must be \[2, 8, 8\], got \[3, 8, 8\]"),  # a table too many
    ({"transitions": -np.ones((2, 8, 8))}, "transitions must be finite and not negative"),
    ({"popularity": np.ones((8, 3))}, r"popularity must be \[3, 8\], got \[8, 3\]"),  # transposed
    ({"num_experts": 4, "transitions": None, "popularity": None, "scores": None,
      "training_scores": None}, "expert 7, but there are 3 layers x 4 experts"),
])
def test_bad_contexts_are_refused(changes: dict, message: str) -> None:
    """Each range and shape is checked on construction."""
    with pytest.raises(InputError, match=message):
        context(**changes)


def test_unknown_prefetchers_get_a_suggestion() -> None:
    """A misspelt name is an error with a suggestion."""
    with pytest.raises(InputError, match="unknown prefetcher 'transitions'\\. Did you mean 'transition'"):
        make_prefetcher("transitions", context())


@pytest.mark.parametrize("ask", [
    lambda oracle: oracle.predict(1, np.array([0]), np.array([1]), 0),  # access 0 is of layer 0
    lambda oracle: oracle.predict(0, np.array([0]), np.array([1]), STEPS * LAYERS),  # past the end
])
def test_an_oracle_of_another_run_is_an_error(ask: Callable[[Prefetcher], list[int]]) -> None:
    """Layers that do not match the future show that another stream is being run."""
    with pytest.raises(InputError, match="give the stream that is being run"):
        ask(one_layer("oracle", context()))


@pytest.mark.parametrize("wish", [Wish(3, 0), Wish(-1, 0), Wish(0, 8), Wish(0, -1), Wish(0, 0, -1)])
def test_a_wish_outside_the_model_is_an_error(wish: Wish) -> None:
    """As may come from a plug-in."""
    check_wishes([Wish(0, 0), Wish(2, 7, 5)], LAYERS, EXPERTS)
    with pytest.raises(InputError, match=r"wishes for Wish.*3 layers x 8 experts"):
        check_wishes([Wish(0, 0), wish], LAYERS, EXPERTS)
