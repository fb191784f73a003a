"""DALI: the layer's 0-1 program, least maximum of device and CPU time, solved greedily."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moesim.lowering.misses.rule import Assignment, LayerWork, by_expert, cpu_times, residents, split


@dataclass(frozen=True)
class DaliRule:
    """Greedy assignment (arXiv 2602.03495): the fullest expert first, each to the side that leaves the least maximum.

    The paper states the program, min max(CPU time, device time) over 0-1 choices, and that it is solved greedily; we
    have no listing of its steps and no code, so the order (falling rows, then residents, then ids) and the ties (the side that
    itself ends earlier, then the device) are ours. The device's time is that of the timing model, loads beside computing; the
    copies of rows are neglected.
    """

    information: ClassVar[str] = "I2"
    source: ClassVar[str] = "DALI, arXiv 2602.03495"

    def assign(self, work: LayerWork) -> Assignment:
        """Return the greedy split."""
        cpu, gpu, rows = cpu_times(work, "dali"), by_expert(work, work.gpu_ns), by_expert(work, work.tokens)
        there = set(residents(work))
        gpu_end, cpu_end, link_end = work.shared_ns, 0, 0
        on_cpu = set()
        for expert in sorted(work.experts, key=lambda e: (-rows[e], e not in there, e)):
            link_after = link_end if expert in there else link_end + work.load_ns
            gpu_after = (gpu_end if expert in there else max(gpu_end, link_after)) + gpu[expert]
            cpu_after = cpu_end + cpu[expert]
            if (max(gpu_after, cpu_end), gpu_after) <= (max(cpu_after, gpu_end), cpu_after):
                gpu_end, link_end = gpu_after, link_after
            else:
                cpu_end = cpu_after
                on_cpu.add(expert)
        return split(work, on_cpu)
