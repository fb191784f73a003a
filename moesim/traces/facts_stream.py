"""The counts and samples behind `trace_stats`, in two passes over a trace that need not fit in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from moesim.errors import InputError
from moesim.traces.facts import Facts, Training, shuffled_tables
from moesim.traces.reductions_state import Load, Transitions
from moesim.traces.row_checks import RowIndex
from moesim.traces.store import TraceHeader
from moesim.traces.stream import TraceRows, TraceStream
from moesim.traces.trace import RoutingTrace

_Columns = tuple[Callable[[np.ndarray], None], Callable[[int], np.ndarray]]
_ID_BYTES = np.dtype(np.int16).itemsize


def stream_facts(source: RoutingTrace | str | os.PathLike[str], seed: int, max_tokens: int, *, phase: str = "all",
                 batch_rows: int | None = None, verify: bool = False) -> Facts:
    """Return the facts of one phase: those of `moesim.traces.facts.gather`, without holding the trace.

    One pass over the small columns says which rows are sampled, the other counts and gathers them. The shuffled
    tables need each token of a layer beside a random one of the next: the ids of a file wait for them in a scratch
    file (2 bytes per selection, in the folder that `tempfile` chooses, so `TMPDIR`), of which two layers are mapped at
    a time; the permutation takes 4 bytes per token.

    Raises:
        InputError: as `moesim.traces.reductions.reduce_trace`, or a scratch file that cannot be written.
    """
    stream = TraceStream(source, batch_rows=batch_rows, verify=verify)
    index = stream.index(phase)
    gatherer = _Gatherer(stream.header, index, seed, max_tokens)
    if isinstance(source, RoutingTrace) and phase == "all":
        columns = _held(source)
    else:
        columns = _scratch(index.num_rows, stream.header)
    with columns as (keep, column):
        for rows in stream.batches(phase):
            gatherer.add(rows)
            keep(rows.expert_ids)
        shuffled = shuffled_tables(column, stream.header.num_layers, stream.header.num_experts, seed)
    return gatherer.facts(shuffled)


@contextmanager
def _held(trace: RoutingTrace) -> Iterator[_Columns]:
    """Yield what `_scratch` does for a trace that is in memory anyway."""
    yield lambda expert_ids: None, lambda layer: trace.expert_ids[:, layer]


@contextmanager
def _scratch(num_rows: int, header: TraceHeader) -> Iterator[_Columns]:
    """Yield (keep, column): `keep` appends rows of ids to a file, layer by layer apart; `column` maps a layer of it."""
    row_bytes, done = header.top_k * _ID_BYTES, 0
    try:
        file = tempfile.TemporaryFile(prefix="moesim-stats-")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"trace stats needs a scratch file: {error}; set TMPDIR to a folder with room") from None

    def keep(expert_ids: np.ndarray) -> None:
        nonlocal done
        for layer in range(header.num_layers):
            file.seek((layer * num_rows + done) * row_bytes)
            file.write(expert_ids[:, layer].tobytes())
        done += len(expert_ids)

    def column(layer: int) -> np.ndarray:
        file.flush()
        return np.memmap(file, np.int16, "r", layer * num_rows * row_bytes, (num_rows, header.top_k))

    with file:
        try:
            yield keep, column
        except OSError as error:
            raise InputError(f"trace stats: its scratch file in {tempfile.gettempdir()} ({num_rows} tokens, "
                             f"{header.num_layers * num_rows * row_bytes} bytes): {error.strerror}; "
                             f"set TMPDIR to a folder with room") from None


class _Gatherer:
    """Takes the rows of a trace in order; counts both halves apart, and keeps the sampled rows."""

    def __init__(self, header: TraceHeader, index: RowIndex, seed: int, max_tokens: int) -> None:
        self.index, self.requests = index, index.requests
        self.halves = [(Load(header), Transitions(header)) for _ in range(2)]
        count = index.requests.count
        self.train_rows = _train_rows(count)
        self.num_seen = np.zeros(len(count), np.int64)
        ids = index.requests.ids
        self.sample = _Picked(header, ids, np.zeros(len(count), np.int64), count, seed, max_tokens)
        self.test = _Picked(header, ids, self.train_rows, count - self.train_rows, seed, max_tokens)

    def add(self, rows: TraceRows) -> None:
        """Count a batch, and keep what is sampled of it."""
        request = self.requests.index(rows.request_id)
        ordinal = self._ordinals(request)
        in_training = ordinal < self.train_rows[request]
        for chosen, reducers in zip((in_training, ~in_training), self.halves, strict=True):
            if chosen.any():
                part = _part(rows, chosen)
                for reducer in reducers:
                    reducer.add(part)
        for picked in (self.sample, self.test):
            picked.add(rows, request, ordinal)

    def _ordinals(self, request: np.ndarray) -> np.ndarray:
        """Return int64[row], how many rows of its request came before each row."""
        order = np.argsort(request, kind="stable")
        groups, starts, sizes = np.unique(request[order], return_index=True, return_counts=True)
        ordinal = np.empty(len(request), np.int64)
        ordinal[order] = np.arange(len(request)) - np.repeat(starts - self.num_seen[groups], sizes)
        self.num_seen[groups] += sizes
        return ordinal

    def facts(self, shuffled: np.ndarray) -> Facts:
        """Return the facts, given the shuffled tables."""
        (load, transitions), (other_load, other_transitions) = (
            [next(iter(reducer.result().values())) for reducer in half] for half in self.halves)
        num_tokens = int(self.train_rows.sum())
        return Facts(
            num_tokens=self.index.num_rows, num_requests=self.requests.size, load=load + other_load,
            transitions=transitions + other_transitions, shuffled=shuffled, sample=self.sample.trace(),
            training=Training(load, transitions, num_tokens) if num_tokens else None,
            test=self.test.trace() if num_tokens else None)


def _train_rows(count: np.ndarray) -> np.ndarray:
    """Return int64[request], leading rows for training: all of the first half of the requests, or half of the one."""
    if len(count) == 1:
        return count // 2
    rows = count.copy()
    rows[len(count) // 2:] = 0
    return rows


def _part(rows: TraceRows, chosen: np.ndarray) -> TraceRows:
    if chosen.all():
        return rows
    return TraceRows(rows.row[chosen], rows.expert_ids[chosen], rows.request_id[chosen], rows.position[chosen],
                     rows.phase[chosen], rows.step[chosen])


class _Picked:
    """Rows sampled as `moesim.traces.facts.sample_tokens` does, gathered from a stream.

    Of request r (number ``ids[r]``) the rows from the ``skip[r]``-th on, ``size[r]`` of them, are there to be sampled.
    """

    def __init__(self, header: TraceHeader, ids: np.ndarray, skip: np.ndarray, size: np.ndarray, seed: int,
                 max_tokens: int) -> None:
        order = np.flatnonzero(size)
        if size.sum() > max_tokens:
            shuffled = np.random.default_rng(seed).permutation(ids[order])
            order = order[np.argsort(ids[order])][np.argsort(shuffled)]
        before = np.cumsum(size[order]) - size[order]
        self.header, self.skip = header, skip
        self.place, self.take = np.zeros(len(size), np.int64), np.zeros(len(size), np.int64)
        self.place[order] = np.arange(len(order))
        self.take[order] = np.clip(max_tokens - before, 0, size[order])
        self.parts: list[tuple[np.ndarray, TraceRows]] = []

    def add(self, rows: TraceRows, request: np.ndarray, ordinal: np.ndarray) -> None:
        """Keep the rows of a batch that belong to the sample."""
        after = ordinal - self.skip[request]
        chosen = (after >= 0) & (after < self.take[request])
        if chosen.any():
            self.parts.append((self.place[request[chosen]], _part(rows, chosen)))

    def trace(self) -> RoutingTrace:
        """Return the sampled rows, requests in the sample's order."""
        order = np.argsort(np.concatenate([place for place, _ in self.parts]), kind="stable")
        columns = {name: np.concatenate([getattr(rows, name) for _, rows in self.parts])[order]
                   for name in ("expert_ids", "request_id", "position", "phase", "step")}
        head = self.header
        return RoutingTrace(num_experts=head.num_experts, layer_ids=np.array(head.layer_ids), model=head.model,
                            source=head.source, metadata=head.metadata, **columns)
