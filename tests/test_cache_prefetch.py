"""Prefetchers: what each names, on what ground, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.policy import AccessStream
from moesim.cache.prefetch import PREFETCHERS, NoPrefetch, PrefetchContext, Prefetcher, make_prefetcher
from moesim.errors import InputError

LAYERS, EXPERTS, STEPS = 3, 8, 120


def random_stream(seed: int, per_access: int = 3) -> AccessStream:
    """Return STEPS steps of LAYERS accesses with `per_access` random experts each."""
    rng = np.random.default_rng(seed)
    experts = [np.sort(rng.permutation(EXPERTS)[:per_access]) for _ in range(STEPS * LAYERS)]
    return AccessStream(
        np.tile(np.arange(LAYERS), STEPS), np.arange(STEPS * LAYERS + 1) * per_access, np.concatenate(experts))


def context(**changes: object) -> PrefetchContext:
    """Return a context with everything that any prefetcher may want."""
    rng = np.random.default_rng(3)
    everything = {
        "num_layers": LAYERS, "num_experts": EXPERTS, "width": 4, "future": random_stream(1), "recall": 0.7,
        "transitions": rng.integers(0, 5, (LAYERS - 1, EXPERTS, EXPERTS)), "popularity": rng.random((LAYERS, EXPERTS))}
    return PrefetchContext(**{**everything, **changes})  # type: ignore[arg-type]


def predict_all(prefetcher: Prefetcher, stream: AccessStream) -> list[list[int]]:
    """Return the predictions made during every access of `stream`."""
    found = []
    for now, layer in enumerate(stream.layers.tolist()):
        experts = stream.experts_of(now)
        found.append(prefetcher.predict(layer, experts, np.ones(len(experts), np.int64), now))
    return found


@pytest.mark.parametrize("name", PREFETCHERS.names())
def test_every_prefetcher_keeps_the_contract(name: str) -> None:
    """Predictions are distinct experts in range, at most `width`, and none for the last layer; repeatable."""
    found = predict_all(make_prefetcher(name, context()), random_stream(1))
    for now, predicted in enumerate(found):
        assert len(predicted) == len(set(predicted)) <= 4
        assert all(type(expert) is int and 0 <= expert < EXPERTS for expert in predicted)
        assert now % LAYERS < LAYERS - 1 or predicted == []
    assert any(found) == (name != "none")
    assert predict_all(make_prefetcher(name, context()), random_stream(1)) == found


@pytest.mark.parametrize("width", [2, 8])
def test_oracle_names_the_next_access(width: int) -> None:
    """The oracle names the true experts of the next layer, cut to the width."""
    stream = random_stream(1)
    found = predict_all(make_prefetcher("oracle", context(width=width)), stream)
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
    prefetcher = make_prefetcher("transition", context(transitions=table, width=width))
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
    prefetcher = make_prefetcher("transition", PrefetchContext(2, 3, 3, transitions=table))
    assert prefetcher.predict(0, np.array([0]), np.array([1]), 0) == [1, 2]
    assert prefetcher.predict(0, np.array([0, 1]), np.array([1, 3]), 0) == [0, 2, 1]  # 2.25, 0.5 + 0.75, 0.5
    assert prefetcher.predict(0, np.array([2]), np.array([9]), 0) == []  # never seen in training


def test_popularity_names_the_most_popular_of_the_next_layer() -> None:
    """The named experts are the most popular of layer + 1, the best first."""
    popularity = np.array([[9.0, 0, 0, 0], [1, 7, 0, 3]])
    prefetcher = make_prefetcher("popularity", PrefetchContext(2, 4, 2, popularity=popularity))
    assert prefetcher.predict(0, np.array([2]), np.array([1]), 0) == [1, 3]


@pytest.mark.parametrize("recall", [0.0, 0.3, 0.85, 1.0])
def test_stated_recall_is_met(recall: float) -> None:
    """Over many accesses the share of true experts named is the stated recall, within four standard errors."""
    stream = random_stream(1)
    found = predict_all(make_prefetcher("stated_recall", context(recall=recall, width=EXPERTS)), stream)
    named = [len(set(predicted) & set(stream.experts_of(now + 1).tolist()))
             for now, predicted in enumerate(found) if now % LAYERS < LAYERS - 1]
    total = 3 * len(named)
    assert all(len(predicted) == 3 for now, predicted in enumerate(found) if now % LAYERS < LAYERS - 1)
    assert abs(sum(named) - recall * total) <= 4 * np.sqrt(recall * (1 - recall) * total)


def test_stated_recall_depends_on_seed_and_access_only() -> None:
    """The same access gives the same guess in whatever order it is asked; another seed gives another."""
    ones, experts = np.ones(3), random_stream(1).experts_of(3)
    first = make_prefetcher("stated_recall", context(seed=5))
    forward = [first.predict(0, experts, ones, now) for now in (0, 3, 6, 9, 12)]
    second = make_prefetcher("stated_recall", context(seed=5))
    assert [second.predict(0, experts, ones, now) for now in (12, 9, 6, 3, 0)] == forward[::-1]
    assert predict_all(make_prefetcher("stated_recall", context(seed=6)), random_stream(1)) != predict_all(
        second, random_stream(1))


def test_stated_recall_runs_out_of_wrong_experts() -> None:
    """If the next layer uses all experts, a wrong guess has nothing to name and falls away."""
    stream = AccessStream(np.array([0, 1]), np.array([0, 1, 4]), np.array([0, 0, 1, 2]))
    for recall, count in ((0.0, 0), (1.0, 3)):
        prefetcher = make_prefetcher("stated_recall", PrefetchContext(2, 3, 3, future=stream, recall=recall))
        assert len(prefetcher.predict(0, np.array([0]), np.array([1]), 0)) == count


def test_every_prefetcher_states_its_level_and_source() -> None:
    """What a prediction rests on can be read off, so that a what-if is never taken for a measurement."""
    found = {name: (PREFETCHERS[name].information, PREFETCHERS[name].source)  # type: ignore[attr-defined]
             for name in PREFETCHERS.names()}
    assert found == {
        "none": ("I0", "none"), "popularity": ("I0", "training trace"), "transition": ("I0", "training trace"),
        "stated_recall": ("I3", "stated"), "oracle": ("I4", "exact future")}


@pytest.mark.parametrize(("level", "sees_future"), [("I0", False), ("I2", False), ("I3", True), ("I4", True)])
def test_the_future_is_given_to_predictions_only(
        level: str, sees_future: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below I3 a prefetcher never receives the future."""
    seen: list[PrefetchContext] = []

    class Spy(NoPrefetch):
        information = level

        def __init__(self, given: PrefetchContext) -> None:
            seen.append(given)

    monkeypatch.setitem(PREFETCHERS._entries, "spy", Spy)
    make_prefetcher("spy", context())
    assert (seen[0].future is not None) is sees_future


@pytest.mark.parametrize(("name", "lacks"), [
    ("transition", "transitions"), ("popularity", "popularity"), ("oracle", "future"), ("stated_recall", "future")])
def test_a_prefetcher_without_what_it_needs_is_an_error(name: str, lacks: str) -> None:
    """The error names the field that is missing."""
    with pytest.raises(InputError, match=f"needs {lacks}: give PrefetchContext\\({lacks}="):
        make_prefetcher(name, context(**{lacks: None}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_layers": 0}, "needs layers and experts, got 0 x 8"),
    ({"width": 0}, "width must be at least 1, got 0; for none, use 'none'"),
    ({"recall": 1.5}, "recall must lie in 0 ... 1, got 1.5"),
    ({"recall": float("nan")}, "recall must lie in 0 ... 1, got nan"),
    ({"seed": -1}, "seed must not be negative"),
    ({"transitions": np.ones((3, 8, 8))}, r"transitions must be \[2, 8, 8\], got \[3, 8, 8\]"),  # a table too many
    ({"transitions": -np.ones((2, 8, 8))}, "transitions must be finite and not negative"),
    ({"popularity": np.ones((8, 3))}, r"popularity must be \[3, 8\], got \[8, 3\]"),  # transposed
    ({"num_experts": 4, "transitions": None, "popularity": None}, "expert 7, but there are 3 layers x 4 experts"),
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
        ask(make_prefetcher("oracle", context()))
