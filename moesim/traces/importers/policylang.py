"""Traces of the package moe-policylang (MIT): JSON lines with a header, or Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moesim.errors import InputError
from moesim.traces.importers.base import INT32_MAX, Importer, RawRouting
from moesim.traces.importers.json_files import first_keys, json_lines, short, whole, whole_or_none
from moesim.traces.importers.routes import Routes, assemble, padded, padded_weights
from moesim.traces.tables import num_values
from moesim.traces.trace import DECODE, PAD, PREFILL

_PHASES = {"prefill": PREFILL, "decode": DECODE}
_INDEX = ("prompt_id", "token_idx", "layer_idx")
_KEYS = dict(zip(_INDEX, "ptl", strict=True))
_MAX_VALUES = 1 << 28
_SUM_TOLERANCE = 0.02  # half precision, over hundreds of experts


def read_policylang(path: Path) -> RawRouting:
    """Read moe-policylang's JSON lines: a header, then a line per prompt, token and layer (keys p, t, l, e, s, ti, ph).

    Prompts are requests. Scores are the router's softmax over all experts at the chosen ones, not renormalised.
    """
    rows: list[list[int]] = []
    ids: list[list[int]] = []
    scores: list[list[float]] = []
    extra: dict[str, list[int]] = {"phase": [], "token_id": []}
    places: list[str] = []
    head: dict[str, Any] = {}
    for number, (where, entry) in enumerate(json_lines(path)):
        if number == 0 and "num_experts" in entry:
            head = entry
            continue
        rows.append([0 if key == "p" and "p" not in entry else whole(entry, key, where) for key in _KEYS.values()])
        ids.append(_list(entry.get("e"), "e", where, int))
        if entry.get("s") is not None:
            scores.append(_list(entry["s"], "s", where, float, len(ids[-1])))
        _add_extra(entry, extra, where)
        places.append(where)
    if not rows:
        raise InputError(f"{path}: no rows")
    announced = head.get("num_entries")
    if announced not in (None, len(rows)):
        raise InputError(f"{path}: the header announces {short(announced)} rows, the file has {len(rows)}: "
                         f"it is cut short")
    table = padded(ids)
    whole_columns: dict[str, Any] = {name: np.array(values) for name, values in extra.items() if len(values) == len(rows)}
    request, token, layer = np.array(rows, dtype=np.int64).T
    routes = Routes(request, token, layer, table, places.__getitem__, str,
                    padded_weights(scores, table.shape[1]) if len(scores) == len(rows) else None, **whole_columns)
    return assemble(routes, path, model=str(head.get("model_name", "")),
                    num_experts=whole_or_none(head, "num_experts") or None, notes=_notes(routes))


def _notes(routes: Routes) -> tuple[str, ...]:
    return () if routes.phase is not None else ("the file does not say which tokens are prompt",)


def _add_extra(entry: dict[str, Any], extra: dict[str, list[int]], where: str) -> None:
    if entry.get("ph") is not None:
        if entry["ph"] not in _PHASES:
            raise InputError(f"{where}: ph must be prefill or decode, found {short(entry['ph'])}")
        extra["phase"].append(_PHASES[entry["ph"]])
    if entry.get("ti") is not None:
        extra["token_id"].append(whole(entry, "ti", where))


def _list(value: Any, key: str, where: str, kind: type, length: int | None = None) -> list[Any]:
    kinds = (int,) if kind is int else (int, float)
    limit = INT32_MAX if kind is int else float(np.finfo(np.float32).max)
    if (not isinstance(value, list) or not value or (length is not None and len(value) != length)
            or any(type(item) not in kinds or not abs(item) <= limit for item in value)):
        raise InputError(f"{where}: {key} must be a list of {'whole ' * (kind is int)}numbers"
                         f"{'' if length is None else f', {length} of them'}, found {short(value)}")
    return value


def read_policylang_parquet(path: Path, top_k: int | None = None) -> RawRouting:
    """Read moe-policylang's Parquet: a row per prompt, token and layer; old files hold the router's softmax only.

    Args:
        top_k: experts per token, needed where the file holds no selected_experts.
    """
    table = _parquet(path, [*_INDEX, "selected_experts", "router_scores", "token_id", "phase"])
    index = [_whole_column(path, table, name) for name in _INDEX]
    notes: tuple[str, ...] = ()
    if "selected_experts" in table.column_names:
        ids = _lists(path, table, "selected_experts", PAD)
        scores = _lists(path, table, "router_scores", 0) if "router_scores" in table.column_names else None
        if scores is not None and scores.shape != ids.shape:
            raise InputError(f"{path}: router_scores {scores.shape} differ from selected_experts {ids.shape}")
    else:
        softmax = _lists(path, _parquet(path, ["router_softmax"]), "router_softmax", 0)
        ids, scores = top_of(softmax, top_k, path)
        notes = (f"the {top_k} experts are the largest of the recorded softmax",)
    extra: dict[str, Any] = {}
    if "token_id" in table.column_names and not table.column("token_id").null_count:
        extra["token_id"] = _whole_column(path, table, "token_id")
    if "phase" in table.column_names and not table.column("phase").null_count:
        extra["phase"] = _phases(path, table)
    # prompts are renumbered in order of first appearance
    names, first, inverse = np.unique(index[0], return_index=True, return_inverse=True)
    rank = np.empty(len(names), np.int64)
    rank[np.argsort(first)] = np.arange(len(names))
    routes = Routes(rank[inverse], index[1], index[2], ids, lambda row: f"{path}: row {row}",
                    lambda number: str(names[np.argsort(first)][number]), scores, **extra)
    return assemble(routes, path, notes=(*notes, *_notes(routes)))


def top_of(probabilities: np.ndarray, top_k: int | None, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (int64[row, k], float32[row, k]): the largest of each row and their values, best first, ties by id.

    Raises:
        InputError: `top_k` not given or out of range, or rows that are not shares of one.
    """
    num_experts = probabilities.shape[1]
    if type(top_k) is not int or not 1 <= top_k <= num_experts:
        raise InputError(f"{path}: holds the router's softmax over {num_experts} experts, not the choice: give the "
                         f"model's experts per token (--option top_k=K, 1 ... {num_experts})")
    # False where NaN
    share = np.asarray(((probabilities >= 0) & (probabilities <= 1 + _SUM_TOLERANCE)).all(axis=1))
    share[share] = np.abs(probabilities[share].sum(axis=1) - 1) <= _SUM_TOLERANCE
    if not share.all():
        raise InputError(f"{path}: row {int(np.argmin(share))} is not a softmax (its values must be from 0 to 1 and add "
                         f"up to 1)")
    ids = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    return ids, np.take_along_axis(probabilities, ids, axis=1).astype(np.float32)


def _parquet(path: Path, columns: list[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            if num_values(file.metadata) > _MAX_VALUES:
                raise InputError(f"{path}: announces {num_values(file.metadata)} values, more than {_MAX_VALUES}")
            table = file.read(columns=[name for name in columns if name in file.schema_arrow.names])
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged Parquet file: {(str(error).splitlines() or ['?'])[0]}") from None
    if not len(table):
        raise InputError(f"{path}: no rows")
    return table


def _whole_column(path: Path, table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        raise InputError(f"{path}: column {name!r} is missing")
    column = table.column(name)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise InputError(f"{path}: column {name!r} must hold whole numbers without gaps, found {column.type}")
    return column.to_numpy().astype(np.int64)


def _phases(path: Path, table: pa.Table) -> np.ndarray:
    words = table.column("phase").to_pylist()
    unknown = sorted({str(word) for word in words} - _PHASES.keys())
    if unknown:
        raise InputError(f"{path}: phase must be prefill or decode, found {short(unknown[0])}")
    return np.array([_PHASES[word] for word in words])


def _lists(path: Path, table: pa.Table, name: str, fill: int) -> np.ndarray:
    """Return a column of lists as [row, longest], filled up at the ends."""
    if name not in table.column_names:
        raise InputError(f"{path}: columns selected_experts and router_softmax are both missing")
    column = table.column(name).combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or column.null_count:
        raise InputError(f"{path}: column {name!r} must hold lists without gaps, found {column.type}")
    whole_numbers = fill == PAD
    inner = column.type.value_type
    if not (pa.types.is_integer(inner) if whole_numbers else pa.types.is_floating(inner)):
        raise InputError(f"{path}: column {name!r} must hold lists of {'whole ' * whole_numbers}numbers")
    values = column.flatten()
    lengths = np.diff(column.offsets.to_numpy())
    width = int(lengths.max())
    if values.null_count or not lengths.min() or len(column) * width > _MAX_VALUES:
        raise InputError(f"{path}: column {name!r} has empty values")
    result = np.full((len(column), width), fill, np.int64 if whole_numbers else np.float32)
    result[np.arange(width) < lengths[:, None]] = values.to_numpy(zero_copy_only=False)
    return result


def _is_policylang(path: Path) -> bool:
    return {"num_experts", "num_layers", "top_k", "num_entries"} <= first_keys(path)


def _is_policylang_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            return False
    try:
        names = set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError, ValueError):
        return False
    return set(_INDEX) <= names and bool({"selected_experts", "router_softmax"} & names)


POLICYLANG = {
    "moe-policylang": Importer(_is_policylang, read_policylang, "moe-policylang's JSON lines"),
    "moe-policylang-parquet": Importer(_is_policylang_parquet, read_policylang_parquet, "moe-policylang's Parquet"),
}
