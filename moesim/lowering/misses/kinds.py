"""A layer's experts grouped into kinds that the timing model cannot tell apart, and bounds on a split of them.

A split says how many of each kind run on the CPU, int64[kind, split]; many splits are bounded at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.lowering.misses.makespan import CpuJob
from moesim.lowering.misses.rule import LayerWork

FAR = np.iinfo(np.int64).max // 4


@dataclass(frozen=True)
class Kinds:
    """The distinct kinds of a layer's experts, and what they share; hashable, so that equal layers are solved once.

    Attributes:
        resident, gpu_ns, jobs: of each kind; `jobs` are the CPU's, None where it does not see the experts.
        sizes: how many experts of each kind. load_ns, shared_ns: as in `LayerWork`.
    """

    resident: tuple[bool, ...]
    gpu_ns: tuple[int, ...]
    jobs: tuple[CpuJob, ...] | None
    sizes: tuple[int, ...]
    load_ns: int
    shared_ns: int

    @property
    def num_splits(self) -> int:
        """How many splits there are."""
        return 1 if self.jobs is None else int(np.prod([size + 1 for size in self.sizes], dtype=object))

    def splits(self) -> np.ndarray:
        """Return all splits, int64[kind, split]."""
        if self.jobs is None:
            return np.zeros((len(self.sizes), 1), np.int64)
        return np.indices([size + 1 for size in self.sizes], dtype=np.int64).reshape(len(self.sizes), -1)

    def load_order(self) -> list[int]:
        """Return the absent kinds in the best order of their loads: the longest on the device first.

        Loads and computing are a flow shop of two machines with equal times on the first, where Johnson's order
        (Naval Research Logistics Quarterly 1, 1954) is this one; residents fill the device first.
        """
        absent = [kind for kind, there in enumerate(self.resident) if not there]
        return sorted(absent, key=lambda kind: -self.gpu_ns[kind])


def kinds_of(work: LayerWork) -> tuple[Kinds, list[list[int]]]:
    """Return the kinds of a layer, and the experts of each, rising."""
    copies = [CpuJob(copy - copy // 2, cpu, copy // 2) for cpu, copy in zip(work.cpu_ns, work.copy_ns, strict=False)]
    jobs = copies or [CpuJob(0, 0, 0)] * len(work.experts)
    members: dict[tuple[bool, int, CpuJob], list[int]] = {}
    for expert, *kind in zip(work.experts, work.resident, work.gpu_ns, jobs, strict=True):
        members.setdefault(tuple(kind), []).append(expert)  # type: ignore[arg-type]
    resident, gpu_ns, found = zip(*members, strict=True)
    sizes = tuple(len(experts) for experts in members.values())
    return Kinds(resident, gpu_ns, found if copies else None, sizes, work.load_ns, work.shared_ns), list(members.values())


def device_ends(kinds: Kinds, splits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int64[split], when the device ends in the best order, and when the loads end."""
    on_gpu = np.array(kinds.sizes, np.int64)[:, None] - splits
    end = np.full(splits.shape[1], kinds.shared_ns, np.int64)
    for kind, there in enumerate(kinds.resident):
        if there:
            end += kinds.gpu_ns[kind] * on_gpu[kind]
    loads = np.zeros_like(end)
    for kind in kinds.load_order():
        number, gpu = on_gpu[kind], kinds.gpu_ns[kind]
        # of equal experts either all wait for the device, or the first or the last of them for its load
        first = (loads + 1) * kinds.load_ns + number * gpu
        last = (loads + number) * kinds.load_ns + gpu
        end = np.where(number > 0, np.maximum(end + number * gpu, np.maximum(first, last)), end)
        loads += number
    return end, loads * kinds.load_ns


def cpu_bounds(kinds: Kinds, splits: np.ndarray, loads_end: np.ndarray) -> np.ndarray:
    """Return int64[split], a time before which no order brings the CPU's last result back; 0 without any."""
    if kinds.jobs is None:
        return np.zeros(splits.shape[1], np.int64)
    there, cpu, back = (np.array(column, np.int64)[:, None] for column in zip(*kinds.jobs, strict=True))
    used = splits > 0
    sent, computed, returned = (splits * there).sum(0), (splits * cpu).sum(0), (splits * back).sum(0)
    bounds = (
        computed + _ends_of_row(kinds.jobs, splits),
        sent + np.where(used, cpu + back, FAR).min(0),
        returned + np.where(used, there + cpu, FAR).min(0),
        np.where(returned > 0, loads_end + returned, 0),
    )
    return np.where(used.any(0), np.maximum.reduce(bounds), 0)


def _ends_of_row(jobs: tuple[CpuJob, ...], splits: np.ndarray) -> np.ndarray:
    """Return int64[split], the least that the first job's way there and the last one's way back can take.

    Both ways rise with the copy, so they are those of the two shortest copies; a single job has both ways itself.
    """
    seen = np.zeros(splits.shape[1], np.int64)
    first, second = np.zeros((2, len(seen)), np.int64), np.zeros((2, len(seen)), np.int64)
    for kind in sorted(range(len(jobs)), key=lambda each: jobs[each].there_ns + jobs[each].back_ns):
        ways = np.array([[jobs[kind].there_ns], [jobs[kind].back_ns]], np.int64)
        number = splits[kind]
        first = np.where((seen == 0) & (number > 0), ways, first)
        second = np.where((seen < 2) & (seen + number >= 2), ways, second)
        seen += number
    both = np.minimum(first[0] + second[1], second[0] + first[1])
    return np.where(seen >= 2, both, first.sum(0))
