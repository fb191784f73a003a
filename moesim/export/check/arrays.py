"""Readers and rules for files that hold arrays: .npz, .npy and safetensors, read without the packages that wrote them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping

import numpy as np

from moesim.errors import CheckError

SAFETENSORS_DTYPES = {"I16": "<i2", "I32": "<i4", "I64": "<i8", "F32": "<f4"}


def read_safetensors(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the tensors and the text metadata of a safetensors file; raises CheckError.

    The format: 8 bytes little-endian length, a JSON header, then the tensors back to back without gaps.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    metadata = header.pop("__metadata__", {})
    if any(not isinstance(value, str) for value in metadata.values()):
        raise CheckError("safetensors: metadata must be text")
    body, end, tensors = data[8 + size:], 0, {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        dtype = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
        if begin != end or stop - begin != math.prod(entry["shape"]) * dtype.itemsize:
            raise CheckError(f"safetensors: tensor {name!r} at {begin} ... {stop} leaves a gap or has the wrong size")
        tensors[name], end = np.frombuffer(body[begin:stop], dtype).reshape(entry["shape"]), stop
    if end != len(body) or (8 + size) % 8:
        raise CheckError("safetensors: bytes beyond the last tensor, or a header that is not padded to 8 bytes")
    return tensors, metadata


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz, .npy (named ``""``) or safetensors file, told apart by their first bytes."""
    if data.startswith(b"PK"):
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    if data.startswith(b"\x93NUMPY"):
        return {"": np.load(io.BytesIO(data), allow_pickle=False)}
    return read_safetensors(data)[0]


def check_eplb(phy2log: np.ndarray, log2phy: np.ndarray, logcnt: np.ndarray) -> None:
    """Raise CheckError unless the three arrays are of the kinds EPLB returns and agree with each other."""
    layers, slots = phy2log.shape
    counts = np.stack([np.bincount(row, minlength=logcnt.shape[1]) for row in phy2log])
    if not np.array_equal(counts, logcnt) or logcnt.min() < 1:
        raise CheckError("eplb: logcnt is not the number of slots of each expert in phy2log, each at least 1")
    filled = log2phy >= 0
    if not np.array_equal(filled.sum(axis=2), logcnt) or int(filled.sum()) != layers * slots:
        raise CheckError("eplb: log2phy does not list every slot once")
    layer, expert, replica = np.nonzero(filled)
    if not np.array_equal(phy2log[layer, log2phy[layer, expert, replica]], expert):
        raise CheckError("eplb: log2phy and phy2log disagree")


def eplb_rows(data: bytes, *, num_experts: int) -> list[list[int]]:
    """Return phy2log of an EPLB file (.npy: that array alone); raises CheckError."""
    arrays = read_arrays(data)
    if any(array.dtype != np.int64 for array in arrays.values()):
        raise CheckError("eplb: rebalance_experts returns int64")
    if set(arrays) == {""}:
        rows = arrays[""]
        if rows.ndim != 2 or any(set(row) != set(range(num_experts)) for row in rows.tolist()):
            raise CheckError(f"eplb: expected a row per layer that holds each of 0 ... {num_experts - 1}")
        return rows.tolist()
    if set(arrays) != {"phy2log", "log2phy", "logcnt"}:
        raise CheckError(f"eplb: expected phy2log, log2phy and logcnt, found {sorted(arrays)}")
    check_eplb(arrays["phy2log"], arrays["log2phy"], arrays["logcnt"])
    return arrays["phy2log"].tolist()


def check_weight(data: bytes, *, num_layers: int, num_experts: int, assignments: int) -> np.ndarray:
    """Return the ``weight`` of an EPLB input: every assignment of a token to an expert counted once; raises CheckError."""
    arrays = read_arrays(data)
    if set(arrays) not in ({"weight"}, {""}):
        raise CheckError(f"eplb-weight: expected one tensor 'weight', found {sorted(arrays)}")
    weight = next(iter(arrays.values()))
    if weight.shape != (num_layers, num_experts) or weight.min() < 0 or int(weight.sum()) != assignments:
        raise CheckError(f"eplb-weight: expected counts of {assignments} assignments, [{num_layers}, {num_experts}]; "
                         f"found {int(weight.sum())} in {weight.shape}")
    return weight


def check_routing(data: bytes, *, num_experts: int) -> Mapping[str, np.ndarray]:
    """Return the tensors of a file for the vLLM routing plug-in; raises CheckError.

    ``expert_ids`` int32[token, layer, k], distinct in a row and in range; ``weights`` float32 of the same shape, finite
    and not negative.
    """
    tensors, metadata = read_safetensors(data)
    if metadata.get("schema") != "moesim.vllm-routing/1" or metadata.get("num_experts") != str(num_experts):
        raise CheckError(f"vllm-routing: the metadata says {metadata}")
    ids, weights = tensors["expert_ids"], tensors["weights"]
    if ids.dtype != np.int32 or weights.dtype != np.float32 or ids.shape != weights.shape or ids.ndim != 3:
        raise CheckError(f"vllm-routing: expert_ids {ids.dtype}{ids.shape}, weights {weights.dtype}{weights.shape}")
    ordered = np.sort(ids, axis=2)
    if ids.min() < 0 or ids.max() >= num_experts or np.any(ordered[..., 1:] == ordered[..., :-1]):
        raise CheckError(f"vllm-routing: ids must be distinct in a row and within 0 ... {num_experts - 1}")
    if not np.all(np.isfinite(weights)) or weights.min() < 0:
        raise CheckError("vllm-routing: weights must be finite and not negative")
    return tensors
