"""GGUF headers: sizes and exact bytes as worked out by hand, and hostile files refused with one line."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from command_line import call, call_json
from gguf_writer import QWEN, TYPES, header, qwen_tensors, text, typed, write
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.model import load_model, read_gguf, read_gguf_model, spec_from_config
from moesim.model.gguf import TENSOR_TYPES, GgufArray

# bytes of 256 weights in one row: (256 / block) * block bytes, from the layout of each block
ROW_BYTES = {
    "F32": 1024, "F16": 512, "BF16": 512,
    "Q4_0": 8 * (2 + 16), "Q4_1": 8 * (2 + 2 + 16), "Q5_0": 8 * (2 + 4 + 16), "Q5_1": 8 * (2 + 2 + 4 + 16),
    "Q8_0": 8 * (2 + 32), "MXFP4": 8 * (1 + 16),
    "Q2_K": 16 + 64 + 2 + 2, "Q3_K": 32 + 64 + 12 + 2, "Q4_K": 2 + 2 + 12 + 128, "Q5_K": 2 + 2 + 12 + 32 + 128,
    "Q6_K": 128 + 64 + 16 + 2, "IQ4_NL": 8 * (2 + 16), "IQ4_XS": 2 + 2 + 4 + 128}


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors(tmp_path: Path, version: int) -> None:
    """Numbers, texts, flags and arrays come back; of a vocabulary only the length; tensors with exact bytes."""
    metadata = {"general.architecture": "x", "a.int": 7, "a.negative": -3, "a.float": 0.5, "a.flag": True,
                "a.numbers": [1, 2, 3], "a.texts": ["p", "q"], "a.words": [str(i) for i in range(65)]}
    file = read_gguf(write(tmp_path / "m.gguf", metadata, [("t", (512, 3), "Q4_K"), ("v", (5,), "F32")], version))
    assert file.version == version
    assert file.metadata == {**metadata, "a.numbers": (1, 2, 3), "a.texts": ("p", "q"), "a.words": GgufArray(65)}
    assert [(t.name, t.shape, t.type, t.num_bytes, t.offset, t.num_weights) for t in file.tensors.values()] == [
        ("t", (512, 3), "Q4_K", 3 * 2 * 144, 0, 1536), ("v", (5,), "F32", 20, 864, 5)]


@pytest.mark.parametrize(("name", "row_bytes"), sorted(ROW_BYTES.items()))
def test_bytes_of_types(name: str, row_bytes: int) -> None:
    """A row of 256 weights has the bytes of its blocks' scales and values."""
    (block, block_bytes), = [(block, size) for label, block, size in TENSOR_TYPES.values() if label == name]
    assert 256 // block * block_bytes == row_bytes


def test_exact_bytes_of_mixed_experts(tmp_path: Path) -> None:
    """Experts of two types have their bytes by layer, and the spec the mean, so that totals are the file's."""
    model = read_gguf_model(write(tmp_path / "m.gguf", QWEN, qwen_tensors()))
    q4, q6 = 256 * 144, 256 * 210  # one matrix of 256 x 256
    assert [(layer.layer, layer.expert_bytes) for layer in model.experts] == [(0, 3 * q4), (1, 2 * q4 + q6)]
    assert model.experts[1].types == {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"}
    assert model.spec.num_pool_experts * model.spec.expert_params * model.spec.weight_bytes == 4 * (5 * q4 + q6)
    attention = 256 * (128 + 64 + 64) * 2 + 128 * 256 * 4
    other = 2 * (attention + 4 * 256 * 4 + (256 + 256 + 32) * 4) + 100 * 210 + 100 * 512 + 1024
    assert model.spec.non_expert_bytes == other
    assert model.file_bytes == other + 4 * (5 * q4 + q6)


def test_sizes_equal_those_of_the_config(tmp_path: Path) -> None:
    """A GGUF file and a config.json of the same model give the same sizes."""
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 256, "moe_intermediate_size": 256,
              "num_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "head_dim": 32, "vocab_size": 100, "torch_dtype": "float16"}
    found = load_model(write(tmp_path / "m.gguf", QWEN, qwen_tensors()))
    expected = spec_from_config(config, "m", source=str(tmp_path / "m.gguf"))
    assert found.replace(weight_bytes=2.0, other_weight_bytes=2.0) == expected


def test_deepseek(tmp_path: Path) -> None:
    """Leading dense layers, shared experts, latent attention and groups are read; layers of prediction are left out."""
    metadata: dict[str, Any] = {
        "general.architecture": "deepseek2", "deepseek2.block_count": 3, "deepseek2.nextn_predict_layers": 1,
        "deepseek2.embedding_length": 32, "deepseek2.expert_count": 4, "deepseek2.expert_used_count": 2,
        "deepseek2.expert_group_count": 2, "deepseek2.expert_group_used_count": 1, "deepseek2.attention.head_count": 4,
        "deepseek2.attention.head_count_kv": 1, "deepseek2.attention.q_lora_rank": 12,
        "deepseek2.attention.kv_lora_rank": 10, "deepseek2.attention.key_length": 14,
        "deepseek2.attention.value_length": 10, "deepseek2.attention.key_length_mla": 12,
        "deepseek2.attention.value_length_mla": 8, "deepseek2.rope.dimension_count": 4}
    attention = [("attn_q_a", (32, 12)), ("attn_q_b", (12, 48)), ("attn_kv_a_mqa", (32, 14)), ("attn_k_b", (8, 10, 4)),
                 ("attn_v_b", (10, 8, 4)), ("attn_output", (32, 32))]
    dense = [("ffn_gate", (32, 40)), ("ffn_up", (32, 40)), ("ffn_down", (40, 32))]
    experts = [("ffn_gate_inp", (32, 4)), ("ffn_gate_exps", (32, 20, 4)), ("ffn_up_exps", (32, 20, 4)),
               ("ffn_down_exps", (20, 32, 4)), ("ffn_gate_shexp", (32, 20)), ("ffn_up_shexp", (32, 20)),
               ("ffn_down_shexp", (20, 32))]
    tensors = [("token_embd.weight", (32, 50), "F32")]
    for layer, parts in enumerate([attention + dense, attention + experts, attention + experts]):
        tensors += [(f"blk.{layer}.{name}.weight", shape, "F32") for name, shape in parts]
    spec = read_gguf_model(write(tmp_path / "m.gguf", metadata, tensors)).spec
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "hidden_size": 32, "moe_intermediate_size": 20,
              "intermediate_size": 40, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
              "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_attention_heads": 4, "q_lora_rank": 12,
              "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "vocab_size": 50,
              "tie_word_embeddings": True, "dtype": "float32"}
    expected = spec_from_config(config, "m", source=spec.source)
    assert spec == expected.replace(activation_bytes=2.0)


def test_hybrid_and_unknown_matrices(tmp_path: Path) -> None:
    """Layers without attention make it mixed; matrices that no formula knows are counted as the rest."""
    tensors = [t for t in qwen_tensors() if not t[0].startswith("blk.0.attn_k")]
    tensors += [("blk.0.ssm_in.weight", (256, 10), "F32"), ("per_layer_proj.weight", (256, 7), "F32")]
    spec = read_gguf_model(write(tmp_path / "m.gguf", QWEN, tensors)).spec
    assert (spec.attention.kind, spec.attention.per_layer, spec.extra_params) == ("mixed", 0.5, 256 * 7)
    assert spec.mixer_params == 2 * 256 * 384 - 256 * 64 + 2560
    assert spec.total_params == sum(_weights(t) for t in tensors if len(t[1]) > 1)


def _weights(tensor: tuple[str, tuple[int, ...], str]) -> int:
    product = 1
    for length in tensor[1]:
        product *= length
    return product


def test_gpt_oss_biases_and_fused_gate(tmp_path: Path) -> None:
    """Biases of experts count with them, and fused gate and up matrices are two."""
    tensors = [t for t in qwen_tensors(("F16", "F16")) if "gate_exps" not in t[0] and "up_exps" not in t[0]]
    for layer in range(2):
        tensors += [(f"blk.{layer}.ffn_gate_up_exps.weight", (256, 512, 4), "MXFP4"),
                    (f"blk.{layer}.ffn_gate_up_exps.bias", (512, 4), "F32"),
                    (f"blk.{layer}.ffn_down_exps.bias", (256, 4), "F32")]
    model = read_gguf_model(write(tmp_path / "m.gguf", QWEN, tensors))
    assert (model.spec.gated, model.spec.expert_bias) == (True, True)
    assert model.spec.expert_params == 3 * 256 * 256 + 3 * 256
    assert model.experts[0].expert_bytes == 512 * 256 * 17 // 32 + 256 * 256 * 2 + 3 * 256 * 4


def test_split_files(tmp_path: Path) -> None:
    """A model in parts reads the same from any part; a missing part is named."""
    tensors = qwen_tensors()
    for part, own in enumerate((tensors[:6], tensors[6:])):
        extra = {"split.no": part, "split.count": 2}
        write(tmp_path / f"m-0000{part + 1}-of-00002.gguf", (QWEN if part == 0 else {}) | extra, own)
    whole = read_gguf_model(write(tmp_path / "whole.gguf", QWEN, tensors))
    for part in (1, 2):
        model = read_gguf_model(tmp_path / f"m-0000{part}-of-00002.gguf")
        assert (model.spec.replace(source=whole.spec.source), model.experts) == (whole.spec.replace(name="m"), whole.experts)
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "other.gguf")
    with pytest.raises(InputError, match=r"m-00002-of-00002.gguf: no such file"):
        read_gguf(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(InputError, match="one of 2 parts, but its name does not end in"):
        read_gguf(tmp_path / "other.gguf")


def damaged(kind: str) -> bytes:
    """Return a file that is wrong in one way."""
    metadata: dict[str, Any] = {"general.architecture": "x"}
    head, size = header(metadata, [("t", (32, 2), "F32")])
    whole = head + bytes(-len(head) % 32 + size)
    count = struct.pack("<Q", 2**60)
    key = text("general.architecture")
    return {
        "empty": b"", "magic": b"GGML" + whole[4:], "version": whole[:4] + struct.pack("<I", 1) + whole[8:],
        "big-endian": whole[:4] + struct.pack(">I", 3) + whole[8:],
        "tensors": whole[:8] + count + whole[16:], "keys": whole[:16] + count + whole[24:],
        "text": whole[:24] + count + whole[32:], "utf-8": whole.replace(b"general", b"gener\xff\xff"),
        "kind": whole.replace(key + struct.pack("<I", 8), key + struct.pack("<I", 13)),
        "nested": header({"a": [1]}, [])[0].replace(struct.pack("<II", 9, 4), struct.pack("<II", 9, 9)),
        "array": header({"a": [1, 2]}, [])[0].replace(struct.pack("<IQ", 4, 2), struct.pack("<I", 4) + count),
        "texts": header({"a": ["b"]}, [])[0].replace(struct.pack("<IQ", 8, 1), struct.pack("<I", 8) + count),
        "dims": whole.replace(text("t") + struct.pack("<I", 2), text("t") + struct.pack("<I", 9)),
        "type": whole.replace(struct.pack("<QQI", 32, 2, 0), struct.pack("<QQI", 32, 2, 5)),
        "zero": whole.replace(struct.pack("<QQI", 32, 2, 0), struct.pack("<QQI", 32, 0, 0)),
        "huge": whole.replace(struct.pack("<QQI", 32, 2, 0), struct.pack("<QQI", 2**62, 2**62, 0)),
        "block": whole.replace(struct.pack("<QQI", 32, 2, 0), struct.pack("<QQI", 33, 2, 8)),
        "data": whole[:-8],
        "twice": b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (text("a") + typed(1)),
        "aligned": header({"general.alignment": 7}, [])[0],
        "overlap": header({}, [("t", (32,), "F32"), ("u", (32,), "F32")])[0].replace(
            struct.pack("<IQ", 0, 128), struct.pack("<IQ", 0, 64)) + bytes(512),
        "same name": header({}, [("t", (32,), "F32"), ("t", (32,), "F32")])[0] + bytes(512),
    }[kind]


@pytest.mark.parametrize(("kind", "words"), [
    ("empty", "byte 0: not a GGUF file"),
    ("magic", "byte 0: not a GGUF file"),
    ("version", "GGUF version 1, expected 2 or 3"),
    ("big-endian", "expected 2 or 3; it is big-endian"),
    ("tensors", "ends within a table of 1152921504606846976 tensors"),
    ("keys", "and 1152921504606846976 keys"),
    ("text", "ends within a text"),
    ("utf-8", "a text is not UTF-8"),
    ("kind", "key 'general.architecture' has the unknown type 13"),
    ("nested", "key 'a' has the unknown type 9"),
    ("array", "ends within the array 'a' of 1152921504606846976 elements"),
    ("texts", "ends within the array 'a' of 1152921504606846976 elements"),
    ("dims", "tensor 't' has 9 dimensions, expected 1 ... 4"),
    ("type", "tensor 't' has the unknown type 5"),
    ("zero", "tensor 't' of shape (32, 0) has no rows of F32"),
    ("huge", "tensor 't' ends at byte"),
    ("block", "tensor 't' of shape (33, 2) has no rows of Q8_0 blocks of 32"),
    ("data", "tensor 't' ends at byte"),
    ("twice", "key 'a' is there twice"),
    ("aligned", "general.alignment must be a multiple of 8, got 7"),
    ("overlap", "tensor 'u' at offset 64 is not aligned to 32 bytes or overlaps"),
    ("same name", "tensor 't' is there twice"),
])
def test_hostile_files(tmp_path: Path, kind: str, words: str) -> None:
    """A damaged or lying header is refused with the file, the byte and what was expected."""
    path = tmp_path / "m.gguf"
    path.write_bytes(damaged(kind))
    with pytest.raises(InputError) as error:
        read_gguf(path)
    assert str(error.value).startswith(f"{path}: byte ")
    assert words in str(error.value)


def test_every_cut_is_refused(tmp_path: Path) -> None:
    """A file that ends anywhere before its end is refused, and no cut passes."""
    head, size = header({"general.architecture": "x", "a": [1, 2], "b": ["c"]}, [("t", (32, 2), "F32")])
    path = tmp_path / "m.gguf"
    for length in [*range(len(head)), len(head) + size - 1]:
        path.write_bytes((head + bytes(size))[:length])
        with pytest.raises(InputError):
            read_gguf(path)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]) -> None:
    """Whatever bytes of a header are changed, the reader returns a model or raises InputError, nothing else."""
    head, size = header(QWEN, qwen_tensors())
    data = bytearray(head + bytes(-len(head) % 32))
    for place, value in changes:
        data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + size)
    total = 1
    with contextlib.suppress(InputError):
        total = read_gguf_model(path).spec.total_params
    assert total > 0


@pytest.mark.parametrize(("metadata", "drop", "words"), [
    ({"general.architecture": 3}, "", "key 'general.architecture' is missing"),
    ({"qwen3moe.expert_used_count": 0}, "", "qwen3moe.expert_used_count must be a whole number of at least 1, got 0"),
    ({"qwen3moe.expert_used_count": 5}, "", "top_k 5 exceeds 4 experts"),
    ({"qwen3moe.expert_count": 8}, "", "layer 0 stores 786432 expert weights, expected 1572864"),
    ({"qwen3moe.embedding_length": "big"}, "", "embedding_length must be a whole number of at least 1, got 'big'"),
    ({}, "ffn_.*_exps", "no tensor blk.N.ffn_.*_exps: a dense model"),
    ({}, "blk.0.ffn_down_exps", "tensor 'blk.0.ffn_down_exps.weight' of .inputs, outputs, experts. is missing"),
    ({}, "blk.1.ffn_down_exps", "layer 1 stores 524288 expert weights, expected 786432"),
    ({}, "token_embd", "tensor 'token_embd.weight' of .inputs, outputs. is missing"),
    ({}, "ffn_gate_inp", "its layers differ in ways that cannot be counted: 2048 weights too few"),
])
def test_files_that_are_no_model(tmp_path: Path, metadata: dict[str, Any], drop: str, words: str) -> None:
    """A file whose sizes are missing or disagree is refused with what is wrong."""
    tensors = [t for t in qwen_tensors() if not (drop and re.search(drop, t[0]))]
    path = write(tmp_path / "m.gguf", QWEN | metadata, tensors)
    with pytest.raises(InputError, match=words) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path}: ")


def test_show_prints_types_and_bytes(tmp_path: Path) -> None:
    """`model show FILE.gguf` prints totals and, per run of equal layers, types and bytes of one expert."""
    path = write(tmp_path / "m.gguf", QWEN, qwen_tensors())
    document = call_json("model", "show", str(path))
    assert [layer["expert_bytes"] for layer in document["experts"]] == [3 * 36864, 2 * 36864 + 53760]
    assert document["file_bytes"] == read_gguf_model(path).file_bytes
    printed = " ".join(call("model", "show", str(path)).split())
    assert "Experts as stored" in printed
    for part in ("Q4_K", "Q6_K", "111 kB", "127 kB", "110592", "127488"):
        assert part in printed


@pytest.mark.engines
def test_equal_to_the_gguf_package(tmp_path: Path) -> None:
    """The gguf package of llama.cpp has the same types, and reads our header and writes its own to the same table."""
    gguf = pytest.importorskip("gguf", reason="the package 'gguf' is not installed")
    import numpy as np

    theirs = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {key: theirs.get(key) for key in TENSOR_TYPES} == TENSOR_TYPES
    ours = write(tmp_path / "ours.gguf", QWEN, qwen_tensors())
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "qwen3moe")
    for key, value in QWEN.items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
    writer.add_array("tokenizer.ggml.tokens", QWEN["tokenizer.ggml.tokens"])
    for name, shape, kind in qwen_tensors():
        block, size = TYPES[kind][1:]
        rows = (*reversed(shape[1:]), shape[0] // block * size)
        writer.add_tensor(name, np.zeros(rows, np.uint8), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_gguf(tmp_path / "theirs.gguf").tensors == read_gguf(ours).tensors
    for path in (ours, tmp_path / "theirs.gguf"):
        expected = [(t.name, tuple(int(n) for n in t.shape), t.tensor_type.name, int(t.n_bytes))
                    for t in gguf.GGUFReader(path).tensors]
        assert [(t.name, t.shape, t.type, t.num_bytes) for t in read_gguf(path).tensors.values()] == expected
