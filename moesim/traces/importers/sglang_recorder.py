"""SGLang's expert distribution recorder: files of the modes stat, stat_approx, per_pass and per_token.

The layer axis holds all layers of the model (rows of dense layers are zeros, or -1). In per_pass and per_token ids
are physical; each file carries the map that was loaded last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.base import INT16_MAX, INT32_MAX, Importer, RawCounts, RawRouting
from moesim.traces.importers.json_files import short
from moesim.traces.importers.ranks import joined_counts
from moesim.traces.importers.requests import RequestTracker
from moesim.traces.importers.torch_files import load_torch, pickle_text, tensor_array
from moesim.traces.trace import DECODE, PREFILL

_MAP = "last_physical_to_logical_map"
_TP_NOTE = ("with tensor parallelism and no data parallelism every rank counts the same tokens and the recorder adds "
            "them up: the counts may be a multiple (option divide_by=RANKS undoes it)")


def read_stat(path: Path, divide_by: int = 1) -> RawCounts:
    """Read files of the modes stat and stat_approx: ``logical_count`` int[forward pass, layer, expert].

    Also reads KTransformers' activation files, which are of the same form. A folder's files are taken in the order
    of their names (which hold the time).

    Args:
        divide_by: ranks that all counted the same tokens.
    """
    parts: list[np.ndarray] = []
    for file in _torch_files(path):
        content = load_torch(file)
        content = content.get("logical_count") if isinstance(content, dict) else content
        parts.append(_not_negative(tensor_array(content, f"{file}: logical_count", 3), str(file)))
    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise InputError(f"{path}: the files have different numbers of layers or experts")
    counts = np.concatenate(parts)
    if type(divide_by) is not int or divide_by < 1 or (counts % divide_by).any():
        raise InputError(f"{path}: not every count is a multiple of divide_by {divide_by!r}")
    return RawCounts(counts // divide_by, np.arange(counts.shape[1]), "forward pass", layers_named=True,
                     notes=(_TP_NOTE,) if divide_by == 1 else (f"counts divided by {divide_by}",))


def read_per_pass(path: Path, ranks: str = "auto") -> RawCounts:
    """Read files of the mode per_pass (or the counts in per_token files), summed over ranks pass by pass.

    Args:
        ranks: "sum", "one", or "auto": one rank's counts if all ranks have the same, else the sum.
    """
    files = [_record_file(file) for file in _torch_files(path)]
    by_rank: dict[int, dict[int, np.ndarray]] = {}
    for file, content in files:
        for number, record in enumerate(content["records"]):
            where = f"{file}: records[{number}]"
            counts = _not_negative(tensor_array(record.get("global_physical_count"),
                                                f"{where}: global_physical_count", 2), where)
            passes = by_rank.setdefault(_whole(record, "rank", where), {})
            if (one := _whole(record, "forward_pass_id", where)) in passes:
                raise InputError(f"{where}: forward pass {one} of rank {record['rank']} is there twice")
            passes[one] = counts
    if not by_rank:
        raise InputError(f"{path}: no records")
    notes: list[str] = []
    counts = joined_counts(_same_passes(path, by_rank, notes), ranks, notes)
    if len(by_rank) == 1:
        notes.append(f"the counts are of rank {next(iter(by_rank))} only; give the folder to add up all ranks")
    return RawCounts(counts, np.arange(counts.shape[1]), "forward pass", notes=(*notes, *_map_notes(files)),
                     layers_named=True, physical=True, physical_to_logical=_last_map(files))


def _same_passes(path: Path, by_rank: dict[int, dict[int, np.ndarray]], notes: list[str]) -> list[np.ndarray]:
    """Return int64[forward pass, layer, slot] of each rank: the passes that every rank has, in order."""
    ids = sorted(set.intersection(*(set(passes) for passes in by_rank.values())))
    dropped = len(set.union(*(set(passes) for passes in by_rank.values()))) - len(ids)
    if not ids:
        raise InputError(f"{path}: no forward pass that all {len(by_rank)} ranks recorded")
    if dropped:
        notes.append(f"left out {dropped} forward passes that not every rank recorded")
    if len({counts.shape for passes in by_rank.values() for counts in passes.values()}) > 1:
        raise InputError(f"{path}: records of different numbers of layers or slots")
    return [np.stack([by_rank[rank][one] for one in ids]) for rank in sorted(by_rank)]


def read_per_token(path: Path) -> RawRouting:
    """Read files of the mode per_token: ids of every token; requests are put together again from the positions.

    A rank whose tokens are another rank's (no data parallelism) is left out.
    """
    files = [_record_file(file) for file in _torch_files(path)]
    tracker = RequestTracker()
    notes: list[str] = []
    parts: list[np.ndarray] = []
    token_ids: list[np.ndarray] = []
    for file, content in _without_copies(files, notes):
        tracker.new_source()
        records = sorted(enumerate(content["records"]), key=lambda item: _whole(item[1], "forward_pass_id", str(file)))
        for number, record in records:
            where = f"{file}: records[{number}]"
            rows = _token_rows(record, where, tracker, notes)
            if rows is not None:
                parts.append(rows)
                token_ids.append(_list(record, "input_ids", where))
    if not parts:
        raise InputError(f"{path}: no tokens")
    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        raise InputError(f"{path}: records of different numbers of layers or experts per token")
    ids = np.concatenate(parts)
    used = (ids >= 0).any(axis=(0, 1))
    width = int(np.flatnonzero(used)[-1]) + 1 if used.any() else 1
    order = np.argsort(np.array(tracker.request), kind="stable")
    step = np.unique(tracker.step, return_inverse=True)[1]
    arrays = [np.array(values)[order] for values in (tracker.request, tracker.position, tracker.phase, step)]
    return RawRouting(
        ids[order][:, :, :width], arrays[0], arrays[1], np.arange(ids.shape[1]), phase=arrays[2], step=arrays[3],
        token_id=np.concatenate(token_ids)[order], notes=(*dict.fromkeys(notes), *tracker.notes(), *_map_notes(files)),
        layers_named=True, physical=True, physical_to_logical=_last_map(files))


def _token_rows(record: dict[str, Any], where: str, tracker: RequestTracker, notes: list[str]) -> np.ndarray | None:
    """Return int64[token, layer, k] of one record and track its tokens; None for an idle pass."""
    positions = _list(record, "positions", where)
    tokens = len(_list(record, "input_ids", where))
    if len(positions) != tokens:
        raise InputError(f"{where}: {len(positions)} positions for {tokens} input_ids")
    if not tokens:
        return None
    ids = tensor_array(record.get("topk_ids_of_layer"), f"{where}: topk_ids_of_layer", 3)
    if ids.shape[1] < tokens:
        raise InputError(f"{where}: routes of {ids.shape[1]} tokens for {tokens} input_ids")
    if ids.shape[1] > tokens:
        notes.append("rows beyond the real tokens of a pass (padding of a captured graph) are left out")
    if ids.min() < -1 or ids.max() > INT16_MAX:
        raise InputError(f"{where}: slots must lie in -1 (padding) ... {INT16_MAX}")
    lengths, step = record.get("extend_seq_lens"), _whole(record, "forward_pass_id", where)
    if lengths is None:
        tracker.decode_pass(positions.tolist(), DECODE, step)
    else:
        lengths = _list(record, "extend_seq_lens", where)
        if lengths.sum() != tokens or lengths.min(initial=1) < 1:
            raise InputError(f"{where}: extend_seq_lens {short(lengths.tolist())} do not add up to {tokens} tokens")
        tracker.extend_pass(positions.tolist(), lengths.tolist(), PREFILL, DECODE, step, where)
    return ids[:, :tokens].transpose(1, 0, 2)


def _without_copies(files: list[tuple[Path, dict[str, Any]]],
                    notes: list[str]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the files without those of ranks that saw the tokens of an earlier one (same inputs, same positions)."""
    seen: set[bytes] = set()
    kept = []
    for file, content in files:
        key = b"|".join(_list(record, name, str(file)).tobytes() for record in content["records"]
                        for name in ("input_ids", "positions"))
        if key and key in seen:
            notes.append(f"left out {file.name}: its tokens are another rank's (no data parallelism)")
            continue
        seen.add(key)
        kept.append((file, content))
    return kept


def _torch_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no .pt files in this folder")
    return files


def _record_file(file: Path) -> tuple[Path, dict[str, Any]]:
    content = load_torch(file)
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise InputError(f"{file}: expected a dict with a list 'records', as the recorder dumps it")
    if any(not isinstance(record, dict) for record in content["records"]):
        raise InputError(f"{file}: every record must be a dict")
    return file, content


def _last_map(files: list[tuple[Path, dict[str, Any]]]) -> np.ndarray | None:
    file, content = files[-1]
    if content.get(_MAP) is None:
        return None
    table = tensor_array(content[_MAP], f"{file}: {_MAP}", 2)
    if table.min() < 0 or table.max() > INT16_MAX:
        raise InputError(f"{file}: {_MAP} has experts outside 0 ... {INT16_MAX}")
    return table


def _map_notes(files: list[tuple[Path, dict[str, Any]]]) -> tuple[str, ...]:
    if all(content.get(_MAP) is None for _, content in files):
        return ()
    return ("slots are turned into experts by the map that was loaded last; if experts were rebalanced while "
            "recording, earlier passes are wrong",)


def _not_negative(counts: np.ndarray, where: str) -> np.ndarray:
    if counts.min() < 0:
        raise InputError(f"{where}: counts must not be negative, found {counts.min()}")
    return counts


def _whole(record: dict[str, Any], key: str, where: str) -> int:
    value = record.get(key)
    if type(value) is not int or not 0 <= value <= INT32_MAX:
        raise InputError(f"{where}: {key} must be a whole number from 0, found {short(value)}")
    return value


def _list(record: dict[str, Any], key: str, where: str) -> np.ndarray:
    """Return a list of whole numbers (or a tensor of them) as int64[n]."""
    value: Any = record.get(key)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list) or any(type(item) is not int or not 0 <= item <= INT32_MAX for item in value):
        raise InputError(f"{where}: {key} must be a list of whole numbers from 0, found {short(value)}")
    return np.array(value, dtype=np.int64)


def _has(path: Path, *names: bytes) -> bool:
    files = sorted(path.glob("*.pt"))[:1] if path.is_dir() else [path]
    text = pickle_text(files[0]) if files else b""
    return bool(text) and all(name in text for name in names)


def _is_stat(path: Path) -> bool:
    return _has(path, b"logical_count")


def _is_per_token(path: Path) -> bool:
    return _has(path, b"records", b"topk_ids_of_layer")


def _is_per_pass(path: Path) -> bool:
    return _has(path, b"records", b"global_physical_count") and not _is_per_token(path)


SGLANG_RECORDER = {
    "sglang-stat": Importer(_is_stat, read_stat, "SGLang recorder, mode stat or stat_approx (.pt, or a folder)", True),
    "sglang-per-pass": Importer(_is_per_pass, read_per_pass, "SGLang recorder, mode per_pass (.pt, or a folder)", True),
    "sglang-per-token": Importer(_is_per_token, read_per_token,
                                 "SGLang recorder, mode per_token (.pt, or a folder)", True),
}
