"""Reductions against plain loops and numpy; streamed from files as in memory; broken files named by row."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.traces import (
    DECODE,
    DENOISE,
    PHASES,
    PREFILL,
    RoutingTrace,
    co_activation,
    iter_trace,
    load_counts,
    read_trace,
    reductions_numpy,
    select_phase,
    synthetic_trace,
    trace_stats,
    transition_counts,
    write_trace,
)
from moesim.traces.facts import gather
from moesim.traces.facts_stream import stream_facts
from moesim.traces.groups import Groups, Slots
from moesim.traces.reductions import PairCounter, pair_counts, reduce_trace
from moesim.traces.stats import file_stats, lru_hit_rate, token_overlap
from moesim.traces.store import arrow_schema, as_stored, header_of, table_of
from moesim.traces.stream import TraceStream

ALL = ("load", "transitions", "co_activation", "distinct", "rank_load_max", "lags", "stack_distances")
ARRAYS = ("load", "transitions", "co_activation", "steps", "distinct", "rank_load_max", "lag_again", "lag_picks",
          "stack_distances")


@st.composite
def traces(draw, max_tokens=40):
    """Draw a trace with padding, interleaved requests that start with prefill, and steps in any order."""
    tokens, layers, experts = draw(st.integers(1, max_tokens)), draw(st.integers(1, 3)), draw(st.integers(1, 7))
    top_k = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.array([[rng.permutation(experts)[:top_k] for _ in range(layers)] for _ in range(tokens)])
    ids = np.where(np.arange(top_k) < rng.integers(draw(st.integers(0, top_k)), top_k + 1, (tokens, layers, 1)), ids, -1)
    names = rng.choice(1000, draw(st.integers(1, 5)), replace=False) - 10
    request_id = rng.choice(names, tokens)
    first = dict(zip(names.tolist(), rng.integers(0, 9, len(names)).tolist(), strict=True))
    prompt = dict(zip(names.tolist(), rng.integers(0, 12, len(names)).tolist(), strict=True))
    seen: dict[int, int] = defaultdict(int)
    place = []
    for request in request_id.tolist():
        place.append(seen[request])
        seen[request] += 1
    place = np.array(place)
    return RoutingTrace(
        expert_ids=ids, request_id=request_id, position=place + [first[r] for r in request_id.tolist()],
        phase=np.where(place < [prompt[r] for r in request_id.tolist()], PREFILL, DECODE),
        step=rng.integers(0, draw(st.integers(1, 50)), tokens), num_experts=experts,
        layer_ids=np.arange(layers), gate_weights=rng.random(ids.shape) if draw(st.booleans()) else None,
        token_id=rng.integers(0, 9, tokens) if draw(st.booleans()) else None)


def shares_of(trace, num_ranks=3, seed=0):
    """Return shares of experts on ranks: some with one copy, some with several of uneven shares."""
    rng = np.random.default_rng(seed)
    shares = rng.random((trace.num_layers, trace.num_experts, num_ranks)) * (rng.random(
        (trace.num_layers, trace.num_experts, num_ranks)) < 0.5)
    shares[..., 0] += shares.sum(axis=2) == 0
    return shares / shares.sum(axis=2, keepdims=True)


def write_groups(trace, path, group_rows):
    """Write `trace` with row groups of a size."""
    trace = as_stored(trace)
    pq.write_table(table_of(trace, arrow_schema(header_of(trace), trace.digest())), path, row_group_size=group_rows)
    return path


def experts_of(trace, row, layer):
    """Return the experts of a token as a list."""
    return [int(e) for e in trace.expert_ids[row, layer] if e >= 0]


def distinct_by_loops(trace):
    """Return steps and distinct experts, by sets."""
    steps = sorted(set(trace.step.tolist()))
    return steps, [[len({e for row in np.flatnonzero(trace.step == step) for e in experts_of(trace, row, layer)})
                    for layer in range(trace.num_layers)] for step in steps]


def rank_load_by_loops(trace, shares):
    """Return the largest rank load of every step and layer, adding up pick by pick."""
    largest = []
    for step in sorted(set(trace.step.tolist())):
        load = np.zeros((trace.num_layers, shares.shape[2]))
        for row in np.flatnonzero(trace.step == step):
            for layer in range(trace.num_layers):
                for expert in experts_of(trace, row, layer):
                    load[layer] += shares[layer, expert]
        largest.append(load.max(axis=1))
    return np.array(largest)


def lags_by_loops(trace, lags):
    """Return picks used again d tokens later in the request, and picks with a token there, by sets."""
    again, picks = (np.zeros((lags, trace.num_layers), int) for _ in range(2))
    for request in trace.requests():
        rows = np.flatnonzero(trace.request_id == request)
        for at, row in enumerate(rows):
            for lag, later in enumerate(rows[at + 1:at + 1 + lags]):
                for layer in range(trace.num_layers):
                    now = set(experts_of(trace, row, layer))
                    again[lag, layer] += len(now & set(experts_of(trace, later, layer)))
                    picks[lag, layer] += len(now)
    return again, picks


@given(traces(), st.integers(1, 45), st.integers(1, 63))
@settings(max_examples=60, deadline=None)
def test_reductions_are_those_of_counting(trace, batch_rows, lags):
    """Every array equals plain loops or numpy exactly, whatever the batches."""
    shares = shares_of(trace)
    found = reduce_trace(trace, ALL, lags=lags, rank_share=shares, batch_rows=batch_rows)
    np.testing.assert_array_equal(found.load, reductions_numpy.load(trace))
    np.testing.assert_array_equal(found.transitions, reductions_numpy.transitions(trace))
    np.testing.assert_array_equal(found.co_activation, reductions_numpy.co_activation(trace))
    np.testing.assert_array_equal(found.stack_distances, reductions_numpy.stack_distances(trace))
    steps, distinct = distinct_by_loops(trace)
    assert (found.steps.tolist(), found.distinct.tolist()) == (steps, distinct)
    np.testing.assert_array_equal(found.rank_load_max, rank_load_by_loops(trace, shares))
    again, picks = lags_by_loops(trace, lags)
    np.testing.assert_array_equal(found.lag_again, again)
    np.testing.assert_array_equal(found.lag_picks, picks)
    assert (found.num_tokens, found.num_requests) == (trace.num_tokens, len(trace.requests()))


@given(traces(), st.integers(1, 45), st.integers(1, 45), st.sampled_from(["all", "prefill", "decode"]))
@settings(max_examples=60, deadline=None)
def test_a_streamed_file_gives_the_same_arrays(tmp_path_factory, trace, group_rows, batch_rows, phase):
    """Row groups and batches of any size, and a phase: the arrays of the selected trace in memory."""
    path = write_groups(trace, tmp_path_factory.mktemp("trace") / "a", group_rows)
    if phase != "all" and not np.any(trace.phase == PHASES.index(phase)):
        with pytest.raises(InputError, match=f"no {phase} rows"):
            reduce_trace(path, ALL, phase=phase, rank_share=shares_of(trace), batch_rows=batch_rows)
        return
    expected = reduce_trace(select_phase(trace, phase), ALL, rank_share=shares_of(trace))
    found = reduce_trace(path, ALL, phase=phase, rank_share=shares_of(trace), batch_rows=batch_rows, verify=True)
    assert (found.num_tokens, found.num_requests) == (expected.num_tokens, expected.num_requests)
    for name in ARRAYS:
        one, other = found.array(name), expected.array(name)
        assert one.dtype == other.dtype
        assert not one.flags.writeable
        np.testing.assert_array_equal(one, other)


@given(traces(), st.integers(1, 45), st.integers(1, 50), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_streamed_facts_are_those_in_memory(tmp_path_factory, trace, batch_rows, max_tokens, seed):
    """Counts, samples and shuffled tables are the same from a stream as from a trace in memory."""
    path = write_groups(trace, tmp_path_factory.mktemp("trace") / "a", 7)
    for phase in ("all", "prefill", "decode"):
        if phase != "all" and not np.any(trace.phase == PHASES.index(phase)):
            continue
        expected = gather(select_phase(trace, phase), seed, max_tokens)
        for source in (path, trace):
            assert_same_facts(stream_facts(source, seed, max_tokens, phase=phase, batch_rows=batch_rows), expected)


def assert_same_facts(one, other):
    """Counts and sampled rows are equal."""
    assert (one.num_tokens, one.num_requests) == (other.num_tokens, other.num_requests)
    for name in ("load", "transitions", "shuffled"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.training is None) == (other.training is None)
    if one.training is not None:
        assert one.training.num_tokens == other.training.num_tokens
        np.testing.assert_array_equal(one.training.load, other.training.load)
        np.testing.assert_array_equal(one.training.transitions, other.training.transitions)
    for sampled, expected in ((one.sample, other.sample), (one.test, other.test)):
        assert (sampled is None) == (expected is None)
        for name in ("expert_ids", "request_id", "position", "phase", "step"):
            np.testing.assert_array_equal(getattr(sampled, name, None), getattr(expected, name, None))


def test_the_shuffle_is_that_of_the_definition():
    """The shuffled tables pair each token with that of `Generator.permutation`, layer after layer."""
    trace = synthetic_trace(300, 4, 9, 3, 5, seed=1)
    rng = np.random.default_rng(8)
    expected = []
    for layer in range(3):
        order = rng.permutation(300)
        expected.append(reductions_numpy.pairs(trace.expert_ids[:, layer], trace.expert_ids[order, layer + 1], 9))
    np.testing.assert_array_equal(gather(trace, 8, 50).shuffled, expected)


def test_statistics_do_not_depend_on_the_way(tmp_path, monkeypatch):
    """Numpy, compiled and streamed: the same JSON to the last digit."""
    trace = synthetic_trace(700, 3, 12, 3, 30, seed=2)
    path = write_trace(trace, tmp_path / "a")
    options = {"seed": 4, "phase": "decode", "max_tokens": 200}
    expected = json.dumps(trace_stats(trace, **options).as_dict())
    assert json.dumps(file_stats(path, **options).as_dict()) == expected
    monkeypatch.setattr("moesim.traces.stats.IN_MEMORY_SELECTIONS", 0)
    monkeypatch.setattr("moesim.traces.stream.BATCH_SELECTIONS", 500)
    monkeypatch.setattr("moesim.traces.facts._CHUNK_SELECTIONS", 500)
    assert json.dumps(file_stats(path, **options).as_dict()) == expected
    monkeypatch.setattr("moesim.traces.reductions.COMPILED_SELECTIONS", 0)
    assert json.dumps(file_stats(path, **options).as_dict()) == expected
    assert json.dumps(trace_stats(trace, **options).as_dict()) == expected


@given(traces())
@settings(max_examples=30, deadline=None)
def test_compiled_counts_are_those_of_numpy(trace):
    """The functions that choose between numpy and compiled loops give the same either way."""
    functions = (load_counts, transition_counts, co_activation, token_overlap, lru_hit_rate)
    small = [function(trace) for function in functions]
    pairs = pair_counts(trace.expert_ids[:, 0], trace.expert_ids[:, -1], trace.num_experts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesim.traces.reductions.COMPILED_SELECTIONS", 0)
        large = [function(trace) for function in functions]
        compiled = pair_counts(trace.expert_ids[:, 0], trace.expert_ids[:, -1], trace.num_experts)
    for one, other in zip([*small, pairs], [*large, compiled], strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_pairs_add_up_part_by_part():
    """A counter that takes two parts counts what the whole has."""
    ids = synthetic_trace(100, 2, 8, 3, 2, seed=0).expert_ids
    counter = PairCounter(8)
    for part in (slice(0, 33), slice(33, 100)):
        counter.add(ids[part, 0], ids[part, 1])
    np.testing.assert_array_equal(counter.counts, reductions_numpy.pairs(ids[:, 0], ids[:, 1], 8))


@pytest.mark.parametrize("batch_rows", [1, 37, 64, 1000])
def test_what_is_held_is_bounded(tmp_path, batch_rows):
    """No batch is larger than asked for, and state is held for open requests only: here never more than three."""
    requests = np.concatenate([np.repeat(np.arange(start, start + 3)[None], 50, axis=0).ravel()
                               for start in range(0, 60, 3)])
    count = len(requests)
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(6), (count, 2, 1)), axis=2)[..., :2]
    trace = RoutingTrace(expert_ids=ids, request_id=requests, position=np.tile(np.repeat(np.arange(50), 3), 20),
                         phase=np.full(count, DECODE), step=np.arange(count) // 2, num_experts=6,
                         layer_ids=np.arange(2))
    path = write_groups(trace, tmp_path / "a", 500)
    found = reduce_trace(path, ["load", "lags"], batch_rows=batch_rows)
    assert found.largest_batch == min(batch_rows, 1000)
    assert found.open_groups == 3
    assert reduce_trace(path, ["distinct"], batch_rows=batch_rows).open_groups == 1
    assert found.load.sum() == count * 2 * 2


def test_a_reader_of_batches_holds_pages_only(tmp_path):
    """Reading a file batch by batch, Arrow's own memory stays far below the file, in one row group or in many."""
    rng, count = np.random.default_rng(0), 480_000
    ids = np.argsort(rng.random((1000, 8, 64)), axis=2)[..., :4].astype(np.int16)[rng.integers(0, 1000, count)]
    trace = RoutingTrace(expert_ids=ids, request_id=np.zeros(count, int), position=np.arange(count),
                         phase=np.full(count, DECODE), step=np.arange(count), num_experts=64, layer_ids=np.arange(8))
    for group_rows in (2000, count):
        path = write_groups(trace, tmp_path / "a", group_rows)
        largest, start = 0, pa.total_allocated_bytes()
        for _ in TraceStream(path, batch_rows=1000).batches():
            largest = max(largest, pa.total_allocated_bytes() - start)
        assert 0 < largest < path.stat().st_size / 2
        assert path.stat().st_size < ids.nbytes


def changed(path, column, row, value):
    """Set one value of a file's table, without the digest."""
    table = pq.read_table(path)
    flat = table[column].combine_chunks()
    fixed = pa.types.is_fixed_size_list(flat.type)
    width = flat.type.list_size if fixed else 1
    values = (flat.flatten() if fixed else flat).to_numpy().copy()
    values[row * width:row * width + np.size(value)] = value
    replaced = pa.array(values)
    if fixed:
        replaced = pa.FixedSizeListArray.from_arrays(replaced, width)
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, replaced).cast(table.schema), path, row_group_size=16)
    return path


BROKEN = [
    ("expert_ids", 41, 8, "expert id 8 at token 41, layer 0 is outside 0 ... 7"),
    ("expert_ids", 59, -3, "expert id -3 at token 59, layer 0"),
    ("expert_ids", 33, [5, 5], "token 33, layer 0 names an expert twice: [5, 5]"),
    ("phase", 47, 3, "phase 3 at row 47; phase must be 0 ... 2 (prefill, decode, denoise)"),
    ("phase", 47, -1, "phase -1 at row 47"),
    ("position", 32, 99, "to 99 at row 32; positions of a request must rise by one"),  # the first row of a batch
    ("request_id", 20, 7, "goes from position 19 to 21 at row 21"),
]


@pytest.mark.parametrize(("column", "row", "value", "words"), BROKEN)
@pytest.mark.parametrize("batch_rows", [1, 16, 1000])
def test_a_broken_rule_is_named_with_its_row(tmp_path, column, row, value, words, batch_rows):
    """Whatever the batches, the error names the file and the row of the file."""
    trace = synthetic_trace(60, 3, 8, 2, 1, prompt_fraction=0.0, seed=0)
    path = changed(write_trace(trace, tmp_path / "bad"), column, row, value)
    iterate = lambda: list(iter_trace(path, rows=batch_rows))  # noqa: E731
    reduce = lambda: reduce_trace(path, ["load"], batch_rows=batch_rows)  # noqa: E731
    facts = lambda: stream_facts(path, 0, 10, batch_rows=batch_rows)  # noqa: E731
    for call in (iterate, reduce, facts):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value).startswith(f"{path}: ")
        assert words in str(error.value)


@pytest.mark.parametrize(("column", "value"), [
    ("expert_ids", [7, 6]), ("step", 999), ("token_id", 5), ("gate_weights", np.float16(0.3))])
def test_a_changed_file_is_found_by_its_digest(tmp_path, monkeypatch, column, value):
    """Rows that keep every rule but are not those written fail against the digest, in the statistics too."""
    monkeypatch.setattr("moesim.traces.stats.IN_MEMORY_SELECTIONS", 0)
    trace = dataclasses.replace(synthetic_trace(60, 3, 8, 2, 4, seed=0), token_id=np.arange(60))
    path = write_trace(trace, tmp_path / "a")
    file_stats(path, seed=0)
    changed(path, column, 50, value)
    assert reduce_trace(path, ["load"]).num_tokens == 60  # unless asked, the digest is not computed
    for call in (lambda: reduce_trace(path, ["load"], verify=True), lambda: file_stats(path, seed=0)):
        with pytest.raises(InputError, match="do not match the header's digest") as error:
            call()
        assert str(error.value).startswith(f"{path}: ")


def test_denoising_may_visit_positions_again(tmp_path):
    """A trace with denoising steps is streamed whatever its positions, as it is read."""
    trace = RoutingTrace(expert_ids=np.zeros((6, 1, 1), int), request_id=np.zeros(6, int),
                         position=np.array([0, 1, 2, 0, 1, 2]), phase=np.full(6, DENOISE), step=np.arange(6) // 3,
                         num_experts=2, layer_ids=np.zeros(1, int))
    path = write_trace(trace, tmp_path / "a")
    found = reduce_trace(path, ["load", "distinct"], batch_rows=2)
    assert found.load.tolist() == [[6, 0]]
    assert found.distinct.tolist() == [[1], [1]]
    assert reduce_trace(path, ["load"], phase="denoise").num_tokens == read_trace(path).num_tokens


def test_a_phase_that_comes_back_is_refused(tmp_path):
    """Decode rows around a prefill row do not rise by one: the error of `select_phase`, with the row of the file."""
    trace = RoutingTrace(expert_ids=np.zeros((3, 1, 1), int), request_id=np.zeros(3, int), position=np.arange(3),
                         phase=np.array([DECODE, PREFILL, DECODE]), step=np.arange(3), num_experts=2,
                         layer_ids=np.zeros(1, int))
    path = write_trace(trace, tmp_path / "a")
    with pytest.raises(InputError, match="from position 0 to 2 at row 1"):
        select_phase(trace, "decode")
    with pytest.raises(InputError, match="from position 0 to 2 at row 2"):
        reduce_trace(path, ["load"], phase="decode")
    assert reduce_trace(path, ["load"]).num_tokens == 3


@pytest.mark.parametrize("header", [{"layer_ids": [0, 1]}, {"num_experts": 2}])
def test_a_header_that_does_not_fit_is_refused(tmp_path, header):
    """Sizes in the header that the rows break are found when streaming, as when reading."""
    path = write_trace(synthetic_trace(20, 3, 8, 2, 2, seed=0), tmp_path / "a")
    table = pq.read_table(path)
    document = json.loads(table.schema.metadata[b"moesim"]) | header
    pq.write_table(table.replace_schema_metadata({"moesim": json.dumps(document)}), path)
    with pytest.raises(InputError, match=r"layer_ids must have 3 entries|is outside 0 \.\.\. 1"):
        reduce_trace(path, ["load"])


def test_an_empty_file_is_refused(tmp_path):
    """A file without rows is no trace."""
    path = write_trace(synthetic_trace(20, 3, 8, 2, 2, seed=0), tmp_path / "a")
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(InputError, match="not empty"):
        reduce_trace(path, ["load"])


GOOD_SHARES = np.ones((2, 8, 1))


@pytest.mark.parametrize(("wanted", "options", "words"), [
    (["loads"], {}, r"unknown reduction 'loads'\. Did you mean 'load'"),
    (["load"], {"phase": "decoding"}, r"unknown phase 'decoding'\. Did you mean 'decode'"),
    (["load"], {"phase": "denoise"}, r"no denoise rows \(only prefill, decode\)"),
    (["lags"], {"lags": 64}, r"lags must be 1 \.\.\. 63, got 64"),
    (["lags"], {"lags": 0}, "got 0"),
    (["load"], {"batch_rows": 0}, "batch_rows must be at least 1, got 0"),
    (["rank_load_max"], {}, "needs rank_share"),
    (["rank_load_max"], {"rank_share": GOOD_SHARES[:1]}, r"with 2 layers and 8 experts, got \(1, 8, 1\)"),
    (["rank_load_max"], {"rank_share": GOOD_SHARES[..., 0]}, r"got \(2, 8\)"),
    (["rank_load_max"], {"rank_share": GOOD_SHARES[..., :0]}, r"got \(2, 8, 0\)"),
    (["rank_load_max"], {"rank_share": -GOOD_SHARES}, "finite and not negative"),
])
def test_bad_options_are_refused(wanted, options, words):
    """Unknown names, sizes out of range and shares that do not fit are errors."""
    with pytest.raises(InputError, match=words):
        reduce_trace(synthetic_trace(20, 2, 8, 2, 2, seed=0), wanted, **options)


def test_only_what_was_wanted_is_there():
    """An array that was not counted is None, and asking for it is an error."""
    found = reduce_trace(synthetic_trace(20, 2, 8, 2, 2, seed=0), ["load"])
    assert found.array("load").sum() == 20 * 2 * 2
    assert found.distinct is None
    with pytest.raises(InputError, match="'distinct' was not counted"):
        found.array("distinct")


def test_a_scratch_file_without_room_is_an_input_error(tmp_path, monkeypatch):
    """Where the scratch file cannot be made or written, the error says what to do."""
    path = write_trace(synthetic_trace(20, 2, 8, 2, 2, seed=0), tmp_path / "a")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="set TMPDIR to a folder with room"):
        stream_facts(path, 0, 10)
    if Path("/dev/full").exists():
        full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix: full)
        with pytest.raises(InputError, match=r"160 bytes\): No space left on device; set TMPDIR"):
            stream_facts(path, 0, 10)


def test_a_trace_that_exactly_repeats():
    """Experts that come round every third token are reused at lags 3 and 6 only, and at stack distance 2."""
    trace = RoutingTrace(expert_ids=(np.arange(30) % 3)[:, None, None], request_id=np.zeros(30, int),
                         position=np.arange(30), phase=np.full(30, DECODE), step=np.arange(30) // 2, num_experts=4,
                         layer_ids=np.zeros(1, int))
    found = reduce_trace(trace, ["lags", "stack_distances", "distinct"], lags=7)
    assert found.lag_again.ravel().tolist() == [0, 0, 27, 0, 0, 24, 0]
    assert found.lag_picks.ravel().tolist() == [29, 28, 27, 26, 25, 24, 23]
    assert found.stack_distances.tolist() == [[0, 0, 27, 0, 3]]
    assert found.distinct.ravel().tolist() == [2] * 15


@given(st.lists(st.lists(st.integers(-2**31, 2**31 - 1) | st.integers(0, 9) | st.integers(0, 9).map(lambda n: n << 24),
                         max_size=90), max_size=4))
@settings(max_examples=60, deadline=None)
def test_groups_are_those_of_a_dictionary(batches):
    """Indexes, counts and last rows are those of a dictionary in order of appearance, through any growth."""
    groups, known, row = Groups(), {}, 0
    count, last = defaultdict(int), {}
    for values in batches:
        array = np.array(values, np.int32)
        for value in values:
            known.setdefault(value, len(known))
        groups.add(array, np.arange(row, row + len(values)), np.zeros(len(values)))
        assert groups.index(array).tolist() == [known[value] for value in values]
        for value in values:
            count[value] += 1
            last[value] = row
            row += 1
    assert groups.ids.tolist() == list(known)
    assert groups.count.tolist() == [count[value] for value in known]
    assert groups.last_row.tolist() == [last[value] for value in known]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_open_groups_never_share_a_slot(index, batch_rows):
    """From its first row to its last a group keeps its slot alone; as many slots as are ever open at once."""
    last_row = np.array([max((row for row, one in enumerate(index) if one == group), default=-1) for group in range(7)])
    slots, holder, most = Slots(last_row), {}, 0
    for start in range(0, len(index), batch_rows):
        rows = np.arange(start, min(len(index), start + batch_rows))
        for row, slot in zip(rows.tolist(), slots.assign(np.array(index)[rows], rows).tolist(), strict=True):
            assert holder.setdefault(slot, index[row]) == index[row]
            most = max(most, len(holder))
            if row == last_row[index[row]]:
                del holder[slot]
    assert not holder
    assert slots.used == most


def test_every_loop_is_compiled_once(tmp_path):
    """From memory, from a file and through the statistics: one type per argument, so one compilation per loop."""
    from moesim.traces.kernels import counting, reuse, rows, steps

    trace = synthetic_trace(50, 2, 8, 2, 3, seed=0)
    for source in (trace, write_trace(trace, tmp_path / "a")):
        for phase in ("all", "decode"):
            reduce_trace(source, ALL, phase=phase, rank_share=shares_of(trace), verify=True)
            stream_facts(source, 0, 10, phase=phase)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesim.traces.reductions.COMPILED_SELECTIONS", 0)
        trace_stats(trace, seed=0)
    loops = [loop for module in (counting, reuse, rows, steps) for loop in vars(module).values()
             if hasattr(loop, "signatures")]
    called = {loop.__name__: len(loop.signatures) for loop in loops if not loop.__name__.startswith("_")}
    assert len(called) == 12
    assert set(called.values()) == {1}, called


def benchmark():
    """Import benchmarks/_reductions.py, which is no package."""
    spec = importlib.util.spec_from_file_location(
        "moesim_benchmark_reductions", Path(__file__).parent.parent / "benchmarks" / "_reductions.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def test_the_benchmark_counts_what_it_says(tmp_path):
    """The repeated file holds the trace so many times, and every reduction gets a rate."""
    tools = benchmark()
    trace = tools.sample_trace(600, 2, 8, 2)
    short, large = write_trace(trace, tmp_path / "a"), tools.write_repeated(trace, 3, tmp_path / "b")
    once, thrice = (reduce_trace(path, ["load", "distinct"], verify=True) for path in (short, large))
    np.testing.assert_array_equal(thrice.load, 3 * once.load)
    np.testing.assert_array_equal(thrice.distinct, np.tile(once.distinct, (3, 1)))
    rates = tools.reduction_rates(trace, short)
    assert [rate.name for rate in rates] == list(ALL)
    assert all(rate.in_memory > 0 and rate.streamed > 0 for rate in rates)
    if Path("/proc/self/status").exists():
        peak = tools.streaming_peak("reduce", short, large)
        assert (peak.id_bytes, peak.largest_batch) == (2 * 1800 * 2 * 2, 1800)
        assert peak.peak_bytes >= peak.base_bytes > 0
