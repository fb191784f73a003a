"""Plain numpy arrays with a stated axis order: expert ids, or counts; ExFlow's and MoE-Infinity's files among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.base import Importer, RawCounts, RawRouting, never
from moesim.traces.importers.numpy_files import Npz, peek_npy, read_npy_file, zip_names

AXES = ("token", "layer", "k")
COUNT_AXES = ("window", "layer", "expert")
_ID_KEYS = ("expert_ids", "experts", "topk_ids")
_WEIGHT_KEYS = ("gate_weights", "probs", "topk_weights")
_OFFSET_KEYS = ("offsets", "request_offsets")
_COUNT_KEYS = ("counts", "expert_counts", "logical_count")

Axes = Sequence[str] | str
Layers = Sequence[int] | str | int | None


def read_npz(path: Path, expert_ids_key: str | None = None, gate_weights_key: str | None = None,
             offsets_key: str | None = None, counts_key: str | None = None, axes: Axes | None = None,
             layer_ids: Layers = None) -> RawRouting | RawCounts:
    """Read a numpy archive: ids, and if there weights and request offsets (int[request + 1], 0 ... T); or counts.

    Args:
        expert_ids_key, gate_weights_key, offsets_key, counts_key: array names; by default the first known one.
        axes: the order of the arrays' axes, e.g. "layer,token,k"; with "expert" among them, counts are read.
        layer_ids: the model's own index of each layer; by default 0, 1, ...
    """
    archive = Npz(path)
    named = axis_names(AXES if axes is None else axes)
    ids = None if counts_key or "expert" in named else archive.find(expert_ids_key, _ID_KEYS)
    if ids is None:
        counts = archive.find(counts_key, _COUNT_KEYS)
        if counts is not None:
            return counts_of(path, counts, named if axes is not None else COUNT_AXES, layer_ids)
        raise InputError(f"{path}: no expert ids: expected an array called {', '.join(_ID_KEYS)} (or expert_ids_key), "
                         f"or counts called {', '.join(_COUNT_KEYS)} (or counts_key), found {', '.join(archive.names)}")
    weights = archive.find(gate_weights_key, _WEIGHT_KEYS)
    if weights is not None:
        weights = _to_axes(path, weights, named)
    return routing_of(path, _to_axes(path, ids, named), weights, archive.find(offsets_key, _OFFSET_KEYS), layer_ids)


def read_npy(path: Path, axes: Axes = AXES, offsets: Sequence[int] | str | None = None,
             layer_ids: Layers = None) -> RawRouting | RawCounts:
    """Read one numpy array: ids [token, layer, k], or [token, layer] for top-1; or counts, where `axes` names "expert".

    Args:
        axes: the order of the axes (without "k" for a 2-d array), e.g. "window,layer,expert" for counts.
        offsets: int[request + 1], first row of each request and the number of rows.
        layer_ids: the model's own index of each layer; by default 0, 1, ...
    """
    array, named = read_npy_file(path), axis_names(axes)
    if "expert" in named:
        return counts_of(path, array, named, layer_ids)
    return routing_of(path, _to_axes(path, array, named), None,
                      None if offsets is None else np.asarray(_numbers(offsets, "offsets")), layer_ids)


def read_exflow(path: Path, offsets: Sequence[int] | str | None = None, layer_ids: Layers = None) -> RawRouting:
    """Read ExFlow's trace: int[token, MoE layer], top-1 (arXiv 2401.08383, the released code's .npy).

    Args:
        offsets, layer_ids: as in `read_npy`.
    """
    array = read_npy_file(path)
    if array.ndim != 2:
        raise InputError(f"{path}: ExFlow's arrays are [token, layer], found shape {array.shape}")
    return routing_of(path, array[:, :, None], None,
                      None if offsets is None else np.asarray(_numbers(offsets, "offsets")), layer_ids)


def read_moe_infinity(path: Path, layer_ids: Layers = None) -> RawCounts:
    """Read MoE-Infinity's trace: float[sequence, layer, expert], one expert activation matrix per sequence.

    Its layers are the MoE layers in the order of its parameter parser (encoder, then decoder).

    Args:
        layer_ids: the model's own index of each layer; by default 0, 1, ...
    """
    array = read_npy_file(path)
    if array.ndim != 3:
        raise InputError(f"{path}: MoE-Infinity's arrays are [sequence, layer, expert], found shape {array.shape}")
    note = "layers count the file's MoE layers from 0; give --model-config for the model's own indices"
    found = counts_of(path, array, COUNT_AXES, layer_ids, window="sequence")
    return found if layer_ids is not None else RawCounts(found.counts, found.layer_ids, found.window, notes=(note,))


def axis_names(axes: Axes) -> list[str]:
    """Return the names in a stated axis order; raises InputError unless they are ids' or counts'."""
    parts = axes.split(",") if isinstance(axes, str) else [str(name) for name in axes]
    names = [name.strip() for name in parts]
    if sorted(names) not in (sorted(AXES), sorted(AXES[:2]), sorted(COUNT_AXES), sorted(COUNT_AXES[1:])):
        raise InputError(f"axes must name token, layer and k (or window, layer and expert for counts) in the file's "
                         f"order, got {','.join(names)!r}")
    return names


def counts_of(path: Path, array: np.ndarray, axes: Sequence[str], layer_ids: Layers = None,
              window: str | None = None) -> RawCounts:
    """Return counts in the order window, layer, expert; raises InputError unless they are whole and not negative."""
    names = list(axes)
    if array.ndim == 2 and array.size:
        names, array = ["window", *(name for name in names if name != "window")], array[None]
    if array.ndim != 3 or len(names) != 3 or not array.size:
        raise InputError(f"{path}: expected counts of axes {','.join(names)}, not empty, found shape {array.shape}")
    array = array.transpose([names.index(name) for name in COUNT_AXES])
    whole = window or ("row" if len(array) > 1 else "whole recording")
    named = _layer_ids(path, array.shape[1], layer_ids)
    return RawCounts(whole_counts(array, str(path)), named, whole, layers_named=layer_ids is not None)


def whole_counts(array: np.ndarray, where: str) -> np.ndarray:
    """Return counts as int64; raises InputError for what is not finite, whole or not negative."""
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"{where}: counts must be finite")
        if (array != np.floor(array)).any():
            raise InputError(f"{where}: counts must be whole numbers, found {array[array != np.floor(array)][0]} "
                             f"(shares of a load cannot be told from counts)")
    if array.dtype.kind not in "iuf" or array.min() < 0 or array.max() >= 2.0**62:
        raise InputError(f"{where}: counts must be whole numbers from 0 to 2^62")
    return array.astype(np.int64)


def _to_axes(path: Path, array: np.ndarray, axes: Sequence[str]) -> np.ndarray:
    """Return `array` as [token, layer, k], from the stated order of its axes."""
    names = list(axes)
    if array.ndim == 2:
        names, array = [name for name in names if name != "k"] + ["k"], array[:, :, None]
    if array.ndim != 3 or len(names) != 3:
        raise InputError(f"{path}: expected an array of {len(names)} axes {','.join(names)}, "
                         f"found shape {array.shape}")
    return array.transpose([names.index(name) for name in AXES])


def routing_of(path: Path, ids: np.ndarray, weights: np.ndarray | None, offsets: np.ndarray | None,
               layer_ids: Layers = None) -> RawRouting:
    """Return ids [token, layer, k] with the requests that `offsets` state; raises InputError if these do not fit."""
    tokens, layers = ids.shape[:2]
    if min(ids.shape) < 1:
        raise InputError(f"{path}: the array of expert ids is empty (shape {ids.shape})")
    if weights is not None and (weights.shape != ids.shape or weights.dtype.kind not in "iuf"):
        raise InputError(f"{path}: gate weights {weights.shape} differ from expert ids {ids.shape}")
    named = _layer_ids(path, layers, layer_ids)
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
    return RawRouting(ids, request_id, position, named, weights, "", tuple(notes),
                      layers_named=layer_ids is not None)


def _layer_ids(path: Path, layers: int, stated: Layers) -> np.ndarray:
    named = np.arange(layers) if stated is None else np.asarray(_numbers(stated, "layer_ids"))
    if named.shape != (layers,):
        raise InputError(f"{path}: layer_ids must name {layers} layers, got {named.size}")
    return named


def _numbers(value: Sequence[int] | str | int, name: str) -> list[int]:
    """Return whole numbers from a list, one number, or text such as "3,4,5"."""
    parts: Sequence[object] = value.split(",") if isinstance(value, str) else (
        [value] if isinstance(value, int) else value)
    try:
        return [int(str(part)) for part in parts]
    except ValueError:
        raise InputError(f"{name} must be whole numbers with commas between, got {value!r}") from None


def _is_npz(path: Path) -> bool:
    names = zip_names(path)
    return bool(names) and all(name.endswith(".npy") for name in names)


def _is_npy(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(6) == b"\x93NUMPY" and not _is_moe_infinity(path)


def _is_moe_infinity(path: Path) -> bool:
    found = peek_npy(path)
    return found is not None and found[0].kind == "f" and len(found[1]) == 3


ARRAYS = {
    "npz": Importer(_is_npz, read_npz, "numpy archive of expert ids, gate weights and request offsets; or of counts"),
    "npy": Importer(_is_npy, read_npy, "numpy array of ids [token, layer, k] or [token, layer]; or of counts"),
    "exflow": Importer(never, read_exflow, "ExFlow's numpy array [token, layer], top-1 (never detected: as npy)"),
    "moe-infinity": Importer(_is_moe_infinity, read_moe_infinity,
                             "MoE-Infinity's numpy array float[sequence, layer, expert] of activation counts"),
}
