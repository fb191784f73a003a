"""EdgeMoE's bits per expert: the search against all choices, losses from a file, and the proxy."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cache.precision_bits import (
    AdditiveLoss,
    choose_bits,
    gate_mass_loss,
    importance_of,
    read_expert_loss,
)
from moesim.errors import InputError
from moesim.traces.synth import synthetic_trace


def random_loss(seed: int, layers: int = 2, experts: int = 4, widths: tuple[int, ...] = (2, 4, 8)) -> AdditiveLoss:
    """Losses of random experts that fall with the width."""
    rng = np.random.default_rng(seed)
    return AdditiveLoss(widths, np.sort(rng.random((len(widths), layers, experts)), axis=0)[::-1])


def most_lower(loss: Callable[[np.ndarray], float], shape: tuple[int, int], lower: int, upper: int,
               tolerable: float) -> int:
    """The most experts that any choice of `lower` and `upper` can put at `lower`, by trying all."""
    return max(sum(bits == lower for bits in choice)
               for choice in itertools.product((lower, upper), repeat=shape[0] * shape[1])
               if loss(np.array(choice).reshape(shape)) <= tolerable)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.floats(0, 1))
def test_no_choice_of_the_two_widths_narrows_more_experts(seed: int, share: float) -> None:
    """Additive losses, the importance between the two bounds: K is the most of all 2^8 choices."""
    loss = random_loss(seed)
    at = [float(loss.table[level].sum()) for level in range(3)]
    tolerable = at[2] + share * (at[0] - at[2])
    coarse = loss.choose(tolerable)
    importance = loss.importance(coarse.lower_bits, coarse.upper_bits)
    choice = choose_bits(loss, importance, loss.widths, tolerable)
    assert choice.loss == loss(choice.bits) <= tolerable
    assert (choice.lower_bits, choice.upper_bits) == (coarse.lower_bits, coarse.upper_bits)
    assert choice.num_lower == int((choice.bits == choice.lower_bits).sum())
    if choice.lower_bits < choice.upper_bits:
        assert loss(np.full((2, 4), choice.lower_bits)) > tolerable
        assert choice.num_lower == most_lower(loss, (2, 4), choice.lower_bits, choice.upper_bits, tolerable)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(0, 16))
def test_a_loss_that_is_no_sum_still_keeps_its_limit(seed: int, allowed: int) -> None:
    """For any loss, even one that does not grow with K: the answer is tolerated, and one more expert is not."""
    rng = np.random.default_rng(seed)
    drawn: dict[bytes, float] = {}

    def loss(bits: np.ndarray) -> float:
        if np.all(bits == 8):
            return 0.0
        return 17.0 if np.all(bits == 2) else drawn.setdefault(bits.tobytes(), float(rng.integers(0, 17)))

    importance = rng.random((2, 3))
    choice = choose_bits(loss, importance, (2, 8), allowed)
    assert loss(choice.bits) == choice.loss <= allowed
    order = np.argsort(importance, axis=None, kind="stable")
    assert set(np.flatnonzero(choice.bits.ravel() == 2)) == set(order[: choice.num_lower])
    more = choice.bits.copy()
    more.ravel()[order[choice.num_lower]] = 2
    assert loss(more) > allowed


def test_the_search_asks_few_times() -> None:
    """Doubling and halving: some 2 log2 of the experts, not all of them."""
    loss = random_loss(1, 16, 64)
    choice = loss.choose(float(loss.table[1].sum()) * 0.7)
    assert 0 < choice.num_lower < 1024
    assert choice.evaluations <= 2 + 2 * 10 + 3


def test_the_narrowest_width_is_taken_where_it_is_tolerated() -> None:
    """Then there is no upper bound and no expert is wider."""
    choice = random_loss(1).choose(100.0)
    assert np.all(choice.bits == 2)
    assert choice.num_lower == 8
    assert not choice.bits.flags.writeable


def test_importance_is_the_loss_of_one_narrow_expert() -> None:
    """Against the table: all at 4 bits, one at 2."""
    loss = random_loss(3)
    assert importance_of(loss, (2, 4)) == pytest.approx(loss.table[1].sum() + loss.importance())
    assert loss.importance(2, 4) == pytest.approx(loss.table[0] - loss.table[1])


def test_the_proxy_weighs_noise_by_gate_weight() -> None:
    """All experts at 2 bits lose 1, at 8 bits 0, at 4 bits 4^-2 less a little; shares by counting."""
    trace = synthetic_trace(50, 2, 6, 2, 5, seed=3)
    loss = gate_mass_loss(trace, (2, 4, 8))
    full = [loss(np.full((2, 6), bits)) for bits in (2, 4, 8)]
    assert full == pytest.approx([1.0, (4.0**-2 - 4.0**-6) / (1 - 4.0**-6), 0.0])
    assert loss.proxy
    assert "proxy" in loss.choose(0.1).source
    bits = np.full((2, 6), 8)
    bits[1, 2] = 2
    mass = sum(weight / row.sum() for ids, row in zip(trace.expert_ids[:, 1], trace.gate_weights[:, 1], strict=True)
               for expert, weight in zip(ids, row.astype(float), strict=True) if expert == 2)
    assert loss(bits) == pytest.approx(mass / 100, rel=1e-5)


def loss_file(tmp_path: Path, **changes: object) -> Path:
    """A file of losses of 1 layer and 2 experts, with some keys changed."""
    body = {"schema": "moesim.expert_loss/1", "source": "GSM8K, each expert alone",
            "loss": {"2": [[0.5, 0.1]], "4": [[0.1, 0.0]]}}
    path = tmp_path / "loss.json"
    path.write_text(json.dumps({**body, **changes}))
    return path


def test_losses_are_read_from_a_file(tmp_path: Path) -> None:
    """And say where they come from."""
    loss = read_expert_loss(loss_file(tmp_path), 1, 2)
    assert loss(np.array([[2, 4]])) == 0.5
    choice = loss.choose(0.2)
    assert choice.bits.tolist() == [[4, 2]]
    assert (choice.source, choice.proxy) == ("GSM8K, each expert alone", False)


@pytest.mark.parametrize(("changes", "message"), [
    ({"loss": []}, r"'loss' must map widths in bits to tables \[layer, expert\], got \[\]"),
    ({"loss": {"two": [[1, 2]]}}, "loss.two: a width must be a whole number of bits, got 'two'"),
    ({"loss": {"2": [[1, 2, 3]]}}, r"loss.2 must be numbers \[layer, expert\] = \[1, 2\], got shape \[1, 3\]"),
    ({"loss": {"2": [["a", "b"]]}}, "loss.2 must be numbers"),
    ({"loss": {"2": [[0.1, 0.1]], "4": [[0.2, 0.1]]}}, "no larger at a wider width"),
    ({"source": ""}, "'source' must say where the losses come from, got ''"),
    ({"schema": "other"}, "expected a 'moesim.expert_loss/1' file")])
def test_a_file_that_holds_no_losses_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    """The message names the file and the key."""
    with pytest.raises(InputError, match=message) as caught:
        read_expert_loss(loss_file(tmp_path, **changes), 1, 2)
    assert "loss.json" in str(caught.value)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: random_loss(1).choose(-1.0), "even 8 bits for all experts lose .*, more than the tolerable -1"),
    (lambda: choose_bits(lambda bits: 0.0, np.ones((1, 2)), (), 1.0), "widths must be at least 1 bit"),
    (lambda: choose_bits(lambda bits: np.nan, np.ones((1, 2)), (2,), 1.0), "the loss must be finite, got nan"),
    (lambda: choose_bits(lambda bits: 9 - bits.min(), np.full((1, 2), np.nan), (2, 8), 1.0), "importance must be finite"),
    (lambda: random_loss(1)(np.full((2, 4), 3)), r"no loss for 3 bits; the table has \[2, 4, 8\]"),
    (lambda: AdditiveLoss((2, 4), np.zeros((1, 2, 3))), "one table"),
    (lambda: gate_mass_loss(synthetic_trace(4, 1, 4, 1, 1), (4,)), "at least two widths")])
def test_what_cannot_be_searched_is_refused(make: Callable[[], object], message: str) -> None:
    """Losses above the limit at every width, or that are no numbers."""
    with pytest.raises(InputError, match=message):
        make()
