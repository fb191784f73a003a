"""Fast replacements for the stock expert loop of the Hugging Face OLMoE model.

Both functions compute what ``OlmoeExperts.forward`` computes, for the same
parameters.  They are registered with transformers under the names in
``FAST_EXPERTS`` and picked with ``model.set_experts_implementation(name)``;
nothing of them is written into the saved model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS


class GroupedLinear(torch.autograd.Function):
    """``y[rows of expert e] = x[rows of expert e] @ weight[e].T`` for sorted rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        """Multiply each run of rows by its expert's matrix, without padding."""
        out = x.new_empty(x.shape[0], weight.shape[1])
        matrices = weight.transpose(1, 2).unbind()
        pieces = zip(x.split(counts), matrices, out.split(counts), strict=True)
        for rows, matrix, target in pieces:
            torch.mm(rows, matrix, out=target)
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients with respect to the rows and to every expert's matrix."""
        x, weight = ctx.saved_tensors
        grad, sizes = grads[0].contiguous(), ctx.counts
        grad_x, grad_w = torch.empty_like(x), torch.empty_like(weight)
        pieces = zip(grad.split(sizes), weight.unbind(), grad_x.split(sizes), strict=True)
        for rows, matrix, target in pieces:
            torch.mm(rows, matrix, out=target)
        turned = grad.t().split(sizes, dim=1)
        pieces = zip(turned, x.split(sizes), grad_w.unbind(), strict=True)
        for columns, rows, target in pieces:
            torch.mm(columns, rows, out=target)
        return grad_x, grad_w, None


def sort_by_expert(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Order of the (token, choice) pairs by expert, and the pairs per expert."""
    flat = top_k_index.reshape(-1)
    return flat.argsort(stable=True), torch.bincount(flat, minlength=experts)


class Dispatch(torch.autograd.Function):
    """Rows of each (token, choice) pair in expert order; backward sums per token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, top_k: int) -> Tensor:
        """Copy each token's row to its places in the expert-sorted table."""
        ctx.save_for_backward(order)
        ctx.tokens = hidden.shape[0]
        return hidden.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Sum the gradients of a token's choices."""
        return sum_choices(grads[0], ctx.saved_tensors[0], ctx.tokens), None, None


class Combine(torch.autograd.Function):
    """The reverse of `Dispatch`: sum of each token's expert-sorted rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, tokens: int) -> Tensor:
        """Put the rows back in token order and sum each token's choices."""
        ctx.save_for_backward(order)
        ctx.top_k = order.numel() // tokens
        return sum_choices(rows, order, tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Every choice of a token gets the token's gradient."""
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order // ctx.top_k), None, None


def sum_choices(rows: Tensor, order: Tensor, tokens: int) -> Tensor:
    """Un-sort expert-sorted rows and add up the choices of each token."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return rows.index_select(0, inverse).view(tokens, -1, rows.shape[-1]).sum(dim=1)


def sorted_loop_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Expert forward as one small matmul per expert over sorted rows (CPU)."""
    order, counts = sort_by_expert(top_k_index, module.num_experts)
    sizes = counts.tolist()
    rows = Dispatch.apply(hidden, order, top_k_index.shape[-1])
    gate, up = GroupedLinear.apply(rows, module.gate_up_proj, sizes).chunk(2, dim=-1)
    scale = top_k_weights.reshape(-1)[order].unsqueeze(-1)
    inner = module.act_fn(gate) * up * scale
    out = GroupedLinear.apply(inner, module.down_proj, sizes)
    return Combine.apply(out, order, hidden.shape[0])


def padded_bmm_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Expert forward as two batched matmuls over rows padded per expert (GPU)."""
    order, counts = sort_by_expert(top_k_index, module.num_experts)
    slots = padded_slots(counts)
    rows = Dispatch.apply(hidden, order, top_k_index.shape[-1])
    padded = rows.new_zeros(module.num_experts * int(counts.max()), rows.shape[-1])
    padded = padded.index_copy(0, slots, rows).view(module.num_experts, -1, rows.shape[-1])
    gate, up = torch.bmm(padded, module.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    out = torch.bmm(module.act_fn(gate) * up, module.down_proj.transpose(1, 2))
    out = out.reshape(-1, rows.shape[-1])[slots].to(hidden.dtype)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return Combine.apply(out, order, hidden.shape[0])


def padded_slots(counts: Tensor) -> Tensor:
    """Row number in the padded (experts x longest) table of each sorted row."""
    starts = counts.cumsum(0) - counts
    expert = torch.repeat_interleave(counts)
    within = torch.arange(expert.numel(), device=counts.device) - starts[expert]
    return expert * counts.max() + within


FAST_EXPERTS = {
    "sorted_loop": sorted_loop_experts,
    "padded_bmm": padded_bmm_experts,
}


def register_fast_experts() -> None:
    """Make the fast paths known to transformers under their names."""
    for name, function in FAST_EXPERTS.items():
        ALL_EXPERTS_FUNCTIONS.register(name, function)
