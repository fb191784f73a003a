"""Tiny random models of every family that capture is tested on."""

from __future__ import annotations

import importlib
from typing import Any

BASE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
GROUPED = {**BASE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4,
           "topk_group": 2, "num_experts_per_tok": 3}
MLA = {**GROUPED, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
       "v_head_dim": 8, "num_key_value_heads": 4}
LINEAR = {**BASE, "num_hidden_layers": 4, "num_experts": 8, "shared_expert_intermediate_size": 16,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
          "linear_num_value_heads": 4}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 4}
DBRX = {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": None,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}

# module folder: class name, config, MoE layers
FAMILIES: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "mixtral": ("Mixtral", {**BASE, "num_local_experts": 8}, [0, 1, 2]),
    "qwen2_moe": ("Qwen2Moe", {**BASE, "num_experts": 8, "shared_expert_intermediate_size": 16}, [0, 1, 2]),
    "qwen3_moe": ("Qwen3Moe", {**BASE, "num_experts": 8, "mlp_only_layers": [1]}, [0, 2]),
    "olmoe": ("Olmoe", {**BASE, "num_experts": 8}, [0, 1, 2]),
    "phimoe": ("Phimoe", {**BASE, "num_local_experts": 8}, [0, 1, 2]),
    "gpt_oss": ("GptOss", {**BASE, "num_local_experts": 8, "sliding_window": 4, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}, [0, 1, 2]),
    "deepseek_v2": ("DeepseekV2", {**MLA, "topk_method": "group_limited_greedy"}, [1, 2]),
    "deepseek_v3": ("DeepseekV3", MLA, [1, 2]),
    "glm4_moe": ("Glm4Moe", GROUPED, [1, 2]),
    "jamba": ("Jamba", {**BASE, **MAMBA, "num_hidden_layers": 4, "num_experts": 8, "attn_layer_period": 2,
                        "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}, [1, 3]),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {**BASE, "num_experts": 8, "moe_topk": 2}, [0, 1, 2]),
    "granitemoe": ("GraniteMoe", {**BASE, "num_local_experts": 8}, [0, 1, 2]),
    "minimax_m2": ("MiniMaxM2", {**BASE, "num_local_experts": 8}, [0, 1, 2]),
    "qwen3_next": ("Qwen3Next", LINEAR, [0, 1, 2, 3]),
    "llama4": ("Llama4", {**BASE, "num_hidden_layers": 4, "num_local_experts": 8, "intermediate_size_mlp": 40,
                          "interleave_moe_layer_step": 2}, [1, 3]),
    "dbrx": ("Dbrx", DBRX, [0, 1, 2]),
    "qwen3_5_moe": ("Qwen3_5Moe", LINEAR, [0, 1, 2, 3]),
    "ernie4_5_moe": ("Ernie4_5_Moe", {**BASE, "moe_num_experts": 8, "moe_k": 2}, [1, 2]),
    "longcat_flash": ("LongcatFlash", {**MLA, "num_layers": 2, "num_hidden_layers": 4, "ffn_hidden_size": 48,
                                       "expert_ffn_hidden_size": 16, "moe_topk": 3, "zero_expert_num": 8,
                                       "num_experts_per_tok": 3}, [0, 1]),
}
RECURRENT = ("jamba", "qwen3_next", "qwen3_5_moe")
WINDOWED = ("gpt_oss", "llama4")


def build(family: str, *, double: bool = False) -> Any:
    """Return a tiny random model of a family, in eval mode; `double` computes in float64."""
    import torch

    name, config, _ = FAMILIES[family]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    settings = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    kind = getattr(settings, f"{name}TextConfig", None) or getattr(settings, f"{name}Config")
    torch.manual_seed(0)
    model = getattr(module, f"{name}ForCausalLM")(kind(**config)).eval()
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith(("gate.weight", "router.weight", "router.layer.weight", "classifier.weight")):
                value.copy_(torch.randn(value.shape))  # routers that tell tokens apart, far from ties
            if "correction_bias" in key:
                value.copy_(0.3 * torch.randn(value.shape))  # a correction that changes the choice
    if double:
        model = model.double()
        model.set_experts_implementation("eager")
    return model
