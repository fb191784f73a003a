"""What ranks do in the tests of how they are started and stopped.

Not a test module: processes that start afresh import it by its name (`pythonpath` in pyproject.toml).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from moesim.validate.ranks_launch import RankGroup

Send = Callable[[Any], None]


def exchange(group: RankGroup, payload: int, send: Send) -> None:
    """Every rank tells every other its payload, and sends what it heard."""
    import torch
    import torch.distributed as dist

    heard = torch.zeros(group.num_ranks, dtype=torch.int64)
    dist.all_to_all_single(heard, torch.full((group.num_ranks,), payload, dtype=torch.int64))
    send((group.rank, torch.get_num_threads(), heard.tolist()))


def fail(group: RankGroup, payload: str, send: Send) -> None:
    """Rank 1 raises, is killed or stops answering as its payload says; the others wait for it."""
    import torch.distributed as dist

    dist.barrier()
    if payload == "raise":
        raise ValueError("no such expert\nhere")
    if payload == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if payload == "hang":
        time.sleep(600)
    dist.barrier()
