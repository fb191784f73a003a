"""Small files of every format that moesim imports, written by hand from the formats' descriptions.

Not a test module: test files import it by its name. Every sample holds the routing of `ROUTING` (or counts of it), so
that one test can compare all of them; nothing here uses the readers.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_EXPERTS, TOP_K, NUM_LAYERS = 8, 2, 3
LENGTHS = (4, 7)  # two requests; of each the first three tokens are prompt
PROMPT = 3
TOKENS = sum(LENGTHS)


def _routing() -> np.ndarray:
    rng = np.random.default_rng(5)
    ids = np.array([[rng.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(NUM_LAYERS)] for _ in range(TOKENS)])
    ids[0, 0] = (NUM_EXPERTS - 1, 0)
    return ids


ROUTING = _routing()  # int64[token, layer, k]
WEIGHTS = np.stack([np.full((TOKENS, NUM_LAYERS), 0.625), np.full((TOKENS, NUM_LAYERS), 0.25)], axis=2)
REQUEST = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
POSITION = np.concatenate([np.arange(length) for length in LENGTHS])
COUNTS = np.stack([np.bincount(ROUTING[:, layer].ravel(), minlength=NUM_EXPERTS) for layer in range(NUM_LAYERS)])
SLOTS = np.array([[3, 1, 0, 2, 7, 6, 5, 4, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7, 7, 1], [7, 6, 5, 4, 3, 2, 1, 0, 2, 2]])


def slots_of(ids: np.ndarray) -> np.ndarray:
    """Return the last slot that holds each expert of int[token, layer, k] under SLOTS."""
    last = np.array([[np.flatnonzero(row == expert)[-1] for expert in range(NUM_EXPERTS)] for row in SLOTS])
    return last[np.arange(NUM_LAYERS)[:, None], ids]


def slot_counts() -> np.ndarray:
    """Return int64[layer, slot], how often each slot is used when `slots_of` chooses."""
    slots = slots_of(ROUTING)
    return np.stack([np.bincount(slots[:, layer].ravel(), minlength=SLOTS.shape[1]) for layer in range(NUM_LAYERS)])


def softmax_rows(ids: np.ndarray) -> np.ndarray:
    """Return float32[token, layer, expert]: shares of one that are largest at the chosen experts, in their order."""
    rows = np.full((*ids.shape[:2], NUM_EXPERTS), 0.125 / (NUM_EXPERTS - TOP_K))
    np.put_along_axis(rows, ids, np.broadcast_to([0.625, 0.25], ids.shape), axis=2)
    return rows.astype(np.float32)


@dataclass(frozen=True)
class Sample:
    """How to write one file (or folder) of a format, and what importing it must be told."""

    name: str
    write: Callable[[Path], Path]
    holds: str  # "routing", "anonymous" (routing without requests), "counts" or "arrivals"
    options: dict[str, Any] = field(default_factory=dict)
    detected: bool = True
    needs_torch: bool = False


def npz(folder: Path) -> Path:
    """expert_ids, gate_weights and offsets."""
    np.savez_compressed(folder / "r.npz", expert_ids=ROUTING.astype(np.uint8), gate_weights=WEIGHTS,
                        offsets=np.array([0, *np.cumsum(LENGTHS)]))
    return folder / "r.npz"


def npy(folder: Path) -> Path:
    """Header by hand: magic, version 1.0, length, a padded dict; then the values, layer first."""
    values = np.ascontiguousarray(ROUTING.transpose(1, 0, 2).astype("<i4")).tobytes()
    text = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({NUM_LAYERS}, {TOKENS}, {TOP_K}), }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    (folder / "r.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + values)
    return folder / "r.npy"


def exflow(folder: Path) -> Path:
    """int[token, layer], the first choice only."""
    np.save(folder / "e.npy", ROUTING[:, :, 0])
    return folder / "e.npy"


def moe_infinity(folder: Path) -> Path:
    """float[sequence, layer, expert], one row never used."""
    found = np.zeros((3, NUM_LAYERS, NUM_EXPERTS), np.float32)
    for token in range(TOKENS):
        for layer in range(NUM_LAYERS):
            found[REQUEST[token], layer, ROUTING[token, layer]] += 1
    np.save(folder / "eam.npy", found)
    return folder / "eam.npy"


def jsonl(folder: Path) -> Path:
    """A meta line, then a route per token and layer."""
    lines = [{"type": "meta", "model_id": "m", "layers_logged": list(range(NUM_LAYERS)), "top_k": TOP_K}]
    lines += [{"type": "route", "req_id": f"r{REQUEST[t]}", "token_idx": int(POSITION[t]), "layer": layer,
               "topk_ids": ROUTING[t, layer].tolist(), "topk_weights": WEIGHTS[t, layer].tolist()}
              for t in range(TOKENS) for layer in range(NUM_LAYERS)]
    return _lines(folder / "moe_routes.jsonl", lines)


def _lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sglang_stat(folder: Path) -> Path:
    """logical_count int32[buffer, all layers, expert]: layer 0 is dense, the last row was never used."""
    import torch

    counts = np.zeros((2, NUM_LAYERS + 1, NUM_EXPERTS), np.int32)
    counts[0, 1:] = COUNTS
    torch.save({"rank": 0, "logical_count": torch.from_numpy(counts), "average_utilization_rate_over_window": None},
               folder / "expert_distribution_recorder_1.5.pt")
    return folder / "expert_distribution_recorder_1.5.pt"


def sglang_per_pass(folder: Path) -> Path:
    """One file per rank: rank 0 counted everything but one selection, rank 1 that one."""
    import torch

    first, second = slot_counts(), np.zeros_like(slot_counts())
    slot = int(slots_of(ROUTING)[0, 0, 0])
    first[0, slot] -= 1
    second[0, slot] += 1
    for rank, counts in enumerate((first, second)):
        record = {"forward_pass_id": 7, "rank": rank, "gatherer_key": "primary",
                  "global_physical_count": torch.from_numpy(counts.astype(np.int32))}
        torch.save({"records": [record], "last_physical_to_logical_map": torch.from_numpy(SLOTS)},
                   folder / f"expert_distribution_recorder_1.5_{rank}.pt")
    return folder


def per_token_record(passes: int, tokens: list[int], lengths: list[int] | None) -> dict[str, Any]:
    """Return one forward pass of rank 0 with these rows of ROUTING; slots, padded to 8 columns."""
    import torch

    ids = np.full((NUM_LAYERS, len(tokens), 8), -1, np.int32)
    ids[:, :, :TOP_K] = slots_of(ROUTING)[tokens].transpose(1, 0, 2)
    return {"forward_pass_id": passes, "rank": 0, "gatherer_key": "primary", "input_ids": [100 + t for t in tokens],
            "positions": [int(POSITION[t]) for t in tokens], "extend_seq_lens": lengths,
            "forward_mode": 2 if lengths is None else 1, "topk_ids_of_layer": torch.from_numpy(ids),
            "misc_objects": [], "global_physical_count": torch.zeros((NUM_LAYERS, SLOTS.shape[1]), dtype=torch.int32)}


def sglang_per_token(folder: Path) -> Path:
    """One prompt and the first token of another; the first request decodes; the rest of that prompt; it decodes."""
    import torch

    second = LENGTHS[0]
    records = [per_token_record(0, [*range(PROMPT), second], [PROMPT, 1]), per_token_record(1, [PROMPT], None),
               per_token_record(2, [*range(second + 1, second + PROMPT)], [PROMPT - 1])]
    records += [per_token_record(3 + i, [second + PROMPT + i], None) for i in range(LENGTHS[1] - PROMPT)]
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(SLOTS)}, folder / "t_0.pt")
    return folder / "t_0.pt"


def sglang_requests(folder: Path) -> Path:
    """Native replies: base64 of int32[token - 1, layer, k], one reply per line."""
    replies = []
    for request, length in enumerate(LENGTHS):
        data = ROUTING[request == REQUEST].astype("<i4").tobytes()
        replies.append({"text": "", "meta_info": {"prompt_tokens": PROMPT, "completion_tokens": length + 1 - PROMPT,
                                                  "routed_experts": base64.b64encode(data).decode()}})
    return _lines(folder / "replies.jsonl", replies)


def vllm(folder: Path) -> Path:
    """OpenAI replies in a list: base64 of a .npy file, uint8[token - 1, layer, k]."""
    replies = []
    for request, length in enumerate(LENGTHS):
        stream = io.BytesIO()
        np.save(stream, ROUTING[request == REQUEST].astype(np.uint8))
        choice = {"index": 0, "text": "", "routed_experts": base64.b64encode(stream.getvalue()).decode()}
        replies.append({"id": "x", "choices": [choice],
                        "usage": {"prompt_tokens": PROMPT, "completion_tokens": length + 1 - PROMPT}})
    (folder / "replies.json").write_text(json.dumps(replies))
    return folder / "replies.json"


def safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file: 8-byte length, JSON table, bytes."""
    codes = {"int64": "I64", "int32": "I32"}
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        table[name] = {"dtype": codes[str(array.dtype)], "shape": list(array.shape),
                       "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def tensorrt_llm(folder: Path) -> Path:
    """Two iterations (of the two requests), layers 3 ... 5, two ranks that share the tokens."""
    _meta(folder)
    tensors: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    for request in range(len(LENGTHS)):
        rows = ROUTING[request == REQUEST]
        for layer in range(NUM_LAYERS):
            for rank, part in enumerate((rows[:2], rows[2:])):
                counts = np.bincount(part[:, layer].ravel(), minlength=NUM_EXPERTS)
                tensors[rank][f"{50 + request}_{layer + 3}"] = counts.astype(np.int64)
    for rank, found in enumerate(tensors):
        safetensors(folder / f"rank{rank}.safetensors", found)
    return folder


def _meta(folder: Path) -> None:
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": NUM_EXPERTS, "num_experts_per_token": TOP_K}))


def tensorrt_llm_raw(folder: Path) -> Path:
    """Ids of the tokens of two iterations, one rank."""
    _meta(folder)
    safetensors(folder / "rank0_raw.safetensors", {
        f"{50 + request}_{layer + 3}": ROUTING[request == REQUEST][:, layer].astype(np.int32)
        for request in range(len(LENGTHS)) for layer in range(NUM_LAYERS)})
    return folder


def gguf(path: Path, facts: list[tuple[str, int, bytes]], tensors: dict[str, np.ndarray], version: int = 3) -> None:
    """Write a GGUF file: header, key-value pairs (key, kind, bytes), tensor table, aligned F32 values."""
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(facts))
    for key, kind, value in facts:
        head += text(key) + struct.pack("<I", kind) + value
    body = b""
    for name, array in tensors.items():
        head += text(name) + struct.pack("<I", array.ndim)
        head += b"".join(struct.pack("<Q", size) for size in array.shape[::-1]) + struct.pack("<IQ", 0, len(body))
        body += array.astype("<f4").tobytes()
        body += b"\0" * (-len(body) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)


def gguf_text(value: str) -> bytes:
    """Return a GGUF string value."""
    return struct.pack("<Q", len(value)) + value.encode()


IMATRIX_FACTS = [
    ("general.type", 8, gguf_text("imatrix")),
    ("imatrix.datasets", 9, struct.pack("<IQ", 8, 1) + gguf_text("wiki.txt")),
    ("imatrix.chunk_count", 4, struct.pack("<I", 1)),
    ("imatrix.chunk_size", 4, struct.pack("<I", TOKENS)),
]


def imatrix_tensors() -> dict[str, np.ndarray]:
    """Return the tensors of an imatrix: a dense one, and three expert ones per layer with the same counts."""
    tensors = {"blk.0.attn_q.weight.in_sum2": np.ones((1, 4)), "blk.0.attn_q.weight.counts": np.full((1, 1), TOKENS)}
    for layer in range(NUM_LAYERS):
        for part in ("gate", "up", "down"):
            name = f"blk.{layer + 1}.ffn_{part}_exps.weight"
            tensors[f"{name}.in_sum2"] = np.ones((NUM_EXPERTS, 4))
            tensors[f"{name}.counts"] = COUNTS[layer].reshape(NUM_EXPERTS, 1).astype(float)
    return tensors


def imatrix(folder: Path) -> Path:
    """Counts of blk.1 ... blk.3; blk.0 is dense."""
    gguf(folder / "imatrix.gguf", IMATRIX_FACTS, imatrix_tensors())
    return folder / "imatrix.gguf"


def passes() -> list[tuple[int, np.ndarray]]:
    """Return (layer, ids[token, k]) in the order of llama.cpp: per request its prompt (all logits asked for), then decode."""
    found = []
    for request, length in enumerate(LENGTHS):
        rows = ROUTING[request == REQUEST]
        for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, length))]:
            found += [(layer, rows[start:end, layer]) for layer in range(NUM_LAYERS)]
    return found


def mblt(folder: Path) -> Path:
    """int32 stream: MBLT, 1, experts; then layer, k, tokens, ids."""
    data = struct.pack("<4sii", b"MBLT", 1, NUM_EXPERTS)
    for layer, ids in passes():
        data += struct.pack(f"<iii{ids.size}i", layer, TOP_K, len(ids), *ids.ravel().tolist())
    (folder / "t.mblt").write_bytes(data)
    return folder / "t.mblt"


def expert_log(folder: Path) -> Path:
    """Log lines of the passes among others."""
    lines = ["llama_model_loader: loaded", "EXPERT is a word"]
    lines += [f"EXPERT|L{layer}|T{len(ids)}: " + " ".join(f"[{','.join(map(str, row))}]" for row in ids.tolist())
              for layer, ids in passes()]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    return folder / "log.txt"


def rtrace(folder: Path) -> Path:
    """RTRACE01, int32 experts, int32 0; then int32 token, int32 layer, float32[expert]; layer by layer per request."""
    data = b"RTRACE01" + struct.pack("<ii", NUM_EXPERTS, 0)
    rows = softmax_rows(ROUTING)
    for request in range(len(LENGTHS)):
        for layer in range(NUM_LAYERS):
            for token in np.flatnonzero(request == REQUEST):
                data += struct.pack("<ii", int(POSITION[token]), layer) + rows[token, layer].tobytes()
    (folder / "t.rtrace").write_bytes(data)
    return folder / "t.rtrace"


def _phase(token: int) -> str:
    return "prefill" if POSITION[token] < PROMPT else "decode"


def policylang(folder: Path) -> Path:
    """A header, then rows p, t, l, e, s, ti, ph."""
    rows = [{"p": int(REQUEST[t]), "t": int(POSITION[t]), "l": layer, "e": ROUTING[t, layer].tolist(),
             "s": WEIGHTS[t, layer].tolist(), "ti": 100 + t, "ph": _phase(t)}
            for t in range(TOKENS) for layer in range(NUM_LAYERS)]
    head = {"model_name": "m", "num_layers": NUM_LAYERS, "num_experts": NUM_EXPERTS, "top_k": TOP_K,
            "num_entries": len(rows), "records_full_softmax": False}
    return _lines(folder / "trace.jsonl", [head, *rows])


def policylang_parquet(folder: Path) -> Path:
    """The same as columns."""
    cells = [(t, layer) for t in range(TOKENS) for layer in range(NUM_LAYERS)]
    table = {
        "prompt_id": pa.array([int(REQUEST[t]) for t, _ in cells], pa.int32()),
        "token_idx": pa.array([int(POSITION[t]) for t, _ in cells], pa.int32()),
        "layer_idx": pa.array([layer for _, layer in cells], pa.int32()),
        "selected_experts": pa.array([ROUTING[cell].tolist() for cell in cells], pa.list_(pa.int32())),
        "router_scores": pa.array([WEIGHTS[cell].tolist() for cell in cells], pa.list_(pa.float32())),
        "token_id": pa.array([100 + t for t, _ in cells], pa.int32()),
        "phase": pa.array([_phase(t) for t, _ in cells])}
    pq.write_table(pa.table(table), folder / "trace.parquet", compression="zstd")
    return folder / "trace.parquet"


def moe_beyond(folder: Path) -> Path:
    """One file per prompt, layer by layer, with an embedding as text."""
    for request in range(len(LENGTHS)):
        lines = ["Layer ID,Batch Number,Token,Activated Expert IDs,Token Embedding Vector"]
        lines += [f'{layer},0,"a,b","{ROUTING[t, layer].tolist()}","[0.5, -1e-3]"'
                  for layer in range(NUM_LAYERS) for t in np.flatnonzero(request == REQUEST)]
        (folder / f"prompt_{request}_data.csv").write_text("\r\n".join(lines) + "\r\n")
    return folder


def moe_atlas(folder: Path) -> Path:
    """One document per sequence."""
    for request in range(len(LENGTHS)):
        activations = [{"layer": layer, "token_idx": int(POSITION[t]), "expert_idx": int(ROUTING[t, layer, slot]),
                        "gate_weight": WEIGHTS[t, layer, slot]}
                       for t in np.flatnonzero(request == REQUEST) for layer in range(NUM_LAYERS) for slot in range(TOP_K)]
        (folder / f"trace_{request}.json").write_text(json.dumps(
            {"model_id": "m", "num_layers": NUM_LAYERS, "num_experts": NUM_EXPERTS, "top_k": TOP_K,
             "token_ids": (100 + np.flatnonzero(request == REQUEST)).tolist(), "activations": activations}))
    return folder


def counts_csv(folder: Path) -> Path:
    """layer_id, expert_id, count."""
    lines = ["layer_id,expert_id,count"]
    lines += [f"{layer},{expert},{COUNTS[layer, expert]}" for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
    (folder / "c.csv").write_text("\n".join(lines) + "\n")
    return folder / "c.csv"


def fiddler(folder: Path) -> Path:
    """expert_popularity [layer][expert]."""
    (folder / "p.json").write_text(json.dumps({"total_input_tokens": TOKENS, "expert_popularity": COUNTS.tolist()}))
    return folder / "p.json"


def mooncake(folder: Path) -> Path:
    """Milliseconds and lengths."""
    return _lines(folder / "m.jsonl", [
        {"timestamp": 1000 * i, "input_length": 10 + i, "output_length": 5, "hash_ids": [0, i]} for i in range(4)])


def azure(folder: Path) -> Path:
    """Times with seven digits of a second."""
    rows = [f"2023-11-16 18:17:0{i}.5000000,{10 + i},5" for i in range(4)]
    (folder / "a.csv").write_text("\r\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\r\n")
    return folder / "a.csv"


def burst_gpt(folder: Path) -> Path:
    """Seconds; one request failed."""
    rows = [f"{5 + i},ChatGPT,{10 + i},5,{15 + i},Conversation log" for i in range(4)]
    rows.insert(2, "6,GPT-4,99,0,99,API log")
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    (folder / "b.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder / "b.csv"


def serve_gen(folder: Path) -> Path:
    """Seconds with a fraction."""
    rows = [f"{i},{0.5 + i},{10 + i},5" for i in range(4)]
    (folder / "s.csv").write_text("\n".join(["request_id,timestamp,input_tokens,output_tokens", *rows]) + "\n")
    return folder / "s.csv"


def vllm_bench(folder: Path) -> Path:
    """A detailed result."""
    (folder / "result.json").write_text(json.dumps({
        "duration": 4.0, "completed": 4, "input_lens": [10, 11, 12, 13], "output_lens": [5, 5, 5, 5],
        "start_times": [100.5, 101.5, 102.5, 103.5], "ttfts": [0.1] * 4}, indent=1))
    return folder / "result.json"


AXES = {"axes": "layer,token,k", "offsets": [0, *np.cumsum(LENGTHS).tolist()]}
SIZES = {"num_layers": NUM_LAYERS, "top_k": TOP_K}
SAMPLES = [
    Sample("npz", npz, "routing"),
    Sample("npy", npy, "routing", AXES),
    Sample("exflow", exflow, "first choice", {"offsets": AXES["offsets"]}, detected=False),
    Sample("moe-infinity", moe_infinity, "counts"),
    Sample("jsonl", jsonl, "routing"),
    Sample("sglang-stat", sglang_stat, "counts", needs_torch=True),
    Sample("sglang-per-pass", sglang_per_pass, "counts", needs_torch=True),
    Sample("sglang-per-token", sglang_per_token, "routing", needs_torch=True),
    Sample("sglang-requests", sglang_requests, "routing", SIZES),
    Sample("vllm", vllm, "routing"),
    Sample("tensorrt-llm", tensorrt_llm, "counts"),
    Sample("tensorrt-llm-raw", tensorrt_llm_raw, "anonymous"),
    Sample("imatrix", imatrix, "counts"),
    Sample("mblt", mblt, "routing"),
    Sample("expert-log", expert_log, "routing"),
    Sample("rtrace", rtrace, "routing", {"top_k": TOP_K}),
    Sample("moe-policylang", policylang, "routing"),
    Sample("moe-policylang-parquet", policylang_parquet, "routing"),
    Sample("moe-beyond", moe_beyond, "routing"),
    Sample("moe-atlas", moe_atlas, "routing"),
    Sample("counts-csv", counts_csv, "counts"),
    Sample("fiddler", fiddler, "counts"),
    Sample("mooncake", mooncake, "arrivals"),
    Sample("azure-llm", azure, "arrivals"),
    Sample("burstgpt", burst_gpt, "arrivals"),
    Sample("servegen", serve_gen, "arrivals"),
    Sample("vllm-bench", vllm_bench, "arrivals"),
]
