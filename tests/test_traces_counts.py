"""CountTrace and its file: what is accepted, what is kept, what damage is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moesim.errors import InputError
from moesim.model import load_model
from moesim.traces import read_trace, synthetic_trace, write_trace
from moesim.traces.counts import (
    COUNTS_ONLY,
    CountTrace,
    counts_info,
    divided,
    is_counts,
    read_counts,
    write_counts,
)

COUNTS = np.array([[[1, 2, 3], [0, 6, 0]], [[4, 0, 2], [1, 1, 4]]])


def example(**changes: Any) -> CountTrace:
    """Return two windows of two layers of three experts."""
    values: dict[str, Any] = {"counts": COUNTS, "layer_ids": np.array([3, 5]), "window": "iteration", "model": "m", "source": "s",
              "metadata": {"notes": ["n"]}}
    return CountTrace(**(values | changes))


def test_the_load_is_the_sum_over_windows() -> None:
    """Loads, sizes and unevenness are those of a count by hand; the arrays are read-only."""
    trace = example()
    assert trace.expert_load().tolist() == [[5, 2, 5], [1, 7, 4]]
    summary = trace.summary()
    assert (summary["num_windows"], summary["num_layers"], summary["num_experts"]) == (2, 2, 3)
    assert summary["worst_layer"] == 5
    assert summary["worst_max_over_mean_load"] == pytest.approx(7 / 4)
    assert summary["max_over_mean_load"] == pytest.approx((5 / 4 + 7 / 4) / 2)
    assert (summary["selections_per_layer"], summary["experts_never_used"]) == (12, 0)
    with pytest.raises(ValueError, match="read-only"):
        trace.counts[0, 0, 0] = 1


@pytest.mark.parametrize(("changes", "words"), [
    ({"counts": COUNTS[0]}, "must be [window, layer, expert], not empty, got shape (2, 3)"),
    ({"counts": COUNTS[:0]}, "not empty"),
    ({"counts": COUNTS / 2}, "whole numbers, got float64"),
    ({"counts": COUNTS - 1}, "0 ... 2^63 - 1, found -1"),
    ({"counts": COUNTS.astype(np.uint64) + np.uint64(1 << 63)}, "0 ... 2^63 - 1"),
    ({"counts": COUNTS + (1 << 62)}, "overflow when they are summed"),
    ({"layer_ids": np.array([3])}, "layer_ids must be 2 whole numbers"),
    ({"layer_ids": np.array([3, 3])}, "must be different and not negative"),
    ({"layer_ids": np.array([-1, 3])}, "must be different and not negative"),
    ({"layer_ids": np.array([0.5, 3])}, "layer_ids must be 2 whole numbers"),
    ({"kind": "tokens"}, "kind must be one of selections, relative"),
])
def test_what_is_no_count_trace(changes: dict[str, Any], words: str) -> None:
    """Each rule has its own message."""
    with pytest.raises(InputError) as error:
        example(**changes)
    assert words in str(error.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(hnp.arrays(np.int64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=st.integers(0, 1 << 50)),
       st.sampled_from(["selections", "relative"]))
def test_files_keep_everything(tmp_path: Path, counts: np.ndarray, kind: str) -> None:
    """What is read is what was written, twice the same bytes."""
    trace = example(counts=counts, layer_ids=np.arange(counts.shape[1]) * 2, kind=kind)
    path = write_counts(trace, tmp_path / "a.counts.parquet")
    found = read_counts(path)
    assert np.array_equal(found.counts, counts)
    assert found.counts.dtype == np.int64
    for name in ("window", "kind", "model", "source", "metadata"):
        assert getattr(found, name) == getattr(trace, name)
    assert found.layer_ids.tolist() == trace.layer_ids.tolist()
    assert path.read_bytes() == write_counts(trace, tmp_path / "b.counts.parquet").read_bytes()


def test_other_tools_can_read_it(tmp_path: Path) -> None:
    """A row per window, its counts layer by layer; the header names the layers."""
    path = write_counts(example(), tmp_path / "a.counts.parquet")
    table = pq.read_table(path)
    assert table.column("window").to_pylist() == [0, 1]
    assert table.column("counts").to_pylist() == COUNTS.reshape(2, 6).tolist()
    info = counts_info(path)
    assert (info["layer_ids"], info["num_rows"], info["schema"]) == ([3, 5], 2, "moesim.counts/1")


def test_counts_are_told_from_traces(tmp_path: Path) -> None:
    """Each reader refuses the other's file; `is_counts` tells them apart."""
    counts = write_counts(example(), tmp_path / "a.parquet")
    trace = write_trace(synthetic_trace(8, 2, 4, 1, 2), tmp_path / "b.parquet")
    assert (is_counts(counts), is_counts(trace), is_counts(tmp_path / "none")) == (True, False, False)
    with pytest.raises(InputError, match="it is no trace: it holds expert counts without tokens"):
        read_trace(counts)
    for read in (read_counts, counts_info):
        with pytest.raises(InputError, match=r"expected a 'moesim\.counts/1' file, found schema 'moesim\.trace/1'"):
            read(trace)
    assert "without tokens" in COUNTS_ONLY


def header(path: Path, **changes: Any) -> None:
    """Rewrite a counts file with a changed header."""
    import json

    table = pq.read_table(path)
    document = json.loads(table.schema.metadata[b"moesim"]) | changes
    pq.write_table(table.replace_schema_metadata({b"moesim": json.dumps(document)}), path)


def renamed(path: Path, names: list[str]) -> None:
    """Rewrite a counts file with other column names."""
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(names).replace_schema_metadata(table.schema.metadata), path)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda p: p.unlink(), "no such file"),
    (lambda p: p.write_bytes(p.read_bytes()[:-20]), "not a readable Parquet file"),
    (lambda p: p.write_bytes(b"x"), "not a readable Parquet file"),
    (lambda p: pq.write_table(pa.table({"a": [1]}), p), "not of moesim"),
    (lambda p: header(p, num_layers=3), "2 rows do not hold 3 layers x 3 experts each"),
    (lambda p: header(p, num_layers="2"), "its header is damaged"),
    (lambda p: header(p, metadata=None), "its header is damaged"),
    (lambda p: header(p, layer_ids=[1]), "layer_ids must be 2 whole numbers"),
    (lambda p: header(p, layer_ids=[1, 1 << 70]), "layer_ids must be 2 whole numbers"),
    (lambda p: header(p, kind="x"), "kind must be one of"),
    (lambda p: header(p, layer_ids=[3, 6]), "do not match the header's digest"),
    (lambda p: header(p, schema="moesim.counts/2"), "found schema 'moesim.counts/2'"),
    (lambda p: renamed(p, ["w", "counts"]), "expected columns window, counts, found w, counts"),
])
def test_damaged_files_are_named(damage: Any, words: str, tmp_path: Path) -> None:
    """A changed or cut file is one error that names it."""
    path = write_counts(example(), tmp_path / "a.counts.parquet")
    damage(path)
    with pytest.raises(InputError) as error:
        read_counts(path)
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))


def test_metadata_must_be_json(tmp_path: Path) -> None:
    """A file that could not be read back is not written."""
    with pytest.raises(InputError, match="metadata must be plain JSON"):
        write_counts(example(metadata={"x": float("nan")}), tmp_path / "a.counts.parquet")
    assert list(tmp_path.iterdir()) == []


def test_counts_are_compared_with_a_model() -> None:
    """Layers and experts must be the model's."""
    model = load_model("mixtral-8x7b")
    example(counts=np.ones((1, 32, 8), int), layer_ids=np.arange(32)).check_model(model)
    with pytest.raises(InputError, match="have 2 MoE layers x 3 experts, but model 'mixtral-8x7b' has 32 x 8"):
        example().check_model(model)


def test_counts_of_ranks_that_saw_the_same_tokens() -> None:
    """`divided` undoes a sum over equal ranks, and refuses what is no such sum."""
    assert divided(example(counts=COUNTS * 4), 4).counts.tolist() == COUNTS.tolist()
    for by, words in ((2, "not every count is a multiple"), (0, "must be at least 1")):
        with pytest.raises(InputError, match=words):
            divided(example(), by)
