"""TensorRT-LLM's expert statistics: a folder with meta_info.json and one safetensors file per rank.

A tensor is called ``<iteration>_<layer>``, the layer being the model's own. Summed files hold counts [expert]; raw
files (``rank<r>_raw``, ``token_selected_experts_rank<r>``) hold ids [token, k]. No file names requests or positions.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.base import INT16_MAX, Importer, RawCounts, RawRouting
from moesim.traces.importers.json_files import document, whole
from moesim.traces.importers.ranks import joined_counts
from moesim.traces.importers.safetensors_files import read_safetensors

_SUMMED = re.compile(r"rank(\d+)\.safetensors$")
_RAW = re.compile(r"(?:rank(\d+)_raw|token_selected_experts_rank(\d+))\.safetensors$")
_KEY = re.compile(r"(\d{1,9})_(\d{1,6})$")
Tensors = dict[tuple[int, int], np.ndarray]


def read_summed(path: Path, ranks: str = "auto") -> RawCounts:
    """Read the counts per iteration and layer, summed over ranks.

    Args:
        ranks: "sum", "one", or "auto": one rank's counts if all ranks have the same, else the sum.
    """
    meta = document(path / "meta_info.json") if (path / "meta_info.json").is_file() else {}
    where = str(path / "meta_info.json")
    experts = whole(meta, "num_experts", where, 1) if meta else None
    per_rank = []
    cells: list[tuple[int, int]] = []
    for file in _files(path, _SUMMED):
        tensors = _keyed(file, 1, experts)
        cells = cells or sorted(tensors)
        if sorted(tensors) != cells:
            raise InputError(f"{file}: its iterations and layers differ from the first rank's")
        counts = np.stack([tensors[cell] for cell in cells])
        if counts.min() < 0:
            raise InputError(f"{file}: counts must not be negative")
        per_rank.append(counts)
    iterations, layers = _grid(path, cells)
    notes: list[str] = []
    counts = joined_counts(per_rank, ranks, notes).reshape(len(iterations), len(layers), -1)
    return RawCounts(counts, np.array(layers), "iteration", notes=tuple(notes), layers_named=True)


def read_raw(path: Path, ranks: str = "auto") -> RawRouting:
    """Read the ids of every token. Without requests in the files each token is a request of its own (position 0).

    Args:
        ranks: "sum" (all ranks' tokens), "one", or "auto": one rank's if all ranks have the same tokens.
    """
    meta_file = path / "meta_info.json"
    experts = whole(document(meta_file), "num_experts", str(meta_file), 1) if meta_file.is_file() else None
    notes: list[str] = []
    found = [_keyed(file, 2, None) for file in _files(path, _RAW)]
    found = _chosen_ranks(found, ranks, notes)
    parts, steps, layers = [], [], None
    for tensors in found:
        iterations, here = _grid(path, sorted(tensors))
        layers = layers or here
        if here != layers:
            raise InputError(f"{path}: ranks with different layers")
        for iteration in iterations:
            rows = [tensors[iteration, layer] for layer in here]
            if any(row.shape != rows[0].shape for row in rows):
                raise InputError(f"{path}: iteration {iteration} has different numbers of tokens in its layers")
            parts.append(np.stack(rows, axis=1))
            steps.append(np.full(len(rows[0]), iteration))
    if len({part.shape[2] for part in parts}) > 1:
        raise InputError(f"{path}: iterations with different numbers of experts per token")
    step = np.concatenate(steps)
    order = np.argsort(step, kind="stable")
    notes.append("the files name no requests: every token is a request of its own, so nothing can be said about "
                 "neighbours in time")
    return RawRouting(np.concatenate(parts)[order], np.arange(len(step)), np.zeros(len(step), np.int64),
                      np.array(layers), step=step[order], num_experts=experts, notes=tuple(notes), layers_named=True)


def _chosen_ranks(found: list[Tensors], ranks: str, notes: list[str]) -> list[Tensors]:
    if ranks not in ("auto", "sum", "one"):
        raise InputError(f"ranks must be one of auto, sum, one, got {ranks!r}")
    first = found[0]
    same = len(found) > 1 and all(
        sorted(other) == sorted(first) and all(np.array_equal(other[key], first[key]) for key in first)
        for other in found[1:])
    if ranks == "one" and len(found) > 1 and not same:
        raise InputError("ranks=one: the ranks routed different tokens")
    if same and ranks != "sum":
        notes.append(f"all {len(found)} ranks routed the same tokens (no data parallelism): one of them is taken")
        return found[:1]
    return found


def _files(path: Path, pattern: re.Pattern[str]) -> list[Path]:
    found = {}
    for file in path.glob("*.safetensors"):
        if match := pattern.match(file.name):
            found[int(next(group for group in match.groups() if group))] = file
    if not found:
        raise InputError(f"{path}: no file of one rank, as rank0.safetensors")
    if sorted(found) != list(range(len(found))):
        raise InputError(f"{path}: files of ranks {', '.join(map(str, sorted(found)))}: some rank is missing")
    return [found[rank] for rank in sorted(found)]


def _keyed(file: Path, ndim: int, experts: int | None) -> Tensors:
    result: Tensors = {}
    for name, tensor in read_safetensors(file).items():
        match = _KEY.match(name)
        if match is None:
            raise InputError(f"{file}: expected tensors called ITERATION_LAYER, found {name[:60]!r}")
        if tensor.ndim != ndim or not tensor.size or tensor.dtype.kind not in "iu":
            raise InputError(f"{file}: tensor {name}: expected whole numbers of {ndim} axes, found "
                             f"{tensor.dtype}{tensor.shape}")
        if experts is not None and len(tensor) != experts:
            raise InputError(f"{file}: tensor {name} counts {len(tensor)} experts, meta_info.json says {experts}")
        if ndim == 2 and (int(tensor.min()) < -1 or int(tensor.max()) > INT16_MAX):
            raise InputError(f"{file}: tensor {name} has ids outside -1 ... {INT16_MAX}")
        if tensor.max() > np.iinfo(np.int64).max:
            raise InputError(f"{file}: tensor {name} has counts that are too large")
        key = int(match[1]), int(match[2])
        if key in result:
            raise InputError(f"{file}: iteration {key[0]}, layer {key[1]} is there twice")
        result[key] = tensor.astype(np.int64)
    if not result:
        raise InputError(f"{file}: no tensors")
    if len({tensor.shape[-1] for tensor in result.values()}) > 1:
        raise InputError(f"{file}: tensors of different widths")
    return result


def _grid(path: Path, cells: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Return the iterations and layers; raises InputError unless every iteration has every layer."""
    iterations, layers = (sorted({cell[part] for cell in cells}) for part in (0, 1))
    missing = sorted({(i, layer) for i in iterations for layer in layers} - set(cells)) if len(cells) < len(
        iterations) * len(layers) else []
    if missing:
        raise InputError(f"{path}: iteration {missing[0][0]} has no layer {missing[0][1]}")
    return iterations, layers


def _matches(path: Path, pattern: re.Pattern[str]) -> bool:
    return path.is_dir() and any(pattern.match(file.name) for file in path.glob("*.safetensors"))


def _is_summed(path: Path) -> bool:
    return _matches(path, _SUMMED)


def _is_raw(path: Path) -> bool:
    return _matches(path, _RAW)


TENSORRT_LLM = {
    "tensorrt-llm": Importer(_is_summed, read_summed, "TensorRT-LLM expert statistics, counts (a folder)", True),
    "tensorrt-llm-raw": Importer(_is_raw, read_raw, "TensorRT-LLM expert statistics, ids of tokens (a folder)", True),
}
