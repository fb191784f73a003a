"""Files of research projects: MoE-Beyond's CSV and MoE-Atlas's JSON."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.base import INT16_MAX, INT32_MAX, Importer, RawRouting
from moesim.traces.importers.json_files import document, first_keys, parse, whole, whole_or_none
from moesim.traces.importers.routes import Routes, assemble, padded, padded_weights
from moesim.traces.trace import PREFILL

_BEYOND = ["Layer ID", "Batch Number", "Token", "Activated Expert IDs"]
_FIELD_BYTES = 1 << 24  # the last column may hold an embedding as text


def csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (place, fields) of every row of a CSV file that is not empty; raises InputError for what is not CSV."""
    before = csv.field_size_limit(_FIELD_BYTES)
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if row:
                    yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path}: not valid CSV: {error}") from None
    finally:
        csv.field_size_limit(before)


def csv_header(path: Path) -> list[str]:
    """Return the fields of the first line of a text file, without spaces around them."""
    with open(path, "rb") as file:
        line = file.readline(1 << 16)
    if b"\0" in line:
        return []
    return [name.strip().strip('"') for name in line.decode("utf-8-sig", errors="replace").strip().split(",")]


def csv_whole(text: str, name: str, where: str) -> int:
    """Return a field as a whole number from 0; raises InputError."""
    if not text.strip().isascii() or not text.strip().isdigit() or len(text) > 18:
        raise InputError(f"{where}: {name} must be a whole number, found {text[:60]!r}")
    return int(text)


def files_of(path: Path, ending: str) -> list[Path]:
    """Return the files of a folder with this ending by name, or the file itself."""
    return sorted(path.glob(f"*{ending}")) if path.is_dir() else [path]


def read_moe_beyond(path: Path) -> RawRouting:
    """Read MoE-Beyond's CSV: a row per layer, batch row and token; one file per prompt, or a folder of them.

    The file names no positions: the n-th row of a layer and batch row is its n-th token. All rows are of one pass
    over the prompt.
    """
    rows: list[tuple[int, int, int]] = []
    ids: list[list[int]] = []
    places: list[str] = []
    requests: dict[tuple[str, int], int] = {}
    for file in files_of(path, ".csv"):
        seen: dict[tuple[int, int], int] = {}
        for where, row in _beyond_rows(file):
            layer, batch = csv_whole(row[0], "Layer ID", where), csv_whole(row[1], "Batch Number", where)
            token = seen[layer, batch] = seen.get((layer, batch), -1) + 1
            rows.append((requests.setdefault((file.name, batch), len(requests)), token, layer))
            ids.append(_id_list(row[3], where))
            places.append(where)
    if not rows:
        raise InputError(f"{path}: no rows")
    request, token, layer = np.array(rows, dtype=np.int64).T
    names = list(requests)
    routes = Routes(request, token, layer, padded(ids), places.__getitem__,
                    lambda index: f"{names[index][0]} (batch row {names[index][1]})",
                    phase=np.full(len(rows), PREFILL))
    return assemble(routes, path, notes=("a request is one batch row of one file; positions are the order of its rows",))


def _beyond_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    rows = csv_rows(file)
    where, head = next(rows, (str(file), []))
    if [name.strip().lstrip("\ufeff") for name in head[:4]] != _BEYOND:
        raise InputError(f"{where}: expected the columns {','.join(_BEYOND)}")
    for where, row in rows:
        if len(row) < len(_BEYOND):
            raise InputError(f"{where}: expected {len(_BEYOND)} fields, found {len(row)}")
        yield where, row


def _id_list(text: str, where: str) -> list[int]:
    ids = parse(text, f"{where}: Activated Expert IDs")
    if not isinstance(ids, list) or not ids or any(type(i) is not int or not 0 <= i <= INT16_MAX for i in ids):
        raise InputError(f"{where}: Activated Expert IDs must be a list of whole numbers, found {text[:60]!r}")
    return ids


def read_moe_atlas(path: Path) -> RawRouting:
    """Read MoE-Atlas's JSON: one document per sequence, an activation per token, layer and expert; or a folder of them.

    Experts keep the order of the file. A token without an activation in some layer is an error.
    """
    cells: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
    token_ids: dict[tuple[int, int], int] = {}
    heads: list[dict[str, Any]] = []
    files = files_of(path, ".json")
    for request, file in enumerate(files):
        heads.append(_atlas_file(document(file), request, str(file), cells, token_ids))
    if not cells:
        raise InputError(f"{path}: no activations")
    if any(head != heads[0] for head in heads):
        raise InputError(f"{path}: the files are of different models or sizes")
    keys = np.array(list(cells), dtype=np.int64)
    table = padded([[expert for expert, _ in cell] for cell in cells.values()])
    weights = padded_weights([[weight for _, weight in cell] for cell in cells.values()], table.shape[1])
    known = len(token_ids) == len({(request, token) for request, token, _ in cells})
    routes = Routes(keys[:, 0], keys[:, 1], keys[:, 2], table, lambda row: str(files[keys[row, 0]]), lambda index: files[index].name,
                    gate_weights=weights, token_id=_column(keys, token_ids) if known else None)
    head = heads[0]
    notes = [f"requests are files in order of their names (first: {files[0].name})"]
    if head["top_k"] not in (None, table.shape[1]):
        notes.append(f"the file says top_k {head['top_k']}, the rows have up to {table.shape[1]}")
    return assemble(routes, path, model=head["model"], num_experts=head["num_experts"], notes=tuple(notes))


def _column(keys: np.ndarray, token_ids: dict[tuple[int, int], int]) -> np.ndarray:
    return np.array([token_ids[request, token] for request, token, _ in keys.tolist()], dtype=np.int64)


def _atlas_file(entry: dict[str, Any], request: int, where: str, cells: dict[tuple[int, int, int], Any],
                token_ids: dict[tuple[int, int], int]) -> dict[str, Any]:
    """Add the activations of one document; returns what it says about its model."""
    activations = entry.get("activations")
    if not isinstance(activations, list):
        raise InputError(f"{where}: activations must be a list")
    for number, activation in enumerate(activations):
        at = f"{where}: activations[{number}]"
        if not isinstance(activation, dict):
            raise InputError(f"{at}: expected an object")
        token, layer = whole(activation, "token_idx", at), whole(activation, "layer", at)
        weight = activation.get("gate_weight", 0.0)
        if type(weight) not in (int, float) or not abs(weight) <= float(np.finfo(np.float32).max):
            raise InputError(f"{at}: gate_weight must be a number, found {weight!r}")
        cells.setdefault((request, token, layer), []).append((whole(activation, "expert_idx", at), float(weight)))
    for token, value in zip(itertools.count(), entry.get("token_ids") or [], strict=False):
        if type(value) is int and 0 <= value <= INT32_MAX:
            token_ids[request, token] = value
    experts = whole_or_none(entry, "num_experts")
    return {"model": str(entry.get("model_id", "")), "num_experts": experts or None,
            "top_k": whole_or_none(entry, "top_k")}


def _is_moe_beyond(path: Path) -> bool:
    files = files_of(path, ".csv")
    return bool(files) and csv_header(files[0])[:4] == _BEYOND


def _is_moe_atlas(path: Path) -> bool:
    files = files_of(path, ".json")
    return bool(files) and {"activations", "activations.expert_idx"} <= first_keys(files[0])


COMMUNITY = {
    "moe-beyond": Importer(_is_moe_beyond, read_moe_beyond,
                           "MoE-Beyond's CSV (Layer ID, Batch Number, Token, Activated Expert IDs), or a folder", True),
    "moe-atlas": Importer(_is_moe_atlas, read_moe_atlas, "MoE-Atlas's JSON of activations, or a folder", True),
}
