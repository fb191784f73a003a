"""The row of one simulated offload point: what it is, what came out, and how far from what no policy can beat."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from moesim.cache.policy import POLICIES, information_level
from moesim.cache.prefetch import PREFETCHERS, SEES_FUTURE
from moesim.hardware.energy import energy_j
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload_bound import OffloadBound
from moesim.scenario.schema import NO_PREFETCH, Point
from moesim.simulate.critical_path import bounded_by
from moesim.simulate.result import SimulationResult
from moesim.simulate.stalls import ADMIT, CPU, FAR_LINK, LOAD, PREFETCH, stall_times
from moesim.units import s_from_ns

# What the device waited for, as the columns tell it.
STALLS = {"stall_link_fraction": (LOAD, PREFETCH, ADMIT), "stall_cpu_fraction": (CPU,), "stall_flash_fraction": (FAR_LINK,)}


def what_it_is(point: Point, num_experts: int) -> dict[str, Any]:
    """Return the columns that name a point."""
    return {
        "system": point.system or None,
        "policy": point.policy,
        "prefetch": prefetch_label(point),
        "miss": miss_label(point),
        "allocation": None if point.allocation == "uniform" else point.allocation,
        "precision": None if point.precision is None else point.precision.label,
        "slots_per_layer": point.slots_per_layer,
        "resident_fraction": min(1.0, point.slots_per_layer / num_experts),
        "knows": knows(point),
        "sees_future": sees_future(point),
    }


def times(result: SimulationResult, machine: OffloadMachine) -> dict[str, Any]:
    """Return rates, the split of the device's time, and energy."""
    steps, summary, requests = result.tables["steps"], result.summary, result.tables["requests"]
    elapsed_s, tokens = s_from_ns(int(steps["end_ns"].iloc[-1])), int(steps["tokens"].sum())
    resources = machine.resources()
    device, cpu = resources[machine.compute_index].name, resources[machine.cpu_index].name
    busy = {part: s_from_ns(int(result.tasks.loc[result.tasks["resource"] == name, "duration_ns"].sum()))
            for part, name in ((machine.device, device), (machine.cpu, cpu))}
    power = energy_j(machine.hardware, {part: min(time, elapsed_s) for part, time in busy.items()}, elapsed_s)
    return {
        "hit_rate": summary["hit_rate"],
        "htod_bytes_per_token": summary["htod_bytes"] / tokens,
        "ttft_s": s_from_ns(int(requests["ttft_ns"].median())) if (steps["phase"] == "prefill").any() else None,
        "tpot_s": summary["decode_step_time_s"],
        "tokens_per_s": summary["tokens_per_s"],
        "stall_fraction": 1.0 - busy[machine.device] / elapsed_s,
        **_stalls(result, device, elapsed_s),
        "energy_j_per_token": None if power is None else power / tokens,
        "bound_by": bounded_by(result.tables["critical_path"]),
    }


def _stalls(result: SimulationResult, device: str, elapsed_s: float) -> dict[str, Any]:
    """What the device waited for, as shares of the run; what is left of its idle time goes to ``stall_other_fraction``."""
    causes = stall_times(result, device)
    shares = {column: sum(causes.get(cause, 0.0) for cause in parts) / elapsed_s for column, parts in STALLS.items()}
    longest = max(causes, key=lambda cause: causes[cause], default=None)
    return {**shares, "stall_other_fraction": sum(causes.values()) / elapsed_s - sum(shares.values()),
            "stall_cause": longest, "stall_cause_fraction": None if longest is None else causes[longest] / elapsed_s}


def cache_columns(result: SimulationResult) -> dict[str, Any]:
    """Return what the prefetcher and the host tier did."""
    counts = result.tables["cache"].drop(columns="layer").sum()
    made = int(counts["prefetches"])
    hosted = int(counts.get("host_accesses", 0))
    return {
        "prefetches": made,
        **{f"{name}_prefetch_fraction": int(counts[f"{name}_prefetches"]) / made if made else None
           for name in ("useful", "late", "useless")},
        "host_hit_rate": int(counts["host_hits"]) / hosted if hosted else None,
    }


def against_bound(result: SimulationResult, bound: OffloadBound | None, on_demand: bool, only_decode: bool) -> dict[str, Any]:
    """Return the bound that holds for the point, and what could at most be won."""
    steps = result.tables["steps"]
    if bound is None:
        return {"tpot_bound_s": None, "tpot_gap": None, "bound_for": None}
    elapsed_s = s_from_ns(int(steps["end_ns"].iloc[-1]))
    least = bound.on_demand_s if on_demand else bound.prefetch_s
    return {
        "tpot_bound_s": least / len(steps) if only_decode else None,
        "tpot_gap": (elapsed_s - least) / elapsed_s,
        "bound_for": "on_demand" if on_demand else "any",
        "link_floor_s": bound.link_floor_s / len(steps) if only_decode else None,
        "kernel_floor_s": bound.kernel_floor_s / len(steps) if only_decode else None,
    }


def sees_future(point: Point) -> bool:
    """Return whether a point's policy or prefetcher is built from the future (by the level that it declares)."""
    return any(level in SEES_FUTURE for level in _levels(point))


def knows(point: Point) -> str:
    """Return ``past``, ``stated`` (a prediction of a stated recall) or ``future``."""
    levels = _levels(point)
    return "future" if "I4" in levels else "stated" if "I3" in levels else "past"


def _levels(point: Point) -> list[str]:
    plugins: list[object] = [POLICIES[point.policy]]
    if point.prefetch != NO_PREFETCH:
        plugins.append(PREFETCHERS[point.prefetch])
    return [information_level(plugin, "a plug-in") for plugin in plugins]


def point_label(point: Point) -> str:
    """Return a short name for a point, fit for a file name."""
    parts: Sequence[str] = (
        *([point.system] if point.system else []),
        point.policy,
        f"{point.slots_per_layer}slots",
        prefetch_label(point).replace(" ", ""),
        miss_label(point).replace(" ", ""),
        *([point.allocation] if point.allocation != "uniform" else []),
        *([point.precision.label] if point.precision else []),
    )
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", "-".join(parts)).strip("_")


def prefetch_label(point: Point) -> str:
    """``hobbit 8 d3 r0.9``: width, lookahead and recall where they are stated."""
    if point.prefetch == NO_PREFETCH:
        return NO_PREFETCH
    ahead = "" if point.lookahead is None else f" d{point.lookahead}"
    recall = "" if point.prefetch_recall is None else f" r{point.prefetch_recall:g}"
    return f"{point.prefetch} {point.prefetch_width}{ahead}{recall}"


def miss_label(point: Point) -> str:
    """``ktransformers defer=2``: the rule and its options."""
    return " ".join([point.miss, *(f"{name}={value}" for name, value in point.miss_options)])
