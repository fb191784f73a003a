"""The small OLMoE-shaped model: its configuration and how routing is observed."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

LAYERS, EXPERTS, TOP_K = 16, 64, 8


def build_config(vocab: int, hidden: int, width: int, eos_id: int) -> OlmoeConfig:
    """OLMoE-1B-7B's routing shape (16 x 64, top 8) with small matrices."""
    return OlmoeConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, hidden // 32),
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=2048,
        initializer_range=0.06,
        tie_word_embeddings=True,
        pad_token_id=eos_id,
        eos_token_id=eos_id,
    )


def build_model(config: OlmoeConfig, seed: int) -> OlmoeForCausalLM:
    """A freshly initialised float32 model; the seed fixes its weights."""
    torch.manual_seed(seed)
    return OlmoeForCausalLM(config).float()


class RoutingTap:
    """Records router logits and chosen experts of every layer of each forward.

    Use it as a context manager; read `logits` and `indices` (one tensor a
    layer, rows are tokens) after a forward and call `clear` before the next.
    """

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self._gates = [layer.mlp.gate for layer in model.model.layers]
        self._handles: list[Any] = []
        self.logits: list[Tensor] = []
        self.indices: list[Tensor] = []

    def __enter__(self) -> RoutingTap:
        self._handles = [gate.register_forward_hook(self._record) for gate in self._gates]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, _gate: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        self.logits.append(output[0])
        self.indices.append(output[2])

    def clear(self) -> None:
        """Forget the last forward."""
        self.logits.clear()
        self.indices.clear()

    def load(self) -> Tensor:
        """(layers, experts) share of the last forward's choices, rows sum to 1."""
        counts = [torch.bincount(i.reshape(-1), minlength=EXPERTS) for i in self.indices]
        table = torch.stack(counts).float()
        return table / table.sum(dim=1, keepdim=True)


def balance_loss(logits: list[Tensor], load: Tensor) -> Tensor:
    """Mean over layers of ``experts * sum(load * mean probability)``; 1 is even.

    ``load`` is a running mean over many batches, not of this batch alone, so an
    expert may be busy with one domain as long as it is not busy over all.
    """
    probabilities = torch.stack([layer.float().softmax(dim=-1).mean(dim=0) for layer in logits])
    return EXPERTS * (load * probabilities).sum(dim=1).mean()


def imbalance(load: Tensor) -> Tensor:
    """Busiest expert's load over the mean load, per layer."""
    return load.max(dim=1).values * load.shape[1] / load.sum(dim=1)
