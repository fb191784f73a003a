"""Families whose layers differ, or that name things their own way: counted like the real (tiny) transformers models."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import InputError
from moesim.model import ModelSpec, read_config, spec_from_config

pytest.importorskip("torch")
pytest.importorskip("transformers")

BASE = {
    "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 20, "vocab_size": 64,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
MLA = {
    "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4}
DEEPSEEK = {**BASE, **MLA, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2,
            "topk_group": 1}
INDEXER = {"index_n_heads": 3, "index_head_dim": 8, "index_topk": 4}
DELTA = {**BASE, "num_experts": 6, "shared_expert_intermediate_size": 28, "linear_key_head_dim": 8,
         "linear_value_head_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "num_hidden_layers": 8}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 3, "attn_layer_period": 4,
         "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
KIMI = {**DEEPSEEK, "num_experts": 8, "num_shared_experts": 2, "num_expert_group": 2,
        "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 8, "num_heads": 3,
                               "short_conv_kernel_size": 4}}
NEMOTRON = {**BASE, "hybrid_override_pattern": "MEM*-E", "num_hidden_layers": 6, "n_routed_experts": 6,
            "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 28, "mamba_num_heads": 4,
            "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 4, "n_group": 1, "topk_group": 1}
V4 = {**BASE, "num_hidden_layers": 4, "intermediate_size": 20, "n_routed_experts": 8, "n_shared_experts": 1, "head_dim": 16, "q_lora_rank": 12,
      "qk_rope_head_dim": 4, "o_groups": 2, "o_lora_rank": 6, "num_key_value_heads": 1, "hc_mult": 3,
      "num_hash_layers": 1, "compress_ratios": [0, 4, 128, 4], **INDEXER}
DBRX = {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 64, "pad_token_id": 0,
        "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": 6, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}
LONGCAT = {**MLA, "hidden_size": 32, "num_layers": 3, "num_hidden_layers": 6, "ffn_hidden_size": 24, "vocab_size": 64,
           "expert_ffn_hidden_size": 20, "n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 3,
           "num_attention_heads": 4, "pad_token_id": 0}
SWITCH = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_heads": 4, "num_layers": 4, "num_decoder_layers": 6,
          "num_experts": 8, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "vocab_size": 64}
NLLB = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 4, "decoder_layers": 6,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_experts": 8, "encoder_sparse_step": 2,
        "decoder_sparse_step": 3, "vocab_size": 64, "expert_capacity": 4}

# module folder, class name, config, MoE layers, attentions per layer
MODELS: list[tuple[str, str, dict[str, Any], list[int], float]] = [
    ("minimax_m2", "MiniMaxM2", {**BASE, "num_local_experts": 6}, [0, 1, 2, 3], 1),
    ("granitemoe", "GraniteMoe", {**BASE, "num_local_experts": 6}, [0, 1, 2, 3], 1),
    ("dbrx", "Dbrx", DBRX, [0, 1, 2], 1),
    ("hunyuan_v1_moe", "HunYuanMoEV1", {**BASE, "num_experts": 6, "moe_topk": 2, "num_shared_expert": 1}, [0, 1, 2, 3],
     1),
    ("qwen3_vl_moe", "Qwen3VLMoe", {**BASE, "num_experts": 6, "tie_word_embeddings": False}, [0, 1, 2, 3], 1),
    ("ernie4_5_moe", "Ernie4_5_Moe", {**BASE, "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2,
                                      "moe_layer_start_index": 1, "moe_layer_interval": 2}, [1, 3], 1),
    ("dots1", "Dots1", {**BASE, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 2, "n_group": 1,
                        "topk_group": 1}, [2, 3], 1),
    ("glm4_moe_lite", "Glm4MoeLite", {**DEEPSEEK, "head_dim": 4}, [1, 2, 3], 1),
    ("deepseek_v32", "DeepseekV32", {**DEEPSEEK, **INDEXER}, [1, 2, 3], 1),
    ("glm_moe_dsa", "GlmMoeDsa", {**DEEPSEEK, **INDEXER}, [1, 2, 3], 1),
    ("deepseek_v4", "DeepseekV4", V4, [0, 1, 2, 3], (0.25 + 1 / 128 + 0.25) / 8),
    ("qwen3_next", "Qwen3Next", DELTA, list(range(8)), 0.25),
    ("qwen3_5_moe", "Qwen3_5Moe", DELTA, list(range(8)), 0.25),
    ("jamba", "Jamba", {**BASE, **MAMBA, "num_hidden_layers": 8, "num_experts": 6, "moe_intermediate_size": 24},
     [1, 3, 5, 7], 0.25),
    ("kimi_linear", "KimiLinear", KIMI, [1, 2, 3], 0.25),
    ("nemotron_h", "NemotronH", NEMOTRON, [1, 5], 1 / 6),
    ("nemotron_h", "NemotronH", {**NEMOTRON, "moe_latent_size": 16}, [1, 5], 1 / 6),
    ("longcat_flash", "LongcatFlash", LONGCAT, [0, 1, 2], 2),
    ("switch_transformers", "SwitchTransformers", SWITCH, [1, 3, 5, 8], 0.6),
    ("nllb_moe", "NllbMoe", NLLB, [1, 3, 6, 9], 0.6),
]
IDS = [f"{folder}-{index}" for index, (folder, *_) in enumerate(MODELS)]

# What ModelSpec leaves out: norms, biases and vectors of gates, position tables, and the small state-space and
# convolution parameters of linear attention and Mamba.
EXCLUDED = re.compile(
    r"norm(\.\d|_[\df])?\.(weight|bias)$|(_|\.)bias$|sinks|shared_expert_gate|A_log|\.D$|dt_bias|conv1d|position_bias|relative_attention_bias"
    r"|hc\.base|hc\.scale|hc_base|hc_scale")


def build(folder: str, family: str, config: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """Return a transformers config and the parameter sizes of its model, made without memory on `meta`."""
    import torch

    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    settings = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    kind = getattr(settings, f"{family}TextConfig", None) or getattr(settings, f"{family}Config")
    made = kind(**config)
    names = (f"{family}ForCausalLM", f"{family}TextModel", f"{family}ForConditionalGeneration")
    name = next(name for name in names if hasattr(module, name))
    with torch.device("meta"):
        model = getattr(module, name)(made)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if name.endswith("TextModel"):  # the text part alone has no output embedding
        sizes["lm_head.weight"] = made.vocab_size * made.hidden_size
    return made, sizes


def counted(real: dict[str, int], pattern: str = "") -> int:
    """Return the parameters that ModelSpec counts, of the names that match `pattern`."""
    return sum(size for name, size in real.items() if re.search(pattern, name) and not EXCLUDED.search(name))


def unused(folder: str, spec: ModelSpec) -> int:
    """Return the weights that a real class holds and never reads: gate and up matrices of LongCat's zero experts."""
    if folder != "longcat_flash":
        return 0
    return spec.num_moe_layers * 4 * 2 * spec.hidden_size * spec.expert_intermediate_size


@pytest.mark.parametrize(("folder", "family", "config", "moe_layers", "per_layer"), MODELS, ids=IDS)
def test_real_parameter_counts(folder: str, family: str, config: dict[str, Any], moe_layers: list[int],
                               per_layer: float, tmp_path: Path) -> None:
    """Total, experts, embeddings and MoE layers equal the real model's to the last weight; so do attentions per layer."""
    made, real = build(folder, family, config)
    made.save_pretrained(tmp_path)  # as transformers 5 writes it, with its renamed keys
    spec = read_config(tmp_path)
    left = unused(folder, spec)
    assert spec.total_params == counted(real) - left
    assert spec.num_pool_experts * spec.expert_params == counted(real, r"\.experts\.") - left
    assert spec.embedding_params == counted(real, r"embed_tokens|embeddings|lm_head|shared\.weight|wte\.")
    assert list(spec.moe_layers) == moe_layers
    assert spec.attention.per_layer == pytest.approx(per_layer)
    assert (spec.attention.kind == "mixed") == (per_layer != 1)


@pytest.mark.parametrize(("folder", "family", "config", "moe_layers", "per_layer"), MODELS, ids=IDS)
def test_the_hubs_own_keys(folder: str, family: str, config: dict[str, Any], moe_layers: list[int],
                           per_layer: float, tmp_path: Path) -> None:
    """A config with the keys of the hub's files gives the sizes of the one that transformers saves again."""
    made, _ = build(folder, family, config)
    made.save_pretrained(tmp_path)
    hub = {**config, "model_type": made.model_type, "dtype": "float32", "tie_word_embeddings": made.tie_word_embeddings}
    if folder in ("switch_transformers", "nllb_moe"):
        hub |= {"encoder_sparse_step": 2, "decoder_sparse_step": 3}
    hub.setdefault("num_experts_per_tok", 3 if folder == "longcat_flash" else 2)
    if folder in ("dbrx", "longcat_flash"):
        del hub["num_experts_per_tok"]
    spec = read_config(tmp_path)
    found = spec_from_config(hub, spec.name, source=spec.source)
    assert found.replace(weight_bytes=4, other_weight_bytes=4, activation_bytes=4) == spec.replace(
        weight_bytes=4, other_weight_bytes=4, activation_bytes=4, top_k=found.top_k)


def test_layers_of_both_stacks() -> None:
    """An encoder's layers come before the decoder's, and are told apart."""
    spec = spec_from_config({**NLLB, "model_type": "nllb-moe", "num_experts_per_tok": 2}, "nllb")
    assert (spec.num_layers, spec.encoder_layers, spec.matrices) == (10, 4, 2)
    assert spec.tied_embeddings


def test_lists_of_one_size_per_layer() -> None:
    """Hunyuan's lists of one size per layer read as that size; lists that differ are refused."""
    config = {**BASE, "model_type": "hunyuan_v1_moe", "num_experts": 6, "moe_topk": [2] * 4,
              "num_shared_expert": [1] * 4, "moe_intermediate_size": [24] * 4}
    del config["num_experts_per_tok"]
    assert spec_from_config(config, "h") == spec_from_config(
        {**config, "moe_topk": 2, "num_shared_expert": 1, "moe_intermediate_size": 24}, "h")
    with pytest.raises(InputError, match="moe_topk differs from layer to layer"):
        spec_from_config({**config, "moe_topk": [2, 2, 2, 1]}, "h")


def test_mixed_layers_share_cache_and_scores() -> None:
    """With attention in a quarter of the layers, cache and score flops per layer are a quarter, in the mean."""
    spec = spec_from_config({**DELTA, "model_type": "qwen3_next"}, "q")
    assert spec.attention.kv_values_per_token() == 0.25 * 2 * 2 * 8
    assert spec.attention.score_flops_per_context_token() == 0.25 * 4 * 4 * 8
    assert spec.num_layers * spec.attention_params == pytest.approx(spec.mixer_params, abs=4)


def test_latent_experts() -> None:
    """Experts behind a projection have its width in params and flops."""
    spec = spec_from_config({**NEMOTRON, "model_type": "nemotron_h", "moe_latent_size": 16}, "n")
    assert (spec.expert_width, spec.expert_params) == (16, 2 * 16 * 20)
    assert spec.expert_flops_per_token == 2 * 2 * 16 * 20


PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized",
          "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}
MXFP4 = {"quant_method": "compressed-tensors", "config_groups": {"a": {"format": "mxfp4-pack-quantized", "weights": {}}}}


@pytest.mark.parametrize(("changes", "weight_bytes"), [
    ({"quantization_config": PACKED}, 4.5 / 8),  # 16-bit scales per 32 weights
    ({"quantization_config": MXFP4}, 4.25 / 8),
    ({"quantization_config": {"quant_method": "fp8"}, "expert_dtype": "fp4"}, 4.25 / 8)])
def test_bytes_of_packed_experts(changes: dict[str, Any], weight_bytes: float) -> None:
    """Experts in packed 4-bit formats have the bytes of their values and scales."""
    config = {**BASE, "model_type": "minimax_m2", "num_local_experts": 6, **changes}
    assert spec_from_config(config, "m").weight_bytes == weight_bytes


@pytest.mark.parametrize(("config", "message"), [
    ({**NEMOTRON, "model_type": "nemotron_h", "hybrid_override_pattern": "MEM"}, "must say M, .* each of 6 layers"),
    ({**NEMOTRON, "model_type": "nemotron_h", "hybrid_override_pattern": "MEM*-X"}, "must say M"),
    ({**V4, "model_type": "deepseek_v4", "compress_ratios": [0, 4]}, "compress_ratios must list 0, 4 or 128"),
    ({**KIMI, "model_type": "kimi_linear", "linear_attn_config": None}, "'linear_attn_config' is null"),
    ({**KIMI, "model_type": "kimi_linear", "linear_attn_config": {**KIMI["linear_attn_config"], "full_attn_layers": [0]}},
     r"linear_attn_config: full_attn_layers must list layers 1 ... 4, got \[0\]"),
    ({**BASE, **MAMBA, "model_type": "jamba", "num_experts": 6, "mamba_d_state": None}, "'mamba_d_state' is null"),
    ({**BASE, "model_type": "minimax_m2", "num_local_experts": 6,
      "quantization_config": {**PACKED, "format": "float-quantized"}}, "format 'float-quantized' is unknown"),
    ({**BASE, "model_type": "minimax_m2", "num_local_experts": 6,
      "quantization_config": {"quant_method": "compressed-tensors"}}, "config_groups has no group with weights"),
])
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    """A config of these families that cannot be read right is refused with its key."""
    with pytest.raises(InputError, match=message):
        spec_from_config(config, "bad")
