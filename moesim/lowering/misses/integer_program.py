"""The layer as a min-max 0-1 program in CBC: a second way to the optimum, which shares nothing with `exact`.

Positions on the link and on the CPU are chosen too, so no rule about orders goes in: ``loaded[i, k]`` says that expert i is the
k-th to be loaded (and computed, after the residents), ``sent[i, k]`` that it is the k-th on the CPU.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from moesim.errors import SolverError
from moesim.lowering.misses.makespan import CpuJob, cpu_jobs
from moesim.lowering.misses.rule import Assignment, LayerWork, absentees, by_expert, residents

if TYPE_CHECKING:
    import pulp


def integer_program(work: LayerWork) -> Assignment:
    """Return a best assignment of the timing model, by CBC; for a dozen experts at most.

    Raises:
        SolverError: CBC did not prove an optimum.
    """
    import pulp

    with warnings.catch_warnings():
        # PuLP 3 announces that PuLP 4 renames these calls and moves CBC out; 2 knows only these
        warnings.simplefilter("ignore", DeprecationWarning)
        model, kept, loaded, sent = _model(work)
        model.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=0, gapAbs=0.5))
    if model.sol_status != pulp.LpSolutionOptimal:
        raise SolverError(f"CBC proved no optimum of a layer: {pulp.LpStatus[model.status]}")
    there = [expert for expert, flag in kept.items() if flag.value() > 0.5]
    return Assignment((*there, *_in_order(loaded)), _in_order(sent))


def _model(work: LayerWork) -> tuple[pulp.LpProblem, dict[int, Any], dict[int, list[Any]], dict[int, list[Any]]]:
    """Return the program, and its choices: residents that stay, places on the link, places on the CPU."""
    import pulp

    model = pulp.LpProblem("layer", pulp.LpMinimize)
    makespan = pulp.LpVariable("makespan", lowBound=0)
    model += makespan
    loaded = _positions(model, "loaded", absentees(work))
    sent = _positions(model, "sent", list(work.experts) if work.cpu_ns else [])
    kept = {expert: pulp.LpVariable(f"kept_{expert}", cat="Binary") for expert in residents(work)}
    for expert in work.experts:
        places = [*loaded.get(expert, ()), *sent.get(expert, ()), *([kept[expert]] if expert in kept else [])]
        model += pulp.lpSum(places) == 1
    link_free = work.load_ns * pulp.lpSum(flag for row in loaded.values() for flag in row)
    _add_device(model, work, makespan, loaded, kept)
    _add_cpu(model, cpu_jobs(work) if sent else {}, makespan, sent, link_free)
    model += makespan >= link_free
    return model, kept, loaded, sent


def _positions(model: pulp.LpProblem, name: str, experts: list[int]) -> dict[int, list[Any]]:
    """Return 0-1 variables by expert and place; a place holds one expert at most, and is filled after those before it."""
    import pulp

    flags = {expert: [pulp.LpVariable(f"{name}_{expert}_{place}", cat="Binary") for place in range(len(experts))]
             for expert in experts}
    filled = [pulp.lpSum(column) for column in zip(*flags.values(), strict=True)]
    for place, number in enumerate(filled):
        model += number <= (filled[place - 1] if place else 1)
    return flags


def _add_device(model: pulp.LpProblem, work: LayerWork, makespan: Any, loaded: dict[int, list[Any]],
                kept: dict[int, Any]) -> None:
    import pulp

    gpu = by_expert(work, work.gpu_ns)
    end = work.shared_ns + pulp.lpSum(gpu[expert] * flag for expert, flag in kept.items())
    model += makespan >= end
    arrival: Any = 0
    for place, column in enumerate(zip(*loaded.values(), strict=True)):
        arrival = arrival + work.load_ns * pulp.lpSum(column)
        computing = pulp.lpSum(gpu[expert] * flag for expert, flag in zip(loaded, column, strict=True))
        before, end = end, pulp.LpVariable(f"device_{place}", lowBound=0)
        model += end >= before + computing
        model += end >= arrival + computing
        model += makespan >= end


def _add_cpu(model: pulp.LpProblem, jobs: dict[int, CpuJob], makespan: Any, sent: dict[int, list[Any]],
             link_free: Any) -> None:
    import pulp

    there: Any = 0
    computed: Any = 0
    link = link_free
    for place, column in enumerate(zip(*sent.values(), strict=True)):
        picked = list(zip((jobs[expert] for expert in sent), column, strict=True))
        there = there + pulp.lpSum(job.there_ns * flag for job, flag in picked)
        cpu_ns, back_ns = (pulp.lpSum(job[part] * flag for job, flag in picked) for part in (1, 2))
        before, computed = computed, pulp.LpVariable(f"computed_{place}", lowBound=0)
        model += computed >= before + cpu_ns
        model += computed >= there + cpu_ns
        before, link = link, pulp.LpVariable(f"back_{place}", lowBound=0)
        model += link >= before + back_ns
        model += link >= computed + back_ns
        model += makespan >= link


def _in_order(flags: dict[int, list[Any]]) -> tuple[int, ...]:
    """Return the placed experts by place."""
    placed = {place: expert for expert, row in flags.items() for place, flag in enumerate(row) if flag.value() > 0.5}
    return tuple(placed[place] for place in sorted(placed))
