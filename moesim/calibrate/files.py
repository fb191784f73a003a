"""Reads of a file by size: from the page cache, past it (dropped first), and around it (O_DIRECT).

The file is a temporary one without a name, so nothing stays behind. Disks that are shared drift by themselves: these
tables are reported with their spread, and no cost is taken from them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from functools import partial

from moesim.calibrate.bench import Bench, Call, Offer, Run, Size
from moesim.errors import InputError
from moesim.hardware.profile import TableKey
from moesim.units import KIB, MIB

READ_BYTES: tuple[Size, ...] = tuple((float(64 * KIB * 4**power),) for power in range(5))
MOST_BYTES = int(max(READ_BYTES)[0])
FILE_BYTES = 128 * MIB


class ReadFile:
    """A temporary file in `folder` (None: the system's) and a buffer to read into.

    Raises:
        InputError: a folder that no file can be written in.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        try:
            self._file = tempfile.TemporaryFile(prefix="moesim-read-", dir=folder)  # noqa: SIM115
            block = os.urandom(MIB)
            for _ in range(FILE_BYTES // MIB):
                self._file.write(block)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"no file can be written for reads in {folder or tempfile.gettempdir()}: {error.strerror}") from None
        self._buffer = memoryview(mmap.mmap(-1, MOST_BYTES))
        self._direct, self._turn = -1, 0

    def offer(self) -> Offer:
        """Return the benchmarks that this system can run."""
        offer = Offer([self._bench("warm", self._warm)])
        if hasattr(os, "posix_fadvise"):
            offer.benches.append(self._bench("cold", self._cold))
        else:
            offer.notes.append("cold file reads are left out: this system cannot drop a file from the page cache")
        try:
            self._direct = os.open(f"/proc/self/fd/{self._file.fileno()}", os.O_RDONLY | os.O_DIRECT)
            os.preadv(self._direct, [self._buffer[: int(READ_BYTES[0][0])]], 0)
            offer.benches.append(self._bench("direct", self._around))
        except (OSError, AttributeError) as error:
            reason = getattr(error, "strerror", None) or "this system has no O_DIRECT"
            offer.notes.append(f"file reads around the page cache are left out: {reason}")
        return offer

    def _bench(self, how: str, reset: Run) -> Bench:
        key = TableKey("file_read", "flash", how, "", ("bytes",))
        return Bench(key, READ_BYTES, partial(self._call, self._direct if how == "direct" else self._file.fileno(), reset))

    def _call(self, file: int, reset: Run, size: Size) -> Call:
        part = self._buffer[: int(size[0])]

        def run() -> None:
            os.preadv(file, [part], self._turn * MOST_BYTES)

        return Call(run, reset)

    def _around(self) -> None:
        self._turn = (self._turn + 1) % (FILE_BYTES // MOST_BYTES)

    def _warm(self) -> None:
        self._around()
        os.preadv(self._file.fileno(), [self._buffer], self._turn * MOST_BYTES)

    def _cold(self) -> None:
        self._around()
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Delete the file."""
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1
        self._file.close()
