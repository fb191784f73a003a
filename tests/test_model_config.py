"""Hugging Face configs become the sizes worked out by hand, or an error that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.model import ModelSpec, read_config, spec_from_config
from moesim.model.config import FAMILIES
from moesim.model.config_keys import EXPERT_KEYS, HIDDEN_KEYS, LAYER_KEYS, TOP_K_KEYS

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 5}
MLA = {
    "num_attention_heads": 4,
    "q_lora_rank": 6,
    "kv_lora_rank": 7,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 5,
}
BASE = {
    "num_hidden_layers": 4,
    "hidden_size": 8,
    "vocab_size": 11,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
MIXTRAL = {**BASE, **GQA, "model_type": "mixtral", "intermediate_size": 10}
QWEN = {**BASE, **GQA, "model_type": "qwen3_moe", "moe_intermediate_size": 10, "intermediate_size": 20}
DEEPSEEK = {
    **BASE,
    **MLA,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 10,
    "intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
}
LLADA2 = {
    **BASE,
    **GQA,
    "model_type": "llada2_moe",
    "moe_intermediate_size": 10,
    "intermediate_size": 20,
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
}
LLADA_MOE = {
    **BASE,
    **GQA,
    "model_type": "llada",
    "expert_intermediate_size": 10,
    "dense_intermediate_size": 20,
    "moe_layer_freq": [0, 1, 0, 1],
    "shared_expert_intermediate_size": None,
}
LLAMA4 = {**BASE, **GQA, "intermediate_size": 10, "intermediate_size_mlp": 20, "interleave_moe_layer_step": 2}

# One expert: 3 * 8 * 10. GQA: 8 * (4 + 2 + 2 + 4) * 5. MLA: query 8 * 6 + 6 * 4 * 5, key and value
# 8 * (7 + 2) + 7 * 4 * (3 + 5), output 4 * 5 * 8. Router: 8 * 6. Embeddings: 2 * 11 * 8.
EXPERT, GQA_PARAMS, MLA_PARAMS, ROUTER, EMBEDDINGS, DENSE = 240, 480, 624, 48, 176, 480


def sizes(config: dict[str, Any]) -> ModelSpec:
    """Return the spec of a config called 'tiny'."""
    return spec_from_config(config, "tiny")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a copy of a config that lacks some keys."""
    return {key: value for key, value in config.items() if key not in keys}


@pytest.mark.parametrize(
    ("config", "moe_layers", "total"),
    [
        (MIXTRAL, (0, 1, 2, 3), 24 * EXPERT + 4 * (GQA_PARAMS + ROUTER) + EMBEDDINGS),
        ({**MIXTRAL, "model_type": "phimoe"}, (0, 1, 2, 3), 24 * EXPERT + 4 * 528 + EMBEDDINGS),
        ({**MIXTRAL, "model_type": "olmoe"}, (0, 1, 2, 3), 24 * EXPERT + 4 * 528 + EMBEDDINGS),
        # biases of one expert: 2 * 10 for gate and up, 8 for down
        ({**MIXTRAL, "model_type": "gpt_oss"}, (0, 1, 2, 3), 24 * (EXPERT + 28) + 4 * 528 + EMBEDDINGS),
        (QWEN, (0, 1, 2, 3), 24 * EXPERT + 4 * (GQA_PARAMS + ROUTER) + EMBEDDINGS),
        # layers 1 and 3 by the step, of which 3 is listed as dense
        (
            {**QWEN, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
            (1,),
            6 * EXPERT + 4 * GQA_PARAMS + ROUTER + 3 * DENSE + EMBEDDINGS,
        ),
        # a shared expert of width 30 in each layer
        (
            {**QWEN, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 30},
            (0, 1, 2, 3),
            24 * EXPERT + 4 * (GQA_PARAMS + ROUTER + 3 * EXPERT) + EMBEDDINGS,
        ),
        # two shared experts are twice the width
        (DEEPSEEK, (1, 2, 3), 18 * EXPERT + 4 * MLA_PARAMS + 3 * (ROUTER + 2 * EXPERT) + DENSE + EMBEDDINGS),
        (
            {**DEEPSEEK, "moe_layer_freq": 2},
            (2,),
            6 * EXPERT + 4 * MLA_PARAMS + ROUTER + 2 * EXPERT + 3 * DENSE + EMBEDDINGS,
        ),
        (
            {**DEEPSEEK, **GQA, "model_type": "glm4_moe", "n_shared_experts": 1},
            (1, 2, 3),
            18 * EXPERT + 4 * GQA_PARAMS + 3 * (ROUTER + EXPERT) + DENSE + EMBEDDINGS,
        ),
        (
            LLADA2,
            (1, 2, 3),
            18 * EXPERT + 4 * GQA_PARAMS + 3 * (ROUTER + EXPERT) + DENSE + EMBEDDINGS,
        ),
        (LLADA_MOE, (1, 3), 12 * EXPERT + 4 * GQA_PARAMS + 2 * ROUTER + 2 * DENSE + EMBEDDINGS),
        # Llama-4: always one shared expert, and the text part is nested
        (
            {"model_type": "llama4", "text_config": {**LLAMA4, "model_type": "llama4_text"}},
            (1, 3),
            12 * EXPERT + 4 * GQA_PARAMS + 2 * (ROUTER + EXPERT) + 2 * DENSE + EMBEDDINGS,
        ),
        (
            {**LLAMA4, "model_type": "llama4_text", "moe_layers": [0]},
            (0,),
            6 * EXPERT + 4 * GQA_PARAMS + ROUTER + EXPERT + 3 * DENSE + EMBEDDINGS,
        ),
        ({**MIXTRAL, "tie_word_embeddings": True}, (0, 1, 2, 3), 24 * EXPERT + 4 * 528 + EMBEDDINGS // 2),
        (
            {**QWEN, "mlp_layer_types": ["dense", "sparse", "sparse", "dense"]},
            (1, 2),
            12 * EXPERT + 4 * GQA_PARAMS + 2 * ROUTER + 2 * DENSE + EMBEDDINGS,
        ),
    ],
)
def test_family_counts(config: dict[str, Any], moe_layers: tuple[int, ...], total: int) -> None:
    """Each family's tiny config gives the MoE layers and the total worked out by hand from its matrices."""
    spec = sizes(config)
    assert (spec.moe_layers, spec.total_params) == (moe_layers, total)


def test_attention_kinds() -> None:
    """GQA caches keys and values of its few heads; MLA caches one latent vector and the rope key."""
    assert sizes(MIXTRAL).attention.kv_values_per_token() == 2 * 2 * 5
    assert sizes(DEEPSEEK).attention.kv_values_per_token() == 7 + 2
    # without a low-rank query, the query is one matrix 8 -> 4 * 5 instead of 8 -> 6 -> 4 * 5
    full_query = sizes({**DEEPSEEK, "q_lora_rank": None})
    assert full_query.attention_params == MLA_PARAMS - (8 * 6 + 6 * 20) + 8 * 20


def test_head_defaults() -> None:
    """An absent head_dim is hidden size over heads, and null key-value heads means one for every head."""
    attention = sizes({**without(MIXTRAL, "head_dim"), "num_key_value_heads": None}).attention
    assert (attention.head_dim, attention.num_kv_heads) == (2, 4)
    assert sizes({**MIXTRAL, "head_dim": None}).attention.head_dim == 2


def test_dense_width_is_read_only_where_needed() -> None:
    """A model without dense layers needs no dense width, and reports none even where its config has one."""
    assert sizes(QWEN) == sizes(without(QWEN, "intermediate_size"))
    assert sizes(QWEN).dense_intermediate_size == 0


def test_routing_groups() -> None:
    """Group limits are kept, except where the config says that selection is greedy over all experts."""
    limited, greedy = sizes(DEEPSEEK), sizes({**DEEPSEEK, "topk_method": "greedy"})
    assert (limited.num_groups, limited.groups_per_token) == (3, 2)
    assert (greedy.num_groups, greedy.groups_per_token) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "expert_bytes", "activation_bytes"),
    [
        ({}, 480, 2.0),
        ({"torch_dtype": "bfloat16"}, 480, 2.0),
        ({"dtype": "torch.float16"}, 480, 2.0),
        ({"torch_dtype": "float32"}, 960, 4.0),
        ({"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}, 240, 2.0),
        # 240 * 4.25 / 8 = 127.5, rounded half to even
        ({"quantization_config": {"quant_method": "mxfp4"}}, 128, 2.0),
    ],
)
def test_bytes_per_weight(changes: dict[str, Any], expert_bytes: int, activation_bytes: float) -> None:
    """An expert's bytes follow the dtype and the quantization, and activations follow the dtype."""
    spec = sizes({**MIXTRAL, **changes})
    assert (spec.expert_bytes, spec.activation_bytes) == (expert_bytes, activation_bytes)


def test_fp8_keeps_embeddings_and_routers() -> None:
    """Under fp8 attention takes one byte a weight, routers and embeddings two; under mxfp4 all take two."""
    fp8 = sizes({**MIXTRAL, "quantization_config": {"quant_method": "fp8"}})
    assert fp8.non_expert_bytes == 4 * (GQA_PARAMS + 2 * ROUTER) + 2 * EMBEDDINGS
    mxfp4 = sizes({**MIXTRAL, "quantization_config": {"quant_method": "mxfp4"}})
    assert mxfp4.non_expert_bytes == 2 * (4 * (GQA_PARAMS + ROUTER) + EMBEDDINGS)


def test_nested_text_config() -> None:
    """A text_config with the dtype outside gives the same sizes as the flat config."""
    inner = {**without(DEEPSEEK, "model_type"), "model_type": "kimi_k2", "dtype": None}
    outer = {"model_type": "kimi_k25", "dtype": "float32", "tie_word_embeddings": True, "text_config": inner}
    assert sizes(outer) == sizes({**inner, "dtype": "float32", "tie_word_embeddings": True})


RENAMED = {
    "hidden_size": HIDDEN_KEYS,
    "num_hidden_layers": LAYER_KEYS,
    "num_experts": EXPERT_KEYS,
    "num_experts_per_tok": TOP_K_KEYS,
}


@settings(max_examples=50, deadline=None)
@given(
    config=st.sampled_from([MIXTRAL, QWEN, DEEPSEEK, LLADA_MOE, {**LLAMA4, "model_type": "llama4_text"}]),
    names=st.fixed_dictionaries({key: st.sampled_from(aliases) for key, aliases in RENAMED.items()}),
    order=st.randoms(use_true_random=False),
    nested=st.booleans(),
)
def test_aliases_order_and_nesting_do_not_matter(
    config: dict[str, Any], names: dict[str, str], order: Any, nested: bool
) -> None:
    """Whichever alias names a size, in whatever order, flat or nested, the sizes are the same."""
    items = [(names.get(key, key), value) for key, value in config.items()]
    order.shuffle(items)
    renamed = dict(items)
    assert sizes({"text_config": renamed} if nested else renamed) == sizes(config)


def test_agreeing_aliases() -> None:
    """Two aliases of one size may both be there when they agree, as in GPT-OSS's hub config."""
    assert sizes({**MIXTRAL, "experts_per_token": 2}) == sizes(MIXTRAL)


def test_config_is_not_changed() -> None:
    """Reading a config leaves it as it was."""
    config = {"torch_dtype": "float32", "text_config": dict(DEEPSEEK)}
    before = json.dumps(config)
    sizes(config)
    assert json.dumps(config) == before


def test_read_config_file_and_folder(tmp_path: Path) -> None:
    """A config.json and its folder read the same, named after the folder, with the path as source."""
    folder = tmp_path / "tiny-moe"
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(MIXTRAL))
    spec = read_config(file)
    assert spec == read_config(folder) == spec_from_config(MIXTRAL, "tiny-moe", source=str(file))
    assert (spec.name, spec.source) == ("tiny-moe", str(file))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # a dense model: every alias of the number of experts is named
        (without(MIXTRAL, "num_experts"), "no Mixture-of-Experts config.*num_local_experts, num_experts, n_"),
        ({**MIXTRAL, "num_experts": None}, "no Mixture-of-Experts config"),
        # a model type that no family is known for
        ({**MIXTRAL, "model_type": "gemma9"}, "model_type 'gemma9' is not one whose layers moesim can count"),
        ({**MIXTRAL, "model_type": "mixtrall"}, "Did you mean 'mixtral'"),
        ({**MIXTRAL, "model_type": ["mixtral"]}, "is not one whose layers"),
        (without(MIXTRAL, "model_type"), "key 'model_type' is missing"),
        # sizes: missing, null, misspelt, not whole, not positive, contradicting
        (without(MIXTRAL, "hidden_size"), "'hidden_size' is missing; keys tried: hidden_size, d_model"),
        ({**MIXTRAL, "hidden_size": None}, r"'hidden_size' is null \(hidden_size\)"),
        ({**without(MIXTRAL, "hidden_size"), "hiden_size": 8}, "Did you mean 'hiden_size'"),
        ({**MIXTRAL, "hidden_size": 8.0}, "hidden_size must be a whole number of at least 1, got 8.0"),
        ({**MIXTRAL, "hidden_size": True}, "hidden_size must be a whole number of at least 1, got True"),
        ({**MIXTRAL, "num_experts": [6, 6]}, r"num_experts must be a whole number .* got \[6, 6\]"),
        ({**MIXTRAL, "vocab_size": 0}, "vocab_size must be a whole number of at least 1, got 0"),
        ({**MIXTRAL, "moe_topk": 3}, "num_experts_per_tok is 2 but moe_topk, its alias, is 3"),
        (
            without(MIXTRAL, "num_experts_per_tok"),
            "tried: num_experts_per_tok, num_experts_per_token, experts_per",
        ),
        ({**MIXTRAL, "num_experts_per_tok": 7}, "top_k 7 exceeds 6 experts"),
        (without(QWEN, "moe_intermediate_size"), "'moe_intermediate_size' is missing"),
        # attention
        (without(MIXTRAL, "num_key_value_heads"), "'num_key_value_heads' is missing"),
        ({**without(MIXTRAL, "head_dim"), "num_attention_heads": 3}, "3 heads do not divide hidden_size 8"),
        (without(DEEPSEEK, "kv_lora_rank"), "'kv_lora_rank' is missing"),
        (without(DEEPSEEK, "q_lora_rank"), "'q_lora_rank' is missing"),
        # which layers are MoE
        (without(DEEPSEEK, "first_k_dense_replace"), "'first_k_dense_replace' is missing"),
        ({**DEEPSEEK, "first_k_dense_replace": 4}, "has no MoE layer"),
        ({**LLADA_MOE, "moe_layer_freq": [1, 1]}, "moe_layer_freq must list 0 or 1 for each of 4 layers"),
        ({**QWEN, "mlp_only_layers": [4]}, "mlp_only_layers must list layers 0 ... 3"),
        ({**QWEN, "mlp_layer_types": ["mlp"] * 4}, "mlp_layer_types must list 'dense' or 'sparse' for"),
        (
            {**without(LLAMA4, "interleave_moe_layer_step"), "model_type": "llama4"},
            "'interleave_moe_layer_step'",
        ),
        (without({**QWEN, "decoder_sparse_step": 2}, "intermediate_size"), "'intermediate_size' is missing"),
        # routing groups
        ({**DEEPSEEK, "topk_group": 4}, "topk_group 4 exceeds n_group 3"),
        ({**DEEPSEEK, "n_group": 4}, "4 groups do not divide 6 experts"),
        # bytes
        ({**MIXTRAL, "torch_dtype": "bfloat61"}, "'bfloat61' is unknown. Did you mean 'bfloat16'"),
        ({**MIXTRAL, "quantization_config": {"quant_method": "awq"}}, "'awq' is unknown; known are fp8"),
        ({**MIXTRAL, "quantization_config": "fp8"}, "quantization_config must be a mapping"),
        ({**MIXTRAL, "tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    """A config that cannot be read right is refused, and the message names the key and what was expected."""
    with pytest.raises(InputError, match=message):
        sizes(config)


def test_error_names_the_source() -> None:
    """Errors begin with where the config came from."""
    with pytest.raises(InputError, match=r"^models/x/config.json: key 'vocab_size'"):
        spec_from_config(without(MIXTRAL, "vocab_size"), "x", source="models/x/config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{not json", r"config.json:1:2: not valid JSON"),
        (b"[1]", "expected a JSON object, got a list"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"\x80\x04K\x01.", "Python pickle"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that is no JSON object is refused with its path, and a pickle is never opened."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    """A folder without a config.json is refused with the path that was looked for."""
    with pytest.raises(InputError, match=r"config.json: no such file"):
        read_config(tmp_path)


OWN_TESTS = {  # families whose sizes need more keys; test_model_families.py counts them
    "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "jamba", "kimi_linear", "longcat_flash", "nemotron_h", "nllb-moe",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "switch_transformers", "dbrx"}
LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - OWN_TESTS))
def test_every_family_reads_its_own_widths(kind: str) -> None:
    """Every known model_type reads a config with all keys, and takes its expert width from the right one."""
    widths = {"intermediate_size": 3, "moe_intermediate_size": 5, "expert_intermediate_size": 7}
    dense = {"dense_intermediate_size": 9, "intermediate_size_mlp": 9, "interleave_moe_layer_step": 1}
    spec = sizes({**DEEPSEEK, **GQA, **widths, **dense, "model_type": kind})
    by_dense_key = ("mixtral", "phimoe", "olmoe", "gpt_oss", "llama4", "llama4_text", "granitemoe", "minimax_m2",
                    "hunyuan_v1_moe")
    named = dict.fromkeys(by_dense_key, 3)
    named.update(llada=7, llada_moe=7)
    assert spec.expert_intermediate_size == named.get(kind, 5)
    assert (spec.attention.kind == "mla") == (kind in LATENT)
