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
