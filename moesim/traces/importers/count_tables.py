"""Expert counts as tables: SGLang's first CSV dumps, and Fiddler's popularity JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.base import INT16_MAX, Importer, RawCounts
from moesim.traces.importers.community import csv_header, csv_rows, csv_whole, files_of
from moesim.traces.importers.json_files import count_array, document, first_keys
from moesim.traces.importers.ranks import joined_counts

_COLUMNS = ["layer_id", "expert_id", "count"]


def read_counts_csv(path: Path, ranks: str = "auto") -> RawCounts:
    """Read ``layer_id,expert_id,count`` rows (SGLang of spring 2025: one file per rank; give their folder).

    Args:
        ranks: "sum", "one", or "auto": one rank's counts if all ranks have the same, else the sum.
    """
    files = files_of(path, ".csv")
    tables = [_table(file) for file in files]
    if not tables:
        raise InputError(f"{path}: no .csv files in this folder")
    layers = sorted({layer for table in tables for layer, _ in table})
    experts = max(expert for table in tables for _, expert in table) + 1
    index = {layer: row for row, layer in enumerate(layers)}
    per_rank = []
    for table in tables:
        counts = np.zeros((1, len(layers), experts), np.int64)
        for (layer, expert), count in table.items():
            counts[0, index[layer], expert] = count
        per_rank.append(counts)
    notes: list[str] = []
    counts = joined_counts(per_rank, ranks, notes)
    notes.append(f"{experts} experts: the largest id + 1")
    return RawCounts(counts, np.array(layers), "whole recording", notes=tuple(notes), layers_named=True)


def _table(file: Path) -> dict[tuple[int, int], int]:
    rows = csv_rows(file)
    where, head = next(rows, (str(file), []))
    if [name.strip().lstrip("\ufeff") for name in head] != _COLUMNS:
        raise InputError(f"{where}: expected the columns {','.join(_COLUMNS)}")
    table: dict[tuple[int, int], int] = {}
    for where, row in rows:
        if len(row) != len(_COLUMNS):
            raise InputError(f"{where}: expected {len(_COLUMNS)} fields, found {len(row)}")
        layer, expert, count = (csv_whole(text, name, where) for text, name in zip(row, _COLUMNS, strict=True))
        if max(layer, expert) > INT16_MAX:
            raise InputError(f"{where}: layer {layer}, expert {expert}: expected ids up to {INT16_MAX}")
        if (layer, expert) in table:
            raise InputError(f"{where}: layer {layer}, expert {expert} is there twice")
        table[layer, expert] = count
    if not table:
        raise InputError(f"{file}: no rows")
    return table


def read_fiddler(path: Path) -> RawCounts:
    """Read Fiddler's popularity: ``{"expert_popularity": [[count of an expert, ...] of a layer, ...]}``; or a folder.

    Each file of a folder is a window.
    """
    parts = []
    for file in files_of(path, ".json"):
        counts = count_array(document(file).get("expert_popularity"), f"{file}: expert_popularity")
        if counts.ndim != 2 or counts.min() < 0:
            raise InputError(f"{file}: expert_popularity must be [layer][expert], not negative, found {counts.shape}")
        parts.append(counts)
    if not parts:
        raise InputError(f"{path}: no .json files in this folder")
    if any(part.shape != parts[0].shape for part in parts):
        raise InputError(f"{path}: files with different numbers of layers or experts")
    window = "whole recording" if len(parts) == 1 else "file"
    return RawCounts(np.stack(parts), np.arange(parts[0].shape[0]), window, layers_named=True)


def _is_counts_csv(path: Path) -> bool:
    files = files_of(path, ".csv")
    return bool(files) and csv_header(files[0]) == _COLUMNS


def _is_fiddler(path: Path) -> bool:
    files = files_of(path, ".json")
    return bool(files) and "expert_popularity" in first_keys(files[0])


COUNT_TABLES = {
    "counts-csv": Importer(_is_counts_csv, read_counts_csv, "CSV layer_id,expert_id,count, or a folder of them", True),
    "fiddler": Importer(_is_fiddler, read_fiddler, "Fiddler's expert_popularity JSON, or a folder of them", True),
}
