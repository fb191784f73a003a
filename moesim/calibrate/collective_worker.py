"""One rank of a collective's measurement; `collectives` starts as many as there are ranks.

Run as ``python -m moesim.calibrate.collective_worker FOLDER RANK RANKS BACKEND SECONDS SEED``. The ranks meet at a file
in FOLDER; rank 0 leaves ``samples.jsonl`` there: one ``[operation, bytes, seconds]`` per run, the slowest rank's time, as soon as its pass is over.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from moesim.units import KIB

OPERATIONS = ("all_to_all", "all_gather", "all_reduce")
MESSAGE_BYTES = tuple(4 * KIB * 4**power for power in range(6))
MEET_S = 30.0
MIN_PASSES = 3
FILE_NAME = "samples.jsonl"


def main(arguments: list[str]) -> None:
    """Meet the other ranks, measure, and write what rank 0 collected."""
    import torch
    import torch.distributed as dist

    folder, rank, ranks, backend = Path(arguments[0]), int(arguments[1]), int(arguments[2]), arguments[3]
    torch.set_num_threads(1)
    device = "cpu" if backend == "gloo" else f"cuda:{rank}"
    if backend != "gloo":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=(folder / "meet").as_uri(), rank=rank, world_size=ranks,
                            timeout=timedelta(seconds=MEET_S))
    with torch.no_grad(), (folder / FILE_NAME if rank == 0 else Path(os.devnull)).open("a", encoding="utf-8") as file:
        for line in measure(ranks, device, float(arguments[4]), int(arguments[5])):
            file.write(f"{json.dumps(line)}\n")
            file.flush()
    dist.destroy_process_group()


def measure(ranks: int, device: str, seconds: float, seed: int) -> Iterator[tuple[str, int, float]]:
    """Run every operation and size in random order, pass after pass; the first pass warms up and is dropped."""
    cases = [(operation, size) for operation in OPERATIONS for size in MESSAGE_BYTES]
    calls = {case: _call(*case, ranks, device) for case in cases}
    shuffle, start, passes = random.Random(seed), time.perf_counter(), 0
    while _go_on(passes <= MIN_PASSES or time.perf_counter() - start < seconds, device):
        shuffle.shuffle(cases)
        taken = _slowest([_clock(calls[case], device) for case in cases], device)
        if passes:
            yield from [(*case, one) for case, one in zip(cases, taken, strict=True)]
        passes += 1


def _call(operation: str, num_bytes: int, ranks: int, device: str) -> Callable[[], object]:
    """Return one run of an operation; `num_bytes` is what each rank puts in (float32)."""
    import torch
    import torch.distributed as dist

    own = torch.zeros(num_bytes // 4, device=device)  # sums of zeros stay zeros
    if operation == "all_reduce":
        return lambda: dist.all_reduce(own)
    if operation == "all_gather":
        parts = [torch.empty_like(own) for _ in range(ranks)]
        return lambda: dist.all_gather(parts, own)
    received = torch.empty_like(own)
    return lambda: dist.all_to_all_single(received, own)


def _clock(call: Callable[[], object], device: str) -> float:
    import torch.distributed as dist

    dist.barrier()
    _synchronise(device)
    start = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def _slowest(seconds: list[float], device: str) -> list[float]:
    """Return the largest of the ranks' times, run by run."""
    import torch
    import torch.distributed as dist

    both: Any = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return both.tolist()


def _go_on(wanted: bool, device: str) -> bool:
    """Return what rank 0 wants: clocks differ, and all ranks must stop at the same pass."""
    import torch
    import torch.distributed as dist

    word = torch.tensor([float(wanted)], device=device)
    dist.broadcast(word, src=0)
    return bool(word.item())


if __name__ == "__main__":
    main(sys.argv[1:])
