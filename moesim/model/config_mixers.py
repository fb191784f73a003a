"""Attention, and what stands in its place, as a config describes it: weights and what the cache keeps.

`AttentionSpec` is one kind of layer. Where a model's layers differ, `Mixers` gives the weights of all of
them together and how many such attentions a layer has on average; which matrices there are was read from
the model classes of transformers 5 (tests count the parameters of the real classes).
"""

from __future__ import annotations

from typing import NamedTuple

from moesim.model.config_keys import HEAD_KEYS, HIDDEN_KEYS, KV_HEAD_KEYS, LOW_RANK_KEYS, ConfigReader
from moesim.model.config_layers import Stack, block_kinds
from moesim.model.spec import AttentionSpec


class Mixers(NamedTuple):
    """What mixes tokens in all layers: weights in sum, and attentions per layer (those that keep a cache)."""

    num_params: int
    per_layer: float


def grouped_attention(reader: ConfigReader) -> AttentionSpec:
    """Read grouped-query attention (with as many key-value heads as heads, plain attention)."""
    heads = reader.whole(*HEAD_KEYS)
    if not any(key in reader.config for key in KV_HEAD_KEYS):
        raise reader.missing(KV_HEAD_KEYS)
    kv_heads = reader.whole(*KV_HEAD_KEYS, default=heads)
    return AttentionSpec(heads, kv_heads, _head_dim(reader, heads))


def plain_attention(reader: ConfigReader) -> AttentionSpec:
    """Read attention whose key-value heads are as many as its heads."""
    heads = reader.whole(*HEAD_KEYS)
    return AttentionSpec(heads, heads, _head_dim(reader, heads))


def _head_dim(reader: ConfigReader, heads: int) -> int:
    width = reader.whole("head_dim", "d_kv", default=0)
    hidden = reader.whole(*HIDDEN_KEYS)
    if not width and hidden % heads:
        raise reader.error(f"head_dim is absent and {heads} heads do not divide hidden_size {hidden}")
    return width or hidden // heads


def latent_attention(reader: ConfigReader) -> AttentionSpec:
    """Read multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""
    if not any(key in reader.config for key in LOW_RANK_KEYS):
        raise reader.missing(LOW_RANK_KEYS)
    nope, rope = reader.whole("qk_nope_head_dim"), reader.whole("qk_rope_head_dim")
    heads = reader.whole(*HEAD_KEYS)
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=nope + rope,  # of queries and keys; configs saved by transformers 5 give the rope part here
        kind="mla",
        q_lora_rank=reader.whole(*LOW_RANK_KEYS, default=0, minimum=0),
        kv_lora_rank=reader.whole("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=reader.whole("v_head_dim"),
    )


def uniform(reader: ConfigReader, attention: AttentionSpec, stack: Stack) -> Mixers | None:
    """Every layer has the attention that the config describes, and nothing else."""
    return None


def doubled(reader: ConfigReader, attention: AttentionSpec, stack: Stack) -> Mixers:
    """LongCat-Flash (arXiv 2509.01322): two attentions in each layer."""
    return Mixers(2 * stack[0] * attention.num_params(_hidden(reader)), 2.0)


def indexed(reader: ConfigReader, attention: AttentionSpec, stack: Stack) -> Mixers:
    """DeepSeek-V3.2, GLM-5: latent attention and an indexer that picks the tokens to attend to, in each layer."""
    hidden, heads, width = _hidden(reader), reader.whole("index_n_heads"), reader.whole("index_head_dim")
    indexer = heads * width * reader.whole("q_lora_rank") + (width + heads) * hidden
    return Mixers(stack[0] * (attention.num_params(hidden) + indexer), 1.0)


def gated_delta(reader: ConfigReader, attention: AttentionSpec, stack: Stack) -> Mixers:
    """Qwen3-Next, Qwen3.5: gated attention in every fourth layer, gated DeltaNet in the others."""
    hidden, layers = _hidden(reader), stack[0]
    kinds = reader.config.get("layer_types")
    step = reader.whole("full_attention_interval", default=4)
    full = kinds.count("full_attention") if isinstance(kinds, list) else layers // step
    gate = hidden * attention.num_heads * attention.head_dim * (reader.config.get("attn_output_gate") is not False)
    value_heads = reader.whole("linear_num_value_heads")
    key = reader.whole("linear_num_key_heads") * reader.whole("linear_key_head_dim")
    value = value_heads * reader.whole("linear_value_head_dim")
    linear = hidden * (2 * key + 3 * value + 2 * value_heads)  # q, k; v, its gate, output; decay and beta
    return Mixers(full * (attention.num_params(hidden) + gate) + (layers - full) * linear, full / layers)


def jamba_mamba(reader: ConfigReader, attention: AttentionSpec, stack: Stack) -> Mixers:
    """Jamba: attention in one layer of each period, Mamba in the others (arXiv 2403.19887)."""
    hidden, layers = _hidden(reader), stack[0]
    period, offset = reader.whole("attn_layer_period"), reader.whole("attn_layer_offset", minimum=0)
    full = sum(i % period == offset for i in range(layers))
    inner = reader.whole("mamba_expand") * hidden
    rank = -(-hidden // 16) if reader.config.get("mamba_dt_rank") == "auto" else reader.whole("mamba_dt_rank")
    mamba = 3 * inner * hidden + inner * (2 * rank + 2 * reader.whole("mamba_d_state"))
    return Mixers(full * attention.num_params(hidden) + (layers - full) * mamba, full / layers)


def nemotron_blocks(reader: ConfigReader, attention: AttentionSpec, stack: Stack) -> Mixers:
    """Nemotron-H: blocks that are Mamba-2 or attention (the rest mixes nothing)."""
    hidden, kinds = _hidden(reader), block_kinds(reader, stack[0])
    heads = reader.whole("mamba_num_heads")
    inner = heads * reader.whole("mamba_head_dim")
    mamba = hidden * (3 * inner + 2 * reader.whole("n_groups") * reader.whole("ssm_state_size") + heads)
    full = kinds.count("full_attention")
    return Mixers(full * attention.num_params(hidden) + kinds.count("linear_attention") * mamba, full / stack[0])


def kimi_delta(reader: ConfigReader, attention: AttentionSpec, stack: Stack) -> Mixers:
    """Kimi Linear, Kimi-K3: Kimi Delta Attention, and latent attention in the layers listed (arXiv 2510.26692)."""
    hidden, layers = _hidden(reader), stack[0]
    linear = reader.config.get("linear_attn_config")
    if not isinstance(linear, dict):
        raise reader.missing(("linear_attn_config",))
    part = ConfigReader(linear, f"{reader.where}: linear_attn_config")
    listed = linear.get("full_attn_layers")
    if not isinstance(listed, list) or not all(type(i) is int and 1 <= i <= layers for i in listed):
        raise part.error(f"full_attn_layers must list layers 1 ... {layers}, got {listed!r}")
    heads, width = part.whole("num_heads"), part.whole("head_dim")
    inner, low_rank = heads * width, width * (hidden + heads * width)
    gate = hidden * inner if linear.get("use_full_rank_gate") else low_rank
    delta = 4 * hidden * inner + low_rank + hidden * heads + gate  # q, k, v, output; decay; beta; output gate
    full = attention.num_params(hidden)
    if reader.config.get("mla_use_output_gate"):
        full += hidden * attention.num_heads * attention.v_head_dim
    return Mixers(len(listed) * full + (layers - len(listed)) * delta, len(listed) / layers)


def cross_attending(reader: ConfigReader, attention: AttentionSpec, stack: Stack) -> Mixers:
    """Encoder-decoders: decoder layers attend to themselves and to the encoder."""
    decoder = stack[0] - stack[1]
    return Mixers((stack[1] + 2 * decoder) * attention.num_params(_hidden(reader)), decoder / stack[0])


def compressed_attention(reader: ConfigReader) -> AttentionSpec:
    """Read DeepSeek-V4's attention: one key-value head, whose vector is key and value at once."""
    return AttentionSpec(reader.whole("num_attention_heads"), 1, reader.whole("head_dim"))


def compressed(reader: ConfigReader, attention: AttentionSpec, stack: Stack) -> Mixers:
    """DeepSeek-V4: a window of tokens, and vectors that stand for 4 or 128 tokens each.

    Per token a layer keeps 1 / ratio vectors (half of a key and a value each); the window and the indexer's
    small keys are left out.
    """
    hidden, layers, width = _hidden(reader), stack[0], attention.head_dim
    ratios = _compress_ratios(reader, layers)
    rank, groups = reader.whole("q_lora_rank"), reader.whole("o_groups")
    inner, low = attention.num_heads * width, groups * reader.whole("o_lora_rank")
    base = rank * (hidden + inner) + width * hidden + low * (inner // groups + hidden)
    heads, small = reader.whole("index_n_heads"), reader.whole("index_head_dim")
    indexer = 4 * small * hidden + heads * (small * rank + hidden)
    extra = {0: 0, 4: 4 * width * hidden + indexer}
    total = layers * base + sum(extra.get(ratio, 2 * width * hidden) for ratio in ratios)
    return Mixers(total, sum(0.5 / ratio for ratio in ratios if ratio) / layers)


_COMPRESS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def _compress_ratios(reader: ConfigReader, layers: int) -> list[int]:
    """Return each layer's ratio; transformers 5 saves kinds of layers instead of ratios."""
    kinds, ratios = reader.config.get("layer_types"), reader.config.get("compress_ratios")
    if isinstance(kinds, list) and set(kinds) <= set(_COMPRESS):
        ratios = [_COMPRESS[kind] for kind in kinds]
    if not isinstance(ratios, list) or len(ratios) < layers or set(ratios) - {0, 4, 128}:
        raise reader.error(f"compress_ratios must list 0, 4 or 128 for each of {layers} layers, got {ratios!r}")
    return ratios[:layers]  # those of multi-token prediction follow


def _hidden(reader: ConfigReader) -> int:
    return reader.whole(*HIDDEN_KEYS)


def nothing_else(reader: ConfigReader, stack: Stack, moe_layers: int) -> int:
    """All weights are counted elsewhere."""
    return 0


def longcat_rest(reader: ConfigReader, stack: Stack, moe_layers: int) -> int:
    """LongCat-Flash: two dense feed-forward parts in each layer, and router columns of its zero experts."""
    dense = 6 * reader.whole("ffn_hidden_size", "intermediate_size")
    return stack[0] * _hidden(reader) * (dense + reader.whole("zero_expert_num", default=0, minimum=0))


def hyper_connections(reader: ConfigReader, stack: Stack, moe_layers: int) -> int:
    """DeepSeek-V4: manifold-constrained hyper-connections around both parts of a layer, and at the end."""
    lanes = reader.whole("hc_mult")
    return lanes * _hidden(reader) * (2 * stack[0] * lanes * (2 + lanes) + lanes)


def latent_experts(reader: ConfigReader, stack: Stack, moe_layers: int) -> int:
    """Projections into and out of the width in which routed experts work, in each MoE layer."""
    width = reader.whole("routed_expert_hidden_size", "moe_latent_size", default=0)
    return 2 * moe_layers * width * _hidden(reader)


def nemotron_rest(reader: ConfigReader, stack: Stack, moe_layers: int) -> int:
    """Nemotron-H: the projections of `latent_experts`, and blocks that are a plain feed-forward part."""
    plain = block_kinds(reader, stack[0]).count("mlp")
    dense = 2 * plain * _hidden(reader) * reader.whole("intermediate_size") if plain else 0
    return latent_experts(reader, stack, moe_layers) + dense
