"""The offloaded model for real: an expert pool on a slow tier, bounded slots on a fast one, real kernels.

Every page is written before anything is timed: a first touch costs a page fault per 4 kB.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.calibrate.kernels import expert_ffn, make_attention, paced_copy, router_topk
from moesim.errors import InputError
from moesim.lowering.graph import TaskGraph
from moesim.lowering.machine import STAGING_SLOTS
from moesim.model.spec import ModelSpec
from moesim.units import format_bytes

MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class WorldConfig:
    """Where the real run happens.

    `device` cpu or cuda; `dtype` a torch name; `slow_tier_bytes_per_s` paces the copy from the pool (None:
    unpaced); `max_context` rows of KV cache; `chunks` pieces of one expert's copy. `pool_file`: keep the experts in this file,
    mapped into memory, instead of in memory of the process (pinned for a GPU); reads then go through the page cache.
    """

    device: str
    dtype: str
    slow_tier_bytes_per_s: float | None
    max_context: int
    chunks: int
    seed: int = 0
    pool_file: str | None = None


class OffloadWorld:
    """Holds the tensors and runs one task at a time for the executor's lanes.

    Raises:
        InputError: a pool that does not fit in this machine's free memory.
    """

    def __init__(self, model: ModelSpec, num_slots: int, config: WorldConfig) -> None:
        import torch

        self.model, self.config = model, config
        self._dtype = getattr(torch, config.dtype)
        _check_memory(model, num_slots, config)
        generator = torch.Generator().manual_seed(config.seed)
        shape = (model.num_moe_layers * model.num_experts, model.expert_bytes)
        self.pool = self._new_pool(shape)
        self._fill(generator)
        self.slots = torch.zeros(
            (num_slots + STAGING_SLOTS, model.expert_bytes), dtype=torch.uint8, device=config.device
        )
        layers = range(model.num_moe_layers)
        self.attention = [
            make_attention(model, config.max_context, config.device, self._dtype, generator) for _ in layers
        ]
        self.routers = [self._random(generator, model.num_experts, model.hidden_size) for _ in layers]
        self.head = self._random(generator, model.vocab_size, model.hidden_size)
        self.rows = self._random(generator, max(1, config.max_context), model.hidden_size)
        self.host_rows = self.rows.cpu()
        base, extra = divmod(model.expert_bytes, config.chunks)
        sizes = [base + (place < extra) for place in range(config.chunks)]
        self._cuts = [sum(sizes[:place]) for place in range(config.chunks + 1)]

    def _new_pool(self, shape: tuple[int, int]) -> Any:
        """Return uint8[expert, byte], in memory or mapped from a file that is made for it."""
        import torch

        if self.config.pool_file is None:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=self.config.device == "cuda")
        try:
            flat = torch.from_file(self.config.pool_file, shared=True, size=shape[0] * shape[1], dtype=torch.uint8)
        except RuntimeError as error:
            raise InputError(f"{self.config.pool_file}: cannot keep the experts here: {str(error).splitlines()[0]}") from None
        return flat.reshape(shape)

    def _fill(self, generator: Any) -> None:
        """Write every expert: one random expert, scaled differently for each, so that no two are equal."""
        import torch

        rows = self.pool.view(self._dtype)
        base = torch.randn(rows.shape[1], generator=generator) / self.model.hidden_size**0.5
        for place, row in enumerate(rows):
            row.copy_(base * (0.5 + place / len(rows)))

    def _random(self, generator: Any, *shape: int) -> Any:
        import torch

        values = torch.randn(shape, generator=generator) / self.model.hidden_size**0.5
        return values.to(device=self.config.device, dtype=self._dtype)

    def preload(self, contents: dict[int, int]) -> None:
        """Fill slots (slot -> expert key) before a run, as the cache was preloaded."""
        for slot, key in contents.items():
            self.slots[slot].copy_(self.pool[key])

    def run(self, graph: TaskGraph, task: int) -> None:
        """Execute one task for real."""
        kind, labels = graph.kind[task], graph.labels
        layer, expert, tokens = (labels[name][task] for name in ("layer", "expert", "tokens"))
        if kind in ("load", "prefetch", "admit"):
            self._copy(layer * self.model.num_experts + expert, labels["slot"][task], labels["chunk"][task])
        elif kind == "expert":
            self._expert(self.rows[:tokens], self.slots[labels["slot"][task]])
        elif kind == "cpu_expert":
            self._expert(self.host_rows[:tokens], self.pool[layer * self.model.num_experts + expert])
        elif kind == "attention":
            self.attention[layer].forward(self.rows[:tokens], labels["context"][task])
        elif kind == "router":
            router_topk(self.rows[:tokens], self.routers[layer], self.model.top_k)
        elif kind == "head":
            _ = self.rows[:tokens] @ self.head.T
        elif kind == "send":
            self.host_rows[:1].copy_(self.rows[:1])
        elif kind == "receive":
            self.rows[:1].copy_(self.host_rows[:1])
        else:
            raise InputError(f"the real run has no kernel for tasks of kind {kind!r}")

    def _expert(self, rows: Any, blob: Any) -> Any:
        return expert_ffn(rows, blob.view(self._dtype), self.model.hidden_size, self.model.expert_intermediate_size)

    def _copy(self, key: int, slot: int, chunk: int) -> None:
        low, high = self._cuts[chunk], self._cuts[chunk + 1]
        paced_copy(self.slots[slot, low:high], self.pool[key, low:high], self.config.slow_tier_bytes_per_s)

    def slot_holds(self, slot: int, key: int) -> bool:
        """Whether a slot's bytes are exactly those of an expert (a check after a run)."""
        return bool(np.array_equal(self.slots[slot].cpu().numpy(), self.pool[key].numpy()))


def _check_memory(model: ModelSpec, num_slots: int, config: WorldConfig) -> None:
    pool = model.num_moe_layers * model.num_experts * model.expert_bytes
    host = pool + (num_slots * model.expert_bytes if config.device == "cpu" else 0) + model.non_expert_bytes
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if host > MEMORY_SHARE * pages:
        raise InputError(
            f"the real run needs {format_bytes(host)}, but only {format_bytes(pages)} of memory are free; "
            "make `model` of the validation smaller (num_layers, hidden_size, expert_intermediate_size)"
        )
