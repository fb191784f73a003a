"""The micro-benchmarks: what is timed, at which sizes, on operands that are cold in the caches."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from moesim.calibrate.kernels import AttentionLayer, expert_ffn, make_attention, router_topk
from moesim.calibrate.shapes import attention_shape, router_shape
from moesim.errors import InputError
from moesim.hardware.profile import MeasuredTable
from moesim.model.spec import ModelSpec
from moesim.units import GIB, KIB, MIB

POOL_BYTES = GIB
COLD_BYTES = 256 * MIB
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
GROUPS = (1, 2, 4, 8, 16)
CONTEXTS = (64, 256, 1024, 4096)
COPY_BYTES = tuple(16 * KIB * 4**power for power in range(7))
READ_BYTES = tuple(64 * KIB * 4**power for power in range(5))
FILE_BYTES = 128 * MIB


@dataclass(frozen=True)
class Case:
    """One size of one operation: `run` executes it once; `table` is its empty table (op, device, shape, dtype, axes)."""

    table: tuple[str, str, str, str, tuple[str, ...]]
    size: tuple[float, ...]
    run: Callable[[], object]
    reset: Callable[[], object] | None = None


class Timer:
    """Times a call: on the CPU by the clock, on CUDA by the clock around a synchronised stream."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def seconds(self, case: Case) -> float:
        """Run a case once and return its seconds."""
        import torch

        if case.reset is not None:
            case.reset()
        if self._cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        case.run()
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


class Operands:
    """Tensors for the benchmarks, every page written once; weights rotate so that they are read from memory."""

    def __init__(self, model: ModelSpec, device: str, dtype: str, seed: int) -> None:
        import torch

        self.model, self.device, self.dtype_name = model, device, dtype
        self.dtype = getattr(torch, dtype)
        self._generator = torch.Generator().manual_seed(seed)
        count = int(max(*GROUPS, min(2 * max(GROUPS), POOL_BYTES // model.expert_bytes)))
        if count * model.expert_bytes > 4 * POOL_BYTES:
            raise InputError(
                f"an expert of {model.name!r} has {model.expert_bytes} bytes; calibrate a smaller model, or with smaller "
                "--hidden and --expert-intermediate"
            )
        self.pool = self.random(count, model.expert_params).mul_(model.hidden_size**-0.5)
        self.rows = self.random(max(TOKENS), model.hidden_size)
        self._turn = 0

    def random(self, *shape: int) -> Any:
        """Return a random tensor on the device."""
        import torch

        return torch.randn(shape, generator=self._generator).to(device=self.device, dtype=self.dtype)

    def next_blob(self) -> Any:
        """Return the weights of the next expert in turn."""
        self._turn = (self._turn + 1) % len(self.pool)
        return self.pool[self._turn]


def expert_cases(ops: Operands, kind: str, shape: str, dtype: str) -> Iterator[Case]:
    """Forced routing: tokens x distinct experts x the largest expert's tokens, spread evenly and as unevenly as can be."""
    table = ("grouped_ffn", kind, shape, dtype, ("tokens", "groups", "largest_group"))
    for tokens in TOKENS:
        for groups in (g for g in GROUPS if g <= tokens):
            even = [tokens // groups + (place < tokens % groups) for place in range(groups)]
            skewed = [tokens - groups + 1] + [1] * (groups - 1)
            for counts in dict.fromkeys((tuple(even), tuple(skewed))):
                yield Case(table, (tokens, groups, counts[0]), partial(_experts, ops, counts))


def _experts(ops: Operands, counts: tuple[int, ...]) -> None:
    """The eager loop: one SwiGLU per distinct expert."""
    model = ops.model
    for count in counts:
        expert_ffn(ops.rows[:count], ops.next_blob(), model.hidden_size, model.expert_intermediate_size)


def dense_cases(ops: Operands, kind: str, dtype: str) -> Iterator[Case]:
    """Attention over contexts, the router."""
    model = ops.model
    layers = [make_attention(model, max(CONTEXTS), ops.device, ops.dtype, ops._generator) for _ in range(4)]
    routers = [ops.random(model.num_experts, model.hidden_size) for _ in range(4)]
    attention = ("attention", kind, attention_shape(model), dtype, ("tokens", "context"))
    for tokens in TOKENS[::2]:
        for context in CONTEXTS:
            yield Case(attention, (tokens, tokens * context), _turns(partial(_attend, ops, tokens, context), layers))
    router = ("router", kind, router_shape(model), dtype, ("tokens",))
    for tokens in TOKENS:
        yield Case(router, (tokens,), _turns(partial(_route, ops, tokens), routers))


def _attend(ops: Operands, tokens: int, context: int, layer: AttentionLayer) -> Any:
    return layer.forward(ops.rows[:tokens], tokens * context)


def _route(ops: Operands, tokens: int, weight: Any) -> Any:
    return router_topk(ops.rows[:tokens], weight, ops.model.top_k)


def _turns(run: Callable[[Any], object], operands: list[Any]) -> Callable[[], object]:
    """Call `run` with each operand in turn."""
    state = {"turn": 0}

    def call() -> object:
        state["turn"] = (state["turn"] + 1) % len(operands)
        return run(operands[state["turn"]])

    return call


def copy_cases(device: str) -> Iterator[Case]:
    """Memory copies by size: DRAM to DRAM on a CPU; pinned, both directions, on CUDA."""
    import torch

    host = torch.ones(2 * max(COPY_BYTES), dtype=torch.uint8, pin_memory=device == "cuda")
    other = torch.ones(2 * max(COPY_BYTES), dtype=torch.uint8, device=device)
    routes = (
        {"dram_to_dram": (other, host)}
        if device == "cpu"
        else {"dram_to_hbm": (other, host), "hbm_to_dram": (host, other)}
    )
    for route, (target, source) in routes.items():
        for size in COPY_BYTES:
            yield Case(
                ("copy", route, "contiguous", "", ("bytes",)),
                (size,),
                partial(target[:size].copy_, source[size : 2 * size], non_blocking=True),
            )


class ReadFile:
    """A temporary file for reads by size, cold (dropped from the page cache first) and warm."""

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="moesim-read-")  # noqa: SIM115
        block = os.urandom(MIB)
        for _ in range(FILE_BYTES // MIB):
            self._file.write(block)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._buffer = bytearray(max(READ_BYTES))
        self._turn = 0

    def cases(self) -> Iterator[Case]:
        """Yield reads at rotating offsets."""
        for size in READ_BYTES:
            yield Case(("file_read", "flash", "warm", "", ("bytes",)), (size,), partial(self._read, size))
            if hasattr(os, "posix_fadvise"):
                yield Case(
                    ("file_read", "flash", "cold", "", ("bytes",)), (size,), partial(self._read, size), self._drop
                )

    def _read(self, size: int) -> None:
        self._turn = (self._turn + 1) % (FILE_BYTES // max(READ_BYTES))
        os.preadv(self._file.fileno(), [memoryview(self._buffer)[:size]], self._turn * max(READ_BYTES))

    def _drop(self) -> None:
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


def empty_table(
    table: tuple[str, str, str, str, tuple[str, ...]], rows: list[tuple[tuple[float, ...], float, float, int]]
) -> MeasuredTable:
    """Build a table from rows of (size, median, spread, samples)."""
    ordered = sorted(rows)
    sizes, seconds, spread, samples = zip(*ordered, strict=True)
    return MeasuredTable(*table, sizes, seconds, spread, samples)
