"""Real (tiny, random) transformers models have exactly the parameters that their config says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from moesim.model import load_model, read_config, spec_from_config
from moesim.model.catalog import catalog_model

pytest.importorskip("torch")
pytest.importorskip("transformers")

BASE = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 24,
    "vocab_size": 64,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
DEEPSEEK = {
    **BASE,
    **MLA,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
GLM = {**{key: DEEPSEEK[key] for key in DEEPSEEK if key not in MLA}, "num_key_value_heads": 2}

# model folder, class name, config
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("mixtral", "Mixtral", {**BASE, "num_local_experts": 6}),
    ("phimoe", "Phimoe", {**BASE, "num_local_experts": 6, "attention_bias": True, "lm_head_bias": True}),
    ("olmoe", "Olmoe", {**BASE, "num_experts": 6}),
    ("gpt_oss", "GptOss", {**BASE, "num_local_experts": 6}),
    (
        "qwen2_moe",
        "Qwen2Moe",
        {**BASE, "num_experts": 6, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28},
    ),
    ("qwen3_moe", "Qwen3Moe", {**BASE, "num_experts": 6, "moe_intermediate_size": 20}),
    (
        "qwen3_moe",
        "Qwen3Moe",
        {
            **BASE,
            "num_experts": 6,
            "moe_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    ("deepseek_v2", "DeepseekV2", {**DEEPSEEK, "q_lora_rank": None}),
    ("deepseek_v3", "DeepseekV3", DEEPSEEK),
    ("glm4_moe", "Glm4Moe", GLM),
    (
        "llama4",
        "Llama4",
        {**BASE, "num_local_experts": 6, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2},
    ),
]
IDS = [f"{folder}-{index}" for index, (folder, _, _) in enumerate(MODELS)]

# What ModelSpec does not count: norms, biases (but it counts those of GPT-OSS's experts), GPT-OSS's attention
# sinks, and the one-column gate in front of Qwen2-MoE's shared expert.
EXCLUDED = re.compile(r"norm|(?<!proj)(_|\.)bias$|_proj\.bias$|sinks|shared_expert_gate")


def counted(real: dict[str, int], pattern: str = "") -> int:
    """Return the parameters that ModelSpec counts, of the names that match `pattern`."""
    matching = (name for name in real if re.search(pattern, name) and not EXCLUDED.search(name))
    return sum(real[name] for name in matching)


def build(folder: str, family: str, config: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """Return a transformers config and the parameter sizes of its model, made without memory on `meta`."""
    import importlib

    import torch

    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    settings = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    suffix = "TextConfig" if family == "Llama4" else "Config"
    made = getattr(settings, f"{family}{suffix}")(**config)
    with torch.device("meta"):
        model = getattr(module, f"{family}ForCausalLM")(made)
    return made, {name: parameter.numel() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("folder", "family", "config"), MODELS, ids=IDS)
def test_real_parameter_counts(folder: str, family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Total, experts, routers, embeddings and MoE layers equal the real model's, to the last weight."""
    made, real = build(folder, family, config)
    made.save_pretrained(tmp_path)  # as transformers 5 writes it, with its renamed keys
    spec = read_config(tmp_path)
    assert spec.total_params == counted(real)
    experts = r"\.experts\."
    assert spec.num_pool_experts * spec.expert_params == counted(real, experts)
    assert spec.num_moe_layers * spec.router_params == counted(real, r"(mlp|feed_forward)\.(gate|router)\.")
    assert spec.embedding_params == counted(real, "embed_tokens|lm_head")
    layers = {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in real if re.search(experts, name)}
    assert spec.moe_layers == tuple(sorted(layers))


def test_excluded_parameters_are_small_and_named() -> None:
    """What is left out are norms, biases, sinks and the shared gate: each kind is met in some real model."""
    left: dict[str, int] = {}
    for folder, family, config in MODELS:
        _, real = build(folder, family, config)
        left.update({f"{folder}:{name}": size for name, size in real.items() if EXCLUDED.search(name)})
        experts_left = [name for name in real if ".experts." in name and EXCLUDED.search(name)]
        assert experts_left == []
    kinds = (
        "gpt_oss:.*sinks",
        "qwen2_moe:.*shared_expert_gate",
        "phimoe:lm_head.bias",
        "gpt_oss:.*router.bias",
    )
    for kind in kinds:
        assert any(re.match(kind, name) for name in left)
    assert max(left.values()) <= 64  # one vector each


def test_resaved_qwen3_renames_its_experts() -> None:
    """transformers 5 writes Qwen3-MoE's num_experts as num_local_experts; both spellings give one spec."""
    hub = {**BASE, "model_type": "qwen3_moe", "num_experts": 6, "moe_intermediate_size": 20}
    made, _ = build("qwen3_moe", "Qwen3Moe", hub)
    saved = made.to_dict()
    assert "num_local_experts" in saved
    assert "num_experts" not in saved
    assert spec_from_config(saved, "q") == spec_from_config(hub, "q")


REAL_CLASSES = [
    ("dbrx", "dbrx"), ("deepseek-v4-flash", "deepseek_v4"), ("deepseek-v4-pro", "deepseek_v4"), ("glm-5", "glm_moe_dsa"),
    ("glm-4.5", "glm4_moe"), ("jamba-v0.1", "jamba"), ("llama-4-scout", "llama4_text"),
    ("llama-4-maverick", "llama4_text"), ("minimax-m2.5", "minimax_m2"), ("qwen3.5-35b-a3b", "qwen3_5_moe_text"),
    ("hunyuan-a13b", "hunyuan_v1_moe")]


@pytest.mark.parametrize(("name", "kind"), REAL_CLASSES)
def test_catalog_models_at_full_size(name: str, kind: str) -> None:
    """The real class, made at full size without memory, has the spec's parameters but for norms and vectors (0.02 %)."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = {key: value for key, value in catalog_model(name).config.items() if key != "quantization_config"}
    if kind == "dbrx":  # the class reads these from the config without a default
        config["attn_config"] = {**config["attn_config"], "rope_theta": 500000.0, "clip_qkv": 8.0}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(config))
    real = sum(parameter.numel() for parameter in model.parameters())
    spec = load_model(name)
    assert 0 <= real - spec.total_params <= real / 5_000
