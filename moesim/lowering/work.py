"""The work of a model's parts: flops and bytes of attention, router, experts and the rest.

The formulas are the usual ones (a multiply-add is two flops; weights are read once per kernel; each
cached key and value is read once per query). Shapes name the rows of a calibration profile.
"""

from __future__ import annotations

from moesim.calibrate.shapes import attention_shape, dense_shape, expert_shape, head_shape, router_shape, shared_shape
from moesim.hardware.work import DenseWork, GroupedWork
from moesim.model.spec import ModelSpec


def compute_dtype(model: ModelSpec) -> str:
    """Return the dtype in which kernels compute: that of the activations."""
    return {1.0: "fp8", 2.0: "bf16", 4.0: "fp32"}.get(model.activation_bytes, "bf16")


def attention_work(model: ModelSpec, tokens: int, context: int) -> DenseWork:
    """One layer's attention of `tokens` rows that attend to `context` cached tokens in sum."""
    flops = 2 * tokens * model.attention_params + context * model.attention.score_flops_per_context_token()
    weights = model.attention_params * model.other_weight_bytes
    num_bytes = (
        weights + context * model.kv_bytes_per_token_layer + 2 * tokens * model.hidden_size * model.activation_bytes
    )
    return DenseWork("attention", attention_shape(model), tokens, flops, num_bytes, compute_dtype(model), context)


def _matrix_work(model: ModelSpec, op: str, shape: str, tokens: int, params: int) -> DenseWork:
    num_bytes = params * model.other_weight_bytes + 2 * tokens * model.hidden_size * model.activation_bytes
    return DenseWork(op, shape, tokens, 2.0 * tokens * params, num_bytes, compute_dtype(model))


def router_work(model: ModelSpec, tokens: int) -> DenseWork:
    """The router of one layer."""
    return _matrix_work(model, "router", router_shape(model), tokens, model.router_params)


def shared_work(model: ModelSpec, tokens: int) -> DenseWork:
    """The shared experts of one layer."""
    return _matrix_work(model, "shared_expert", shared_shape(model), tokens, model.shared_params)


def dense_work(model: ModelSpec, tokens: int) -> DenseWork:
    """The feed-forward part of a dense layer."""
    return _matrix_work(model, "dense", dense_shape(model), tokens, model.dense_params)


def head_work(model: ModelSpec, tokens: int) -> DenseWork:
    """The output embedding for `tokens` rows (prefill needs one row per request)."""
    return _matrix_work(model, "head", head_shape(model), tokens, model.hidden_size * model.vocab_size)


def experts_work(model: ModelSpec, tokens: int, groups: int, largest_group: int) -> GroupedWork:
    """The routed experts of one rank: `tokens` rows over `groups` experts, the fullest has `largest_group`."""
    per_token = 2 * (model.expert_width + model.expert_intermediate_size) * model.activation_bytes
    return GroupedWork(
        expert_shape(model),
        tokens,
        groups,
        largest_group,
        model.expert_bytes,
        model.expert_flops_per_token,
        per_token,
        compute_dtype(model),
    )
