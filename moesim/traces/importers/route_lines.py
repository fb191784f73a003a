"""JSON lines of one route each: the ``meta`` / ``route`` form of patched vLLM loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.base import INT32_MAX, Importer, RawRouting
from moesim.traces.importers.json_files import first_keys, json_lines
from moesim.traces.importers.routes import Routes, assemble, padded, padded_weights
from moesim.traces.trace import PAD

_INT32 = range(PAD, INT32_MAX + 1)


def read_jsonl(path: Path) -> RawRouting:
    """Read JSON lines: a meta line, then one line per request, token and layer.

    ``{"type": "meta", "model_id": ..., "layers_logged": [...], "top_k": ...}``, then
    ``{"type": "route", "req_id": ..., "token_idx": ..., "layer": ..., "topk_ids": [...],
    "topk_weights": [...]}``. Rows come out request by request, in order of first appearance.
    """
    meta: dict[str, Any] = {}
    rows: list[tuple[int, int, int]] = []
    ids: list[list[int]] = []
    weights: list[list[float] | None] = []
    places: list[str] = []
    names: dict[Any, int] = {}
    for where, entry in json_lines(path):
        if entry.get("type") == "meta":
            meta = entry
        elif entry.get("type") == "route":
            rows.append(_add_route(entry, where, names))
            ids.append(entry["topk_ids"])
            weights.append(entry.get("topk_weights"))
            places.append(where)
        else:
            raise InputError(f"{where}: expected type 'meta' or 'route', found {entry.get('type')!r}")
    if not rows:
        raise InputError(f"{path}: no route lines")
    request, token, layer = np.array(rows, dtype=np.int64).T
    table, known = padded(ids), [row for row in weights if row is not None]
    routes = Routes(request, token, layer, table, places.__getitem__, lambda index: repr(list(names)[index]),
                    padded_weights(known, table.shape[1]) if len(known) == len(rows) else None)
    return assemble(routes, path, model=str(meta.get("model_id", "")), notes=_notes(meta, names, table.shape[1]))


def _notes(meta: dict[str, Any], names: dict[Any, int], top_k: int) -> tuple[str, ...]:
    notes = [f"requests numbered from 0 in order of appearance (first: {next(iter(names))!r})"]
    if meta.get("top_k", top_k) != top_k:
        notes.append(f"the meta line says top_k {meta['top_k']!r}, the rows have up to {top_k}")
    return tuple(notes)


def _add_route(entry: dict[str, Any], where: str, names: dict[Any, int]) -> tuple[int, int, int]:
    """Return (request, token, layer) of a line that is well formed; raises InputError else."""
    for key in ("req_id", "token_idx", "layer", "topk_ids"):
        if key not in entry:
            raise InputError(f"{where}: key {key!r} is missing")
    ids, weights = entry["topk_ids"], entry.get("topk_weights")
    numbers = (entry["token_idx"], entry["layer"], *(ids if isinstance(ids, list) else [None]))
    if not ids or any(type(value) is not int or value not in _INT32 for value in numbers):
        raise InputError(f"{where}: token_idx and layer must be whole numbers, topk_ids a list of them")
    if weights is not None and (not isinstance(weights, list) or len(weights) != len(ids)
                                or any(not _is_weight(value) for value in weights)):
        raise InputError(f"{where}: topk_weights must be {len(ids)} numbers, one for each of topk_ids")
    if not isinstance(entry["req_id"], str | int):
        raise InputError(f"{where}: req_id must be a string or a whole number")
    return names.setdefault(entry["req_id"], len(names)), entry["token_idx"], entry["layer"]


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= float(np.finfo(np.float32).max)


def _is_jsonl(path: Path) -> bool:
    keys = first_keys(path)
    return "type" in keys and ({"model_id", "top_k", "layers_logged"} & keys != set() or "topk_ids" in keys)


ROUTE_LINES = {
    "jsonl": Importer(_is_jsonl, read_jsonl, "JSON lines: a meta line, then a route per token and layer"),
}
