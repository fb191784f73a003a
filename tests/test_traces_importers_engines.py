"""Importers of serving engines: SGLang, vLLM, TensorRT-LLM, llama.cpp's importance matrix."""

from __future__ import annotations

import base64
import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import (
    COUNTS,
    IMATRIX_FACTS,
    LENGTHS,
    NUM_EXPERTS,
    NUM_LAYERS,
    POSITION,
    REQUEST,
    ROUTING,
    SIZES,
    SLOTS,
    TOKENS,
    TOP_K,
    gguf,
    imatrix_tensors,
    per_token_record,
    safetensors,
    sglang_per_pass,
    sglang_per_token,
    sglang_requests,
    sglang_stat,
    slot_counts,
    tensorrt_llm,
    tensorrt_llm_raw,
    vllm,
)

from moesim.errors import InputError, MissingDependencyError
from moesim.model import load_model
from moesim.traces.counts import CountTrace
from moesim.traces.importers import import_any, import_trace
from moesim.traces.importers.requests import RequestTracker
from moesim.traces.importers.safetensors_files import read_safetensors
from moesim.traces.trace import DECODE, PREFILL


def import_counts(path: Path, **options: Any) -> CountTrace:
    """Import a file that holds counts."""
    found = import_any(path, **options)
    assert isinstance(found, CountTrace)
    return found


def fails(words: str, path: Path, **options: Any) -> None:
    """The import fails with these words, in one line that starts with the path."""
    with pytest.raises(InputError) as error:
        import_any(path, **options)
    assert words in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def save(path: Path, content: Any) -> Path:
    """Write a torch.save file."""
    torch = pytest.importorskip("torch")
    torch.save(content, path)
    return path


def tensor(array: np.ndarray) -> Any:
    """Return an int32 tensor."""
    return pytest.importorskip("torch").from_numpy(np.ascontiguousarray(array, dtype=np.int32))


# --- SGLang's recorder -----------------------------------------------------------------------------------------------


def test_stat_dumps_of_a_folder_follow_one_another(tmp_path: Path) -> None:
    """Dumps are taken in the order of their names; unused rows go; divide_by undoes what all ranks counted."""
    pytest.importorskip("torch")
    sglang_stat(tmp_path)
    twice = np.zeros((3, NUM_LAYERS + 1, NUM_EXPERTS))
    twice[1, 1:] = 2 * COUNTS
    save(tmp_path / "expert_distribution_recorder_2.5.pt", {"rank": 0, "logical_count": tensor(twice)})
    found = import_counts(tmp_path)
    assert found.counts.tolist() == [COUNTS.tolist(), (2 * COUNTS).tolist()]
    assert any("option divide_by" in note for note in found.metadata["notes"])
    fails("not every count is a multiple of divide_by 2", tmp_path, divide_by=2)
    (tmp_path / "expert_distribution_recorder_1.5.pt").unlink()
    assert import_counts(tmp_path, divide_by=2).counts.tolist() == [COUNTS.tolist()]


def test_an_activation_file_of_ktransformers(tmp_path: Path) -> None:
    """A bare tensor [row, layer, expert] is read as stat when it is asked for by name."""
    path = save(tmp_path / "a.pt", tensor(COUNTS[None]))
    assert np.array_equal(import_counts(path, source_format="sglang-stat").expert_load(), COUNTS)


@pytest.mark.parametrize(("content", "words"), [
    (lambda: {"logical_count": tensor(COUNTS)}, "expected 3 axes, not empty, found shape (3, 8)"),
    (lambda: {"logical_count": tensor(COUNTS[None]).float()}, "expected whole numbers, found torch.float32"),
    (lambda: {"logical_count": tensor(COUNTS[None]).to_sparse()}, "expected a tensor"),
    (lambda: {"logical_count": tensor(COUNTS[None] - 99)}, "must not be negative"),
    (lambda: {"logical_count": [1]}, "expected a tensor, found list"),
    (lambda: {"other": 1}, "expected a tensor, found NoneType"),
    (lambda: {"logical_count": tensor(COUNTS[None] * 0)}, "every count is 0"),
])
def test_bad_stat_dumps(content: Any, words: str, tmp_path: Path) -> None:
    """What is not counts [row, layer, expert] is named."""
    fails(words, save(tmp_path / "s.pt", content()), source_format="sglang-stat")


def test_without_torch_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .pt file needs torch: one line with how to install it."""
    pytest.importorskip("torch")
    path = sglang_stat(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs the package 'torch'.*pip install 'moesim\[torch\]'"):
        import_any(path)


def test_ranks_that_counted_the_same_tokens(tmp_path: Path) -> None:
    """Without data parallelism all ranks have the same counts: one is taken, or their sum if that is asked for."""
    pytest.importorskip("torch")
    sglang_per_pass(tmp_path)
    both = import_counts(tmp_path)
    assert np.array_equal(both.expert_load(), COUNTS)
    assert "the counts of 2 ranks are added up" in both.metadata["notes"]
    fails("ranks=one: the ranks counted different tokens", tmp_path, ranks="one")
    fails("ranks must be one of auto, sum, one", tmp_path, ranks="all")
    for rank in range(2):
        record = {"forward_pass_id": 7, "rank": rank, "global_physical_count": tensor(slot_counts())}
        save(tmp_path / f"expert_distribution_recorder_1.5_{rank}.pt",
             {"records": [record], "last_physical_to_logical_map": tensor(SLOTS)})
    assert np.array_equal(import_counts(tmp_path).expert_load(), COUNTS)
    assert np.array_equal(import_counts(tmp_path, ranks="sum").expert_load(), 2 * COUNTS)
    alone = import_counts(tmp_path / "expert_distribution_recorder_1.5_1.pt")
    assert any("of rank 1 only; give the folder" in note for note in alone.metadata["notes"])


def per_pass(path: Path, rank: int, passes: list[int], **extra: Any) -> Path:
    """Write a per_pass file of one rank; pass p counts p + rank times slot_counts()."""
    records = [{"forward_pass_id": one, "rank": rank, "global_physical_count": tensor((one + rank) * slot_counts())}
               for one in passes]
    return save(path, {"records": records, **extra})


def test_passes_that_not_every_rank_has(tmp_path: Path) -> None:
    """Only passes of all ranks are added up; others are left out and counted in a note."""
    per_pass(tmp_path / "r_0.pt", 0, [1, 3, 2], last_physical_to_logical_map=tensor(SLOTS))
    per_pass(tmp_path / "r_1.pt", 1, [2, 3, 4], last_physical_to_logical_map=tensor(SLOTS))
    found = import_counts(tmp_path)
    assert found.counts.tolist() == [(5 * COUNTS).tolist(), (7 * COUNTS).tolist()]
    assert "left out 2 forward passes that not every rank recorded" in found.metadata["notes"]
    per_pass(tmp_path / "r_1.pt", 1, [5])
    fails("no forward pass that all 2 ranks recorded", tmp_path)
    per_pass(tmp_path / "r_1.pt", 0, [1])
    fails("forward pass 1 of rank 0 is there twice", tmp_path)


def test_a_recording_without_its_map(tmp_path: Path) -> None:
    """Slots cannot be read as experts: without a map the import is refused, with one it goes through."""
    path = per_pass(tmp_path / "r_0.pt", 0, [1])
    fails("--physical-to-logical FILE", path)
    np.save(tmp_path / "map.npy", SLOTS)
    assert np.array_equal(import_counts(path, physical_to_logical=tmp_path / "map.npy").expert_load(), COUNTS)
    save(path, {"records": [{"forward_pass_id": 1, "rank": 0, "global_physical_count": tensor(slot_counts())}],
                "last_physical_to_logical_map": tensor(SLOTS - 9)})
    fails("has experts outside 0", path)


def test_tokens_of_two_ranks(tmp_path: Path) -> None:
    """A rank with the same tokens is left out; one with its own is another set of requests in the same passes."""
    pytest.importorskip("torch")
    path = sglang_per_token(tmp_path)
    alone = import_trace(path)
    (tmp_path / "t_1.pt").write_bytes(path.read_bytes())
    both = import_trace(tmp_path)
    assert np.array_equal(both.expert_ids, alone.expert_ids)
    assert any("left out t_1.pt: its tokens are another rank's" in note for note in both.metadata["notes"])
    save(tmp_path / "t_1.pt", {"records": [per_token_record(1, [0, 1, 2], [3])],
                               "last_physical_to_logical_map": tensor(SLOTS)})
    both = import_trace(tmp_path)
    assert both.num_tokens == TOKENS + 3
    assert both.request_id.tolist() == [*REQUEST.tolist(), 2, 2, 2]
    assert set(both.step[-3:].tolist()) == {1}
    assert both.token_id is not None
    assert both.token_id.tolist() == [*range(100, 100 + TOKENS), 100, 101, 102]


def test_padded_and_idle_passes(tmp_path: Path) -> None:
    """Rows beyond the tokens of a pass are a captured graph's padding; passes of no tokens are passed over."""
    record = per_token_record(0, [0, 1], [2])
    record["topk_ids_of_layer"] = tensor(np.concatenate([record["topk_ids_of_layer"].numpy()] * 2, axis=1))
    idle = per_token_record(1, [], None)
    path = save(tmp_path / "t.pt", {"records": [record, idle], "last_physical_to_logical_map": tensor(SLOTS)})
    found = import_trace(path)
    assert np.array_equal(found.expert_ids, ROUTING[:2])
    assert any("padding of a captured graph" in note for note in found.metadata["notes"])


@pytest.mark.parametrize(("change", "words"), [
    ({"positions": [0]}, "1 positions for 3 input_ids"),
    ({"positions": [0, 2, 1]}, "positions of a stretch of 3 tokens do not rise by one"),
    ({"extend_seq_lens": [2]}, "extend_seq_lens [2] do not add up to 3 tokens"),
    ({"extend_seq_lens": [3, 0]}, "extend_seq_lens [3, 0] do not add up"),
    ({"input_ids": ["a"]}, "input_ids must be a list of whole numbers"),
    ({"forward_pass_id": -1}, "forward_pass_id must be a whole number"),
    ({"topk_ids_of_layer": None}, "expected a tensor, found NoneType"),
])
def test_bad_per_token_records(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    """A record whose parts disagree is named with its number."""
    pytest.importorskip("torch")
    record = per_token_record(0, [0, 1, 2], [3]) | change
    path = save(tmp_path / "t.pt", {"records": [record], "last_physical_to_logical_map": tensor(SLOTS)})
    fails(words, path, source_format="sglang-per-token")


# --- requests put together from positions ----------------------------------------------------------------------------


def batches(lengths: list[int], prompts: list[int], starts: list[int]) -> list[tuple[list[tuple[int, int]], bool]]:
    """Return the passes of a server with continuous batching: [(request, position) ...] and whether it is a prompt.

    Request r arrives at pass starts[r]; its prompt is a pass of its own, then it decodes with the others, in order of
    arrival.
    """
    running: list[int] = []
    done = [0] * len(lengths)
    passes: list[tuple[list[tuple[int, int]], bool]] = []
    clock = 0
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        new = [r for r in range(len(lengths)) if starts[r] <= clock and done[r] == 0]
        if new:
            passes.append(([(r, p) for r in new for p in range(prompts[r])], True))
            for r in new:
                done[r] = prompts[r]
            running += new
        else:
            running = [r for r in running if done[r] < lengths[r]]
            if running:
                passes.append(([(r, done[r]) for r in running], False))
                for r in running:
                    done[r] += 1
        clock += 1
    return passes


def test_continuous_batching_is_taken_apart() -> None:
    """With prompts of different lengths, every token goes back to its request (numbered by first appearance)."""
    lengths, prompts, starts = [9, 30, 14, 25], [3, 11, 7, 20], [0, 1, 5, 6]
    tracker = RequestTracker()
    truth: list[int] = []
    for step, (rows, prompt) in enumerate(batches(lengths, prompts, starts)):
        positions = [position for _, position in rows]
        truth += [request for request, _ in rows]
        if prompt:
            tracker.extend_pass(positions, [prompts[r] for r in dict.fromkeys(r for r, _ in rows)], PREFILL, DECODE,
                                step, "here")
        else:
            tracker.decode_pass(positions, DECODE, step)
    assert tracker.request == truth
    assert tracker.notes() == ("the recorder stores no request ids: 4 requests are put together from positions",)
    assert tracker.phase.count(PREFILL) == sum(prompts)


def test_what_cannot_be_told_apart_is_said() -> None:
    """Two requests at one position, of which one ended: the order of the batch decides, and a note counts it."""
    tracker = RequestTracker()
    tracker.extend_pass([0, 1, 0, 1], [2, 2], PREFILL, DECODE, 0, "here")
    tracker.decode_pass([2], DECODE, 1)
    assert tracker.request == [0, 0, 1, 1, 0]
    assert any(note.startswith("1 times several open requests") for note in tracker.notes())


def test_requests_that_began_before_the_recording() -> None:
    """A token at a position that no open request awaits begins a request, which a note counts."""
    tracker = RequestTracker()
    tracker.decode_pass([17, 40], DECODE, 0)
    tracker.decode_pass([18, 41], DECODE, 1)
    assert (tracker.request, tracker.position) == ([0, 1, 0, 1], [17, 40, 18, 41])
    assert any(note.startswith("2 requests do not start at position 0") for note in tracker.notes())


# --- replies of SGLang and vLLM --------------------------------------------------------------------------------------


def test_sizes_of_sglang_replies_come_from_the_model(tmp_path: Path) -> None:
    """The payload has no shape: it is refused without sizes; a model gives them and names the MoE layers."""
    fails("the size is not in the reply: give --model-config", sglang_requests(tmp_path))
    spec = load_model("deepseek-v2-lite")
    rng = np.random.default_rng(0)
    ids = np.zeros((5, spec.num_layers, spec.top_k), "<i4")
    ids[:, 1:] = rng.permuted(np.tile(np.arange(64), (5, 26, 1)), axis=2)[..., :6]
    (tmp_path / "one.json").write_text(json.dumps(
        {"sglext": {"routed_experts": base64.b64encode(ids.tobytes()).decode()}, "choices": [{"index": 0}],
         "usage": {"prompt_tokens": 4, "completion_tokens": 2}}))
    found = import_trace(tmp_path / "one.json", model_config="deepseek-v2-lite")
    assert np.array_equal(found.expert_ids, ids[:, 1:])
    assert found.layer_ids.tolist() == list(range(1, 27))
    assert found.phase.tolist() == [PREFILL] * 4 + [DECODE]


@pytest.mark.parametrize(("payload", "words"), [
    (5, "must be base64 text, found 5"), ("***", "is not base64"), ("AAAA", "3 bytes are not rows of 3 layers x 2"),
    ("", "0 bytes are not rows")])
def test_bad_sglang_payloads(payload: Any, words: str, tmp_path: Path) -> None:
    """A payload that is not rows of int32 is named with its reply."""
    (tmp_path / "r.json").write_text(json.dumps([{"meta_info": {"routed_experts": payload}}]))
    with pytest.raises(InputError) as error:
        import_any(tmp_path / "r.json", source_format="sglang-requests", **SIZES)
    assert words in str(error.value)
    assert "r.json[0]" in str(error.value)


def vllm_reply(ids: np.ndarray, prompt: int | None, output: int | None) -> dict[str, Any]:
    """Return a vLLM reply with these ids."""
    stream = io.BytesIO()
    np.save(stream, ids)
    usage = {"prompt_tokens": prompt, "completion_tokens": output}
    return {"choices": [{"routed_experts": base64.b64encode(stream.getvalue()).decode()}], "usage": usage}


def test_replies_that_start_late(tmp_path: Path) -> None:
    """Fewer rows than tokens - 1: the reply starts after the first token, and positions say so."""
    ids = ROUTING[:4].astype(np.uint8)
    (tmp_path / "r.json").write_text(json.dumps(vllm_reply(ids, 6, 2)))
    found = import_trace(tmp_path / "r.json")
    assert found.position.tolist() == [3, 4, 5, 6]
    assert found.phase.tolist() == [PREFILL] * 3 + [DECODE]
    assert any("start after the first token" in note for note in found.metadata["notes"])
    (tmp_path / "r.json").write_text(json.dumps(vllm_reply(ids, 2, 2)))
    fails("4 rows for 4 tokens, expected at most 3", tmp_path / "r.json")


def test_uint16_and_dense_rows_of_vllm(tmp_path: Path) -> None:
    """Models of more than 256 experts come as uint16; rows of dense layers are zeros and are dropped."""
    ids = np.insert(ROUTING[:4] * 40, 0, 0, axis=1).astype(np.uint16)
    (tmp_path / "r.jsonl").write_text(json.dumps(vllm_reply(ids, None, None)) + "\n")
    found = import_trace(tmp_path / "r.jsonl")
    assert np.array_equal(found.expert_ids, ROUTING[:4] * 40)
    assert found.layer_ids.tolist() == [1, 2, 3]
    assert any("do not say how many tokens are prompt" in note for note in found.metadata["notes"])


def test_offline_arrays_of_vllm(tmp_path: Path) -> None:
    """A folder of .npy arrays is one request each, in order of their names."""
    for request in range(len(LENGTHS)):
        np.save(tmp_path / f"request{request}.npy", ROUTING[request == REQUEST].astype(np.uint8))
    found = import_trace(tmp_path)
    assert np.array_equal(found.expert_ids, ROUTING)
    assert (found.request_id.tolist(), found.position.tolist()) == (REQUEST.tolist(), POSITION.tolist())
    np.save(tmp_path / "request2.npy", ROUTING[:, :2].astype(np.uint8))
    with pytest.raises(InputError, match=r"request2.npy: \[layer, k\] is \(2, 2\), in the first reply \(3, 2\)"):
        import_trace(tmp_path)


def test_replies_without_routing(tmp_path: Path) -> None:
    """An engine that was not asked for them returns none, and the error says so."""
    (tmp_path / "r.json").write_text('{"choices": [{"text": "x"}, 5], "usage": null}')
    fails("no routed experts in any reply", tmp_path / "r.json", source_format="vllm")
    fails("no routed experts in any reply", tmp_path / "r.json", source_format="sglang-requests", **SIZES)
    path = vllm(tmp_path)
    path.write_text(path.read_text().replace("routed_experts\": \"k05V", "routed_experts\": \"AAAA"))
    with pytest.raises(InputError, match=r"routed_experts is not a \.npy file"):
        import_any(path, source_format="vllm")


# --- TensorRT-LLM ----------------------------------------------------------------------------------------------------


def test_tensors_are_those_that_the_safetensors_package_writes(tmp_path: Path) -> None:
    """Our reader returns what the package saved."""
    library = pytest.importorskip("safetensors.numpy")
    tensors: dict[str, np.ndarray] = {"1_2": np.arange(6).reshape(2, 3), "x": np.arange(3, dtype=np.int32), "f": np.ones((1, 2), np.float32)}
    library.save_file(tensors, tmp_path / "t.safetensors", metadata={"a": "b"})
    found = read_safetensors(tmp_path / "t.safetensors")
    assert sorted(found) == sorted(tensors)
    assert all(np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in tensors.items())
    safetensors(tmp_path / "ours.safetensors", {"1_2": tensors["1_2"]})
    assert np.array_equal(library.load_file(tmp_path / "ours.safetensors")["1_2"], tensors["1_2"])


def test_summed_and_raw_statistics_agree(tmp_path: Path) -> None:
    """Both variants in one folder are ambiguous; read by name, counting the ids gives the counts."""
    tensorrt_llm(tmp_path)
    tensorrt_llm_raw(tmp_path)
    fails("could be tensorrt-llm or tensorrt-llm-raw: name the source format", tmp_path)
    counts = import_counts(tmp_path, source_format="tensorrt-llm")
    trace = import_trace(tmp_path, source_format="tensorrt-llm-raw")
    for window, iteration in enumerate((50, 51)):
        ids = trace.expert_ids[trace.step == iteration]
        for layer in range(NUM_LAYERS):
            assert np.array_equal(np.bincount(ids[:, layer].ravel(), minlength=NUM_EXPERTS), counts.counts[window, layer])
    assert any("every token is a request of its own" in note for note in trace.metadata["notes"])


def test_ranks_of_tensorrt_llm(tmp_path: Path) -> None:
    """Ranks with the same tokens count once; a missing rank is an error; a branch's names are read too."""
    ids = {f"1_{layer}": ROUTING[:, layer].astype(np.int32) for layer in range(NUM_LAYERS)}
    for rank in range(2):
        safetensors(tmp_path / f"token_selected_experts_rank{rank}.safetensors", ids)
    assert import_trace(tmp_path).num_tokens == TOKENS
    assert import_trace(tmp_path, ranks="sum").num_tokens == 2 * TOKENS
    (tmp_path / "token_selected_experts_rank0.safetensors").unlink()
    fails("files of ranks 1: some rank is missing", tmp_path)


@pytest.mark.parametrize(("tensors", "words"), [
    ({"1_3": np.arange(8), "2_3": np.arange(8), "1_4": np.arange(8)}, "iteration 2 has no layer 4"),
    ({"1_3": np.arange(7)}, "counts 7 experts, meta_info.json says 8"),
    ({"one": np.arange(8)}, "expected tensors called ITERATION_LAYER, found 'one'"),
    ({"1_3": np.arange(8).reshape(2, 4)}, "expected whole numbers of 1 axes"),
    ({"1_3": np.arange(8), "01_3": np.arange(8)}, "iteration 1, layer 3 is there twice"),
    ({}, "no tensors"),
])
def test_bad_statistics(tensors: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    """A hole in the table, another number of experts, a name that is none."""
    (tmp_path / "meta_info.json").write_text('{"num_experts": 8, "num_experts_per_token": 2}')
    safetensors(tmp_path / "rank0.safetensors", tensors)
    fails(words, tmp_path)


# --- llama.cpp's importance matrix -----------------------------------------------------------------------------------


def test_an_imatrix_says_how_many_experts_a_token_uses(tmp_path: Path) -> None:
    """The counts of a layer are tokens times k: the note says so; GGUF version 2 reads the same."""
    for version in (2, 3):
        gguf(tmp_path / "i.gguf", IMATRIX_FACTS, imatrix_tensors(), version)
        found = import_counts(tmp_path / "i.gguf")
        assert np.array_equal(found.expert_load(), COUNTS)
        assert found.metadata["notes"] == [f"{TOKENS} tokens, {TOP_K} experts each"]
    tensors = imatrix_tensors()
    for part in ("gate", "up", "down"):
        tensors[f"blk.1.ffn_{part}_exps.weight.counts"] = np.full((NUM_EXPERTS, 1), 2.0**24)
    gguf(tmp_path / "i.gguf", IMATRIX_FACTS, tensors)
    notes = import_counts(tmp_path / "i.gguf").metadata["notes"]
    assert notes[0].startswith("counts from 16777216 on are rounded")
    assert "selections per layer: layers differ" in notes[1]


def _without(key: str) -> list[tuple[str, int, bytes]]:
    return [fact for fact in IMATRIX_FACTS if fact[0] != key]


@pytest.mark.parametrize(("facts", "change", "words"), [
    (_without("general.type"), {}, "a GGUF file of type None, expected 'imatrix'"),
    (IMATRIX_FACTS, {"blk.1.ffn_up_exps.weight.counts": np.full((8, 1), 3.0)}, "of one layer have different counts"),
    (IMATRIX_FACTS, {f"blk.1.ffn_{p}_exps.weight.counts": np.full((8, 1), 0.5) for p in ("gate", "up", "down")},
     "counts must be whole numbers"),
    (IMATRIX_FACTS, {f"blk.1.ffn_{p}_exps.weight.counts": np.full((7, 1), 1.0) for p in ("gate", "up", "down")},
     "layers with different numbers of experts"),
    ([*IMATRIX_FACTS, ("general.alignment", 4, struct.pack("<I", 0))], {}, "general.alignment must be a multiple of 8, got 0"),
    ([*IMATRIX_FACTS, ("x", 99, b"")], {}, "has the unknown type 99"),
])
def test_bad_imatrix_files(facts: Any, change: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    """A GGUF file that is no imatrix of experts is named."""
    gguf(tmp_path / "i.gguf", facts, imatrix_tensors() | change)
    fails(words, tmp_path / "i.gguf", source_format="imatrix")


def test_the_old_imatrix_and_dense_models_are_refused(tmp_path: Path) -> None:
    """A .dat keeps no counts per expert; a dense model has no expert tensors."""
    name = b"blk.0.ffn_up_exps.weight"
    (tmp_path / "i.dat").write_bytes(struct.pack("<ii", 1, len(name)) + name + bytes(32))
    fails("the old .dat form of an imatrix keeps no counts per expert", tmp_path / "i.dat")
    gguf(tmp_path / "i.gguf", IMATRIX_FACTS, {"blk.0.attn_q.weight.counts": np.ones((1, 1))})
    fails("no counts of expert tensors", tmp_path / "i.gguf")
