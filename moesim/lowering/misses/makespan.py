"""The layer's timing model: how long a layer takes from its router on, under an assignment.

Four parts work at once, each on one thing at a time, in the order given:

- the link into the device: the loads, all known when the router ends, then the CPU's results, as they become ready;
- the device: the shared expert, then the experts; an absent one not before its load has ended;
- the link out of the device: the rows for the CPU;
- the CPU: an expert not before its rows are there.

So it is what the simulator does with one link in full duplex, one chunk per expert and a free slot for every load. Half of
`copy_ns` is the way there. A deferred expert takes its time, but the layer does not wait for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moesim.lowering.misses.rule import Assignment, LayerWork, MissRule, by_expert, residents


class CpuJob(NamedTuple):
    """One expert on the CPU: ns of its rows there, of computing, of its results back."""

    there_ns: int
    cpu_ns: int
    back_ns: int


def makespan_ns(work: LayerWork, assignment: Assignment) -> int:
    """Return the ns from the end of the router to the end of the layer."""
    device_end, loads_end = device_ns(work, assignment.gpu)
    if not assignment.cpu:
        return device_end
    jobs = cpu_jobs(work)
    ends = results_ns([jobs[expert] for expert in assignment.cpu], loads_end)
    awaited = [end for expert, end in zip(assignment.cpu, ends, strict=True) if expert not in assignment.defer]
    return max((device_end, *awaited))


def device_ns(work: LayerWork, order: Sequence[int]) -> tuple[int, int]:
    """Return when the device ends, computing these experts in order, and when their loads end."""
    there, gpu = set(residents(work)), by_expert(work, work.gpu_ns)
    end, link = work.shared_ns, 0
    for expert in order:
        if expert not in there:
            link += work.load_ns
            end = max(end, link)
        end += gpu[expert]
    return end, link


def results_ns(jobs: Sequence[CpuJob], loads_end: int) -> list[int]:
    """Return when the result of each job is on the device, the jobs in order, the link in free from `loads_end` on."""
    sent, computed, link, ends = 0, 0, loads_end, []
    for job in jobs:
        sent += job.there_ns
        computed = max(computed, sent) + job.cpu_ns
        if job.back_ns:
            link = max(link, computed) + job.back_ns
        ends.append(link if job.back_ns else computed)
    return ends


def cpu_jobs(work: LayerWork) -> dict[int, CpuJob]:
    """Return each expert's job on the CPU."""
    return {expert: CpuJob(copy - copy // 2, cpu, copy // 2)
            for expert, cpu, copy in zip(work.experts, work.cpu_ns, work.copy_ns, strict=True)}


def with_residents(work: LayerWork, experts: Iterable[int]) -> LayerWork:
    """Return the same work with exactly these of its experts resident."""
    there = set(experts)
    return dataclasses.replace(work, resident=tuple(expert in there for expert in work.experts))


def prefetch_gain_ns(work: LayerWork, rule: MissRule, expert: int) -> int:
    """Return what a prefetch of `expert` would gain in a layer of this predicted work; may be negative.

    The makespan as it is, less that with the expert resident, less one load (HybriMoE, arXiv 2504.05897, sec. IV-C; the
    formula with the load is that of the vllm-ascend re-implementation).
    """
    helped = with_residents(work, {*residents(work), expert})
    return makespan_ns(work, rule.assign(work)) - makespan_ns(helped, rule.assign(helped)) - work.load_ns
