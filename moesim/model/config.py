"""ModelSpec from a Hugging Face ``config.json``: one table of families, one reader of aliased keys.

The same size has different names in different families, and transformers 5 renames some keys when it
saves a config again (Qwen3-MoE's ``num_experts`` becomes ``num_local_experts``), so every alias is tried
in every family. Nothing is guessed: a missing size, two aliases that disagree, an unknown architecture or
an unknown quantization is an error.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesim.artifacts import read_bytes
from moesim.errors import InputError, did_you_mean
from moesim.model.config_keys import (
    CONFIG_KEYS,
    DTYPE_KEYS,
    EXPERT_KEYS,
    GROUP_KEYS,
    HIDDEN_KEYS,
    NESTED_KEYS,
    OUTER_KEYS,
    SHARED_COUNT_KEYS,
    TOP_K_KEYS,
    ConfigReader,
)
from moesim.model.config_layers import Stack
from moesim.model.config_quantization import quantized
from moesim.model.families import FAMILIES, Family
from moesim.model.spec import ModelSpec

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}


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
    if not reader.present(EXPERT_KEYS):  # first, so that a dense model is told that it is one
        tried = ", ".join(EXPERT_KEYS)
        raise reader.error(f"this is no Mixture-of-Experts config: no number of experts; keys tried: {tried}")
    family = _family(reader)
    if family.layer_lists:
        reader = _first_of_lists(reader)
    return quantized(reader, _plain_spec(reader, family, reader.whole(*EXPERT_KEYS), name, source))


def _plain_spec(reader: ConfigReader, family: Family, num_experts: int, name: str, source: str) -> ModelSpec:
    stack = family.stack(reader)
    moe_layers = _moe_layers(reader, family, stack)
    width = reader.whole(*family.expert_width)
    num_groups, groups_per_token = _groups(reader)
    dtype_bytes = _dtype_bytes(reader)
    has_dense = len(moe_layers) < stack[0] and family.dense_width
    attention = family.attention(reader)
    mixers = family.mixers(reader, attention, stack)
    if mixers is not None:
        kind = attention.kind if mixers.per_layer == 1 else "mixed"
        attention = replace(attention, kind=kind, per_layer=mixers.per_layer)
    return ModelSpec(
        name=name,
        num_layers=stack[0],
        moe_layers=tuple(moe_layers),
        num_experts=num_experts,
        top_k=reader.whole(*TOP_K_KEYS, default=family.top_k),
        hidden_size=reader.whole(*HIDDEN_KEYS),
        expert_intermediate_size=width,
        attention=attention,
        vocab_size=reader.whole("vocab_size"),
        shared_intermediate_size=family.shared(reader, width),
        dense_intermediate_size=reader.whole(*family.dense_width) if has_dense else 0,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        gated=family.gated,
        tied_embeddings=_tied(reader, family),
        weight_bytes=dtype_bytes,
        other_weight_bytes=dtype_bytes,
        activation_bytes=dtype_bytes,
        expert_bias=family.expert_bias,
        mixer_params=mixers.num_params if mixers is not None else 0,
        extra_params=family.extra(reader, stack, len(moe_layers)),
        expert_hidden_size=reader.whole("routed_expert_hidden_size", "moe_latent_size", default=0),
        encoder_layers=stack[1],
        source=source,
    )


def _decoder_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the language model: a nested `text_config`, and DBRX's parts, brought to the top."""
    inner = config.get("text_config")
    if isinstance(inner, dict):
        outer = {key: config[key] for key in OUTER_KEYS if key in config and inner.get(key) is None}
        config = {**inner, **outer}
    for key in NESTED_KEYS:
        part = config.get(key)
        if isinstance(part, dict):
            config = {**{name: value for name, value in part.items() if name in CONFIG_KEYS}, **config}
    return config


def _first_of_lists(reader: ConfigReader) -> ConfigReader:
    """Return the config with lists of one size per layer as that size; raises InputError where they differ."""
    plain = dict(reader.config)
    for key in (*EXPERT_KEYS, *TOP_K_KEYS, *SHARED_COUNT_KEYS, "moe_intermediate_size"):
        value = plain.get(key)
        if isinstance(value, list):
            if len(set(map(repr, value))) != 1:
                raise reader.error(f"{key} differs from layer to layer, which moesim cannot count: {value!r}")
            plain[key] = value[0]
    return ConfigReader(plain, reader.where)


def _family(reader: ConfigReader) -> Family:
    kind = reader.config.get("model_type")
    if kind is None:
        raise reader.missing(("model_type",))
    if str(kind) not in FAMILIES:
        hint = did_you_mean(str(kind), FAMILIES)
        raise reader.error(f"model_type {kind!r} is not one whose layers moesim can count.{hint}")
    return FAMILIES[str(kind)]


_DENSE_KINDS, _SPARSE_KINDS = {"dense"}, {"sparse", "moe", "hash_moe"}


def _moe_layers(reader: ConfigReader, family: Family, stack: Stack) -> list[int]:
    kinds, num_layers = reader.config.get("mlp_layer_types"), stack[0]
    if kinds is None:
        return family.layers(reader, stack)
    good = isinstance(kinds, list) and all(kind in _DENSE_KINDS | _SPARSE_KINDS for kind in kinds)
    if not good or len(kinds) != num_layers:
        expected = f"'dense' or 'sparse' for each of {num_layers} layers"
        raise reader.error(f"mlp_layer_types must list {expected}, got {kinds!r}")
    return [i for i, kind in enumerate(kinds) if kind in _SPARSE_KINDS]


def _groups(reader: ConfigReader) -> tuple[int, int]:
    num_groups = reader.whole(*GROUP_KEYS, default=1)
    if reader.config.get("topk_method") == "greedy":  # DeepSeek-V2-Lite: any expert may be chosen
        return 1, 1
    chosen = reader.whole("topk_group", default=num_groups)
    if chosen > num_groups:
        raise reader.error(f"topk_group {chosen} exceeds n_group {num_groups}")
    return num_groups, chosen


def _tied(reader: ConfigReader, family: Family) -> bool:
    value = reader.config.get("tie_word_embeddings")
    if value is None:
        return family.tied
    if not isinstance(value, bool):
        raise reader.error(f"tie_word_embeddings must be true or false, got {value!r}")
    return value


def _dtype_bytes(reader: ConfigReader) -> float:
    found = reader.present(DTYPE_KEYS)
    dtype = str(reader.config[found[0]]).removeprefix("torch.") if found else "bfloat16"
    if dtype not in DTYPE_BYTES:
        raise reader.error(f"{found[0]} {dtype!r} is unknown.{did_you_mean(dtype, DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]
