"""Names of kernel shapes: how a calibration table and the work that it prices find each other."""

from __future__ import annotations

from moesim.model.spec import ModelSpec


def attention_shape(model: ModelSpec) -> str:
    """Return the shape of one layer's attention."""
    a = model.attention
    return f"h{model.hidden_size}.heads{a.num_heads}.kv{a.num_kv_heads}.d{a.head_dim}.{a.kind}"


def router_shape(model: ModelSpec) -> str:
    """Return the shape of one layer's router."""
    return f"h{model.hidden_size}.e{model.num_experts}"


def expert_shape(model: ModelSpec) -> str:
    """Return the shape of one routed expert, its weights' width included."""
    return f"h{model.expert_width}.ff{model.expert_intermediate_size}.m{model.matrices}.w{model.weight_bytes:g}"


def shared_shape(model: ModelSpec) -> str:
    """Return the shape of one layer's shared experts."""
    return f"h{model.hidden_size}.ff{model.shared_intermediate_size}"


def dense_shape(model: ModelSpec) -> str:
    """Return the shape of a dense layer's feed-forward part."""
    return f"h{model.hidden_size}.ff{model.dense_intermediate_size}"


def head_shape(model: ModelSpec) -> str:
    """Return the shape of the output embedding."""
    return f"h{model.hidden_size}.v{model.vocab_size}"
