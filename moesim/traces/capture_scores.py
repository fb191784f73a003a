"""Router scores beside a trace: what each router gave every expert, in a file of its own.

Schema ``moesim.scores/1``: a Parquet file with one row per row of the trace, in its order: ``request_id``,
``position`` int32 and ``scores`` fixed_size_list<float32>[L*C] (layer by layer; C columns, one per expert,
zero experts included). It is a second file because it is E / k times the trace: what reads routing
need not skip over it. Scores are float32, so that near-ties stay as the router saw them; byte-stream-split
and zstd take back what bfloat16 models leave empty.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moesim.artifacts import atomic_path
from moesim.errors import InputError
from moesim.traces.store import PART_FOLDER_SUFFIX, column_values

SCORES_SCHEMA = "moesim.scores/1"
_KEY = b"moesim"
_ZSTD_LEVEL = 3


class ScoreRows(NamedTuple):
    """Rows of a score file: int32[row], int32[row], float32[row, layer, column]."""

    request_id: np.ndarray
    position: np.ndarray
    scores: np.ndarray


class ScoresWriter:
    """Writes scores part by part, each whole or absent, so that an interrupted capture can go on.

    Args:
        path: the file to write in the end; parts lie in ``<path>.parts/`` until then.
        layer_ids: the model's own index of each MoE layer.
        done: requests whose trace is already written (a resumed run): parts of others are removed.
        resume: go on after the parts of an interrupted run.

    Raises:
        InputError: parts are there and `resume` is off, or parts of done requests are missing.
    """

    def __init__(self, path: str | os.PathLike[str], layer_ids: list[int], done: set[int], *, resume: bool) -> None:
        self.path = Path(path)
        self.folder = self.path.with_name(self.path.name + PART_FOLDER_SUFFIX)
        self.layer_ids = layer_ids
        self._parts: list[Path] = []
        if not resume and any(self.folder.glob("part-*.parquet")):
            raise InputError(f"{self.folder}: parts of an interrupted run are here; "
                             f"resume it, or remove the folder to start anew")
        self._load_parts(done)
        self.folder.mkdir(parents=True, exist_ok=True)

    def append(self, rows: ScoreRows) -> None:
        """Write one batch of whole requests as a part file."""
        part = self.folder / f"part-{len(self._parts):06d}.parquet"
        schema = _schema(self.layer_ids, rows.scores.shape[2], {})
        with atomic_path(part) as temporary, _writer(temporary, schema) as writer:
            writer.write_table(_table(rows, schema))
        self._parts.append(part)

    def close(self, **facts: Any) -> Path:
        """Merge the parts into `path`, with `facts` in its header, and remove them."""
        first = pq.read_schema(self._parts[0])
        schema = _schema(self.layer_ids, first.field("scores").type.list_size // len(self.layer_ids), facts)
        with atomic_path(self.path) as temporary, _writer(temporary, schema) as writer:
            for part in self._parts:
                writer.write_table(pq.read_table(part).replace_schema_metadata(None).cast(schema))
        self.discard()
        return self.path

    def discard(self) -> None:
        """Remove the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def has_parts(self) -> bool:
        """Whether a part is written."""
        return bool(self._parts)

    def _load_parts(self, done: set[int]) -> None:
        """Keep the parts of done requests; a part whose trace was not written any more is removed."""
        kept: set[int] = set()
        for part in sorted(self.folder.glob("part-*.parquet")):
            requests = set(pq.read_table(part, columns=["request_id"])["request_id"].to_pylist())
            if requests <= done:
                self._parts.append(part)
                kept |= requests
            else:
                part.unlink()
        if kept != done:
            raise InputError(f"{self.folder}: the scores of request {min(done - kept)} are missing, "
                             f"though its trace is written; start anew")


def finish_scores(path: str | os.PathLike[str], layer_ids: list[int], requests: set[int], **facts: Any) -> None:
    """Merge the parts that an interruption left behind after the trace was complete, if there are any."""
    if Path(path).with_name(Path(path).name + PART_FOLDER_SUFFIX).is_dir():
        ScoresWriter(path, layer_ids, requests, resume=True).close(**facts)


def scores_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the header of a score file: schema, layer_ids, num_columns, trace_digest, settings.

    Raises:
        InputError: no such file, not Parquet, or not a score file.
    """
    with _open(path) as parquet:
        return _header(path, parquet)


def iter_scores(path: str | os.PathLike[str], rows: int = 4096) -> Iterator[ScoreRows]:
    """Yield a score file in batches of at most `rows` rows.

    Raises:
        InputError: as `scores_info`, or damage met while reading.
    """
    with _open(path) as parquet:
        header = _header(path, parquet)
        shape = (-1, len(header["layer_ids"]), header["num_columns"])
        try:
            for batch in parquet.iter_batches(batch_size=rows):
                yield ScoreRows(column_values(batch, "request_id"), column_values(batch, "position"),
                                column_values(batch, "scores").reshape(shape))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(f"{path}: damaged Parquet file: {str(error).splitlines()[0]}") from None


def _open(path: str | os.PathLike[str]) -> pq.ParquetFile:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a Parquet file: {str(error).splitlines()[0]}") from None


def _header(path: str | os.PathLike[str], parquet: pq.ParquetFile) -> dict[str, Any]:
    schema = parquet.schema_arrow
    try:
        header = json.loads((schema.metadata or {}).get(_KEY, b"null"))
    except ValueError:
        header = None
    found = header.get("schema") if isinstance(header, dict) else None
    if found != SCORES_SCHEMA:
        raise InputError(f"{path}: expected a {SCORES_SCHEMA!r} file, found schema {found!r}")
    layers, columns = header.get("layer_ids"), header.get("num_columns")
    good = isinstance(layers, list) and layers and all(type(layer) is int for layer in [*layers, columns])
    expected = _schema(layers, columns, {}) if good and columns > 0 else None
    if expected is None or [(f.name, f.type) for f in expected] != [(f.name, f.type) for f in schema]:
        raise InputError(f"{path}: the columns are not those that its header describes")
    return dict(header)


def _schema(layer_ids: list[int], num_columns: int, facts: dict[str, Any]) -> pa.Schema:
    header = {"schema": SCORES_SCHEMA, "layer_ids": layer_ids, "num_columns": num_columns, **facts}
    columns = {"request_id": pa.int32(), "position": pa.int32(),
               "scores": pa.list_(pa.float32(), len(layer_ids) * num_columns)}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()],
                     metadata={_KEY: json.dumps(header).encode()})


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(path, schema, compression="zstd", compression_level=_ZSTD_LEVEL,
                            use_dictionary=False, use_byte_stream_split=["scores.list.element"])


def _table(rows: ScoreRows, schema: pa.Schema) -> pa.Table:
    flat = pa.array(np.ascontiguousarray(rows.scores, dtype=np.float32).reshape(-1))
    columns = [pa.array(rows.request_id.astype(np.int32)), pa.array(rows.position.astype(np.int32)),
               pa.FixedSizeListArray.from_arrays(flat, type=schema.field("scores").type)]
    return pa.Table.from_arrays(columns, schema=schema)
