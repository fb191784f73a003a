"""HybriMoE's layer scheduler (arXiv 2504.05897): the paper's three timelines, and the deque of the released code."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

from moesim.errors import unknown
from moesim.lowering.misses.rule import (
    Assignment,
    LayerWork,
    absentees,
    by_expert,
    check_not_negative,
    cpu_times,
    residents,
)


@dataclass(frozen=True)
class HybriMoeRule:
    """The paper's rule (sec. IV-B): whichever of three timelines would end its next piece first takes that piece.

    The device takes what has landed or was resident, the fullest expert first; the CPU takes the absent expert of fewest
    rows; the link moves the absent expert of most rows, which joins the device's queue when it lands. Ties: device, then CPU,
    then link; of equally full experts the lower id is loaded first and computed on the CPU last. The CPU takes no residents,
    and the copies of rows are neglected, as in the paper. `cpu_first_ns`: what the CPU's first expert costs beside its time
    (cold caches); the machine's costs have no such part, so it is 0.
    """

    cpu_first_ns: int = 0
    information: ClassVar[str] = "I2"
    source: ClassVar[str] = "HybriMoE, arXiv 2504.05897, sec. IV-B"

    def __post_init__(self) -> None:
        check_not_negative("hybrimoe", cpu_first_ns=self.cpu_first_ns)

    def assign(self, work: LayerWork) -> Assignment:
        """Fill the timelines until every expert has its place."""
        lines = _Timelines(work, self.cpu_first_ns)
        while lines.queue or lines.absent:
            lines.advance()
        return Assignment(tuple(lines.on_gpu), tuple(lines.on_cpu))


@dataclass
class _Timelines:
    """The three timelines: when each is free, the device's queue (expert -> ns of landing), what is still absent."""

    work: LayerWork
    cpu_first_ns: int
    link_ns: int = 0
    on_gpu: list[int] = field(default_factory=list)
    on_cpu: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        work = self.work
        self.rows, self.gpu = by_expert(work, work.tokens), by_expert(work, work.gpu_ns)
        self.cpu = cpu_times(work, "hybrimoe")
        self.gpu_ns, self.cpu_ns = work.shared_ns, self.cpu_first_ns
        self.queue = dict.fromkeys(residents(work), 0)
        self.absent = deque(absentees(work))  # the fullest first

    def advance(self) -> None:
        """Let the timeline whose next piece ends first take it."""
        expert, gpu_end = self._next_on_gpu()
        cpu_end = self.cpu_ns + self.cpu[self.absent[-1]] if self.absent else math.inf
        link_end = self.link_ns + self.work.load_ns if self.absent else math.inf
        if gpu_end <= min(cpu_end, link_end):
            self.gpu_ns = int(gpu_end)
            self.on_gpu.append(expert)
            del self.queue[expert]
        elif cpu_end <= link_end:
            self.cpu_ns = int(cpu_end)
            self.on_cpu.append(self.absent.pop())
        else:
            self.link_ns = int(link_end)
            self.queue[self.absent.popleft()] = self.link_ns

    def _next_on_gpu(self) -> tuple[int, float]:
        """Return what the device computes next, and when that ends: the fullest that is there, or the first to land."""
        if not self.queue:
            return -1, math.inf
        expert = min(self.queue, key=lambda e: (max(self.queue[e], self.gpu_ns), -self.rows[e], e))
        return expert, max(self.queue[expert], self.gpu_ns) + self.gpu[expert]


MACHINE = "machine"
REPOSITORY_CPU_NS = {"deepseek": 1_000_000, "mixtral": 200_000, "qwen2": 800_000}
REPOSITORY_CPU_FIRST_NS, REPOSITORY_GPU_NS, REPOSITORY_MOVE_NS = 790_000, 500_000, 417_910


@dataclass(frozen=True)
class HybriMoeRepositoryRule:
    """The released code's rule (PKU-SEC-Lab/HybriMoE, operators/experts.py, `HSS`).

    One list: residents by falling rows, then absent experts by falling rows. The device may take from its front, the CPU
    from its back; the one that would end first takes (a tie: the device), until the list is empty. So the CPU may take residents
    once no absent expert is left. The code calls it in decode only, in prefill the device computes everything; here
    it decides whenever it is asked.

    `constants`: ``machine`` (this machine's times), or the code's own for ``deepseek``, ``mixtral`` or ``qwen2``: 1, 0.2
    or 0.8 per row and 0.79 for the CPU's first expert, 0.5 per expert on the device, 0.4179 per load; it states no unit, these
    are read as ms. With ``machine``, `cpu_first_ns` takes the place of the 0.79.
    """

    constants: str = MACHINE
    cpu_first_ns: int = 0
    information: ClassVar[str] = "I2"
    source: ClassVar[str] = "PKU-SEC-Lab/HybriMoE"

    def __post_init__(self) -> None:
        if self.constants not in (MACHINE, *REPOSITORY_CPU_NS):
            raise unknown("constants of hybrimoe-repository", self.constants, (MACHINE, *REPOSITORY_CPU_NS))
        check_not_negative("hybrimoe-repository", cpu_first_ns=self.cpu_first_ns)

    def assign(self, work: LayerWork) -> Assignment:
        """Empty the list from its two ends."""
        gpu, cpu, gpu_first, cpu_first, load_ns = self._costs(work)
        there, rows = set(residents(work)), by_expert(work, work.tokens)
        waiting = deque([*sorted(there, key=lambda expert: (-rows[expert], expert)), *absentees(work)])
        on_gpu: list[int] = []
        on_cpu: list[int] = []
        gpu_ns, cpu_ns, link_ns = 0, 0, 0
        while waiting:
            front, back = waiting[0], waiting[-1]
            landed = gpu_ns if front in there else max(gpu_ns, link_ns + load_ns)
            gpu_end = landed + gpu[front] + (0 if on_gpu else gpu_first)
            cpu_end = cpu_ns + cpu[back] + (0 if on_cpu else cpu_first)
            if gpu_end <= cpu_end:
                gpu_ns, link_ns = gpu_end, link_ns if front in there else link_ns + load_ns
                on_gpu.append(waiting.popleft())
            else:
                cpu_ns = cpu_end
                on_cpu.append(waiting.pop())
        return Assignment(tuple(on_gpu), tuple(on_cpu))

    def _costs(self, work: LayerWork) -> tuple[dict[int, int], dict[int, int], int, int, int]:
        """Return ns by expert on device and CPU, the extra ns of the first on each, and the ns of a load."""
        cpu = cpu_times(work, "hybrimoe-repository")
        if self.constants == MACHINE:
            return by_expert(work, work.gpu_ns), cpu, work.shared_ns, self.cpu_first_ns, work.load_ns
        per_row = REPOSITORY_CPU_NS[self.constants]
        cpu = {expert: per_row * rows for expert, rows in by_expert(work, work.tokens).items()}
        return dict.fromkeys(work.experts, REPOSITORY_GPU_NS), cpu, 0, REPOSITORY_CPU_FIRST_NS, REPOSITORY_MOVE_NS
