"""Tensors for the benchmarks, every page written once; weights rotate so that they are read from memory."""

from __future__ import annotations

from typing import Any

from moesim.calibrate.kernels import DTYPE_BYTES, spec_for_dtype
from moesim.errors import InputError
from moesim.model.spec import ModelSpec
from moesim.units import GIB, MIB

POOL_BYTES = GIB
SMALL_POOL_BYTES = 512 * MIB
COLD_BYTES = 512 * MIB
MAX_EXPERTS = 256
MAX_ROWS = 4096
_BLOCK = 1 << 22


class Operands:
    """Rows and a pool of experts' weights in one dtype.

    The pool holds about `pool_bytes`, and two experts at least: more than any cache, so that an expert that comes
    round again is cold. Its values are one random block over and over.

    Raises:
        InputError: an expert so large that two of them are more than four pools.
    """

    def __init__(self, model: ModelSpec, device: str, dtype: str, seed: int, pool_bytes: int = POOL_BYTES) -> None:
        import torch

        self.model, self.device, self.dtype_name = spec_for_dtype(model, dtype), device, dtype
        self.dtype = getattr(torch, dtype)
        self.generator = torch.Generator().manual_seed(seed)
        self.count = pool_count(self.model.expert_bytes, pool_bytes)
        if self.count * self.model.expert_bytes > 4 * POOL_BYTES:
            raise InputError(
                f"an expert of {model.name!r} has {self.model.expert_bytes} bytes; calibrate a smaller model, or with "
                "smaller --hidden and --expert-intermediate"
            )
        self.hidden, self.width = self.model.expert_width, self.model.expert_intermediate_size
        self.pool = self.random(self.count, self.model.expert_params).mul_(self.hidden**-0.5)
        self.rows = self.random(MAX_ROWS, max(self.hidden, self.model.hidden_size))
        self._turn = 0

    def random(self, *shape: int) -> Any:
        """Return a tensor of random numbers on the device: one block of up to 4 Mi of them, repeated."""
        import torch

        size = torch.Size(shape).numel()
        block = torch.randn(min(size, _BLOCK), generator=self.generator).to(device=self.device, dtype=self.dtype)
        return block.repeat(-(-size // len(block)))[:size].view(shape)

    def expert_rows(self, count: int) -> Any:
        """Return [count, expert width]: rows for the routed experts."""
        return self.rows[:count, : self.hidden]

    def token_rows(self, count: int) -> Any:
        """Return [count, hidden]: rows for the other parts."""
        return self.rows[:count, : self.model.hidden_size]

    def next_blobs(self, count: int) -> Any:
        """Return [count, weights]: the next experts in turn; `count` is not above the pool's."""
        start = self._turn if self._turn + count <= self.count else 0
        self._turn = (start + count) % self.count
        return self.pool[start : start + count]


def pool_count(expert_bytes: int, pool_bytes: int) -> int:
    """Return how many experts a pool holds."""
    return int(max(2, min(MAX_EXPERTS, pool_bytes // expert_bytes)))


def copies_to_be_cold(num_bytes: float) -> int:
    """Return how many copies of a weight of this size to rotate: as many as fill `COLD_BYTES`, four at most."""
    return int(max(1, min(4, COLD_BYTES // max(1.0, num_bytes))))


def dtype_bytes(dtype: str) -> int:
    """Return the bytes of one number."""
    return DTYPE_BYTES[dtype]
