"""The real kernels that are calibrated and validated: SwiGLU experts, attention, router, copies.

The same functions run in `moesim calibrate` and in the torch executor, so that a micro-benchmark times
what a validated run executes. torch is imported inside.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesim.errors import InputError, require
from moesim.model.spec import ModelSpec

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SPEC_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "bf16"}
SPIN_S = 2e-4


def torch_device(device: str) -> str:
    """Resolve ``auto`` to ``cuda`` when there is one; raises InputError for a device that is not there."""
    require("torch", "torch", "running kernels")
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda: torch sees no CUDA device here; use cpu or auto")
    if device not in ("cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    return device


def spec_for_dtype(model: ModelSpec, dtype: str) -> ModelSpec:
    """Return `model` with every weight and activation of this dtype; its experts must be SwiGLU."""
    if not model.gated:
        raise InputError(f"{model.name!r} has experts of {model.matrices} matrices; the kernel is SwiGLU, with three")
    if dtype not in DTYPE_BYTES:
        raise InputError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    size = float(DTYPE_BYTES[dtype])
    return model.replace(weight_bytes=size, other_weight_bytes=size, activation_bytes=size, expert_bias=False)


def expert_ffn(rows: torch.Tensor, blob: torch.Tensor, hidden: int, width: int) -> torch.Tensor:
    """SwiGLU: ``(silu(x G^T) * (x U^T)) D^T``.

    Args:
        rows: [n, hidden]. blob: [3 * hidden * width], gate [width, hidden], up [width, hidden], down [hidden, width].

    Returns:
        [n, hidden].
    """
    from torch.nn import functional

    size = hidden * width
    gate, up = blob[:size].view(width, hidden), blob[size : 2 * size].view(width, hidden)
    down = blob[2 * size : 3 * size].view(hidden, width)
    return (functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T


@dataclass
class AttentionLayer:
    """One layer's projections and its KV cache of random content; grouped-query attention."""

    query: Any
    key: Any
    value: Any
    output: Any
    keys: Any
    values: Any

    def forward(self, rows: torch.Tensor, context: int) -> torch.Tensor:
        """Attend `rows` [n, hidden], each to ``context // n`` cached tokens; returns [n, hidden]."""
        from torch.nn import functional

        n = rows.shape[0]
        kv_heads, _, head_dim = self.keys.shape
        seen = max(1, min(context // n, self.keys.shape[1]))
        query = (rows @ self.query.T).view(n, -1, head_dim)
        new = torch_cat_kv(rows, self.key, self.value, kv_heads, head_dim)
        self.keys[:, :1], self.values[:, :1] = new
        repeat = query.shape[1] // kv_heads
        grouped = query.transpose(0, 1).reshape(1, kv_heads, repeat * n, head_dim)
        keys, values = self.keys[None, :, :seen], self.values[None, :, :seen]
        mixed = functional.scaled_dot_product_attention(grouped, keys, values)
        return mixed.reshape(-1, n, head_dim).transpose(0, 1).reshape(n, -1) @ self.output.T


def torch_cat_kv(rows: torch.Tensor, key: Any, value: Any, kv_heads: int, head_dim: int) -> tuple[Any, Any]:
    """Return the last row's new key and value, each [kv_heads, 1, head_dim]."""
    new_key, new_value = (rows @ key.T)[-1:], (rows @ value.T)[-1:]
    return new_key.view(1, kv_heads, head_dim).transpose(0, 1), new_value.view(1, kv_heads, head_dim).transpose(0, 1)


def make_attention(model: ModelSpec, max_context: int, device: str, dtype: Any, generator: Any) -> AttentionLayer:
    """Build one layer's attention with random weights; raises InputError for a kind that is not gqa."""
    import torch

    a, hidden = model.attention, model.hidden_size
    if a.kind != "gqa":
        raise InputError(f"the real run knows grouped-query attention only; {model.name!r} has {a.kind!r}")

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) / hidden**0.5).to(device=device, dtype=dtype)

    wide, narrow = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    cache = (a.num_kv_heads, max_context, a.head_dim)
    return AttentionLayer(
        random(wide, hidden),
        random(narrow, hidden),
        random(narrow, hidden),
        random(hidden, wide),
        random(*cache),
        random(*cache),
    )


def router_topk(rows: torch.Tensor, weight: torch.Tensor, top_k: int) -> torch.Tensor:
    """Softmax router: returns the k gate weights [n, k] (the experts are forced by the trace)."""
    import torch

    return torch.topk(torch.softmax((rows @ weight.T).float(), dim=-1), top_k, dim=-1).values


def wait_until(deadline_s: float) -> None:
    """Sleep, then spin, until `time.perf_counter()` reaches `deadline_s`."""
    remaining = deadline_s - time.perf_counter()
    if remaining > SPIN_S:
        time.sleep(remaining - SPIN_S)
    while time.perf_counter() < deadline_s:
        time.sleep(0)


def paced_copy(target: torch.Tensor, source: torch.Tensor, bytes_per_s: float | None) -> None:
    """Copy, and return no sooner than the paced tier would have delivered (None: as fast as memory allows)."""
    start = time.perf_counter()
    target.copy_(source, non_blocking=False)
    if bytes_per_s:
        wait_until(start + source.numel() * source.element_size() / bytes_per_s)
