"""Routed experts in the JSON replies of SGLang and vLLM: one array per request, ids logical."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.model.spec import ModelSpec
from moesim.traces.importers.base import Importer, RawRouting
from moesim.traces.importers.community import files_of
from moesim.traces.importers.json_files import documents, first_keys, short, whole_or_none
from moesim.traces.importers.numpy_files import NPY_MAGIC, npy_array, read_npy_file
from moesim.traces.trace import DECODE, PREFILL

_SIZES_HINT = "the size is not in the reply: give --model-config, or --option num_layers=L --option top_k=K"
_PARTS = ("routed_experts", "meta_info", "sglext")


class _Sequences:
    """Arrays of requests, collected."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.places: list[str] = []
        self.starts: list[int] = []
        self.prompts: list[int | None] = []
        self.notes: dict[str, None] = {}

    def add(self, where: str, ids: np.ndarray, usage: dict[str, int | None]) -> None:
        """Add int[row, layer, k] of one request; the usage says how many tokens it had.

        There is no row for the last token, and none for a prefix that was not asked for.
        """
        total = None if None in (usage["prompt"], usage["output"]) else int(usage["prompt"]) + int(usage["output"])  # type: ignore[arg-type]
        start = 0 if total is None else total - 1 - len(ids)
        if start < 0:
            raise InputError(f"{where}: {len(ids)} rows for {total} tokens, expected at most {total - 1 if total else 0} "
                             f"(one less than tokens): wrong sizes?")
        if start:
            self.notes["some replies start after the first token (a start was asked for, or a prefix left out)"] = None
        if total is None:
            self.notes["some replies do not say how many tokens are prompt: all their rows are taken as decode, from "
                       "position 0"] = None
        self.ids.append(ids)
        self.places.append(where)
        self.starts.append(start)
        self.prompts.append(usage["prompt"] if total is not None else 0)

    def routing(self, path: Path, notes: tuple[str, ...] = ()) -> RawRouting:
        """Return all requests as one recording; raises InputError if their sizes differ."""
        if not self.ids:
            raise InputError(f"{path}: no routed experts in any reply (was the engine asked to return them?)")
        for where, ids in zip(self.places, self.ids, strict=True):
            if ids.shape[1:] != self.ids[0].shape[1:]:
                raise InputError(f"{where}: [layer, k] is {ids.shape[1:]}, in the first reply {self.ids[0].shape[1:]}")
        lengths = [len(ids) for ids in self.ids]
        position = np.concatenate([np.arange(start, start + rows) for start, rows in zip(self.starts, lengths, strict=True)])
        prompt = np.repeat([limit or 0 for limit in self.prompts], lengths)
        return RawRouting(
            np.concatenate(self.ids), np.repeat(np.arange(len(lengths)), lengths), position,
            np.arange(self.ids[0].shape[1]), phase=np.where(position < prompt, PREFILL, DECODE),
            notes=("there is no row for the last token of a request", *self.notes, *notes))


def read_sglang_requests(path: Path, num_layers: int | None = None, top_k: int | None = None,
                         spec: ModelSpec | None = None) -> RawRouting:
    """Read replies of SGLang with ``return_routed_experts``: base64 of int32[token - 1, all layers, k].

    Native replies hold them in ``meta_info.routed_experts``, OpenAI replies in ``sglext.routed_experts``. One reply,
    a list of replies, or one per line; or a folder of such .json files.

    Args:
        num_layers, top_k: all layers of the model, and experts per token; the payload does not say.
        spec: the model, which says both.
    """
    layers = num_layers or (spec.num_layers if spec else None)
    top_k = top_k or (spec.top_k if spec else None)
    if type(layers) is not int or type(top_k) is not int or min(layers, top_k) < 1:
        raise InputError(f"{path}: {_SIZES_HINT}")
    found = _Sequences()
    for where, reply in _replies(path):
        for place, part, usage in _sglang_parts(where, reply):
            found.add(place, _int32_table(part, layers, top_k, place), usage)
    return found.routing(path)


def _sglang_parts(where: str, reply: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, int | None]]]:
    """Yield (place, payload, usage) of every sequence of a reply."""
    choices = reply.get("choices")
    for number, part in enumerate(choices if isinstance(choices, list) else [reply]):
        if not isinstance(part, dict):
            continue
        for key in ("meta_info", "sglext"):
            holder = part.get(key) if isinstance(part.get(key), dict) else (reply.get(key) if number == 0 else None)
            payload = holder.get("routed_experts") if isinstance(holder, dict) else None
            if payload is not None:
                place = f"{where}: choices[{number}]" if isinstance(choices, list) else where
                if not isinstance(payload, str):
                    raise InputError(f"{place}: routed_experts must be base64 text, found {short(payload)}")
                yield place, payload, _usage(reply, holder if key == "meta_info" else None, choices)
                break


def _int32_table(payload: str, layers: int, top_k: int, where: str) -> np.ndarray:
    data = _decoded(payload, where)
    row = 4 * layers * top_k
    if not data or len(data) % row:
        raise InputError(f"{where}: {len(data)} bytes are not rows of {layers} layers x {top_k} experts (int32)")
    return np.frombuffer(data, "<i4").reshape(-1, layers, top_k)


def _decoded(payload: str, where: str) -> bytes:
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where}: routed_experts is not base64") from None


def _usage(reply: dict[str, Any], meta: Any, choices: Any) -> dict[str, int | None]:
    """Return the numbers of prompt and output tokens of a sequence, where the reply says them."""
    usage = meta if isinstance(meta, dict) else reply.get("usage")
    several = isinstance(choices, list) and len(choices) > 1  # usage then adds up all choices
    return {"prompt": whole_or_none(usage, "prompt_tokens"),
            "output": None if several else whole_or_none(usage, "completion_tokens")}


def read_vllm(path: Path) -> RawRouting:
    """Read vLLM's routed experts: replies with ``choices[i].routed_experts``, or .npy arrays of the offline API.

    Replies hold base64 of a .npy file, uint8 or uint16 [token - 1 - start, layer, k]. A folder may hold .json, .jsonl
    or .npy files, one request each. The layer axis is the MoE layers', or all layers' with zeros in dense ones;
    --model-config tells them apart.
    """
    found = _Sequences()
    arrays = _npy_files(path)
    for file in arrays:
        found.add(str(file), _table(read_npy_file(file), str(file)), {"prompt": None, "output": None})
    for where, reply in [] if arrays else _replies(path):
        choices = reply.get("choices")
        for number, choice in enumerate(choices if isinstance(choices, list) else []):
            payload = choice.get("routed_experts") if isinstance(choice, dict) else None
            if payload is not None:
                place = f"{where}: choices[{number}]"
                found.add(place, _npy_payload(payload, place), _usage(reply, None, choices))
    return found.routing(path)


def _npy_payload(payload: Any, where: str) -> np.ndarray:
    if not isinstance(payload, str):
        raise InputError(f"{where}: routed_experts must be base64 text, found {short(payload)}")
    try:
        return _table(npy_array(_decoded(payload, where)), where)
    except ValueError as error:
        raise InputError(f"{where}: routed_experts is not a .npy file: {error}") from None


def _table(array: np.ndarray, where: str) -> np.ndarray:
    if array.ndim != 3 or not array.size or array.dtype.kind not in "iu":
        raise InputError(f"{where}: expected whole numbers [token, layer, k], found {array.dtype}{array.shape}")
    return array


def _npy_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.npy"))
    with open(path, "rb") as file:
        return [path] if file.read(6) == NPY_MAGIC else []


def _replies(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    files = [file for ending in (".json", ".jsonl") for file in files_of(path, ending)] if path.is_dir() else [path]
    for file in files:
        yield from documents(file)


def _keys(path: Path) -> frozenset[str]:
    files = [*files_of(path, ".json"), *files_of(path, ".jsonl")] if path.is_dir() else [path]
    return first_keys(files[0]) if files else frozenset()


def _is_sglang(path: Path) -> bool:
    return bool({"meta_info.routed_experts", "sglext.routed_experts", "choices.meta_info.routed_experts",
                 "choices.sglext.routed_experts"} & _keys(path))


def _is_vllm(path: Path) -> bool:
    return "choices.routed_experts" in _keys(path) or (path.is_dir() and bool(_npy_files(path)))


REPLIES = {
    "sglang-requests": Importer(_is_sglang, read_sglang_requests,
                                "SGLang replies with routed_experts (JSON, JSON lines, or a folder)", True),
    "vllm": Importer(_is_vllm, read_vllm, "vLLM replies with routed_experts (JSON, JSON lines), or a folder of these "
                                          "or of .npy arrays", True),
}
