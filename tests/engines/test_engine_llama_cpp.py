"""llama.cpp itself, with an RPC server of its own CPU backend as the GPU: bytes per device as the plan predicts."""

from __future__ import annotations

import dataclasses
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines.engine_folder import need, run_engine_code

from moesim.export.engines import export
from moesim.export.residency import Residency, last_layers
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.units import MIB

pytestmark = pytest.mark.engines

# 12 layers, so that layer 1 and layer 11 can be mistaken for each other; 1.5 MiB of f16 experts in each
MODEL = ModelSpec("tiny-qwen3moe", 12, tuple(range(12)), 8, 2, 256, 128, AttentionSpec(4, 2, 64), 320)
LAYER_BYTES = MODEL.num_experts * MODEL.expert_bytes
ROUNDING = 0.005 * MIB  # the engine prints two decimals

WRITER = '''
import numpy as np
from gguf import GGUFWriter
path, layers, experts, top_k, hidden, ff, heads, kv_heads, head, vocab = sys.argv[1], *map(int, sys.argv[2:11])
rng = np.random.default_rng(7)
out = GGUFWriter(path, "qwen3moe")
out.add_block_count(layers); out.add_context_length(128); out.add_embedding_length(hidden); out.add_feed_forward_length(ff)
out.add_head_count(heads); out.add_head_count_kv(kv_heads); out.add_key_length(head); out.add_value_length(head)
out.add_layer_norm_rms_eps(1e-6); out.add_rope_freq_base(10000.0); out.add_expert_count(experts)
out.add_expert_used_count(top_k); out.add_expert_feed_forward_length(ff); out.add_vocab_size(vocab); out.add_file_type(1)
tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *[f"t{i}" for i in range(vocab - 259)]]
out.add_tokenizer_model("llama"); out.add_token_list(tokens); out.add_token_scores([0.0] * vocab)
out.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocab - 259))
out.add_bos_token_id(1); out.add_eos_token_id(2); out.add_unk_token_id(0)
def tensor(name, *shape, dtype=np.float16):
    out.add_tensor(name, (0.05 * rng.standard_normal(shape)).astype(dtype))
tensor("token_embd.weight", vocab, hidden); tensor("output.weight", vocab, hidden)
tensor("output_norm.weight", hidden, dtype=np.float32)
for layer in range(layers):
    name = f"blk.{layer}."
    for norm, width in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q_norm", head), ("attn_k_norm", head)):
        tensor(name + norm + ".weight", width, dtype=np.float32)
    tensor(name + "attn_q.weight", heads * head, hidden); tensor(name + "attn_output.weight", hidden, heads * head)
    tensor(name + "attn_k.weight", kv_heads * head, hidden); tensor(name + "attn_v.weight", kv_heads * head, hidden)
    tensor(name + "ffn_gate_inp.weight", experts, hidden, dtype=np.float32)
    tensor(name + "ffn_gate_exps.weight", experts, ff, hidden); tensor(name + "ffn_up_exps.weight", experts, ff, hidden)
    tensor(name + "ffn_down_exps.weight", experts, hidden, ff)
out.write_header_to_file(); out.write_kv_data_to_file(); out.write_tensors_to_file(); out.close()
print("true")
'''

SIZES = '''
from gguf import GGUFReader
print(json.dumps({tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(sys.argv[1]).tensors}))
'''


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of `MODEL`'s sizes, written by llama.cpp's own package."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    heads = MODEL.attention
    run_engine_code(WRITER, path, MODEL.num_layers, MODEL.num_experts, MODEL.top_k, MODEL.hidden_size,
                    MODEL.expert_intermediate_size, heads.num_heads, heads.num_kv_heads, heads.head_dim, MODEL.vocab_size,
                    python_path=(need("gguf"),))
    return path


@pytest.fixture(scope="module")
def tensor_bytes(gguf_file: Path) -> dict[str, int]:
    """Bytes of every tensor, as the package reads them."""
    return run_engine_code(SIZES, gguf_file, python_path=(need("gguf"),))


@pytest.fixture(scope="module")
def fake_gpu() -> Iterator[str]:
    """Address of a server on the loopback interface that offers llama.cpp's CPU backend as a device."""
    server = need("llama-build", "bin", "ggml-rpc-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([server, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        _wait_for(port)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(port: int) -> None:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"no RPC server on port {port}")


def buffer_bytes(script: Path, gguf_file: Path, fake_gpu: str) -> dict[str, float]:
    """Run the exported script with the engine; return the bytes of weights that it says lie on each device."""
    words = ["sh", str(script), "-m", str(gguf_file), "--rpc", fake_gpu, "-fit", "off", "-n", "1", "-p", "t1", "-c", "64",
             "--no-warmup", "-no-cnv", "-v", "-lm", "none"]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=120,
                          check=False,  # random weights write random bytes
                          env={"LLAMA_SERVER": str(need("llama-build", "bin", "llama-completion"))})
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    found = re.findall(r"(\S+) model buffer size = +([0-9.]+) MiB", log)
    sizes: dict[str, float] = {}
    for device, size in found:
        key = "gpu" if device.startswith("RPC") else "cpu"
        sizes[key] = sizes.get(key, 0.0) + float(size) * MIB
    return sizes


def some_layers(*layers: int) -> Residency:
    """All experts of these layers on the GPU."""
    mask = np.zeros((12, 8), bool)
    mask[list(layers)] = True
    return Residency(mask, "by hand")


KEPT = {"all": last_layers(MODEL, 12), "last 5": last_layers(MODEL, 5), "1 but not 11": some_layers(0, 1, 7),
        "11 but not 1": some_layers(11, 10), "none": last_layers(MODEL, 0)}


@pytest.mark.parametrize("name", KEPT)
def test_bytes_on_the_device_are_the_plans(name: str, gguf_file: Path, tensor_bytes: dict[str, int], fake_gpu: str,
                                           tmp_path: Path) -> None:
    """Experts on the device by the plan, everything else of the layers and the output besides; the rest in main memory."""
    kept = KEPT[name]
    report = export(kept, MODEL, "llama.cpp", tmp_path / "plan.sh")
    sizes = buffer_bytes(report.path, gguf_file, fake_gpu)
    others = sum(size for tensor, size in tensor_bytes.items() if "_exps" not in tensor and tensor != "token_embd.weight")
    assert sizes["gpu"] == pytest.approx(others + kept.gpu_bytes(MODEL), abs=ROUNDING)
    off = 12 * LAYER_BYTES - kept.gpu_bytes(MODEL)
    assert f"{kept.gpu_bytes(MODEL)} bytes" in report.notes[0]
    assert f"{off} bytes in main memory" in report.notes[0]
    assert sizes["cpu"] == pytest.approx(tensor_bytes["token_embd.weight"] + off, abs=2 * ROUNDING)


def test_the_models_bytes_are_the_files(tensor_bytes: dict[str, int]) -> None:
    """Routed experts weigh what the model's sizes say, so the bytes above are not two mistakes that agree."""
    experts = sum(size for tensor, size in tensor_bytes.items() if "_exps" in tensor)
    assert experts == 12 * LAYER_BYTES == 18 * MIB


def test_the_short_form_says_the_same(gguf_file: Path, fake_gpu: str, tmp_path: Path) -> None:
    """--n-cpu-moe of the notes leaves as many bytes on each device as the overrides of the script."""
    report = export(last_layers(MODEL, 5), MODEL, "llama.cpp", tmp_path / "plan.sh")
    short = next(note for note in report.notes if "--n-cpu-moe" in note)
    words = shlex.split(short.split(":", 1)[1].rstrip("."))
    script = tmp_path / "short.sh"
    script.write_text(f'exec "$LLAMA_SERVER" {shlex.join(words)} "$@"\n')
    assert buffer_bytes(script, gguf_file, fake_gpu) == buffer_bytes(report.path, gguf_file, fake_gpu)


def test_dense_layers_do_not_shift_the_numbers() -> None:
    """llama.cpp numbers all layers: the third MoE layer of a model with two dense ones in front is blk.4."""
    model: Any = dataclasses.replace(MODEL, num_layers=14, moe_layers=tuple(range(2, 14)))
    off = some_layers(*(layer for layer in range(12) if layer != 2))
    from moesim.export.engines.llama_cpp import arguments

    assert arguments(off, model)[-1].startswith(r"blk\.(4)\.")
