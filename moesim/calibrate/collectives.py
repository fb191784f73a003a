"""Collectives between processes of this machine by size and ranks: gloo on CPUs, NCCL where there are several GPUs."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moesim.calibrate.bench import Size
from moesim.calibrate.collective_worker import FILE_NAME, OPERATIONS
from moesim.calibrate.processes import ProcessError, run_together
from moesim.hardware.profile import TableKey

RANKS = (2, 4)
MEASURE_SHARE = 0.4  # the rest is for starting and for a pass that takes long


def collective_key(operation: str, backend: str, ranks: int) -> TableKey:
    """Return the table of one operation between so many ranks; its axis is the bytes that each rank puts in."""
    return TableKey(operation, backend, f"ranks{ranks}", "", ("bytes",))


def collective_keys(device: str) -> dict[tuple[str, int], tuple[TableKey, ...]]:
    """Return the tables that this machine can give, by (backend, ranks): the ranks of gloo share its cores."""
    if device == "cpu":
        groups = [("gloo", ranks) for ranks in RANKS]
    else:
        import torch

        groups = [("nccl", ranks) for ranks in RANKS if ranks <= torch.cuda.device_count()]
    return {group: tuple(collective_key(operation, *group) for operation in OPERATIONS) for group in groups}


def measure_collectives(backend: str, ranks: int, seconds: float, seed: int) -> Iterator[tuple[TableKey, Size, float]]:
    """Start the ranks, let them measure, and yield (table, size, seconds) of every run; all of it within `seconds`.

    The ranks meet at a file, not at a port. Each waits at most half a minute for another, and none outlives this call.

    Raises:
        ProcessError: a rank failed, or three passes took longer; after what had been measured until then.
    """
    if seconds <= 0:
        raise ProcessError("there was no time")
    failure = None
    with tempfile.TemporaryDirectory(prefix="moesim-ranks-") as folder:
        commands = [[sys.executable, "-m", "moesim.calibrate.collective_worker", folder, str(rank), str(ranks), backend,
                     str(MEASURE_SHARE * seconds), str(seed)] for rank in range(ranks)]
        try:
            run_together(commands, seconds, _environment())
        except ProcessError as error:
            failure = error
        file = Path(folder) / FILE_NAME
        text = file.read_text(encoding="utf-8") if file.exists() else ""
    for line in text.split("\n")[:-1]:
        operation, num_bytes, taken = json.loads(line)
        yield collective_key(operation, backend, ranks), (float(num_bytes),), float(taken)
    if failure is not None:
        raise failure


def _environment() -> dict[str, str]:
    """One thread per rank, and the loopback interface where it has its usual name: a host's own name may not resolve."""
    facts = {"OMP_NUM_THREADS": "1"}
    return facts | ({"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {})

