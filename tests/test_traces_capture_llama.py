"""Capture from llama.cpp: the callback's bookkeeping, and in the real engine the routing of the same weights elsewhere."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import QWEN, qwen_tensors, write
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError, MissingDependencyError
from moesim.traces import read_trace
from moesim.traces.capture import capture_command, capture_gguf, capture_routing
from moesim.traces.capture_llama import CallbackRecorder, draw, strided, view_bytes
from moesim.traces.capture_scores import iter_scores

REQUESTS = [(7, [1, 2, 3, 9, 4]), (2, [9]), (5, [4, 4, 60, 8, 1, 33, 20])]
SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "seed": 3}


@given(shape=st.tuples(*[st.integers(1, 4)] * 3), gap=st.integers(0, 3))
def test_views_with_gaps_read_as_their_elements(shape: tuple[int, ...], gap: int) -> None:
    """A view whose rows have gaps between them, as the chosen of a sorted row, reads as numpy's own slice."""
    count, rows, columns = shape
    whole = np.arange(count * rows * (columns + gap), dtype=np.int32).reshape(count, rows, columns + gap)
    sizes, strides = [columns, rows, count, 1], [4, 4 * (columns + gap), 4 * rows * (columns + gap), 4 * whole.size]
    length = view_bytes(sizes, strides, 4)
    found = strided(np.frombuffer(whole.tobytes()[:length], np.uint8), sizes, strides, np.int32)
    expected = whole[:, :, :columns]
    np.testing.assert_array_equal(found, expected if count > 1 else expected[0])


def test_drawing_follows_the_shares() -> None:
    """Tokens are drawn by softmax at the temperature; at 0 the largest is taken."""
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    generator = np.random.default_rng(0)
    counts = np.bincount([draw(logits, 1.0, generator) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.6, 0.3], atol=0.03)  # 4 standard deviations
    assert draw(logits, 0, generator) == 1


def recorder_of(tensors: dict[int, tuple[str, Any]], **options: Any) -> CallbackRecorder:
    """Return a recorder that reads arrays by number instead of tensors by address."""
    def read(tensor: int) -> tuple[str, Any]:
        name, values = tensors[tensor]
        return name, lambda dtype: np.asarray(values, dtype)
    return CallbackRecorder([1, 3], read, **({"with_scores": False} | options))


def shown(recorder: CallbackRecorder, tensors: dict[int, tuple[str, Any]]) -> list[bool]:
    """Show all tensors as llama.cpp does, first asking; returns what was asked for."""
    asked = [recorder(tensor, True, None) for tensor in tensors]
    assert all(recorder(tensor, False, None) for tensor, wanted in zip(tensors, asked, strict=True) if wanted)
    return asked


def test_the_callback_takes_ids_the_last_weights_and_scores() -> None:
    """Of a layer's tensors the ids, the weights as last made (not their sums) and the logits are kept."""
    tensors: dict[int, tuple[str, Any]] = {}
    for layer in (1, 3):
        tensors |= {10 * layer + place: (f"{name}-{layer}", values) for place, (name, values) in enumerate([
            ("ffn_moe_logits", [[layer, 1, 2], [3, 4, 5]]), ("ffn_moe_probs", [[0, 0, 0], [1, 1, 1]]),
            ("ffn_moe_topk", [[2, 1], [0, layer % 2]]), ("ffn_moe_weights", [[[0.5], [0.2]], [[0.4], [0.4]]]),
            ("ffn_moe_weights_sum", [[0.7], [0.8]]), ("ffn_moe_weights_norm", [[0.7, 0.3], [0.5, 0.5]]),
            ("ffn_moe_out", [[0.0]])])}
    recorder = recorder_of(tensors, with_scores=True)
    assert shown(recorder, tensors) == [True, False, True, True, True, True, False] * 2
    routing = recorder.take(2)
    assert routing.ids.tolist() == [[[2, 1], [2, 1]], [[0, 1], [0, 1]]]
    np.testing.assert_allclose(routing.weights[0, 0], [0.7, 0.3])
    assert routing.scores[:, 1].tolist() == [[3, 1, 2], [3, 4, 5]]
    with pytest.raises(InputError, match="ffn_moe_topk-1 for 0 of 2 tokens"):
        recorder.take(2)  # it is forgotten


def test_parts_of_a_pass_are_joined_and_missing_rows_named() -> None:
    """A pass that is computed in parts is whole again; a layer that computed fewer tokens is an error."""
    tensors = {1: ("ffn_moe_topk-1", [[0, 1]]), 2: ("ffn_moe_weights-1", [[0.9, 0.1]]), 3: ("ffn_moe_topk-3", [[1, 2]]),
               4: ("ffn_moe_weights-3", [[0.8, 0.2]])}
    recorder = recorder_of(tensors)
    shown(recorder, tensors)
    shown(recorder, tensors)
    routing = recorder.take(2)
    assert routing.ids.tolist() == [[[0, 1], [1, 2]]] * 2
    np.testing.assert_allclose(routing.weights, [[[0.9, 0.1], [0.8, 0.2]]] * 2, rtol=1e-6)
    shown(recorder, {number: tensors[number] for number in (1, 2)})
    with pytest.raises(InputError, match="ffn_moe_topk-3 for 0 of 1 tokens"):
        recorder.take(1)


def test_an_error_in_the_callback_comes_out() -> None:
    """What goes wrong while llama.cpp is running ends the pass and is told afterwards."""
    recorder = recorder_of({1: ("ffn_moe_topk-1", "no numbers")})
    assert recorder(1, True, None)
    assert not recorder(1, False, None)
    with pytest.raises(InputError, match=r"the routing could not be read: .*no numbers"):
        recorder.take(1)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_the_package_is_named_when_missing(tmp_path: Path) -> None:
    """Without llama-cpp-python a GGUF model cannot be captured, and the error says what to install."""
    path = write(tmp_path / "m.gguf", QWEN, qwen_tensors())
    with pytest.raises(MissingDependencyError, match="needs the package 'llama_cpp'"):
        capture_gguf(path, REQUESTS, tmp_path / "t", **SETTINGS)


def test_bad_requests_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    """Tokens outside the file's vocabulary are an error."""
    path = write(tmp_path / "m.gguf", QWEN, qwen_tensors())
    with pytest.raises(InputError, match=r"request 1 has token ids outside 0 ... 99"):
        capture_gguf(path, [(1, [100])], tmp_path / "t", **SETTINGS)


def tiny_qwen() -> Any:
    """Return a tiny Qwen3-MoE whose routers tell tokens apart, far from ties."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=48, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, mlp_only_layers=[], bos_token_id=None, eos_token_id=None, tie_word_embeddings=False)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name:
                value.copy_(torch.randn(value.shape) * (1.0 if "gate.weight" in name else 0.1))
    return model


def write_gguf(model: Any, path: Path) -> None:
    """Write the model's weights as llama.cpp expects a qwen3moe, in F32."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "qwen3moe")
    writer.add_name("tiny-qwen")
    for add, value in ((writer.add_block_count, 3), (writer.add_context_length, 512), (writer.add_embedding_length, 64),
                       (writer.add_feed_forward_length, 48), (writer.add_expert_feed_forward_length, 32),
                       (writer.add_head_count, 4), (writer.add_head_count_kv, 2), (writer.add_key_length, 16),
                       (writer.add_value_length, 16), (writer.add_expert_count, 8), (writer.add_expert_used_count, 2),
                       (writer.add_layer_norm_rms_eps, config.rms_norm_eps), (writer.add_vocab_size, 64),
                       (writer.add_rope_freq_base, float(config.rope_parameters["rope_theta"]))):
        add(value)
    writer.add_tokenizer_model("no_vocab")
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    for ours, theirs in (("token_embd", "model.embed_tokens"), ("output", "lm_head"), ("output_norm", "model.norm")):
        writer.add_tensor(f"{ours}.weight", weights[f"{theirs}.weight"])
    names = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
             "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate"}
    for layer in range(3):
        stem = f"model.layers.{layer}."
        for ours, theirs in names.items():
            writer.add_tensor(f"blk.{layer}.{ours}.weight", weights[f"{stem}{theirs}.weight"])
        both = weights[f"{stem}mlp.experts.gate_up_proj"]
        for ours, values in (("gate", both[:, :32]), ("up", both[:, 32:]), ("down", weights[f"{stem}mlp.experts.down_proj"])):
            writer.add_tensor(f"blk.{layer}.ffn_{ours}_exps.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return a model and the GGUF file of its weights; skips without llama-cpp-python and gguf."""
    pytest.importorskip("llama_cpp", reason="the package 'llama-cpp-python' is not installed")
    pytest.importorskip("gguf", reason="the package 'gguf' is not installed")
    model, path = tiny_qwen(), tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(model, path)
    return model, path


@pytest.mark.engines
def test_llama_cpp_routes_as_transformers_does(tmp_path: Path, engine: tuple[Any, Path]) -> None:
    """Greedy tokens, phases, ids, weights and scores of every layer and token equal those of the same weights there."""
    model, path = engine
    options = {**SETTINGS, "temperature": 0, "with_token_ids": True}
    capture_routing(model, REQUESTS, tmp_path / "hf", scores=tmp_path / "hf.scores", **options)
    capture_gguf(path, REQUESTS, tmp_path / "llama", scores=tmp_path / "llama.scores", **options)
    ours, theirs = read_trace(tmp_path / "llama"), read_trace(tmp_path / "hf")
    for name in ("token_id", "request_id", "position", "phase", "step", "layer_ids", "expert_ids"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert (ours.num_experts, ours.num_tokens) == (8, 13 + 3 * 5)
    np.testing.assert_allclose(ours.gate_weights, theirs.gate_weights, atol=5e-3)  # its cache is F16
    (one,), (other,) = iter_scores(tmp_path / "llama.scores"), iter_scores(tmp_path / "hf.scores")
    np.testing.assert_allclose(one.scores, other.scores, atol=0.05)


@pytest.mark.engines
def test_llama_cpp_samples_by_the_seed_and_resumes(tmp_path: Path, engine: tuple[Any, Path]) -> None:
    """The same seed gives the same file, broken and resumed or not; another seed other tokens."""
    _, path = engine

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_gguf(path, REQUESTS, tmp_path / "a", progress=stop, **SETTINGS)
    assert capture_gguf(path, REQUESTS, tmp_path / "a", resume=True, **SETTINGS) == 2
    for name, seed in (("b", 3), ("c", 4)):
        capture_gguf(path, REQUESTS, tmp_path / name, **(SETTINGS | {"seed": seed}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_trace(tmp_path / "c").digest() != read_trace(tmp_path / "b").digest()


@pytest.mark.engines
def test_long_prompts_and_the_command(tmp_path: Path, engine: tuple[Any, Path]) -> None:
    """A prompt longer than one call of the engine is one prefill pass in the trace, the same as in transformers."""
    model, path = engine
    prompt = np.random.default_rng(1).integers(0, 64, 700).tolist()
    (tmp_path / "p").write_text(json.dumps({"request_id": 0, "token_ids": prompt}))
    trace = capture_command(path, tmp_path / "p", tmp_path / "t", max_new_tokens=1, seed=0)
    capture_routing(model, [(0, prompt)], tmp_path / "hf", max_new_tokens=1, seed=0)
    assert (trace.model, trace.num_tokens, trace.step.max()) == ("tiny", 700, 0)
    same = (np.sort(trace.expert_ids) == np.sort(read_trace(tmp_path / "hf").expert_ids)).all(axis=-1)
    assert same.mean() > 0.99  # near-ties may fall otherwise, for the cache is F16
    with pytest.raises(InputError, match="one at a time"):
        capture_gguf(path, REQUESTS, tmp_path / "b", batch_size=2, **SETTINGS)
    (tmp_path / "broken.gguf").write_bytes(path.read_bytes().replace(b"qwen3moe", b"qwen9moe"))
    with pytest.raises(InputError, match=r"llama.cpp cannot load it"):
        capture_gguf(tmp_path / "broken.gguf", REQUESTS, tmp_path / "b", **SETTINGS)
