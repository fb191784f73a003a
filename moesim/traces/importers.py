"""Importers: routing recorded by other tools, as a RoutingTrace; one reader and one dict entry per format."""

from __future__ import annotations

import inspect
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesim.artifacts import read_bytes
from moesim.errors import InputError, did_you_mean, unknown
from moesim.registry import Registry
from moesim.traces.trace import PAD, PHASES, PREFILL, RoutingTrace

AXES = ("token", "layer", "k")
_ID_KEYS = ("expert_ids", "experts", "topk_ids")
_WEIGHT_KEYS = ("gate_weights", "probs", "topk_weights")
_OFFSET_KEYS = ("offsets", "request_offsets")
_UNIFORM_TOLERANCE = 1e-3
_NUMPY_ERRORS = (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
_INT32 = range(PAD, np.iinfo(np.int32).max + 1)
_Routes = dict[tuple[int, int], dict[int, tuple[list[int], list[float] | None]]]


@dataclass(frozen=True)
class RawRouting:
    """What a reader found, before any checking.

    Attributes:
        expert_ids: int[token, layer, k]; -1 pads.
        request_id, position: int[token].
        layer_ids: int[layer].
        gate_weights: float[token, layer, k] or None.
        model: the model's name, if the file has one.
        notes: what the reader assumed.
    """

    expert_ids: np.ndarray
    request_id: np.ndarray
    position: np.ndarray
    layer_ids: np.ndarray
    gate_weights: np.ndarray | None = None
    model: str = ""
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Importer:
    """A format: `detect` looks at the content, `read` returns it; its keywords are the options."""

    detect: Callable[[Path], bool]
    read: Callable[..., RawRouting]
    description: str


def import_trace(path: str | os.PathLike[str], *, source_format: str | None = None,
                 num_experts: int | None = None, phase: str = "decode", id_base: int = 0, skip_rows: int = 0,
                 model: str = "", source: str = "", **options: Any) -> RoutingTrace:
    """Read routing that another tool recorded.

    Doubtful findings (sizes inferred, rows that look like warm-up, layers left out) are listed in
    ``metadata["notes"]``.

    Args:
        source_format: a name in `IMPORTERS`; by default found from the content.
        num_experts: experts per layer; by default the largest id + 1.
        phase: the phase of every row (files of these formats do not say).
        id_base: the id that the file gives to the first expert.
        skip_rows: leading rows to drop (warm-up).
        options: the reader's own; see `IMPORTERS`.

    Raises:
        InputError: no such file, a pickle, a format that is unknown or ambiguous, an unknown option, or
            routing that breaks a rule of RoutingTrace.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: {'is a folder, not a file' if file.is_dir() else 'no such file'}")
    if phase not in PHASES:
        raise unknown("phase", phase, PHASES)
    name = source_format or detect_format(file)
    importer = IMPORTERS[name]
    _check_options(name, importer, options)
    raw = importer.read(file, **options)
    try:
        return _build(raw, num_experts, phase, id_base, skip_rows, model,
                      source or f"imported from {file.name} ({name})")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def detect_format(path: Path) -> str:
    """Return the one format whose `detect` accepts the file's content.

    Raises:
        InputError: none or several do; the message lists what is known.
    """
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        raise InputError(f"{path}: this is a Parquet file; a moesim trace needs no import")
    found = [name for name in IMPORTERS.names() if IMPORTERS[name].detect(path)]
    if len(found) == 1:
        return found[0]
    if not found and head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        read_bytes(path)  # says why a pickle is refused
    if not found and head == b"PK\x03\x04":
        raise InputError(f"{path}: a zip archive, but not of numpy arrays (a .pt is never opened)")
    known = "; ".join(f"{name}: {IMPORTERS[name].description}" for name in IMPORTERS.names())
    problem = f"could be {' or '.join(found)}: name the source format" if found else "unknown routing format"
    raise InputError(f"{path}: {problem}. Known: {known}")


def _check_options(name: str, importer: Importer, options: dict[str, Any]) -> None:
    known = list(inspect.signature(importer.read).parameters)[1:]
    for option in options:
        if option not in known:
            raise InputError(f"importer {name!r} has no option {option!r}.{did_you_mean(option, known)}")


def _build(raw: RawRouting, num_experts: int | None, phase: str, id_base: int, skip_rows: int, model: str,
           source: str) -> RoutingTrace:
    if not 0 <= skip_rows < len(raw.expert_ids):
        raise InputError(f"skip_rows must lie in 0 ... {len(raw.expert_ids) - 1}, got {skip_rows}")
    if not np.issubdtype(raw.expert_ids.dtype, np.integer):
        raise InputError(f"expert ids must be integers, found {raw.expert_ids.dtype}")
    kept, dropped = _moe_layers(raw.expert_ids)
    notes = [*raw.notes]
    notes += [f"left out layer {layer}: it holds one repeated id (a dense layer)" for layer in dropped]
    ids = raw.expert_ids[skip_rows:, kept].astype(np.int64)
    ids = np.where(ids == PAD, PAD, ids - id_base)
    weights = None if raw.gate_weights is None else np.asarray(raw.gate_weights[skip_rows:, kept], np.float32)
    if weights is not None and not np.isfinite(weights).all():
        raise InputError("gate weights must be finite")
    if num_experts is None:
        num_experts = int(ids.max()) + 1
        notes.append(f"num_experts {num_experts} inferred as the largest id + 1")
    if id_base == 0 and not (ids == 0).any():
        notes.append("no row uses expert 0: if the file counts from 1, import with id_base 1")
    notes += warmup_notes(ids, weights)
    request_id = raw.request_id[skip_rows:]
    return RoutingTrace(
        expert_ids=ids, gate_weights=weights, request_id=request_id, position=raw.position[skip_rows:],
        phase=np.full(len(ids), PHASES.index(phase)), step=_steps(request_id, phase),
        num_experts=num_experts, layer_ids=raw.layer_ids[kept], model=model or raw.model, source=source,
        metadata={"notes": notes})


def _moe_layers(ids: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Return the layers to keep, and those that only hold one repeated id (a dense layer's filling)."""
    if ids.shape[2] == 1 or not ids.size:
        return np.arange(ids.shape[1]), []
    filled = (ids == ids[:1, :, :1]).all(axis=(0, 2))
    if filled.all():
        raise InputError("every layer holds one repeated id: no routing was recorded")
    return np.flatnonzero(~filled), np.flatnonzero(filled).tolist()


def _steps(request_id: np.ndarray, phase: str) -> np.ndarray:
    """Return int64[token]: a pass per row, or for prefill one per run of rows of a request."""
    if PHASES.index(phase) != PREFILL:
        return np.arange(len(request_id))
    return np.concatenate([[0], np.cumsum(np.diff(request_id) != 0)])


def warmup_notes(expert_ids: np.ndarray, gate_weights: np.ndarray | None) -> list[str]:
    """Return notes on leading rows that look like an engine's warm-up (kept: the user decides).

    Args:
        expert_ids: int[token, layer, k]; gate_weights: float[token, layer, k] or None.
    """
    notes = []
    same = (expert_ids == expert_ids[0]).all(axis=(1, 2))
    identical = len(same) if same.all() else int(np.argmin(same))
    if identical > 1:
        notes.append(f"the first {identical} rows are identical and may be warm-up: "
                     f"import with skip_rows {identical} to drop them")
    if gate_weights is not None and expert_ids.shape[2] > 1:
        spread = gate_weights.max(axis=2) - gate_weights.min(axis=2)
        even = (spread < _UNIFORM_TOLERANCE).all(axis=1)
        uniform = len(even) if even.all() else int(np.argmin(even))
        if uniform:
            notes.append(f"the first {uniform} rows have even gate weights and may be warm-up: "
                         f"import with skip_rows {uniform} to drop them")
    return notes


def read_npz(path: Path, expert_ids_key: str | None = None, gate_weights_key: str | None = None,
             offsets_key: str | None = None, axes: Sequence[str] | str = AXES,
             layer_ids: Sequence[int] | None = None) -> RawRouting:
    """Read a numpy archive: ids, and if there weights and request offsets (int[request + 1], 0 ... T).

    Args:
        expert_ids_key, gate_weights_key, offsets_key: array names; by default the first known one.
        axes: the order of the arrays' axes, e.g. "layer,token,k".
        layer_ids: the model's own index of each layer; by default 0, 1, ...
    """
    with _load(path, np.lib.npyio.NpzFile, "a numpy archive (.npz)") as archive:
        ids = _array(path, archive, expert_ids_key, _ID_KEYS)
        weights = _array(path, archive, gate_weights_key, _WEIGHT_KEYS)
        offsets = _array(path, archive, offsets_key, _OFFSET_KEYS)
    if ids is None:
        raise InputError(f"{path}: no expert ids: expected an array called {', '.join(_ID_KEYS)} "
                         f"(or expert_ids_key), found {', '.join(archive.files)}")
    if weights is not None:
        weights = _to_axes(path, weights, axes)
    return _from_arrays(path, _to_axes(path, ids, axes), weights, offsets, layer_ids)


def read_npy(path: Path, axes: Sequence[str] | str = AXES, offsets: Sequence[int] | None = None,
             layer_ids: Sequence[int] | None = None) -> RawRouting:
    """Read one numpy array of ids: [token, layer, k], or [token, layer] for top-1 (as ExFlow's).

    Args:
        axes: the order of the axes (without "k" for a 2-d array).
        offsets: int[request + 1], first row of each request and the number of rows.
        layer_ids: the model's own index of each layer; by default 0, 1, ...
    """
    ids = _to_axes(path, _load(path, np.ndarray, "a single numpy array (.npy)"), axes)
    return _from_arrays(path, ids, None, None if offsets is None else np.asarray(offsets), layer_ids)


def _load(path: Path, kind: type, words: str) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
    except _NUMPY_ERRORS as error:
        raise InputError(f"{path}: cannot be read as {words}: {error}") from None
    if not isinstance(loaded, kind):
        raise InputError(f"{path}: expected {words}")
    return loaded


def _array(path: Path, archive: Any, key: str | None, known: Sequence[str]) -> np.ndarray | None:
    """Return the array called `key`, else the first of `known` in the archive, else None."""
    if key is not None and key not in archive.files:
        raise InputError(f"{path}: no array {key!r}.{did_you_mean(key, archive.files)}")
    name = key or next((candidate for candidate in known if candidate in archive.files), None)
    if name is None:
        return None
    try:
        array = archive[name]
    except _NUMPY_ERRORS as error:
        raise InputError(f"{path}: array {name!r} cannot be read: {error}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: {name!r} is not a numpy array")
    return array


def _to_axes(path: Path, array: np.ndarray, axes: Sequence[str] | str) -> np.ndarray:
    """Return `array` as [token, layer, k], from the stated order of its axes."""
    names = [name.strip() for name in (axes.split(",") if isinstance(axes, str) else axes)]
    if sorted(names) not in (sorted(AXES), sorted(AXES[:2])):
        raise InputError(f"axes must name token, layer and k in the file's order, got {','.join(names)!r}")
    if array.ndim == 2:
        names, array = [name for name in names if name != "k"] + ["k"], array[:, :, None]
    if array.ndim != 3 or len(names) != 3:
        raise InputError(f"{path}: expected an array of {len(names)} axes {','.join(names)}, "
                         f"found shape {array.shape}")
    return array.transpose([names.index(name) for name in AXES])


def _from_arrays(path: Path, ids: np.ndarray, weights: np.ndarray | None, offsets: np.ndarray | None,
                 layer_ids: Sequence[int] | None) -> RawRouting:
    tokens, layers = ids.shape[:2]
    if min(ids.shape) < 1:
        raise InputError(f"{path}: the array of expert ids is empty (shape {ids.shape})")
    if weights is not None and weights.shape != ids.shape:
        raise InputError(f"{path}: gate weights {weights.shape} differ from expert ids {ids.shape}")
    named = np.arange(layers) if layer_ids is None else np.asarray(layer_ids)
    if named.shape != (layers,):
        raise InputError(f"{path}: layer_ids must name {layers} layers, got {len(named)}")
    notes = ["positions count from 0 in each request's recording"]
    if offsets is None:
        notes.append("no request offsets: all rows are taken as one request in file order; if requests "
                     "are interleaved, locality measured on it is wrong")
        offsets = np.array([0, tokens])
    offsets = np.atleast_1d(offsets.astype(np.int64) if np.issubdtype(offsets.dtype, np.integer) else -1)
    lengths = np.diff(offsets)
    if lengths.ndim != 1 or not lengths.size or offsets[0] != 0 or offsets[-1] != tokens or lengths.min() < 1:
        raise InputError(f"{path}: request offsets must be whole numbers that rise from 0 to {tokens} (rows)")
    position = np.arange(tokens) - np.repeat(offsets[:-1], lengths)
    request_id = np.repeat(np.arange(len(lengths)), lengths)
    return RawRouting(ids, request_id, position, named, weights, "", tuple(notes))


def read_jsonl(path: Path) -> RawRouting:
    """Read JSON lines: a meta line, then one line per request, token and layer.

    ``{"type": "meta", "model_id": ..., "layers_logged": [...], "top_k": ...}``, then
    ``{"type": "route", "req_id": ..., "token_idx": ..., "layer": ..., "topk_ids": [...],
    "topk_weights": [...]}``. Rows come out request by request, in order of first appearance.
    """
    meta: dict[str, Any] = {}
    routes: _Routes = {}
    names: dict[Any, int] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            entry = _json_object(line, where := f"{path}:{number}")
            if entry.get("type") == "meta":
                meta = entry
            elif entry.get("type") == "route":
                _add_route(entry, where, names, routes)
            else:
                raise InputError(f"{where}: expected type 'meta' or 'route', found {entry.get('type')!r}")
    if not routes:
        raise InputError(f"{path}: no route lines")
    return _from_routes(path, meta, names, routes)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg}") from None
    return entry if isinstance(entry, dict) else {}


def _add_route(entry: dict[str, Any], where: str, names: dict[Any, int], routes: _Routes) -> None:
    for key in ("req_id", "token_idx", "layer", "topk_ids"):
        if key not in entry:
            raise InputError(f"{where}: key {key!r} is missing")
    ids, weights = entry["topk_ids"], entry.get("topk_weights")
    numbers = (entry["token_idx"], entry["layer"], *(ids if isinstance(ids, list) else [None]))
    if not ids or any(type(value) is not int or value not in _INT32 for value in numbers):
        raise InputError(f"{where}: token_idx and layer must be whole numbers, topk_ids a list of them")
    if weights is not None and (not isinstance(weights, list) or len(weights) != len(ids)
                                or any(type(value) not in (int, float) for value in weights)):
        raise InputError(f"{where}: topk_weights must be {len(ids)} numbers, one for each of topk_ids")
    if not isinstance(entry["req_id"], str | int):
        raise InputError(f"{where}: req_id must be a string or a whole number")
    request = names.setdefault(entry["req_id"], len(names))
    layers = routes.setdefault((request, entry["token_idx"]), {})
    if entry["layer"] in layers:
        raise InputError(f"{where}: request {entry['req_id']!r}, token {entry['token_idx']}, "
                         f"layer {entry['layer']} is there twice")
    layers[entry["layer"]] = (ids, weights)


def _from_routes(path: Path, meta: dict[str, Any], names: dict[Any, int], routes: _Routes) -> RawRouting:
    layer_ids = sorted(set().union(*(layers.keys() for layers in routes.values())))
    tokens, request_names = sorted(routes), list(names)
    for request, token in tokens:
        missing = sorted(set(layer_ids) - routes[request, token].keys())
        if missing:
            raise InputError(f"{path}: request {request_names[request]!r}, token {token} has no route "
                             f"for layer {missing[0]}")
    cells = [routes[token][layer] for token in tokens for layer in layer_ids]
    top_k = max(len(ids) for ids, _ in cells)
    shape = (len(tokens), len(layer_ids), top_k)
    ids = np.array([row + [PAD] * (top_k - len(row)) for row, _ in cells], dtype=np.int64).reshape(shape)
    weights = None
    if all(row is not None for _, row in cells):
        padded = [list(row or []) + [0.0] * (top_k - len(row or [])) for _, row in cells]
        weights = np.array(padded, dtype=np.float32).reshape(shape)
    notes = [f"requests numbered from 0 in order of appearance (first: {request_names[0]!r})"]
    if meta.get("top_k", top_k) != top_k:
        notes.append(f"the meta line says top_k {meta['top_k']}, the rows have up to {top_k}")
    request_id, position = np.array(tokens, dtype=np.int64).T
    return RawRouting(ids, request_id, position, np.array(layer_ids), weights, str(meta.get("model_id", "")),
                      tuple(notes))


def _is_npz(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def _is_npy(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(6) == b"\x93NUMPY"


def _is_jsonl(path: Path) -> bool:
    with open(path, "rb") as file:
        first = file.readline(1 << 20)
    try:
        entry = json.loads(first)
    except ValueError:
        return False
    return isinstance(entry, dict) and entry.get("type") in ("meta", "route")


IMPORTERS: Registry[Importer] = Registry("source format", "moesim.importers", {
    "npz": Importer(_is_npz, read_npz, "numpy archive of expert ids, gate weights and request offsets"),
    "npy": Importer(_is_npy, read_npy, "numpy array [token, layer, k] or [token, layer]"),
    "jsonl": Importer(_is_jsonl, read_jsonl, "JSON lines: a meta line, then a route per token and layer"),
})
