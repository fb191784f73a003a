"""ModelSpec: the sizes of a Mixture-of-Experts model, and the bytes and flops that follow from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moesim.errors import InputError, did_you_mean

MATRICES_GATED, MATRICES_PLAIN = 3, 2
KINDS = ("gqa", "mla", "mixed")


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention: its parameters and what one token adds to the KV cache.

    `kind` is ``gqa`` (separate query, key, value, output matrices), ``mla`` (DeepSeek-V2's latent attention,
    arXiv 2405.04434 section 2.1; the ranks and head widths are then set), or ``mixed``: layers differ, and
    `per_layer` of these attentions (latent ones if the ranks are set) stand in a layer on average; the rest,
    as linear attention, keeps a state of fixed size.

    Raises:
        InputError: an unknown kind, or `per_layer` below 0.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kind: str = "gqa"
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    per_layer: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"attention kind {self.kind!r} is unknown.{did_you_mean(self.kind, KINDS)}")
        if not self.per_layer >= 0 or (self.kind != "mixed" and self.per_layer != 1):
            raise InputError(f"attention: per_layer {self.per_layer} does not go with kind {self.kind!r}")

    @property
    def latent(self) -> bool:
        """Whether the cache holds latent vectors."""
        return self.kv_lora_rank > 0

    def num_params(self, hidden_size: int) -> int:
        """Return the weights of one such attention (biases and norms left out)."""
        if not self.latent:
            return hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        query = hidden_size * self.num_heads * qk_head_dim
        if self.q_lora_rank:
            query = self.q_lora_rank * (hidden_size + self.num_heads * qk_head_dim)
        down = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
        up = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + down + up + self.num_heads * self.v_head_dim * hidden_size

    def kv_values_per_token(self) -> float:
        """Return the numbers that one token adds to one layer's KV cache (a whole number unless mixed)."""
        values = self.kv_lora_rank + self.qk_rope_head_dim if self.latent else 2 * self.num_kv_heads * self.head_dim
        return values if self.per_layer == 1 else values * self.per_layer

    def score_flops_per_context_token(self) -> float:
        """Return the flops of one query token against one cached token, scores and values, in one layer."""
        widths = 2 * self.kv_lora_rank + self.qk_rope_head_dim if self.latent else 2 * self.head_dim
        flops = 2 * self.num_heads * widths
        return flops if self.per_layer == 1 else flops * self.per_layer


@dataclass(frozen=True)
class ModelSpec:
    """A Mixture-of-Experts decoder (or an encoder and a decoder, whose layers follow each other).

    `moe_layers` maps the MoE layer index used everywhere in moesim (0 ... num_moe_layers - 1) to the
    model's own layer. `weight_bytes` is bytes per routed-expert weight (2 for bf16, 1 for fp8, 0.53125
    for mxfp4 with its scales); `other_weight_bytes` is for everything else. Experts may be shared between layers through
    `expert_pool`: int64[layer, expert] -> weights id (default: every (layer, expert) its own).

    Set where a model departs from num_layers equal layers: `mixer_params`, the weights of all layers' attentions
    and what stands in their place; `extra_params`, weights that no other field counts; `expert_hidden_size`, the
    width of a token in routed experts where it is not `hidden_size`; `encoder_layers`, how many of the layers
    come first and are an encoder's. 0 is "as usual". Costs of one layer are then those of the mean layer.

    Raises:
        InputError: sizes that are not positive, ids out of range, groups that do not divide experts.
    """

    name: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_intermediate_size: int
    attention: AttentionSpec
    vocab_size: int
    shared_intermediate_size: int = 0
    dense_intermediate_size: int = 0
    num_groups: int = 1
    groups_per_token: int = 1
    gated: bool = True
    tied_embeddings: bool = False
    weight_bytes: float = 2.0
    other_weight_bytes: float = 2.0
    activation_bytes: float = 2.0
    expert_bias: bool = False
    mixer_params: int = 0
    extra_params: int = 0
    expert_hidden_size: int = 0
    encoder_layers: int = 0
    expert_pool: np.ndarray | None = field(default=None, compare=False)
    source: str = ""

    def __post_init__(self) -> None:
        positive = (
            "num_layers",
            "num_experts",
            "top_k",
            "hidden_size",
            "expert_intermediate_size",
            "vocab_size",
        )
        for key in positive:
            if getattr(self, key) < 1:
                raise InputError(f"model {self.name!r}: {key} must be at least 1, got {getattr(self, key)}")
        for key in ("weight_bytes", "other_weight_bytes", "activation_bytes"):
            if not getattr(self, key) > 0:
                raise InputError(f"model {self.name!r}: {key} must be positive, got {getattr(self, key)}")
        for key in ("mixer_params", "extra_params", "expert_hidden_size", "encoder_layers"):
            if getattr(self, key) < 0:
                raise InputError(f"model {self.name!r}: {key} must not be negative, got {getattr(self, key)}")
        if self.encoder_layers >= self.num_layers:
            raise InputError(f"model {self.name!r}: {self.encoder_layers} encoder layers leave no decoder "
                             f"of {self.num_layers} layers")
        if not self.moe_layers:
            raise InputError(f"model {self.name!r} has no MoE layer")
        if list(self.moe_layers) != sorted(set(self.moe_layers)) or self.moe_layers[-1] >= self.num_layers:
            raise InputError(f"model {self.name!r}: moe_layers must rise and stay below {self.num_layers}")
        if self.top_k > self.num_experts:
            raise InputError(f"model {self.name!r}: top_k {self.top_k} exceeds {self.num_experts} experts")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise InputError(
                f"model {self.name!r}: {self.num_groups} groups do not divide {self.num_experts} experts"
            )
        self._check_pool()

    def _check_pool(self) -> None:
        if self.expert_pool is None:
            return
        shape = (self.num_moe_layers, self.num_experts)
        if self.expert_pool.shape != shape or self.expert_pool.min() < 0:
            raise InputError(
                f"model {self.name!r}: expert_pool must be [layer, expert] = {shape} of ids >= 0"
            )

    @property
    def num_moe_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.moe_layers)

    @property
    def num_dense_layers(self) -> int:
        """Number of layers with an ordinary feed-forward part."""
        return self.num_layers - self.num_moe_layers

    @property
    def matrices(self) -> int:
        """Weight matrices per feed-forward part (gate, up, down; or two)."""
        return MATRICES_GATED if self.gated else MATRICES_PLAIN

    @property
    def expert_width(self) -> int:
        """Width of a token where routed experts take and return it."""
        return self.expert_hidden_size or self.hidden_size

    @property
    def expert_params(self) -> int:
        """Weights of one routed expert."""
        bias = (2 * self.expert_intermediate_size + self.expert_width) if self.expert_bias else 0
        return self.matrices * self.expert_width * self.expert_intermediate_size + bias

    @property
    def expert_bytes(self) -> int:
        """Bytes of one routed expert as stored."""
        return round(self.expert_params * self.weight_bytes)

    @property
    def expert_flops_per_token(self) -> int:
        """Flops of one routed expert for one token (a multiply and an add are two)."""
        return 2 * self.matrices * self.expert_width * self.expert_intermediate_size

    @property
    def shared_params(self) -> int:
        """Weights of one layer's shared experts."""
        return self.matrices * self.hidden_size * self.shared_intermediate_size

    @property
    def router_params(self) -> int:
        """Weights of one layer's router."""
        return self.hidden_size * self.num_experts

    @property
    def dense_params(self) -> int:
        """Weights of one dense layer's feed-forward part."""
        return self.matrices * self.hidden_size * self.dense_intermediate_size

    @property
    def attention_params(self) -> int:
        """Weights of one layer's attention (of the mean layer's mixers, where layers differ)."""
        if self.mixer_params:
            return round(self.mixer_params / self.num_layers)
        return self.attention.num_params(self.hidden_size)

    @property
    def embedding_params(self) -> int:
        """Weights of the input and output embeddings."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def kv_bytes_per_token_layer(self) -> float:
        """Bytes that one token adds to one layer's KV cache."""
        return self.attention.kv_values_per_token() * self.activation_bytes

    @cached_property
    def num_pool_experts(self) -> int:
        """Distinct routed experts stored (shared pools count once)."""
        if self.expert_pool is None:
            return self.num_moe_layers * self.num_experts
        return len(np.unique(self.expert_pool))

    @property
    def non_expert_params(self) -> int:
        """Weights of everything that is not a routed expert."""
        moe_part = self.num_moe_layers * (self.shared_params + self.router_params)
        dense_part = self.num_dense_layers * self.dense_params
        mixers = self.mixer_params or self.num_layers * self.attention_params
        return mixers + moe_part + dense_part + self.embedding_params + self.extra_params

    @property
    def total_params(self) -> int:
        """Weights of the whole model."""
        return self.num_pool_experts * self.expert_params + self.non_expert_params

    @property
    def active_params(self) -> int:
        """Weights that one token uses (its top-k experts and all the rest, embeddings included)."""
        return self.num_moe_layers * self.top_k * self.expert_params + self.non_expert_params

    @property
    def non_expert_bytes(self) -> int:
        """Bytes of everything that is not a routed expert."""
        return round(self.non_expert_params * self.other_weight_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole model as stored."""
        return self.num_pool_experts * self.expert_bytes + self.non_expert_bytes

    def replace(self, **changes: object) -> ModelSpec:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
