"""One rank of an expert-parallel model for real: its weights, and every phase of a layer except the exchange.

Weights follow from a seed: the dense ones are the same on every rank, an expert's come from (seed, layer, expert), so that a
rank makes just those that the plan puts on it. The trace forces the experts; the gate weights are the router's own largest.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.calibrate.kernels import expert_ffn, make_attention, router_topk
from moesim.errors import InputError
from moesim.model.spec import ModelSpec
from moesim.units import format_bytes
from moesim.validate.ranks_work import RankStep

if TYPE_CHECKING:
    import torch

EMBEDDINGS = 8191
NORM_FLOOR = 1e-5
MEMORY_SHARE = 0.7
META_BYTES = 8  # a token's slot (int32) and gate weight (float32), once for each of its k experts


@dataclass(frozen=True)
class WeightsConfig:
    """What every rank makes its weights from: `dtype` a torch name, `max_context` rows of KV cache."""

    dtype: str
    max_context: int
    seed: int


def check_ranks_model(model: ModelSpec) -> None:
    """Raise InputError for a model with parts that the real run has no kernels for."""
    if model.num_layers != model.num_moe_layers or model.shared_intermediate_size or model.expert_pool is not None:
        raise InputError(f"{model.name!r}: the real run knows models whose layers are all MoE layers of their own experts, "
                         "without shared experts")
    if model.expert_width != model.hidden_size or model.hidden_size % 2:
        raise InputError(f"{model.name!r}: the real run needs experts of the hidden width, and an even one")


def check_ranks_memory(model: ModelSpec, num_copies: int) -> None:
    """Raise InputError unless `num_copies` of all weights fit in this machine's free memory."""
    needed = num_copies * (model.num_moe_layers * model.num_experts * model.expert_bytes + model.non_expert_bytes)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > MEMORY_SHARE * free:
        raise InputError(f"the ranks may need {format_bytes(needed)}, but only {format_bytes(free)} of memory are free; "
                         "make the model smaller (num_layers, hidden_size, expert_intermediate_size)")


class RankWeights:
    """The dense weights, and a bank of experts that are made when first asked for."""

    def __init__(self, model: ModelSpec, config: WeightsConfig, device: str = "cpu") -> None:
        import torch

        self.model, self.config, self.device = model, config, device
        self.dtype = getattr(torch, config.dtype)
        generator = torch.Generator().manual_seed(config.seed)
        layers = range(model.num_moe_layers)
        self.attention = [make_attention(model, config.max_context, device, self.dtype, generator) for _ in layers]
        self.routers = [self._random(generator, model.num_experts, model.hidden_size) for _ in layers]
        self.head = self._random(generator, model.vocab_size, model.hidden_size)
        self.embedding = self._random(generator, EMBEDDINGS, model.hidden_size) * model.hidden_size**0.5
        self._bank: dict[tuple[int, int], Any] = {}

    def _random(self, generator: Any, *shape: int) -> Any:
        import torch

        values = torch.randn(shape, generator=generator) / self.model.hidden_size**0.5
        return values.to(device=self.device, dtype=self.dtype)

    def expert(self, layer: int, expert: int) -> torch.Tensor:
        """Return an expert's weights, [3 * hidden * width]; see `calibrate.kernels.expert_ffn`."""
        import torch

        if (layer, expert) not in self._bank:
            state = np.random.SeedSequence([self.config.seed, layer, expert]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
            size = 3 * self.model.hidden_size * self.model.expert_intermediate_size
            self._bank[layer, expert] = self._random(generator, size)
        return self._bank[layer, expert]


@dataclass(frozen=True)
class Packed:
    """What a rank dispatches: uint8[row, bytes] in order of target, rows per target, and each row's own token."""

    payload: Any
    counts: list[int]
    token: Any


class RankWorld:
    """One rank's phases. `hold` first says which experts its slots contain."""

    def __init__(self, weights: RankWeights, rank: int, num_ranks: int) -> None:
        self.weights, self.model, self.rank, self.num_ranks = weights, weights.model, rank, num_ranks
        self._slots: list[list[Any]] = []

    def hold(self, physical_to_logical: np.ndarray) -> None:
        """Take the experts of this rank's slots of a plan, int32[layer, slot of all ranks]."""
        per_rank = physical_to_logical.shape[1] // self.num_ranks
        own = physical_to_logical[:, self.rank * per_rank : (self.rank + 1) * per_rank]
        self._slots = [[self.weights.expert(layer, expert) for expert in row] for layer, row in enumerate(own.tolist())]

    @property
    def slots_per_rank(self) -> int:
        """Slots of a layer on this rank."""
        return len(self._slots[0])

    def embed(self, step: RankStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens' hidden rows [n, hidden] and slots int32[layer, n, k], on the device."""
        import torch

        rows = torch.from_numpy(step.rows % EMBEDDINGS).to(self.weights.device)
        slots = torch.from_numpy(np.ascontiguousarray(step.slots.transpose(1, 0, 2))).to(self.weights.device)
        return self.weights.embedding[rows], slots

    def attention(self, layer: int, hidden: torch.Tensor, context: int) -> torch.Tensor:
        """Return hidden rows after a layer's attention; each attends to the mean context."""
        if not len(hidden):
            return hidden
        return hidden + self.weights.attention[layer].forward(normalised(hidden), context)

    def route(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the experts see [n, hidden], and the k gate weights float32[n, k]."""
        seen = normalised(hidden)
        return seen, router_topk(seen, self.weights.routers[layer], self.model.top_k)

    def pack(self, seen: torch.Tensor, gates: torch.Tensor, slots: torch.Tensor) -> Packed:
        """Copy each token once per rank that holds one of its slots, with the slots and gate weights that matter there."""
        import torch

        owner = torch.div(slots, self.slots_per_rank, rounding_mode="floor")  # a pad, -1, has owner -1
        targets = torch.arange(self.num_ranks, device=slots.device)
        wanted = owner[None, :, :] == targets[:, None, None]
        target, token = wanted.any(dim=2).nonzero(as_tuple=True)
        there = torch.where(wanted[target, token], slots[token], -1)
        parts = (seen[token], there, gates[token])
        payload = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)
        return Packed(payload, torch.bincount(target, minlength=self.num_ranks).tolist(), token)

    def experts(self, layer: int, received: torch.Tensor) -> torch.Tensor:
        """Return [m, hidden]: for each received row, the weighted sum of this rank's experts that it asks for."""
        import torch

        rows, slots, gates = self._unpacked(received)
        row, place = (slots >= 0).nonzero(as_tuple=True)
        local = slots[row, place] - self.rank * self.slots_per_rank
        order = torch.argsort(local, stable=True)
        row, gate = row[order], gates[row, place][order]
        sums = torch.zeros_like(rows)
        start = 0
        for slot, count in enumerate(torch.bincount(local, minlength=self.slots_per_rank).tolist()):
            if count:
                own = row[start : start + count]
                out = self._expert(rows[own], self._slots[layer][slot])
                sums.index_add_(0, own, out * gate[start : start + count, None].to(out.dtype))
            start += count
        return sums

    def _unpacked(self, received: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        width, k = self.model.hidden_size * self.weights.dtype.itemsize, self.model.top_k
        rows = received[:, :width].contiguous().view(self.weights.dtype)
        slots = received[:, width : width + 4 * k].contiguous().view(torch.int32)
        return rows, slots, received[:, width + 4 * k :].contiguous().view(torch.float32)

    def _expert(self, rows: torch.Tensor, blob: torch.Tensor) -> torch.Tensor:
        return expert_ffn(rows, blob, self.model.hidden_size, self.model.expert_intermediate_size)

    def merge(self, hidden: torch.Tensor, token: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        """Add to each token the sums that came back for it."""
        return hidden.index_add(0, token, back)

    def logits(self, hidden: torch.Tensor, heads: np.ndarray) -> torch.Tensor:
        """Return the logits of the tokens `heads`, [request, vocabulary]."""
        import torch

        rows = hidden[torch.from_numpy(heads).to(hidden.device)]
        return normalised(rows) @ self.weights.head.T


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one torch thread and without gradients, as every rank does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def payload_bytes(model: ModelSpec) -> float:
    """Bytes of one dispatched row."""
    return model.hidden_size * model.activation_bytes + META_BYTES * model.top_k


def normalised(hidden: torch.Tensor) -> torch.Tensor:
    """Return rows of mean square one."""
    return hidden * (hidden.float().square().mean(dim=1, keepdim=True) + NORM_FLOOR).rsqrt().to(hidden.dtype)
