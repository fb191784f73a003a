"""Hit curves: equal to a replay at every size; what is no stack algorithm is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.cache import ExpertCache
from moesim.cache.compiled_replay import replay_compiled
from moesim.cache.curves import NOT_DETERMINED, HitCurve, hit_curves
from moesim.cache.policy import AccessStream, PolicyContext, make_policy
from moesim.cache.replay import replay
from moesim.errors import CheckError, InputError

NUM_EXPERTS = 7


def stream_of(accesses: list[tuple[int, list[int]]]) -> AccessStream:
    """Return the stream of (layer, experts) pairs."""
    sizes = [len(experts) for _, experts in accesses]
    return AccessStream(
        np.array([layer for layer, _ in accesses]), np.cumsum([0, *sizes]),
        np.array([expert for _, experts in accesses for expert in experts], dtype=np.int64))


def stream_of_ids(ids: np.ndarray) -> AccessStream:
    """Return the stream in which each token of int[token, layer, k] (-1: none) is a step."""
    return stream_of([(layer, sorted(row[row >= 0].tolist())) for token in ids for layer, row in enumerate(token)])


@st.composite
def streams(draw: st.DrawFn) -> AccessStream:
    """Draw up to 50 accesses of 2 layers, of none to three of 7 experts."""
    some = st.sets(st.integers(0, NUM_EXPERTS - 1), max_size=3).map(sorted)
    return stream_of(draw(st.lists(st.tuples(st.integers(0, 1), some), min_size=1, max_size=50)))


def some_ids(seed: int, num_tokens: int, num_layers: int, num_experts: int, top_k: int) -> np.ndarray:
    """Return int16[token, layer, k], distinct, in the order of a router's scores, some missing (-1)."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(num_tokens, num_layers, num_experts)) - np.log(np.arange(1, num_experts + 1))
    ids = np.argsort(-scores, axis=2)[..., :top_k].astype(np.int16)
    ids[rng.random(ids.shape) < 0.05] = -1
    return ids


@settings(max_examples=150, deadline=None)
@given(stream=streams(), policy=st.sampled_from(["lru", "belady"]),
       semantics=st.sampled_from(["set", "sequential"]), count_cold=st.booleans())
def test_curves_equal_replays_at_every_size(stream: AccessStream, policy: str, semantics: str, count_cold: bool) -> None:
    """Layer by layer, at each size from the smallest to more than all experts, the readable replay hits as often."""
    curve = hit_curves(stream, NUM_EXPERTS, num_layers=2, policies=[policy], semantics=semantics,
                       count_cold=count_cold)[policy]
    for slots in range(1, NUM_EXPERTS + 1):
        cache = ExpertCache(2, NUM_EXPERTS, slots, make_policy(policy, PolicyContext(2, NUM_EXPERTS, future=stream)))
        stats = replay(stream, cache, semantics=semantics, count_cold=count_cold)
        assert curve.accesses.tolist() == stats.accesses.tolist()
        for layer in (0, 1):
            valid = slots >= curve.smallest_slots[layer]
            assert curve.hits[layer, slots] == (stats.hits[layer] if valid else NOT_DETERMINED)
    assert curve.hits_at(NUM_EXPERTS + 5).tolist() == stats.hits.tolist()


@settings(max_examples=60, deadline=None)
@given(stream=streams())
def test_lru_does_not_evict_what_it_uses(stream: AccessStream) -> None:
    """So its curve also holds if experts of one access may evict each other."""
    curve = hit_curves(stream, NUM_EXPERTS, num_layers=2, policies=["lru"], current_evictable=True)["lru"]
    for slots in range(int(curve.smallest_slots.max()), NUM_EXPERTS + 1):
        cache = ExpertCache(2, NUM_EXPERTS, slots, make_policy("lru", PolicyContext(2, NUM_EXPERTS)))
        assert curve.hits_at(slots).tolist() == replay(stream, cache, current_evictable=True).hits.tolist()


def test_the_smallest_size_is_needed() -> None:
    """Of three experts at once, two slots keep the first two, and the next access hits; the stack has the last two on top."""
    stream = stream_of([(0, [0, 1, 2]), (0, [0])])
    curve = hit_curves(stream, 4)["lru"]
    hits = [int(replay(stream, ExpertCache(1, 4, slots, make_policy("lru", PolicyContext(1, 4)))).hits.sum())
            for slots in (1, 2, 3, 4)]
    assert hits == [1, 1, 1, 1]
    assert curve.hits.tolist() == [[-1, -1, -1, 1, 1]]
    assert curve.smallest_slots.tolist() == [3]


@settings(max_examples=60, deadline=None)
@given(stream=streams())
def test_more_slots_never_hit_less_and_lru_never_more_than_belady(stream: AccessStream) -> None:
    """Inclusion, and optimality, at all sizes at once."""
    curves = hit_curves(stream, NUM_EXPERTS, num_layers=2)
    for curve in curves.values():
        assert (np.diff(curve.hits, axis=1) >= 0).all()
    assert (curves["lru"].hits <= curves["belady"].hits).all()
    # with room for all, every use but the first of an expert hits
    distinct = [len(np.unique(stream.experts[np.repeat(stream.layers, np.diff(stream.offsets)) == layer]))
                for layer in (0, 1)]
    for curve in curves.values():
        assert (curve.accesses - curve.hits_at(NUM_EXPERTS)).tolist() == distinct


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8), (200, 6)])
@pytest.mark.parametrize("semantics", ["set", "sequential"])
def test_ids_of_tokens_equal_the_stream(num_experts: int, top_k: int, semantics: str) -> None:
    """int16[token, layer, k] in any order within a token, padded with -1, gives the curves of the stream, and of replays."""
    ids = some_ids(3, 400, 3, num_experts, top_k)
    stream = stream_of_ids(ids)
    curves = hit_curves(ids, num_experts, semantics=semantics)
    again = hit_curves(stream, num_experts, num_layers=3, semantics=semantics)
    for policy, curve in curves.items():
        assert np.array_equal(curve.hits, again[policy].hits)
        for slots in (top_k, num_experts // 3, num_experts - 1):
            if slots >= curve.smallest_slots.max():
                stats = replay_compiled(stream, policy, PolicyContext(3, num_experts, future=stream),
                                        slots_per_layer=slots, semantics=semantics)
                assert curve.hits_at(slots).tolist() == stats.hits.tolist()


def test_ids_keep_their_bytes_and_any_layout_is_read() -> None:
    """The array is not changed; int64 and a view with gaps count the same."""
    ids = some_ids(4, 60, 2, 8, 3)
    before = ids.tobytes()
    expected = hit_curves(ids, 8)["belady"].hits
    assert ids.tobytes() == before
    assert np.array_equal(hit_curves(ids.astype(np.int64), 8)["belady"].hits, expected)
    assert np.array_equal(hit_curves(np.repeat(ids, 2, axis=1)[:, ::2], 8)["belady"].hits, expected)


def test_golden_curve() -> None:
    """By hand: uses 0 1 0 2 1 0 of one layer, one at a time; depths of LRU: -, -, 2, -, 3, 3; of Belady: -, -, 2, -, 3, 2."""
    stream = stream_of([(0, [expert]) for expert in (0, 1, 0, 2, 1, 0)])
    curves = hit_curves(stream, 4)
    assert curves["lru"].hits.tolist() == [[-1, 0, 1, 3, 3]]
    assert curves["belady"].hits.tolist() == [[-1, 0, 2, 3, 3]]
    cold = hit_curves(stream, 4, count_cold=False)
    assert cold["lru"].hits.tolist() == [[-1, 1, 3, 6, 6]]


def test_frame_has_a_row_per_layer_and_size() -> None:
    """Sizes that are not determined are left out."""
    frame = hit_curves(stream_of([(0, [0, 1]), (1, [0]), (0, [0, 1])]), 2)["lru"].to_frame()
    assert frame.to_numpy().tolist() == [[0, 2, 4, 2, 0.5], [1, 1, 1, 0, 0.0], [1, 2, 1, 0, 0.0]]
    assert list(frame.columns) == ["layer", "slots", "accesses", "hits", "hit_rate"]


@pytest.mark.parametrize(("accesses", "options", "message"), [
    (None, {"policies": ["lfu"]}, "'lfu' is no stack algorithm"),
    (None, {"policies": ["belady-bypass"]}, "'belady-bypass' is no stack algorithm"),
    (None, {"current_evictable": True}, "'belady' is a stack algorithm only with current_evictable=False"),
    (None, {"semantics": "sets"}, "unknown access semantics 'sets'. Did you mean 'set'"),
    (None, {"num_layers": 1}, "names layer 1 and expert 6, but there are 1 layers x 7 experts"),
    (np.zeros((2, 3)), {}, "must be integers \\[token, layer, k\\], got float64\\[2, 3\\]"),
    (np.zeros((0, 1, 1), np.int16), {}, "must be integers \\[token, layer, k\\], got int16\\[0, 1, 1\\]"),
    (np.full((1, 1, 1), 7), {}, "expert ids 7 ... 7 are not those of 7 experts"),
    (np.full((1, 1, 1), -2), {}, "expert ids -2 ... -2 are not those of 7 experts"),
    (np.array([[[1, 2]], [[3, 3]]]), {}, "access 1 of layer 0 names an expert twice"),
    (np.zeros((1, 2, 1), int), {"num_layers": 3}, "expert ids have 2 layers, not 3"),
])
def test_bad_input_is_refused(accesses: np.ndarray | None, options: dict[str, object], message: str) -> None:
    """Policies and options without the stack property, and ids that are none."""
    given = stream_of([(0, [1, 2]), (1, [6])]) if accesses is None else accesses
    with pytest.raises(InputError, match=message):
        hit_curves(given, NUM_EXPERTS, **options)  # type: ignore[arg-type]


def test_sizes_without_a_curve_are_refused() -> None:
    """Asking below the largest access names what to use instead."""
    curve = hit_curves(stream_of([(0, [0, 1, 2])]), 4)["lru"]
    with pytest.raises(InputError, match="holds from 3 slots per layer on, got 2; use replay_compiled below"):
        curve.hits_at(2)


def test_curves_that_fall_are_refused() -> None:
    """HitCurve checks that more slots hit no less."""
    curve = hit_curves(stream_of([(0, [0]), (0, [0])]), 2)["lru"]
    assert isinstance(curve, HitCurve)
    with pytest.raises(CheckError, match="hits must rise with the slots"):
        dataclasses.replace(curve, hits=np.array([[-1, 1, 0]]))


def test_a_layer_of_too_many_uses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions must fit the loops' integers."""
    from moesim.cache.kernels import curves as kernels

    monkeypatch.setattr(kernels, "MAX_LAYER_USES", 2)
    with pytest.raises(InputError, match="layer 0 has 2 uses; at most 1 can be counted"):
        hit_curves(stream_of([(0, [0]), (0, [0])]), 2)
