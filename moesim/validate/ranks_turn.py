"""Expert-parallel steps rank after rank on one device: measured kernels, modelled collectives.

For a machine with one GPU. What it shows is that the tokens go where the plan says and what the ranks' kernels take, each with
the device to itself; it says nothing about a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moesim.hardware.collective import all_to_all_seconds
from moesim.hardware.spec import HardwareSpec
from moesim.model.spec import ModelSpec
from moesim.units import ns_from_s
from moesim.validate.ranks_run import Job, JobRun, device_clock
from moesim.validate.ranks_work import StepWork
from moesim.validate.ranks_world import RankWeights, RankWorld, WeightsConfig, one_thread, payload_bytes


def run_jobs_in_turn(
    model: ModelSpec,
    config: WeightsConfig,
    jobs: Sequence[Job],
    hardware: HardwareSpec,
    *,
    device: str = "cpu",
    on_job: Callable[[int], None] = lambda _: None,
) -> list[JobRun]:
    """Run jobs in this process, each phase rank after rank; an all-to-all takes what the fabric of `hardware` says.

    Tokens move between the ranks' rows in memory, outside any phase.
    """
    weights = RankWeights(model, config, device)
    worlds = [RankWorld(weights, rank, hardware.num_ranks) for rank in range(hardware.num_ranks)]
    runs = []
    with one_thread():
        for place, job in enumerate(jobs):
            for world in worlds:
                world.hold(job.slots)
            if not place:
                _TurnStep(worlds, job.works[0], hardware).run()
            ran = [_TurnStep(worlds, work, hardware).run() for work in job.works]
            marks, received, outputs = zip(*ran, strict=True)
            calm = np.zeros(len(ran), bool)
            runs.append(JobRun(np.stack(marks, axis=1), np.stack(received), calm, list(outputs) if job.checked else []))
            on_job(place + 1)
    return runs


class _TurnStep:
    """One step of all ranks in one process; every rank has a clock of its own, which starts at 0."""

    def __init__(self, worlds: Sequence[RankWorld], work: StepWork, hardware: HardwareSpec) -> None:
        self.worlds, self.work, self.hardware = worlds, work, hardware
        self._clock = device_clock(worlds[0].weights.device)
        self._now = np.zeros(len(worlds), np.int64)
        self._marks = [self._now.copy()]

    def run(self) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """Return marks int64[rank, mark], rows int64[layer, source, target], hidden rows of each rank."""
        steps, model = self.work.ranks, self.worlds[0].model
        embedded = [world.embed(step) for world, step in zip(self.worlds, steps, strict=True)]
        hidden, arrived = [rows for rows, _ in embedded], []
        for layer in range(model.num_moe_layers):
            own = [(layer, rows, step.context) for rows, step in zip(hidden, steps, strict=True)]
            hidden, counts = self._moe(layer, self._phase(RankWorld.attention, own), [slots[layer] for _, slots in embedded])
            arrived.append(counts)
        self._phase(RankWorld.logits, [(rows, step.heads) for rows, step in zip(hidden, steps, strict=True)])
        return np.stack(self._marks, axis=1), np.stack(arrived), [rows.float().cpu().numpy() for rows in hidden]

    def _moe(self, layer: int, hidden: list[Any], slots: list[Any]) -> tuple[list[Any], np.ndarray]:
        """Router to combine of one layer; returns hidden rows and int64[source, target], rows sent."""
        model = self.worlds[0].model
        routed = self._phase(RankWorld.route, [(layer, rows) for rows in hidden])
        packed = [world.pack(seen, gates, own)
                  for world, (seen, gates), own in zip(self.worlds, routed, slots, strict=True)]
        counts = np.array([part.counts for part in packed], np.int64)
        received = transposed([part.payload for part in packed], counts)
        self._collective(counts * payload_bytes(model))
        sums = self._phase(RankWorld.experts, [(layer, rows) for rows in received])
        back = transposed(sums, counts.T)
        self._collective(counts.T * (model.hidden_size * model.activation_bytes))
        merged = [world.merge(rows, part.token, own)
                  for world, rows, part, own in zip(self.worlds, hidden, packed, back, strict=True)]
        return merged, counts

    def _phase(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run one phase of every rank and put its time on the rank's own clock."""
        found = []
        for rank, (world, own) in enumerate(zip(self.worlds, arguments, strict=True)):
            start = self._clock()
            found.append(method(world, *own))
            self._now[rank] += self._clock() - start
        self._marks.append(self._now.copy())
        return found

    def _collective(self, traffic: np.ndarray) -> None:
        """All enter when the last has come, and leave together; traffic float64[source, target] in bytes."""
        self._now[:] = self._now.max() + ns_from_s(all_to_all_seconds(self.hardware, traffic).seconds)
        self._marks.append(self._now.copy())


def transposed(blocks: Sequence[Any], counts: np.ndarray) -> list[Any]:
    """Each rank's rows in order of target become each rank's rows in order of source; counts int64[source, target]."""
    import torch

    cut = [torch.split(block, row) for block, row in zip(blocks, counts.tolist(), strict=True)]
    return [torch.cat([row[target] for row in cut]) for target in range(len(cut))]
