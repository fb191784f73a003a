"""ModelSpec from a Hugging Face ``config.json``: one table of families, one reader of aliased keys.

The same size has different names in different families, and transformers 5 renames some keys when it
saves a config again (Qwen3-MoE's ``num_experts`` becomes ``num_local_experts``), so every alias is tried
in every family. Nothing is guessed: a missing size, two aliases that disagree, an unknown architecture or
an unknown quantization is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.artifacts import read_bytes
from moesim.errors import InputError, did_you_mean
from moesim.model.config_keys import (
    DTYPE_KEYS,
    EXPERT_KEYS,
    HIDDEN_KEYS,
    LAYER_KEYS,
    OUTER_KEYS,
    SHARED_COUNT_KEYS,
    TOP_K_KEYS,
    ConfigReader,
)
from moesim.model.spec import AttentionSpec, ModelSpec

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
FP8_BYTES = 1.0
MXFP4_BYTES = 4.25 / 8  # 4-bit values and one 8-bit scale per 32 of them


def _every_layer(reader: ConfigReader, num_layers: int) -> list[int]:
    return list(range(num_layers))


def _sparse_step(reader: ConfigReader, num_layers: int) -> list[int]:
    step = reader.whole("decoder_sparse_step", default=1)
    dense = reader.layer_ids("mlp_only_layers", num_layers)
    return [i for i in range(num_layers) if i not in dense and (i + 1) % step == 0]


def _layer_freq(reader: ConfigReader, num_layers: int) -> list[int]:
    if isinstance(reader.config.get("moe_layer_freq"), list):
        flags = reader.flags("moe_layer_freq", num_layers)
        return [i for i in range(num_layers) if flags[i]]
    return list(range(0, num_layers, reader.whole("moe_layer_freq", default=1)))


def _first_dense(reader: ConfigReader, num_layers: int) -> list[int]:
    first = reader.whole("first_k_dense_replace", minimum=0)
    return [i for i in _layer_freq(reader, num_layers) if i >= first]


def _interleaved(reader: ConfigReader, num_layers: int) -> list[int]:
    listed = reader.layer_ids("moe_layers", num_layers)
    step = reader.whole("interleave_moe_layer_step", default=0 if listed else None)
    return sorted(listed) or list(range(step - 1, num_layers, step))


def _no_shared(reader: ConfigReader, width: int) -> int:
    return 0


def _shared_count(reader: ConfigReader, width: int) -> int:
    return width * reader.whole(*SHARED_COUNT_KEYS, default=0, minimum=0)


def _shared_width(reader: ConfigReader, width: int) -> int:
    return reader.whole("shared_expert_intermediate_size", default=0, minimum=0)


def _one_shared(reader: ConfigReader, width: int) -> int:
    return width


@dataclass(frozen=True)
class Family:
    """How one architecture writes its config: which layers are MoE, shared experts, attention, widths."""

    layers: Callable[[ConfigReader, int], list[int]] = _every_layer
    shared: Callable[[ConfigReader, int], int] = _no_shared
    mla: bool = False
    expert_width: str = "moe_intermediate_size"
    dense_width: str = "intermediate_size"
    expert_bias: bool = False


_MIXTRAL = Family(expert_width="intermediate_size")
_DEEPSEEK = Family(layers=_first_dense, shared=_shared_count, mla=True)
_DENSE_FIRST = Family(layers=_first_dense, shared=_shared_count)
_LLADA_MOE = Family(
    layers=_layer_freq,
    shared=_shared_width,
    expert_width="expert_intermediate_size",
    dense_width="dense_intermediate_size",
)
_LLAMA4 = Family(
    layers=_interleaved,
    shared=_one_shared,
    expert_width="intermediate_size",
    dense_width="intermediate_size_mlp",
)

FAMILIES: dict[str, Family] = {
    "mixtral": _MIXTRAL,
    "phimoe": _MIXTRAL,
    "olmoe": _MIXTRAL,
    "gpt_oss": Family(expert_width="intermediate_size", expert_bias=True),
    "qwen2_moe": Family(layers=_sparse_step, shared=_shared_width),
    "qwen3_moe": Family(layers=_sparse_step),
    "deepseek": _DENSE_FIRST,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "glm4_moe": _DENSE_FIRST,
    "bailing_moe_v2": _DENSE_FIRST,
    "llada2_moe": _DENSE_FIRST,
    "llada": _LLADA_MOE,
    "llada_moe": _LLADA_MOE,
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
}


def read_config(path: str | os.PathLike[str]) -> ModelSpec:
    """Read a Hugging Face ``config.json``, or the folder that holds one, named after its folder.

    Raises:
        InputError: no such file, not a JSON object, or anything `spec_from_config` refuses.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        config = json.loads(read_bytes(file).decode("utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not a text file; expected a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object, got a {type(config).__name__}")
    return spec_from_config(config, file.resolve().parent.name or file.stem, source=str(file))


def spec_from_config(config: dict[str, Any], name: str, *, source: str = "") -> ModelSpec:
    """Return the sizes of the decoder that a Hugging Face config describes.

    Counted are weight matrices: norms and biases are left out (under 0.1 % of any known model), except the
    biases of GPT-OSS's experts, which are stored with them; so are vision towers and multi-token
    prediction layers. Bytes per weight come from ``torch_dtype`` or ``dtype`` (bfloat16 if absent), and

    - ``quantization_config`` fp8 gives 1.0 for routed experts: one fp32 scale per block of 128 x 128
      weights (0.02 %) is left out. Attention, shared and dense layers are fp8 too, while routers and
      embeddings keep the dtype; `other_weight_bytes` is the mean over these parts.
    - ``quantization_config`` mxfp4 gives 4.25/8 for routed experts, their scales included; the rest keeps
      the dtype.

    Raises:
        InputError: not a MoE, an unknown ``model_type`` or quantization, a missing or malformed key.
    """
    reader = ConfigReader(_decoder_part(config), source or f"config of {name!r}")
    num_experts = _num_experts(reader)  # first, so that a dense model is told that it is one
    return _quantized(reader, _plain_spec(reader, _family(reader), num_experts, name, source))


def _plain_spec(reader: ConfigReader, family: Family, num_experts: int, name: str, source: str) -> ModelSpec:
    num_layers = reader.whole(*LAYER_KEYS)
    moe_layers = _moe_layers(reader, family, num_layers)
    width = reader.whole(family.expert_width)
    num_groups, groups_per_token = _groups(reader)
    dtype_bytes = _dtype_bytes(reader)
    has_dense = len(moe_layers) < num_layers
    return ModelSpec(
        name=name,
        num_layers=num_layers,
        moe_layers=tuple(moe_layers),
        num_experts=num_experts,
        top_k=reader.whole(*TOP_K_KEYS),
        hidden_size=reader.whole(*HIDDEN_KEYS),
        expert_intermediate_size=width,
        attention=_attention(reader, family),
        vocab_size=reader.whole("vocab_size"),
        shared_intermediate_size=family.shared(reader, width),
        dense_intermediate_size=reader.whole(family.dense_width) if has_dense else 0,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        tied_embeddings=_tied(reader),
        weight_bytes=dtype_bytes,
        other_weight_bytes=dtype_bytes,
        activation_bytes=dtype_bytes,
        expert_bias=family.expert_bias,
        source=source,
    )


def _decoder_part(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    outer = {key: config[key] for key in OUTER_KEYS if key in config and inner.get(key) is None}
    return {**inner, **outer}


def _num_experts(reader: ConfigReader) -> int:
    if not reader.present(EXPERT_KEYS):
        tried = ", ".join(EXPERT_KEYS)
        raise reader.error(f"this is no Mixture-of-Experts config: no number of experts; keys tried: {tried}")
    return reader.whole(*EXPERT_KEYS)


def _family(reader: ConfigReader) -> Family:
    kind = reader.config.get("model_type")
    if kind is None:
        raise reader.missing(("model_type",))
    if str(kind) not in FAMILIES:
        hint = did_you_mean(str(kind), FAMILIES)
        raise reader.error(f"model_type {kind!r} is not one whose layers moesim can count.{hint}")
    return FAMILIES[str(kind)]


def _moe_layers(reader: ConfigReader, family: Family, num_layers: int) -> list[int]:
    kinds = reader.config.get("mlp_layer_types")
    if kinds is None:
        return family.layers(reader, num_layers)
    good = isinstance(kinds, list) and all(kind in ("dense", "sparse") for kind in kinds)
    if not good or len(kinds) != num_layers:
        expected = f"'dense' or 'sparse' for each of {num_layers} layers"
        raise reader.error(f"mlp_layer_types must list {expected}, got {kinds!r}")
    return [i for i, kind in enumerate(kinds) if kind == "sparse"]


def _groups(reader: ConfigReader) -> tuple[int, int]:
    num_groups = reader.whole("n_group", default=1)
    if reader.config.get("topk_method") == "greedy":  # DeepSeek-V2-Lite: any expert may be chosen
        return 1, 1
    chosen = reader.whole("topk_group", default=num_groups)
    if chosen > num_groups:
        raise reader.error(f"topk_group {chosen} exceeds n_group {num_groups}")
    return num_groups, chosen


def _attention(reader: ConfigReader, family: Family) -> AttentionSpec:
    heads = reader.whole("num_attention_heads")
    if family.mla:
        return _latent_attention(reader, heads)
    if "num_key_value_heads" not in reader.config:
        raise reader.missing(("num_key_value_heads",))
    kv_heads = reader.whole("num_key_value_heads", default=heads)
    head_dim = reader.whole("head_dim", default=0) or _split_width(reader, heads)
    return AttentionSpec(heads, kv_heads, head_dim)


def _split_width(reader: ConfigReader, heads: int) -> int:
    hidden = reader.whole(*HIDDEN_KEYS)
    if hidden % heads:
        raise reader.error(f"head_dim is absent and {heads} heads do not divide hidden_size {hidden}")
    return hidden // heads


def _latent_attention(reader: ConfigReader, heads: int) -> AttentionSpec:
    if "q_lora_rank" not in reader.config:
        raise reader.missing(("q_lora_rank",))
    nope, rope = reader.whole("qk_nope_head_dim"), reader.whole("qk_rope_head_dim")
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=nope + rope,  # of queries and keys; configs saved by transformers 5 give the rope part here
        kind="mla",
        q_lora_rank=reader.whole("q_lora_rank", default=0, minimum=0),
        kv_lora_rank=reader.whole("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=reader.whole("v_head_dim"),
    )


def _tied(reader: ConfigReader) -> bool:
    value = reader.config.get("tie_word_embeddings")
    if value is None:  # every family's class in transformers has false as its default
        return False
    if not isinstance(value, bool):
        raise reader.error(f"tie_word_embeddings must be true or false, got {value!r}")
    return value


def _dtype_bytes(reader: ConfigReader) -> float:
    found = reader.present(DTYPE_KEYS)
    dtype = str(reader.config[found[0]]).removeprefix("torch.") if found else "bfloat16"
    if dtype not in DTYPE_BYTES:
        raise reader.error(f"{found[0]} {dtype!r} is unknown.{did_you_mean(dtype, DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def _quantized(reader: ConfigReader, spec: ModelSpec) -> ModelSpec:
    quantization = reader.config.get("quantization_config")
    if quantization is None:
        return spec
    if not isinstance(quantization, dict):
        raise reader.error(f"quantization_config must be a mapping, got {quantization!r}")
    method = quantization.get("quant_method")
    if method == "mxfp4":
        return spec.replace(weight_bytes=MXFP4_BYTES)
    if method == "fp8":
        kept = spec.embedding_params + spec.num_moe_layers * spec.router_params
        kept_bytes = kept * spec.other_weight_bytes
        other = (kept_bytes + (spec.non_expert_params - kept) * FP8_BYTES) / spec.non_expert_params
        return spec.replace(weight_bytes=FP8_BYTES, other_weight_bytes=other)
    raise reader.error(f"quantization_config.quant_method {method!r} is unknown; known are fp8 and mxfp4")
