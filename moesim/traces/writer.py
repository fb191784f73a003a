"""TraceWriter: a trace written request by request, so that an interrupted capture can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from moesim.artifacts import atomic_path
from moesim.errors import InputError
from moesim.traces.store import (
    PART_FOLDER_SUFFIX,
    ROW_GROUP_ROWS,
    TraceHeader,
    arrow_schema,
    column_values,
    header_of,
    open_trace,
    open_writer,
    write_trace,
)
from moesim.traces.trace import RoutingTrace


class TraceWriter:
    """Writes a trace in batches of whole requests; use it as a context manager.

    Each batch becomes one part file under ``<path>.parts/``, whole or absent. A clean end merges the
    parts into `path` (streamed, so a trace may be larger than memory) and removes them; an exception
    leaves them, and ``resume=True`` goes on after them. The merged file is the same, byte for byte,
    as one written without an interruption.

    Args:
        path: the file to write.
        num_layers, top_k, num_experts, layer_ids, model, source, metadata: as in RoutingTrace.
        with_weights, with_token_ids: which optional columns every batch has.
        resume: go on after the parts of an interrupted run with the same header.

    Raises:
        InputError: parts are there and `resume` is off, or they were written with another header.
    """

    def __init__(self, path: str | os.PathLike[str], *, num_layers: int, top_k: int, num_experts: int,
                 layer_ids: Sequence[int], model: str = "", source: str = "",
                 metadata: dict[str, Any] | None = None, with_weights: bool = True,
                 with_token_ids: bool = False, resume: bool = False) -> None:
        self.path = Path(path)
        self.folder = self.path.with_name(self.path.name + PART_FOLDER_SUFFIX)
        self.header = TraceHeader(num_layers, top_k, num_experts, tuple(int(i) for i in layer_ids), model,
                                  source, dict(metadata or {}), with_weights, with_token_ids)
        self._parts: list[Path] = []
        self._requests: set[int] = set()
        self._next_step = 0
        if self.folder.is_dir() and any(self.folder.iterdir()):
            if not resume:
                raise InputError(f"{self.folder}: parts of an interrupted run are here; "
                                 f"resume it, or remove the folder to start anew")
            self._load_parts()
        self.folder.mkdir(parents=True, exist_ok=True)

    def requests_done(self) -> set[int]:
        """Return the ids of the requests that are already written."""
        return set(self._requests)

    @property
    def next_step(self) -> int:
        """The first step number that no written row has."""
        return self._next_step

    def append(self, batch: RoutingTrace) -> None:
        """Write one batch of whole requests as a part file.

        Raises:
            InputError: a batch of another shape, or with a request that is already written.
        """
        _check_same(self.header, header_of(batch), self.path, with_origin=False)
        repeated = sorted(self._requests.intersection(batch.requests().tolist()))
        if repeated:
            raise InputError(f"{self.path}: request {repeated[0]} is already written; "
                             f"a batch must hold whole requests")
        origin = dataclasses.replace(batch, model=self.header.model, source=self.header.source,
                                     metadata=self.header.metadata)
        self._parts.append(write_trace(origin, self.folder / f"part-{len(self._parts):06d}.parquet"))
        self._note(batch.request_id, batch.step)

    def close(self) -> None:
        """Merge the parts into `path` and remove them.

        Raises:
            InputError: nothing was written.
        """
        if not self._parts:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise InputError(f"{self.path}: no request was written, so there is no trace")
        schema = arrow_schema(self.header, self._digest())
        with atomic_path(self.path) as temporary, open_writer(temporary, schema) as writer:
            for table in self._row_groups():
                writer.write_table(table.cast(schema), row_group_size=ROW_GROUP_ROWS)
        shutil.rmtree(self.folder)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif not self._parts:
            shutil.rmtree(self.folder, ignore_errors=True)  # nothing to resume from

    def _note(self, request_id: np.ndarray, step: np.ndarray) -> None:
        self._requests.update(np.unique(request_id).tolist())
        self._next_step = max(self._next_step, int(step.max()) + 1)

    def _load_parts(self) -> None:
        self._parts = sorted(self.folder.glob("part-*.parquet"))
        for part in self._parts:
            with open_trace(part) as (parquet, header, _):
                _check_same(self.header, header, part, with_origin=True)
                table = parquet.read(columns=["request_id", "step"])
                self._note(column_values(table, "request_id"), column_values(table, "step"))

    def _tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        for part in self._parts:
            with open_trace(part) as (parquet, _, _):
                yield parquet.read(columns=columns)

    def _row_groups(self) -> Iterator[pa.Table]:
        """Yield the rows in tables of `ROW_GROUP_ROWS`, so that small parts do not make small groups."""
        waiting: list[pa.Table] = []
        for table in self._tables():
            waiting.append(table.replace_schema_metadata(None))
            joined = sum(len(part) for part in waiting)
            if joined >= ROW_GROUP_ROWS:
                whole = pa.concat_tables(waiting)
                full = joined - joined % ROW_GROUP_ROWS
                yield whole.slice(0, full)
                waiting = [whole.slice(full)]
        if waiting and sum(len(part) for part in waiting):
            yield pa.concat_tables(waiting)

    def _digest(self) -> str:
        """Return `RoutingTrace.digest` of all parts, one column at a time."""
        head = self.header
        rows = sum(len(table) for table in self._tables(["phase"]))
        hasher = hashlib.sha256(f"{head.num_experts} {(rows, head.num_layers, head.top_k)}".encode())
        names = ["expert_ids", "request_id", "position", "phase", "step", "layer_ids"]
        names += ["gate_weights"] * head.with_weights + ["token_id"] * head.with_token_ids
        for name in names:
            if name == "layer_ids":
                hasher.update(np.array(head.layer_ids, dtype=np.int32).tobytes())
                continue
            for table in self._tables([name]):
                values = column_values(table, name)
                hasher.update((values.astype(np.float32) if name == "gate_weights" else values).tobytes())
        return f"sha256:{hasher.hexdigest()}"


_SHAPE_KEYS = ("num_layers", "top_k", "num_experts", "layer_ids", "with_weights", "with_token_ids")


def _check_same(expected: TraceHeader, found: TraceHeader, path: Path, with_origin: bool) -> None:
    for key in _SHAPE_KEYS + ("model", "source") * with_origin:
        if getattr(expected, key) != getattr(found, key):
            raise InputError(f"{path}: {key} is {getattr(found, key)!r}, expected {getattr(expected, key)!r}")
    if not with_origin:
        return
    wanted = json.loads(expected.to_json(""))["metadata"]
    for key in sorted(wanted.keys() | found.metadata.keys()):
        if wanted.get(key) != found.metadata.get(key):
            raise InputError(f"{path}: written with {key} {found.metadata.get(key)!r}, now "
                             f"{wanted.get(key)!r}; a run can only be resumed with the same settings")
