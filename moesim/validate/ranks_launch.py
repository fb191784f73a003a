"""Processes that form one group: started afresh, watched, and all ended when one fails.

They meet at a file in a temporary folder, so no port is fixed. A rank that raises, dies or falls silent ends the whole run with
one error that names it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from moesim.errors import CheckError

GRACE_S = 1.0
START_S = 120.0  # importing torch, on a busy machine
STARTED, MESSAGE, DONE, FAILED = "started", "message", "done", "failed"


@dataclass(frozen=True)
class RankGroup:
    """A process's place in its group, and the torch device that it owns."""

    rank: int
    num_ranks: int
    device: str


Body = Callable[[RankGroup, Any, Callable[[Any], None]], None]


def run_ranks(
    body: Body,
    payloads: Sequence[Any],
    *,
    backend: str,
    timeout_s: float,
    on_message: Callable[[int, Any], None],
) -> None:
    """Run ``body(group, payload, send)`` in one new process per payload, joined in a torch process group.

    Args:
        body: a function at the top of a module; what it gives to `send` reaches `on_message(rank, ...)` here.
        backend: ``gloo``, or ``nccl`` with one CUDA device per rank.
        timeout_s: the longest that a collective, or the silence of all ranks once they have started, may last.

    Raises:
        CheckError: a rank raised, ended without a word, or said nothing for too long. No process is left behind.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="moesim-ranks-") as folder:
        processes, pipes = [], []
        try:
            for rank, payload in enumerate(payloads):
                ours, theirs = context.Pipe(duplex=False)
                place = (rank, len(payloads), backend, str(Path(folder) / "rendezvous"), timeout_s)
                process = context.Process(target=_enter, args=(body, place, payload, theirs), daemon=True)
                process.start()
                theirs.close()  # so that a rank that dies closes the pipe
                processes.append(process)
                pipes.append(ours)
            _watch(pipes, processes, timeout_s, on_message)
        finally:
            _end(processes, pipes)


def _end(processes: Sequence[Any], pipes: Sequence[Connection]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()
    for pipe in pipes:
        pipe.close()


def _watch(
    pipes: Sequence[Connection], processes: Sequence[Any], timeout_s: float, on_message: Callable[[int, Any], None]
) -> None:
    """Hand messages on until all ranks are done; raise for the first failure."""
    open_ranks, starting = set(range(len(pipes))), set(range(len(pipes)))
    while open_ranks:
        patience_s = START_S if starting else timeout_s
        ready = wait([pipes[rank] for rank in open_ranks], patience_s + GRACE_S)
        if not ready:
            raise CheckError(f"the real run: {_names(open_ranks)} said nothing for {patience_s:g} s; all were stopped")
        for rank in sorted(open_ranks):
            if pipes[rank] not in ready:
                continue
            kind, body = _receive(pipes[rank])
            if kind == STARTED:
                starting.discard(rank)
            elif kind == MESSAGE:
                on_message(rank, body)
            elif kind == DONE:
                open_ranks.discard(rank)
            else:
                raise CheckError(_cause(rank, body, open_ranks, pipes, processes))


def _receive(pipe: Connection) -> tuple[str, Any]:
    """Return the next message; a closed pipe is a failure without words."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return FAILED, None


def _cause(rank: int, body: Any, open_ranks: set[int], pipes: Sequence[Connection], processes: Sequence[Any]) -> str:
    """Say which rank failed first: when one goes, the others' collectives fail too and may be heard sooner."""
    failures = {rank: body}
    others = open_ranks - {rank}
    deadline_s = time.monotonic() + GRACE_S
    while others and (ready := wait([pipes[other] for other in others], max(0.0, deadline_s - time.monotonic()))):
        for other in sorted(others):
            if pipes[other] in ready:
                kind, text = _receive(pipes[other])
                if kind in (DONE, FAILED):
                    others.discard(other)
                if kind == FAILED:
                    failures[other] = text
    silent = sorted(place for place, found in failures.items() if found is None)
    if silent:
        processes[silent[0]].join(GRACE_S)
        code = processes[silent[0]].exitcode
        return f"the real run: rank {silent[0]} ended without a word (exit code {code}); the other ranks were stopped"
    first = min(failures, key=lambda place: failures[place][0])
    running = f" ({_names(others)} still ran)" if others else ""
    return f"the real run: rank {first} failed: {failures[first][1]}; the other ranks were stopped{running}"


def _names(ranks: set[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))


def _enter(body: Body, place: tuple[int, int, str, str, float], payload: Any, pipe: Connection) -> None:
    """The life of one rank's process."""
    rank, num_ranks, backend, meeting, timeout_s = place
    os.environ["OMP_NUM_THREADS"] = "1"
    if "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    try:
        with _group(rank, num_ranks, backend, meeting, timeout_s) as group:
            pipe.send((STARTED, None))
            body(group, payload, lambda message: pipe.send((MESSAGE, message)))
        pipe.send((DONE, None))
    except BaseException as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        with contextlib.suppress(OSError):
            pipe.send((FAILED, (time.monotonic(), text)))
        os._exit(1)  # the group may not be left in order any more


@contextlib.contextmanager
def _group(rank: int, num_ranks: int, backend: str, meeting: str, timeout_s: float) -> Iterator[RankGroup]:
    import torch
    import torch.distributed as dist

    from moesim.validate.ranks_world import one_thread

    device = "cpu"
    if backend == "nccl":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    store = dist.FileStore(meeting, num_ranks)
    store.set(f"here{rank}", "")  # ranks take unlike times to start, and `timeout_s` is not meant for that
    store.wait([f"here{other}" for other in range(num_ranks)], timedelta(seconds=START_S))
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=timeout_s)
    )
    with one_thread():
        yield RankGroup(rank, num_ranks, device)
    dist.barrier()
    dist.destroy_process_group()
