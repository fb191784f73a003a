"""ModelSpec from a GGUF file: sizes from its metadata and tensor table, bytes exactly as they are stored."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from moesim.errors import InputError
from moesim.model.gguf import Gguf, GgufTensor, read_gguf
from moesim.model.spec import AttentionSpec, ModelSpec

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale)")
_CACHED = re.compile(r"attn_(k|kv_a_mqa|qkv)\.weight")
_CACHE_BYTES = 2.0  # llama.cpp keeps keys and values as F16 unless told otherwise


@dataclass(frozen=True)
class ExpertTensors:
    """How one MoE layer stores its experts: type by projection, and the exact bytes of one expert."""

    layer: int
    types: dict[str, str]
    expert_bytes: int


@dataclass(frozen=True)
class GgufModel:
    """A model in a GGUF file.

    `spec` has the mean bytes per weight of all routed experts, and of all the rest; `experts` what each MoE layer
    stores; `file_bytes` the tensors' bytes in all parts.
    """

    spec: ModelSpec
    experts: tuple[ExpertTensors, ...]
    file_bytes: int


def read_gguf_model(path: str | os.PathLike[str]) -> GgufModel:
    """Read the sizes of a Mixture-of-Experts model from a GGUF file (any part of a split one).

    Counted are matrices, as `spec_from_config` does; bytes are those of every tensor of the layers that run
    (layers for multi-token prediction, which llama.cpp does not run by default, are left out).

    Raises:
        InputError: as `read_gguf`, a model without experts, or sizes that are missing or disagree.
    """
    return _Builder(read_gguf(path)).model()


class _Builder:
    """Takes the tensors of a file apart: experts, the other tensors of each layer, and the rest."""

    def __init__(self, file: Gguf) -> None:
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise file.error("key 'general.architecture' is missing: not a model")
        self.architecture = architecture
        self.num_layers = self.size("block_count") - self.size("nextn_predict_layers", default=0, minimum=0)
        self.experts: dict[int, list[GgufTensor]] = {}
        self.blocks: dict[int, dict[str, GgufTensor]] = {}
        self.outside: dict[str, GgufTensor] = {}
        for tensor in file.tensors.values():
            self._sort_in(tensor)

    def _sort_in(self, tensor: GgufTensor) -> None:
        block = _BLOCK.fullmatch(tensor.name)
        if block is None:
            self.outside[tensor.name] = tensor
            return
        layer = int(block[1])
        if layer >= self.num_layers:
            return
        if _EXPERTS.fullmatch(block[2]):
            self.experts.setdefault(layer, []).append(tensor)
        else:
            self.blocks.setdefault(layer, {})[block[2]] = tensor

    def size(self, key: str, *, default: int | None = None, minimum: int = 1) -> int:
        """Return a whole number of the metadata, of an array (one entry per layer) its largest."""
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, tuple) and value:
            value = max(value)
        if value is None:
            raise self.file.error(f"key '{self.architecture}.{key}' is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.file.error(f"{self.architecture}.{key} must be a whole number of at least {minimum}, got {value!r}")
        return value

    def model(self) -> GgufModel:
        """Return the model."""
        if not self.experts:
            raise self.file.error("no tensor blk.N.ffn_*_exps: a dense model, or one whose experts are stored one "
                                  "by one as files before 2024-04 did")
        plain = self._plain_spec()
        expert_bytes = sum(tensor.num_bytes for layer in self.experts.values() for tensor in layer)
        others = [*self.outside.values(), *(t for block in self.blocks.values() for t in block.values())]
        spec = plain.replace(
            weight_bytes=expert_bytes / (plain.num_pool_experts * plain.expert_params),
            other_weight_bytes=sum(tensor.num_bytes for tensor in others) / plain.non_expert_params)
        layers = tuple(self._stored(layer, spec.num_experts) for layer in sorted(self.experts))
        return GgufModel(spec, layers, sum(tensor.num_bytes for tensor in self.file.tensors.values()))

    def _stored(self, layer: int, num_experts: int) -> ExpertTensors:
        total = sum(tensor.num_bytes for tensor in self.experts[layer])
        types = {str(_BLOCK.fullmatch(t.name)[2]).removeprefix("ffn_").replace("_exps.weight", ""): t.type  # type: ignore[index]
                 for t in self.experts[layer] if t.name.endswith(".weight")}
        return ExpertTensors(layer, types, total // num_experts)

    def _plain_spec(self) -> ModelSpec:
        """Return the sizes, with two bytes per weight, and what no formula counts as `extra_params`."""
        up, down = self._projection("up"), self._projection("down")
        hidden, table = self.size("embedding_length"), self._outside("token_embd.weight")
        attention = self._attention(hidden)
        mixers = self._matrices(lambda name: not name.startswith("ffn_"))
        dense = {tensor.shape[0] for layer, block in self.blocks.items() for name, tensor in block.items()
                 if name == "ffn_down.weight" and layer not in self.experts}
        spec = ModelSpec(
            name=gguf_name(self.file.path),
            num_layers=self.num_layers,
            moe_layers=tuple(sorted(self.experts)),
            num_experts=self.size("expert_count"),
            top_k=self.size("expert_used_count"),
            hidden_size=hidden,
            expert_intermediate_size=down.shape[0],
            attention=attention,
            vocab_size=table.shape[1],
            shared_intermediate_size=self._shared(),
            dense_intermediate_size=min(dense, default=0),
            num_groups=self.size("expert_group_count", default=1),
            groups_per_token=self.size("expert_group_used_count", default=1),
            gated=self._stored_projections() != {"up", "down"},
            tied_embeddings="output.weight" not in self.outside,
            activation_bytes=_CACHE_BYTES,
            expert_bias=any(t.name.endswith(".bias") for t in next(iter(self.experts.values()))),
            expert_hidden_size=up.shape[0] if up.shape[0] != hidden else 0,
            source=self.file.path)
        if mixers != self.num_layers * attention.num_params(hidden):
            spec = spec.replace(mixer_params=mixers)
        self._check_experts(spec)
        return self._with_rest(spec)

    def _with_rest(self, spec: ModelSpec) -> ModelSpec:
        matrices = self._matrices(lambda name: True) + sum(
            tensor.num_weights for tensor in self.outside.values() if len(tensor.shape) > 1)
        rest = matrices - spec.non_expert_params
        if rest < 0:
            raise self.file.error(f"its layers differ in ways that cannot be counted: {-rest} weights too few")
        return spec.replace(extra_params=rest)

    def _matrices(self, wanted: Callable[[str], bool]) -> int:
        """Return the weights of all matrices in layers, experts left out, whose names are `wanted`."""
        return sum(tensor.num_weights for block in self.blocks.values() for name, tensor in block.items()
                   if len(tensor.shape) > 1 and wanted(name))

    def _stored_projections(self) -> set[str]:
        return {str(_EXPERTS.search(t.name)[1]) for layer in self.experts.values() for t in layer}  # type: ignore[index]

    def _projection(self, name: str) -> GgufTensor:
        """Return the first layer's up (or fused gate and up) or down matrices of all experts."""
        layer = min(self.experts)
        names = (f"blk.{layer}.ffn_{name}_exps.weight", f"blk.{layer}.ffn_gate_{name}_exps.weight")
        found = next((self.file.tensors[one] for one in names if one in self.file.tensors), None)
        if found is None or len(found.shape) != 3:
            raise self.file.error(f"tensor {names[0]!r} of [inputs, outputs, experts] is missing")
        return found

    def _check_experts(self, spec: ModelSpec) -> None:
        expected = spec.num_experts * spec.expert_params
        for layer, tensors in self.experts.items():
            scales = sum(t.num_weights for t in tensors if t.name.endswith(".scale"))
            found = sum(t.num_weights for t in tensors) - scales
            if found != expected or any(t.shape[-1] != spec.num_experts for t in tensors):
                raise self.file.error(f"layer {layer} stores {found} expert weights, expected {expected} "
                                      f"({spec.num_experts} experts of {spec.expert_params})")

    def _outside(self, name: str) -> GgufTensor:
        tensor = self.outside.get(name)
        if tensor is None or len(tensor.shape) != 2:
            raise self.file.error(f"tensor {name!r} of [inputs, outputs] is missing")
        return tensor

    def _shared(self) -> int:
        widths = {tensor.shape[1] for block in self.blocks.values() for name, tensor in block.items()
                  if name == "ffn_up_shexp.weight" and len(tensor.shape) == 2}
        if len(widths) > 1:
            raise self.file.error(f"shared experts of several widths: {sorted(widths)}")
        return min(widths, default=0)

    def _attention(self, hidden: int) -> AttentionSpec:
        heads = self.size("attention.head_count")
        cached = sum(any(_CACHED.fullmatch(name) for name in block) and not any("ssm_" in name for name in block)
                     for block in self.blocks.values())
        if self.size("attention.kv_lora_rank", default=0, minimum=0):
            spec = self._latent(heads)
        else:
            kv_heads = self.size("attention.head_count_kv", default=heads)
            spec = AttentionSpec(heads, kv_heads, self.size("attention.key_length", default=hidden // heads or None))
        if cached == self.num_layers:
            return spec
        return replace(spec, kind="mixed", per_layer=cached / self.num_layers)

    def _latent(self, heads: int) -> AttentionSpec:
        """Latent attention; newer files say its head widths under ``*_mla``, for the cache has one wide head."""
        rope = self.size("rope.dimension_count")
        width = self.size("attention.key_length_mla", default=self.size("attention.key_length"))
        value = self.size("attention.value_length_mla", default=self.size("attention.value_length"))
        if width <= rope:
            raise self.file.error(f"attention.key_length {width} leaves nothing beside {rope} rotary dimensions")
        return AttentionSpec(
            heads, heads, width, kind="mla", q_lora_rank=self.size("attention.q_lora_rank", default=0, minimum=0),
            kv_lora_rank=self.size("attention.kv_lora_rank"), qk_nope_head_dim=width - rope, qk_rope_head_dim=rope,
            v_head_dim=value)


def gguf_name(path: str | os.PathLike[str]) -> str:
    """Return a model's name: its file's, without the ending and the number of a part."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", Path(path).stem)


def read_gguf_spec(path: str | os.PathLike[str]) -> ModelSpec:
    """Return the spec of `read_gguf_model`; raises InputError as it does."""
    try:
        return read_gguf_model(path).spec
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(os.fspath(path)) else f"{path}: {text}") from None
