"""Small Parquet artefacts beside the trace: one table and a JSON header under the metadata key ``moesim``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moesim.artifacts import atomic_path
from moesim.errors import InputError

_KEY = b"moesim"
_ZSTD_LEVEL = 6
_MAX_VALUES = 1 << 28  # run-length encoding can announce any number of values in a small file


def write_table(path: str | os.PathLike[str], table: pa.Table, schema: str, body: dict[str, Any]) -> Path:
    """Write `table` whole or not at all, with `schema`, the version and `body` as its header.

    Raises:
        InputError: `body` holds something that JSON cannot.
    """
    from moesim import __version__

    document = {"schema": schema, "moesim_version": __version__, **body}
    try:
        text = json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: metadata must be plain JSON values: {error}") from None
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata({_KEY: text.encode()}), temporary, compression="zstd",
                       compression_level=_ZSTD_LEVEL)
    return Path(path)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON header of a Parquet artefact of moesim, with ``num_rows``; no rows are read.

    Raises:
        InputError: no such file, not Parquet, damaged, or without a header.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: {'is a folder, not a file' if file.is_dir() else 'no such file'}")
    try:
        metadata = pq.read_metadata(file)
        document = json.loads((metadata.metadata or {}).get(_KEY, b"null"))
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {_first_line(error)}") from None
    if not isinstance(document, dict) or not isinstance(document.get("schema"), str):
        raise InputError(f"{path}: a Parquet file, but not of moesim (it has no 'moesim' metadata)")
    if num_values(metadata) > _MAX_VALUES:
        raise InputError(f"{path}: announces {num_values(metadata)} values, more than {_MAX_VALUES}")
    return document | {"num_rows": metadata.num_rows}


def read_table(path: str | os.PathLike[str], schema: str, columns: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
    """Return the table and the header of an artefact of `schema`, its columns being exactly `columns`.

    Args:
        columns: name -> Arrow type; a list column is checked for its value type only.

    Raises:
        InputError: as `read_header`, another schema, other columns, or empty values.
    """
    document = read_header(path)
    if document["schema"] != schema:
        raise InputError(f"{path}: expected a {schema!r} file, found schema {document['schema']!r}")
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged Parquet file: {_first_line(error)}") from None
    if table.column_names != list(columns):
        raise InputError(f"{path}: expected columns {', '.join(columns)}, found {', '.join(table.column_names)}")
    for name, kind in columns.items():
        found = table.schema.field(name).type
        found = found.value_type if pa.types.is_list(found) or pa.types.is_fixed_size_list(found) else found
        if found != kind or table.column(name).null_count:
            raise InputError(f"{path}: column {name!r} must be {kind} without empty values, found {found}")
    return table, document


def num_values(metadata: pq.FileMetaData) -> int:
    """Return how many values (elements of lists included) a Parquet file announces."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return sum(group.column(column).num_values for group in groups for column in range(group.num_columns))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
