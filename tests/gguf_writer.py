"""A small writer of GGUF files, apart from the reader under test: headers in full, data as zeros."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

# id, weights per block, bytes per block
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "Q6_K": (14, 256, 210),
         "MXFP4": (39, 32, 17), "BF16": (30, 1, 2)}


def text(value: str) -> bytes:
    """Return a GGUF string."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> bytes:
    """Return a metadata value with its type: bool, str, int (u32, or i64 below 0), float, or a list of these."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value) if value >= 0 else struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    items = [typed(item) for item in value]
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def table(tensors: list[tuple[str, tuple[int, ...], str]], alignment: int = 32) -> tuple[bytes, int]:
    """Return the tensor table of (name, shape, type), and the bytes of data that it describes."""
    rows, offset = b"", 0
    for name, shape, kind in tensors:
        number, block, block_bytes = TYPES[kind]
        rows += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)
        size = block_bytes
        for length in shape:
            size *= length
        offset += -(-(size // block) // alignment) * alignment
    return rows, offset


def header(metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], str]], version: int = 3) -> tuple[bytes, int]:
    """Return the header of a file, and the bytes of data that follow it."""
    rows, size = table(tensors)
    keys = b"".join(text(key) + typed(value) for key, value in metadata.items())
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + keys + rows, size


def write(path: Path, metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], str]], version: int = 3) -> Path:
    """Write a file whose data are zeros."""
    head, size = header(metadata, tensors, version)
    path.write_bytes(head + bytes(-len(head) % 32 + size))
    return path


QWEN = {"general.architecture": "qwen3moe", "general.name": "tiny", "qwen3moe.block_count": 2,
        "qwen3moe.embedding_length": 256, "qwen3moe.expert_count": 4, "qwen3moe.expert_used_count": 2,
        "qwen3moe.attention.head_count": 4, "qwen3moe.attention.head_count_kv": 2,
        "qwen3moe.attention.key_length": 32, "tokenizer.ggml.tokens": [str(i) for i in range(100)]}


def qwen_tensors(down: tuple[str, str] = ("Q4_K", "Q6_K"), up: str = "Q4_K") -> list[tuple[str, tuple[int, ...], str]]:
    """Return the tensors of a tiny Qwen3-MoE: hidden 256, experts of 256, their down matrices of a type per layer."""
    tensors: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (256, 100), "Q6_K"), ("output.weight", (256, 100), "F16"), ("output_norm.weight", (256,), "F32")]
    for layer, kind in enumerate(down):
        tensors += [(f"blk.{layer}.{name}", shape, one) for name, shape, one in (
            ("attn_norm.weight", (256,), "F32"), ("attn_q.weight", (256, 128), "F16"), ("attn_k.weight", (256, 64), "F16"),
            ("attn_v.weight", (256, 64), "F16"), ("attn_output.weight", (128, 256), "F32"),
            ("attn_q_norm.weight", (32,), "F32"), ("ffn_norm.weight", (256,), "F32"),
            ("ffn_gate_inp.weight", (256, 4), "F32"), ("ffn_gate_exps.weight", (256, 256, 4), up),
            ("ffn_up_exps.weight", (256, 256, 4), up), ("ffn_down_exps.weight", (256, 256, 4), kind))]
    return tensors
