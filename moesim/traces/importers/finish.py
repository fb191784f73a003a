"""From what a reader found to a checked trace: layers, padding, filler rows, logical ids, warm-up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.model.spec import ModelSpec
from moesim.traces.counts import CountTrace
from moesim.traces.importers.base import INT16_MAX, RawCounts, RawRouting
from moesim.traces.trace import DECODE, PAD, PHASES, PREFILL, RoutingTrace

_UNIFORM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Wishes:
    """What the user said about a file; see `import_any` for each."""

    num_experts: int | None = None
    phase: str | None = None
    id_base: int = 0
    skip_rows: int = 0
    model: str = ""
    spec: ModelSpec | None = None
    physical_to_logical: np.ndarray | None = None
    source: str = ""


@dataclass
class _Notes:
    """Lines for ``metadata["notes"]``, in the order in which they were found."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)


def routing_trace(raw: RawRouting, wishes: Wishes) -> RoutingTrace:
    """Return the trace of what a reader found; raises InputError where it breaks a rule of RoutingTrace."""
    notes = _Notes([*raw.notes])
    stated = wishes.physical_to_logical
    raw = _small_ids(_skipped(raw, wishes.skip_rows), _stated_experts(raw, wishes) if stated is None else stated.shape[1],
                     notes)
    kept = _kept_layers(_filler_layers(raw.expert_ids), raw.layer_ids, raw.layers_named, wishes.spec, notes,
                        "it holds one repeated id (a dense layer)")
    layer_ids = _layer_names(kept, raw.layer_ids, raw.layers_named, wishes.spec)
    table = _logical_map(raw, wishes, kept)
    raw = _pads_last(_without_filler_rows(_taken(raw, kept), notes))
    ids = _logical(raw.expert_ids, table, wishes.id_base)
    weights = raw.gate_weights
    if weights is not None and not np.isfinite(weights).all():
        raise InputError("gate weights must be finite")
    num_experts = _num_experts(ids, table, _stated_experts(raw, wishes), notes)
    if wishes.id_base == 0 and not (ids == 0).any():
        notes.add("no row uses expert 0: if the file counts from 1, import with id_base 1")
    notes.lines += warmup_notes(ids, weights)
    phase = _phase(raw, wishes.phase)
    trace = RoutingTrace(
        expert_ids=ids, gate_weights=weights, request_id=raw.request_id, position=raw.position, phase=phase,
        step=_steps(raw.request_id, phase) if raw.step is None else raw.step, token_id=raw.token_id,
        num_experts=num_experts, layer_ids=layer_ids, model=_model_name(raw.model, wishes), source=wishes.source,
        metadata={"notes": notes.lines})
    if wishes.spec is not None:
        trace.check_model(wishes.spec)
    return trace


def count_trace(raw: RawCounts, wishes: Wishes) -> CountTrace:
    """Return the counts of what a reader found; raises InputError where they break a rule of CountTrace."""
    for name, value in (("phase", wishes.phase), ("id_base", wishes.id_base or None)):
        if value is not None:
            raise InputError(f"{name} does not apply: the file holds counts, not tokens")
    if not 0 <= wishes.skip_rows < len(raw.counts):
        raise InputError(f"skip_rows must lie in 0 ... {len(raw.counts) - 1} (windows), got {wishes.skip_rows}")
    notes = _Notes([*raw.notes])
    counts = raw.counts[wishes.skip_rows:]
    empty = ~counts.any(axis=(1, 2))
    if empty.all():
        raise InputError("every count is 0: no routing was recorded")
    if empty.any():
        notes.add(f"left out {int(empty.sum())} windows of zeros (unused rows of the recorder)")
    counts = counts[~empty]
    kept = _kept_layers(np.asarray(~counts.any(axis=(0, 2))), raw.layer_ids, raw.layers_named, wishes.spec, notes,
                        "it has no counts (a dense layer)")
    table = _logical_map(raw, wishes, kept)
    counts = counts[:, kept] if table is None else _scatter(counts[:, kept], table)
    if wishes.num_experts is not None and counts.shape[2] != wishes.num_experts:
        raise InputError(f"the file counts {counts.shape[2]} experts, not {wishes.num_experts}")
    trace = CountTrace(counts, _layer_names(kept, raw.layer_ids, raw.layers_named, wishes.spec), raw.window, raw.kind,
                       _model_name(raw.model, wishes), wishes.source, {"notes": notes.lines})
    if wishes.spec is not None:
        trace.check_model(wishes.spec)
    return trace


def _model_name(found: str, wishes: Wishes) -> str:
    return wishes.model or found or (wishes.spec.name if wishes.spec is not None else "")


def _stated_experts(raw: RawRouting, wishes: Wishes) -> int | None:
    if wishes.num_experts is not None:
        return wishes.num_experts
    return wishes.spec.num_experts if wishes.spec is not None else raw.num_experts


def _skipped(raw: RawRouting, rows: int) -> RawRouting:
    if not 0 <= rows < len(raw.expert_ids):
        raise InputError(f"skip_rows must lie in 0 ... {len(raw.expert_ids) - 1}, got {rows}")
    return _rows(raw, slice(rows, None)) if rows else raw


def _rows(raw: RawRouting, rows: Any) -> RawRouting:
    """Return these tokens of a recording."""
    names = ("expert_ids", "request_id", "position", "gate_weights", "phase", "step", "token_id")
    taken: dict[str, Any] = {name: None if getattr(raw, name) is None else getattr(raw, name)[rows] for name in names}
    return dataclasses.replace(raw, **taken)


def _taken(raw: RawRouting, kept: np.ndarray) -> RawRouting:
    """Return a recording of these layers, weights as float32."""
    weights = raw.gate_weights
    return dataclasses.replace(
        raw, expert_ids=raw.expert_ids[:, kept],
        gate_weights=None if weights is None else np.asarray(weights[:, kept], np.float32))


def _small_ids(raw: RawRouting, num_experts: int | None, notes: _Notes) -> RawRouting:
    """Return the recording with int16 ids; the largest unsigned value is undone where it is a wrapped -1."""
    ids = raw.expert_ids
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"expert ids must be integers, found {ids.dtype}")
    if ids.dtype in (np.uint8, np.uint16) and not raw.physical:
        ids = _unwrapped(ids, num_experts, notes)
    low, high = int(ids.min()), int(ids.max())
    if low < PAD or high > INT16_MAX:
        raise InputError(f"expert id {low if low < PAD else high} is outside {PAD} (padding) ... {INT16_MAX}")
    return dataclasses.replace(raw, expert_ids=ids.astype(np.int16))


def _unwrapped(ids: np.ndarray, num_experts: int | None, notes: _Notes) -> np.ndarray:
    """Return `ids` with 255 (65535) as -1 where it cannot be an expert; raises InputError where it could be both."""
    largest = int(np.iinfo(ids.dtype).max)
    wrapped = ids == largest
    if not wrapped.any() or (num_experts is not None and num_experts > largest):
        return ids
    others = ids[~wrapped]
    if num_experts is None and ids.dtype == np.uint8 and others.size and others.max() > largest // 2:
        return ids  # ids spread up to 256 experts
    if num_experts is None:
        raise InputError(f"ids of {largest} in an array of {ids.dtype} are expert {largest} or a wrapped -1 "
                         f"(padding): state num_experts")
    notes.add(f"{int(wrapped.sum())} ids of {largest} in an array of {ids.dtype} are taken as padding (a wrapped -1)")
    return np.where(wrapped, PAD, ids.astype(np.int32))


def _filler_layers(ids: np.ndarray) -> np.ndarray:
    """Return bool[layer]: layers that only hold one repeated id (or padding), which is how recorders fill dense ones."""
    filled = (ids == ids[:1, :, :1]).all(axis=(0, 2))
    if ids.shape[2] == 1:
        filled &= ids[0, :, 0] == PAD  # with one expert per token, one id over and over may be real
    if filled.all():
        raise InputError("every layer holds one repeated id: no routing was recorded")
    return filled


def _kept_layers(filled: np.ndarray, layer_ids: np.ndarray, named: bool, spec: ModelSpec | None, notes: _Notes,
                 reason: str) -> np.ndarray:
    """Return the layers to keep: those of the model where it is known, else those that are not filled.

    Raises:
        InputError: layers that are not the model's.
    """
    if spec is not None:
        kept = _model_layers(filled, layer_ids, named, spec)
        if filled[kept].any():
            layer = int(np.asarray(layer_ids)[kept][filled[kept]][0])
            raise InputError(f"layer {layer} of the file is a MoE layer of {spec.name!r}, but {reason}")
        if len(kept) < len(filled):
            notes.add(f"kept the {len(kept)} MoE layers of {spec.name}, of {len(filled)} layers")
        return kept
    for layer in np.asarray(layer_ids)[filled].tolist():
        notes.add(f"left out layer {layer}: {reason}")
    return np.flatnonzero(~filled)


def _model_layers(filled: np.ndarray, layer_ids: np.ndarray, named: bool, spec: ModelSpec) -> np.ndarray:
    if named:
        place = {int(layer): index for index, layer in enumerate(layer_ids)}
        missing = [layer for layer in spec.moe_layers if layer not in place]
        extra = sorted(set(np.asarray(layer_ids)[~filled].tolist()) - set(spec.moe_layers))
        if missing or extra:
            word, layer = ("lacks MoE", missing[0]) if missing else ("routes", extra[0])
            raise InputError(f"the file {word} layer {layer}, unlike model {spec.name!r} (its MoE layers: "
                             f"{spec.moe_layers[0]} ... {spec.moe_layers[-1]}, {spec.num_moe_layers} of them)")
        return np.array([place[layer] for layer in spec.moe_layers])
    if len(filled) == spec.num_moe_layers:
        return np.arange(len(filled))
    if len(filled) == spec.num_layers:
        return np.array(spec.moe_layers)
    raise InputError(f"the file has {len(filled)} layers, but model {spec.name!r} has {spec.num_layers} "
                     f"({spec.num_moe_layers} of them MoE)")


def _layer_names(kept: np.ndarray, layer_ids: np.ndarray, named: bool, spec: ModelSpec | None) -> np.ndarray:
    if spec is not None and not named:
        return np.array(spec.moe_layers)
    return np.asarray(layer_ids)[kept]


def _logical_map(raw: RawRouting | RawCounts, wishes: Wishes, kept: np.ndarray) -> np.ndarray | None:
    """Return int[kept layer, slot] -> logical expert, or None where the ids are logical already.

    Raises:
        InputError: the ids are slots and no map is known, or a map of another number of layers.
    """
    stated = wishes.physical_to_logical
    table = raw.physical_to_logical if stated is None else stated
    if table is None or (stated is None and not raw.physical):
        if raw.physical:
            raise InputError("the ids are physical (slots after load balancing), not experts: give the map that was "
                             "loaded with --physical-to-logical FILE")
        return None
    num_layers = len(raw.layer_ids)
    if len(table) not in (num_layers, len(kept)):
        raise InputError(f"the physical-to-logical map has {len(table)} layers, the file {num_layers} "
                         f"({len(kept)} of them MoE)")
    return table[kept] if len(table) == num_layers else table


def _logical(ids: np.ndarray, table: np.ndarray | None, id_base: int) -> np.ndarray:
    """Return int16[token, layer, k], the logical experts of slots (or of ids that count from `id_base`)."""
    if id_base:
        if ((ids != PAD) & (ids < id_base)).any():
            raise InputError(f"an id of {int(ids[ids != PAD].min())} is below id_base {id_base}")
        ids = np.where(ids == PAD, PAD, ids - np.int16(id_base)).astype(np.int16)
    if table is None:
        return ids
    if ids.max() >= table.shape[1] or ids.min() < PAD:
        raise InputError(f"slot {ids.max()} is not in the physical-to-logical map of {table.shape[1]} slots")
    layers = np.arange(len(table))[:, None]
    return np.where(ids == PAD, PAD, table[layers, np.maximum(ids, 0)]).astype(np.int16)


def _scatter(counts: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return int64[window, layer, expert], counts of slots added up over the copies of each expert."""
    if counts.shape[2] != table.shape[1]:
        raise InputError(f"{counts.shape[2]} slots are counted, the physical-to-logical map has {table.shape[1]}")
    num_experts = int(table.max()) + 1
    flat = np.zeros((counts.shape[0], len(table) * num_experts), np.int64)
    target = (table + np.arange(len(table))[:, None] * num_experts).reshape(-1)
    np.add.at(flat.T, target, counts.reshape(len(counts), -1).T)
    return flat.reshape(len(counts), len(table), num_experts)


def _num_experts(ids: np.ndarray, table: np.ndarray | None, stated: int | None, notes: _Notes) -> int:
    if stated is not None:
        return stated
    if table is not None:
        return int(table.max()) + 1
    largest = int(ids.max()) + 1
    notes.add(f"num_experts {largest} inferred as the largest id + 1")
    return largest


def _pads_last(raw: RawRouting) -> RawRouting:
    """Return the recording with padding at the end of each row, the other ids in their order."""
    ids, weights = raw.expert_ids, raw.gate_weights
    padded = ids == PAD
    if not (padded[..., :-1] & ~padded[..., 1:]).any():
        if weights is None or not padded.any():
            return raw
        return dataclasses.replace(raw, gate_weights=np.where(padded, 0, weights))
    order = np.argsort(padded, axis=2, kind="stable")
    ids = np.take_along_axis(ids, order, axis=2)
    if weights is not None:
        weights = np.where(ids == PAD, 0, np.take_along_axis(weights, order, axis=2))
    return dataclasses.replace(raw, expert_ids=ids, gate_weights=weights)


def _without_filler_rows(raw: RawRouting, notes: _Notes) -> RawRouting:
    """Return the recording without rows of zeros (or of padding) in every layer: tokens that were never routed."""
    ids = raw.expert_ids
    filler = (ids == PAD).all(axis=(1, 2))
    if ids.shape[2] > 1:  # with one expert per token, expert 0 in every layer may be real
        filler |= (ids == 0).all(axis=(1, 2))
    if not filler.any():
        return raw
    if filler.all():
        raise InputError("every row is zeros or padding: no routing was recorded")
    kept = np.flatnonzero(~filler)
    order = kept[np.argsort(raw.request_id[kept], kind="stable")]
    jumps = (np.diff(raw.request_id[order]) == 0) & (np.diff(raw.position[order]) != 1)
    if jumps.any():
        row = int(order[np.flatnonzero(jumps)[0]]) + 1
        raise InputError(f"row {row} holds zeros or padding in every layer (never routed), between rows of one request "
                         f"that were: the recording has a hole")
    notes.add(f"left out {int(filler.sum())} rows of zeros or padding in every layer (never routed)")
    return _rows(raw, ~filler)


def _phase(raw: RawRouting, wished: str | None) -> np.ndarray:
    if wished is not None or raw.phase is None:
        return np.full(len(raw.expert_ids), DECODE if wished is None else PHASES.index(wished))
    return raw.phase


def _steps(request_id: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """Return int64[token]: a pass per row, but one per run of prefill rows of a request."""
    together = (np.diff(request_id) == 0) & (phase[1:] == PREFILL) & (phase[:-1] == PREFILL)
    return np.concatenate([[0], np.cumsum(~together)])


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
