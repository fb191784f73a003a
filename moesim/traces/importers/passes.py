"""Forward passes of llama.cpp: the MBLT binary (package mbolt, MIT) and ``EXPERT|`` log lines (package moe-l2).

Both say, pass by pass and layer by layer, which experts the tokens of the pass used, and name no request. In a prompt
pass llama.cpp computes the last layer only for tokens whose logits are asked for, so that layer has fewer rows.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moesim.errors import InputError
from moesim.model.spec import ModelSpec
from moesim.traces.importers.base import INT16_MAX, INT32_MAX, Importer, RawRouting
from moesim.traces.importers.routes import Routes, assemble, padded, request_numbers
from moesim.traces.trace import DECODE, PREFILL

MBLT_MAGIC = b"MBLT"
_LINE = re.compile(r"EXPERT\|L(\d{1,6})\|T(\d{1,9}):(.*)$")
_GROUP = re.compile(r"\[([0-9, ]*)\]")
_MAX_K = 1024
Pass = dict[int, np.ndarray]


@dataclass
class _Tokens:
    """The tokens of all passes, as they are put together."""

    ids: list[np.ndarray] = field(default_factory=list)
    request: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    dropped: int = 0

    def add(self, ids: np.ndarray, request: int, position: int, phase: int, step: int) -> None:
        """Add the rows int[token, layer, k] of one pass, from `position` on."""
        rows = len(ids)
        self.ids.append(ids)
        self.request += [request] * rows
        self.position += range(position, position + rows)
        self.phase += [phase] * rows
        self.step += [step] * rows


def read_mblt(path: Path, skip_passes: int = 0, num_layers: int | None = None,
              spec: ModelSpec | None = None) -> RawRouting:
    """Read an MBLT trace, version 1: int32 magic, version, experts; then records layer, k, tokens, ids[token, k].

    Args:
        skip_passes: leading passes to drop (llama.cpp's warm-up).
        num_layers: MoE layers of the model, needed for a recording of one pass (which may have been cut off).
        spec: the model, which says the same.
    """
    data = path.read_bytes()
    if len(data) < 12 or data[:4] != MBLT_MAGIC:
        raise InputError(f"{path}: not an MBLT trace (it must start with MBLT, a version and the number of experts)")
    version, num_experts = struct.unpack_from("<ii", data, 4)
    if version != 1 or not 1 <= num_experts <= INT16_MAX:
        raise InputError(f"{path}: MBLT version {version} with {num_experts} experts; version 1 is known")
    words = np.frombuffer(data, "<i4", offset=12, count=(len(data) - 12) // 4)
    notes: list[str] = []
    passes = _split(_mblt_records(path, words, len(data) % 4, num_experts, notes))
    passes = _from_pass(path, passes, skip_passes, num_layers or (spec.num_moe_layers if spec else None))
    return _routing(path, passes, notes, num_experts)


def _mblt_records(path: Path, words: np.ndarray, left_over: int, num_experts: int,
                  notes: list[str]) -> Iterator[tuple[int, np.ndarray]]:
    place = 0
    while place < len(words):
        layer, k, tokens = (int(word) for word in words[place:place + 3]) if place + 3 <= len(words) else (0, 1, 1)
        if not 0 <= layer <= INT16_MAX or not 1 <= k <= min(num_experts, _MAX_K) or tokens < 0:
            raise InputError(f"{path}: byte {12 + 4 * place}: layer {layer}, {k} experts per token, {tokens} tokens is "
                             f"not a record")
        end = place + 3 + k * tokens
        if end > len(words):
            notes.append("the file ends within a record (the recorder was stopped); that record is left out")
            return
        ids = words[place + 3:end].reshape(tokens, k)
        if tokens and (ids.min() < 0 or ids.max() >= num_experts):
            raise InputError(f"{path}: byte {12 + 4 * place}: an expert id is outside 0 ... {num_experts - 1}")
        yield layer, ids
        place = end
    if left_over:
        notes.append("the file ends within a number (the recorder was stopped)")


def read_expert_log(path: Path, skip_passes: int = 0, num_layers: int | None = None,
                    spec: ModelSpec | None = None) -> RawRouting:
    """Read log lines ``EXPERT|L<layer>|T<n>: [ids] [ids] ...``: n lists of the n tokens of a pass (or one list of token n).

    Lines without EXPERT| are passed over.

    Args:
        skip_passes: leading passes to drop (llama.cpp's warm-up).
        num_layers: MoE layers of the model, needed for a recording of one pass (which may have been cut off).
        spec: the model, which says the same.
    """
    notes: list[str] = []
    lines = list(_log_lines(path))
    counts = all(len(ids) == number for _, _, number, ids in lines)
    if not counts and any(len(ids) != 1 for _, _, _, ids in lines):
        where, layer, number, ids = next(line for line in lines if len(line[3]) != line[2])
        raise InputError(f"{where}: layer {layer} has {len(ids)} lists of ids after T{number}: expected {number} lists "
                         f"(a pass of {number} tokens), or one list in every line")
    if not counts:
        return _indexed(path, lines)
    records = ((layer, _id_table(where, ids)) for where, layer, _, ids in lines)
    passes = _from_pass(path, _split(records), skip_passes, num_layers or (spec.num_moe_layers if spec else None))
    return _routing(path, passes, notes, None)


def _indexed(path: Path, lines: list[tuple[str, int, int, list[list[int]]]]) -> RawRouting:
    """Return the routing of lines of one token each, T being its index."""
    layer, token = (np.array([line[part] for line in lines], dtype=np.int64) for part in (1, 2))
    routes = Routes(request_numbers(token, layer), token, layer, padded([line[3][0] for line in lines]),
                    lambda row: lines[row][0], str)
    return assemble(routes, path, last_layer_may_lack=True, notes=(
        "T is taken as the index of a token: every line has one list of ids",))


def _log_lines(path: Path) -> Iterator[tuple[str, int, int, list[list[int]]]]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            start = line.find("EXPERT|")
            if start < 0:
                continue
            where = f"{path}:{number}"
            found = _LINE.match(line[start:].rstrip())
            groups = _GROUP.findall(found[3]) if found else []
            if found is None or not groups or _GROUP.sub("", found[3]).strip():
                raise InputError(f"{where}: expected EXPERT|L<layer>|T<tokens>: [ids] [ids] ..., found {line[:60]!r}")
            yield where, int(found[1]), int(found[2]), [_ids(group, where) for group in groups]


def _ids(text: str, where: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if any(not part.isdigit() or len(part) > 9 or int(part) > INT16_MAX for part in parts):
        raise InputError(f"{where}: expected whole numbers from 0 to {INT16_MAX} with commas between, found [{text[:60]}]")
    return [int(part) for part in parts]


def _id_table(where: str, ids: list[list[int]]) -> np.ndarray:
    if any(len(row) != len(ids[0]) for row in ids):
        raise InputError(f"{where}: lists of ids of different lengths")
    return np.array(ids, dtype=np.int32)


def _split(records: Iterable[tuple[int, np.ndarray]]) -> list[Pass]:
    """Return the passes: a layer that is not above the one before begins the next pass."""
    passes: list[Pass] = []
    last = INT32_MAX
    for layer, ids in records:
        if layer <= last:
            passes.append({})
        passes[-1][layer] = ids
        last = layer
    return passes


def _from_pass(path: Path, passes: list[Pass], skip: int, num_layers: int | None) -> list[Pass]:
    """Return the passes from `skip` on; raises InputError if their layers are not, or cannot be known to be, complete."""
    if type(skip) is not int or not 0 <= skip < max(1, len(passes)):
        raise InputError(f"skip_passes must lie in 0 ... {max(0, len(passes) - 1)}, got {skip}")
    layers: set[int] = set().union(*passes)
    if num_layers is not None and len(layers) != num_layers:
        raise InputError(f"{path}: records of {len(layers)} layers, expected {num_layers}")
    if num_layers is None and len(passes) == 1:
        raise InputError(f"{path}: one forward pass only, which may have been cut off at any layer: give --model-config, "
                         f"or --option num_layers=N")
    return passes[skip:]


def _routing(path: Path, passes: list[Pass], notes: list[str], num_experts: int | None) -> RawRouting:
    """Return the tokens of all passes; a prompt pass after a decode pass begins a new request."""
    layers = sorted(set().union(*passes)) if passes else []
    passes = _whole_passes(path, passes, layers, notes)
    if not passes:
        raise InputError(f"{path}: no whole forward pass")
    widths = {ids.shape[1] for one in passes for ids in one.values()}
    if len(widths) > 1:
        raise InputError(f"{path}: passes with {min(widths)} and {max(widths)} experts per token")
    found = _walk(path, passes, layers)
    if not found.ids:
        raise InputError(f"{path}: no token went through every layer")
    notes += _pass_notes(passes, found, layers)
    return RawRouting(
        np.concatenate(found.ids), np.array(found.request), np.array(found.position), np.array(layers),
        notes=tuple(notes), phase=np.array(found.phase), step=np.array(found.step), num_experts=num_experts,
        layers_named=True)


def _whole_passes(path: Path, passes: list[Pass], layers: list[int], notes: list[str]) -> list[Pass]:
    """Return the passes without a last one that lacks layers; raises InputError if another one lacks some."""
    for number, one in enumerate(passes):
        lacking = [layer for layer in layers if layer not in one]
        if not lacking or (lacking == layers[-1:] and len(next(iter(one.values()))) > 1):
            continue
        if number < len(passes) - 1:
            raise InputError(f"{path}: forward pass {number} has no record of layer {lacking[0]}")
        notes.append("the last forward pass lacks layers (the recorder was stopped) and is left out")
        return passes[:-1]
    return passes


def _walk(path: Path, passes: list[Pass], layers: list[int]) -> _Tokens:
    found = _Tokens()
    request, position, before = -1, 0, DECODE
    for step, one in enumerate(passes):
        rows = [len(one[layer]) if layer in one else 0 for layer in layers]
        tokens = rows[0]
        if any(count != tokens for count in rows[:-1]) or rows[-1] > tokens:
            raise InputError(f"{path}: forward pass {step} has {rows} tokens in its layers")
        phase = DECODE if tokens == 1 else PREFILL
        if request < 0 or (phase == PREFILL and before == DECODE):
            request, position = request + 1, 0
        kept = tokens if rows[-1] == tokens else (1 if rows[-1] == 1 else 0)
        if kept:
            stacked = np.stack([one[layer][len(one[layer]) - kept:] for layer in layers], axis=1)
            found.add(stacked, request, position + tokens - kept, phase, step)
        found.dropped += tokens - kept
        position, before = position + tokens, phase
    return found


def _pass_notes(passes: list[Pass], found: _Tokens, layers: list[int]) -> list[str]:
    notes = ["the file names no request: a prompt pass after a decode pass is taken as the next request; with several "
             "sequences at once, their tokens are one request's here"]
    if found.dropped:
        notes.append(f"left out {found.dropped} prompt tokens that the engine did not compute in the last layer "
                     f"(layer {layers[-1]}); ask it for the logits of all tokens to record them")
    sizes = [len(next(iter(one.values()))) for one in passes[:2]]
    if len(sizes) == 2 and sizes[0] == 2 and sizes[1] > 2:
        notes.append("the first pass has 2 tokens and may be llama.cpp's warm-up: import with skip_passes 1")
    return notes


def _is_mblt(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == MBLT_MAGIC


def _is_expert_log(path: Path) -> bool:
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    return b"\0" not in head and re.search(rb"EXPERT\|L\d+\|T\d+:", head) is not None


PASSES = {
    "mblt": Importer(_is_mblt, read_mblt, "MBLT binary trace of llama.cpp (mbolt)"),
    "expert-log": Importer(_is_expert_log, read_expert_log, "llama.cpp log with EXPERT|L..|T..: [ids] lines"),
}
