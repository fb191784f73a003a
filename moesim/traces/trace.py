"""RoutingTrace: which experts each token used in each MoE layer, in the order the model chose them."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.model.spec import ModelSpec

PHASES = ("prefill", "decode", "denoise")
PREFILL, DECODE, DENOISE = range(3)
PAD = -1


@dataclass(frozen=True)
class RoutingTrace:
    """Routing of T tokens over L MoE layers with k experts per token; read-only arrays.

    Rows of one request are contiguous in position order of their recording (a request's positions
    rise by one), though requests may be interleaved in the file.

    Attributes:
        expert_ids: int16[token, layer, k], logical expert ids; -1 pads a variable k at the end of a row.
        gate_weights: float32[token, layer, k] or None; 0 where padded.
        request_id, position, step: int32[token]. `step` is the forward pass that held the token.
        phase: int8[token], index into `PHASES`.
        layer_ids: int32[layer], the model's own index of each MoE layer.
        num_experts: experts per layer.
        token_id: int32[token] or None (a shipped trace carries no text).
        model, source: where the routing came from.
        metadata: further facts (seed, command, licence).

    Raises:
        InputError: shapes that disagree, ids out of range, an expert twice in a row, positions of a
            request that do not rise by one.
    """

    expert_ids: np.ndarray
    request_id: np.ndarray
    position: np.ndarray
    phase: np.ndarray
    step: np.ndarray
    num_experts: int
    layer_ids: np.ndarray
    gate_weights: np.ndarray | None = None
    token_id: np.ndarray | None = None
    model: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dtypes = {
            "expert_ids": np.int16,
            "request_id": np.int32,
            "position": np.int32,
            "phase": np.int8,
            "step": np.int32,
            "layer_ids": np.int32,
            "gate_weights": np.float32,
            "token_id": np.int32,
        }
        if self.num_experts < 1:
            raise InputError(f"trace: num_experts must be at least 1, got {self.num_experts}")
        for name, dtype in dtypes.items():
            value = getattr(self, name)
            if value is None:
                continue
            object.__setattr__(self, name, _frozen(value, dtype, name))
        _check_shapes(self)
        _check_ids(self)
        _check_positions(self)

    @property
    def num_tokens(self) -> int:
        """Number of rows."""
        return self.expert_ids.shape[0]

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return self.expert_ids.shape[1]

    @property
    def top_k(self) -> int:
        """Width of a row (the largest k)."""
        return self.expert_ids.shape[2]

    def requests(self) -> np.ndarray:
        """Return int32[request], the request ids in order of first appearance."""
        ids, first = np.unique(self.request_id, return_index=True)
        return ids[np.argsort(first)]

    def take(self, rows: np.ndarray) -> RoutingTrace:
        """Return the trace of these rows (an index or mask over tokens; whole requests, or runs of one)."""
        rows = np.asarray(rows)
        optional: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in ("gate_weights", "token_id")
        }
        return dataclasses.replace(
            self,
            expert_ids=self.expert_ids[rows],
            request_id=self.request_id[rows],
            position=self.position[rows],
            phase=self.phase[rows],
            step=self.step[rows],
            **optional,
        )

    def digest(self) -> str:
        """Return ``sha256:<hex>`` over the routing itself (ids, weights, requests, positions, phases)."""
        hasher = hashlib.sha256(f"{self.num_experts} {self.expert_ids.shape}".encode())
        arrays = (self.expert_ids, self.request_id, self.position, self.phase, self.step, self.layer_ids)
        for array in (*arrays, self.gate_weights, self.token_id):
            if array is not None:
                hasher.update(np.ascontiguousarray(array).tobytes())
        return f"sha256:{hasher.hexdigest()}"

    def check_model(self, model: ModelSpec) -> None:
        """Raise InputError unless layers, experts and top-k are those of `model`."""
        found = (self.num_layers, self.num_experts, self.top_k)
        expected = (model.num_moe_layers, model.num_experts, model.top_k)
        if found != expected:
            words = "{} MoE layers x {} experts, top-{}"
            raise InputError(
                f"the trace (of {self.model or 'an unnamed model'}) has {words.format(*found)}, "
                f"but model {model.name!r} has {words.format(*expected)}"
            )


def _frozen(value: Any, dtype: type, name: str) -> np.ndarray:
    array = np.asarray(value)
    if np.issubdtype(dtype, np.integer):
        if not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"trace: {name} must hold integers, got {array.dtype}")
        limits = np.iinfo(dtype)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise InputError(f"trace: {name} has values outside {limits.min} ... {limits.max}")
    array = np.array(array, dtype=dtype)
    array.setflags(write=False)
    return array


def _check_shapes(trace: RoutingTrace) -> None:
    if trace.expert_ids.ndim != 3 or min(trace.expert_ids.shape) < 1:
        raise InputError(
            f"trace: expert_ids must be [token, layer, k], not empty, got {trace.expert_ids.shape}"
        )
    tokens = trace.expert_ids.shape[0]
    for name in ("request_id", "position", "phase", "step", "token_id"):
        value = getattr(trace, name)
        if value is not None and value.shape != (tokens,):
            raise InputError(f"trace: {name} must have shape ({tokens},), got {value.shape}")
    if trace.layer_ids.shape != (trace.num_layers,):
        raise InputError(
            f"trace: layer_ids must have {trace.num_layers} entries, got {trace.layer_ids.shape}"
        )
    if trace.gate_weights is not None and trace.gate_weights.shape != trace.expert_ids.shape:
        raise InputError(
            f"trace: gate_weights {trace.gate_weights.shape} differ from expert_ids {trace.expert_ids.shape}"
        )


def _check_ids(trace: RoutingTrace) -> None:
    ids = trace.expert_ids
    wrong = np.argwhere((ids < PAD) | (ids >= trace.num_experts))
    if len(wrong):
        token, layer, slot = wrong[0]
        raise InputError(
            f"trace: expert id {ids[token, layer, slot]} at token {token}, layer {layer} is outside "
            f"0 ... {trace.num_experts - 1} ({len(wrong)} such ids)"
        )
    ordered = np.sort(ids, axis=2)
    repeated = np.argwhere((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != PAD))
    if len(repeated):
        token, layer, _ = repeated[0]
        raise InputError(
            f"trace: token {token}, layer {layer} names an expert twice: {ids[token, layer].tolist()}"
        )
    if trace.phase.size and not (trace.phase.min() >= 0 and trace.phase.max() < len(PHASES)):
        raise InputError(f"trace: phase must be 0 ... {len(PHASES) - 1} ({', '.join(PHASES)})")


def _check_positions(trace: RoutingTrace) -> None:
    if np.any(trace.phase == DENOISE):
        return  # a denoising step visits the same positions again
    order = np.argsort(trace.request_id, kind="stable")
    same = np.diff(trace.request_id[order]) == 0
    jump = np.diff(trace.position[order]) != 1
    wrong = np.flatnonzero(same & jump)
    if len(wrong):
        row = order[wrong[0] + 1]
        raise InputError(
            f"trace: request {trace.request_id[row]} goes from position {trace.position[order[wrong[0]]]} "
            f"to {trace.position[row]} at row {row}; positions of a request must rise by one"
        )
