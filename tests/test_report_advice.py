"""Advice from rows made by hand: the knee, each part of the sentence, and nothing that the rows do not say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.report.advice import WITHIN, advice


def row(slots: int, rate: float, **changes: Any) -> dict[str, Any]:
    """One row of a study; a fifth of the time is above the bound, three tenths are waited."""
    return {"policy": "lru", "prefetch": "none", "miss": "load", "slots_per_layer": slots, "tokens_per_s": rate,
            "tpot_gap": 0.2, "stall_fraction": 0.3, "sees_future": False} | changes


def test_the_knee_is_the_smallest_size_within_five_percent() -> None:
    """Of 100, 96 and 80 tokens/s the size with 96 is enough; a policy that sees the future does not count."""
    rows = [row(16, 80), row(32, 96), row(48, 100), row(16, 99, policy="belady", sees_future=True)]
    found = advice(rows)
    assert found.knee is rows[1]
    assert found.sentence == (
        "Keep 32 experts per layer with lru and load misses: 96 tokens/s, at most 25 % more time than the best policy that loads "
        "its misses with these slots would take; more slots (up to 48) gain at most 4.2 %; the device waits 30 % of the time.")
    assert found.reasons == (
        "The most tokens/s by size: 16 slots per layer: 80 tokens/s with lru (load). 32 slots per layer: 96 tokens/s with lru "
        "(load). 48 slots per layer: 100 tokens/s with lru (load).",)


def test_the_best_point_of_a_size_counts() -> None:
    """At 16 slots the CPU wins; who comes next and what foresight would give are reasons."""
    rows = [row(16, 50), row(16, 90, policy="lfu", miss="cpu"), row(16, 120, policy="belady", sees_future=True), row(32, 91)]
    found = advice(rows)
    assert found.knee is rows[1]
    assert "with lfu and let the CPU compute misses: 90 tokens/s" in found.sentence
    assert found.reasons[1:] == (
        "Of the 2 points with 16 slots that can be deployed, lru (load) comes next with 44 % fewer tokens/s.",
        "With the future known, belady (load) reaches 33 % more.")


@pytest.mark.parametrize(("changes", "text"), [
    ({"resident_fraction": 0.25}, "Keep 16 of 64 experts per layer with lru and load misses: 100 tokens/s"),
    ({"prefetch": "transition 4"}, "with lru, prefetch with transition 4 and load misses"),
    ({"miss": "faster"}, "let the CPU compute a miss where that is faster"),
    ({"miss": "hybrimoe"}, "handle misses by the rule hybrimoe"),
    ({"bound_for": "on_demand", "tpot_gap": 0.5}, "at most 100 % more time than the best on-demand policy that loads its misses with these slots would take"),
    ({"bound_for": "on_demand", "tpot_gap": 0.0}, "which no on-demand policy that loads its misses can beat with these slots"),
    ({"tpot_gap": 0.0, "miss": "cpu"}, "which no policy can beat with these slots"),
    ({"tpot_gap": 0.05}, "at most 5.3 % more time"),
    ({"stall_fraction": 0.02}, "the device computes 98 % of the time."),
    ({"stall_cause": "load", "stall_cause_fraction": 0.25},
     "the device waits 30 % of the time, longest for loads of missing experts (25 %)."),
    ({"stall_cause": "combine", "stall_cause_fraction": 0.25}, "longest for combine (25 %)."),
])
def test_each_part_of_the_sentence(changes: dict[str, Any], text: str) -> None:
    """One size only: nothing is said of others."""
    found = advice([row(16, 100, **changes)])
    assert text in found.sentence
    assert "slots give" not in found.sentence
    assert "more slots" not in found.sentence
    assert found.reasons == ()


def test_without_a_bound_nothing_is_said_of_it() -> None:
    """No gap, no claim."""
    assert advice([row(16, 100, tpot_gap=None)]).sentence == (
        "Keep 16 experts per layer with lru and load misses: 100 tokens/s; the device waits 30 % of the time.")


def test_the_largest_size_is_said_to_be_that() -> None:
    """If the largest is the knee, more may help, but was not tried."""
    found = advice([row(16, 50), row(32, 100)])
    assert found.knee["slots_per_layer"] == 32
    assert "it is the largest size tried, and 16 slots give 50 % fewer" in found.sentence


def test_more_slots_may_gain_nothing() -> None:
    """The smallest size is the fastest."""
    assert "more slots (up to 32) gain nothing" in advice([row(16, 100), row(32, 99)]).sentence


@given(st.lists(st.tuples(st.integers(1, 8), st.floats(1, 1000)), min_size=1, max_size=12))
def test_the_rule_of_the_knee(points: list[tuple[int, float]]) -> None:
    """The knee is within 5 % of the best, is the best of its size, and no smaller size is within 5 %."""
    rows = [row(*point) for point in points]
    knee, most = advice(rows).knee, max(rate for _, rate in points)
    assert knee["tokens_per_s"] >= (1 - WITHIN) * most
    assert knee["tokens_per_s"] == max(rate for slots, rate in points if slots == knee["slots_per_layer"])
    assert all(rate < (1 - WITHIN) * most for slots, rate in points if slots < knee["slots_per_layer"])


def test_which_rows_are_usable_can_be_told() -> None:
    """Such as those that leave the model's results alone."""
    rows = [row(16, 100, precision="mixed"), row(16, 80, precision="")]
    assert advice(rows, usable=lambda r: not r["precision"]).knee is rows[1]


def test_rows_that_cannot_be_read_are_refused() -> None:
    """A missing key, and nothing to deploy."""
    with pytest.raises(InputError, match="advice: row 1 of the study has no tpot_gap, stall_fraction"):
        advice([row(16, 1), {key: value for key, value in row(16, 1).items() if key not in ("tpot_gap", "stall_fraction")}])
    with pytest.raises(InputError, match="advice: none of the 1 rows of the study can be deployed"):
        advice([row(16, 1, sees_future=True)])
    with pytest.raises(InputError, match="none of the 0 rows"):
        advice([])
