"""Plans with stated shares of replicas, and the files of certificates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import CheckError, InputError
from moesim.placement import metrics
from moesim.placement.certificate import Certificate, read_certificate
from moesim.placement.plan import PlacementPlan, read_plan

ROW = np.array([[0, 1, 0, 2]])
SHARES = np.array([[0.25, 1.0, 0.75, 1.0]])


def test_stated_shares_split_the_load() -> None:
    """A quarter of expert 0 goes to rank 0, the rest to rank 1, and nothing is lost."""
    plan = PlacementPlan(ROW, 2, 3, slot_share=SHARES)
    assert metrics.rank_load(plan, np.array([[80.0, 3, 5]])).tolist() == [[23.0, 65.0]]
    assert metrics.presence(plan, 0)[0].tolist() == [0.25, 0.75]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_tokens_follow_the_shares_at_every_prefix(share: float) -> None:
    """Of the first n uses the first replica has n times its share, within 2 (a low-discrepancy sequence)."""
    plan = PlacementPlan(ROW, 2, 3, slot_share=np.array([[share, 1.0, 1.0 - share, 1.0]]))
    slots = metrics.slot_of_token(plan, np.zeros((1000, 1, 1), np.int16))[:, 0, 0]
    assert set(slots.tolist()) <= {0, 2}
    served = np.cumsum(slots == 0)
    assert np.abs(served - share * np.arange(1, 1001)).max() <= 2


def test_shares_survive_the_file(tmp_path: Path) -> None:
    """A plan with shares is read as it was written; one without has none in its file."""
    plan = PlacementPlan(ROW, 2, 3, slot_share=SHARES)
    assert np.array_equal(read_plan(plan.write(tmp_path / "a.plan.json")).slot_share, SHARES)
    plain = PlacementPlan(ROW, 2, 3)
    assert read_plan(plain.write(tmp_path / "b.plan.json")).slot_share is None
    assert "slot_share" not in (tmp_path / "b.plan.json").read_text()


@pytest.mark.parametrize(("shares", "text"), [
    (np.array([[0.25, 1.0, 0.7, 1.0]]), "the shares of expert 0 in layer 0 sum to 0.95, not 1"),
    (np.array([[-0.5, 1.0, 1.5, 1.0]]), "not negative"),
    (np.array([[0.5, 0.5]]), r"slot_share must be \(1, 4\)"),
    (np.array([[np.nan, 1.0, 1.0, 1.0]]), "not negative"),
])
def test_wrong_shares_are_refused(shares: np.ndarray, text: str) -> None:
    """Shares must be one per slot, not negative, and sum to 1 for every expert."""
    with pytest.raises(CheckError, match=text):
        PlacementPlan(ROW, 2, 3, slot_share=shares)


def test_a_certificate_survives_the_file(tmp_path: Path) -> None:
    """Method, bound, parameters and multipliers come back as they were, of the same types."""
    made = Certificate("affinity", "b-matching", 0.75, {"node_weight": 0.5}, {"u": np.arange(6).reshape(2, 3)})
    found = read_certificate(made.write(tmp_path / "x.bound.npz"))
    assert (found.objective, found.method, found.bound, found.parameters) == (
        made.objective, made.method, made.bound, made.parameters)
    assert found.arrays["u"].dtype == made.arrays["u"].dtype
    assert np.array_equal(found.arrays["u"], made.arrays["u"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not an archive", b"\x80\x04\x95pickle", b"{}"])
def test_a_file_that_is_no_certificate_is_refused(content: bytes, tmp_path: Path) -> None:
    """Empty, truncated, pickled or other content is one clear error that names the file."""
    file = tmp_path / "x.bound.npz"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.bound\.npz"):
        read_certificate(file)


def test_objects_in_a_certificate_are_not_unpickled(tmp_path: Path) -> None:
    """An archive with Python objects inside is refused, not loaded."""
    file = tmp_path / "x.bound.npz"
    with open(file, "wb") as out:
        np.savez(out, certificate=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="not a bound certificate"):
        read_certificate(file)
