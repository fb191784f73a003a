"""Costs of an expert-parallel step from phases measured under other placements: a machine and a profile for the simulator.

Adding up micro-benchmarks of single ranks comes out too low: it leaves out that a phase lasts until its last rank is done, and
that ranks share memory and cores. So each phase is measured whole, in steps under random placements, and written as a fixed
time plus rising terms (`ranks_fit`):

- attention: tokens and context of the rank that came last to the dispatch; router: its tokens; head: the most requests;
- experts: rows, slots with rows and rows of the fullest slot, of the busiest rank by these terms;
- dispatch and combine: bytes of the busiest port, one rate for both and a fixed time for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.calibrate.shapes import attention_shape, expert_shape, router_shape
from moesim.hardware.cost import GROUPED_AXES, CostModel
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.spec import Device, Fabric, HardwareSpec, Memory
from moesim.lowering.work import compute_dtype, head_work
from moesim.model.spec import ModelSpec
from moesim.units import GB, TB, s_from_ns
from moesim.validate.ranks_fit import FLOOR_S, PhaseFit, fit_phase
from moesim.validate.ranks_table import HEAD, Timeline
from moesim.validate.ranks_work import StepWork
from moesim.validate.ranks_world import payload_bytes

AXES = {"attention": ("tokens", "context"), "router": ("tokens",), "experts": GROUPED_AXES, HEAD: ("tokens",)}
EXCHANGE = "exchange"
LEAST_BYTE_S = 1.0 / TB
_PLACEHOLDER = "placeholder"


@dataclass(frozen=True)
class Samples:
    """Phases measured: kind -> float64[sample, rank, term] (the first term is 1), and float64[sample] seconds.

    `EXCHANGE` holds dispatches and combines: its terms are whether it is a dispatch, whether a combine, and bytes.
    """

    terms: dict[str, np.ndarray]
    seconds: dict[str, np.ndarray]


def joined(parts: Sequence[Samples]) -> Samples:
    """Return the samples of all parts."""
    return Samples(*({kind: np.concatenate([getattr(part, name)[kind] for part in parts]) for kind in parts[0].terms}
                     for name in ("terms", "seconds")))


def phase_samples(model: ModelSpec, works: Sequence[StepWork], timeline: Timeline) -> Samples:
    """Return the phases of steps that were run."""
    found: dict[str, list[tuple[list[list[float]], float]]] = {kind: [] for kind in (*AXES, EXCHANGE)}
    for step, work in enumerate(works):
        found[HEAD].append(([[1.0, work.heads.max()]], _seconds(timeline, HEAD, step, 0).max()))
        for layer in range(model.num_moe_layers):
            taken = {kind: _seconds(timeline, kind, step, layer) for kind in timeline.spans if kind != HEAD}
            last = int(np.argmax(taken["attention"] + taken["router"]))
            tokens, context = float(work.tokens[last]), float(work.context[last])
            found["attention"].append(([[1.0, tokens, context]], taken["attention"][last]))
            found["router"].append(([[1.0, tokens]], taken["router"][last]))
            found["experts"].append(([[1.0, *load] for load in work.expert_loads(layer).tolist()], taken["experts"].max()))
            moved = work.busiest_tokens(layer)
            found[EXCHANGE].append(([[1.0, 0.0, moved * payload_bytes(model)]], taken["dispatch"].max()))
            returned = moved * model.hidden_size * model.activation_bytes
            found[EXCHANGE].append(([[0.0, 1.0, returned]], taken["combine"].max()))
    return Samples({kind: np.array([terms for terms, _ in rows], np.float64) for kind, rows in found.items()},
                   {kind: np.array([seconds for _, seconds in rows]) for kind, rows in found.items()})


def _seconds(timeline: Timeline, kind: str, step: int, layer: int) -> np.ndarray:
    return timeline.duration_ns(kind)[:, step, layer] * s_from_ns(1)


def ranks_costs(
    model: ModelSpec, repetitions: Sequence[Samples], device_kind: str, modelled: HardwareSpec | None = None
) -> list[CostModel]:
    """Return the cost model of this machine's ranks for each repetition; every cost of a step comes from the samples.

    Args:
        repetitions: the samples of each.
        modelled: the machine whose fabric the collectives took their time from, where they were not run for real.
    """
    num_ranks = repetitions[0].terms["experts"].shape[1]
    fits = {kind: fit_phase([part.terms[kind] for part in repetitions], [part.seconds[kind] for part in repetitions])
            for kind in repetitions[0].terms}
    return [_cost(model, num_ranks, fits, place, device_kind, modelled) for place in range(len(repetitions))]


def _cost(
    model: ModelSpec, num_ranks: int, fits: dict[str, PhaseFit], place: int, device_kind: str, modelled: HardwareSpec | None
) -> CostModel:
    tables = [_table(model, kind, device_kind, fits[kind], place) for kind in AXES]
    if modelled is not None:
        cost = CostModel(modelled, CalibrationProfile("phases", tuple(tables)))
        cost.route_source = "stated"
        return cost
    exchange = fits[EXCHANGE]
    dispatch_s, combine_s, byte_s = (exchange.coefficients * exchange.scales[place]).tolist()
    latency_s = min(dispatch_s, combine_s)  # what one of the two takes longer is its tasks' own overhead
    tables += [_overhead(kind, seconds - latency_s, exchange.samples // 2)
               for kind, seconds in (("dispatch", dispatch_s), ("combine", combine_s))]
    machine = ranks_machine(num_ranks, device_kind, latency_s, 1.0 / max(byte_s, LEAST_BYTE_S))
    cost = CostModel(machine, CalibrationProfile("phases", tuple(tables)))
    cost.route_source = "interpolated"  # latency and rate are fitted to measured exchanges
    return cost


def _table(model: ModelSpec, kind: str, device_kind: str, fit: PhaseFit, place: int) -> MeasuredTable:
    """Write a fit as a table over the corners of what was measured, between which it interpolates to the same line."""
    shapes = {"attention": attention_shape(model), "router": router_shape(model), "experts": expert_shape(model),
              HEAD: head_work(model, 1).shape}
    sizes = tuple(itertools.product(*(sorted(set(axis)) for axis in fit.ends.T[1:].tolist())))
    line = np.array([(1.0, *size) for size in sizes]) @ fit.coefficients * fit.scales[place]
    return MeasuredTable(
        "grouped_ffn" if kind == "experts" else kind, device_kind, shapes[kind], compute_dtype(model), AXES[kind], sizes,
        tuple(np.maximum(line, FLOOR_S).tolist()), samples=(fit.samples,) * len(sizes))


def _overhead(kind: str, seconds: float, samples: int) -> MeasuredTable:
    return MeasuredTable("task_overhead", "", kind, "", ("tasks",), ((1.0,),), (max(FLOOR_S, seconds),), (0.0,), (samples,))


def ranks_machine(num_ranks: int, device_kind: str, latency_s: float, bytes_per_s: float) -> HardwareSpec:
    """Return this machine as `num_ranks` equal devices on one fabric; of its numbers only the fabric's are ever used."""
    names = [f"rank{rank}" for rank in range(num_ranks)]
    flops = {"fp32": float(TB), "bf16": float(TB)}
    kind = "hbm" if device_kind == "gpu" else "dram"
    devices = {name: Device(name, device_kind, f"{name}.memory", flops, reference=_PLACEHOLDER) for name in names}
    memories = {f"{name}.memory": Memory(f"{name}.memory", kind, TB, 10 * GB, reference=_PLACEHOLDER) for name in names}
    fabric = Fabric("exchange", "processes", "node", bytes_per_s, latency_s, reference=_PLACEHOLDER)
    return HardwareSpec("ranks of this machine", devices, memories, fabrics=(fabric,), ranks=tuple(names),
                        ranks_per_node=num_ranks, references={_PLACEHOLDER: "not a data sheet: replaced by measured phases"})
