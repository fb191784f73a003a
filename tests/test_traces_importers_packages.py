"""Importers of runtimes, simulators and research projects: llama.cpp recorders, moe-policylang, MoE-Infinity, and tables."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_files import (
    COUNTS,
    LENGTHS,
    NUM_EXPERTS,
    NUM_LAYERS,
    POSITION,
    PROMPT,
    REQUEST,
    ROUTING,
    TOKENS,
    TOP_K,
    counts_csv,
    expert_log,
    fiddler,
    mblt,
    moe_atlas,
    moe_beyond,
    moe_infinity,
    passes,
    policylang,
    policylang_parquet,
    rtrace,
    softmax_rows,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.traces.counts import CountTrace
from moesim.traces.importers import import_any, import_trace
from moesim.traces.trace import DECODE, PREFILL


def fails(words: str, path: Path, **options: Any) -> None:
    """The import fails with these words, in one line that starts with the path."""
    with pytest.raises(InputError) as error:
        import_any(path, **options)
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))


def write_mblt(path: Path, records: list[tuple[int, np.ndarray]], num_experts: int = NUM_EXPERTS) -> Path:
    """Write MBLT records; an empty one keeps its k."""
    data = struct.pack("<4sii", b"MBLT", 1, num_experts)
    for layer, ids in records:
        data += struct.pack("<iii", layer, ids.shape[1], len(ids)) + ids.astype("<i4").tobytes()
    path.write_bytes(data)
    return path


def short_last_layer(kept: int) -> list[tuple[int, np.ndarray]]:
    """Return `passes` where prompt passes have only `kept` rows in the last layer, as llama.cpp computes them."""
    return [(layer, ids[len(ids) - kept:] if layer == NUM_LAYERS - 1 and len(ids) > 1 else ids)
            for layer, ids in passes()]


@pytest.mark.parametrize("form", ["mblt", "expert-log"])
@pytest.mark.parametrize("kept", [0, 1])
def test_prompt_tokens_without_a_last_layer(form: str, kept: int, tmp_path: Path) -> None:
    """Tokens whose last layer was not computed are left out with a note; the others keep their positions."""
    path = tmp_path / "r"
    if form == "mblt":
        write_mblt(path, short_last_layer(kept))
    else:
        lines = [f"EXPERT|L{layer}|T{len(ids)}: " + " ".join(f"[{','.join(map(str, row))}]" for row in ids.tolist())
                 for layer, ids in short_last_layer(kept) if len(ids)]
        path.write_text("\n".join(lines))
    found = import_trace(path)
    rows = PROMPT - kept <= POSITION
    assert np.array_equal(found.expert_ids, ROUTING[rows])
    assert (found.request_id.tolist(), found.position.tolist()) == (REQUEST[rows].tolist(), POSITION[rows].tolist())
    assert found.phase.tolist() == np.where(POSITION[rows] < PROMPT, PREFILL, DECODE).tolist()
    dropped = len(LENGTHS) * (PROMPT - kept)
    assert any(note.startswith(f"left out {dropped} prompt tokens") for note in found.metadata["notes"])


def test_warm_up_passes_are_noted_and_can_be_skipped(tmp_path: Path) -> None:
    """A first pass of two tokens before a longer prompt may be llama.cpp's warm-up."""
    warm = [(layer, np.array([[0, 1], [0, 1]])) for layer in range(NUM_LAYERS)]
    path = write_mblt(tmp_path / "r", [*warm, *passes()])
    found = import_trace(path)
    assert found.num_tokens == TOKENS + 2
    assert any("import with skip_passes 1" in note for note in found.metadata["notes"])
    assert np.array_equal(import_trace(path, skip_passes=1).expert_ids, ROUTING)
    fails("skip_passes must lie in 0 ... ", path, skip_passes=99)


def test_layers_of_llama_cpp_are_the_models(tmp_path: Path) -> None:
    """Records name the model's own layers: they are kept."""
    path = write_mblt(tmp_path / "r", [(layer + 3, ids) for layer, ids in passes()])
    assert import_trace(path).layer_ids.tolist() == [3, 4, 5]


@pytest.mark.parametrize(("records", "words"), [
    ([], "no whole forward pass"),
    (passes()[:3], "one forward pass only, which may have been cut off"),
    ([*passes()[:4], *passes()[5:]], "forward pass 1 has no record of layer 1"),
    ([(0, np.array([[0, 8]])), (0, np.array([[0, 1]]))], "an expert id is outside 0 ... 7"),
    ([(0, np.array([[0, 1]])), (0, np.array([[0]]))], "passes with 1 and 2 experts per token"),
    ([(-1, np.array([[0, 1]]))], "is not a record"),
    ([(0, passes()[0][1]), (1, passes()[0][1][:2]), (2, passes()[0][1])] * 2, "forward pass 0 has [3, 2, 3] tokens"),
])
def test_bad_mblt_records(records: list[tuple[int, np.ndarray]], words: str, tmp_path: Path) -> None:
    """A hole, an id out of range or passes that disagree are errors."""
    fails(words, write_mblt(tmp_path / "r", records))


def test_one_pass_is_read_when_its_layers_are_known(tmp_path: Path) -> None:
    """A recording of one pass cannot be known to be whole, unless the number of layers is stated."""
    path = write_mblt(tmp_path / "r", passes()[:3])
    assert np.array_equal(import_trace(path, num_layers=3).expert_ids, ROUTING[:PROMPT])
    fails("records of 3 layers, expected 4", path, num_layers=4)


def test_mblt_of_another_version(tmp_path: Path) -> None:
    """Only version 1 is known."""
    path = mblt(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"MBLT\1", b"MBLT\2"))
    fails("MBLT version 2 with 8 experts; version 1 is known", path)


@pytest.mark.parametrize(("lines", "words"), [
    (["EXPERT|L0|T2: [1,2]", "EXPERT|L0|T1: [1,2] [3,4]"], ":1: layer 0 has 1 lists of ids after T2"),
    (["EXPERT|L0|T1: [1,x]"], ":1: expected EXPERT|L<layer>|T<tokens>"),
    (["EXPERT|L0|T1: [1,,2]"], ":1: expected whole numbers from 0"),
    (["EXPERT|L0|T1: [1,99999]"], ":1: expected whole numbers from 0 to 32767"),
    (["EXPERT|L0|T2: [1,2] [3]"], ":1: lists of ids of different lengths"),
    (["EXPERT|L0|T1:"], ":1: expected EXPERT|L<layer>|T<tokens>"),
])
def test_bad_log_lines(lines: list[str], words: str, tmp_path: Path) -> None:
    """A bad line is named with its number."""
    (tmp_path / "log").write_text("\n".join(lines))
    fails(words, tmp_path / "log", source_format="expert-log")


def test_log_lines_of_single_tokens(tmp_path: Path) -> None:
    """Where every line has one list and T rises, T is the token's index; a token that comes again is a new request."""
    lines = [f"12:00 EXPERT|L{layer}|T{POSITION[t]}: [{', '.join(map(str, ROUTING[t, layer]))}]"
             for t in range(TOKENS) for layer in range(NUM_LAYERS)]
    (tmp_path / "log").write_text("\n".join(lines))
    found = import_trace(tmp_path / "log")
    assert np.array_equal(found.expert_ids, ROUTING)
    assert found.request_id.tolist() == REQUEST.tolist()
    assert any("T is taken as the index of a token" in note for note in found.metadata["notes"])


def test_log_files_are_found_among_other_lines(tmp_path: Path) -> None:
    """Other lines do not matter, with either end of line."""
    path = expert_log(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert np.array_equal(import_trace(path).expert_ids, ROUTING)


def test_router_softmax_needs_top_k(tmp_path: Path) -> None:
    """RTRACE01 holds no choice: top_k is asked for; weights are the shares over all experts."""
    path = rtrace(tmp_path)
    fails("give the model's experts per token (--option top_k=K, 1 ... 8)", path)
    fails("1 ... 8", path, top_k=9)
    found = import_trace(path, top_k=1)
    assert np.array_equal(found.expert_ids[:, :, 0], ROUTING[:, :, 0])
    assert any("not renormalised" in note for note in found.metadata["notes"])


def test_router_softmax_without_a_last_layer(tmp_path: Path) -> None:
    """Prompt tokens that llama.cpp did not compute in the last layer are left out; a hole elsewhere is an error."""
    rows = softmax_rows(ROUTING[:4])

    def write(cells: list[tuple[int, int]]) -> Path:
        data = b"RTRACE01" + struct.pack("<ii", NUM_EXPERTS, 0)
        for token, layer in cells:
            data += struct.pack("<ii", token, layer) + rows[token, layer].tobytes()
        (tmp_path / "r").write_bytes(data)
        return tmp_path / "r"

    cells = [(token, layer) for layer in range(NUM_LAYERS) for token in range(4)]
    found = import_trace(write([cell for cell in cells if cell not in ((0, 2), (1, 2))]), top_k=TOP_K)
    assert np.array_equal(found.expert_ids, ROUTING[2:4])
    assert (found.position.tolist(), found.num_experts) == ([2, 3], NUM_EXPERTS)
    fails("token 1 has no route for layer 1", write([cell for cell in cells if cell != (1, 1)]), top_k=TOP_K)
    fails("positions of a request must rise by one", write([cell for cell in cells if cell != (1, 2)]), top_k=TOP_K)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(st.permutations(range(TOKENS * NUM_LAYERS)))
def test_rows_in_any_order(tmp_path: Path, order: list[int]) -> None:
    """Routes of JSON lines may come in any order: the same tokens come out, requests numbered by appearance."""
    lines = policylang(tmp_path).read_text().splitlines()
    rows = [json.loads(lines[1 + place]) for place in order]
    (tmp_path / "x.jsonl").write_text("\n".join([lines[0], *map(json.dumps, rows)]))
    found = import_trace(tmp_path / "x.jsonl")
    if rows[0]["p"] == 0:
        assert np.array_equal(found.expert_ids, ROUTING)
    cells = [(row["p"], row["t"], row["l"]) for row in rows]
    table = pa.table({"prompt_id": [c[0] for c in cells], "token_idx": [c[1] for c in cells],
                      "layer_idx": [c[2] for c in cells], "selected_experts": [row["e"] for row in rows]})
    pq.write_table(table, tmp_path / "x.parquet")
    same = import_trace(tmp_path / "x.parquet")
    assert np.array_equal(same.expert_ids, ROUTING[np.concatenate(
        [np.flatnonzero(request == REQUEST) for request in dict.fromkeys(row["p"] for row in rows)])])


@pytest.mark.parametrize(("line", "words"), [
    ({"p": 0, "t": 0, "l": 0, "e": [1, 2]}, ":35: request 0, token 0, layer 0 is there twice"),
    ({"t": "0", "l": 0, "e": [1]}, ":35: t must be a whole number"),
    ({"t": 0, "l": -1, "e": [1]}, ":35: l must be a whole number"),
    ({"t": 0, "l": 0, "e": []}, ":35: e must be a list of whole numbers"),
    ({"t": 0, "l": 0, "e": [1.0]}, ":35: e must be a list of whole numbers"),
    ({"t": 0, "l": 0, "e": [1, 2], "s": [1]}, ":35: s must be a list of numbers, 2 of them"),
    ({"t": 0, "l": 0, "e": [1], "ph": "both"}, ":35: ph must be prefill or decode"),
])
def test_bad_policylang_lines(line: dict[str, Any], words: str, tmp_path: Path) -> None:
    """A bad line is named with its number."""
    path = policylang(tmp_path)
    text = path.read_text().replace(f'"num_entries": {TOKENS * NUM_LAYERS}', f'"num_entries": {TOKENS * NUM_LAYERS + 1}')
    path.write_text(text + json.dumps(line) + "\n")
    with pytest.raises(InputError) as error:
        import_any(path)
    assert words in str(error.value)


def test_policylang_files_that_are_cut(tmp_path: Path) -> None:
    """The header's count of rows tells; a row that is missing in the middle is named."""
    path = policylang(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-3]))
    fails("the header announces 33 rows, the file has 30: it is cut short", path)
    path.write_text("\n".join([lines[0].replace("33", "32"), *lines[1:4], *lines[5:]]))
    fails("request 0, token 1 has no route for layer 0", path)


def test_policylang_parquet_of_the_old_form(tmp_path: Path) -> None:
    """A file with the softmax only needs top_k, and then gives the chosen experts."""
    cells = [(t, layer) for t in range(TOKENS) for layer in range(NUM_LAYERS)]
    rows = softmax_rows(ROUTING)
    table = pa.table({
        "prompt_id": [int(REQUEST[t]) for t, _ in cells], "token_idx": [int(POSITION[t]) for t, _ in cells],
        "layer_idx": [layer for _, layer in cells], "router_softmax": [rows[cell].tolist() for cell in cells]})
    pq.write_table(table, tmp_path / "t.parquet")
    fails("top_k=K", tmp_path / "t.parquet")
    found = import_trace(tmp_path / "t.parquet", top_k=TOP_K)
    assert np.array_equal(found.expert_ids, ROUTING)
    assert "the file does not say which tokens are prompt" in found.metadata["notes"]


@pytest.mark.parametrize(("name", "column", "words"), [
    ("token_idx", pa.array([0.5]), "column 'token_idx' must hold whole numbers"),
    ("layer_idx", pa.array([None], pa.int32()), "column 'layer_idx' must hold whole numbers"),
    ("selected_experts", pa.array([None], pa.list_(pa.int32())), "column 'selected_experts' must hold lists"),
    ("selected_experts", pa.array([[]], pa.list_(pa.int32())), "column 'selected_experts' has empty values"),
    ("selected_experts", pa.array([[0.5]]), "must hold lists of whole numbers"),
    ("selected_experts", pa.array(["x"]), "must hold lists"),
    ("router_scores", pa.array([[0.5]]), "router_scores (1, 1) differ from selected_experts (1, 2)"),
    ("phase", pa.array(["x"]), "phase must be prefill or decode, found 'x'"),
])
def test_bad_policylang_columns(name: str, column: pa.Array, words: str, tmp_path: Path) -> None:
    """A column of another kind is named."""
    columns: dict[str, Any] = {"prompt_id": [0], "token_idx": [0], "layer_idx": [0], "selected_experts": [[1, 2]],
                               "router_scores": [[0.5, 0.25]], "phase": ["decode"]}
    pq.write_table(pa.table(columns | {name: column}), tmp_path / "t.parquet")
    fails(words, tmp_path / "t.parquet")


def test_token_ids_of_policylang(tmp_path: Path) -> None:
    """Token ids are kept where they are recorded."""
    for make in (policylang, policylang_parquet, moe_atlas):
        folder = tmp_path / make.__name__
        folder.mkdir()
        path = make(folder)
        found = import_trace(folder if make is moe_atlas else path)
        assert found.token_id is not None
        assert found.token_id.tolist() == list(range(100, 100 + TOKENS))


@pytest.mark.parametrize(("row", "words"), [
    ('0,0,t,"[1, 2"', "Activated Expert IDs: not valid JSON"), ('0,0,t,"[-1]"', "must be a list of whole numbers"),
    ('0,0,t,"__import__(1)"', "not valid JSON"), ("x,0,t,[1]", "Layer ID must be a whole number"),
    ("0,0", "expected 4 fields, found 2"), ('0,0,t,"[1]"', "has no route for layer 1"),
])
def test_bad_moe_beyond_rows(row: str, words: str, tmp_path: Path) -> None:
    """A bad row is named with its file and line; nothing is evaluated."""
    path = moe_beyond(tmp_path) / "prompt_0_data.csv"
    path.write_text(path.read_text() + row + "\n")
    fails(words, tmp_path)


def test_moe_beyond_batches_are_requests(tmp_path: Path) -> None:
    """Rows of one batch number of one file are one request; a long embedding does not matter."""
    lines = ["Layer ID,Batch Number,Token,Activated Expert IDs,Token Embedding Vector"]
    lines += [f'{layer},{REQUEST[t]},x,"{ROUTING[t, layer].tolist()}","[{"0.123456, " * 20_000}1]"'
              for layer in range(NUM_LAYERS) for t in range(TOKENS)]
    (tmp_path / "b.csv").write_text("\n".join(lines))
    found = import_trace(tmp_path / "b.csv")
    assert np.array_equal(found.expert_ids, ROUTING)
    assert found.request_id.tolist() == REQUEST.tolist()


@pytest.mark.parametrize(("activation", "words"), [
    ({"layer": 0, "token_idx": 0}, "expert_idx must be a whole number"), (5, "activations[24]: expected an object"),
    ({"layer": 0, "token_idx": 0, "expert_idx": 1, "gate_weight": None}, "gate_weight must be a number"),
    ({"layer": 0, "token_idx": 0, "expert_idx": 0, "gate_weight": 0.1}, "names an expert twice"),
    ({"layer": 9, "token_idx": 0, "expert_idx": 0}, "token 1 has no route for layer 9"),
])
def test_bad_moe_atlas_activations(activation: Any, words: str, tmp_path: Path) -> None:
    """A bad activation is named with its number."""
    path = moe_atlas(tmp_path) / "trace_0.json"
    entry = json.loads(path.read_text())
    entry["activations"].append(activation)
    path.write_text(json.dumps(entry))
    with pytest.raises(InputError) as error:
        import_any(path)
    assert words in str(error.value)


def test_moe_infinity_layers_count_moe_layers(tmp_path: Path) -> None:
    """A note says that layers are not the model's; stated ids replace them; shares are refused."""
    path = moe_infinity(tmp_path)
    found = import_any(path)
    assert any("give --model-config" in note for note in found.metadata["notes"])
    assert import_any(path, layer_ids="1,3,5").layer_ids.tolist() == [1, 3, 5]  # type: ignore[union-attr]
    np.save(path, np.load(path) / 3)
    fails("counts must be whole numbers, found", path)


def test_exflow_wants_two_axes(tmp_path: Path) -> None:
    """An array of ids of another shape is not ExFlow's."""
    np.save(tmp_path / "e.npy", ROUTING)
    fails("ExFlow's arrays are [token, layer], found shape (11, 3, 2)", tmp_path / "e.npy", source_format="exflow")


def test_count_tables_of_ranks_and_subjects(tmp_path: Path) -> None:
    """Files of a folder: CSVs are ranks and are added up (or all the same), Fiddler's are windows."""
    counts_csv(tmp_path)
    fiddler(tmp_path)
    (tmp_path / "d.csv").write_text(f"layer_id,expert_id,count\n2,{NUM_EXPERTS - 1},5\n")
    (tmp_path / "q.json").write_text((tmp_path / "p.json").read_text())
    added = import_any(tmp_path, source_format="counts-csv")
    assert isinstance(added, CountTrace)
    assert added.expert_load().sum() == COUNTS.sum() + 5
    assert added.expert_load()[2, -1] == COUNTS[2, -1] + 5
    windows = import_any(tmp_path, source_format="fiddler")
    assert isinstance(windows, CountTrace)
    assert (windows.counts.tolist(), windows.window) == ([COUNTS.tolist()] * 2, "file")
    (tmp_path / "d.csv").write_text((tmp_path / "c.csv").read_text())
    assert np.array_equal(import_any(tmp_path, source_format="counts-csv").expert_load(), COUNTS)  # type: ignore[union-attr]
    fails("could be counts-csv or fiddler", tmp_path)


@pytest.mark.parametrize(("row", "words"), [
    ("0,0,1", ":26: layer 0, expert 0 is there twice"), ("0,-1,1", ":26: expert_id must be a whole number"),
    ("0,1e3,1", ":26: expert_id must be"), ("0,99999,1", ":26: layer 0, expert 99999: expected ids up to"),
    ("0,1", ":26: expected 3 fields, found 2"), ("0,9,99999999999999999999", ":26: count must be a whole number")])
def test_bad_count_rows(row: str, words: str, tmp_path: Path) -> None:
    """A bad row is named with its line."""
    path = counts_csv(tmp_path)
    path.write_text(path.read_text() + row + "\n")
    fails(words, path)
