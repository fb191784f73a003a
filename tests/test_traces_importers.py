"""Importers on small files of the formats they read."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.traces import PREFILL, import_trace, synthetic_trace, write_trace
from moesim.traces.importers import IMPORTERS, Importer, warmup_notes

LENGTHS = [4, 1, 7]
OFFSETS = np.array([0, 4, 5, 12])


@pytest.fixture
def routing():
    """Return ids uint8[12, 3, 2] of 6 experts and weights float16 of the same shape."""
    rng = np.random.default_rng(0)
    ids = np.array([[rng.permutation(6)[:2] for _ in range(3)] for _ in range(12)], dtype=np.uint8)
    ids[0, 0] = (5, 0)
    first = rng.uniform(0.55, 0.9, (12, 3))
    return ids, np.stack([first, 1 - first], axis=2).astype(np.float16)


def assert_routing(trace, ids, weights, lengths):
    """The trace holds these ids, weights and requests."""
    np.testing.assert_array_equal(trace.expert_ids, ids)
    if weights is None:
        assert trace.gate_weights is None
    else:
        np.testing.assert_array_equal(trace.gate_weights, weights.astype(np.float32))
    assert trace.request_id.tolist() == [r for r, length in enumerate(lengths) for _ in range(length)]
    assert trace.position.tolist() == [p for length in lengths for p in range(length)]


def test_npz_of_the_public_form(tmp_path, routing):
    """experts, probs and offsets are found by name; what was assumed is noted."""
    ids, weights = routing
    np.savez_compressed(tmp_path / "r.npz", experts=ids, probs=weights, offsets=OFFSETS)
    trace = import_trace(tmp_path / "r.npz")
    assert_routing(trace, ids, weights, LENGTHS)
    assert (trace.num_experts, trace.source) == (6, "imported from r.npz (npz)")
    assert set(trace.phase.tolist()) == {1}
    assert trace.step.tolist() == list(range(12))
    assert trace.metadata["notes"] == ["positions count from 0 in each request's recording",
                                       "num_experts 6 inferred as the largest id + 1"]


def test_npz_with_stated_names_and_axes(tmp_path, routing):
    """Keys, axis order, layer ids, phase, model and expert count can be stated."""
    ids, weights = routing
    np.savez(tmp_path / "r.npz", a=ids.transpose(1, 0, 2), b=weights.transpose(1, 0, 2), c=OFFSETS)
    trace = import_trace(tmp_path / "r.npz", expert_ids_key="a", gate_weights_key="b", offsets_key="c",
                         axes="layer,token,k", layer_ids=[3, 4, 5], num_experts=8, phase="prefill", model="m")
    assert_routing(trace, ids, weights, LENGTHS)
    assert (trace.num_experts, trace.layer_ids.tolist(), trace.model) == (8, [3, 4, 5], "m")
    assert set(trace.phase.tolist()) == {PREFILL}
    assert trace.step.tolist() == [0] * 4 + [1] + [2] * 7


@pytest.mark.parametrize(("order", "axes"), [((0, 1), "token,layer,k"), ((1, 0), "layer,token")])
def test_npy_of_top_one_ids(tmp_path, routing, order, axes):
    """A 2-d array is top-1 routing; without offsets all rows are one request, and a note says so."""
    ids = routing[0][:, :, 0]
    np.save(tmp_path / "r.npy", ids.transpose(order))
    trace = import_trace(tmp_path / "r.npy", axes=axes)
    assert_routing(trace, ids[:, :, None], None, [12])
    assert any("no request offsets" in note for note in trace.metadata["notes"])
    assert_routing(import_trace(tmp_path / "r.npy", axes=axes, offsets=[0, 4, 5, 12]), ids[:, :, None], None, LENGTHS)


def route(req, token, layer, ids, weights=None):
    """Return one route line."""
    entry = {"type": "route", "req_id": req, "token_idx": token, "layer": layer, "topk_ids": ids}
    return json.dumps(entry if weights is None else entry | {"topk_weights": weights})


META = json.dumps({"type": "meta", "model_id": "org/moe", "layers_logged": [1, 3], "top_k": 2})


def write_lines(path, *lines):
    """Write lines and return the path."""
    path.write_text("\n".join(lines) + "\n")
    return path


def test_jsonl_routes(tmp_path):
    """Interleaved requests come out one after another, layers sorted, a short row padded."""
    path = write_lines(
        tmp_path / "r.jsonl", META,
        route("b", 5, 3, [1, 0], [0.75, 0.25]), route("b", 5, 1, [2, 3], [0.5, 0.5]), route("a", 0, 1, [1], [1.0]),
        "", route("a", 0, 3, [3, 1], [0.5, 0.5]), route("b", 6, 1, [0, 1], [0.5, 0.5]),
        route("b", 6, 3, [2, 1], [1, 0]))
    trace = import_trace(path, num_experts=4)
    assert trace.expert_ids.tolist() == [[[2, 3], [1, 0]], [[0, 1], [2, 1]], [[1, -1], [3, 1]]]
    assert trace.gate_weights[0].tolist() == [[0.5, 0.5], [0.75, 0.25]]
    assert trace.gate_weights[2].tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert (trace.request_id.tolist(), trace.position.tolist()) == ([0, 0, 1], [5, 6, 0])
    assert (trace.layer_ids.tolist(), trace.model) == ([1, 3], "org/moe")


@pytest.mark.parametrize(("lines", "words"), [
    ([META], "no route lines"),
    ([META, "{"], ":2: not valid JSON"),
    ([META, '{"type": "token"}'], ":2: expected type 'meta' or 'route', found 'token'"),
    ([META, '{"type": "route", "req_id": 1}'], ":2: key 'token_idx' is missing"),
    ([META, route(1, 0, 1, ["x"])], ":2: token_idx and layer must be whole numbers"),
    ([META, route(1, 2**40, 1, [0])], ":2: token_idx and layer must be whole numbers"),
    ([META, route(1, 0, 1, [])], ":2: token_idx"),
    ([META, route([1], 0, 1, [1])], ":2: req_id must be"),
    ([META, route(1, 0, 1, [1, 2], [0.5])], ":2: topk_weights must be 2 numbers"),
    ([META, route(1, 0, 1, [1]), route(1, 0, 1, [2])], ":3: request 1, token 0, layer 1 is there twice"),
    ([META, route(1, 0, 1, [1]), route(1, 0, 3, [1]), route(1, 1, 1, [1])], "token 1 has no route for layer 3"),
    ([META, route(1, 0, 1, [1]), route(1, 2, 1, [2])], "positions of a request must rise by one"),
    ([META, route(1, 0, 1, [1, 0]), route(1, 1, 1, [1, 1])], "names an expert twice"),
    ([META, route(1, 0, 1, [1, 1])], "every layer holds one repeated id"),
])
def test_bad_jsonl_is_located(tmp_path, lines, words):
    """A bad line is named with its file and number; a gap in the routes with its place."""
    path = write_lines(tmp_path / "r.jsonl", *lines)
    with pytest.raises(InputError) as error:
        import_trace(path)
    assert str(error.value).startswith(str(path))
    assert words in str(error.value)


def _savez(**arrays):
    return lambda path: np.savez(path.open("wb"), **arrays)


IDS = np.arange(12).reshape(3, 2, 2)
BAD = [
    (lambda p: None, {}, "no such file"),
    (lambda p: p.mkdir(), {}, "is a folder"),
    (lambda p: p.write_bytes(pickle.dumps([1])), {}, "Python pickle"),
    (lambda p: p.write_text("a,b\n1,2\n"), {}, "unknown routing format. Known: npz"),
    (lambda p: zipfile.ZipFile(p, "w").writestr("archive/data.pkl", b"x"), {}, "neither of numpy arrays nor a recorder's .pt file"),
    (lambda p: write_trace(synthetic_trace(5, 1, 4, 1, 1), p), {}, "a moesim trace needs no import"),
    (_savez(experts=IDS), {"source_format": "nzp"}, "unknown source format 'nzp'. Did you mean 'npz'"),
    (_savez(experts=IDS), {"ofsets_key": "x"}, "no option 'ofsets_key'. Did you mean 'offsets_key'"),
    (_savez(experts=IDS), {"phase": "decoding"}, "unknown phase 'decoding'. Did you mean 'decode'"),
    (_savez(experts=IDS), {"offsets_key": "offset"}, "no array 'offset'"),
    (_savez(stuff=IDS), {}, "expected an array called expert_ids, experts, topk_ids"),
    (_savez(experts=np.array([None])), {}, "array 'experts' cannot be read"),
    (_savez(experts=IDS.astype(float)), {}, "expert ids must be integers, found float64"),
    (_savez(experts=IDS[0, 0]), {}, "expected an array of 3 axes token,layer,k, found shape (2,)"),
    (_savez(experts=IDS[:0]), {}, "is empty"),
    (_savez(experts=IDS), {"axes": "token,expert"}, "axes must name token, layer and k"),
    (_savez(experts=IDS), {"layer_ids": [1]}, "layer_ids must name 2 layers, got 1"),
    (_savez(experts=IDS), {"skip_rows": 3}, "skip_rows must lie in 0 ... 2, got 3"),
    (_savez(experts=IDS), {"num_experts": 4}, "expert id 4 at token 1, layer 0 is outside 0 ... 3"),
    (_savez(experts=IDS * 0), {}, "every layer holds one repeated id"),
    (_savez(experts=IDS, probs=np.ones((3, 2, 1))), {}, "gate weights (3, 2, 1) differ"),
    (_savez(experts=IDS, probs=np.full((3, 2, 2), np.nan)), {}, "gate weights must be finite"),
    (_savez(experts=IDS, offsets=np.array([0, 2])), {}, "rise from 0 to 3"),
    (_savez(experts=IDS, offsets=np.array([0, 3, 3])), {}, "rise from 0 to 3"),
    (_savez(experts=IDS, offsets=np.array(3)), {}, "rise from 0 to 3"),
    (_savez(experts=IDS, offsets=np.array([0, 3.0])), {}, "rise from 0 to 3"),
    (lambda p: np.save(p.open("wb"), np.array([{}])), {}, "cannot be read as a single numpy array"),
    (lambda p: np.save(p.open("wb"), IDS), {"source_format": "npz"}, "expected a numpy archive"),
]


@pytest.mark.parametrize(("make", "options", "words"), BAD)
def test_bad_files_and_options_are_named(tmp_path, make, options, words):
    """Wrong content, shape or option gives one error that says what was expected; nothing is unpickled."""
    make(tmp_path / "r.bin")
    with pytest.raises(InputError) as error:
        import_trace(tmp_path / "r.bin", **options)
    assert words in str(error.value)


def test_cut_archives_are_refused(tmp_path, routing):
    """A numpy file that ends early is an error, not a shorter trace."""
    np.save(tmp_path / "r.npy", routing[0])
    data = (tmp_path / "r.npy").read_bytes()
    (tmp_path / "r.npy").write_bytes(data[:-10])
    with pytest.raises(InputError, match="cannot be read as a single numpy array"):
        import_trace(tmp_path / "r.npy")


def test_an_ambiguous_file_needs_a_name(tmp_path, routing, monkeypatch):
    """When two importers accept a file, the user must choose; the error lists both with what they are."""
    copy = Importer(IMPORTERS["npy"].detect, IMPORTERS["npy"].read, "the same again")
    monkeypatch.setitem(IMPORTERS._entries, "npy2", copy)
    np.save(tmp_path / "r.npy", routing[0])
    with pytest.raises(InputError, match=r"could be npy or npy2: name the source format\. npy: .*npy2: the same again"):
        import_trace(tmp_path / "r.npy")
    assert import_trace(tmp_path / "r.npy", source_format="npy2").num_tokens == 12


def test_dense_layers_are_left_out_and_noted(tmp_path, routing):
    """A layer of one repeated id is a recorder's filling: dropped, noted, the other layers keep their index."""
    ids = np.insert(routing[0], 0, 0, axis=1)
    np.save(tmp_path / "r.npy", ids)
    trace = import_trace(tmp_path / "r.npy")
    np.testing.assert_array_equal(trace.expert_ids, routing[0])
    assert trace.layer_ids.tolist() == [1, 2, 3]
    assert "left out layer 0: it holds one repeated id (a dense layer)" in trace.metadata["notes"]


def test_ids_from_one_are_noticed_and_shifted(tmp_path, routing):
    """Ids that never use 0 are noted; id_base takes them down."""
    np.save(tmp_path / "r.npy", routing[0] + 1)
    assert any("id_base 1" in note for note in import_trace(tmp_path / "r.npy").metadata["notes"])
    np.testing.assert_array_equal(import_trace(tmp_path / "r.npy", id_base=1).expert_ids, routing[0])


@pytest.mark.parametrize("kind", ["identical", "uniform"])
def test_warm_up_rows_are_noted_and_can_be_skipped(tmp_path, routing, kind):
    """Leading rows that are all the same, or of even weights, are noted; skip_rows drops them."""
    ids, weights = routing[0].copy(), routing[1].copy()
    if kind == "identical":
        ids[:3] = ids[2]
    else:
        weights[:3] = 0.5
    np.savez(tmp_path / "r.npz", experts=ids, probs=weights)
    words = {"identical": "the first 3 rows are identical", "uniform": "the first 3 rows have even gate weights"}
    assert any(note.startswith(words[kind]) for note in import_trace(tmp_path / "r.npz").metadata["notes"])
    trace = import_trace(tmp_path / "r.npz", skip_rows=3)
    np.testing.assert_array_equal(trace.expert_ids, ids[3:])
    assert not any("warm-up" in note for note in trace.metadata["notes"])


def test_ordinary_rows_give_no_warm_up_note(routing):
    """Real routing is not taken for warm-up."""
    assert warmup_notes(routing[0].astype(np.int64), routing[1].astype(np.float32)) == []


def test_detection_goes_by_content(tmp_path, routing):
    """The file's name does not matter."""
    np.save((tmp_path / "routes.csv").open("wb"), routing[0])
    assert import_trace(Path(tmp_path / "routes.csv")).source == "imported from routes.csv (npy)"
