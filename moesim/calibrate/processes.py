"""Processes that work together: all of them end in time, or all are ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO

from moesim.errors import MoesimError

POLL_S = 0.05
LAST_WORDS = 300


class ProcessError(MoesimError):
    """A process failed, or did not end in time; the others were ended."""


def run_together(commands: Sequence[Sequence[str]], timeout_s: float, environment: Mapping[str, str] | None = None) -> None:
    """Run one process per command and wait for all; none outlives the call, however it ends.

    Raises:
        ProcessError: one ended with another status than 0 (its last line on stderr is quoted), or time ran out.
    """
    with contextlib.ExitStack() as stack:
        words = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        running: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, running)
        for command, file in zip(commands, words, strict=True):
            running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file,
                                            env={**os.environ, **(environment or {})}))
        _wait(running, words, time.monotonic() + timeout_s, timeout_s)


def _wait(running: list[subprocess.Popen[bytes]], words: Sequence[IO[bytes]], deadline: float, timeout_s: float) -> None:
    while True:
        states = [process.poll() for process in running]
        for rank, state in enumerate(states):
            if state:
                raise ProcessError(f"rank {rank} of {len(running)} ended with status {state}: {_last_line(words[rank])}")
        if all(state == 0 for state in states):
            return
        if time.monotonic() > deadline:
            late = ", ".join(str(rank) for rank, state in enumerate(states) if state is None)
            raise ProcessError(f"{len(running)} ranks: no end after {timeout_s:.0f} s (still running: {late})")
        time.sleep(POLL_S)


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip()[:LAST_WORDS] for line in reversed(lines) if line.strip()), "it said nothing")


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    for process in running:
        if process.poll() is None:
            process.kill()
    for process in running:
        process.wait()
