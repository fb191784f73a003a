"""A routing strategy that replays a recorded trace, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SCHEMA = "moesim.vllm-routing/1"


class TraceReplay:
    """Hands out rows of a trace: call l of a forward pass gets layer l of the rows that the pass has come to.

    Attributes:
        expert_ids: int32[token, layer, k]; weights: float32 of the same shape.
        num_experts: experts per layer.
    """

    def __init__(self, expert_ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> None:
        self.expert_ids, self.weights, self.num_experts = expert_ids, weights, num_experts
        self._row = self._layer = self._tokens = 0
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, part: int, num_parts: int) -> None:
        """Start at row ``part * rows / num_parts``, so that data-parallel ranks replay different rows."""
        self._row, self._layer = part * len(self.expert_ids) // num_parts, 0

    def route(self, num_tokens: int, num_experts: int, top_k: int, device: torch.device,
              indices_type: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (weights float32[token, k], ids[token, k]) of the next layer.

        Raises:
            ValueError: another number of experts or k than the trace's.
            RuntimeError: a pass whose layers hold different numbers of tokens: the calls are out of step.
        """
        if (num_experts, top_k) != (self.num_experts, self.expert_ids.shape[2]):
            raise ValueError(f"moesim: the trace has {self.num_experts} experts, top-{self.expert_ids.shape[2]}; the "
                             f"model has {num_experts}, top-{top_k}")
        if self._layer and num_tokens != self._tokens:
            raise RuntimeError(f"moesim: layer {self._layer} is asked for {num_tokens} tokens, layer 0 was for "
                               f"{self._tokens}; replay needs --enforce-eager and one pass at a time over all layers")
        ids, weights = self._tensors(device)
        rows = (self._row + torch.arange(num_tokens, device=device)) % len(ids)
        layer = self._layer
        self._advance(num_tokens)
        return weights[rows, layer], ids[rows, layer].to(indices_type or torch.long)

    def _advance(self, num_tokens: int) -> None:
        self._tokens, self._layer = num_tokens, self._layer + 1
        if self._layer == self.expert_ids.shape[1]:
            self._layer, self._row = 0, (self._row + num_tokens) % len(self.expert_ids)

    def _tensors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._on:
            self._on[device] = (self.expert_ids.to(device), self.weights.to(device))
        return self._on[device]


def read_replay(path: str | Path) -> TraceReplay:
    """Read a file of ``moesim export --to vllm-routing``; raises ValueError for another file."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("schema") != SCHEMA:
            raise ValueError(f"{path}: expected a {SCHEMA!r} file; make it with moesim export --to vllm-routing")
        ids, weights = file.get_tensor("expert_ids"), file.get_tensor("weights")
    return TraceReplay(ids, weights, int(metadata["num_experts"]))


def install_strategy(name: str, path: str | Path) -> None:
    """Register the replay of `path` with vLLM's routing simulator as the strategy `name`."""
    from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import RoutingSimulator, RoutingStrategy

    RoutingSimulator.register_strategy(name, strategy_of(read_replay(path), RoutingStrategy, data_parallel_part))


def data_parallel_part() -> tuple[int, int]:
    """Return this process's data-parallel rank and their number; known only once vLLM has set up its groups."""
    from vllm.distributed import get_dp_group

    group = get_dp_group()
    return group.rank_in_group, group.world_size


def strategy_of(replay: TraceReplay, base: type[Any], part: Callable[[], tuple[int, int]]) -> Any:
    """Return an instance of a subclass of vLLM's strategy `base` that asks `replay`; `part` is asked at the first call."""

    class MoesimStrategy(base):
        """Routes by a recorded trace."""

        begun = False

        def route_tokens(self, hidden_states: torch.Tensor, router_logits: torch.Tensor, top_k: int,
                         indices_type: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            """Return the recorded weights and ids for as many tokens as there are hidden states."""
            if not self.begun:
                replay.begin(*part())
                self.begun = True
            return replay.route(hidden_states.shape[0], router_logits.shape[-1], top_k, hidden_states.device, indices_type)

    return MoesimStrategy()
