"""The keys of a Hugging Face ``config.json`` that moesim reads, their aliases, and a reader that checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesim.errors import InputError, did_you_mean

HIDDEN_KEYS = ("hidden_size", "d_model")
LAYER_KEYS = ("num_hidden_layers", "n_layers", "num_layers")
EXPERT_KEYS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "max_n_routed_experts",
)
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "num_selected_experts",
    "router_topk",
    "moe_k",
)
SHARED_COUNT_KEYS = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
HEAD_KEYS = ("num_attention_heads", "n_heads", "num_heads", "decoder_attention_heads")
KV_HEAD_KEYS = ("num_key_value_heads", "kv_n_heads")
LOW_RANK_KEYS = ("q_lora_rank",)
GROUP_KEYS = ("n_group", "num_expert_group")
NESTED_KEYS = ("ffn_config", "attn_config")  # DBRX keeps these sizes apart
DTYPE_KEYS = ("torch_dtype", "dtype")
# Keys that a multimodal config keeps outside its `text_config`, though they are about the decoder too.
OUTER_KEYS = (*DTYPE_KEYS, "model_type", "quantization_config", "tie_word_embeddings")

CONFIG_KEYS = frozenset(
    (
        *HIDDEN_KEYS,
        *LAYER_KEYS,
        *EXPERT_KEYS,
        *TOP_K_KEYS,
        *SHARED_COUNT_KEYS,
        *OUTER_KEYS,
        *HEAD_KEYS,
        *KV_HEAD_KEYS,
        *GROUP_KEYS,
        *NESTED_KEYS,
        "text_config",
        "vocab_size",
        "intermediate_size",
        "moe_intermediate_size",
        "expert_intermediate_size",
        "dense_intermediate_size",
        "intermediate_size_mlp",
        "shared_expert_intermediate_size",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "d_ff",
        "ffn_hidden_size",
        "expert_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "routed_expert_hidden_size",
        "moe_latent_size",
        "zero_expert_num",
        "expert_dtype",
        "head_dim",
        "d_kv",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "topk_group",
        "topk_method",
        "decoder_sparse_step",
        "mlp_only_layers",
        "first_k_dense_replace",
        "moe_layer_freq",
        "mlp_layer_types",
        "moe_layers",
        "interleave_moe_layer_step",
        "expert_layer_period",
        "expert_layer_offset",
        "moe_layer_start_index",
        "moe_layer_end_index",
        "moe_layer_interval",
        "encoder_sparse_step",
        "decoder_layers",
        "encoder_layers",
        "num_decoder_layers",
        "layer_types",
        "layers_block_type",
        "hybrid_override_pattern",
        "full_attention_interval",
        "attn_output_gate",
        "linear_num_key_heads",
        "linear_key_head_dim",
        "linear_num_value_heads",
        "linear_value_head_dim",
        "linear_attn_config",
        "mla_use_output_gate",
        "attn_layer_period",
        "attn_layer_offset",
        "mamba_d_state",
        "mamba_dt_rank",
        "mamba_expand",
        "mamba_num_heads",
        "mamba_head_dim",
        "n_groups",
        "ssm_state_size",
        "index_n_heads",
        "index_head_dim",
        "o_groups",
        "o_lora_rank",
        "compress_ratios",
        "hc_mult",
    )
)


@dataclass(frozen=True)
class ConfigReader:
    """A config and where it came from; every value is checked as it is read."""

    config: dict[str, Any]
    where: str

    def error(self, text: str) -> InputError:
        """Return an error that says where the config came from."""
        return InputError(f"{self.where}: {text}")

    def present(self, keys: tuple[str, ...]) -> list[str]:
        """Return those of `keys` that are there and not null."""
        return [key for key in keys if self.config.get(key) is not None]

    def missing(self, keys: tuple[str, ...]) -> InputError:
        """Return the error for a size that none of `keys` gives."""
        hint = did_you_mean(keys[0], self.config)
        hint = hint if hint.startswith(" Did") else ""
        nulls = [key for key in keys if key in self.config]
        state = f"is null ({', '.join(nulls)})" if nulls else "is missing"
        return self.error(f"key {keys[0]!r} {state}; keys tried: {', '.join(keys)}.{hint}")

    def whole(self, *keys: str, default: int | None = None, minimum: int = 1) -> int:
        """Return a whole number; a null or absent key gives `default`, or an error where there is none."""
        found = self.present(keys)
        if not found:
            if default is None:
                raise self.missing(keys)
            return default
        value = self.config[found[0]]
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(f"{found[0]} must be a whole number of at least {minimum}, got {value!r}")
        for other in found[1:]:
            if self.config[other] != value:
                raise self.error(f"{found[0]} is {value} but {other}, its alias, is {self.config[other]!r}")
        return value

    def flags(self, key: str, num_layers: int) -> list[bool]:
        """Return a list of 0 or 1 per layer."""
        value = self.config[key]
        if len(value) != num_layers or any(item not in (0, 1) for item in value):
            raise self.error(f"{key} must list 0 or 1 for each of {num_layers} layers, got {value!r}")
        return [bool(item) for item in value]

    def layer_ids(self, key: str, num_layers: int) -> list[int]:
        """Return a list of layer indices; a null or absent key gives an empty one."""
        value = self.config.get(key) or []
        good = isinstance(value, list) and all(type(i) is int and 0 <= i < num_layers for i in value)
        if not good:
            raise self.error(f"{key} must list layers 0 ... {num_layers - 1}, got {value!r}")
        return list(value)
