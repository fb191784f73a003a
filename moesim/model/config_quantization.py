"""Bytes per weight from the ``quantization_config`` of a Hugging Face config."""

from __future__ import annotations

from typing import Any

from moesim.model.config_keys import ConfigReader
from moesim.model.spec import ModelSpec

FP8_BYTES = 1.0
MXFP4_BYTES = 4.25 / 8  # 4-bit values and one 8-bit scale per 32 of them
_SCALE_BITS = 16  # of "pack-quantized" integers, one per group

KNOWN = "fp8, mxfp4 and compressed-tensors"


def quantized(reader: ConfigReader, spec: ModelSpec) -> ModelSpec:
    """Return `spec` with the bytes per weight that the config's quantization gives.

    Raises:
        InputError: a quantization that moesim does not know.
    """
    config = reader.config.get("quantization_config")
    if config is None:
        return spec
    if not isinstance(config, dict):
        raise reader.error(f"quantization_config must be a mapping, got {config!r}")
    method = config.get("quant_method")
    if method == "mxfp4":
        return spec.replace(weight_bytes=MXFP4_BYTES)
    if method == "compressed-tensors":
        return spec.replace(weight_bytes=_packed_bytes(reader, config))
    if method != "fp8":
        raise reader.error(f"quantization_config.quant_method {method!r} is unknown; known are {KNOWN}")
    expert_bytes = MXFP4_BYTES if reader.config.get("expert_dtype") == "fp4" else FP8_BYTES
    kept = spec.embedding_params + spec.num_moe_layers * spec.router_params
    kept_bytes = kept * spec.other_weight_bytes
    other = (kept_bytes + (spec.non_expert_params - kept) * FP8_BYTES) / spec.non_expert_params
    return spec.replace(weight_bytes=expert_bytes, other_weight_bytes=other)


def _packed_bytes(reader: ConfigReader, config: dict[str, Any]) -> float:
    """Return bytes per weight of the first group of a compressed-tensors config (routed experts)."""
    groups = config.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    if not isinstance(first, dict) or not isinstance(weights, dict):
        raise reader.error("quantization_config.config_groups has no group with weights")
    form = first.get("format") or config.get("format")
    if form == "mxfp4-pack-quantized":
        return MXFP4_BYTES
    if form != "pack-quantized":
        raise reader.error(f"quantization_config format {form!r} is unknown; known are pack-quantized "
                           f"and mxfp4-pack-quantized")
    part = ConfigReader(weights, f"{reader.where}: quantization_config.config_groups weights")
    return (part.whole("num_bits") + _SCALE_BITS / part.whole("group_size")) / 8
