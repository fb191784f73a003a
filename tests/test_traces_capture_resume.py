"""A capture that is killed goes on where it stopped, scores included, and its files equal an uninterrupted one's."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from capture_families import build  # noqa: E402

from moesim.errors import InputError  # noqa: E402
from moesim.traces import TraceWriter, read_trace, trace_info  # noqa: E402
from moesim.traces.capture import capture_command, capture_routing  # noqa: E402
from moesim.traces.capture_hooks import RouterRecorder  # noqa: E402
from moesim.traces.capture_scores import ScoreRows, ScoresWriter, iter_scores, scores_info  # noqa: E402

REQUESTS = [(7, [1, 2, 3]), (2, [9]), (5, [4, 4, 60, 8, 1]), (1, [8]), (0, [3, 3])]
SETTINGS = {"max_new_tokens": 4, "seed": 3, "batch_size": 2, "with_token_ids": True}

# what runs in the process that is killed: `point` is where it kills itself, without any clean-up
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from capture_families import build
from moesim.traces import capture, writer

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

point, calls = {point!r}, []
def die_at_second_append(self, batch, append=writer.TraceWriter.append):
    calls.append(batch)
    kill() if len(calls) == 2 else append(self, batch)
if point == "append":
    writer.TraceWriter.append = die_at_second_append
if point == "first":
    writer.TraceWriter.append = kill
capture.capture_routing(build("mixtral"), {requests!r}, {out!r}, scores={scores!r}, **{settings!r})
"""


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models run fastest on one thread, and give the same bits as the killed process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with the files of an uninterrupted capture."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    capture_routing(build("mixtral"), REQUESTS, folder / "t", scores=folder / "s", **SETTINGS)
    torch.set_num_threads(threads)
    return folder


def killed(folder, point):
    """Run a capture in a process that kills itself at `point`."""
    script = SCRIPT.format(tests=str(Path(__file__).parent), point=point, requests=REQUESTS, out=str(folder / "t"),
                           scores=str(folder / "s"), settings=SETTINGS)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(("point", "left"), [("first", 5), ("append", 3)])
def test_a_killed_capture_goes_on(tmp_path, whole, point, left):
    """Killed before anything, or between scores and routing of the second batch: the files end up the same."""
    killed(tmp_path, point)
    assert not (tmp_path / "t").exists()
    count = capture_routing(build("mixtral"), REQUESTS, tmp_path / "t", scores=tmp_path / "s", resume=True, **SETTINGS)
    assert count == left
    for name in ("t", "s"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s", "t"]


def test_scores_are_finished_after_the_trace(tmp_path):
    """Stopped when the trace was whole and the scores were not, a resumed command only merges the scores."""
    folder = tmp_path / "tiny"
    build("mixtral").save_pretrained(folder)
    (tmp_path / "p").write_text('{"request_id": 4, "token_ids": [1, 2]}\n{"request_id": 3, "token_ids": [5]}\n')
    options = {"max_new_tokens": 3, "seed": 0, "scores": tmp_path / "s"}
    capture_command(folder, tmp_path / "p", tmp_path / "t", **options)
    rows = list(iter_scores(tmp_path / "s"))
    before = (tmp_path / "s").read_bytes()
    (tmp_path / "s").unlink()
    writer = ScoresWriter(tmp_path / "s", scores_layers(tmp_path), set(), resume=False)
    for request in (4, 3):  # the parts as the run had written them
        own = rows[0].request_id == request
        writer.append(ScoreRows(*(part[own] for part in rows[0])))
    (folder / "model.safetensors").unlink()  # it cannot be run again
    capture_command(folder, tmp_path / "p", tmp_path / "t", resume=True, **options)
    assert (tmp_path / "s").read_bytes() == before
    assert not writer.folder.exists()


def scores_layers(folder):
    """Return the layer ids of the trace in a folder."""
    return trace_info(folder / "t")["layer_ids"]


def test_scores_are_the_router_logits_row_by_row(whole):
    """Row i of the scores belongs to row i of the trace, and is what output_router_logits gives without hooks."""
    trace, info = read_trace(whole / "t"), scores_info(whole / "s")
    (rows,) = iter_scores(whole / "s")
    assert (info["trace_digest"], info["layer_ids"], info["num_columns"]) == (trace.digest(), [0, 1, 2], 8)
    np.testing.assert_array_equal(rows.request_id, trace.request_id)
    np.testing.assert_array_equal(rows.position, trace.position)
    model = build("mixtral")
    for request, _ in REQUESTS:
        own = trace.request_id == request
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([trace.token_id[own].tolist()]), output_router_logits=True)
        expected = torch.stack(logits.router_logits, dim=1).numpy()
        np.testing.assert_allclose(rows.scores[own], expected, atol=1e-4)
        best = np.argsort(-rows.scores[own], axis=-1)[..., :2]
        np.testing.assert_array_equal(trace.expert_ids[own], best)


def test_scores_in_small_batches(whole):
    """Reading in batches of 3 rows gives the rows of reading at once."""
    parts = list(iter_scores(whole / "s", rows=3))
    (once,) = iter_scores(whole / "s")
    assert max(len(part.scores) for part in parts) == 3
    np.testing.assert_array_equal(np.concatenate([part.scores for part in parts]), once.scores)


def test_other_settings_do_not_resume(tmp_path):
    """Another batch size, or scores that were not kept before, cannot go on with the parts of a run."""
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_routing(build("mixtral"), REQUESTS, tmp_path / "t", scores=tmp_path / "s", progress=stop, **SETTINGS)
    with pytest.raises(InputError, match="batch_size 2, now 3"):
        capture_routing(build("mixtral"), REQUESTS, tmp_path / "t", scores=tmp_path / "s", resume=True,
                        **{**SETTINGS, "batch_size": 3})
    with pytest.raises(InputError, match="with_scores True, now False"):
        capture_routing(build("mixtral"), REQUESTS, tmp_path / "t", resume=True, **SETTINGS)
    with pytest.raises(InputError, match=r"s\.parts: the scores of request 2 are missing"):
        capture_routing(build("mixtral"), REQUESTS, tmp_path / "t", scores=tmp_path / "other" / "s", resume=True,
                        **SETTINGS)


def test_parts_are_not_overwritten(tmp_path):
    """Scores of an interrupted run are refused unless the run is resumed."""
    writer = ScoresWriter(tmp_path / "s", [0], set(), resume=False)
    writer.append(ScoreRows(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros((1, 1, 4), np.float32)))
    with pytest.raises(InputError, match="parts of an interrupted run are here"):
        ScoresWriter(tmp_path / "s", [0], set(), resume=False)
    trace = TraceWriter(tmp_path / "t", num_layers=3, top_k=2, num_experts=8, layer_ids=[0, 1, 2])
    with pytest.raises(InputError, match="scores need a path"):
        capture_routing(build("mixtral"), REQUESTS, trace, scores=tmp_path / "z", **SETTINGS)


def test_scores_need_a_router_to_read():
    """A block whose experts have no router beside them cannot give scores, and says so before a run."""
    model = build("mixtral")
    block = model.model.layers[1].mlp
    block.other = block.gate
    del block.gate
    RouterRecorder(model)
    with pytest.raises(InputError, match=r"'model\.layers\.1\.mlp\.experts' has no sibling named gate or router"):
        RouterRecorder(model, with_scores=True)


def test_a_model_of_two_stacks_is_refused():
    """An encoder and a decoder count their layers twice: whose routing a row is would be unclear."""
    two = torch.nn.ModuleDict({"encoder": build("mixtral"), "decoder": build("mixtral")})
    with pytest.raises(InputError, match=r"not one stack of layers .*\[0, 1, 2, 0, 1, 2\]"):
        RouterRecorder(two)


def bad_scores(path, kind):
    """Write a file that is no score file."""
    if kind == "text":
        path.write_text("hello")
    elif kind == "cut":
        whole = path.read_bytes()
        path.write_bytes(whole[:len(whole) // 2])
    elif kind == "header":
        pq.write_table(pa.table({"scores": [1]}), path)
    elif kind == "columns":
        table = pq.read_table(path)
        pq.write_table(table.drop_columns(["position"]), path)


@pytest.mark.parametrize(("kind", "words"), [
    ("none", "no such file"), ("text", "not a Parquet file"), ("cut", "not a Parquet file"),
    ("header", "expected a 'moesim.scores/1' file, found schema None"),
    ("columns", "the columns are not those that its header describes")])
def test_bad_score_files(tmp_path, whole, kind, words):
    """A missing, foreign, cut or altered score file is an error with its path."""
    path = tmp_path / "s"
    if kind in ("cut", "columns"):
        path.write_bytes((whole / "s").read_bytes())
    bad_scores(path, kind)
    with pytest.raises(InputError) as error:
        list(iter_scores(path))
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
