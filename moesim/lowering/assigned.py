"""Layers whose experts a rule assigns to device, link and CPU as a whole (`lowering.misses`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.lowering.expert_times import ExpertTimes
from moesim.lowering.misses.rule import Assignment, LayerWork, MissRule, check_assignment

if TYPE_CHECKING:
    from moesim.lowering.offload import LayerMoment, OffloadProgram


class Assigned:
    """Tells a rule what a layer holds, and turns its answer into tasks."""

    def __init__(self, program: OffloadProgram, rule: MissRule) -> None:
        self._program, self._rule = program, rule
        self._times = ExpertTimes(program.model, program.machine, program.cost, program.policy.chunks,
                                  on_cpu=program.cpu_can_reach_experts())

    def schedule(self, at: LayerMoment, wanted: list[int]) -> None:
        """Add the tasks of a layer's experts."""
        program, work = self._program, self.work(at, wanted)
        assignment = self._rule.assign(work)
        check_assignment(work, assignment)
        there = {expert for expert, resident in zip(wanted, work.resident, strict=True) if resident}
        for expert in assignment.gpu:
            if expert in there:
                program.compute_resident(at, expert)
            else:
                program.transfers.forget(program.key(at.layer, expert))
                program.load(at, expert, set(wanted), keep=expert not in assignment.drop)
        self._on_cpu(at, assignment, there)

    def _on_cpu(self, at: LayerMoment, assignment: Assignment, there: set[int]) -> None:
        for expert in assignment.cpu:
            if expert not in there:
                self._program.transfers.forget(self._program.key(at.layer, expert))
            ends = at.deferred if expert in assignment.defer else at.tasks
            ends.append(self._program.compute_on_cpu(at, expert))

    def work(self, at: LayerMoment, wanted: list[int]) -> LayerWork:
        """Return what the rule may know of a layer, its experts in rising order."""
        resident = [self._program.cache.slot_of(at.layer, expert) >= 0 for expert in wanted]
        tokens = [int(at.counts[expert]) for expert in wanted]
        return self._times.layer(wanted, tokens, resident, layer=at.layer, now=at.now, step_tokens=len(at.step.rows))
