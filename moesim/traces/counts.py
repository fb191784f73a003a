"""CountTrace: how often each expert was used, window by window, where no token was recorded."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moesim.errors import InputError
from moesim.model.spec import ModelSpec
from moesim.traces.tables import read_header, read_table, write_table

SCHEMA = "moesim.counts/1"
SUFFIX = ".counts.parquet"
KINDS = ("selections", "relative")
COUNTS_ONLY = ("it holds expert counts without tokens: there is no order, no pair of layers and no request in it; "
               "only loads can be taken from it")


@dataclass(frozen=True)
class CountTrace:
    """Expert counts of W windows over L MoE layers; read-only arrays.

    Attributes:
        counts: int64[window, layer, expert], not negative.
        layer_ids: int32[layer], the model's own index of each MoE layer.
        window: what one window is ("forward pass", "iteration", "sequence", "whole recording").
        kind: "selections" (one per token and chosen expert) or "relative" (proportional to that; the scale is unknown).
        model, source: where the counts came from.
        metadata: further facts.

    Raises:
        InputError: a shape that is not [window, layer, expert], negative or fractional counts, a layer twice.
    """

    counts: np.ndarray
    layer_ids: np.ndarray
    window: str
    kind: str = "selections"
    model: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts)
        if counts.ndim != 3 or min(counts.shape) < 1:
            raise InputError(f"counts must be [window, layer, expert], not empty, got shape {counts.shape}")
        if not np.issubdtype(counts.dtype, np.integer):
            raise InputError(f"counts must be whole numbers, got {counts.dtype}")
        if counts.min() < 0 or counts.max() > np.iinfo(np.int64).max:
            raise InputError(f"counts must lie in 0 ... 2^63 - 1, found {counts.min()} ... {counts.max()}")
        if counts.max() * float(counts.size) > np.iinfo(np.int64).max:
            raise InputError(f"counts of up to {counts.max()} overflow when they are summed")
        if self.kind not in KINDS:
            raise InputError(f"counts: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        layers = np.asarray(self.layer_ids)
        if layers.shape != counts.shape[1:2] or not np.issubdtype(layers.dtype, np.integer):
            raise InputError(f"counts: layer_ids must be {counts.shape[1]} whole numbers, got {layers.tolist()}")
        if layers.min() < 0 or layers.max() > np.iinfo(np.int32).max or len(np.unique(layers)) < len(layers):
            raise InputError(f"counts: layer_ids must be different and not negative, got {layers.tolist()}")
        object.__setattr__(self, "counts", _frozen(counts, np.int64))
        object.__setattr__(self, "layer_ids", _frozen(layers, np.int32))

    @property
    def num_windows(self) -> int:
        """Number of windows."""
        return self.counts.shape[0]

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return self.counts.shape[1]

    @property
    def num_experts(self) -> int:
        """Experts per layer."""
        return self.counts.shape[2]

    def expert_load(self) -> np.ndarray:
        """Return int64[layer, expert], the counts summed over the windows."""
        return self.counts.sum(axis=0)

    def digest(self) -> str:
        """Return ``sha256:<hex>`` over the counts and their layers."""
        hasher = hashlib.sha256(f"counts {self.counts.shape}".encode())
        hasher.update(self.layer_ids.tobytes())
        hasher.update(np.ascontiguousarray(self.counts).tobytes())
        return f"sha256:{hasher.hexdigest()}"

    def check_model(self, model: ModelSpec) -> None:
        """Raise InputError unless layers and experts are those of `model`."""
        found, expected = (self.num_layers, self.num_experts), (model.num_moe_layers, model.num_experts)
        if found != expected:
            raise InputError(
                f"the counts (of {self.model or 'an unnamed model'}) have {found[0]} MoE layers x {found[1]} experts, "
                f"but model {model.name!r} has {expected[0]} x {expected[1]}")

    def summary(self) -> dict[str, Any]:
        """Return sizes and how uneven the load is (max / mean of the experts of a layer)."""
        load = self.expert_load()
        total = load.sum(axis=1)
        uneven = load.max(axis=1) * self.num_experts / np.maximum(total, 1)
        return {
            "num_windows": self.num_windows, "window": self.window, "kind": self.kind, "num_layers": self.num_layers,
            "num_experts": self.num_experts, "selections_per_layer": int(total.max()),
            "max_over_mean_load": float(uneven.mean()), "worst_layer": int(self.layer_ids[uneven.argmax()]),
            "worst_max_over_mean_load": float(uneven.max()), "experts_never_used": int((load == 0).sum())}


def _frozen(value: np.ndarray, dtype: type) -> np.ndarray:
    array: np.ndarray = np.array(value, dtype=dtype)
    array.setflags(write=False)
    return array


def write_counts(trace: CountTrace, path: str | os.PathLike[str]) -> Path:
    """Write `trace` as one Parquet file (a row per window), whole or not at all.

    Raises:
        InputError: metadata that is not JSON.
    """
    width = trace.num_layers * trace.num_experts
    values = pa.FixedSizeListArray.from_arrays(pa.array(trace.counts.reshape(-1)), width)
    table = pa.table({"window": pa.array(np.arange(trace.num_windows, dtype=np.int32)), "counts": values})
    body = {"num_layers": trace.num_layers, "num_experts": trace.num_experts, "layer_ids": trace.layer_ids.tolist(),
            "window": trace.window, "kind": trace.kind, "model": trace.model, "source": trace.source,
            "metadata": trace.metadata, "digest": trace.digest()}
    return write_table(path, table, SCHEMA, body)


def read_counts(path: str | os.PathLike[str]) -> CountTrace:
    """Read a ``*.counts.parquet`` file and verify its digest.

    Raises:
        InputError: no such file, damaged, another schema, or rows that differ from the header.
    """
    table, head = read_table(path, SCHEMA, {"window": pa.int32(), "counts": pa.int64()})
    layers, experts, layer_ids = head.get("num_layers"), head.get("num_experts"), head.get("layer_ids")
    texts = {name: head.get(name) for name in ("window", "kind", "model", "source", "digest")}
    if (type(layers) is not int or type(experts) is not int or min(layers, experts) < 1
            or not isinstance(layer_ids, list) or any(type(layer) is not int for layer in layer_ids)
            or not all(isinstance(text, str) for text in texts.values())
            or not isinstance(head.get("metadata"), dict)):
        raise InputError(f"{path}: its header is damaged")
    flat = table.column("counts").combine_chunks()
    flat = flat.chunk(0) if isinstance(flat, pa.ChunkedArray) else flat
    values = flat.flatten()
    if values.null_count or len(values) != len(table) * layers * experts:
        raise InputError(f"{path}: {len(table)} rows do not hold {layers} layers x {experts} experts each")
    try:
        trace = CountTrace(values.to_numpy(zero_copy_only=False).reshape(-1, layers, experts), np.array(layer_ids),
                           texts["window"] or "", texts["kind"] or "", texts["model"] or "", texts["source"] or "",
                           head["metadata"])
    except (InputError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: {error}") from None
    if trace.digest() != texts["digest"]:
        raise InputError(f"{path}: the rows do not match the header's digest: the file was changed")
    return trace


def counts_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a counts file's header without its rows; raises InputError if it is another file."""
    head = read_header(path)
    if head["schema"] != SCHEMA:
        raise InputError(f"{path}: expected a {SCHEMA!r} file, found schema {head['schema']!r}")
    return head


def is_counts(path: str | os.PathLike[str]) -> bool:
    """Say whether a file is a CountTrace, by its content."""
    try:
        return read_header(path)["schema"] == SCHEMA
    except InputError:
        return False


def divided(trace: CountTrace, by: int) -> CountTrace:
    """Return `trace` with every count divided by `by` (ranks that all counted the same tokens).

    Raises:
        InputError: `by` below 1, or a count that it does not divide.
    """
    if by < 1:
        raise InputError(f"divide_by must be at least 1, got {by}")
    if (trace.counts % by).any():
        raise InputError(f"divide_by {by}: not every count is a multiple of it, so the ranks did not count "
                         f"the same tokens")
    return dataclasses.replace(trace, counts=trace.counts // by)
