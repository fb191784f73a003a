"""The access stream and what policies may be built from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.policies.belady import BeladyPolicy
from moesim.cache.policies.lru import LruPolicy
from moesim.cache.policy import POLICIES, AccessStream, PolicyContext, access_stream, make_policy
from moesim.errors import InputError
from moesim.traces.trace import RoutingTrace


def trace_of(expert_ids: np.ndarray, num_experts: int) -> RoutingTrace:
    """Return one request's trace of int[token, layer, k]."""
    tokens, layers, _ = expert_ids.shape
    zeros = np.zeros(tokens, np.int32)
    return RoutingTrace(
        expert_ids=expert_ids, request_id=zeros, position=np.arange(tokens), phase=zeros, step=np.arange(tokens),
        num_experts=num_experts, layer_ids=np.arange(layers))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 9), layers=st.integers(1, 3), top_k=st.integers(1, 3))
def test_stream_is_the_set_of_experts_of_each_step_and_layer(
        seed: int, tokens: int, layers: int, top_k: int) -> None:
    """Each access holds exactly the distinct experts that the step's rows name in that layer."""
    rng = np.random.default_rng(seed)
    ids = np.array([[rng.permutation(6)[:top_k] for _ in range(layers)] for _ in range(tokens)])
    ids[rng.random((tokens, layers)) < 0.3, -1] = -1
    steps = np.split(np.arange(tokens), sorted(rng.choice(tokens, 2))) if tokens > 2 else [np.arange(tokens)]
    steps = [rows for rows in steps if len(rows)]
    stream = access_stream(trace_of(ids, 6), steps)
    expected = [sorted({e for row in rows for e in ids[row, layer].tolist() if e >= 0})
                for rows in steps for layer in range(layers)]
    assert [stream.experts_of(i).tolist() for i in range(stream.num_accesses)] == expected
    assert stream.layers.tolist() == list(range(layers)) * len(steps)


def test_stream_dtypes_and_keys() -> None:
    """The arrays have the documented dtypes, are read-only, and keys are layer * num_experts + expert."""
    stream = access_stream(trace_of(np.array([[[3, 1], [0, 2]]]), 4), [np.array([0])])
    assert (stream.layers.dtype, stream.offsets.dtype, stream.experts.dtype) == (np.int32, np.int64, np.int16)
    assert not stream.experts.flags.writeable
    assert stream.keys(4).tolist() == [1, 3, 4, 6]


@pytest.mark.parametrize(("layers", "offsets", "experts", "message"), [
    ([], [0], [], "at least one access"),  # nothing is accessed
    ([0], [0], [1], "one offset more than layers"),  # the end is missing
    ([0], [0, 1], [1, 2], "offsets must rise from 0 to 2"),  # an expert of no access
    ([0, 0], [0, 2, 1], [1], "offsets must rise"),  # a negative length
    ([0], [0, 2], [2, 1], "experts of access 0 must rise"),  # not sorted
    ([0, 0, 1], [0, 1, 1, 3], [5, 4, 4], "experts of access 2 must rise"),  # an expert twice
    ([-1], [0, 1], [1], "layers must lie in 0"),  # a negative layer
    ([0], [0, 1], [40_000], "experts must lie in 0 ... 32767"),  # does not fit int16
    ([0], [0, 1], [1.5], "experts must be a list of integers"),  # not an id
])
def test_bad_streams_are_refused(layers: list, offsets: list, experts: list, message: str) -> None:
    """Arrays that do not describe accesses raise an InputError that says which and why."""
    with pytest.raises(InputError, match=message):
        AccessStream(np.array(layers), np.array(offsets), np.array(experts))


@pytest.mark.parametrize(("steps", "message"), [
    ([], "no steps"),
    ([np.array([], dtype=np.int64)], "step 0 must be a list of trace rows"),
    ([np.array([0]), np.array([0.5])], "step 1 must be a list of trace rows, got float64"),
    ([np.array([0, 7])], "step 0 names rows 0 ... 7, but the trace has 2"),
    ([np.array([-1])], "names rows -1"),  # would silently be the last row
])
def test_bad_steps_are_refused(steps: list, message: str) -> None:
    """Steps must name rows of the trace."""
    with pytest.raises(InputError, match=message):
        access_stream(trace_of(np.array([[[0]], [[1]]]), 2), steps)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_experts": 0}, "needs layers and experts, got 2 x 0"),
    ({"popularity": np.ones((2, 3))}, r"popularity must be \[2, 4\], got \[2, 3\]"),
    ({"popularity": np.full((2, 4), np.nan)}, "popularity must be finite"),
    ({"future": AccessStream(np.array([2]), np.array([0, 1]), np.array([1]))}, "names layer 2"),
    ({"future": AccessStream(np.array([0]), np.array([0, 1]), np.array([4]))}, "expert 4, but there are 2 layers x 4"),
])
def test_bad_contexts_are_refused(changes: dict, message: str) -> None:
    """A context of another shape than the model raises an InputError."""
    with pytest.raises(InputError, match=message):
        PolicyContext(**{"num_layers": 2, "num_experts": 4, **changes})


class Spy(LruPolicy):
    """Remembers the context that it was built from."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.context = context


@pytest.mark.parametrize(("level", "sees_future"), [("I0", False), ("I1", False), ("I3", False), ("I4", True)])
def test_the_future_is_given_to_level_i4_only(
        level: str, sees_future: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy below I4 never receives the future, though every policy receives popularity."""
    stream = AccessStream(np.array([0]), np.array([0, 1]), np.array([1]))
    monkeypatch.setattr(Spy, "information", level)
    monkeypatch.setitem(POLICIES._entries, "spy", Spy)
    policy = make_policy("spy", PolicyContext(1, 2, popularity=np.ones((1, 2)), future=stream))
    assert isinstance(policy, Spy)
    assert (policy.context.future is not None) is sees_future
    assert policy.context.popularity is not None


@pytest.mark.parametrize(("name", "message"), [
    ("belady", "'belady' needs the exact future: give PolicyContext\\(future=access_stream"),
    ("belady-bypass", "needs the exact future"),
    ("static", "'static' needs popularity: give PolicyContext\\(popularity="),
    ("lur", "unknown cache policy 'lur'. Did you mean 'lru'"),
])
def test_a_policy_without_what_it_needs_is_an_error(name: str, message: str) -> None:
    """A missing future or popularity raises an error that says how to give it; there is no fallback."""
    with pytest.raises(InputError, match=message):
        make_policy(name, PolicyContext(1, 4))


def test_a_policy_must_declare_its_information(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in that declares no known level is refused by name."""
    monkeypatch.setitem(POLICIES._entries, "secret", object)
    with pytest.raises(InputError, match="cache policy 'secret' must declare `information`"):
        make_policy("secret", PolicyContext(1, 4))


def test_belady_refuses_to_run_past_its_future() -> None:
    """Belady asked about an access that its future does not hold raises instead of guessing."""
    stream = AccessStream(np.array([0]), np.array([0, 1]), np.array([1]))
    policy = BeladyPolicy(PolicyContext(1, 2, future=stream))
    policy.attach(1, False)
    policy.touch(1, 0)
    with pytest.raises(InputError, match=r"access 1 lies past the end of the future .*\(1 accesses\)"):
        policy.touch(1, 1)
