"""Data-parallel workers on one machine.

On a CPU the default is one single-threaded process per core: it needs one
exchange a step, where threads of one process meet after each of some six
thousand small matrix products and lose much time when other work shares the
cores.  ``--workers 1 --threads N`` gives the threaded form.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn


def keep_freed_memory() -> None:
    """Let glibc reuse big blocks instead of mapping them anew at every step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            libc.mallopt(option, value)


def launch(workers: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` once in each of ``workers`` processes."""
    if workers == 1:
        function(0, *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{os.path.join(folder, 'meeting')}"
        mp.spawn(_enter, (workers, meeting, function, arguments), nprocs=workers)


def _enter(rank: int, workers: int, meeting: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Join the group of workers, do the work, leave."""
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def mean_over_workers(value: Tensor) -> None:
    """Replace a tensor by its mean over all workers, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()


def flat_gradients(model: nn.Module, extra: int) -> Tensor:
    """Give all parameters gradients that are views of one buffer, and return it.

    The buffer has ``extra`` more places at its end, for figures that are
    averaged over the workers together with the gradients.
    """
    parameters = list(model.parameters())
    flat = parameters[0].new_zeros(sum(p.numel() for p in parameters) + extra)
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return flat


def clip(gradients: Tensor, limit: float) -> None:
    """Scale gradients down to a norm of at most ``limit``."""
    gradients *= torch.clamp(limit / (gradients.norm() + 1e-6), max=1.0)
