"""Expert-parallel steps run for real: one process per rank, real all-to-alls.

A job is some steps under one plan. Each rank notes the time at the end of every phase: attention, router, dispatch (an
all-to-all of counts, then one of tokens), experts, combine (the tokens' way back), and the head at the end of the step.

A rank whose core is taken away by another program holds up all the others, so a step is run again when any rank was without its
core for more than `LOST_SHARE` of its compute time, by the thread's own CPU clock. Neither the step's time nor a prediction
has a say in that, and how many steps stayed disturbed is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moesim.errors import CheckError
from moesim.model.spec import ModelSpec
from moesim.validate.ranks_launch import RankGroup, run_ranks
from moesim.validate.ranks_work import RankStep, StepWork
from moesim.validate.ranks_world import Packed, RankWeights, RankWorld, WeightsConfig

if TYPE_CHECKING:
    import torch

LAYER_PHASES = ("attention", "router", "dispatch", "experts", "combine")
LOST_SHARE = 0.05
TRIES = 3


@dataclass(frozen=True)
class Job:
    """Steps to run under one plan.

    Attributes:
        slots: int32[layer, slot], the plan's physical_to_logical.
        works: what each step asks of each rank.
        checked: whether the ranks hand back what they computed.
    """

    slots: np.ndarray
    works: tuple[StepWork, ...]
    checked: bool = True


@dataclass
class JobRun:
    """What a job came to.

    Attributes:
        marks: int64[rank, step, mark], ns of one clock: the step's start, the end of each of `LAYER_PHASES` layer by layer,
            the end of the head.
        outputs: per step and rank, hidden rows [token, hidden] after the last layer as float32 (none unless checked).
        received: int64[step, layer, source, target], rows that went from rank to rank.
        disturbed: bool[step], whether a rank was without its core in every try at the step.
    """

    marks: np.ndarray
    received: np.ndarray
    disturbed: np.ndarray
    outputs: list[list[np.ndarray]] = field(default_factory=list)

    def check_traffic(self, works: Sequence[StepWork]) -> None:
        """Raise CheckError unless exactly the tokens that the lowering counts went from rank to rank."""
        expected = np.array([[traffic.sent for traffic in work.traffic] for work in works])
        wrong = np.argwhere(self.received != expected)
        if len(wrong):
            step, layer, source, target = wrong[0].tolist()
            raise CheckError(f"step {step}, layer {layer}: rank {source} sent {self.received[step, layer, source, target]} "
                             f"tokens to rank {target}, the plan says {expected[step, layer, source, target]}")


class RankPayload(NamedTuple):
    """What one rank's process is given: `jobs` are (slots of the plan, own steps, whether outputs are wanted).

    `tries` is how often a disturbed step is run at most.
    """

    model: ModelSpec
    config: WeightsConfig
    jobs: list[tuple[np.ndarray, list[RankStep], bool]]
    tries: int


def run_jobs(
    model: ModelSpec,
    config: WeightsConfig,
    jobs: Sequence[Job],
    *,
    backend: str = "gloo",
    timeout_s: float = 120.0,
    tries: int = TRIES,
    on_job: Callable[[int], None] = lambda _: None,
) -> list[JobRun]:
    """Run jobs one after the other in one group of processes, and return what each came to.

    `on_job` is told how many jobs are done. Raises CheckError as `ranks_launch.run_ranks` does.
    """
    num_ranks = len(jobs[0].works[0].ranks)
    payloads = [
        RankPayload(
            model, config, [(job.slots, [work.ranks[rank] for work in job.works], job.checked) for job in jobs], tries
        )
        for rank in range(num_ranks)
    ]
    parts: list[list[Any]] = [[] for _ in range(num_ranks)]

    def collect(rank: int, message: Any) -> None:
        parts[rank].append(message)
        on_job(min(map(len, parts)))

    run_ranks(rank_body, payloads, backend=backend, timeout_s=timeout_s, on_message=collect)
    return [_joined(of_job) for of_job in zip(*parts, strict=True)]


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]]) -> JobRun:
    """Put the ranks' own parts of one job together."""
    marks, received, disturbed, outputs = zip(*parts, strict=True)
    return JobRun(np.stack(marks), np.stack(received, axis=3), disturbed[0], [list(step) for step in zip(*outputs, strict=True)])


def rank_body(group: RankGroup, payload: RankPayload, send: Callable[[Any], None]) -> None:
    """One rank's part of all jobs; sends (marks, rows received, disturbed, outputs) after each."""
    world = RankWorld(RankWeights(payload.model, payload.config, group.device), group.rank, group.num_ranks)
    exchange = GroupExchange(group)
    for slots, _, _ in reversed(payload.jobs):
        world.hold(slots)  # makes the weights, and touches their pages, before anything is timed
    _run_step(world, exchange, payload.jobs[0][1][0])  # the first step over a new group is slower
    rough = calm = 0
    for slots, steps, checked in payload.jobs:
        world.hold(slots)
        tries = payload.tries if calm >= rough else 1  # on a machine that is never quiet, more tries only take time
        ran = [_undisturbed_step(world, exchange, step, tries) for step in steps]
        marks, received, disturbed, outputs = zip(*ran, strict=True)
        rough, calm = rough + sum(disturbed), calm + len(steps) - sum(disturbed)
        send((np.array(marks), np.array(received), np.array(disturbed), list(outputs) if checked else []))


class GroupExchange:
    """All-to-alls of a torch process group."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group

    def barrier(self) -> None:
        """Wait for every rank."""
        import torch.distributed as dist

        dist.barrier()

    def largest(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        import torch
        import torch.distributed as dist

        found = torch.tensor([value], dtype=torch.float64, device=self._group.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return float(found)

    def dispatch(self, packed: Packed) -> tuple[torch.Tensor, list[int]]:
        """Send each rank its rows; return the rows received, in order of source, and how many from each."""
        import torch
        import torch.distributed as dist

        sent = torch.tensor(packed.counts, dtype=torch.int64, device=self._group.device)
        counts = torch.empty_like(sent)
        dist.all_to_all_single(counts, sent)
        received = counts.tolist()
        return self._all_to_all(packed.payload, packed.counts, received), received

    def combine(self, sums: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        """Send every row back to where it came from; return the own rows in the order of `dispatch`."""
        return self._all_to_all(sums, received, sent)

    def _all_to_all(self, rows: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        import torch.distributed as dist

        found = rows.new_empty((sum(received), rows.shape[1]))
        dist.all_to_all_single(found, rows, received, sent)
        return found


def _undisturbed_step(
    world: RankWorld, exchange: GroupExchange, step: RankStep, tries: int
) -> tuple[list[int], list[list[int]], bool, np.ndarray]:
    """Run a step until every rank had its core to itself, or `tries` times; which of the two is the third of what it returns."""
    for _ in range(tries):
        marks, cpu_ns, arrived, hidden = _run_step(world, exchange, step)
        lost = exchange.largest(_lost_share(marks, cpu_ns) if world.weights.device == "cpu" else 0.0)
        if lost <= LOST_SHARE:
            break
    return marks, arrived, lost > LOST_SHARE, hidden


def _lost_share(marks: list[int], cpu_ns: list[int]) -> float:
    """Return the share of the time of compute phases in which the thread was on no core."""
    kinds = [*LAYER_PHASES * ((len(marks) - 2) // len(LAYER_PHASES)), "head"]
    computes = np.array([kind not in ("dispatch", "combine") for kind in kinds])
    passed, on_core = np.diff(marks)[computes].sum(), np.diff(cpu_ns)[computes].sum()
    return float(1.0 - on_core / passed)


def _run_step(
    world: RankWorld, exchange: GroupExchange, step: RankStep
) -> tuple[list[int], list[int], list[list[int]], np.ndarray]:
    """One step of one rank: marks [mark], CPU time at each, rows received [layer, source], hidden rows [token, hidden]."""
    clock, marks, cpu_ns = device_clock(world.weights.device), [], []

    def mark() -> None:
        marks.append(clock())
        cpu_ns.append(time.thread_time_ns())

    hidden, slots = world.embed(step)
    arrived = []
    exchange.barrier()
    mark()
    for layer in range(world.model.num_moe_layers):
        hidden = world.attention(layer, hidden, step.context)
        mark()
        seen, gates = world.route(layer, hidden)
        mark()
        packed = world.pack(seen, gates, slots[layer])
        received, counts = exchange.dispatch(packed)
        mark()
        sums = world.experts(layer, received)
        mark()
        hidden = world.merge(hidden, packed.token, exchange.combine(sums, counts, packed.counts))
        mark()
        arrived.append(counts)
    world.logits(hidden, step.heads)
    mark()
    return marks, cpu_ns, arrived, hidden.float().cpu().numpy()


def device_clock(device: str) -> Callable[[], int]:
    """Return a function that waits for the device and gives ns of a clock that all processes of a machine share."""
    if not device.startswith("cuda"):
        return time.perf_counter_ns
    import torch

    def clock() -> int:
        torch.cuda.synchronize()
        return time.perf_counter_ns()

    return clock
