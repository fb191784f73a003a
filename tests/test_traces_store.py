"""The trace file: round trips, damage, and interrupted writing."""

from __future__ import annotations

import dataclasses
import json
import pickle
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.traces import (
    RoutingTrace,
    TraceWriter,
    first_requests,
    iter_trace,
    read_trace,
    resolve_trace,
    synthetic_trace,
    trace_info,
    write_trace,
)

SIZES = {"num_layers": 3, "top_k": 2, "num_experts": 8, "layer_ids": (1, 2, 5)}


def small_trace(num_tokens=60, num_requests=5, seed=0, **changes):
    """Return a small trace with layer ids, weights, token ids and padding."""
    trace = synthetic_trace(num_tokens, 3, 8, 2, num_requests, seed=seed)
    ids = trace.expert_ids.copy()
    ids[::7, 1, 1] = -1
    weights = trace.gate_weights.copy()
    weights[::7, 1, 1] = 0
    return dataclasses.replace(trace, expert_ids=ids, gate_weights=weights, layer_ids=np.array([1, 2, 5]),
                               token_id=np.arange(num_tokens), metadata={"seed": seed}, **changes)


def assert_same(one, other):
    """Every field of two traces is equal."""
    for field in dataclasses.fields(RoutingTrace):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if isinstance(first, np.ndarray):
            assert first.dtype == second.dtype
            np.testing.assert_array_equal(first, second)
        else:
            assert first == second


@st.composite
def traces(draw):
    """Draw a trace: random sizes, ids in any order, optional weights and token ids, interleaved requests."""
    tokens, layers = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, 300))
    top_k = draw(st.integers(1, min(experts, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.array([[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(tokens)])
    ids[..., -1] = np.where(rng.random((tokens, layers)) < 0.2, -1, ids[..., -1])
    request_id = rng.integers(0, 3, tokens)
    position = np.array([np.count_nonzero(request_id[:row] == request_id[row]) for row in range(tokens)])
    weights = rng.random(ids.shape) * draw(st.sampled_from([1.0, 1e-4, 100.0]))
    return RoutingTrace(
        expert_ids=ids, request_id=request_id, position=position, phase=rng.integers(0, 2, tokens),
        step=np.arange(tokens), num_experts=experts, layer_ids=np.arange(layers) + draw(st.integers(0, 3)),
        gate_weights=weights if draw(st.booleans()) else None,
        token_id=rng.integers(0, 1000, tokens) if draw(st.booleans()) else None,
        model=draw(st.text(max_size=5)), source="drawn", metadata={"seed": 1, "notes": ["ü"]})


@given(traces())
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, trace):
    """Any trace comes back the same, but for gate weights rounded to float16; again without any change."""
    path = tmp_path_factory.mktemp("trace") / "a.trace.parquet"
    write_trace(trace, path)
    first = read_trace(path)
    weights = None if trace.gate_weights is None else trace.gate_weights.astype(np.float16).astype(np.float32)
    assert_same(first, dataclasses.replace(trace, gate_weights=weights))
    assert trace_info(path)["digest"] == first.digest()
    write_trace(first, path)
    assert_same(read_trace(path), first)


def test_same_trace_same_bytes(tmp_path):
    """The same trace gives the same bytes on disk."""
    for name in ("a", "b"):
        write_trace(small_trace(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("rows", [1, 7, 60, 1000])
def test_batches_join_to_the_whole(tmp_path, rows):
    """Batches of any size hold the rows of the file in order."""
    trace = small_trace()
    path = write_trace(trace, tmp_path / "a")
    batches = list(iter_trace(path, rows=rows))
    assert max(batch.num_tokens for batch in batches) <= rows
    for name in ("expert_ids", "gate_weights", "request_id", "position", "phase", "step", "token_id"):
        joined = np.concatenate([getattr(batch, name) for batch in batches])
        np.testing.assert_array_equal(joined, getattr(trace, name))


def test_batches_of_zero_rows_are_refused(tmp_path):
    """A batch size below 1 is an error, not an endless loop."""
    path = write_trace(small_trace(), tmp_path / "a")
    with pytest.raises(InputError, match="rows must be at least 1, got 0"):
        next(iter_trace(path, rows=0))


def test_other_readers_can_use_the_file(tmp_path):
    """Plain pyarrow sees the documented columns and types."""
    trace = small_trace()
    table = pq.read_table(write_trace(trace, tmp_path / "a"))
    types = {field.name: str(field.type) for field in table.schema}
    assert types["request_id"] == types["position"] == types["step"] == types["token_id"] == "int32"
    assert types["phase"] == "int8"
    assert types["expert_ids"].startswith("fixed_size_list<element: int16")
    assert "[6]" in types["expert_ids"]
    assert np.array(table["expert_ids"].to_pylist()).reshape(60, 3, 2).tolist() == trace.expert_ids.tolist()


def test_info_reads_the_header(tmp_path):
    """The header tells sizes, origin and counts."""
    info = trace_info(write_trace(small_trace(model="m", source="s"), tmp_path / "a"))
    expected = {"schema": "moesim.trace/1", "num_layers": 3, "top_k": 2, "num_experts": 8,
                "layer_ids": [1, 2, 5], "model": "m", "source": "s", "metadata": {"seed": 0},
                "num_tokens": 60, "with_weights": True, "with_token_ids": True}
    assert info.items() >= expected.items()


@pytest.mark.parametrize(("weight", "words"), [(1e6, "expected finite values"), (np.nan, "token 3, layer 2")])
def test_weights_beyond_float16_are_refused(tmp_path, weight, words):
    """A weight that the file cannot hold is an error, and no file appears."""
    trace = small_trace()
    weights = trace.gate_weights.copy()
    weights[3, 2, 0] = weight
    with pytest.raises(InputError, match=words):
        write_trace(dataclasses.replace(trace, gate_weights=weights), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_metadata_must_be_json(tmp_path):
    """Metadata that JSON cannot hold is named; numpy numbers are taken as numbers."""
    with pytest.raises(InputError, match="plain JSON values: object"):
        write_trace(dataclasses.replace(small_trace(), metadata={"a": object()}), tmp_path / "a")
    path = write_trace(dataclasses.replace(small_trace(), metadata={"a": np.int64(3)}), tmp_path / "a")
    assert read_trace(path).metadata == {"a": 3}


def rewrite(path, change_table, change_header):
    """Write the file again with another table or header, as a careless tool would."""
    table = pq.read_table(path)
    header = change_header(json.loads(table.schema.metadata[b"moesim"]))
    pq.write_table(change_table(table).replace_schema_metadata({"moesim": json.dumps(header)}), path)


def set_ids(value):
    """Return a change that sets the first expert id of a table."""
    def change(table):
        flat = table["expert_ids"].combine_chunks().flatten().to_numpy().copy()
        flat[0] = value
        column = pa.FixedSizeListArray.from_arrays(pa.array(flat), 6)
        return table.set_column(table.schema.get_field_index("expert_ids"), "expert_ids", column)
    return change


def plain(table):
    """Return `table` with nullable columns of int64 positions."""
    return table.set_column(1, "position", table["position"].cast(pa.int64()))


def with_null(table):
    """Return `table` with one empty step."""
    steps = pa.array([None, *table["step"].to_pylist()[1:]], type=pa.int32())
    return table.set_column(table.schema.get_field_index("step"), "step", steps)


BAD_FILES = [
    (set_ids(8), None, "expert id 8 at token 0, layer 0 is outside 0 ... 7"),  # id out of range
    (set_ids(-2), None, "expert id -2"),
    (lambda t: t.slice(1), None, "do not match the header's digest"),  # a row is gone
    (lambda t: t.drop_columns(["phase"]), None, "column 'phase' is missing"),
    (lambda t: t.rename_columns(["request_id", "positions", *t.column_names[2:]]), None,
     "unknown column 'positions'. Did you mean 'position'?"),
    (plain, None, "column 'position' is int64, expected int32"),
    (with_null, None, "column 'step' has 1 empty values"),
    (lambda t: t.slice(0, 0), None, "not empty"),
    (None, lambda h: h | {"schema": "moesim.trace/9"}, "expected a 'moesim.trace/1' file, found schema"),
    (None, lambda h: h | {"num_layers": 2}, "column 'expert_ids' is fixed_size_list"),
    (None, lambda h: h | {"num_experts": "many"}, "header key 'num_experts': expected int, found 'many'"),
    (None, lambda h: h | {"layer_ids": [0, 1]}, "layer_ids must have 3 entries"),
    (None, lambda h: h | {"layer_ids": ["x", 1, 2]}, "layer_ids"),
    (None, lambda h: {k: v for k, v in h.items() if k != "digest"}, "header key 'digest'"),
    (None, lambda h: h | {"digest": "sha256:0"}, "do not match the header's digest"),
]


@pytest.mark.parametrize(("table", "header", "words"), BAD_FILES)
def test_a_wrong_file_is_named_with_its_fault(tmp_path, table, header, words):
    """A Parquet file that breaks the schema gives one error with its path and the fault."""
    path = write_trace(small_trace(), tmp_path / "bad.trace.parquet")
    rewrite(path, table or (lambda t: t), header or (lambda h: h))
    with pytest.raises(InputError) as error:
        read_trace(path)
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)


def _zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")


FOREIGN = [
    (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "Python pickle, which can run code"),
    (_zip, "a .pt checkpoint holds a pickle"),
    (lambda p: np.save(p.open("wb"), np.zeros(3)), "moesim trace import"),
    (lambda p: p.write_text('{"type": "meta"}'), "JSON text"),
    (lambda p: p.write_bytes(b"hello world"), "not a Parquet file"),
    (lambda p: p.write_bytes(b""), "not a Parquet file"),
    (lambda p: p.write_bytes(b"PAR1xxxxPAR1"), "damaged Parquet file"),
    (lambda p: pq.write_table(pa.table({"a": [1]}), p), "not a moesim trace"),
    (lambda p: p.mkdir(), "is a folder"),
    (lambda p: None, "no such file"),
]


@pytest.mark.parametrize(("make", "words"), FOREIGN)
def test_other_files_are_told_apart(tmp_path, make, words):
    """A file of another kind is refused by its content, never opened as what it is not."""
    path = tmp_path / "x.trace.parquet"
    make(path)
    for read in (read_trace, trace_info, lambda p: next(iter_trace(p))):
        with pytest.raises(InputError) as error:
            read(path)
        assert str(error.value).startswith(f"{path}: ")
        assert words in str(error.value)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused(tmp_path, keep):
    """A file that ends early is said to be cut short."""
    path = write_trace(small_trace(), tmp_path / "a")
    data = path.read_bytes()
    path.write_bytes(data[:int(keep * len(data))])
    with pytest.raises(InputError, match="cut short"):
        read_trace(path)


@given(st.integers(0, 2**30), st.integers(1, 255))
@settings(max_examples=40, deadline=None)
def test_a_flipped_byte_never_gives_other_rows(tmp_path_factory, where, flip):
    """Whatever byte is damaged: an InputError, or the same rows."""
    path = tmp_path_factory.mktemp("flip") / "a"
    trace = small_trace()
    data = bytearray(write_trace(trace, path).read_bytes())
    data[where % len(data)] ^= flip
    path.write_bytes(data)
    try:
        found = read_trace(path).digest()
    except InputError as error:
        found = str(error)
    assert found == trace.digest() or found.startswith(f"{path}: ")


def test_unknown_builtin_is_listed(tmp_path, monkeypatch):
    """`builtin:` names a trace in the catalog; another name gets a suggestion."""
    monkeypatch.setattr("moesim.traces.store.catalog_folder", lambda kind: tmp_path)
    write_trace(small_trace(), tmp_path / "tiny-olmoe.trace.parquet")
    assert resolve_trace("builtin:tiny-olmoe") == tmp_path / "tiny-olmoe.trace.parquet"
    assert read_trace("builtin:tiny-olmoe").num_tokens == 60
    with pytest.raises(InputError, match=r"unknown built-in trace 'tiny-olmo'\. Did you mean 'tiny-olmoe'"):
        read_trace("builtin:tiny-olmo")


def one_by_one(trace):
    """Return one trace per request."""
    return [trace.take(trace.request_id == request) for request in trace.requests()]


def writer_for(path, **changes):
    """Return a writer that fits `small_trace`."""
    settings = SIZES | {"model": "m", "metadata": {"seed": 0}, "with_token_ids": True}
    return TraceWriter(path, **(settings | changes))


def write_parts(path, parts, interruption=None, **changes):
    """Write parts one by one, then raise `interruption` if there is one."""
    with writer_for(path, **changes) as writer:
        for part in parts:
            writer.append(part)
        if interruption is not None:
            raise interruption


def test_parts_merge_to_one_file(tmp_path):
    """Request by request gives the same rows, digest and metadata as all at once, and leaves no parts."""
    trace = small_trace(model="m", source="")
    with writer_for(tmp_path / "a") as writer:
        for part in one_by_one(trace):
            writer.append(part)
            assert writer.next_step == part.step.max() + 1
    assert_same(read_trace(tmp_path / "a"), dataclasses.replace(trace, source=""))
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_row_groups_do_not_follow_parts(tmp_path, monkeypatch):
    """Small parts are put together into full row groups."""
    monkeypatch.setattr("moesim.traces.writer.ROW_GROUP_ROWS", 20)
    trace = small_trace(num_requests=12)
    write_parts(tmp_path / "a", one_by_one(trace))
    meta = pq.ParquetFile(tmp_path / "a").metadata
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [20, 20, 20]
    np.testing.assert_array_equal(read_trace(tmp_path / "a").expert_ids, trace.expert_ids)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_run_goes_on(tmp_path, stop_after):
    """After an exception the parts stay; resumed, the file equals that of a run without a break."""
    trace = small_trace()
    write_parts(tmp_path / "whole", one_by_one(trace))
    with pytest.raises(KeyboardInterrupt):
        write_parts(tmp_path / "a", one_by_one(trace)[:stop_after], KeyboardInterrupt())
    with pytest.raises(InputError, match="not finished"):
        read_trace(tmp_path / "a")
    with writer_for(tmp_path / "a", resume=True) as writer:
        assert writer.requests_done() == set(range(stop_after))
        for part in one_by_one(trace):
            if part.request_id[0] not in writer.requests_done():
                writer.append(part)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()


def interrupt(path):
    """Leave one part behind."""
    with pytest.raises(RuntimeError):
        write_parts(path, [first_requests(small_trace(), 1)], RuntimeError())


@pytest.mark.parametrize(("changes", "words"), [
    ({"resume": False}, "parts of an interrupted run are here"),
    ({"metadata": {"seed": 1}}, "written with seed 0, now 1"),
    ({"model": "n"}, "model is 'm', expected 'n'"),
    ({"num_experts": 9}, "num_experts is 8, expected 9"),
    ({"with_token_ids": False}, "with_token_ids is True, expected False"),
])
def test_only_the_same_run_is_resumed(tmp_path, changes, words):
    """Parts of a run with other settings are never mixed with new ones."""
    interrupt(tmp_path / "a")
    with pytest.raises(InputError, match=words):
        writer_for(tmp_path / "a", **({"resume": True} | changes))


def test_a_damaged_part_is_named(tmp_path):
    """A part that cannot be read stops the resumption with its name."""
    interrupt(tmp_path / "a")
    (tmp_path / "a.parts" / "part-000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-000000\.parquet"):
        writer_for(tmp_path / "a", resume=True)


def test_a_request_is_written_once(tmp_path):
    """A batch with a request that is already there is refused."""
    with pytest.raises(InputError, match="request 0 is already written"):
        write_parts(tmp_path / "a", [first_requests(small_trace(), n) for n in (2, 1)])


def test_an_empty_run_leaves_nothing(tmp_path):
    """A writer that got no request says so, and leaves neither file nor folder."""
    with pytest.raises(InputError, match="no request was written"):
        write_parts(tmp_path / "a", [])
    with pytest.raises(RuntimeError):
        write_parts(tmp_path / "a", [], RuntimeError())
    assert list(tmp_path.iterdir()) == []
