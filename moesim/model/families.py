"""The families of models whose configs moesim can count, by ``model_type``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moesim.model import config_layers as stacks
from moesim.model import config_mixers as mixing
from moesim.model.config_keys import ConfigReader
from moesim.model.spec import AttentionSpec


@dataclass(frozen=True)
class Family:
    """How one architecture writes its config.

    Attributes:
        stack: its layers, and how many of them are an encoder's.
        layers: which of them are MoE.
        shared: the width of its shared experts together.
        attention, mixers: what mixes tokens; `mixers` where layers differ.
        extra: weights that nothing else counts.
        expert_width, dense_width: the keys of the feed-forward widths; no dense width where `extra` counts it.
        gated: three matrices in a feed-forward part, or two.
        expert_bias: experts have biases. tied: embeddings are one matrix unless the config says otherwise.
        layer_lists: sizes may be lists with one entry per layer (all equal).
        top_k: experts per token where the config need not say.
    """

    stack: Callable[[ConfigReader], stacks.Stack] = stacks.decoder_only
    layers: Callable[[ConfigReader, stacks.Stack], list[int]] = stacks.every_layer
    shared: Callable[[ConfigReader, int], int] = stacks.no_shared
    attention: Callable[[ConfigReader], AttentionSpec] = mixing.grouped_attention
    mixers: Callable[[ConfigReader, AttentionSpec, stacks.Stack], mixing.Mixers | None] = mixing.uniform
    extra: Callable[[ConfigReader, stacks.Stack, int], int] = mixing.nothing_else
    expert_width: tuple[str, ...] = ("moe_intermediate_size",)
    dense_width: tuple[str, ...] = ("intermediate_size",)
    gated: bool = True
    expert_bias: bool = False
    tied: bool = False
    layer_lists: bool = False
    top_k: int | None = None


_MIXTRAL = Family(expert_width=("intermediate_size",))
_QWEN2 = Family(layers=stacks.sparse_step, shared=stacks.shared_width)
_QWEN3 = Family(layers=stacks.sparse_step)
_QWEN_HYBRID = replace(_QWEN2, mixers=mixing.gated_delta)
_DENSE_FIRST = Family(layers=stacks.first_dense, shared=stacks.shared_count)
_DEEPSEEK = replace(_DENSE_FIRST, attention=mixing.latent_attention)
_INDEXED = replace(_DEEPSEEK, mixers=mixing.indexed)
_KIMI_LINEAR = replace(_DEEPSEEK, mixers=mixing.kimi_delta, extra=mixing.latent_experts)
_LLADA_MOE = Family(
    layers=stacks.layer_freq,
    shared=stacks.shared_width,
    expert_width=("expert_intermediate_size",),
    dense_width=("dense_intermediate_size",),
)
_LLAMA4 = Family(
    layers=stacks.interleaved,
    shared=stacks.one_shared,
    expert_width=("intermediate_size",),
    dense_width=("intermediate_size_mlp",),
)
_V4 = Family(
    shared=stacks.shared_count,
    attention=mixing.compressed_attention,
    mixers=mixing.compressed,
    extra=mixing.hyper_connections,
)
_LONGCAT = Family(
    stack=stacks.longcat_stack,
    attention=mixing.latent_attention,
    mixers=mixing.doubled,
    extra=mixing.longcat_rest,
    expert_width=("expert_ffn_hidden_size", "moe_intermediate_size"),
)
_JAMBA = Family(layers=stacks.period_offset, mixers=mixing.jamba_mamba, expert_width=("intermediate_size",))
_NEMOTRON = Family(
    stack=stacks.nemotron_stack,
    layers=stacks.pattern_blocks,
    shared=stacks.shared_nemotron,
    mixers=mixing.nemotron_blocks,
    extra=mixing.nemotron_rest,
    dense_width=(),
    gated=False,
)
_SWITCH = Family(
    stack=stacks.switch_stack,
    layers=stacks.both_stacks("encoder_sparse_step", "decoder_sparse_step", 1),
    attention=mixing.plain_attention,
    mixers=mixing.cross_attending,
    expert_width=("d_ff",),
    dense_width=("d_ff",),
    gated=False,
    tied=True,
    top_k=1,
)
_NLLB = replace(
    _SWITCH,
    top_k=2,
    stack=stacks.nllb_stack,
    layers=stacks.both_stacks("encoder_sparse_step", "decoder_sparse_step", -1),
    expert_width=("encoder_ffn_dim", "decoder_ffn_dim"),
    dense_width=("encoder_ffn_dim", "decoder_ffn_dim"),
)
_ERNIE = Family(layers=stacks.from_start, shared=stacks.shared_count, tied=True)
_HUNYUAN = Family(shared=stacks.shared_count, expert_width=("intermediate_size",), layer_lists=True)

FAMILIES: dict[str, Family] = {
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "olmoe": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "granitemoe": _MIXTRAL,
    "dbrx": replace(_MIXTRAL, expert_width=("ffn_hidden_size",)),
    "gpt_oss": replace(_MIXTRAL, expert_bias=True),
    "hunyuan_v1_moe": _HUNYUAN,
    "qwen2_moe": _QWEN2,
    "qwen3_moe": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_vl_moe_text": _QWEN3,
    "qwen3_next": _QWEN_HYBRID,
    "qwen3_5_moe": _QWEN_HYBRID,
    "qwen3_5_moe_text": _QWEN_HYBRID,
    "deepseek": _DENSE_FIRST,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _INDEXED,
    "deepseek_v4": _V4,
    "kimi_k2": _DEEPSEEK,
    "kimi_linear": _KIMI_LINEAR,
    "glm4_moe": _DENSE_FIRST,
    "glm4_moe_lite": _DEEPSEEK,
    "glm_moe_dsa": _INDEXED,
    "dots1": _DENSE_FIRST,
    "bailing_moe_v2": _DENSE_FIRST,
    "llada2_moe": _DENSE_FIRST,
    "llada": _LLADA_MOE,
    "llada_moe": _LLADA_MOE,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "ernie4_5_moe": _ERNIE,
    "jamba": _JAMBA,
    "longcat_flash": _LONGCAT,
    "nemotron_h": _NEMOTRON,
    "switch_transformers": _SWITCH,
    "nllb-moe": _NLLB,
}
