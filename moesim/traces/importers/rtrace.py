"""RTRACE01: the router's softmax per token and layer, as the package fitz-tec (Apache-2.0) has llama.cpp write it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.base import INT16_MAX, Importer, RawRouting
from moesim.traces.importers.policylang import top_of
from moesim.traces.importers.routes import Routes, assemble, request_numbers

RTRACE_MAGIC = b"RTRACE01"
_HEADER_BYTES = 16


def read_rtrace(path: Path, top_k: int | None = None) -> RawRouting:
    """Read RTRACE01: magic, int32 experts, int32 version 0; then records int32 token, int32 layer, float32[expert].

    A token and layer that come again begin the next request.

    Args:
        top_k: experts per token of the model (the file holds the whole softmax, not the choice).
    """
    data = path.read_bytes()
    if len(data) < _HEADER_BYTES or data[:8] != RTRACE_MAGIC:
        raise InputError(f"{path}: not an RTRACE01 trace")
    num_experts, version = struct.unpack_from("<ii", data, 8)
    if version != 0 or not 1 <= num_experts <= INT16_MAX:
        raise InputError(f"{path}: RTRACE01 version {version} with {num_experts} experts; version 0 is known")
    record = np.dtype([("token", "<i4"), ("layer", "<i4"), ("probs", "<f4", (num_experts,))])
    body = len(data) - _HEADER_BYTES
    if not body or body % record.itemsize:
        raise InputError(f"{path}: {body} bytes of records are not a multiple of {record.itemsize} (the size for "
                         f"{num_experts} experts): it is cut short or damaged")
    records = np.frombuffer(data, record, offset=_HEADER_BYTES)
    ids, weights = top_of(records["probs"], top_k, path)
    token, layer = records["token"].astype(np.int64), records["layer"].astype(np.int64)
    routes = Routes(request_numbers(token, layer), token, layer, ids,
                    lambda row: f"{path}: byte {_HEADER_BYTES + row * record.itemsize}", str, weights)
    notes = ("weights are the softmax over all experts, not renormalised over the chosen ones",
             "a choice that the model corrects after the softmax (bias, groups) is not in the file")
    return assemble(routes, path, last_layer_may_lack=True, num_experts=num_experts, notes=notes)


def _is_rtrace(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8) == RTRACE_MAGIC


RTRACE = {
    "rtrace": Importer(_is_rtrace, read_rtrace, "RTRACE01 binary trace of router softmax (fitz-tec); needs top_k"),
}
