"""TraceStream: the rows of a trace in bounded batches, from memory or from a file larger than it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError
from moesim.traces.row_checks import SMALL_COLUMNS, RowIndex, RowIndexer, check_ids, chosen_rows
from moesim.traces.store import TraceHeader, column_values, header_of, open_trace, reading, resolve_trace
from moesim.traces.trace import PAD, RoutingTrace

BATCH_SELECTIONS = 1 << 21
"""Selections (layers * k per row) of a batch where the caller does not say how many rows."""


@dataclass(frozen=True)
class TraceRows:
    """Some rows of a trace, checked; arrays writable and contiguous.

    Attributes:
        row: int64[token], the row of the trace (before a phase was selected).
        expert_ids: int16[token, layer, k].
        request_id, position, step: int32[token]; phase: int8[token].
    """

    row: np.ndarray
    expert_ids: np.ndarray
    request_id: np.ndarray
    position: np.ndarray
    phase: np.ndarray
    step: np.ndarray


class TraceStream:
    """A trace in memory, or a trace file (or ``builtin:NAME``) that is read batch by batch.

    A file is checked as `RoutingTrace` checks a whole trace: the small columns by `index`, the ids by `batches`.

    Args:
        source: the trace or the file.
        batch_rows: rows of a batch; None: `BATCH_SELECTIONS` of selections.
        verify: also compare the file's digest when `batches` comes to its end (gate weights are read for it).

    Attributes:
        header: sizes and origin.
        num_rows: rows in all.
        largest_batch: rows of the largest batch handed out so far.

    Raises:
        InputError: a file that is no trace, an empty one, or `batch_rows` below 1.
    """

    def __init__(self, source: RoutingTrace | str | os.PathLike[str], *, batch_rows: int | None = None,
                 verify: bool = False) -> None:
        if batch_rows is not None and batch_rows < 1:
            raise InputError(f"batch_rows must be at least 1, got {batch_rows}")
        self._trace = source if isinstance(source, RoutingTrace) else None
        self._path = None if isinstance(source, RoutingTrace) else resolve_trace(source)
        self._verify = verify and self._path is not None
        self.header, self.num_rows, self._digest = self._open()
        self.batch_rows = batch_rows or max(1, BATCH_SELECTIONS // (self.header.num_layers * self.header.top_k))
        self.largest_batch = 0

    def index(self, phase: str = "all", *, with_steps: bool = False) -> RowIndex:
        """Check the small columns of the whole trace and return the index of a phase.

        Raises:
            InputError: a phase out of range, positions that do not rise by one, an unknown or absent phase.
        """
        indexer = RowIndexer(phase, with_steps)
        with self._reading():
            for columns in self._columns(SMALL_COLUMNS):
                indexer.add(columns)
            indexer.check()
        return indexer.result()

    def batches(self, phase: str = "all") -> Iterator[TraceRows]:
        """Yield the rows of a phase in order, in batches that are not empty.

        Raises:
            InputError: ids out of range or repeated, or with `verify` rows that differ from the digest.
        """
        head = self.header
        hasher = hashlib.sha256(f"{head.num_experts} {(self.num_rows, head.num_layers, head.top_k)}".encode())
        start = 0
        with self._reading():
            for columns in self._columns((*SMALL_COLUMNS, "expert_ids")):
                ids = columns["expert_ids"] = columns["expert_ids"].reshape(-1, head.num_layers, head.top_k)
                if self._path is not None:
                    check_ids(ids, head.num_experts, start)
                if self._verify:
                    hasher.update(ids.data)
                chosen = chosen_rows(columns["phase"], phase)
                rows = TraceRows(np.arange(start, start + len(ids))[chosen],
                                 **{name: column[chosen] for name, column in columns.items()})
                start += len(ids)
                self.largest_batch = max(self.largest_batch, len(ids))
                if len(rows.row):
                    yield rows
            if self._verify:
                self._check_digest(hasher)

    def _open(self) -> tuple[TraceHeader, int, str]:
        """Return header, rows and digest; the header is checked as that of a trace with one padded row."""
        if self._trace is not None:
            return header_of(self._trace), self._trace.num_tokens, ""
        assert self._path is not None
        with open_trace(self._path) as (parquet, header, document):
            num_rows = parquet.metadata.num_rows
            row = np.zeros(min(num_rows, 1), np.int32)
            RoutingTrace(
                expert_ids=np.full((len(row), header.num_layers, header.top_k), PAD), request_id=row, position=row,
                phase=row, step=row, num_experts=header.num_experts,
                layer_ids=np.array(header.layer_ids, dtype=np.int64))
            return header, num_rows, document["digest"]

    def _reading(self) -> AbstractContextManager[None]:
        return nullcontext() if self._path is None else reading(self._path)

    def _columns(self, names: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
        """Yield writable copies of columns, a list column flat."""
        if self._trace is not None:
            for start in range(0, self.num_rows, self.batch_rows):
                part = slice(start, start + self.batch_rows)
                yield {name: np.array(getattr(self._trace, name)[part]) for name in names}
            return
        assert self._path is not None
        with open_trace(self._path) as (parquet, _, _):
            for batch in parquet.iter_batches(self.batch_rows, columns=list(names), use_threads=False):
                if batch.num_rows:
                    yield {name: np.array(column_values(batch, name)) for name in names}

    def _check_digest(self, hasher: hashlib._Hash) -> None:
        """Hash what comes after the ids, column by column, as `RoutingTrace.digest` does."""
        head = self.header
        names = ["request_id", "position", "phase", "step", "layer_ids"]
        names += ["gate_weights"] * head.with_weights + ["token_id"] * head.with_token_ids
        for name in names:
            if name == "layer_ids":
                hasher.update(np.array(head.layer_ids, dtype=np.int32).tobytes())
                continue
            for columns in self._columns((name,)):
                values = columns[name]
                hasher.update((values.astype(np.float32) if name == "gate_weights" else values).tobytes())
        if f"sha256:{hasher.hexdigest()}" != self._digest:
            raise InputError(f"the rows do not match the header's digest ({self._digest[:19]}...): "
                             f"the file was changed after it was written")
