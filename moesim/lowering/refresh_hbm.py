"""What fewer distinct experts per pass are worth where all weights are in the device's own memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.spec import HardwareSpec
from moesim.lowering.refresh import other_ns
from moesim.lowering.work import experts_work
from moesim.model.spec import ModelSpec
from moesim.traces.coresets import expected_union, published_debit
from moesim.traces.denoise_passes import DenoisePasses, denoise_passes, distinct_experts
from moesim.traces.trace import RoutingTrace
from moesim.units import format_bytes, ns_from_s


def expert_layers_s(model: ModelSpec, passes: DenoisePasses, cost: CostModel, device: str) -> np.ndarray:
    """Return float64[step, layer], seconds of a pass's routed experts as one grouped call per layer on `device`.

    At the few tokens of a block the call reads each distinct expert's weights once and that is most of its time (DES, arXiv
    2602.00879, and dMoE, arXiv 2605.30876, measure it to be linear in the distinct experts).
    """
    found = np.zeros(passes.counts.shape[:2])
    for place in np.ndindex(found.shape):
        counts = passes.counts[place]
        if counts.any():
            work = experts_work(model, int(counts.sum()), int((counts > 0).sum()), int(counts.max()))
            found[place] = cost.grouped_ffn(device, work).seconds
    return found


def coreset_rows(model: ModelSpec, traces: Mapping[tuple[str, float], RoutingTrace], cost: CostModel,
                 device: str) -> list[dict[str, Any]]:
    """Return a row per (method, setting) of `coresets`; ``("none", 0)`` is the trace as it is.

    `unique_experts` is the mean per pass and layer, `no_locality_experts` what independent uniform tokens would use,
    `expert_bytes_per_layer` the weights read, `experts_s_per_step` the time of all layers' experts. `published_experts` and
    `published_accuracy` (relative to the unchanged model) are those of exactly this method, setting and model, else None.

    Raises:
        InputError: a trace of another model.
    """
    rows = []
    for (method, setting), trace in traces.items():
        trace.check_model(model)
        rows.append(coreset_row(model, method, setting, denoise_passes(trace), cost, device)
                    | {"empty_share": trace.metadata.get("coreset", {}).get("empty_share", 0.0)})
    return rows


def coreset_row(model: ModelSpec, method: str, setting: float, passes: DenoisePasses, cost: CostModel,
                device: str) -> dict[str, Any]:
    """Return one row of `coreset_rows`, but for its `empty_share`, from the counts of rewritten passes."""
    unique = float(distinct_experts(passes).mean())
    published = published_debit(method, setting, model.name)
    return {
        "method": method, "setting": setting, "unique_experts": unique,
        "no_locality_experts": float(np.mean([expected_union(model.num_experts, model.top_k, len(rows))
                                              for rows in passes.rows])),
        "expert_bytes_per_layer": unique * model.expert_bytes,
        "experts_s_per_step": float(expert_layers_s(model, passes, cost, device).sum(axis=1).mean()),
        "published_experts": published.unique_experts if published else None,
        "published_accuracy": published.relative_accuracy if published else None,
        "published_source": published.source if published else None,
    }


def resident_ns(model: ModelSpec, trace: RoutingTrace, passes: DenoisePasses, cost: CostModel,
                device: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (experts, all else), int64[step] each: what a pass takes with every expert in the memory of `device`."""
    overhead = cost.task_overhead("experts").seconds
    layers = expert_layers_s(model, passes, cost, device)
    experts = [sum(ns_from_s(seconds + overhead) for seconds in row if seconds > 0) for row in layers.tolist()]
    return np.array(experts, np.int64), other_ns(model, trace, passes, device, cost)


def check_resident(model: ModelSpec, hardware: HardwareSpec, device: str, kv_tokens: int) -> None:
    """Raise InputError unless all weights and the cache of `kv_tokens` fit into the device's own memory."""
    memory = hardware.memory_of(device)
    needed = (model.non_expert_bytes + model.num_pool_experts * model.expert_bytes
              + kv_tokens * model.kv_bytes_per_token_layer * model.num_layers)
    if needed > memory.num_bytes:
        raise InputError(f"with all experts {model.name!r} needs {format_bytes(needed)}, but {memory.name!r} of "
                         f"{hardware.name!r} holds {format_bytes(memory.num_bytes)}")
