"""The trace file: one Parquet table of routing, schema ``moesim.trace/1``.

One row per token: ``request_id``, ``position``, ``step`` int32, ``phase`` int8, ``expert_ids``
fixed_size_list<int16>[L*k] (layer by layer, -1 pads), and when recorded ``token_id`` int32 and
``gate_weights`` fixed_size_list<float16>[L*k]. The file's key-value metadata holds under ``moesim``
a JSON header (sizes, layer ids, origin, digest), so that any Parquet reader can use the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moesim.artifacts import atomic_path, catalog_folder
from moesim.errors import InputError, did_you_mean, unknown
from moesim.traces.trace import RoutingTrace

SCHEMA = "moesim.trace/1"
SUFFIX = ".trace.parquet"
BUILTIN = "builtin:"
ROW_GROUP_ROWS = 16384
PART_FOLDER_SUFFIX = ".parts"
_KEY = b"moesim"
_ELEMENT = ".list.element"
_ZSTD_LEVEL = 6
_BUFFER_BYTES = 1 << 18
_PLAIN_COLUMNS = {"request_id": pa.int32(), "position": pa.int32(), "phase": pa.int8(), "step": pa.int32()}
_NOT_ROUTING = {
    "moesim.counts/1": "it holds expert counts without tokens (no order, no pair of layers, no request); only loads can "
                       "be taken from it",
    "moesim.arrivals/1": "it holds request arrivals, not routing",
}
_FOREIGN = (
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
     "this is a Python pickle, which can run code when loaded; moesim never opens one"),
    ((b"PK\x03\x04",),
     "this is a zip archive: import an .npz with `moesim trace import`; "
     "a .pt checkpoint holds a pickle, which moesim never opens"),
    ((b"\x93NUMPY",), "this is a .npy array: import it with `moesim trace import`"),
    ((b"{", b"["), "this is JSON text: import it with `moesim trace import`"),
)


@dataclass(frozen=True)
class TraceHeader:
    """What a trace file says about itself, apart from its rows.

    Attributes:
        num_layers, top_k, num_experts: sizes (MoE layers, experts per token, experts per layer).
        layer_ids: the model's own index of each MoE layer.
        model, source, metadata: as in RoutingTrace.
        with_weights, with_token_ids: which optional columns the file has.
    """

    num_layers: int
    top_k: int
    num_experts: int
    layer_ids: tuple[int, ...]
    model: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    with_weights: bool = False
    with_token_ids: bool = False

    def to_json(self, digest: str) -> bytes:
        """Return the ``moesim`` metadata value.

        Raises:
            InputError: `metadata` holds something that JSON cannot.
        """
        from moesim import __version__

        body = {"schema": SCHEMA, "moesim_version": __version__, "digest": digest}
        body |= {name: getattr(self, name) for name in
                 ("num_layers", "top_k", "num_experts", "layer_ids", "model", "source", "metadata")}
        try:
            return json.dumps(body, allow_nan=False, default=_plain).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"trace metadata must be plain JSON values: {error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r}")


def header_of(trace: RoutingTrace) -> TraceHeader:
    """Return the header that describes `trace`."""
    return TraceHeader(
        trace.num_layers, trace.top_k, trace.num_experts, tuple(trace.layer_ids.tolist()), trace.model,
        trace.source, trace.metadata, trace.gate_weights is not None, trace.token_id is not None)


def as_stored(trace: RoutingTrace) -> RoutingTrace:
    """Return `trace` with the values that a file keeps: gate weights rounded to float16.

    Raises:
        InputError: a gate weight that float16 cannot hold.
    """
    if trace.gate_weights is None:
        return trace
    with np.errstate(over="ignore"):
        rounded = trace.gate_weights.astype(np.float16).astype(np.float32)
    if not np.isfinite(rounded).all():
        token, layer, _ = np.argwhere(~np.isfinite(rounded))[0]
        raise InputError(
            f"trace: gate_weights at token {token}, layer {layer} are "
            f"{trace.gate_weights[token, layer].tolist()}; "
            f"expected finite values within +-{np.finfo(np.float16).max}")
    return dataclasses.replace(trace, gate_weights=rounded)


def arrow_schema(header: TraceHeader, digest: str) -> pa.Schema:
    """Return the Arrow schema of a trace file, metadata included."""
    width = header.num_layers * header.top_k
    columns: dict[str, pa.DataType] = dict(_PLAIN_COLUMNS)
    if header.with_token_ids:
        columns["token_id"] = pa.int32()
    columns["expert_ids"] = pa.list_(pa.int16(), width)
    if header.with_weights:
        columns["gate_weights"] = pa.list_(pa.float16(), width)
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
    return pa.schema(fields, metadata={_KEY: header.to_json(digest)})


def table_of(trace: RoutingTrace, schema: pa.Schema) -> pa.Table:
    """Return the rows of `trace` as an Arrow table of `schema`."""
    def column(name: str, kind: pa.DataType) -> pa.Array:
        values = getattr(trace, name)
        if not pa.types.is_fixed_size_list(kind):
            return pa.array(values)
        flat = values.reshape(-1).astype(np.float16 if name == "gate_weights" else np.int16)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)
    return pa.Table.from_arrays([column(f.name, f.type) for f in schema], schema=schema)


def open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a Parquet writer with the encodings that routing takes well, then zstd.

    Ids go through a dictionary (bit-packed: log2(E) bits), weights through byte-stream-split
    (sign and exponent apart from the mantissa): 0.6 and 0.8 of plain zstd on real routing.
    """
    split = [name + _ELEMENT for name in schema.names if name == "gate_weights"]
    dictionary = [name + _ELEMENT * (name == "expert_ids") for name in schema.names if name != "gate_weights"]
    return pq.ParquetWriter(path, schema, compression="zstd", compression_level=_ZSTD_LEVEL,
                            use_dictionary=dictionary, use_byte_stream_split=split or False)


def write_trace(trace: RoutingTrace, path: str | os.PathLike[str]) -> Path:
    """Write `trace` as one Parquet file, whole or not at all; gate weights are rounded to float16.

    Raises:
        InputError: a gate weight out of float16's range, or metadata that is not JSON.
    """
    trace = as_stored(trace)
    schema = arrow_schema(header_of(trace), trace.digest())
    with atomic_path(path) as temporary, open_writer(temporary, schema) as writer:
        writer.write_table(table_of(trace, schema), row_group_size=ROW_GROUP_ROWS)
    return Path(path)


def resolve_trace(name: str | os.PathLike[str]) -> Path:
    """Return the file behind a path or behind ``builtin:NAME`` (a trace that moesim ships).

    Raises:
        InputError: an unknown built-in trace, or no such file.
    """
    text = os.fspath(name)
    if text.startswith(BUILTIN):
        folder, short = catalog_folder("traces"), text.removeprefix(BUILTIN)
        known = {file.name.removesuffix(SUFFIX): file for file in folder.glob(f"*{SUFFIX}")}
        if short not in known:
            raise unknown("built-in trace", short, known)
        return known[short]
    path = Path(text)
    if not path.is_file():
        hint = "is a folder, not a file" if path.is_dir() else "no such file"
        if path.with_name(path.name + PART_FOLDER_SUFFIX).is_dir():
            hint = "not finished: the parts of an interrupted capture are there; run it again with --resume"
        raise InputError(f"{path}: {hint}")
    return path


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what Arrow or RoutingTrace says about a bad file into one InputError that names it."""
    try:
        yield
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged Parquet file: {str(error).splitlines()[0]}") from None


def _check_magic(path: Path) -> None:
    with open(path, "rb") as file:
        head = file.read(8)
        file.seek(max(0, path.stat().st_size - 4))
        tail = file.read(4)
    for starts, words in _FOREIGN:
        if head.startswith(starts):
            raise InputError(f"{path}: {words}")
    if not head.startswith(b"PAR1"):
        raise InputError(f"{path}: not a Parquet file")
    if tail != b"PAR1":
        raise InputError(f"{path}: Parquet file is cut short (its end is missing)")


def read_header(schema: pa.Schema) -> tuple[TraceHeader, dict[str, Any]]:
    """Return the header in an Arrow schema and the whole JSON document it came from.

    Raises:
        InputError: no header, another schema id, or sizes or columns that disagree.
    """
    try:
        document = json.loads((schema.metadata or {}).get(_KEY, b"null"))
    except ValueError:
        raise InputError("the moesim header is not JSON") from None
    if not isinstance(document, dict):
        raise InputError("a Parquet file, but not a moesim trace (it has no 'moesim' metadata)")
    if document.get("schema") in _NOT_ROUTING:
        raise InputError(f"it is no trace: {_NOT_ROUTING[document['schema']]}")
    if document.get("schema") != SCHEMA:
        raise InputError(f"expected a {SCHEMA!r} file, found schema {document.get('schema')!r}")
    for name, kind in {"num_layers": int, "top_k": int, "num_experts": int, "layer_ids": list, "model": str,
                       "source": str, "metadata": dict, "digest": str}.items():
        if not isinstance(document.get(name), kind) or (kind is int and document[name] < 1):
            raise InputError(f"header key {name!r}: expected {kind.__name__}, found {document.get(name)!r}")
    if any(type(layer) is not int for layer in document["layer_ids"]):
        raise InputError(f"header key 'layer_ids': expected whole numbers, found {document['layer_ids']!r}")
    sizes = {name: document[name] for name in
             ("num_layers", "top_k", "num_experts", "model", "source", "metadata")}
    header = TraceHeader(layer_ids=tuple(document["layer_ids"]), with_weights="gate_weights" in schema.names,
                         with_token_ids="token_id" in schema.names, **sizes)
    _check_columns(schema, arrow_schema(header, document["digest"]))
    return header, document


def _check_columns(found: pa.Schema, expected: pa.Schema) -> None:
    for name in found.names:
        if name not in expected.names:
            raise InputError(f"unknown column {name!r}.{did_you_mean(name, expected.names)}")
    for column in expected:
        if column.name not in found.names:
            raise InputError(f"column {column.name!r} is missing")
        kind = found.field(column.name).type
        if (str(kind).replace(" not null", "") != str(column.type).replace(" not null", "")
                and not _same_list(kind, column.type)):
            raise InputError(f"column {column.name!r} is {kind}, expected {column.type}")


def _same_list(one: pa.DataType, other: pa.DataType) -> bool:
    fixed = pa.types.is_fixed_size_list
    return bool(fixed(one) and fixed(other) and one.list_size == other.list_size
                and one.value_type == other.value_type)


@contextmanager
def open_trace(path: str | os.PathLike[str]) -> Iterator[tuple[pq.ParquetFile, TraceHeader, dict[str, Any]]]:
    """Yield the open Parquet file, its header and its JSON; any damage met inside is an InputError."""
    file = resolve_trace(path)
    _check_magic(file)
    # without pre-buffering and with a small buffer, a reader of batches holds pages, not row groups or the whole file
    with reading(file), pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES) as parquet:
        header, document = read_header(parquet.schema_arrow)
        yield parquet, header, document


def column_values(table: pa.Table | pa.RecordBatch, name: str) -> np.ndarray:
    """Return a column as a numpy array, a list column flat; raises InputError where values are empty."""
    column = table.column(name)
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    if column.null_count or values.null_count:
        raise InputError(f"column {name!r} has {max(column.null_count, values.null_count)} empty values")
    return values.to_numpy(zero_copy_only=False)


def trace_of(table: pa.Table | pa.RecordBatch, header: TraceHeader) -> RoutingTrace:
    """Return the rows of an Arrow table as a RoutingTrace, checked."""
    names = (*_PLAIN_COLUMNS, "expert_ids", *(["gate_weights"] * header.with_weights),
             *(["token_id"] * header.with_token_ids))
    columns = {name: column_values(table, name) for name in names}
    for name in ("expert_ids", "gate_weights"):
        if name in columns:
            columns[name] = columns[name].reshape(-1, header.num_layers, header.top_k)
    return RoutingTrace(num_experts=header.num_experts, layer_ids=np.array(header.layer_ids, dtype=np.int64),
                        model=header.model, source=header.source, metadata=header.metadata, **columns)


def read_trace(path: str | os.PathLike[str]) -> RoutingTrace:
    """Read a trace file (or ``builtin:NAME``) whole and verify its digest.

    Raises:
        InputError: no such file, not Parquet, cut short, another schema, ids out of range, or a
            digest that differs from the rows.
    """
    with open_trace(path) as (parquet, header, document):
        trace = trace_of(parquet.read(), header)
        if trace.digest() != document["digest"]:
            raise InputError(f"the rows do not match the header's digest ({document['digest'][:19]}...): "
                             f"the file was changed after it was written")
    return trace


def iter_trace(path: str | os.PathLike[str], rows: int = 65536) -> Iterator[RoutingTrace]:
    """Yield a trace file in batches of at most `rows` tokens, for files larger than memory.

    The whole file is checked as `read_trace` checks it (positions across batches too), except for the digest. A batch
    may end in the middle of a request.

    Raises:
        InputError: as `read_trace`, but for the digest; or `rows` below 1.
    """
    from moesim.traces.row_checks import SMALL_COLUMNS, check_ids, check_rows

    if rows < 1:
        raise InputError(f"rows must be at least 1, got {rows}")
    with open_trace(path) as (parquet, header, _):
        check_rows({name: column_values(batch, name) for name in SMALL_COLUMNS}
                   for batch in parquet.iter_batches(batch_size=rows, columns=list(SMALL_COLUMNS)))
        start = 0
        for batch in parquet.iter_batches(batch_size=rows):
            if batch.num_rows:
                ids = np.array(column_values(batch, "expert_ids")).reshape(-1, header.num_layers, header.top_k)
                check_ids(ids, header.num_experts, start)
                start += batch.num_rows
                yield trace_of(batch, header)


def trace_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a trace file's header and counts without reading its rows.

    Keys: those of the header (schema, moesim_version, digest, num_layers, top_k, num_experts,
    layer_ids, model, source, metadata), num_tokens, with_weights, with_token_ids, file_bytes.
    """
    with open_trace(path) as (parquet, header, document):
        return document | {
            "num_tokens": parquet.metadata.num_rows, "with_weights": header.with_weights,
            "with_token_ids": header.with_token_ids, "file_bytes": resolve_trace(path).stat().st_size}
